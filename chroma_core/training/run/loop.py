"""The training step, in order: batch, sigma, predict, loss, backward, clip, step, log.

Every draw is a function of (seed, purpose, step, row), so a step can be repeated exactly, and splitting its batch for
gradient accumulation does not change what is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ...data.cache import LatentTextCache
from ...data.order import batches_per_epoch, epoch_batches, generator, integer, uniform
from ...data.samples import Sample
from ...lora.trainable import seed_dropout
from ...model.transformer import ChromaTransformer
from ...sampling.schedule import draw_sigmas
from ...sampling.text import TextCondition, zero_padded
from ..config import TrainingConfig
from ..distributed.world import ALONE, World, part_size
from ..step.objective import (
    add_noise,
    base_velocity,
    draw_noise,
    loss,
    pair_noise,
    predict_velocity,
    training_target,
    with_prior_targets,
)
from .preserve import Generated, preserved_captions
from .stepper import SkipReason, Stepper

Casting = Callable[[torch.dtype], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Batch:
    """The samples of one optimizer step: latents and noise [B, C, H, W], conditions, sigmas [B]; fp32 on the CPU.

    Only where the step needs them: mask [B, 1, H, W] of the loss, values 0..1; regularisation [B], True where the
    target is the model without its adapter; guidance [B], values of the guidance embedding. beside: what the step's
    second pass preserves, with as many rows (see `PreserveConfig`).
    """

    latents: Tensor
    conditions: list[TextCondition]
    noise: Tensor
    sigmas: Tensor
    mask: Tensor | None = None
    regularisation: Tensor | None = None
    guidance: Tensor | None = None
    beside: Batch | None = None

    def part(self, start: int, size: int) -> Batch:
        """Rows start … start+size−1."""
        rows = slice(start, start + size)
        return self._each(lambda value: value.part(start, size) if isinstance(value, Batch) else value[rows])

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on a device; conditions are moved where they are used."""
        return self._each(lambda value: value.to(device) if isinstance(value, Tensor | Batch) else value)

    def _each(self, change: Callable[[Any], Any]) -> Batch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: change(value) for name, value in values.items() if value is not None})

    def __len__(self) -> int:
        return len(self.conditions)


