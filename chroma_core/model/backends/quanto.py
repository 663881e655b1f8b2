"""optimum-quanto (tested with 0.2.7): int8 and fp8 with one scale a row, int4 with a step and a shift a group.

Its linear layer's own choices are taken over: the optimizer that fits the scales, and the group size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

with contextlib.suppress(Exception):
    # accelerate, which the library imports, imports bitsandbytes where it can: first in our way, which fetches nothing.
    from . import bitsandbytes  # noqa: F401
from optimum.quanto import QLinear, WeightQBitsTensor, WeightQBytesTensor, qfloat8_e4m3fn, qint4, qint8, quantize_weight

_TYPES = {"int8-quanto": qint8, "int4-quanto": qint4, "fp8-quanto": qfloat8_e4m3fn}


def _plan(rows: int, columns: int, scheme: str) -> QLinear:
    """The library's layer of that size without memory: it knows its optimizer and group size."""
    meta = torch.device("meta")
    return QLinear(columns, rows, bias=False, dtype=torch.bfloat16, device=meta, weights=_TYPES[scheme])


def quantise(weight: Tensor, scheme: str) -> dict[str, Tensor]:
    """8 bits: `weight` [out, in], `scale` [out, 1]. int4: `weight` [groups/2, group], `scale` and `shift` [groups, 1].

    A byte of int4 holds row i in its low and row i + groups/2 in its high half. Scales have the dtype of `weight`.
    """
    kind, plan = _TYPES[scheme], _plan(weight.shape[0], weight.shape[1], scheme)
    fit: Any = plan.optimizer  # typed as a base class that takes no group size
    if kind.bits == 8:
        scale = fit(weight, qtype=kind, axis=0)
        quantised = quantize_weight(weight, kind, 0, scale, optimized=False)
        assert isinstance(quantised, WeightQBytesTensor)
        return {"weight": quantised._data.view(torch.int8), "scale": scale}
    scale, shift = fit(weight, qtype=kind, axis=0, group_size=plan.weight_group_size)
    # `optimized` would choose a kernel's layout, which differs between devices.
    packed = quantize_weight(weight, kind, 0, scale, shift, plan.weight_group_size, optimized=False)
    assert isinstance(packed, WeightQBitsTensor)
    return {"weight": packed._data._data.view(torch.int8), "scale": scale, "shift": shift}


def dequantise(parts: Mapping[str, Tensor], scheme: str, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    """scale · codes (− shift), in fp32, rounded once: equal to the library's result where that is not rounded twice."""
    codes, scale = parts["weight"], parts["scale"].float()
    if scheme == "int8-quanto":
        return (codes.float() * scale).to(dtype)
    if scheme == "fp8-quanto":
        return (codes.view(torch.float8_e4m3fn).float() * scale).to(dtype)
    # Not the library's own unpacking: on CPU and CUDA it compiles an extension when first called.
    codes = codes.view(torch.uint8)
    groups = torch.cat([codes & 15, codes >> 4])[: scale.shape[0]]
    return (groups.float() * scale - parts["shift"].float()).view(shape).to(dtype)


def outline(rows: int, columns: int, scheme: str) -> dict[str, Tensor]:
    """Shapes of what `quantise` gives."""
    with torch.device("meta"):
        if _TYPES[scheme].bits == 8:
            codes = torch.empty(rows, columns, dtype=torch.int8)
            return {"weight": codes, "scale": torch.empty(rows, 1, dtype=torch.bfloat16)}
        group = _plan(rows, columns, scheme).weight_group_size or columns
        groups = rows * columns // group
        scale = torch.empty(groups, 1, dtype=torch.bfloat16)
        codes = torch.empty((groups + 1) // 2, group, dtype=torch.int8)
        return {"weight": codes, "scale": scale, "shift": scale.clone()}
