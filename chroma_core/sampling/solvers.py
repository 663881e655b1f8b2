"""The solvers: how a run gets from one noise level to the next.

All integrate the flow's equation dx/dσ = v(x, σ), with v = (x − D)/σ where D is the image as predicted at σ. On a
straight flow (D constant) each of them is exact.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

from torch import Tensor

from ..errors import ConfigError

Method = Literal["euler", "heun", "dpmpp_2m", "unipc"]

MultistepTime = Literal["half_log_snr", "log_sigma"]
"""The time λ along which `dpmpp_2m` extrapolates: log((1−σ)/σ), the paper's, or −log σ, ComfyUI's."""

Velocity = Callable[[Tensor, float], Tensor]
"""v(x, σ), both shaped like the latents."""


class Solver(ABC):
    """One run along `sigmas` (descending; the last may be above 0). Steps are taken in order, each once."""

    def __init__(self, sigmas: Sequence[float], velocity: Velocity, multistep_time: MultistepTime = "half_log_snr"):
        self.sigmas = sigmas
        self.velocity = velocity
        self.multistep_time = multistep_time

    @abstractmethod
    def step(self, i: int, x: Tensor, v: Tensor) -> Tensor:
        """From `x` at sigmas[i], where the velocity is `v`, to sigmas[i + 1]."""


class Euler(Solver):
    """First order, one pass a step."""

    def step(self, i: int, x: Tensor, v: Tensor) -> Tensor:
        return x + (self.sigmas[i + 1] - self.sigmas[i]) * v


class Heun(Solver):
    """Second order, two passes a step: the mean of the slopes at both ends (Karras et al. 2022, algorithm 1)."""

    def step(self, i: int, x: Tensor, v: Tensor) -> Tensor:
        now, then = self.sigmas[i], self.sigmas[i + 1]
        if then > 0:
            v = (v + self.velocity(x + (then - now) * v, then)) / 2
        return x + (then - now) * v


class DPMSolverPP2M(Solver):
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): second order, one pass a step.

    With α = 1 − σ its step x' = (σ'/σ)·x − α'(e^−h − 1)·D, h = λ' − λ, is x' = (σ'/σ)·x + (1 − σ'/σ)·D, because
    α'(1 − e^−h) = α' − ασ'/σ = 1 − σ'/σ. D is extrapolated by half a step in λ from the last two predictions:
    D + (D − D_last)·h / (2·h_last). At σ = 1 the paper's λ is −∞, so that h_last is infinite and the step after it is
    of first order; at σ' = 0 the result is D itself. ComfyUI's `dpmpp_2m` is the same rule along λ = −log σ, the time
    of models without α: see `MultistepTime`.
    """

    last: tuple[float, Tensor] | None = None
    """σ and D of the step before."""

    def step(self, i: int, x: Tensor, v: Tensor) -> Tensor:
        now, then = self.sigmas[i], self.sigmas[i + 1]
        if then == now:  # levels so close together that fp32 does not tell them apart
            return x
        D = predicted = x - now * v
        if then == 0:
            return D
        if self.last is not None:
            before, D_last = self.last
            h, h_last = self._time(then) - self._time(now), self._time(now) - self._time(before)
            predicted = D + (D - D_last) * (h / (2 * h_last))
        self.last = now, D
        return (then / now) * x + (1 - then / now) * predicted

    def _time(self, sigma: float) -> float:
        if self.multistep_time == "log_sigma":
            return -math.log(sigma)
        return math.log((1 - sigma) / sigma) if sigma < 1 else -math.inf


class UniPC(Solver):
    """UniPC of order 2 with its corrector (Zhao et al. 2023), by diffusers' `UniPCMultistepScheduler`.

    It takes our noise levels as they are, except that it moves a first σ of 1 to 1 − 1e-6, where its λ is finite; the
    transformer still sees 1.
    """

    def __init__(self, sigmas: Sequence[float], velocity: Velocity, multistep_time: MultistepTime = "half_log_snr"):
        super().__init__(sigmas, velocity, multistep_time)
        import numpy
        from diffusers import UniPCMultistepScheduler

        if "sigmas" not in inspect.signature(UniPCMultistepScheduler.set_timesteps).parameters:
            raise ConfigError(
                "The method 'unipc' needs a newer diffusers, whose UniPCMultistepScheduler takes noise levels. Run "
                "`pip install -U diffusers`, or choose another method."
            )
        if any(then >= now for now, then in pairwise(sigmas)):
            raise ConfigError(
                "The method 'unipc' needs noise levels that fall at every step, and some of these are equal. Take "
                "fewer steps, a smaller flow shift or tail bias, or another method."
            )
        self.scheduler = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=2, final_sigmas_type="zero"
        )
        # It ends every schedule with a 0 of its own. After a run that ends above 0 that step is never taken.
        levels = sigmas[:-1] if sigmas[-1] == 0 else sigmas
        self.scheduler.set_timesteps(sigmas=numpy.array(levels))  # type: ignore[arg-type]
        # Steps are counted: its look-up by whole-numbered times would confuse levels that lie close together.
        self.scheduler.set_begin_index(0)

    def step(self, i: int, x: Tensor, v: Tensor) -> Tensor:
        return self.scheduler.step(v, self.scheduler.timesteps[i], x, return_dict=False)[0]  # type: ignore[arg-type]


SOLVERS: dict[Method, type[Solver]] = {"euler": Euler, "heun": Heun, "dpmpp_2m": DPMSolverPP2M, "unipc": UniPC}
