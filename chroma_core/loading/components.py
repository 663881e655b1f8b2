"""Building the model's parts from a diffusers folder: on the meta device first, then weight by weight from the files.

Never through `from_pretrained`: it switches the process-wide default dtype and patches `nn.Module` while it works, and
a training thread that loads its model must not change what a prompt computes at that moment. Weights are never held
twice, and are ordinary tensors (not inference tensors) even when a node loads them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoTokenizer, T5Config, T5EncoderModel

from ..errors import ModelFileError
from ..files import sha256_file
from ..lora.adapters import merge
from ..lora.formats import read_lora
from ..precision import Precision, precision, quantise
from ..text import TextEncoder
from ..transformer import ChromaTransformer
from .hub import model_folder
from .spec import LoraUse, ModelSpec

Device = torch.device | str
Module = TypeVar("Module", bound=nn.Module)


def load_transformer(spec: ModelSpec, device: Device, merged_loras: Sequence[LoraUse] = ()) -> ChromaTransformer:
    """The transformer of `spec` on `device`, in eval mode, frozen; `merged_loras` go in before quantising."""
    chosen = precision(spec.precision)
    folder = model_folder(spec) / "transformer"
    with torch.inference_mode(False):
        model = _assemble(lambda config: ChromaTransformer(**config), folder, chosen)
        for use in merged_loras:
            merge(model, read_lora(use.path), use.strength, allow_partial=use.allow_partial)
        quantise(model, chosen)
        return model.to(device)  # type: ignore[arg-type]


def load_text_encoder(spec: ModelSpec, device: Device) -> TextEncoder:
    """The T5 encoder and tokenizer of `spec`."""
    chosen = precision(spec.text_precision)
    folder = model_folder(spec)

    def build(config: dict[str, Any]) -> T5EncoderModel:
        return T5EncoderModel(T5Config(**config))

    with torch.inference_mode(False):
        model = _assemble(build, folder / "text_encoder", chosen, tied={"encoder.embed_tokens.weight": "shared.weight"})
        quantise(model, chosen)
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        except (OSError, ValueError) as error:
            raise ModelFileError(f"The tokenizer in '{folder / 'tokenizer'}' cannot be read: {error}") from error
        return TextEncoder(model.to(device), tokenizer)  # type: ignore[arg-type]


def load_vae(spec: ModelSpec, device: Device) -> AutoencoderKL:
    """The VAE of `spec`, in fp32: bf16 shows in flat colours, and it is small."""
    with torch.inference_mode(False):
        folder = model_folder(spec) / "vae"
        return _assemble(lambda config: AutoencoderKL(**config), folder, precision("fp32")).to(device)  # type: ignore[arg-type]


def base_hash(spec: ModelSpec) -> str:
    """A fingerprint of the transformer's weights: the file's sha256, or for shards the sha256 of theirs in order."""
    digests = [
        _cached_sha256(path, path.stat().st_size, path.stat().st_mtime_ns)
        for path in weight_files(model_folder(spec) / "transformer")
    ]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


@lru_cache(maxsize=64)
def _cached_sha256(path: Path, size: int, modified_ns: int) -> str:
    return sha256_file(path)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of one component: those that its index names, or the only one there is."""
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if indexes:
        shards = sorted(set(_read_json(indexes[0]).get("weight_map", {}).values()))
        missing = [name for name in shards if not (folder / name).is_file()]
        if missing or not shards:
            raise ModelFileError(
                f"The model in '{folder}' is incomplete: {', '.join(missing) or 'the index names no file'}. "
                "Download it again; files that are complete are kept."
            )
        return [folder / name for name in shards]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelFileError(
            f"There are no weights in '{folder}': expected a .safetensors file (pickles, .bin or .pt, are not read)."
        )
    return files[:1]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelFileError(f"'{path}' cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelFileError(f"'{path}' should hold a JSON object, but holds a {type(value).__name__}.")
    return value


def _tensors(files: Iterable[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (safe_open is not iterable)
                    yield name, file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelFileError(
                f"'{path}' is not a readable safetensors file ({error}). It may be cut off: download it again."
            ) from error


def transformer_outline(folder: Path) -> ChromaTransformer:
    """The module tree that a component folder's config.json describes, on the meta device: names and shapes only."""
    return _outline(lambda config: ChromaTransformer(**config), folder)


def _outline(build: Callable[[dict[str, Any]], Module], folder: Path) -> Module:
    config = {k: v for k, v in _read_json(folder / "config.json").items() if not k.startswith("_")}
    try:
        with torch.device("meta"):
            return build(config)
    except (TypeError, ValueError) as error:
        raise ModelFileError(f"'{folder / 'config.json'}' does not describe this kind of model: {error}") from error


def _assemble(
    build: Callable[[dict[str, Any]], Module], folder: Path, chosen: Precision, tied: dict[str, str] | None = None
) -> Module:
    """Build a module without memory, then give it the files' weights, each cast (and so copied) on its own.

    `tied` maps names that a file may leave out to the name whose weight they share.
    """
    module = _outline(build, folder)
    expected = {name: tensor.shape for name, tensor in module.state_dict().items()}
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in _tensors(weight_files(folder)):
        if name not in expected or tensor.shape != expected[name]:
            raise ModelFileError(
                f"'{folder}' holds the tensor '{name}' of shape {list(tensor.shape)}, but its config.json asks for "
                f"{list(expected[name]) if name in expected else 'no such tensor'}. The files do not belong together."
            )
        # A copy in any case: weights must not stay views of the file, which the user may replace while they are in use.
        weights[name] = tensor.to(chosen.dtype, copy=True)
    for name, source in (tied or {}).items():
        if name not in weights and source in weights:
            weights[name] = weights[source]
    missing = sorted(set(expected) - set(weights))
    if missing:
        raise ModelFileError(
            f"'{folder}' lacks {len(missing)} of {len(expected)} tensors, e.g. {', '.join(missing[:3])}. "
            "The download may be incomplete, or the files belong to another model."
        )
    module.load_state_dict(weights, assign=True)
    return module.requires_grad_(False).eval()
