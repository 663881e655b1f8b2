"""How an adapter starts: at the base model, from a seed and the layer's name alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..model.precision import dequantised_weight
from .layer import AdaptedLinear, features
from .modules import AdapterModule, LokrModule, LoraModule, row_norms
from .settings import LoraSettings


def fresh_module(settings: LoraSettings, name: str, layer: nn.Module, seed: int, device: torch.device) -> AdapterModule:
    """The untrained adapter of one layer, in fp32 on `device`, where the layer computes; its ΔW is zero.

    Random numbers are drawn on the CPU: they are the same on every device.
    """
    rows, columns = features(layer)
    rank = settings.rank_of(name)
    generator = torch.Generator("cpu").manual_seed(seed)
    if settings.kind == "lokr":
        module = _lokr(rank, _alpha(settings, name), settings.lokr_factor, (rows, columns), generator)
        return module.map(lambda tensor: tensor.to(device))
    down = _initial_down(settings, rank, columns, generator).to(device)
    up = torch.zeros(rows, rank, dtype=torch.float32, device=device)
    if settings.kind == "dora":
        return LoraModule(down, up, _alpha(settings, name), _weight_norms(layer, device))
    return LoraModule(down, up, _alpha(settings, name))


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


def _initial_down(settings: LoraSettings, rank: int, columns: int, generator: torch.Generator) -> Tensor:
    down = torch.empty(rank, columns, dtype=torch.float32, device="cpu")
    if settings.init == "gaussian":
        return down.normal_(0, 1 / rank, generator=generator)
    return _kaiming(down, generator)


def _lokr(rank: int, alpha: float, factor: int, shape: tuple[int, int], generator: torch.Generator) -> LokrModule:
    """LyCORIS' start: w1 and w2_a uniform in ±1/√columns, w2_b (or a whole w2) zero.

    w2 is a product unless the rank reaches half its longer side: then a whole matrix is no larger.
    """
    (out_l, out_k), (in_m, in_n) = (factorization(size, factor) for size in shape)

    def empty(rows: int, columns: int) -> Tensor:
        return torch.empty(rows, columns, dtype=torch.float32, device="cpu")

    w1 = _kaiming(empty(out_l, in_m), generator)
    if rank >= max(out_k, in_n) / 2:
        return LokrModule(alpha, w1=w1, w2=empty(out_k, in_n).zero_())
    return LokrModule(alpha, w1=w1, w2_a=_kaiming(empty(out_k, rank), generator), w2_b=empty(rank, in_n).zero_())


def _kaiming(matrix: Tensor, generator: torch.Generator) -> Tensor:
    bound = 1 / math.sqrt(matrix.shape[1])
    return matrix.uniform_(-bound, bound, generator=generator)


def _weight_norms(layer: nn.Module, device: torch.device) -> Tensor:
    """Row lengths of the layer's weight, computed where every later norm is: the quotient then starts at exactly 1."""
    base = layer.base_layer if isinstance(layer, AdaptedLinear) else layer
    with torch.no_grad():
        return row_norms(dequantised_weight(base, torch.float32).to(device))
