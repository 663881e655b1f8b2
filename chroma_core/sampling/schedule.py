"""Sigmas: the schedule that sampling follows and the draws that training makes.

σ is the share of noise in x_t = (1−σ)·x₀ + σ·ε, from 1 (pure noise) to 0. Everything here is fp32 (fp64 inside).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from torch import Generator, Tensor

from ..errors import ConfigError, check_choice, shortened

FlowShift = Literal["dynamic", "none"] | float
"""`dynamic` shifts by resolution, a number s shifts by s, `none` leaves the spacing as it is."""

Spacing = Literal["linear", "beta"]
"""`linear`: even times. `beta`: more of them near both ends, as ComfyUI's scheduler of that name has it."""

SigmaDraw = Literal["logit_normal", "uniform", "chroma"]
SigmaRemap = Literal["quadratic", "quadratic_split", "none"]

MAX_STEPS = 1000

BETA_SHAPE = 0.6
"""Both shape parameters of the beta distribution (ComfyUI's default; Lee et al. 2024, "Beta sampling")."""

TABLE_ROWS = 10_000
"""Rows of ComfyUI's table of noise levels for Flux-like models, to which its `beta` scheduler rounds."""

BIAS_BASE = 8.0
"""The flow shift of a sigma bias of 1. Chroma's own shift at 1024², e^1.15, is a bias of .55."""


def parse_flow_shift(value: str | float) -> FlowShift:
    """Read a flow shift as a user writes it: `dynamic`, `none` or a positive number."""
    if value in ("dynamic", "none"):
        return cast(FlowShift, value)
    try:
        shift = float(value)
    except (ValueError, TypeError, OverflowError):  # whatever a program may send
        shift = math.nan
    if not (math.isfinite(shift) and shift > 0):
        raise ConfigError(
            f"The flow shift is {shortened(repr(value))}; it must be 'dynamic', 'none' or a number above 0 (1 = none)."
        )
    return shift


def dynamic_mu(image_tokens: int) -> float:
    """μ of the resolution-dependent shift for `image_tokens` = width·height/256.

    A line through (256, 0.5) and (4096, 1.15), as in black-forest-labs/flux `get_lin_function`.
    """
    slope = (1.15 - 0.5) / (4096 - 256)
    return slope * image_tokens + 0.5 - slope * 256


def apply_flow_shift(sigmas: Tensor, shift: FlowShift, image_tokens: int) -> Tensor:
    """Move noise levels towards 1: σ' = sσ / (1 + (s−1)σ), with s = e^μ when dynamic (Esser et al. 2024, eq. 23).

    e^μ / (e^μ + 1/σ − 1) is the same expression. 0 and 1 stay where they are.
    """
    if shift == "none":
        return sigmas
    factor = math.exp(dynamic_mu(image_tokens)) if shift == "dynamic" else float(shift)
    return factor * sigmas / (1 + (factor - 1) * sigmas)


def spaced_times(steps: int, spacing: Spacing = "linear") -> Tensor:
    """`steps` times from 1 down, fp64; the 0 that ends a run is not among them.

    `linear` is linspace(1, 1/N, N). `beta` takes the quantiles of Beta(.6, .6) at 1, 1 − 1/N, … 1/N, rounded to
    ComfyUI's table: t = (rint(9999·q) + 1) / 10000. Where two fall on one row, one is left out, as there; that begins
    above 500 steps, so there can be fewer than `steps`.

    Raises ConfigError for an unknown spacing.
    """
    check_choice("The spacing", spacing, get_args(Spacing))
    if spacing == "linear":
        return torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
    from scipy.special import betaincinv

    u = 1 - torch.arange(steps, dtype=torch.float64) / steps
    rows = torch.round(torch.from_numpy(betaincinv(BETA_SHAPE, BETA_SHAPE, u.numpy())) * (TABLE_ROWS - 1))
    return (torch.unique_consecutive(rows) + 1) / TABLE_ROWS


