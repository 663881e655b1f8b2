"""An exponential moving average of the weights in training, kept in fp32 beside them.

Source of the warm-up: TensorFlow's `ExponentialMovingAverage(num_updates=…)`, which diffusers and most trainers follow:
early steps, when the weights still travel, are forgotten sooner.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError


class Ema:
    """The average of `parameters`: average ← d · average + (1 − d) · weight, from the weights at the start on.

    decay: in [0, 1). Step t (0 is the first) uses d = min(decay, (1 + t) / (10 + t)), a function of the step alone.
    The averages are on the parameters' devices. Raises ConfigError for a decay out of range or no parameters.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float):
        if not 0 <= decay < 1:
            raise ConfigError(f"The EMA decay is {decay}; it must be at least 0 and below 1 (0.99 to 0.9999 is usual).")
        if not parameters:
            raise ConfigError("There is nothing to average: no parameters are trained.")
        self.decay = decay
        self._parameters = list(parameters)
        with torch.inference_mode(False):
            self._averages = [_fp32_copy(parameter) for parameter in self._parameters]
        self._swapped = False

    def update(self, step: int) -> None:
        """Take in the weights after step `step` (0 is the first)."""
        self._check_not_swapped("updated")
        new = 1 - min(self.decay, (1 + step) / (10 + step))
        with torch.no_grad():
            for average, parameter in zip(self._averages, self._parameters, strict=True):
                average.lerp_(parameter.detach().float(), new)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Inside this `with` block the parameters are the averages; afterwards, whatever happens, what they were."""
        self._check_not_swapped("swapped in again")
        raw = [parameter.detach().clone() for parameter in self._parameters]
        self._swapped = True
        try:
            _assign(self._parameters, self._averages)
            yield
        finally:
            _assign(self._parameters, raw)
            self._swapped = False

    def state_dict(self) -> dict[str, Any]:
        """The averages, as copies, and the decay; loads with `weights_only=True`."""
        return {"decay": self.decay, "averages": [average.clone() for average in self._averages]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue bit for bit from a state. Raises ConfigError, changing nothing, when it is of other weights."""
        self._check_not_swapped("loaded")
        averages = state["averages"]
        if state["decay"] != self.decay or [a.shape for a in averages] != [a.shape for a in self._averages]:
            raise ConfigError(
                f"The saved EMA is of {len(averages)} weights with decay {state['decay']}, in training are "
                f"{len(self._averages)} with decay {self.decay}, or their shapes differ. Continue with the settings "
                "that it was started with."
            )
        with torch.no_grad():
            for average, saved in zip(self._averages, averages, strict=True):
                average.copy_(saved)

    def follow(self) -> None:
        """Take the averages to where the parameters are now: a parked model's LoRA moves to host memory and back."""
        self._averages = [
            average.to(parameter.device) for average, parameter in zip(self._averages, self._parameters, strict=True)
        ]

    def tensors(self) -> list[Tensor]:
        """The averages themselves."""
        return list(self._averages)

    def _check_not_swapped(self, action: str) -> None:
        if self._swapped:
            raise RuntimeError(f"The EMA cannot be {action} while it stands in the place of the weights.")


def _assign(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)


def _fp32_copy(parameter: Tensor) -> Tensor:
    return parameter.detach().to(torch.float32, copy=True)
