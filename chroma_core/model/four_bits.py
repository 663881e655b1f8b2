"""nf4 and int4 weights dequantised by one kernel each, where the device has Triton: to the last bit what PyTorch gives.

PyTorch alone needs three to seven kernels a weight, whose results lie in memory between them. Before a device's first
weight the kernel is tried there, with every scale that there is and every pair of codes, against PyTorch's way on the
same device; one other bit, or any error (no Triton, no C compiler, a GPU that is too old), and PyTorch's way is taken.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .device import is_out_of_memory

SCHEMES = ("nf4", "int4")
BLOCK = 1024
"""Bytes of codes that one program of the kernel unpacks."""

# The levels of nf4: quantiles of N(0, 1) at eight even steps below and nine above the middle, scaled to −1..1 (QLoRA).
_NF4_OFFSET = 0.9677083

log = logging.getLogger("chromakit")

Plainly = Callable[[Tensor, Mapping[str, Tensor], str], object]
"""Fills a weight [out, in] from codes and scales of a scheme, with PyTorch's own kernels."""

_works: dict[tuple[torch.device, str, torch.dtype], bool] = {}
_trials = threading.Lock()


def _nf4_levels() -> Tensor:
    normal = torch.distributions.Normal(0.0, 1.0)
    above = normal.icdf(torch.linspace(_NF4_OFFSET, 0.5, 9))[:-1]
    below = -normal.icdf(torch.linspace(_NF4_OFFSET, 0.5, 8))[:-1]
    levels = torch.cat([above, torch.zeros(1), below]).sort().values
    return levels / levels.abs().max()


NF4_LEVELS = _nf4_levels()


def filled(weight: Tensor, parts: Mapping[str, Tensor], scheme: str, plainly: Plainly) -> bool:
    """Fill a weight [out, in] from its codes and scales by the kernel, which is tried against `plainly`. False where it
    must be done so."""
    key = weight.device, scheme, weight.dtype
    if key not in _works:
        with _trials:
            if key not in _works:
                _works[key] = _tried(lambda: wrong_numbers(_launched, *key, plainly), key)
    if _works[key]:
        _works[key] = _tried(lambda: _launched(weight, parts, scheme), key)
    return _works[key]


def every_case(scheme: str, device: torch.device) -> tuple[dict[str, Tensor], torch.Size]:
    """Codes and scales, and the shape of their weight: each finite scale from 0 up with each code in both halves of a
    byte, all 256 bytes, and for int4 minima over the whole range."""
    bits = torch.arange(0x7C00, dtype=torch.int16, device=device)
    scale, number = bits.view(torch.float16), torch.arange(32, device=device)
    codes = number % 16 | (number + bits[:, None]) % 16 << 4
    parts = {"weight": codes.to(torch.uint8).view(torch.int8), "scale": scale}
    if scheme == "int4":
        parts["minimum"] = scale.roll(4099) * -0.5
    rows = len(bits) // 8
    return {name: part.reshape(rows, -1) for name, part in parts.items()}, torch.Size((rows, 512))


def launch(kernels: Any, weight: Tensor, parts: Mapping[str, Tensor], scheme: str) -> None:
    """Fill a weight [out, in] by a scheme's kernel; `kernels` is the module `triton_kernels`."""
    codes, scale = parts["weight"], parts["scale"]
    pairs, bf16 = codes.numel(), weight.dtype == torch.bfloat16
    table = _levels(weight.device) if scheme == "nf4" else parts["minimum"]
    half = codes.shape[1] // scale.shape[1]
    grid = ((pairs + BLOCK - 1) // BLOCK,)
    target = weight.view(torch.int16) if bf16 else weight
    getattr(kernels, scheme)[grid](target, codes, scale, table, pairs, half=half, bf16=bf16, block=BLOCK)


@cache
def _levels(device: torch.device) -> Tensor:
    return NF4_LEVELS.to(device)


def _launched(weight: Tensor, parts: Mapping[str, Tensor], scheme: str) -> str:
    from . import triton_kernels

    with torch.cuda.device(weight.device):
        launch(triton_kernels, weight, {name: part.contiguous() for name, part in parts.items()}, scheme)
    return ""


def wrong_numbers(fill: Plainly, device: torch.device, scheme: str, dtype: torch.dtype, plainly: Plainly) -> str:
    """What is wrong with the numbers of `fill`, in `every_case`; empty where no bit differs from those of `plainly`."""
    parts, shape = every_case(scheme, device)
    ours, wanted = (torch.full(shape, torch.nan, dtype=dtype, device=device) for _ in range(2))
    fill(ours, parts, scheme)
    plainly(wanted, parts, scheme)
    numbers = torch.int32 if dtype == torch.float32 else torch.int16
    different = int((ours.view(numbers) != wanted.view(numbers)).sum())
    return f"{different} of {ours.numel()} numbers differ" if different else ""


def _tried(work: Callable[[], str], key: tuple[torch.device, str, torch.dtype]) -> bool:
    """Whether it went well; where not, the log says why, once."""
    try:
        wrong = work()
    except Exception as error:
        if is_out_of_memory(error):  # says nothing of the kernel
            raise
        wrong = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
    if wrong:
        log.info("%s weights are dequantised by PyTorch's kernels on %s, not by Triton's: %s", key[1], key[0], wrong)
    return not wrong
