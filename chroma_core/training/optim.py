"""The optimizer and the learning rate, which is a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn import Parameter

from .config import TrainingConfig


def make_optimizer(parameters: Sequence[Parameter], config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) over the adapter's fp32 parameters."""
    return torch.optim.AdamW(list(parameters), lr=config.learning_rate, weight_decay=config.weight_decay)


def learning_rate_at(step: int, config: TrainingConfig) -> float:
    """The rate of step `step` (0-based): linear warm-up, then constant, or cosine or linear down to 0 at the end."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    factor = {
        "constant": 1.0,
        "linear": 1 - progress,
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
    }[config.lr_schedule]
    return config.learning_rate * factor
