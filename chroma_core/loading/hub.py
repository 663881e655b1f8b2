"""Finding the folder that holds a model: the pack's own, the user's, or the Hub's cache (downloaded on demand)."""

from __future__ import annotations

from pathlib import Path

from ..errors import ModelFileError
from ..flavours import Flavour, flavour
from .spec import ModelSpec

# Single-file copies of the same weights also lie in the repositories; only the diffusers folders are read here.
HUB_FILES = [
    "model_index.json",
    *(f"{part}/*" for part in ("transformer", "text_encoder", "tokenizer", "vae", "scheduler")),
]


def model_folder(spec: ModelSpec) -> Path:
    """The diffusers folder of `spec`; fetches it from the Hub when it is not in the shared cache yet.

    `HF_ENDPOINT`, `HF_TOKEN`, `HF_HUB_OFFLINE` and `HF_HOME` mean what they mean to huggingface_hub.
    Raises ModelFileError when the folder is missing or the download fails, naming the reason and the way out.
    """
    chosen = flavour(spec.flavour)
    folder = Path(spec.folder) if spec.folder else chosen.folder
    if folder is None:
        return _from_hub(chosen)
    if not (folder / "model_index.json").is_file():
        raise ModelFileError(
            f"'{folder}' is not a model in diffusers layout: it has no model_index.json. Name the folder that holds "
            "the sub-folders transformer, text_encoder, tokenizer and vae, or choose a flavour."
        )
    return folder


def _from_hub(chosen: Flavour) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    assert chosen.repository is not None
    try:
        return Path(snapshot_download(chosen.repository, revision=chosen.revision, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelFileError(
            f"The flavour '{chosen.name}' could not be fetched from the Hub repository {chosen.repository}: {reason} "
            "Check the network, HF_ENDPOINT and HF_TOKEN and try again (what was downloaded is kept), or name a local "
            "folder with the model in diffusers layout."
        ) from error
