"""bitsandbytes (tested with 0.50): nf4 in blocks of 64, whose scales are themselves 8-bit codes (QLoRA's default).

Importing it would fetch compiled code from the Hub if the package `kernels` is installed and the CPU computes in bf16;
that is prevented, since nothing is fetched that the user did not ask for. Without `kernels` it only logs that it is
missing, a line that is kept out of the log: the code in question serves its own layer, which is not used. Neither can
be undone where another package has imported it before, as PEFT does when diffusers imports that.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def _without_kernels() -> Iterator[None]:
    """Make `import kernels` fail while bitsandbytes is imported, and drop the line that it logs about that."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")

    def about_something_else(record: logging.LogRecord) -> bool:
        return "kernels-community" not in record.getMessage()

    absent = object()
    before = sys.modules.get("kernels", absent)
    sys.modules["kernels"] = None  # type: ignore[assignment] (this is how Python spells "cannot be imported")
    logger.addFilter(about_something_else)
    try:
        yield
    finally:
        logger.removeFilter(about_something_else)
        if before is absent:
            del sys.modules["kernels"]
        else:
            sys.modules["kernels"] = before  # type: ignore[assignment]


with _without_kernels():
    from bitsandbytes import functional

_BLOCK, _SCALE_BLOCK = 64, 256


def refusal(device: torch.device) -> str | None:
    """Apple's GPU: there the library fetches its code from the Hub while it computes."""
    return "its code for Apple's GPU is fetched from the Hub while it runs" if device.type == "mps" else None


def quantise(weight: Tensor, scheme: str) -> dict[str, Tensor]:
    """`weight` [out·in/2, 1], `scale` (codes, one a block of 64 values), and the scales of those scales.

    These are `scale_scale` (one for 256 scales), `scale_offset` [] and `scale_levels` [256], in fp32.
    """
    codes, state = functional.quantize_4bit(weight, blocksize=_BLOCK, compress_statistics=True, quant_type="nf4")
    assert state.state2 is not None and state.state2.code is not None and state.offset is not None  # since compressed
    return {
        "weight": codes.view(torch.int8),
        "scale": state.absmax,
        "scale_scale": state.state2.absmax,
        "scale_offset": state.offset,
        "scale_levels": state.state2.code,
    }


def dequantise(parts: Mapping[str, Tensor], scheme: str, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    """By the library's own code.

    Its CPU kernel takes the wrong scales when a row does not hold whole blocks; with one long row it takes the right
    ones.
    """
    whole = shape if shape[1] % _BLOCK == 0 else torch.Size((1, shape.numel()))
    scales = functional.QuantState(
        absmax=parts["scale_scale"], code=parts["scale_levels"], blocksize=_SCALE_BLOCK, dtype=torch.float32
    )
    state = functional.QuantState(
        absmax=parts["scale"],
        shape=whole,
        blocksize=_BLOCK,
        quant_type="nf4",
        dtype=dtype,
        offset=parts["scale_offset"],
        state2=scales,
    )
    return functional.dequantize_4bit(parts["weight"].view(torch.uint8), state).view(shape)


def outline(rows: int, columns: int, scheme: str) -> dict[str, Tensor]:
    """Shapes of what `quantise` gives."""
    values = rows * columns
    blocks = -(-values // _BLOCK)
    with torch.device("meta"):
        return {
            "weight": torch.empty((values + 1) // 2, 1, dtype=torch.int8),
            "scale": torch.empty(blocks, dtype=torch.uint8),
            "scale_scale": torch.empty(-(-blocks // _SCALE_BLOCK)),
            "scale_offset": torch.empty(()),
            "scale_levels": torch.empty(256),
        }
