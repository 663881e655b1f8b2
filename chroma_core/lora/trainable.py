"""The LoRA in training: how it starts (at the base model, from a seed and the layer's name alone, or as a finished
file), put on, copied out and copied in."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import get_args

import torch
from torch import Tensor, nn

from ..errors import LoraError
from ..model.precision import dequantised_weight
from .adapters import (
    AdaptedLinear,
    LoraBranch,
    LowRankBranch,
    adapted_layers,
    attached,
    branch_of,
    compute_device,
    features,
    linear_modules,
    wrapped,
)
from .modules import KINDS, AdapterKind, AdapterModule, LokrModule, LoraFile, LoraModule, quoted, row_norms
from .settings import LoraSettings, target_modules


def fresh_module(settings: LoraSettings, name: str, layer: nn.Module, seed: int, device: torch.device) -> AdapterModule:
    """The untrained adapter of one layer, in fp32 on `device`, where the layer computes; its ΔW is zero.

    `up` is zero, `down` uniform in ±1/√in, PEFT's default. Random numbers are drawn on the CPU: they are the same on
    every device.
    """
    rows, columns = features(layer)
    rank = settings.rank_of(name)
    generator = torch.Generator("cpu").manual_seed(seed)
    if settings.kind == "lokr":
        module = _lokr(rank, _alpha(settings, name), settings.lokr_factor, (rows, columns), generator)
        return module.map(lambda tensor: tensor.to(device))
    down = _kaiming(rank, columns, generator).to(device)
    up = torch.zeros(rows, rank, dtype=torch.float32, device=device)
    magnitude = _weight_norms(layer, device) if settings.kind == "dora" else None
    return LoraModule(down, up, _alpha(settings, name), magnitude)


def factorization(size: int, factor: int = -1) -> tuple[int, int]:
    """Two factors of `size`, the smaller first: the nearest to `factor` from below, or with −1 the nearest two.

    LyCORIS' rule (`lycoris.functional.general.factorization`), which ComfyUI and PEFT share: 3072 → 48 · 64,
    at factor 8 → 8 · 384.
    """
    if factor > 0 and size % factor == 0 and size >= factor**2:
        return factor, size // factor
    limit = size if factor < 0 else factor
    smaller, larger = 1, size
    while smaller < larger:
        candidate = smaller + 1
        while size % candidate:
            candidate += 1
        if candidate + size // candidate > smaller + larger or candidate > limit:
            break
        smaller, larger = candidate, size // candidate
    return min(smaller, larger), max(smaller, larger)


def _alpha(settings: LoraSettings, name: str) -> float:
    alpha = settings.alpha_of(name)
    if settings.kind == "rslora":
        # alpha / √rank = (alpha · √rank) / rank: every loader then scales rightly.
        alpha *= math.sqrt(settings.rank_of(name))
    # As a file will hold it, so that training computes what the file gives.
    return torch.tensor(alpha, dtype=torch.float32).item()


def _lokr(rank: int, alpha: float, factor: int, shape: tuple[int, int], generator: torch.Generator) -> LokrModule:
    """LyCORIS' start: w1 and w2_a uniform in ±1/√columns, w2_b (or a whole w2) zero.

    w2 is a product unless the rank reaches half its longer side: then a whole matrix is no larger.
    """
    (out_l, out_k), (in_m, in_n) = (factorization(size, factor) for size in shape)
    w1 = _kaiming(out_l, in_m, generator)
    if rank >= max(out_k, in_n) / 2:
        return LokrModule(alpha, w1=w1, w2=torch.zeros(out_k, in_n, dtype=torch.float32, device="cpu"))
    w2_b = torch.zeros(rank, in_n, dtype=torch.float32, device="cpu")
    return LokrModule(alpha, w1=w1, w2_a=_kaiming(out_k, rank, generator), w2_b=w2_b)


def _kaiming(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Uniform in ±1/√columns."""
    bound = 1 / math.sqrt(columns)
    return torch.empty(rows, columns, dtype=torch.float32, device="cpu").uniform_(-bound, bound, generator=generator)


