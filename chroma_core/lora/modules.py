"""Adapters as values: one layer's update of each kind, and a whole file of them.

| kind | ΔW | source |
|---|---|---|
| `lora` | (alpha / rank) · up @ down | Hu et al. 2021, arXiv:2106.09685 |
| `rslora` | the same with alpha / √rank; held and written as a `lora` whose alpha is alpha · √rank | arXiv:2312.03732 |
| `dora` | magnitude · (W + ΔV) / ‖W + ΔV‖ − W, ΔV a `lora`, norm and magnitude per output row | arXiv:2402.09353 |
| `dora-columns` | the same with norm and magnitude per input column | OneTrainer (its default), LyCORIS |
| `lokr` | scale · (w1 ⊗ w2), each factor whole or a product; scale alpha / rank with a product, else 1 | LyCORIS |
| `loha` | (alpha / rank) · (w1_a @ w1_b) ∘ (w2_a @ w2_b) | LyCORIS, arXiv:2108.06098 |
| `lokr-dora`, `loha-dora` | a `dora` of either norm, ΔV a `lokr` or `loha` | LyCORIS |
| `oft` | rescale · RᵀW − W, R orthogonal by blocks of output rows | LyCORIS, arXiv:2306.07280 |
| `full` | a difference of the whole weight, of a norm's scale, or of the bias alone | ComfyUI, LyCORIS |

The first four can be trained; the others are read, applied, merged and written. Beside each there can be a difference
of the layer's bias, `bias`.
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

KINDS = {
    "lora": "LoRA",
    "dora": "DoRA",
    "dora-columns": "DoRA (by input columns)",
    "lokr": "LoKr",
    "lokr-dora": "LoKr with DoRA",
    "loha": "LoHa",
    "loha-dora": "LoHa with DoRA",
    "oft": "OFT",
    "full": "full difference",
}
"""Every kind of module, and what a person calls it."""

SHOWN = 4
"""Names that an error message quotes."""


@dataclass(frozen=True, eq=False)
class _Factors:
    """What the kinds of module share.

    bias [out]: what is added to the layer's bias; no strength but the LoRA's own multiplies it.
    """

    bias: Tensor | None = field(default=None, kw_only=True)

    def factors(self) -> dict[str, Tensor]:
        """The tensors by field name."""
        found = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))
        return {name: value for name, value in found if isinstance(value, Tensor)}

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same with every tensor changed, e.g. moved."""
        return dataclasses.replace(self, **{name: change(tensor) for name, tensor in self.factors().items()})

    def to(self, dtype: torch.dtype) -> Self:
        """The same with its tensors in `dtype`. Magnitudes stay as they are: rounding one changes a whole row."""
        cast = {name: tensor.to(dtype) for name, tensor in self.factors().items() if name != "magnitude"}
        return dataclasses.replace(self, **cast)


class _Additive(_Factors):
    """The kinds whose update does not depend on the weight, unless a magnitude makes a DoRA of them.

    magnitude [out]: the rows of W + ΔV are rescaled to these lengths, as PEFT does it; [1, in]: the columns are.
    """

    magnitude: Tensor | None

    def update(self) -> Tensor:
        """ΔV [out, in] in fp32: what is added to the weight before any magnitude."""
        raise NotImplementedError

    def delta(self, weight: Tensor | None = None) -> Tensor:
        """ΔW [out, in] in fp32. A DoRA's depends on the layer's weight [out, in]; LoraError when that is not given."""
        if self.magnitude is None:
            return self.update()
        if weight is None:
            raise LoraError("What a DoRA adds depends on the weight below it: give the layer's weight to compute it.")
        changed = weight.float() + self.update()
        return changed * decomposing_factor(changed, self.magnitude) - weight.float()


@dataclass(frozen=True, eq=False)
class LoraModule(_Additive):
    """One layer's low-rank update ΔV = (alpha / rank) · up @ down, with down [rank, in] and up [out, rank]."""

    down: Tensor
    up: Tensor
    alpha: float
    magnitude: Tensor | None = None

    @property
    def kind(self) -> str:
        """`lora`, `dora` or `dora-columns`."""
        if self.magnitude is None:
            return "lora"
        return "dora" if self.magnitude.ndim == 1 else "dora-columns"

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

    def update(self) -> Tensor:
        """ΔV [out, in] in fp32."""
        return (self.up.float() @ self.down.float()) * self.scale


@dataclass(frozen=True, eq=False)
class LokrModule(_Additive):
    """One layer's Kronecker update ΔV = scale · w1 ⊗ w2 [out, in], with w1 [out_l, in_m] and w2 [out_k, in_n].

    Each factor is whole or a product `a` @ `b` over the rank. rows: first and one-past-last row of the product that are
    this layer's, for a part of a fused layer; None for all of them.
    """

    alpha: float
    w1: Tensor | None = None
    w1_a: Tensor | None = None
    w1_b: Tensor | None = None
    w2: Tensor | None = None
    w2_a: Tensor | None = None
    w2_b: Tensor | None = None
    rows: tuple[int, int] | None = None
    magnitude: Tensor | None = None

    @property
    def kind(self) -> str:
        """`lokr` or `lokr-dora`."""
        return "lokr" if self.magnitude is None else "lokr-dora"

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

    def update(self) -> Tensor:
        """ΔV [out, in] in fp32."""
        whole = self.map(torch.Tensor.float)
        update = torch.kron(whole.left, whole.right) * self.scale
        return update if self.rows is None else update[self.rows[0] : self.rows[1]]


