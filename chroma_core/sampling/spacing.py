"""How a sampling run's times lie between 1 and 0, before tail bias and flow shift."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import ConfigError

Spacing = Literal["linear", "beta"]
"""`linear`: even times. `beta`: more of them near both ends, as ComfyUI's scheduler of that name has it."""

BETA_SHAPE = 0.6
"""Both shape parameters of the beta distribution (the host's default; Lee et al. 2024, "Beta sampling")."""

TABLE_ROWS = 10_000
"""Rows of the host's table of noise levels for Flux-like models, to which its `beta` scheduler rounds."""


def spaced_times(steps: int, spacing: Spacing = "linear") -> Tensor:
    """`steps` times from 1 down, fp64; the 0 that ends a run is not among them.

    `linear` is linspace(1, 1/N, N). `beta` takes the quantiles of Beta(.6, .6) at 1, 1 − 1/N, … 1/N, rounded to the
    host's table: t = (rint(9999·q) + 1) / 10000. Where two fall on one row, one is left out, as in the host; that
    begins above 500 steps, so there can be fewer than `steps`.

    Raises ConfigError for an unknown spacing.
    """
    if spacing not in get_args(Spacing):
        raise ConfigError(f"The spacing is {spacing!r}; choose one of: {', '.join(get_args(Spacing))}.")
    if spacing == "linear":
        return torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
    u = 1 - torch.arange(steps, dtype=torch.float64) / steps
    rows = torch.round(beta_quantile(u, BETA_SHAPE, BETA_SHAPE) * (TABLE_ROWS - 1))
    return (torch.unique_consecutive(rows) + 1) / TABLE_ROWS


def beta_quantile(u: Tensor, a: float, b: float) -> Tensor:
    """The inverse of the regularised incomplete beta function I_x(a, b), for `u` [n] in 0..1; fp64, to about 1e-12.

    By bisection; PyTorch has no such function, and SciPy is not needed for anything else.
    """
    u = u.to(torch.float64)
    low, high = torch.zeros_like(u), torch.ones_like(u)
    for _ in range(60):
        middle = (low + high) / 2
        below = _beta_cdf(middle, a, b) < u
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return torch.where(u >= 1, 1.0, torch.where(u <= 0, 0.0, (low + high) / 2))


def _beta_cdf(x: Tensor, a: float, b: float) -> Tensor:
    """I_x(a, b) by the power series of B_x(a, b) = x^a Σ (1−b)_n x^n / (n! (a + n)) (DLMF 8.17.7 and 15.2.1).

    Above ½ the symmetry I_x(a, b) = 1 − I_{1−x}(b, a) is used, so that the terms fall at least like 2^−n.
    """

    def lower(y: Tensor, a: float, b: float) -> Tensor:
        n = torch.arange(60, dtype=torch.float64)
        rising = torch.cumprod(torch.cat([torch.ones(1, dtype=torch.float64), (n[1:] - b) / n[1:]]), 0)
        series = y[:, None] ** n @ (rising / (a + n))
        return y**a * series / math.exp(math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b))

    return torch.where(x <= 0.5, lower(x.clamp(max=0.5), a, b), 1 - lower((1 - x).clamp(max=0.5), b, a))
