"""From a loss to new weights: backward, unscale, clip, step; with everything that a bit-exact resume needs.

stepper.backward(loss)                          once for each part of the batch
norm, skipped = stepper.apply(rate, max_norm)   once a step

with stepper.as_trained():                      to sample, validate and save
    ...
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Parameter

from ...errors import ConfigError
from ..distributed.world import World
from ..step.optimizers import OptimizerSettings, build_optimizer, check_optimizer

SkipReason = Literal["", "overflow", "broken"]

OPTIONS = ("betas", "weight_decay")
"""What an optimizer's groups hold of the job's options, beside the rate, which every step sets."""


@dataclass
class LossScale:
    """The factor on the loss that keeps fp16 gradients above fp16's smallest number (6e-8).

    Micikevicius et al. 2018 (Mixed Precision Training), with the numbers of `torch.amp.GradScaler`: halved at an
    overflow, doubled after `patience` steps without one. Always a power of two, so that scaling rounds nothing; from 1
    to 2²⁴. It is our own because GradScaler knows neither every optimizer nor every device, and cannot tell an overflow
    from a broken loss.
    """

    scale: float = 2.0**16
    steps_without_overflow: int = 0
    patience: int = 2000

    def took_a_step(self) -> None:
        """Count a good step; grow when there were enough in a row."""
        self.steps_without_overflow += 1
        if self.steps_without_overflow >= self.patience:
            self.scale, self.steps_without_overflow = min(2 * self.scale, 2.0**24), 0

    def overflowed(self) -> None:
        """Back off."""
        self.scale, self.steps_without_overflow = max(self.scale / 2, 1.0), 0


class Stepper:
    """An optimizer over fp32 parameters, with loss scaling, clipping and the schedule-free pair of weights around it.

    `optimizer` is the library's; `loss` is the last step's, `beside` that of its second pass. `skip_reason` says why
    that step was skipped: `overflow` (fp16 gradients at this loss scale: lowered now, training is well) or `broken`
    (loss or gradient not a finite number); `overflows` counts the former. `torn` is set while weights change, so that
    after an error it says whether a step was taken in part.
    `factors`: on the learning rate of each parameter; None: 1.
    Raises ConfigError when the optimizer cannot be had or cannot work on the parameters' device.
    """

    def __init__(
        self, parameters: Sequence[Parameter], settings: OptimizerSettings, factors: Sequence[float] | None = None
    ):
        self.parameters, self.settings = list(parameters), settings
        check_optimizer(settings, self.parameters[0].device)
        self.optimizer: torch.optim.Optimizer = build_optimizer(self.parameters, settings, factors)
        self._factors = dict(zip(map(id, self.parameters), factors or [1.0] * len(self.parameters), strict=True))
        self.loss_scale = LossScale() if settings.compute_dtype == torch.float16 else None
        self.skip_reason: SkipReason = ""
        self.overflows = 0
        self.torn = False
        self.loss = self.beside = 0.0
        self._losses: list[Tensor] = []
        self._beside: list[Tensor] = []
        self._in_training: list[Tensor] | None = None  # set aside while the averaged weights are in place

    def backward(self, loss: Tensor, beside: bool = False) -> None:
        """Add the gradient of a part of the step's loss, a scalar; the parts sum to the step's loss.

        beside: it is minimised with the loss, and told apart from it.
        """
        (self._beside if beside else self._losses).append(loss.detach())
        (loss if self.loss_scale is None else loss * self.loss_scale.scale).backward()

    def combine(self, world: World) -> None:
        """Replace loss and gradient by their sums over the ranks; all of them then take the same step.

        Each adds the parts that it computed, perhaps none. Call it between the last `backward` and `apply`.
        """
        if world.size == 1:
            return
        here = [parameter.grad is not None for parameter in self.parameters]
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        device = self.parameters[0].device
        loss, beside = (sum(found, torch.zeros((), device=device)).float() for found in (self._losses, self._beside))
        anywhere = torch.tensor(here, dtype=torch.float32, device=device)
        world.all_reduce(
            [*(parameter.grad for parameter in self.parameters if parameter.grad is not None), loss, beside, anywhere]
        )
        self._losses, self._beside = [loss], [beside]
        for parameter, count in zip(self.parameters, anywhere.tolist(), strict=True):
            if count == 0:  # as in one process: the optimizer passes over what has no gradient
                parameter.grad = None

    def apply(self, learning_rate: float, max_grad_norm: float) -> tuple[float, bool]:
        """Clip the gradient, take the step and forget the gradient.

        A step whose loss or gradient is not finite is skipped: weights and optimizer state stay as they were.

        Args:
            learning_rate: the rate of this step, before the parameters' factors.
            max_grad_norm: the largest 2-norm of the whole gradient; 0 for no limit.
        Returns:
            the norm before clipping, without the loss scale, and whether the step was skipped.
        """
        if self._in_training is not None:
            raise RuntimeError(
                "Stepper.apply was called inside as_trained(): the weights there are not those in training."
            )
        if self.loss_scale is not None:
            for parameter in self.parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(1 / self.loss_scale.scale)
        # An infinite limit still measures the norm. It and the loss are read together: reading waits for the device.
        measured = torch.nn.utils.clip_grad_norm_(self.parameters, max_grad_norm or math.inf)
        found = torch.stack([value.float() for value in (measured, *self._losses, *self._beside)]).tolist()
        norm, ends = found[0], 1 + len(self._losses)
        self.loss, self.beside = sum(found[1:ends]), sum(found[ends:])
        self.skip_reason = self._reason_to_skip(norm)
        if not self.skip_reason:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate * self._factors[id(group["params"][0])]
            self.torn = True
            self.optimizer.step()
            self.torn = False
            if self.loss_scale is not None:
                self.loss_scale.took_a_step()
        elif self.skip_reason == "overflow" and self.loss_scale is not None:
            self.loss_scale.overflowed()
            self.overflows += 1
        self.forget()
        return norm, bool(self.skip_reason)

    def forget(self) -> None:
        """Drop the gradient and loss of the parts so far, as if the step had not begun."""
        # Not by the optimizer, whose own way takes memory: it must not fail, for the step is taken.
        for parameter in self.parameters:
            parameter.grad = None
        self._losses, self._beside = [], []

    def _reason_to_skip(self, norm: float) -> SkipReason:
        if not math.isfinite(self.loss + self.beside):
            return "broken"  # before any scaling: a smaller scale would not help
        if math.isfinite(norm):
            return ""
        return "overflow" if self.loss_scale is not None and self.loss_scale.scale > 1 else "broken"

    @contextmanager
    def as_trained(self) -> Iterator[None]:
        """The weights to sample, validate and save, inside a `with` block.

        Schedule-free AdamW computes gradients at other weights than those that it recommends (Defazio et al. 2024);
        they are put back afterwards, bit for bit. With all other optimizers nothing changes. It may be nested.
        """
        if self.settings.name != "schedule-free" or self._in_training is not None:
            yield
            return
        optimizer: Any = self.optimizer
        self._in_training = [parameter.detach().clone() for parameter in self.parameters]
        try:
            optimizer.eval()
            yield
        finally:
            self._put(self._in_training)
            self._in_training = None

    def follow(self) -> None:
        """Take what the optimizer remembers to where its parameters are now. Its counters stay in RAM, where they are
        read."""
        for parameter, remembered in self.optimizer.state.items():
            for name, value in remembered.items():
                if isinstance(value, Tensor) and value.dim():
                    remembered[name] = value.to(parameter.device)

    def tensors(self) -> list[Tensor]:
        """What there is beside the parameters: gradients, and what the optimizer remembers."""
        gradients = [parameter.grad for parameter in self.parameters]
        remembered = [value for values in self.optimizer.state.values() for value in values.values()]
        return [each for each in (*gradients, *remembered) if isinstance(each, Tensor)]

    def _put(self, weights: Sequence[Tensor]) -> None:
        """Give the parameters the weights to train on, and tell the schedule-free optimizer that these are they."""
        with torch.no_grad():
            for parameter, weight in zip(self.parameters, weights, strict=True):
                parameter.copy_(weight)
        for group in self.optimizer.param_groups:
            group["train_mode"] = True

    def state_dict(self) -> dict[str, Any]:
        """All state beside the weights of `as_trained`; loads with `torch.load(weights_only=True)`.

        Schedule-free AdamW's own training weights are part of it: they cannot be had from the averaged ones exactly.
        """
        state: dict[str, Any] = {"name": self.settings.name, "optimizer": self.optimizer.state_dict()}
        if self.loss_scale is not None:
            state["loss_scale"] = {**asdict(self.loss_scale), "overflows": self.overflows}
        if self.settings.name == "schedule-free":
            weights = self._in_training or self.parameters
            state["in_training"] = [weight.detach().clone() for weight in weights]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`. Load the weights first: the schedule-free optimizer then replaces them by its own.

        The bare state of an AdamW, as older checkpoints have it, is taken too.
        Raises ConfigError when it is another optimizer's.
        """
        if "param_groups" in state:
            state = {"name": "adamw", "optimizer": state}
        saved = state.get("name")
        if saved != self.settings.name:
            raise ConfigError(
                f"The checkpoint's optimizer is {saved}, the job's is {self.settings.name}. Continue with {saved}, or "
                "start a new job from the LoRA."
            )
        # The job's options, not the checkpoint's, which were others when they were changed by force.
        options = [{key: group[key] for key in OPTIONS if key in group} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, chosen in zip(self.optimizer.param_groups, options, strict=True):
            group.update(chosen)
        scale = dict(state.get("loss_scale", {}))
        if self.loss_scale is not None and scale:
            self.overflows = scale.pop("overflows")
            self.loss_scale = LossScale(**scale)
        if "in_training" in state:
            self._put(state["in_training"])
