"""Learning-rate schedules, the rate as a pure function of the step, and the optimizers.

Each optimizer comes from its library, which is imported when it is chosen: none of them is needed to install.

`docs/optimizers.md` compares them. AdamW is torch's. Adafactor is transformers', not torch's: torch's multiplies every
step by the size of the parameter and cannot be told not to, so LoRA's `up`, which starts at zero, would learn a
thousand times too slowly. transformers' runs with `scale_parameter` and `relative_step` off, as its documentation
advises for a rate given from outside, which then means what AdamW's means.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch.nn import Parameter

from ...errors import ConfigError, check_choice
from ...model.device import is_out_of_memory

LrSchedule = Literal["constant", "cosine", "linear", "restarts", "polynomial"]


@dataclass(frozen=True)
class Schedule:
    """`warmup_steps` of linear rise to `learning_rate`, then the curve `kind` over the rest of `steps`.

    With p running from 0 (end of the warm-up) to 1 (after the last step), the rate is multiplied by

    - constant: 1
    - linear: 1 − p
    - cosine: (1 + cos πp) / 2 (Loshchilov & Hutter 2017, SGDR, without restarts)
    - restarts: the same, starting again `cycles` times at equal distances (SGDR with T_mult = 1)
    - polynomial: (1 − p)^`power`

    All but constant reach 0 just after the last step, so no step has the rate 0.
    Raises ConfigError for a name or number that cannot work.
    """

    kind: LrSchedule = "constant"
    learning_rate: float = 2e-4
    steps: int = 1000
    warmup_steps: int = 0
    cycles: int = 1
    power: float = 2.0

    def __post_init__(self) -> None:
        check_choice("lr_schedule", self.kind, get_args(LrSchedule))
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ConfigError(f"The learning rate is {self.learning_rate}; it must be above 0 (2e-4 is usual).")
        if self.warmup_steps < 0:
            raise ConfigError(f"warmup_steps is {self.warmup_steps}; it must be 0 (no warm-up) or more.")
        if self.cycles < 1:
            raise ConfigError(f"lr_cycles is {self.cycles}; it must be at least 1 (a cosine without restarts).")
        if not (math.isfinite(self.power) and self.power > 0):
            raise ConfigError(f"lr_power is {self.power}; it must be above 0 (1 is linear, 2 is usual).")

    def at(self, step: int) -> float:
        """The rate of step `step` (0-based)."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        return self.learning_rate * self._factor(step - self.warmup_steps, max(1, self.steps - self.warmup_steps))

    def _factor(self, done: int, whole: int) -> float:
        progress = done / whole
        if self.kind == "linear":
            return 1 - progress
        if self.kind == "cosine":
            return (1 + math.cos(math.pi * progress)) / 2
        if self.kind == "restarts":
            # In whole numbers: a restart must not come a step late because a fraction was rounded down.
            return (1 + math.cos(math.pi * (done * self.cycles % whole) / whole)) / 2
        if self.kind == "polynomial":
            return max(0.0, 1 - progress) ** self.power
        return 1.0


OptimizerName = Literal["adamw", "adamw8bit", "adafactor", "prodigy", "schedule-free", "came"]

_BETAS = (0.9, 0.999)


@dataclass(frozen=True)
class _Library:
    """Where an optimizer comes from: pip package, module, class, and what to choose where it cannot be had."""

    package: str
    module: str
    name: str
    instead: str


_LIBRARIES = {
    "adamw8bit": _Library("bitsandbytes", "bitsandbytes.optim", "AdamW8bit", "adamw, or adafactor to save memory"),
    "adafactor": _Library("transformers", "transformers.optimization", "Adafactor", "adamw"),
    "prodigy": _Library("prodigyopt", "prodigyopt", "Prodigy", "adamw with a learning rate of 1e-4"),
    "schedule-free": _Library("schedulefree", "schedulefree", "AdamWScheduleFree", "adamw with lr_schedule 'cosine'"),
    "came": _Library("came-pytorch", "came_pytorch", "CAME", "adafactor"),
}


@dataclass(frozen=True)
class OptimizerSettings:
    """Which optimizer, and its numbers.

    learning_rate > 0; Prodigy's is a factor on the rate that it finds, 0.1 to 10, normally 1.
    betas: decay of the running means of gradient and squared gradient, each in [0, 1). Adafactor uses neither.
    weight_decay ≥ 0: decoupled (a step also shrinks each matrix by rate · weight_decay); vectors are left out of it.
    compute_dtype: what the model computes in; fp16 turns loss scaling on. The parameters themselves are fp32.
    Raises ConfigError for a name or number that cannot work.
    """

    name: OptimizerName = "adamw"
    learning_rate: float = 2e-4
    betas: tuple[float, float] = _BETAS
    weight_decay: float = 0.01
    compute_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        check_choice("The optimizer", self.name, get_args(OptimizerName))
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ConfigError(f"The learning rate is {self.learning_rate}; it must be above 0 (2e-4 is usual).")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ConfigError(f"The weight decay is {self.weight_decay}; it must be 0 (none) or more (0.01 is usual).")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas is {self.betas}; it takes two numbers from 0 to below 1, usually 0.9 and 0.999.")
        if self.name == "prodigy" and not 0.1 <= self.learning_rate <= 10:
            raise ConfigError(
                f"Prodigy finds the learning rate by itself and multiplies it by learning_rate, which is "
                f"{self.learning_rate:g}; it must be from 0.1 to 10, and its authors advise 1. Set learning_rate = 1."
            )
        if self.name == "adafactor" and tuple(self.betas) != _BETAS:
            raise ConfigError(
                f"betas is {self.betas}, but Adafactor keeps no running mean of the gradient and derives the other "
                "from the step. Leave betas out, or choose adamw."
            )
        if self.name == "schedule-free" and self.betas[0] == 0:
            raise ConfigError("Schedule-free AdamW averages with betas[0], which is 0; choose 0.9, or 0.95 to 0.98.")