@dataclass(frozen=True, eq=False)
class LohaModule(_Additive):
    """One layer's Hadamard update ΔV = (alpha / rank) · (w1_a @ w1_b) ∘ (w2_a @ w2_b).

    w1_a and w2_a [out, rank], w1_b and w2_b [rank, in]; the rank is that of w1, as in LyCORIS and ComfyUI.
    """

    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    alpha: float
    magnitude: Tensor | None = None

    @property
    def kind(self) -> str:
        """`loha` or `loha-dora`."""
        return "loha" if self.magnitude is None else "loha-dora"

    @property
    def rank(self) -> int:
        """Rows of `w1_b`."""
        return self.w1_b.shape[0]

    @property
    def scale(self) -> float:
        """The factor on the product."""
        return self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the layer."""
        return self.w1_a.shape[0], self.w1_b.shape[1]

    def update(self) -> Tensor:
        """ΔV [out, in] in fp32."""
        left, right = self.w1_a.float() @ self.w1_b.float(), self.w2_a.float() @ self.w2_b.float()
        return left * right * self.scale


@dataclass(frozen=True, eq=False)
class OftModule(_Factors):
    """One layer's rotation W' = rescale · RᵀW, R = (I + Q)(I − Q)⁻¹ orthogonal, Q = blocks − blocksᵀ, block by block.

    blocks [out / size, size, size]: the first `size` rows of the weight are turned by the first one, and so on; their
    constraint (LyCORIS' alpha) is applied already. rescale [out, 1], or none. The layer's bias is not turned.
    """

    kind: ClassVar[str] = "oft"
    rank: ClassVar[None] = None
    scale: ClassVar[float] = 1.0
    alpha: ClassVar[float] = 0.0
    """The constraint that is left to apply: none."""

    blocks: Tensor
    rescale: Tensor | None = None

    @property
    def shape(self) -> tuple[int]:
        """(out,) of the layer."""
        return (self.blocks.shape[0] * self.blocks.shape[1],)

    def turn(self) -> Tensor:
        """Rᵀ [out / size, size, size] in fp32."""
        device = self.blocks.device
        blocks = self.blocks.to("cpu" if device.type == "mps" else device).double()  # Apple's GPUs have no fp64
        skew = blocks - blocks.mT
        unit = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
        # Rᵀ = (I − Q)ᵀ⁻¹ (I + Q)ᵀ = (I + Q)⁻¹ (I − Q), since Qᵀ = −Q.
        return torch.linalg.solve(unit + skew, unit - skew).float().to(device)

    def delta(self, weight: Tensor | None = None) -> Tensor:
        """ΔW [out, in] in fp32, for the layer's weight [out, in]; LoraError when that is not given."""
        if weight is None:
            raise LoraError(
                "What an OFT changes depends on the weight below it: give the layer's weight to compute it."
            )
        whole = weight.float()
        size = self.blocks.shape[-1]
        turned = (self.turn() @ whole.reshape(-1, size, whole.shape[1])).reshape(whole.shape)
        return (turned if self.rescale is None else turned * self.rescale.float()) - whole


@dataclass(frozen=True, eq=False)
class FullModule(_Factors):
    """A difference as it is: of the weight [out, in], of a norm's scale [width], or (None) of the bias alone."""

    kind: ClassVar[str] = "full"
    rank: ClassVar[None] = None
    scale: ClassVar[float] = 1.0
    alpha: ClassVar[float] = 1.0

    diff: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight; (out,) where there is a bias only."""
        found = self.diff if self.diff is not None else self.bias
        assert found is not None
        return tuple(found.shape)

    def delta(self, weight: Tensor | None = None) -> Tensor:
        """ΔW in fp32: [out, in], or [width] of a norm; of a bias alone a zero."""
        return torch.zeros(()) if self.diff is None else self.diff.float()


AdapterModule = LoraModule | LokrModule | LohaModule | OftModule | FullModule


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
    def kinds(self) -> list[str]:
        """The kinds that occur, in alphabetical order."""
        return sorted({module.kind for module in self.modules.values()})

    @property
    def ranks(self) -> list[int]:
        """The ranks that occur, ascending; whole Kronecker factors have none."""
        return sorted({module.rank for module in self.modules.values() if module.rank is not None})

    @property
    def alphas(self) -> list[float]:
        """The alphas that occur, ascending; of modules that have one."""
        return sorted({m.alpha for m in self.modules.values() if not isinstance(m, OftModule | FullModule)})

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


def decomposing_factor(changed: Tensor, magnitude: Tensor) -> Tensor:
    """What W + ΔV [out, in] in fp32 is multiplied by to have those lengths: by rows [out, 1], or by columns [1, in]."""
    if magnitude.ndim == 1:
        return (magnitude.float() / row_norms(changed))[:, None]
    return magnitude.float() / row_norms(changed.T)


def quoted(names: Sequence[str]) -> str:
    """The first few names for a message, and how many more there are."""
    return first_few(names, SHOWN, "'")


def _product_shape(whole: Tensor | None, a: Tensor | None, b: Tensor | None) -> tuple[int, int]:
    if whole is not None:
        return whole.shape[0], whole.shape[1]
    if a is None or b is None:
        raise LoraError("A LoKr factor is missing: each of w1 and w2 is one matrix or a pair a, b.")
    return a.shape[0], b.shape[1]
