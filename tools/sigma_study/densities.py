"""The densities of training's noise levels in closed form: what `schedule.draw_sigmas` draws, without shift or bias.

σ lies in (0, 1). A remap y = g(σ) turns the density p into the sum of p(σ)/|g′(σ)| over every σ that it takes to y.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from chroma_core.sampling.schedule import SigmaDraw, SigmaRemap

VARIANTS: dict[str, tuple[SigmaDraw, SigmaRemap]] = {
    "none": ("logit_normal", "none"),
    "quadratic": ("logit_normal", "quadratic"),
    "quadratic_split": ("logit_normal", "quadratic_split"),
    "chroma": ("chroma", "none"),
}
"""What the study compares: names, and the (draw, remap) that they stand for."""

DEFAULT = "quadratic"

Density = Callable[[np.ndarray], np.ndarray]


def logit_normal(sigma: np.ndarray) -> np.ndarray:
    """The density of sigmoid(N(0, 1)): φ(logit σ) / (σ(1−σ))."""
    logit = np.log(sigma / (1 - sigma))
    return np.exp(-(logit**2) / 2) / (np.sqrt(2 * np.pi) * sigma * (1 - sigma))


def chroma(sigma: np.ndarray) -> np.ndarray:
    """(2 − 7.7(σ−½)²) / (2 − 7.7/12)."""
    return (2 - 7.7 * (sigma - 0.5) ** 2) / (2 - 7.7 / 12)


def towards_zero(density: Density, y: np.ndarray) -> np.ndarray:
    """The density of σ²: p(√y) / (2√y)."""
    return density(np.sqrt(y)) / (2 * np.sqrt(y))


def towards_one(density: Density, y: np.ndarray) -> np.ndarray:
    """The density of 1 − (1−σ)²: p(1 − √(1−y)) / (2√(1−y))."""
    return density(1 - np.sqrt(1 - y)) / (2 * np.sqrt(1 - y))


def quadratic(y: np.ndarray) -> np.ndarray:
    """Logit-normal, then σ² or 1 − (1−σ)² by a fair coin: half of each."""
    return (towards_zero(logit_normal, y) + towards_one(logit_normal, y)) / 2


def quadratic_split(y: np.ndarray) -> np.ndarray:
    """Logit-normal, then σ² below ½ (which ends below ¼) and 1 − (1−σ)² from ½ on (which begins at ¾)."""
    outer = np.where(y < 0.25, towards_zero(logit_normal, y), towards_one(logit_normal, y))
    return np.where((y < 0.25) | (y >= 0.75), outer, 0.0)


DENSITIES: dict[str, Density] = {
    "none": logit_normal,
    "quadratic": quadratic,
    "quadratic_split": quadratic_split,
    "chroma": chroma,
}


def share(name: str, low: float, high: float, points: int = 20_000) -> float:
    """How much of the draws falls between two noise levels (midpoint rule)."""
    width = (high - low) / points
    return float(DENSITIES[name](low + width * (np.arange(points) + 0.5)).sum() * width)
