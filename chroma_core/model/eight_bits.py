"""Products of 8-bit activations and 8-bit weights (`w8a8`), in both directions.

Each row of x (a token) is quantised as it comes, symmetrically: x ≈ a·A with A in −127..127 or e4m3, a = max |x| / 127
or / 448. With a weight of codes Q [out, in] and a scale s for each of its rows

    y = (A·Qᵀ)·a·s        ∂x = (B·Q)·b, with b·B ≈ ∂y·s

where the products of codes are those of a GPU's integer or fp8 units: `torch._int_mm` sums exactly, that of fp8,
`torch._scaled_mm`, in fp32. Scales stay outside, in fp32, and the result is rounded once. A CPU has the integer
product; its fp8 is computed in fp32, with the same codes. The error of a number of x is at most a / 2 (int8), or 1/16
of the number and at least a · 2⁻¹⁰ (fp8), beside the weight's own, which no mode changes.

Source: dynamic row-wise quantisation as in LLM.int8() (Dettmers et al. 2022), without its outlier columns.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Compute = Literal["weights", "w8a8"]
"""`weights`: products with the dequantised weight; `w8a8`: these."""

LARGEST = {"int8": 127.0, "fp8": 448.0}
"""The schemes that can be multiplied so, and their largest code."""
ROWS = 2048
"""Rows of x that are multiplied at a time: their sums take four bytes each, twice."""
LEAST_ROWS = 32
"""cuBLAS takes more than 16 rows; a short text is filled up with zeros."""
MULTIPLE = 16
"""Of a layer's sizes, on a GPU."""


def cannot(scheme: str | None, device: torch.device | str) -> str:
    """Why a scheme's layers cannot be multiplied so on the device; empty where they can. Tries it."""
    device = torch.device(device)
    if scheme not in LARGEST:
        return f"only the precisions {' and '.join(LARGEST)} have 8-bit codes of whole rows"
    if device.type not in ("cpu", "cuda"):
        return f"PyTorch has no 8-bit products on the device '{device}'"
    try:
        codes = torch.ones(LEAST_ROWS, LEAST_ROWS, device=device).to(_dtype(scheme))
        _sums(codes, codes.T, scheme)
    except (RuntimeError, ValueError, NotImplementedError) as error:  # by the age of the GPU or of its libraries
        return f"this device has no {scheme} products ({str(error).splitlines()[0][:200]})"
    return ""


def fits(rows: int, columns: int, device: torch.device) -> bool:
    """Whether the device multiplies a weight of that shape so."""
    return device.type == "cpu" or not (rows % MULTIPLE or columns % MULTIPLE)


def product(x: Tensor, codes: Tensor, scale: Tensor, scheme: str) -> Tensor:
    """x·Wᵀ [..., out] in the dtype of x, for x [..., in], codes [out, in] (as int8) and scale [out, 1]."""
    weight = codes.view(_dtype(scheme)).T
    rows = x.reshape(-1, x.shape[-1])
    y = torch.empty(len(rows), len(codes), dtype=x.dtype, device=x.device)
    for a in range(0, len(rows), ROWS):
        quantised, size = quantised_rows(rows[a : a + ROWS], scheme)
        sums = _sums(quantised, weight, scheme) * size
        if x.is_cuda:
            torch.mul(sums, scale.T, out=y[a : a + ROWS])  # rounded as it is written
        else:
            y[a : a + ROWS] = sums.mul_(scale.T)
    return y.view(*x.shape[:-1], len(codes))


def transposed_product(gradient: Tensor, codes: Tensor, scale: Tensor, scheme: str) -> Tensor:
    """∂y·W [..., in] in the dtype of ∂y [..., out]: the gradient of `product` to x, its own rounding left out."""
    weight = codes.view(_dtype(scheme))
    if scheme == "fp8" and weight.is_cuda:
        weight = weight.T.contiguous().T  # its product wants columns
    rows = gradient.reshape(-1, gradient.shape[-1])
    x = torch.empty(len(rows), codes.shape[1], dtype=gradient.dtype, device=gradient.device)
    for a in range(0, len(rows), ROWS):
        quantised, size = quantised_rows(rows[a : a + ROWS] * scale.T, scheme)
        x[a : a + ROWS] = _sums(quantised, weight, scheme) * size
    return x.view(*gradient.shape[:-1], codes.shape[1])


def quantised_rows(x: Tensor, scheme: str) -> tuple[Tensor, Tensor]:
    """Codes [rows, columns] and the sizes [rows, 1] of a step, in fp32. A row that is not finite has a size that is
    not, and so has its product."""
    largest = torch.linalg.vector_norm(x, torch.inf, dim=1, keepdim=True) if x.is_cuda else x.abs().amax(1, True)
    size = (largest.float() / LARGEST[scheme]).clamp_(min=torch.finfo(torch.float32).tiny)
    scaled = x / size if x.is_cuda or x.dtype == torch.float32 else x.float().div_(size)  # a CPU is slow at mixed types
    return (scaled.round_() if scheme == "int8" else scaled).to(_dtype(scheme)), size


def _sums(x: Tensor, weight: Tensor, scheme: str) -> Tensor:
    """Codes [rows, n] times codes [n, columns], as int32 or fp32."""
    if scheme == "fp8" and not x.is_cuda:
        return x.float() @ weight.float()
    rows = len(x)
    if rows < LEAST_ROWS and x.is_cuda:
        x = F.pad(x.view(torch.int8), (0, 0, 0, LEAST_ROWS - rows)).view(x.dtype)
    if scheme == "int8":
        return torch._int_mm(x, weight)[:rows]
    one = torch.ones((), device=x.device)
    return torch._scaled_mm(x, weight, scale_a=one, scale_b=one, out_dtype=torch.float32)[:rows]


def _dtype(scheme: str) -> torch.dtype:
    return torch.int8 if scheme == "int8" else torch.float8_e4m3fn