def apply_tail_bias(t: Tensor, bias: float) -> Tensor:
    """Crowd times in [0, 1] towards both ends: t' = (1−b)·t + b·q(t), b in 0..1.

    q(t) = 2t² below ½ and 1 − 2(1−t)² from ½ on: the trainers' quadratic remap (σ², 1−(1−σ)²) made continuous.
    """
    if not 0 <= bias <= 1:
        raise ConfigError(
            f"The tail bias is {bias}; it must be between 0 (even steps) and 1 (all the way to the tails)."
        )
    remapped = torch.where(t < 0.5, 2 * t**2, 1 - 2 * (1 - t) ** 2)
    return (1 - bias) * t + bias * remapped


def sampling_sigmas(
    steps: int,
    image_tokens: int,
    *,
    tail_bias: float = 0.0,
    flow_shift: FlowShift = "dynamic",
    denoise: float = 1.0,
    spacing: Spacing = "linear",
    start_step: int = 0,
    end_step: int | None = None,
) -> Tensor:
    """The noise levels of a sampling run: fp32 on the CPU, [steps + 1], descending, last one 0.

    Spacing → tail bias → flow shift → 0. With `denoise` d < 1 the schedule is that of N/d steps, of which the last N
    are taken, so that an image-to-image run has the same step sizes (ComfyUI's own convention). `start_step` and
    `end_step` take a part of that, from one level to another, counted from 0 (an `end_step` beyond the last is the
    last); a part that ends early ends above 0.

    Raises ConfigError for steps, strengths and parts that cannot be.
    """
    if not 1 <= steps <= MAX_STEPS:
        raise ConfigError(f"The number of steps is {steps}; it must be between 1 and {MAX_STEPS}.")
    if not 0 < denoise <= 1:
        raise ConfigError(f"The denoise strength is {denoise}; it must be above 0 and at most 1.")
    total = max(steps, int(steps / denoise))
    t = spaced_times(total, spacing)
    if len(t) < steps:
        raise ConfigError(
            f"The spacing {spacing!r} has {len(t)} different noise levels for {steps} steps. Take fewer steps, or the "
            "spacing 'linear'."
        )
    end = steps if end_step is None else min(end_step, steps)
    if not 0 <= start_step < end:
        raise ConfigError(
            f"Steps {start_step} to {end} of {steps} are none to run; start_step must be 0 or more and below end_step."
        )
    sigmas = apply_flow_shift(apply_tail_bias(t, tail_bias), flow_shift, image_tokens)
    sigmas = torch.cat([sigmas, sigmas.new_zeros(1)])[-(steps + 1) :].float()
    return sigmas[start_step : end + 1]


@dataclass(frozen=True)
class SigmaSettings:
    """How training draws noise levels: draw, then remap, then shift, then squeeze into [minimum, maximum].

    `scale` is the s of sigmoid(s·N(0,1)) and only read by the `logit_normal` draw. With `shift_first` the shift stands
    before the remap, as in SimpleTuner.
    """

    draw: SigmaDraw = "logit_normal"
    remap: SigmaRemap = "quadratic"
    scale: float = 1.0
    flow_shift: FlowShift = "none"
    minimum: float = 0.0
    maximum: float = 1.0
    shift_first: bool = False

    def __post_init__(self) -> None:
        check_choice("The sigma draw", self.draw, get_args(SigmaDraw))
        check_choice("The sigma remap", self.remap, get_args(SigmaRemap))
        parse_flow_shift(self.flow_shift)
        if not self.scale > 0:
            raise ConfigError(f"The scale of the logit-normal draw is {self.scale}; it must be above 0.")
        if not 0 <= self.minimum < self.maximum <= 1:
            raise ConfigError(f"Sigmas from {self.minimum} to {self.maximum}: need 0 ≤ minimum < maximum ≤ 1.")


