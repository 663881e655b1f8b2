"""ComfyUI's quantised formats: what a file holds of a weight [rows, columns], and which numbers that stands for.

| format | `weight` | scales |
|---|---|---|
| `float8_e4m3fn`, `float8_e5m2` | fp8 | `weight_scale`: one, or one a row |
| `int8_tensorwise` | int8 | `weight_scale`: one, or one a row |
| `int8_tensorwise` with `convrot` | int8, rotated | `weight_scale`: one a row |
| `convrot_w4a4` | integers −8..7, two to a byte, the first in its low half; rotated | `weight_scale`: one a row |
| `nvfp4` | e2m1, two to a byte, the first in its high half | `weight_scale`: e4m3, one for 16; `weight_scale_2`: one |
| `mxfp8` | e4m3 | `weight_scale`: e8m0 (powers of two), one for 32 |

Source: comfy-kitchen's eager back end, whose numbers in fp32 these are (the tests compare them). Its own functions are
not called: they want whole tensors, we read some rows at a time, and a file must mean the same without that package.
Scales of `nvfp4` and `mxfp8` lie in the tiles that cuBLAS reads (its documentation, "1D block scaling factors layout").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ModelFileError
from .stored_tensors import Stored

WHOLE_SCALE = "weight_scale_2"
INPUTS_SCALE = "pre_quant_scale"
"""What a layer's inputs are multiplied by, one a column (ModelOpt's smoothing); its product with the weight is ours."""

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
INT4 = (*range(8), *range(-8, 0))

ROTATED_BY = 256
"""Neighbours in a row that ConvRot turns together, where a file does not say otherwise."""


@dataclass(frozen=True)
class Format:
    """dtype: of the stored `weight`. block: neighbours that share a scale; 0: whole rows or the tensor do.
    block_dtype: of such scales; some writers store them as plain bytes. levels: of 4-bit codes. high_first: of two
    codes in a byte, the first is the high half. more: what may stand beside the weight and its scale."""

    dtype: torch.dtype
    block: int = 0
    block_dtype: torch.dtype | None = None
    levels: tuple[float, ...] = ()
    high_first: bool = False
    more: tuple[str, ...] = ()


FORMATS: dict[str, Format] = {
    "float8_e4m3fn": Format(torch.float8_e4m3fn),
    "float8_e5m2": Format(torch.float8_e5m2),
    "int8_tensorwise": Format(torch.int8),
    "convrot_w4a4": Format(torch.int8, levels=INT4),
    "nvfp4": Format(torch.uint8, 16, torch.float8_e4m3fn, E2M1, high_first=True, more=(WHOLE_SCALE, INPUTS_SCALE)),
    # Its scales are e8m0, which not every torch has: exponents with a bias of 127.
    "mxfp8": Format(torch.float8_e4m3fn, 32),
}
"""ComfyUI's names of the formats that are read."""

WEIGHT_SCALES = ("weight_scale", "scale_weight")
INPUT_SCALES = ("input_scale", "scale_input")
"""Scales of activations, for products in the format itself, which we do not use."""

Complaint = Callable[[str], ModelFileError]
"""An error about a weight, from what is wrong with it."""


def quantised(name: str, entry: Mapping[str, Any], tensors: Mapping[str, Stored], wrong: Complaint) -> Stored:
    """The logical weight of the module `name`, declared by `entry` ({"format": …, …}), with its scales.

    Raises ModelFileError for what contradicts the format: another stored type, missing or misshapen scales.
    """
    title = str(entry["format"])
    kind = FORMATS[title]
    stored = tensors[f"{name}.weight"]
    if stored.dtype is not kind.dtype:
        raise wrong(f"is declared as {title} but stored as {stored.label}")
    if kind.dtype.is_floating_point and not kind.block:
        title = f"scaled {stored.label}"
    elif len(stored.shape) != 2:
        raise wrong(f"is declared as {title} but has the shape {list(stored.shape)}")
    if kind.levels:
        rows, items = stored.shape
        decode = partial(_unpacked, pairs=_pairs(kind.levels, kind.high_first))
        stored = replace(stored, shape=(rows, items * 2), dtype=None, block=2, block_bytes=1, decode=decode)
    scale_name, scale = _beside(name, WEIGHT_SCALES, tensors, wrong)
    if kind.block:
        return _in_blocks(name, title, kind, stored, scale, tensors, wrong)
    stored = replace(stored, label=title, scale=row_scale(stored, scale, scale_name, wrong))
    group = _rotation(title, entry)
    if group is None:
        return stored
    if not _is_power_of_four(group) or stored.shape[1] % group:
        raise wrong(f"is rotated in groups of {group}, which its {stored.shape[1]} columns cannot be")
    title = title if kind.levels else f"{title} with ConvRot"
    return replace(stored, label=title, finish=partial(_turned, group))


