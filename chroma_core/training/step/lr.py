"""Learning-rate schedules: the rate as a pure function of the step, so that there is no state to save."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from ...errors import ConfigError, check_choice

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
