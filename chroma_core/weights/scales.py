"""Which tensors of a file make one quantised weight: its codes, its scales, and what declares its format.

A tensor `X.weight` and its scales form one logical tensor. Four notations are in use (ComfyUI's `convert_old_quants`
and `quant_ops` are the reference for the first three):

* `X.scale_weight`, and an empty tensor `scaled_fp8` that marks the file, or its name's prefix the part of the file;
* `X.weight_scale`, and the header's `_quantization_metadata`: {"layers": {"X": {"format": "float8_e4m3fn"}}};
* `X.weight_scale`, and the same JSON object as bytes in a tensor `X.comfy_quant`, as ComfyUI's savers write it;
* `X.weight_scale` alone, beside fp8.

What the formats mean is in `quant_formats`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..errors import ModelFileError
from ..files import strict_json
from .quant_formats import FORMATS, INPUT_SCALES, WEIGHT_SCALES, quantised, row_scale
from .stored_tensors import Stored, damaged

MARKER = "scaled_fp8"
DECLARATION = ".comfy_quant"
EMBEDDINGS = ("shared", "embed_tokens", "relative_attention_bias", "token_embd")
"""Modules that are looked up, not multiplied: scaled files may keep them in plain fp8."""

LEAVES = ("weight", "bias")

PREFIXES = ("", "model.diffusion_model.")
"""What may stand before a name that the header declares: ComfyUI takes it from whole checkpoints, too."""


def join_scales(path: Path, metadatas: Iterable[Mapping[str, str]], tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """The logical tensors: with their scales attached; scales, markers and declarations gone.

    metadatas: the headers of all files in which the tensors lie.
    Raises ModelFileError for a format that is not read, and for scales that are missing, of the wrong shape or not
    finite. Scales of rows and declarations are the only tensors that are read here.
    """
    scales = {name: found for name, found in ((n, _scale_names(n, tensors)) for n in tensors) if found}
    declared = _declared(path, metadatas, tensors)
    for name, found in scales.items():
        if len(found) > 1:
            raise _wrong(tensors[name], name, f"has two scales, '{found[0]}' and '{found[1]}'")
    _check_present(set(declared), tensors, scales)
    hidden = {scale for found in scales.values() for scale in found}
    hidden |= {name for name in tensors if _is_accessory(name, tensors, declared)}
    joined = dict(tensors)
    # In the order in which they lie in the file: an old disk seeks forwards once instead of hundreds of times.
    for name, (scale,) in sorted(scales.items(), key=lambda item: tensors[item[1][0]].offset):
        tensor, wrong = tensors[name], partial(_wrong, tensors[name], name)
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and module in declared:
            joined[name] = quantised(module, declared[module], tensors, wrong)
            continue
        if tensor.dtype is None or not tensor.dtype.is_floating_point:
            raise wrong(
                f"is stored as {tensor.label} with a scale, and nothing declares its format (ComfyUI's files do, by "
                f"'{module}{DECLARATION}' or the header's _quantization_metadata)"
            )
        joined[name] = replace(
            tensor, label=f"scaled {tensor.label}", scale=row_scale(tensor, tensors[scale], scale, wrong)
        )
    return {name: tensor for name, tensor in joined.items() if name not in hidden}


def _scale_names(name: str, tensors: Mapping[str, Stored]) -> list[str]:
    module, _, leaf = name.rpartition(".")
    if not module or leaf not in LEAVES:
        return []
    return [scale for scale in (f"{module}.{leaf}_scale", f"{module}.scale_{leaf}") if scale in tensors]


def _is_accessory(name: str, tensors: Mapping[str, Stored], declared: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether a tensor only accompanies others: a marker, a declaration, a scale that the format has."""
    if name == MARKER or name.endswith("." + MARKER) or name.endswith(DECLARATION):
        return True
    module, _, leaf = name.rpartition(".")
    if module in declared:
        return leaf in (*WEIGHT_SCALES, *INPUT_SCALES, *FORMATS[declared[module]["format"]].more)
    return leaf in INPUT_SCALES and f"{module}.weight" in tensors


def _declared(
    path: Path, metadatas: Iterable[Mapping[str, str]], tensors: Mapping[str, Stored]
) -> dict[str, Mapping[str, Any]]:
    """Modules that the header or tensors beside them declare as quantised → their entry, {"format": name, …}."""
    sources: dict[str, Any] = {}
    for metadata in metadatas:
        if "_quantization_metadata" in metadata:
            layers = _object(path, metadata["_quantization_metadata"], "_quantization_metadata").get("layers")
            if not isinstance(layers, dict):
                raise damaged(path, "its _quantization_metadata list no layers")
            for module, entry in layers.items():
                named = (f"{prefix}{module}" for prefix in PREFIXES)
                sources[next((name for name in named if f"{name}.weight" in tensors), module)] = entry
    for name, tensor in tensors.items():
        if name.endswith(DECLARATION):
            content = bytes(tensor.read(torch.uint8).tolist()) if tensor.dtype is torch.uint8 else b""
            sources[name.removesuffix(DECLARATION)] = _object(tensor.file.path, content, name)
    found = {module: entry for module, entry in sources.items() if f"{module}.weight" in tensors}
    for module, entry in found.items():
        title = entry.get("format") if isinstance(entry, dict) else None
        if not isinstance(title, str) or title not in FORMATS:
            raise ModelFileError(
                f"The file '{tensors[f'{module}.weight'].file.path}' stores '{module}' in the format {title!r}, which "
                f"is not read; {', '.join(FORMATS)} are. It may be newer than this version of ChromaKit: update it, or "
                "use a release in one of these formats, in bf16 or GGUF."
            )
    return found


def _object(path: Path, text: str | bytes, where: str) -> dict[str, Any]:
    try:
        value = strict_json(text)
    except ValueError as error:
        raise damaged(path, f"its {where} is no JSON ({error})") from error
    if not isinstance(value, dict):
        raise damaged(path, f"its {where} holds {json.dumps(value)[:40]} instead of a table")
    return value


def _check_present(declared: set[str], tensors: Mapping[str, Stored], scales: Mapping[str, list[str]]) -> None:
    """Refuse matrices that lack the scale which they, or the rest of their part, have: they are hundreds too large.

    A part that has scales shows it by a marker, else it is the first component of a name, with its dot: `model.`,
    `double_blocks.`, `encoder.`.
    """
    parts = {name.removesuffix(MARKER) for name in tensors if name == MARKER or name.endswith("." + MARKER)}
    parts |= {name.partition(".")[0] + "." for name in scales if name.rpartition(".")[0] not in declared}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        is_embedding = module.rpartition(".")[2] in EMBEDDINGS
        if leaf != "weight" or name in scales or (is_embedding and tensor.label == "fp8"):
            continue
        is_fp8_matrix = len(tensor.shape) == 2 and tensor.label == "fp8"
        if module in declared or (is_fp8_matrix and any(name.startswith(part) for part in parts)):
            raise _wrong(tensor, name, "lacks its scale ('weight_scale' or 'scale_weight')")


def _wrong(tensor: Stored, name: str, found: str) -> ModelFileError:
    """The error about a weight; `found`: what is wrong with it."""
    return ModelFileError(
        f"The file '{tensor.file.path}' cannot be used: the weight '{name}' {found}. The file was converted or "
        "downloaded wrongly; use another release, e.g. in bf16 or fp8."
    )