def row_scale(weight: Stored, scale: Stored, scale_name: str, wrong: Complaint) -> Tensor:
    """A scale as fp32, [1, 1] or [rows, 1]."""
    of_rows = scale.shape[:1] == weight.shape[:1] and all(n == 1 for n in scale.shape[1:])
    if not (of_rows or all(n == 1 for n in scale.shape)):
        raise wrong(f"has a scale of shape {list(scale.shape)}; expected one number, or {weight.rows} (one per row)")
    if scale.dtype is None or not scale.dtype.is_floating_point:
        raise wrong(f"has a scale that is stored as {scale.label}")
    return _finite(scale.read(torch.float32).reshape(-1, 1), scale_name, wrong)


def _in_blocks(
    name: str,
    title: str,
    kind: Format,
    weight: Stored,
    scale: Stored,
    tensors: Mapping[str, Stored],
    wrong: Complaint,
) -> Stored:
    rows, columns = weight.shape
    groups = columns // kind.block
    tiles = (-(-rows // 128) * 128, -(-groups // 4) * 4)
    if columns % kind.block or scale.shape != tiles:
        raise wrong(f"has block scales of shape {list(scale.shape)}; its own shape asks for {list(tiles)}")
    if scale.block_bytes != 1 or scale.block != 1:
        raise wrong(f"has block scales that are stored as {scale.label}")
    whole: Tensor | None = None
    if WHOLE_SCALE in kind.more:
        whole_name, one = _beside(name, (WHOLE_SCALE,), tensors, wrong)
        whole = row_scale(replace(weight, shape=(1,)), one, whole_name, wrong)
    finish = None
    inputs_name = f"{name}.{INPUTS_SCALE}"
    if INPUTS_SCALE in kind.more and inputs_name in tensors:
        inputs = row_scale(replace(weight, shape=(columns,)), tensors[inputs_name], inputs_name, wrong)
        finish = partial(torch.mul, inputs.flatten())
    read = partial(_block_scales, replace(scale, dtype=torch.uint8), groups, rows, kind.block_dtype, whole, wrong)
    return replace(weight, label=title, scale=read, finish=finish)


def _block_scales(
    scale: Stored, groups: int, rows: int, dtype: torch.dtype | None, whole: Tensor | None, wrong: Complaint
) -> Tensor:
    """The scales of blocks, fp32 [rows, groups], out of cuBLAS's tiles of 128 × 4 (32 × 4 × 4 within)."""
    tiles = scale.read(torch.uint8).view(-1, scale.shape[1] // 4, 32, 4, 4)
    codes = tiles.permute(0, 3, 2, 1, 4).reshape(scale.shape)[:rows, :groups]
    if dtype is not None:
        values = codes.contiguous().view(dtype).float()
    else:
        values = (codes.int() << 23).view(torch.float32)  # the exponent of an fp32 number; 0 is zero, 255 infinite
    return _finite(values if whole is None else values * whole, "weight_scale", wrong)


def _finite(scale: Tensor, name: str, wrong: Complaint) -> Tensor:
    if not torch.isfinite(scale).all():
        raise wrong(f"has a scale ('{name}') that is not finite")
    return scale


def _beside(
    module: str, suffixes: tuple[str, ...], tensors: Mapping[str, Stored], wrong: Complaint
) -> tuple[str, Stored]:
    for suffix in suffixes:
        if (scale := tensors.get(f"{module}.{suffix}")) is not None:
            return f"{module}.{suffix}", scale
    raise wrong(f"lacks its scale ({' or '.join(map(repr, suffixes))})")


def _rotation(title: str, entry: Mapping[str, Any]) -> Any:
    """Columns that are rotated together, as the file says; None for none. Options may stand in a table `params`."""
    nested = entry.get("params")
    options = {**(nested if isinstance(nested, dict) else {}), **entry}
    rotated = title == "convrot_w4a4" or (title == "int8_tensorwise" and options.get("convrot"))
    return options.get("convrot_groupsize", ROTATED_BY) if rotated else None


def _is_power_of_four(number: Any) -> bool:
    return type(number) is int and number in (4**power for power in range(1, 8))


def _turned(group: int, rows: Tensor) -> Tensor:
    """Rows [n, columns] with every group of neighbours turned back; the rotation is its own inverse."""
    return (rows.view(len(rows), -1, group) @ _hadamard(group)).view(rows.shape)


@cache
def _hadamard(size: int) -> Tensor:
    """The regular, symmetric, orthogonal Hadamard matrix of ConvRot: a Kronecker power of the one of 4."""
    four = torch.ones(4, 4) - 2 * torch.eye(4).flip(0)
    found = four
    for _ in range(round(math.log(size, 4)) - 1):
        found = torch.kron(found, four)
    return found / math.sqrt(size)


@cache
def _pairs(levels: tuple[float, ...], high_first: bool) -> np.ndarray:
    """Both numbers of every byte, [256, 2]."""
    byte = np.arange(256)
    halves = (byte >> 4, byte & 15) if high_first else (byte & 15, byte >> 4)
    return np.stack([np.array(levels, dtype=np.float32)[half] for half in halves], axis=1)


def _unpacked(codes: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    return pairs[codes].reshape(-1)
