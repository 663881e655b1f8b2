"""A data set from pictures and captions that other nodes give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from comfy_api.latest import io

from ..chroma_core.data.image_folder import bytes_in, store_pictures, stored
from ..chroma_core.errors import DataError
from . import host
from .dataset_widgets import config_from, outputs, shown, widgets
from .pictures import masks_of, pictures_of
from .sockets import schema

_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


class _Kept:
    """The folders that were written since the host started. When one of them is changed or deleted, every such node
    runs once more, and writes its own again."""

    def __init__(self) -> None:
        self._states: dict[Path, str] = {}
        self._losses = 0

    def note(self, folder: Path) -> None:
        """Remember a folder as it was written."""
        self._states[folder] = host.folder_state(folder)

    def losses(self) -> int:
        """How often until now a folder was found other than it was written; each loss is counted once."""
        changed = [folder for folder, state in self._states.items() if host.folder_state(folder) != state]
        for folder in changed:
            del self._states[folder]
        self._losses += len(changed)
        return self._losses


_kept = _Kept()


class ChromaDatasetFromImages(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ChromaDatasetFromImages",
            display_name="Chroma Dataset from Images",
            description="Pictures and captions straight from other nodes. A copy is kept below "
            "output/chromakit/datasets, so that a job can go on with it after a restart.",
            search_aliases=[
                "images to dataset",
                "train on images",
                "training data",
                "caption list",
                "image list",
                "image batch dataset",
            ],
            is_output_node=True,
            is_input_list=True,
            inputs=[
                io.Image.Input("images", tooltip="A batch, or a list of pictures of any sizes."),
                io.String.Input(
                    "captions",
                    multiline=True,
                    default="",
                    tooltip="One line for all pictures, or one line for each in their order; or link a list of texts. "
                    "[trigger] stands for the trigger word.",
                ),
                io.Mask.Input(
                    "masks",
                    optional=True,
                    tooltip="Train only where it is white. One for each picture, or one for all; a black one is none.",
                ),
                # Saved workflows hold values by position: new widgets go to the end.
                *widgets(
                    "trigger", "resolution", "repeats", "caption_dropout", "missing_caption", "flip", "caption_prefix",
                    "caption_suffix", "tag_shuffles", "keep_tags", "more_resolutions", "alignment", "upscale", "crop",
                    "regularisation", "weight", "sigma_bias", "latents", "posterior_samples", "random_crops",
                    "mask_floor", "background",
                ),
            ],
            outputs=outputs(),
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> int:
        """What other nodes give is watched by the host; here only whether what was stored is still there."""
        return _kept.losses()

    @classmethod
    def execute(cls, images, captions, masks=(), **options: Any) -> io.NodeOutput:
        fields = {name: values[0] for name, values in options.items()}
        pictures = pictures_of(images)
        texts = [str(text) for text in captions if text is not None]
        _check_captions(texts, fields)
        masks = masks_of(masks or (), pictures)
        root = host.pictures_folder()
        folder = store_pictures(root, pictures, texts, masks, host.Progress(max(1, len(pictures))).step)
        _kept.note(folder)
        used = "files" if any(masks) else "none"
        return shown(cls, config_from(str(folder), masks=used, **fields), _where(folder))


def _check_captions(texts: list[str], fields: dict[str, Any]) -> None:
    """Raises DataError when no picture would have a caption, though it is not said that this is meant."""
    if not any(text.strip() for text in texts) and fields.get("missing_caption") != "empty":
        raise DataError(
            "There is no caption. Write what the pictures show into captions (one line for all, or one line for each), "
            "link a list of texts, or choose missing_caption = empty to train without."
        )


def _where(folder: Path) -> str:
    """Where the copy lies, how much all of them take, and what to do about it."""
    sets, total = stored(folder.parent)
    return (
        f"kept in {folder} ({_size(bytes_in(folder))}); {sets} such {'folder' if sets == 1 else 'folders'} take "
        f"{_size(total)}. Delete those that no unfinished job needs."
    )


def _size(number: int) -> str:
    value, unit = next((number / scale, unit) for scale, unit in _UNITS if number >= scale or unit == "kB")
    return f"{value:.1f} {unit}"


NODES = [ChromaDatasetFromImages]
