"""Adapters as values: one layer's update of each kind, and a whole file of them.

| kind | ΔW | source |
|---|---|---|
| `lora` | (alpha / rank) · up @ down | Hu et al. 2021, arXiv:2106.09685 |
| `rslora` | the same with alpha / √rank; held and written as a `lora` whose alpha is alpha · √rank | arXiv:2312.03732 |
| `dora` | magnitude · (W + ΔV) / ‖W + ΔV‖ − W, ΔV a `lora`, norm and magnitude per output row | arXiv:2402.09353 |
| `lokr` | scale · (w1 ⊗ w2), each factor whole or a product; scale alpha / rank with a product, else 1 | LyCORIS |
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import Self

from ..errors import LoraError, first_few

AdapterKind = Literal["lora", "rslora", "dora", "lokr"]
"""What can be trained; an `rslora` is a `lora` once it is made."""

SHOWN = 4
"""Names that an error message quotes."""


@dataclass(frozen=True, eq=False)
class _Factors:
    """What the kinds of module share."""

    def factors(self) -> dict[str, Tensor]:
        """The tensors by field name."""
        found = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))
        return {name: value for name, value in found if isinstance(value, Tensor)}

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same with every tensor changed, e.g. moved."""
        return dataclasses.replace(self, **{name: change(tensor) for name, tensor in self.factors().items()})


@dataclass(frozen=True, eq=False)
class LoraModule(_Factors):
    """One layer's low-rank update ΔW = (alpha / rank) · up @ down, with down [rank, in] and up [out, rank].

    magnitude [out] makes it a DoRA: the rows of W + ΔW are then rescaled to these lengths, as PEFT does it.
    """

    down: Tensor
    up: Tensor
    alpha: float
    magnitude: Tensor | None = None

    @property
    def kind(self) -> AdapterKind:
        """`lora` or `dora`."""
        return "lora" if self.magnitude is None else "dora"

    @property
    def rank(self) -> int:
        """Rows of `down`."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """The factor on up @ down."""
        return self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the layer."""
        return self.up.shape[0], self.down.shape[1]

    def to(self, dtype: torch.dtype) -> LoraModule:
        """The same with its matrices in `dtype`. Magnitudes stay as they are: rounding one changes a whole row."""
        return dataclasses.replace(self, down=self.down.to(dtype), up=self.up.to(dtype))

    def delta(self, weight: Tensor | None = None) -> Tensor:
        """ΔW [out, in] in fp32. A DoRA's depends on the layer's weight [out, in]; LoraError when that is not given."""
        update = (self.up.float() @ self.down.float()) * self.scale
        if self.magnitude is None:
            return update
        if weight is None:
            raise LoraError("What a DoRA adds depends on the weight below it: give the layer's weight to compute it.")
        changed = weight.float() + update
        factor = self.magnitude.float() / row_norms(changed)
        return changed * factor[:, None] - weight.float()


