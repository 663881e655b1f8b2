"""The best approximation of a ΔW by factors of low rank: the truncated singular value decomposition (Eckart and Young
1936), of a matrix or, without ever building it, of a product.

‖ΔW‖² is the sum of all squared singular values; what a truncation keeps of it is the sum of the first ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import LoraError
from .modules import KINDS, AdapterModule, LokrModule, LoraModule

LARGEST_RANK = 1024

SMALL = 1024
"""Rows or columns of a matrix up to which it is decomposed exactly: in a second or two."""

OVERSAMPLING, SWEEPS, SETTLED = 16, 30, 1e-4
"""Of the randomised decomposition: columns beyond the rank, most passes, and the growth of what is kept, relative,
below which a pass is the last."""

NOTHING = 1e-6
"""Singular values below this part of the largest are rounding of fp32, and left out."""


@dataclass(frozen=True)
class Truncation:
    """How much is kept: at most `rank` directions, and no more than hold `energy` (0..1] of ‖ΔW‖².

    Raises LoraError for what is neither, or out of range.
    """

    rank: int | None = None
    energy: float | None = None

    def __post_init__(self) -> None:
        if self.rank is None and self.energy is None:
            raise LoraError("Say how much to keep: a rank, or a share of the energy (‖ΔW‖²), or both.")
        if self.rank is not None and not 1 <= self.rank <= LARGEST_RANK:
            raise LoraError(f"The rank to keep is {self.rank}; it must be between 1 and {LARGEST_RANK}.")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise LoraError(f"The energy to keep is {self.energy:g}; it must be above 0 and at most 1 (0.95 is 95 %).")

    def count(self, values: Tensor, total: float) -> int:
        """How many of the singular values (descending) are kept, at least one; total: ‖ΔW‖²."""
        real = int((values > values[0] * NOTHING).sum())
        count = min(real, self.rank or real)
        if self.energy is not None:
            # In the sum's own precision: a share of 1 must not be missed by its last bit.
            enough = values.double().square().cumsum(0) >= self.energy * total * (1 - 1e-12)
            count = min(count, int(enough.nonzero()[0]) + 1 if enough.any() else count)
        return max(1, count)


@dataclass(frozen=True)
class Truncated:
    """A plain LoRA of one layer, and the share 0..1 of ‖ΔW‖² that it keeps."""

    module: LoraModule
    kept: float


def truncate_matrix(delta: Tensor, how: Truncation, exact: bool = False, seed: int = 0) -> Truncated:
    """The best factors for a matrix [out, in] on its device, in fp32 and with alpha = rank.

    Exact where a side is short or `exact` says so, else by subspace iteration from random columns (Halko, Martinsson
    and Tropp 2011, algorithm 4.4), repeated until it has settled. docs/lora.md says how near that comes.
    """
    total = float(delta.double().square().sum())
    if total == 0:
        raise LoraError("A matrix of zeros has no direction to keep.")
    rank = how.rank or LARGEST_RANK
    if exact or min(delta.shape) <= max(SMALL, 2 * rank):
        left, values = _exact(delta)
    else:
        left, values = _randomised(delta, rank, total, seed)
    count = how.count(values, total)
    roots = values[:count].sqrt()
    up = left[:, :count]
    down = up.T @ delta.to(up.dtype)
    module = LoraModule((down / roots[:, None]).float(), (up * roots).float(), float(count))
    return Truncated(module, min(1.0, float(values[:count].double().square().sum()) / total))


def _exact(delta: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors [out, n] and values [n], descending, by the eigenvectors of the shorter Gram matrix.

    In fp64, so that of a matrix in fp32 no value is lost that fp32 can tell from 0.
    """
    wide = delta.double()
    tall = wide.shape[0] > wide.shape[1]
    squares, vectors = torch.linalg.eigh(wide.T @ wide if tall else wide @ wide.T)
    values, vectors = squares.flip(0).clamp_min(0).sqrt(), vectors.flip(1)
    if tall:
        vectors = (wide @ vectors) / values.clamp_min(torch.finfo(torch.float64).tiny)
    return vectors, values