def _weight_norms(layer: nn.Module, device: torch.device) -> Tensor:
    """Row lengths of the layer's weight, computed where every later norm is: the quotient then starts at exactly 1."""
    base = layer.base_layer if isinstance(layer, AdaptedLinear) else layer
    with torch.no_grad():
        return row_norms(dequantised_weight(base, torch.float32).to(device))


def fitted(name: str, given: AdapterModule, fresh: AdapterModule) -> AdapterModule:
    """`given`, with the factors and alpha of `fresh` (both of layer `name`), doing exactly what it did.

    Raises LoraError when that is impossible: another kind, a larger rank, another width, other Kronecker factors.
    """
    if given.kind != fresh.kind:
        trained = given.kind in get_args(AdapterKind)
        todo = f"Train with the kind '{given.kind}'" if trained else "That kind is not trained here: merge it instead"
        raise LoraError(
            f"Training cannot start from this LoRA: for '{name}' it is a {KINDS[given.kind]}, in training is a "
            f"{KINDS[fresh.kind]}. {todo}."
        )
    if given.bias is not None:
        raise LoraError(
            f"Training cannot start from this LoRA: for '{name}' it also changes the bias, which is not trained, and "
            "would be lost. Merge it into the base instead."
        )
    if given.shape != fresh.shape:
        sizes = ["×".join(map(str, module.shape)) for module in (given, fresh)]
        raise LoraError(
            f"Training cannot start from this LoRA: for '{name}' it has {sizes[0]}, the model {sizes[1]}. It was made "
            "for another size of model."
        )
    given = given.map(lambda tensor: tensor.detach().to("cpu", torch.float32))
    if isinstance(given, LokrModule) and isinstance(fresh, LokrModule):
        return _fitted_lokr(name, given, fresh)
    assert isinstance(given, LoraModule) and isinstance(fresh, LoraModule)
    _check_rank(name, given.rank, fresh.rank)
    down = torch.cat([given.down, fresh.down[given.rank :]])
    up = _widened(given.up * (given.scale / fresh.scale), fresh.rank)
    return LoraModule(down, up, fresh.alpha, given.magnitude)


def _fitted_lokr(name: str, given: LokrModule, fresh: LokrModule) -> LokrModule:
    if given.blocks != fresh.blocks or given.rows is not None:
        raise LoraError(
            f"Training cannot start from this LoKr: for '{name}' it is {_blocks(given)}"
            f"{' (a part of a fused layer)' if given.rows is not None else ''}, in training is {_blocks(fresh)}. "
            "Set lokr_factor to the one that it was trained with."
        )
    start = dataclasses.replace(fresh, w1=given.left * (given.scale / fresh.scale))
    if fresh.w2 is not None:
        return dataclasses.replace(start, w2=given.right)
    if given.w2_a is None or given.w2_b is None:
        raise LoraError(
            f"Training cannot start from this LoKr: for '{name}' its w2 is a whole matrix, in training is one of rank "
            f"{fresh.rank}. Train with a rank of at least {(max(fresh.blocks[1]) + 1) // 2}."
        )
    assert fresh.w2_a is not None and fresh.w2_b is not None
    rank, wanted = given.w2_b.shape[0], fresh.w2_b.shape[0]
    _check_rank(name, rank, wanted)
    # Here the second factor is the one that starts at zero.
    w2_a = torch.cat([given.w2_a, fresh.w2_a[:, rank:]], dim=1)
    return dataclasses.replace(start, w2_a=w2_a, w2_b=_widened(given.w2_b.T, wanted).T)


def _widened(matrix: Tensor, columns: int) -> Tensor:
    """The matrix with columns of zeros added: whatever stands across from them contributes nothing yet."""
    return torch.nn.functional.pad(matrix, (0, columns - matrix.shape[1]))


