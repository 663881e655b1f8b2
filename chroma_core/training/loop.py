"""The training step, in order: batch, sigma, predict, loss, backward, clip, step, log.

Every draw is a function of (seed, purpose, step, row), so a step can be repeated exactly, and splitting its batch for
gradient accumulation does not change what is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from ..data.cache import LatentTextCache
from ..data.order import batches_per_epoch, epoch_batches
from ..data.randomness import generator
from ..data.samples import Sample
from ..lora.adapters import seed_dropout
from ..schedule import draw_sigmas
from ..text import TextCondition
from ..transformer import ChromaTransformer
from .config import TrainingConfig
from .objective import add_noise, loss, predict_velocity, training_target
from .optim import learning_rate_at


@dataclass(frozen=True)
class Batch:
    """The samples of one optimizer step: latents and noise [B, C, H, W], conditions, sigmas [B]; fp32 on the CPU."""

    latents: Tensor
    conditions: list[TextCondition]
    noise: Tensor
    sigmas: Tensor

    def part(self, start: int, size: int) -> Batch:
        """Rows start … start+size−1."""
        rows = slice(start, start + size)
        return Batch(self.latents[rows], self.conditions[rows], self.noise[rows], self.sigmas[rows])

    def __len__(self) -> int:
        return len(self.conditions)


@dataclass(frozen=True)
class StepResult:
    """What one step found. `skipped`: loss or gradient was not finite and the weights were left as they were."""

    loss: float
    grad_norm: float
    learning_rate: float
    sigma_mean: float
    skipped: bool


class Batches:
    """The batch of every step, made from cached samples."""

    def __init__(self, samples: Sequence[Sample], cache: LatentTextCache, config: TrainingConfig):
        self.samples, self.cache, self.config = samples, cache, config
        self.buckets = [sample.bucket for sample in samples]
        self.per_epoch = batches_per_epoch(self.buckets, config.effective_batch)
        self.sigma_settings = config.objective.sigmas()
        self._epoch: tuple[int, list[list[int]]] = (-1, [])

    def indices(self, step: int) -> list[int]:
        """Which samples step `step` (0-based) uses."""
        epoch, position = divmod(step, self.per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = epoch, epoch_batches(self.buckets, self.config.effective_batch, self.config.seed, epoch)
        return self._epoch[1][position]

    def __getitem__(self, step: int) -> Batch:
        """The batch of step `step` (0-based). Raises DataError when a cached file is gone."""
        seed = self.config.seed
        latents, conditions, noise = [], [], []
        for row, index in enumerate(self.indices(step)):
            path, caption = self.samples[index].pick(generator(seed, "caption", step, row))
            x0 = self.cache.latents(path)
            latents.append(x0)
            conditions.append(self.cache.text(caption))
            noise.append(torch.randn(x0.shape, generator=generator(seed, "noise", step, row)))
        height, width = latents[0].shape[-2:]
        sigmas = draw_sigmas(len(latents), self.sigma_settings, generator(seed, "sigma", step), height * width // 4)
        return Batch(torch.stack(latents), conditions, torch.stack(noise), sigmas)


def train_step(
    step: int,
    transformer: ChromaTransformer,
    parameters: Sequence[Parameter],
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    config: TrainingConfig,
) -> StepResult:
    """One optimizer step (`step` 0-based) over `config.effective_batch` samples, `config.batch_size` at a time."""
    device = transformer.x_embedder.weight.device
    batch = batches[step]
    total = 0.0
    transformer.train()
    for start in range(0, len(batch), config.batch_size):
        part = batch.part(start, config.batch_size)
        seed_dropout(transformer, generator(config.seed, "dropout", step, start).initial_seed())
        x0, noise, sigmas = part.latents.to(device), part.noise.to(device), part.sigmas.to(device)
        velocity = predict_velocity(transformer, add_noise(x0, noise, sigmas), sigmas, part.conditions)
        part_loss = loss(velocity, training_target(x0, noise)) * (len(part) / len(batch))
        part_loss.backward()
        total += part_loss.item()
    transformer.eval()

    # An infinite limit still measures the norm.
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm or math.inf))
    learning_rate = learning_rate_at(step, config)
    skipped = not (math.isfinite(total) and math.isfinite(norm))
    if not skipped:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepResult(total, norm, learning_rate, float(batch.sigmas.mean()), skipped)
