"""Writers of weight files for tests, in every form that users have, and of files that only look like weights.

Writers of quantised forms return what a reader must get back: name → fp32 tensor, computed with the format's own
reference (`w.float() * scale`, `gguf.quants.dequantize`).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import pytest
import safetensors
import torch
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file, save_file
from torch import Tensor

from chroma_core.names import transformer as keys

Notation = Literal["scale_weight", "header", "layers", "bare"]
NOTATIONS: tuple[Notation, ...] = ("scale_weight", "header", "layers", "bare")

GGUF_TYPES = [
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ1_0",
    "TQ2_0", "MXFP4", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S", "IQ1_M", "IQ4_NL", "IQ4_XS",
]  # fmt: skip
"""Every type that the gguf package unpacks."""

FP8_NAMES = {torch.float8_e4m3fn: "float8_e4m3fn", torch.float8_e5m2: "float8_e5m2"}


def to_diffusers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A transformer's state dict in the original layout → diffusers' layout, as views of the fused tensors."""
    held = ((part, tensor) for key, tensor in weights.items() for part in keys.to_diffusers_keys(key) or ())
    return {part.name: part.take(tensor) for part, tensor in held}


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    """A file of the library's own writer. Tensors may share memory. Skips the test where it does not know a dtype."""
    path.parent.mkdir(parents=True, exist_ok=True)
    held: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        held[name] = tensor.clone(memory_format=torch.contiguous_format) if storage in storages else tensor.contiguous()
        storages.add(storage)
    try:
        save_file(held, path, metadata)
    except KeyError as unknown:
        pytest.skip(f"safetensors {safetensors.__version__} cannot write {unknown}")
    return path


def write_scaled_fp8(
    path: Path,
    tensors: Mapping[str, Tensor],
    notation: Notation = "scale_weight",
    *,
    per_row: bool = False,
    fp8: torch.dtype = torch.float8_e4m3fn,
    keep: Collection[str] = (),
    rest: torch.dtype | None = None,
    marker_prefix: str = "",
) -> dict[str, Tensor]:
    """Every matrix `X.weight` in fp8 with a scale, the rest as it is (or cast to `rest`).

    notation: `scale_weight`: `X.scale_weight`, `X.scale_input` and the marker `scaled_fp8`; `header`: `X.weight_scale`
    and `_quantization_metadata`; `layers`: `X.weight_scale`, `X.input_scale` and `X.comfy_quant`; `bare`: only
    `X.weight_scale`. per_row: scales of shape [rows, 1] instead of one number. keep: weights to leave as they are.
    """
    held: dict[str, Tensor] = {}
    expected: dict[str, Tensor] = {}
    layers: dict[str, dict[str, str]] = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf != "weight" or tensor.dim() != 2 or name in keep:
            held[name] = tensor if rest is None else tensor.to(rest)
            expected[name] = held[name].float()
            continue
        largest = tensor.float().abs().amax(1, keepdim=True) if per_row else tensor.float().abs().amax()
        scale = (largest / torch.finfo(fp8).max).clamp(min=1e-12)
        held[name] = (tensor.float() / scale).to(fp8)
        expected[name] = held[name].float() * scale
        layers[module] = {"format": FP8_NAMES[fp8]}
        held[f"{module}.scale_weight" if notation == "scale_weight" else f"{module}.weight_scale"] = scale
        if notation == "scale_weight":
            held[f"{module}.scale_input"] = torch.ones(())
        if notation == "layers":
            held[f"{module}.input_scale"] = torch.ones(())
            held[f"{module}.comfy_quant"] = json_tensor(layers[module])
    if notation == "scale_weight":
        held[f"{marker_prefix}scaled_fp8"] = torch.zeros(2, dtype=fp8)
    metadata = {"_quantization_metadata": json.dumps({"layers": layers})} if notation == "header" else None
    write_safetensors(path, held, metadata)
    return expected


TINY = Path(__file__).resolve().parents[2] / "chroma_core" / "assets" / "tiny"
CHECKPOINT_PREFIXES = {
    "transformer": "model.diffusion_model.",
    "text_encoder": "text_encoders.t5xxl.transformer.",
    "vae": "vae.",
}
"""What ComfyUI's Save Checkpoint puts before the names of each part."""