@dataclass(frozen=True)
class StepResult:
    """What one step found. `skipped`: why the weights were left as they were, "" if they were not (see `stepper`).

    preserved: the loss of the second pass, with its weight; None without one.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    sigma_mean: float
    skipped: SkipReason
    preserved: float | None = None


class Batches:
    """The batch of every step, made from cached samples; `generated` are what the base made of the preserved prompts.

    With the text padding `unmodified` the cache has to be one whose text states keep their padding (see
    `text.TextEncoder.with_padding`).
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        cache: LatentTextCache,
        config: TrainingConfig,
        generated: Sequence[Generated] = (),
    ):
        self.samples, self.cache, self.config, self.objective = samples, cache, config, config.objective
        self.generated = generated
        self.buckets = [sample.bucket for sample in samples]
        self.per_epoch = batches_per_epoch(self.buckets, config.effective_batch)
        self.sigma_settings = config.objective.sigmas()
        self._epoch: tuple[int, list[list[int]]] = (-1, [])
        self._ahead: tuple[int, Batch] | None = None

    def indices(self, step: int) -> list[int]:
        """Which samples step `step` (0-based) uses."""
        epoch, position = divmod(step, self.per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = epoch, epoch_batches(self.buckets, self.config.effective_batch, self.config.seed, epoch)
        return self._epoch[1][position]

    def __getitem__(self, step: int) -> Batch:
        """The batch of step `step` (0-based). Raises DataError when a cached file is gone."""
        ahead, self._ahead = self._ahead, None
        return ahead[1] if ahead is not None and ahead[0] == step else self._read(step)

    def read_ahead(self, step: int) -> None:
        """Read the batch of a step to come while the device is busy. What goes wrong is told when it is asked for."""
        with suppress(Exception):
            self._ahead = step, self._read(step)

    def _read(self, step: int) -> Batch:
        seed, objective = self.config.seed, self.objective
        samples = [self.samples[index] for index in self.indices(step)]
        rows, captions, draws, masks = [], [], [], []
        for row, sample in enumerate(samples):
            use = sample.use(generator(seed, "caption", step, row))
            rows.append(self.cache.latents(use.latents))
            masks.append(None if use.mask is None else self.cache.mask(use.mask))
            captions.append(use.caption)
            draws.append(draw_noise(rows[-1].shape, seed, step, row, objective.noise_offset))
        latents, noise = torch.stack(rows), torch.stack(draws)
        if objective.pair_noise:
            noise = pair_noise(latents, noise)
        height, width = latents.shape[-2:]
        bias = [sample.sigma_bias for sample in samples]
        sigmas = draw_sigmas(
            len(samples),
            self.sigma_settings,
            generator(seed, "sigma", step),
            height * width // 4,
            bias if any(bias) else None,
        )
        mask = None
        if any(values is not None for values in masks):
            mask = torch.stack([torch.ones(1, height, width) if values is None else values for values in masks])
        regularisation = torch.tensor([sample.regularisation for sample in samples])
        batch = Batch(
            latents,
            self._conditions(captions),
            noise,
            sigmas,
            mask,
            regularisation if regularisation.any() else None,
            self._guidance(step, len(samples)),
        )
        return replace(batch, beside=self._beside(step, batch, captions))

    def _conditions(self, captions: Sequence[str]) -> list[TextCondition]:
        found = [self.cache.text(caption) for caption in captions]
        return [zero_padded(condition) for condition in found] if self.objective.text_padding == "zero" else found

    def _beside(self, step: int, batch: Batch, captions: Sequence[str]) -> Batch | None:
        """What the second pass of a step with that batch is made on."""
        kind, seed, rows = self.config.preserve.turn(step), self.config.seed, len(captions)
        if kind is None:
            return None
        random = generator(seed, "preserve", step)
        if kind == "prompts" and self.generated:
            chosen = [self.generated[integer(len(self.generated), random)] for _ in captions]
            latents = torch.stack([self.cache.latents(one.latents) for one in chosen])
            offset = self.objective.noise_offset
            noise = torch.stack([draw_noise(latents.shape[1:], seed, step, rows + i, offset) for i in range(rows)])
            tokens = latents.shape[-2] * latents.shape[-1] // 4
            sigmas = draw_sigmas(rows, self.sigma_settings, generator(seed, "preserve sigma", step), tokens)
            conditions = self._conditions([one.prompt for one in chosen])
            return Batch(latents, conditions, noise, sigmas, guidance=batch.guidance)
        choices = [preserved_captions(kind, caption, self.config) for caption in captions]
        conditions = self._conditions([texts[integer(len(texts), random)] for texts in choices])
        return Batch(batch.latents, conditions, batch.noise, batch.sigmas, guidance=batch.guidance)

    def _guidance(self, step: int, size: int) -> Tensor | None:
        """The guidance embedding's values [B] of a step; None leaves it at 0."""
        if self.objective.guidance == "none":
            return None
        low, high = self.objective.guidance_range
        if self.objective.guidance == "constant":
            return torch.full((size,), low)
        seed = self.config.seed
        return torch.tensor(
            [low + (high - low) * uniform(generator(seed, "guidance", step, row)) for row in range(size)]
        )


def train_step(
    step: int,
    transformer: ChromaTransformer,
    stepper: Stepper,
    batches: Batches,
    config: TrainingConfig,
    world: World = ALONE,
    between: Callable[[], None] = lambda: None,
    casting: Casting = nullcontext,
) -> StepResult:
    """One optimizer step (`step` 0-based) over `config.effective_batch` samples, `config.batch_size` at a time.

    In a distributed run each rank computes its share of the samples, and all take the same step. `between` is called
    between the parts; it may wait or raise, and the step has then changed nothing. Each part runs inside `casting`, see
    `Trained.casting`.
    """
    device, dtype = transformer.x_embedder.weight.device, transformer.x_embedder.weight.dtype
    dropping = config.full is None and config.lora.dropout > 0
    batch, objective, kind = batches[step], batches.objective, config.preserve.turn(step)
    size = part_size(config.batch_size, config.effective_batch, world.size)
    with _training_mode(transformer, dropping):
        for start, counts in world.starts(len(batch), size):
            if start:
                between()
            part = batch.part(start, size).to(device)
            if dropping:
                seed_dropout(transformer, generator(config.seed, "dropout", step, start).initial_seed())
            x = add_noise(part.latents, part.noise, part.sigmas)
            target, weight = training_target(part.latents, part.noise), None
            inputs = (transformer, x, part.sigmas, part.conditions, part.guidance)
            if part.regularisation is not None:
                target = with_prior_targets(target, part.regularisation, *inputs, everywhere=world.sharded)
                weight = torch.where(part.regularisation, objective.prior_weight, 1.0)
            with casting(dtype):
                velocity = predict_velocity(*inputs)
                part_loss = loss(velocity, target, objective.loss, objective.huber_delta, part.mask, weight)
                share = len(part) / len(batch) if counts else 0.0
                stepper.backward(part_loss * share)
            if kind is not None and part.beside is not None:
                between()
                beside = part.beside
                x = add_noise(beside.latents, beside.noise, beside.sigmas)
                inputs = (transformer, x, beside.sigmas, beside.conditions, beside.guidance)
                target = base_velocity(*inputs)
                with casting(dtype):
                    kept = loss(predict_velocity(*inputs), target, objective.loss, objective.huber_delta)
                    stepper.backward(kept * share * config.preserve.weights[kind], beside=True)

    if step + 1 < config.steps:
        batches.read_ahead(step + 1)
    # Collectives come before the step: a rank that is lost leaves the weights of whole steps behind.
    stepper.combine(world)
    learning_rate = config.schedule().at(step)
    sigma_mean = float(batch.sigmas.mean())
    norm, _ = stepper.apply(learning_rate, config.max_grad_norm)
    # Nothing that can fail comes after it: an error would have the step taken twice.
    preserved = None if kind is None else stepper.beside
    return StepResult(stepper.loss, norm, learning_rate, sigma_mean, stepper.skip_reason, preserved)


@contextmanager
def _training_mode(transformer: ChromaTransformer, needed: bool) -> Iterator[None]:
    """Training mode inside a `with` block, where `needed`: dropout alone tells it from anything else."""
    if needed:
        transformer.train()
    try:
        yield
    finally:
        if needed:
            transformer.eval()