def apply_sigma_bias(sigmas: Tensor, bias: Tensor) -> Tensor:
    """Move each noise level towards 1 (bias above 0, to composition) or towards 0 (below 0, to detail).

    The constant flow shift with s = 8^b: σ' = sσ / (1 + (s−1)σ), or logit σ' = logit σ + b·ln 8. It rises with σ, keeps
    0 and 1, and takes a median of ½ to 8/9 at b = 1 and to 1/9 at b = −1; −b undoes b. A row with b = 0 stays as it is
    to the last bit.

    Raises ConfigError for a bias outside −1..1.
    """
    if not bool((bias.abs() <= 1).all()):
        raise ConfigError(f"The sigma bias is {bias.tolist()}; it must lie between -1 (detail) and 1 (composition).")
    factor = BIAS_BASE ** bias.to(sigmas.dtype)
    return factor * sigmas / (1 + (factor - 1) * sigmas)


def _chroma_quantile(u: Tensor) -> Tensor:
    """Inverse distribution of the density ∝ 2 − 7.7(t−½)² on [0, 1], with which Chroma's author trains.

    With x = t − ½ and Z = 2 − 7.7/12, F(t) = u is the depressed cubic x³ − (6/7.7)x + (3Z/7.7)(u − ½) = 0, which has
    three real roots here; the middle one lies in [−½, ½] (Viète's trigonometric formula).
    """
    p = -6 / 7.7
    q = 3 * (2 - 7.7 / 12) / 7.7 * (u - 0.5)
    angle = torch.arccos((3 * q / (2 * p) * math.sqrt(-3 / p)).clamp(-1, 1)) / 3
    return 0.5 + 2 * math.sqrt(-p / 3) * torch.cos(angle - 2 * math.pi / 3)


def draw_sigmas(
    n: int, settings: SigmaSettings, generator: Generator, image_tokens: int, bias: Sequence[float] | None = None
) -> Tensor:
    """Draw `n` training noise levels in [minimum, maximum]: fp32 on the generator's device (a CPU generator).

    `bias` has one number in −1..1 for each draw (see `apply_sigma_bias`), applied after remap and flow shift; the
    limits hold whatever it is, and the numbers that are drawn do not depend on it.

    Remaps: `quadratic` takes σ² or 1−(1−σ)² by a fair coin, so tails are visited more often and every σ stays
    reachable; `quadratic_split` takes σ² below ½ and 1−(1−σ)² from ½ on (SimpleTuner's rule, never inside [¼, ¾)).
    """

    def uniform() -> Tensor:
        return torch.rand(n, generator=generator, dtype=torch.float64)

    if settings.draw == "logit_normal":
        sigmas = torch.sigmoid(settings.scale * torch.randn(n, generator=generator, dtype=torch.float64))
    elif settings.draw == "uniform":
        sigmas = uniform()
    else:
        sigmas = _chroma_quantile(uniform())
    if settings.shift_first:
        sigmas = apply_flow_shift(sigmas, settings.flow_shift, image_tokens)
    if settings.remap != "none":
        low = uniform() < 0.5 if settings.remap == "quadratic" else sigmas < 0.5
        sigmas = torch.where(low, sigmas**2, 1 - (1 - sigmas) ** 2)
    if not settings.shift_first:
        sigmas = apply_flow_shift(sigmas, settings.flow_shift, image_tokens)
    if bias is not None:
        sigmas = apply_sigma_bias(sigmas, torch.tensor(bias, dtype=sigmas.dtype))
    return (settings.minimum + (settings.maximum - settings.minimum) * sigmas).float()


def sigma_density(settings: SigmaSettings, image_tokens: int, bins: int = 40, draws: int = 40_000) -> list[float]:
    """How densely training's noise levels lie in equal parts of [0, 1]: the histogram of real draws, of area 1.

    The generator is fixed, so the same settings give the same numbers.
    """
    drawn = draw_sigmas(draws, settings, Generator().manual_seed(0), image_tokens)
    return (torch.histc(drawn, bins, 0.0, 1.0) * bins / draws).tolist()