def check_schedule(optimizer: OptimizerName, schedule: LrSchedule) -> None:
    """Raise ConfigError where an optimizer's authors advise against a schedule.

    Schedule-free replaces the schedule by averaging; warm-up is advised (schedulefree's README). Prodigy: none or a
    decay to the end, no restarts (prodigyopt's README); warm-up is safe, because `safeguard_warmup` is on.
    """
    if optimizer == "schedule-free" and schedule != "constant":
        raise ConfigError(
            f"The schedule-free optimizer takes the place of a schedule, but lr_schedule is '{schedule}'. "
            "Set lr_schedule = 'constant' (warmup_steps may stay), or choose adamw."
        )
    if optimizer == "prodigy" and schedule == "restarts":
        raise ConfigError(
            "Prodigy's authors advise against restarts, because its estimate of the rate never falls. Choose "
            "lr_schedule 'constant' or 'cosine', or another optimizer."
        )


def check_optimizer(settings: OptimizerSettings, device: torch.device | str) -> None:
    """Try the optimizer on that device with a small matrix, before anything large is loaded.

    Raises ConfigError when its library is missing, broken, or cannot work there.
    """
    if settings.name == "adamw":
        return
    library = _LIBRARIES[settings.name]
    _optimizer_class(settings.name)
    reason = None
    if settings.name == "adamw8bit":
        from ...model.backends.bitsandbytes import refusal

        reason = refusal(torch.device(device))
    if reason is None:
        try:
            with torch.inference_mode(False), torch.no_grad():
                matrix = Parameter(torch.ones(64, 64, device=device))  # the smallest that is kept in 8 bits
                optimizer = build_optimizer([matrix], settings)
                matrix.grad = torch.full_like(matrix, 0.5)
                optimizer.step()
                moved = (matrix < 1).all() and matrix.isfinite().all()
            reason = None if moved else "a test matrix came out of a step wrong"
        except Exception as error:
            if is_out_of_memory(error):  # says nothing of the optimizer
                raise
            reason = f"{type(error).__name__}: {error}"
    if reason is not None:
        raise ConfigError(
            f"The optimizer '{settings.name}' cannot be used on the device '{device}': {library.package} cannot work "
            f"there ({reason}). Choose {library.instead}."
        )


def build_optimizer(
    parameters: Sequence[Parameter], settings: OptimizerSettings, factors: Sequence[float] | None = None
) -> Any:
    """The optimizer over fp32 parameters, ready to step; all of a group have the same of `factors`, one a parameter.

    Raises ConfigError when its library is missing.
    """
    groups = _groups(parameters, settings.weight_decay, factors or [1.0] * len(parameters))
    lr, betas = settings.learning_rate, settings.betas
    if settings.name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=betas, weight_decay=settings.weight_decay)
    make = _optimizer_class(settings.name)
    # Weight decay stands in the groups; said again as an argument, Prodigy would print a line about it.
    if settings.name == "adafactor":
        return make(groups, lr=lr, scale_parameter=False, relative_step=False)
    if settings.name == "prodigy":  # both options: what prodigyopt's README advises for diffusion models
        return make(groups, lr=lr, betas=betas, safeguard_warmup=True, use_bias_correction=True)
    if settings.name == "came":  # the third: the authors' value, for the mean of the instability
        return make(groups, lr=lr, betas=(*betas, 0.9999))
    optimizer = make(groups, lr=lr, betas=betas)
    if settings.name == "schedule-free":
        optimizer.train()
    return optimizer


def _groups(parameters: Sequence[Parameter], weight_decay: float, factors: Sequence[float]) -> list[dict[str, Any]]:
    """Matrices decay; vectors (DoRA magnitudes, biases, norms) do not, since zero is nothing they should go back to."""
    groups: list[dict[str, Any]] = []
    for factor in dict.fromkeys(factors):
        own = [parameter for parameter, its in zip(parameters, factors, strict=True) if its == factor]
        groups.append({"params": [p for p in own if p.ndim >= 2], "weight_decay": weight_decay})
        groups.append({"params": [p for p in own if p.ndim < 2], "weight_decay": 0.0})
    return [group for group in groups if group["params"]]


def _optimizer_class(name: str) -> Any:
    """The library's class; ConfigError, naming the package, when it is missing or broken."""
    library = _LIBRARIES[name]
    try:
        if name == "adamw8bit":
            # Keeps the import from fetching anything.
            importlib.import_module("...model.backends.bitsandbytes", __package__)
        return getattr(importlib.import_module(library.module), library.name)
    except Exception as error:  # a library built for another torch fails with whatever it likes
        missing = isinstance(error, ImportError)
        raise ConfigError(
            f"The optimizer '{name}' needs the package {library.package}, which "
            f"{'is not installed here' if missing else 'cannot be imported'} ({type(error).__name__}: {error}). "
            f"Install it with `pip install {library.package}`, or choose {library.instead}."
        ) from error