@dataclass(frozen=True, eq=False)
class LokrModule(_Factors):
    """One layer's Kronecker update ΔW = scale · w1 ⊗ w2 [out, in], with w1 [out_l, in_m] and w2 [out_k, in_n].

    Each factor is whole or a product `a` @ `b` over the rank. rows: first and one-past-last row of the product that are
    this layer's, for a part of a fused layer; None for all of them.
    """

    kind: ClassVar[AdapterKind] = "lokr"

    alpha: float
    w1: Tensor | None = None
    w1_a: Tensor | None = None
    w1_b: Tensor | None = None
    w2: Tensor | None = None
    w2_a: Tensor | None = None
    w2_b: Tensor | None = None
    rows: tuple[int, int] | None = None

    @property
    def rank(self) -> int | None:
        """The inner width of the product (that of w2 when both are one, as in ComfyUI); None when both are whole."""
        inner = self.w2_b if self.w2_b is not None else self.w1_b
        return None if inner is None else inner.shape[0]

    @property
    def scale(self) -> float:
        """The factor on w1 ⊗ w2: 1 when both are whole, whatever alpha is (LyCORIS)."""
        return 1.0 if self.rank is None else self.alpha / self.rank

    @property
    def left(self) -> Tensor:
        """w1 [out_l, in_m] in its own dtype."""
        return self.w1 if self.w1 is not None else self.w1_a @ self.w1_b  # type: ignore[operator]

    @property
    def right(self) -> Tensor:
        """w2 [out_k, in_n] in its own dtype."""
        return self.w2 if self.w2 is not None else self.w2_a @ self.w2_b  # type: ignore[operator]

    @property
    def blocks(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes of w1 and w2."""
        return _product_shape(self.w1, self.w1_a, self.w1_b), _product_shape(self.w2, self.w2_a, self.w2_b)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the layer."""
        (out_l, in_m), (out_k, in_n) = self.blocks
        rows = out_l * out_k if self.rows is None else self.rows[1] - self.rows[0]
        return rows, in_m * in_n

    def to(self, dtype: torch.dtype) -> LokrModule:
        """The same with its matrices in `dtype`."""
        return self.map(lambda tensor: tensor.to(dtype))

    def delta(self, weight: Tensor | None = None) -> Tensor:
        """ΔW [out, in] in fp32; it does not depend on the weight."""
        whole = self.map(torch.Tensor.float)
        update = torch.kron(whole.left, whole.right) * self.scale
        return update if self.rows is None else update[self.rows[0] : self.rows[1]]


AdapterModule = LoraModule | LokrModule


@dataclass(frozen=True, eq=False)
class LoraFile:
    """A LoRA: layers by diffusers name (`transformer_blocks.0.attn.to_q`), header texts, and where it came from.

    `unmatched` lists the file's keys that mean nothing to Chroma; `adapters.check_fits` refuses them unless told to
    apply a part. `alpha_source`: where its alphas stood: `tensors`, `configuration` (header or a file beside it),
    `absent` (alpha is then the rank), or `mixed` (tensors for some layers, absent for others).
    """

    modules: Mapping[str, AdapterModule]
    metadata: dict[str, str] = field(default_factory=dict)
    key_format: str = "universal"
    unmatched: tuple[str, ...] = ()
    alpha_source: str = "tensors"

    @property
    def kinds(self) -> list[AdapterKind]:
        """The kinds that occur, in alphabetical order."""
        return sorted({module.kind for module in self.modules.values()})

    @property
    def ranks(self) -> list[int]:
        """The ranks that occur, ascending; whole Kronecker factors have none."""
        return sorted({module.rank for module in self.modules.values() if module.rank is not None})

    @property
    def alphas(self) -> list[float]:
        """The alphas that occur, ascending."""
        return sorted({module.alpha for module in self.modules.values()})

    @property
    def dtypes(self) -> list[str]:
        """The dtypes that occur, in alphabetical order."""
        return sorted({str(t.dtype)[6:] for module in self.modules.values() for t in module.factors().values()})

    @property
    def parameters(self) -> int:
        """Numbers in all the matrices."""
        return sum(tensor.numel() for module in self.modules.values() for tensor in module.factors().values())


def row_norms(weight: Tensor) -> Tensor:
    """Length of every row [out] of a weight [out, in], never zero: an empty row keeps a finite quotient."""
    return torch.linalg.vector_norm(weight, dim=1).clamp_min(torch.finfo(torch.float32).tiny)


def quoted(names: Sequence[str]) -> str:
    """The first few names for a message, and how many more there are."""
    return first_few(names, SHOWN, "'")


def _product_shape(whole: Tensor | None, a: Tensor | None, b: Tensor | None) -> tuple[int, int]:
    if whole is not None:
        return whole.shape[0], whole.shape[1]
    if a is None or b is None:
        raise LoraError("A LoKr factor is missing: each of w1 and w2 is one matrix or a pair a, b.")
    return a.shape[0], b.shape[1]