def _check_rank(name: str, given: int, wanted: int) -> None:
    if given > wanted:
        raise LoraError(
            f"Training cannot start from this LoRA: for '{name}' its rank is {given}, in training is {wanted}, and a "
            f"larger one cannot be cut down without changing what it does. Train with rank {given} or more."
        )


def _blocks(module: LokrModule) -> str:
    return " ⊗ ".join(f"{rows}×{columns}" for rows, columns in module.blocks)


TRAINED = "trained"
"""The name of the adapter that `add_trainable` makes."""


def add_trainable(transformer: nn.Module, settings: LoraSettings, seed: int) -> list[nn.Parameter]:
    """Put a trainable LoRA on the target layers and freeze everything else; returns its parameters, layer by layer.

    They are fp32 on the device where the layers compute, stay fp32 when the model is cast, and are ordinary (not
    inference) tensors in any context. Random starts depend on the seed and the layer's name alone; no process-wide
    random stream is read or moved. With dropout, call `seed_dropout` before every forward pass, and
    `transformer.train()`.
    Raises ConfigError for a target or pattern that matches nothing, LoraError when a trainable LoRA is already there,
    PrecisionError when DoRA cannot read a layer's weight.
    """
    if TRAINED in attached(transformer):
        raise LoraError("This model already has a LoRA in training; take it off before adding another.")
    names = target_modules(transformer, settings.target)
    settings.check_patterns(names)
    linears = linear_modules(transformer)
    branches: dict[str, LoraBranch] = {}
    with torch.inference_mode(False):
        for name in names:
            device = compute_device(transformer, linears[name])
            module = fresh_module(settings, name, linears[name], _seed("init", seed, name), device)
            branches[name] = branch_of(TRAINED, module, dropout=settings.dropout, trainable=True)
        transformer.requires_grad_(False)
        for name, branch in branches.items():
            wrapped(transformer, name, linears[name]).add(branch)
    return [parameter for branch in branches.values() for parameter in branch.factors().values()]


def seed_dropout(transformer: nn.Module, seed: int) -> None:
    """Set the dropout masks of the next forward passes. The same seed gives the same masks, on any run and thread."""
    for name, layer in adapted_layers(transformer):
        branch = layer.branch(TRAINED)
        if branch is not None:
            branch.dropout_seed = _seed("dropout", seed, name)


class CastFactors:
    """The factors of the LoRA in training, cast to the dtype of computing once a pass instead of in every layer.

    A dozen kernels take the place of three a factor. Gradients have the same bits: each is rounded to that dtype in any
    case, and then added up in fp32.
    """

    def __init__(self, transformer: nn.Module):
        self.branches = [branch for _, branch in _trained_branches(transformer) if isinstance(branch, LowRankBranch)]
        self.factors = [factor for branch in self.branches for factor in (branch.down, branch.up)]

    @contextmanager
    def to(self, dtype: torch.dtype) -> Iterator[None]:
        """Inside a `with` block, which a forward and a backward pass come in, layers compute with the cast factors."""
        if not self.factors or dtype == self.factors[0].dtype:
            yield
            return
        sizes = [factor.numel() for factor in self.factors]
        device = self.factors[0].device
        flat = torch.empty(sum(sizes), dtype=dtype, device=device).split(sizes)
        with torch.no_grad():
            cast = [piece.view(factor.shape) for piece, factor in zip(flat, self.factors, strict=True)]
            torch._foreach_copy_(cast, list(self.factors))
        for tensor in cast:
            tensor.requires_grad_()
        for branch, down, up in zip(self.branches, cast[::2], cast[1::2], strict=True):
            branch.cast = {"down": down, "up": up}
        try:
            yield
            self._collect(cast)
        finally:
            for branch in self.branches:
                branch.cast = {}

    @torch.no_grad()
    def _collect(self, cast: list[Tensor]) -> None:
        """Add the gradients to those of the factors."""
        pairs = [(factor, own.grad) for factor, own in zip(self.factors, cast, strict=True) if own.grad is not None]
        gradients = [torch.empty_like(factor) for factor, _ in pairs]
        torch._foreach_copy_(gradients, [gradient for _, gradient in pairs])
        for (factor, _), gradient in zip(pairs, gradients, strict=True):
            factor.grad = gradient if factor.grad is None else factor.grad.add_(gradient)