def _randomised(delta: Tensor, rank: int, total: float, seed: int) -> tuple[Tensor, Tensor]:
    """The first `rank` left singular vectors and values, nearly."""
    generator = torch.Generator("cpu").manual_seed(seed)
    basis = torch.randn(delta.shape[1], rank + OVERSAMPLING, generator=generator).to(delta.device)
    basis = torch.linalg.qr(delta @ basis).Q
    kept = -math.inf
    for _ in range(SWEEPS):
        basis = torch.linalg.qr(delta @ (delta.T @ basis)).Q
        now = float((delta.T @ basis).double().square().sum()) / total
        if now - kept < SETTLED * now:
            break
        kept = now
    inner = (basis.T @ delta).double()
    squares, vectors = torch.linalg.eigh(inner @ inner.T)
    values = squares.flip(0).clamp_min(0).sqrt()
    return (basis.double() @ vectors.flip(1))[:, :rank], values[:rank]


def truncate_module(module: AdapterModule, how: Truncation) -> Truncated:
    """The best factors for an adapter's ΔW, without building it where its kind allows; alpha = rank, dtypes as before.

    Of a DoRA ΔV is truncated and the magnitudes stay: what it adds depends on a weight that the file does not hold.
    """
    if isinstance(module, LokrModule):
        return _of_kronecker(module, how)
    if not isinstance(module, LoraModule):
        raise LoraError(f"A {KINDS[module.kind]} cannot be resized. Leave rank and energy out.")
    values, left, right = _of_product(module)
    total = float(values.square().sum())
    if total == 0:
        return Truncated(replace(module, down=module.down[:1], up=module.up[:, :1], alpha=1.0), 1.0)
    count = how.count(values, total)
    roots = values[:count].sqrt()
    up = (left[:, :count] * roots).to(module.up.dtype)
    down = (right[:, :count] * roots).T.contiguous().to(module.down.dtype)
    kept = float(values[:count].square().sum()) / total
    return Truncated(replace(module, down=down, up=up, alpha=float(count)), min(1.0, kept))


def _of_product(module: LoraModule) -> tuple[Tensor, Tensor, Tensor]:
    """Singular values [n], left [out, n] and right [in, n] vectors of scale · up @ down, in fp64.

    up = Q R and downᵀ = P S, so that up @ down = Q (R Sᵀ) Pᵀ: the values are those of the small matrix in the middle.
    """
    left, upper = torch.linalg.qr(module.up.double())
    right, lower = torch.linalg.qr(module.down.double().T)
    u, values, v = torch.linalg.svd(upper @ lower.T * module.scale)
    count = len(values)
    return values, left @ u[:, :count], right @ v.T[:, :count]


def _of_kronecker(module: LokrModule, how: Truncation) -> Truncated:
    """Of w1 ⊗ w2: its singular values are the products of those of the two, its vectors the products of theirs."""
    if module.rows is not None:
        made = truncate_matrix(module.update(), how)
        return replace(made, module=replace(made.module, bias=module.bias))
    dtype = module.factors()["w1" if module.w1 is not None else "w1_a"].dtype
    whole = module.map(Tensor.double)
    first, second = (torch.linalg.svd(side, full_matrices=False) for side in (whole.left, whole.right))
    products = (first.S[:, None] * second.S).flatten() * abs(module.scale)
    values, order = products.sort(descending=True, stable=True)
    total = float(values.square().sum())
    if total == 0:
        rows, columns = module.shape
        return Truncated(LoraModule(torch.zeros(1, columns), torch.zeros(rows, 1), 1.0, bias=module.bias), 1.0)
    count = how.count(values, total)
    i, j = order[:count] // len(second.S), order[:count] % len(second.S)
    roots = values[:count].sqrt()
    up = (first.U[:, None, i] * second.U[None, :, j]).flatten(0, 1) * roots
    down = ((first.Vh.T[:, None, i] * second.Vh.T[None, :, j]).flatten(0, 1) * roots).T
    sign = math.copysign(1.0, module.scale)
    up, down = (up * sign).contiguous().to(dtype), down.contiguous().to(dtype)
    made = LoraModule(down, up, float(count), bias=module.bias)
    return Truncated(made, min(1.0, float(values[:count].square().sum()) / total))
