"""Weights in fp8 with a scale beside them: which scale belongs to which tensor.

A tensor `X.weight` and its scale form one logical tensor, weight · scale (one number, or one per row). Four notations
are in use (the host's `convert_old_quants` and `quant_ops` are the reference for the first three):

* `X.scale_weight`, and an empty tensor `scaled_fp8` that marks the file, or its name's prefix the part of the file;
* `X.weight_scale`, and the header's `_quantization_metadata`: {"layers": {"X": {"format": "float8_e4m3fn"}}};
* `X.weight_scale`, and the same JSON object as bytes in a tensor `X.comfy_quant`;
* `X.weight_scale` alone.

Scales of activations (`X.scale_input`, `X.input_scale`) serve fp8 matrix products, which we do not use.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelFileError
from ..files import strict_json
from .stored_tensors import Stored, damaged

FORMATS = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
"""The host's names of the formats that are read."""

MARKER = "scaled_fp8"
INPUT_SCALES = (".scale_input", ".input_scale")
DECLARATION = ".comfy_quant"
EMBEDDINGS = ("shared", "embed_tokens", "relative_attention_bias", "token_embd")
"""Modules that are looked up, not multiplied: scaled files may keep them in plain fp8."""

LEAVES = ("weight", "bias")


def join_scales(path: Path, metadatas: Iterable[Mapping[str, str]], tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """The logical tensors: with their scales attached; scales, markers and declarations gone.

    metadatas: the headers of all files in which the tensors lie.
    Raises ModelFileError for a format that is not read, and for scales that are missing, of the wrong shape or not
    finite. Scales and declarations are the only tensors that are read here.
    """
    scales = {name: found for name, found in ((n, _scale_names(n, tensors)) for n in tensors) if found}
    declared = _declared(path, metadatas, tensors)
    for name, found in scales.items():
        if len(found) > 1:
            raise _wrong(tensors[name], name, f"has two scales, '{found[0]}' and '{found[1]}'")
    _check_present(set(declared), tensors, scales)
    hidden = {scale for found in scales.values() for scale in found}
    hidden |= {name for name in tensors if _is_accessory(name, tensors)}
    joined = dict(tensors)
    # In the order in which they lie in the file: an old disk seeks forwards once instead of hundreds of times.
    for name, (scale,) in sorted(scales.items(), key=lambda item: tensors[item[1][0]].offset):
        tensor = tensors[name]
        joined[name] = replace(
            tensor, label=f"scaled {tensor.label}", scale=_scale(tensor, name, tensors[scale], scale)
        )
    return {name: tensor for name, tensor in joined.items() if name not in hidden}


def _scale_names(name: str, tensors: Mapping[str, Stored]) -> list[str]:
    module, _, leaf = name.rpartition(".")
    if not module or leaf not in LEAVES:
        return []
    return [scale for scale in (f"{module}.{leaf}_scale", f"{module}.scale_{leaf}") if scale in tensors]


def _is_accessory(name: str, tensors: Mapping[str, Stored]) -> bool:
    """Whether a tensor only accompanies others: a marker, a declaration, an activation's scale."""
    if name == MARKER or name.endswith("." + MARKER) or name.endswith(DECLARATION):
        return True
    return any(name.endswith(leaf) and f"{name.removesuffix(leaf)}.weight" in tensors for leaf in INPUT_SCALES)


def _declared(path: Path, metadatas: Iterable[Mapping[str, str]], tensors: Mapping[str, Stored]) -> dict[str, Any]:
    """Modules that the header or tensors beside them declare as quantised → the format's name."""
    sources: dict[str, Any] = {}
    for metadata in metadatas:
        if "_quantization_metadata" in metadata:
            layers = _object(path, metadata["_quantization_metadata"], "_quantization_metadata").get("layers")
            if not isinstance(layers, dict):
                raise damaged(path, "its _quantization_metadata list no layers")
            sources |= layers
    for name, tensor in tensors.items():
        if name.endswith(DECLARATION):
            content = bytes(tensor.read(torch.uint8).tolist()) if tensor.dtype is torch.uint8 else b""
            sources[name.removesuffix(DECLARATION)] = _object(tensor.file.path, content, name)
    formats: dict[str, Any] = {
        module: entry.get("format") if isinstance(entry, dict) else None for module, entry in sources.items()
    }
    for module, name in formats.items():
        weight = tensors.get(f"{module}.weight")
        if weight and name not in FORMATS:
            raise ModelFileError(
                f"The file '{weight.file.path}' stores '{module}' in the format {name!r}, which is not read; "
                f"{' and '.join(FORMATS)} are. Use a release in bf16, fp8, scaled fp8 or GGUF."
            )
        if weight and weight.dtype is not FORMATS[name]:
            raise _wrong(weight, f"{module}.weight", f"is declared as {name} but stored as {weight.label}")
    return formats


def _object(path: Path, text: str | bytes, where: str) -> dict[str, Any]:
    try:
        value = strict_json(text)
    except ValueError as error:
        raise damaged(path, f"its {where} is no JSON ({error})") from error
    if not isinstance(value, dict):
        raise damaged(path, f"its {where} holds {json.dumps(value)[:40]} instead of a table")
    return value


def _check_present(declared: set[str], tensors: Mapping[str, Stored], scales: Mapping[str, list[str]]) -> None:
    """Refuse matrices in fp8 that lack the scale which the rest of their part has: they would be hundreds too large."""
    parts = {name.removesuffix(MARKER) for name in tensors if name == MARKER or name.endswith("." + MARKER)}
    # Else the part is the first component of a name, with its dot: `model.`, `double_blocks.`, `encoder.`
    parts |= {name.partition(".")[0] + "." for name in scales if name.rpartition(".")[0] not in declared}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        is_matrix = leaf == "weight" and len(tensor.shape) == 2 and tensor.label == "fp8"
        if not is_matrix or name in scales or module.rpartition(".")[2] in EMBEDDINGS:
            continue
        if module in declared or any(name.startswith(part) for part in parts):
            raise _wrong(tensor, name, "lacks its scale ('weight_scale' or 'scale_weight')")


def _scale(tensor: Stored, name: str, stored: Stored, scale_name: str) -> Tensor:
    """The scale as fp32, flat: one element, or one per row."""
    of_rows = stored.shape[:1] == tensor.shape[:1] and all(n == 1 for n in stored.shape[1:])
    if not (of_rows or all(n == 1 for n in stored.shape)):
        raise _wrong(
            tensor,
            name,
            f"has a scale of shape {list(stored.shape)}; expected one number, or {tensor.rows} (one per row)",
        )
    if stored.dtype is None or not stored.dtype.is_floating_point:
        raise _wrong(tensor, name, f"has a scale that is stored as {stored.label}")
    if tensor.dtype is None or not tensor.dtype.is_floating_point:
        raise _wrong(tensor, name, f"is stored as {tensor.label} with a scale, a quantisation that is not read")
    scale = stored.read(torch.float32).reshape(-1)
    if not torch.isfinite(scale).all():
        raise _wrong(tensor, name, f"has a scale ('{scale_name}') that is not finite")
    return scale


def _wrong(tensor: Stored, name: str, found: str) -> ModelFileError:
    return ModelFileError(
        f"The file '{tensor.file.path}' cannot be used: the weight '{name}' {found}. The file was converted or "
        "downloaded wrongly; use another release, e.g. in bf16 or fp8."
    )