def trained_lora(transformer: nn.Module) -> LoraFile:
    """The LoRA in training, as fp32 copies on the CPU. Raises LoraError when there is none."""
    return LoraFile({name: branch.module().map(_fp32_copy) for name, branch in _trained_branches(transformer)})


def load_trained(transformer: nn.Module, lora: LoraFile) -> None:
    """Copy `lora` into the LoRA in training, bit for bit (resume). Layers, kinds, shapes and alphas must agree."""
    branches = dict(_trained_branches(transformer))
    different = sorted(set(branches) ^ set(lora.modules)) or [
        name for name, branch in branches.items() if _outline(branch.module()) != _outline(lora.modules[name])
    ]
    if different:
        raise LoraError(
            f"The saved LoRA and the one in training differ in {len(different)} layers, e.g. {quoted(different)}. "
            "Continue with the kind, target, rank, alpha and base model that it was started with."
        )
    for name, branch in branches.items():
        _copy_in(branch, lora.modules[name])


def start_from(transformer: nn.Module, lora: LoraFile) -> tuple[str, ...]:
    """Let the fresh LoRA in training begin as `lora`, read from a file of any key format; returns the layers without.

    The model then computes what it computes with the file applied at strength 1. A smaller rank in the file is padded
    so that this is exact: the added columns of `up` are zero, the added rows of `down` keep their random start and can
    learn. Another alpha is folded into the weights. Layers that the file lacks begin fresh.
    Raises LoraError, before anything changes, when the file has layers that are not trained, foreign keys, another
    kind, a larger rank, other LoKr factors, or another size of model.
    """
    branches = dict(_trained_branches(transformer))
    outside = [*(name for name in lora.modules if name not in branches), *lora.unmatched]
    if outside:
        raise LoraError(
            f"Training cannot start from this LoRA: {len(outside)} of its layers or keys are not among the "
            f"{len(branches)} that are trained: {quoted(outside)}. What it does there would be lost. Choose a target "
            "that includes them."
        )
    with torch.no_grad():
        starts = {
            name: fitted(name, module, branches[name].module().map(_fp32_copy)) for name, module in lora.modules.items()
        }
    for name, module in starts.items():
        _copy_in(branches[name], module)
    return tuple(name for name in branches if name not in starts)


def _trained_branches(transformer: nn.Module) -> list[tuple[str, LoraBranch]]:
    branches = [(name, layer.branch(TRAINED)) for name, layer in adapted_layers(transformer)]
    found = [(name, branch) for name, branch in branches if branch is not None]
    if not found:
        raise LoraError("This model has no LoRA in training; add one first.")
    return found


def _outline(module: AdapterModule) -> tuple[float, dict[str, torch.Size]]:
    """What must agree between a checkpoint and the LoRA in training; alpha as a file holds it, in fp32."""
    alpha = torch.tensor(module.alpha, dtype=torch.float32).item()
    return alpha, {name: tensor.shape for name, tensor in module.factors().items()}


def _copy_in(branch: LoraBranch, module: AdapterModule) -> None:
    factors = branch.factors()
    with torch.no_grad():
        for name, tensor in module.factors().items():
            factors[name].copy_(tensor)


def _seed(purpose: str, seed: int, name: str) -> int:
    """A 63-bit seed for one purpose and layer, the same on every machine."""
    digest = hashlib.sha256(f"chromakit lora {purpose} {seed} {name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _fp32_copy(parameter: Tensor) -> Tensor:
    return parameter.detach().to("cpu", torch.float32, copy=True)
