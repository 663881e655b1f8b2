"""What is trained, in numbers: shapes of an adapter's parameters, and what every optimizer keeps for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import prod

from ..lora.trainable import factorization

Shape = tuple[int, ...]

SMALL = 4096
"""bitsandbytes keeps the state of smaller tensors in 32 bits."""

TABLES = 2 * 4 * 256
"""Bytes of its two tables of 256 values, which all tensors share."""

BLOCK = 256
"""Values that share one scale in its 8-bit state."""


def adapter_shapes(kind: str, rank: int, rows: int, columns: int, lokr_factor: int = -1) -> list[Shape]:
    """Shapes of the adapter's parameters on a linear of `columns` inputs and `rows` outputs (`lora.trainable`)."""
    if kind == "lokr":
        (out_l, out_k), (in_m, in_n) = (factorization(size, lokr_factor) for size in (rows, columns))
        if rank >= max(out_k, in_n) / 2:
            return [(out_l, in_m), (out_k, in_n)]
        return [(out_l, in_m), (out_k, rank), (rank, in_n)]
    return [(rank, columns), (rows, rank), *([(rows,)] if kind == "dora" else [])]


def parameters(shapes: Iterable[Shape]) -> int:
    """Numbers in tensors of these shapes."""
    return sum(map(prod, shapes))


def _adamw8bit(shape: Shape) -> int:
    count = prod(shape)
    if count < SMALL:
        return 8 * count
    blocks = -(-count // BLOCK)
    return 2 * count + 2 * 4 * blocks  # codes, and a scale for each block


def _factored(shape: Shape) -> int:
    return 4 * (sum(shape) if len(shape) >= 2 else prod(shape))


OPTIMIZERS: dict[str, Callable[[Shape], int]] = {
    "adamw": lambda shape: 8 * prod(shape),  # two moments
    "adamw8bit": _adamw8bit,
    "adafactor": _factored,  # one number a row and column; vectors whole
    "prodigy": lambda shape: PRODIGY_BYTES * prod(shape),  # two moments, its start, and a sum
    "schedule-free": lambda shape: 8 * prod(shape),  # the second moment, and z
    "came": lambda shape: 4 * prod(shape) + (2 if len(shape) >= 2 else 1) * _factored(shape),
}
"""Bytes of state for an fp32 parameter of a shape; measured by a test against the libraries' own state."""

PRODIGY_BYTES = 16


def state_bytes(optimizer: str, shapes: Iterable[Shape]) -> int:
    """Bytes that an optimizer keeps for parameters of these shapes."""
    shapes = list(shapes)
    shared = TABLES if optimizer == "adamw8bit" and any(prod(shape) >= SMALL for shape in shapes) else 0
    return shared + sum(map(OPTIMIZERS[optimizer], shapes))
