"""Precisions: the dtype in which a model computes and, for quantised ones, the library that stores its weights.

Only the linears inside the blocks are ever quantised (96.7 % of Chroma's weights). The approximator, `x_embedder`,
`context_embedder`, `norm_out` and the final `proj_out` stay in the compute dtype: rounding them moves every token of
every picture. They are told apart by full module name, because leaf names repeat inside the blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from .errors import PrecisionError


@dataclass(frozen=True)
class Precision:
    """A choice in the precision widget. `backend` names the quantising library, None for a plain dtype."""

    name: str
    dtype: torch.dtype
    backend: str | None = None
    bytes_per_weight: float = 2.0


PRECISIONS: dict[str, Precision] = {
    p.name: p
    for p in (
        Precision("bf16", torch.bfloat16),
        Precision("fp16", torch.float16),
        Precision("fp32", torch.float32, bytes_per_weight=4.0),
        Precision("int8-quanto", torch.bfloat16, backend="optimum-quanto", bytes_per_weight=1.0),
    )
}

QUANTISED_PARTS = ("transformer_blocks", "single_transformer_blocks", "encoder.block")
"""Roots of the module names below which linears may be quantised: Chroma's blocks and T5's."""


def precision(name: str) -> Precision:
    """Look up a precision; raises PrecisionError that lists the known ones."""
    try:
        return PRECISIONS[name]
    except KeyError:
        raise PrecisionError(f"There is no precision '{name}'. Choose one of: {', '.join(PRECISIONS)}.") from None


def quantisable_linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Full names and modules of the linears that a quantised precision replaces."""
    roots = tuple(f"{part}." for part in QUANTISED_PARTS)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.startswith(roots):
            yield name, module


def quantise(model: nn.Module, chosen: Precision) -> None:
    """Quantise the block linears of a loaded model in place; plain dtypes are left as they are.

    Raises PrecisionError when the library is missing.
    """
    if chosen.backend is None:
        return
    try:
        from optimum.quanto import QLinear, qint8
    except ImportError as error:
        raise PrecisionError(
            f"The precision '{chosen.name}' needs the package optimum-quanto, which is not installed here ({error}). "
            "Install it with `pip install optimum-quanto`, or choose bf16."
        ) from error
    for name, linear in list(quantisable_linears(model)):
        parent, _, leaf = name.rpartition(".")
        quantised = QLinear.from_module(linear, weights=qint8)
        quantised.freeze()  # type: ignore[union-attr]
        setattr(model.get_submodule(parent), leaf, quantised)
