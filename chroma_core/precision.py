"""Precisions: the dtype in which a model computes and, for quantised ones, how its weights are stored.

Only the linears inside the blocks are ever quantised (96.7 % of Chroma's weights). The approximator, `x_embedder`,
`context_embedder`, `norm_out` and the final `proj_out` stay in the compute dtype: rounding them moves every token of
every picture. They are told apart by full module name, because leaf names repeat inside the blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from .errors import PrecisionError
from .quantised import QuantisedLinear, Scheme


@dataclass(frozen=True)
class Precision:
    """A choice in the precision widget.

    `scheme` is our own quantised linear's, `library` a package that quantises instead; neither for a plain dtype.
    `bytes_per_weight` counts a block linear's codes and scales.
    """

    name: str
    dtype: torch.dtype
    scheme: Scheme | None = None
    library: str | None = None
    bytes_per_weight: float = 2.0

    @property
    def quantised(self) -> bool:
        """Whether block linears are stored in fewer bits than `dtype` has."""
        return self.scheme is not None or self.library is not None


PRECISIONS: dict[str, Precision] = {
    p.name: p
    for p in (
        Precision("bf16", torch.bfloat16),
        Precision("fp16", torch.float16),
        Precision("fp32", torch.float32, bytes_per_weight=4.0),
        Precision("int8", torch.bfloat16, scheme="int8", bytes_per_weight=1.0),
        Precision("fp8", torch.bfloat16, scheme="fp8", bytes_per_weight=1.0),
        Precision("int4", torch.bfloat16, scheme="int4", bytes_per_weight=0.5625),
        Precision("nf4", torch.bfloat16, scheme="nf4", bytes_per_weight=0.53125),
        Precision("int8-quanto", torch.bfloat16, library="optimum-quanto", bytes_per_weight=1.0),
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
    if not chosen.quantised:
        return
    convert = _with_quanto(chosen) if chosen.library else _with_own(chosen.scheme)
    for name, linear in list(quantisable_linears(model)):
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, convert(linear))


def _with_own(scheme: Scheme | None) -> Callable[[nn.Linear], nn.Module]:
    assert scheme is not None
    return lambda linear: QuantisedLinear.from_linear(linear, scheme)


def _with_quanto(chosen: Precision) -> Callable[[nn.Linear], nn.Module]:
    try:
        from optimum.quanto import QLinear, qint8
    except ImportError as error:
        raise PrecisionError(
            f"The precision '{chosen.name}' needs the package {chosen.library}, which is not installed here ({error}). "
            f"Install it with `pip install {chosen.library}`, or choose int8, which needs nothing."
        ) from error

    def convert(linear: nn.Linear) -> nn.Module:
        quantised = QLinear.from_module(linear, weights=qint8)
        assert quantised is not None  # None is for modules that quanto cannot quantise
        quantised.freeze()
        return quantised

    return convert