def tiny_checkpoint(**changed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All parts of tiny as one file of ComfyUI's holds them; `changed`: other weights for a part."""
    found: dict[str, Tensor] = {}
    for part, prefix in CHECKPOINT_PREFIXES.items():
        (path,) = (TINY / part).glob("*.safetensors")
        weights = {**load_file(path), **changed.get(part, {})}
        weights = keys.to_original(weights, "weight") if part == "transformer" else weights
        found |= {prefix + name: tensor for name, tensor in weights.items()}
    return found


def json_tensor(value: Any) -> Tensor:
    """A value as the bytes of its JSON, as `.comfy_quant` tensors hold it."""
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def write_gguf(
    path: Path,
    tensors: Mapping[str, Tensor],
    types: str | Mapping[str, str] = "Q8_0",
    *,
    architecture: str = "flux",
    original_shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> dict[str, Tensor]:
    """A GGUF file in which matrices have the type `types` (or the one given for their name), the rest F32.

    Matrices whose rows do not divide into the type's blocks are F16, as converters do it. Types that the gguf package
    cannot quantise to (K and IQ types) get random blocks: of the right size and finite, but unlike the tensor given.
    original_shapes: ComfyUI-GGUF's note about tensors that were reshaped.
    """
    writer = gguf.GGUFWriter(path, architecture)
    expected: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        wanted = types if isinstance(types, str) else types.get(name, "F32")
        kind = gguf.GGMLQuantizationType[wanted if tensor.dim() >= 2 else "F32"]
        if tensor.shape and tensor.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            kind = gguf.GGMLQuantizationType.F16
        packed = pack_gguf(tensor, kind)
        writer.add_tensor(name, packed, raw_dtype=kind)
        expected[name] = torch.from_numpy(dequantize(packed, kind).copy())
    for name, shape in (original_shapes or {}).items():
        writer.add_array(f"comfy.gguf.orig_shape.{name}", list(shape))
        expected[name] = expected[name].reshape(shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def pack_gguf(tensor: Tensor, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """The stored form: quantised numbers, or random blocks where the package has no quantiser."""
    values = tensor.float().numpy()
    try:
        return quantize(values, kind)
    except NotImplementedError:
        shape = gguf.quants.quant_shape_to_byte_shape(values.shape, kind)
        # Bytes below 64 keep every half-precision scale below 2, hence finite.
        return np.random.default_rng(0).integers(0, 64, shape, dtype=np.uint8)


def write_shards(
    folder: Path, tensors: Mapping[str, Tensor], count: int = 2, stem: str = "diffusion_pytorch_model"
) -> Path:
    """The tensors dealt out to `count` shards, and their index, whose path is returned."""
    parts: list[dict[str, Tensor]] = [{} for _ in range(count)]
    weight_map = {}
    for i, (name, tensor) in enumerate(tensors.items()):
        parts[i % count][name] = tensor
        weight_map[name] = shard_name(i % count + 1, count, stem)
    for i, part in enumerate(parts):
        write_safetensors(folder / shard_name(i + 1, count, stem), part, {"format": "pt"})
    index = folder / f"{stem}.safetensors.index.json"
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}), encoding="utf-8")
    return index


def shard_name(number: int, count: int, stem: str = "diffusion_pytorch_model") -> str:
    """`stem-00001-of-00002.safetensors`"""
    return f"{stem}-{number:05d}-of-{count:05d}.safetensors"


def write_raw_safetensors(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file by hand: `header` as JSON (bytes: as they are), `length` in place of the true one."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def raw_entry(dtype: str = "F32", shape: Any = (2,), begin: int = 0, end: int = 8) -> dict[str, Any]:
    """One tensor's entry in a header written by hand."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write_pickle(path: Path, tensors: Mapping[str, Tensor], legacy: bool = False) -> Path:
    """`torch.save`, as the zip of today or the bare pickle of before 1.6."""
    torch.save(dict(tensors), path, _use_new_zipfile_serialization=not legacy)
    return path


def write_web_page(path: Path) -> Path:
    """What a browser saves when a download needs a login."""
    path.write_text("<!DOCTYPE html>\n<html><head><title>Sign in</title></head><body></body></html>", encoding="utf-8")
    return path


def write_lfs_pointer(path: Path) -> Path:
    """What `git clone` leaves where git-lfs is not installed."""
    path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 17800038288\n")
    return path


def cut(path: Path, share: float = 0.5) -> Path:
    """Keep the first `share` of a file's bytes."""
    with path.open("rb+") as file:
        file.truncate(int(path.stat().st_size * share))
    return path


def remove_files(folder: Path) -> None:
    """Remove what lies in a folder of ComfyUI's, at any depth, but no folder: its lists of files fail for good once a
    folder that it has seen is gone."""
    for path in folder.rglob("*"):
        if not path.is_dir():
            path.unlink()
