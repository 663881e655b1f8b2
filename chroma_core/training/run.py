"""One job from its configuration to its LoRA: prepare, load, resume, train, finish.

`Run.train` is a loop over steps; before each one it does what is due there (held-out loss, previews, checkpoint) and
what was asked for (sample, save, pause, stop). Killed at any point, a new run on the same folder continues from the
newest checkpoint and ends with the same weights, bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..data.samples import fingerprint, picture_count
from ..errors import ChromaKitError
from ..files import remove_leftovers
from ..loading.components import load_transformer
from ..lora.adapters import adapters_disabled, add_trainable
from .checkpoint import Progress, restore_latest, save_checkpoint
from .config import TrainingConfig
from .control import Control, Halted, Stopped
from .finish import lora_metadata, write_final
from .loop import Batches, StepResult, train_step
from .metrics import MetricsLog
from .objective import heldout_loss
from .optim import learning_rate_at, make_optimizer
from .places import Places
from .prepare import Device, Prepared, prepare, release_memory
from .preview import render_previews

MAX_SKIPPED_IN_A_ROW = 10
SMOOTHING = 0.98
"""Weight of the past in the smoothed loss: about the last 50 steps."""

Report = Callable[..., None]
"""report(**fields): tell the job's status about something new."""


class Diverged(ChromaKitError):
    """Loss or gradients stayed infinite or undefined."""


class Run:
    """A job that is being worked on. Build and use it outside inference mode, in one thread."""

    def __init__(
        self,
        config: TrainingConfig,
        places: Places,
        device: Device,
        control: Control,
        report: Report,
        before_load: Callable[[], None] = lambda: None,
    ):
        self.config, self.places, self.device, self.control, self.report = config, places, device, control, report
        self.metrics = MetricsLog(places.job / "metrics.jsonl")
        self.progress = Progress()
        for folder in (places.job, places.samples):
            remove_leftovers(folder)
        report(state="preparing", message="reading the data set")
        self.data: Prepared = prepare(config, places.cache, device, control.gate, self._report_caching, before_load)
        report(message="loading the transformer", warnings=self.data.warnings, base_sha256=self.data.base_sha256)
        before_load()
        self.transformer = load_transformer(config.model, device)
        self.parameters = add_trainable(self.transformer, config.lora.settings(), config.seed)
        if config.gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
        self.optimizer = make_optimizer(self.parameters, config)
        self.batches = Batches(self.data.samples, self.data.cache, config)
        self._resume()

    def _resume(self) -> None:
        """Continue from the newest checkpoint, or start afresh."""
        warnings = list(self.data.warnings)
        data = fingerprint(self.data.samples)
        progress, damaged = restore_latest(self.places.checkpoints, self.transformer, self.parameters, self.optimizer)
        if damaged:
            warnings.append(f"Damaged checkpoints were set aside: {', '.join(damaged)}.")
        if progress is not None and progress.data != data:
            warnings.append(
                f"The data set changed since step {progress.step}: training goes on with what is there now, so the "
                "result differs from an uninterrupted run's."
            )
        self.progress = progress or Progress()
        self.progress.data = data
        self.metrics.truncate(self.progress.metrics_bytes)
        self.report(warnings=warnings, **self._numbers())

    def train(self) -> None:
        """Train to the last step.

        Raises:
            Stopped, Halted: on request; `save` keeps what there is.
            Diverged: after ten skipped steps in a row.
        """
        config, progress = self.config, self.progress
        self.report(state="running", message="")
        while True:
            self._do_what_is_due()
            if progress.step >= config.steps:
                return
            self.control.gate(self._do_what_was_asked)
            started = time.perf_counter()
            result = train_step(progress.step, self.transformer, self.parameters, self.optimizer, self.batches, config)
            self._count(result, time.perf_counter() - started)

    def _count(self, result: StepResult, seconds: float) -> None:
        """Write one step down."""
        progress = self.progress
        progress.step += 1
        progress.train_seconds += seconds
        if result.skipped:
            progress.skipped_steps += 1
            progress.skipped_in_a_row += 1
            self.metrics.append(step=progress.step, skipped=True, lr=result.learning_rate)
            self.report(**self._numbers(), skipped_steps=progress.skipped_steps)
            if progress.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
                raise Diverged(
                    f"Training stopped at step {progress.step}: the loss or its gradient was not a finite number in "
                    f"{progress.skipped_in_a_row} steps in a row. The LoRA is that of the newest checkpoint. Lower "
                    f"the learning rate (now {self.config.learning_rate:g}; 1e-4 is cautious), choose bf16 rather than "
                    "fp16, and look for damaged pictures."
                )
            return
        progress.skipped_in_a_row = 0
        # The mean of past losses, each weighed .98 times the next; the weight makes it right from the first step on.
        progress.loss_weight = SMOOTHING * progress.loss_weight + (1 - SMOOTHING)
        past = progress.loss_smooth if progress.loss_smooth is not None else 0.0
        share = (1 - SMOOTHING) / progress.loss_weight
        progress.loss_smooth = past + share * (result.loss - past)
        self.metrics.append(
            step=progress.step,
            loss=result.loss,
            loss_smooth=progress.loss_smooth,
            lr=result.learning_rate,
            grad_norm=result.grad_norm,
            sigma=result.sigma_mean,
            seconds=round(seconds, 4),
        )
        self.report(loss=result.loss, step_seconds_now=seconds, **self._numbers())

    def _do_what_is_due(self) -> None:
        """Held-out loss, previews and checkpoint of this step, each unless it was already done before a resume."""
        config, progress, step = self.config, self.progress, self.progress.step

        def due(every: int) -> bool:
            return step == 0 or step == config.steps or (every > 0 and step % every == 0)

        if due(config.validate_every) and progress.validated_at != step and self.data.heldout:
            self._validate()
        progress.validated_at = step if due(config.validate_every) else progress.validated_at
        previews = config.previews
        if previews.prompts and previews.every and due(previews.every) and progress.previewed_at != step:
            self.preview(self.control.gate)
            progress.previewed_at = step
        # In the middle of skipped steps the weights may be what is broken: keep the checkpoints from before.
        if due(config.checkpoint_every) and progress.saved_at != step and not progress.skipped_in_a_row:
            self.save()

    def _do_what_was_asked(self, device_is_free: bool) -> None:
        """Save-now and sample-now, also in the middle of a pause."""
        if self.control.save.is_set():
            self.save()
            self.control.save.clear()
        if device_is_free and self.control.sample.is_set():
            self.control.sample.clear()
            self.preview(lambda: self.control.gate(pausable=False))

    def _validate(self) -> None:
        pictures = [
            (self.data.cache.latents(sample.latents[0]), self.data.cache.text(sample.captions[0]))
            for sample in self.data.heldout
        ]
        progress = self.progress
        base: list[float] | None = None
        if progress.heldout_loss_base is None:
            with adapters_disabled(self.transformer):
                base = heldout_loss(self.transformer, pictures, self.control.gate)
            progress.heldout_loss_base = sum(base) / len(base)
            self.metrics.append(step=0, heldout_loss_base=progress.heldout_loss_base, heldout_by_sigma_base=base)
        by_sigma = base if progress.step == 0 else None  # before the first step the adapter adds nothing
        if by_sigma is None:
            by_sigma = heldout_loss(self.transformer, pictures, self.control.gate)
        progress.heldout_loss = sum(by_sigma) / len(by_sigma)
        self.metrics.append(step=progress.step, heldout_loss=progress.heldout_loss, heldout_by_sigma=by_sigma)
        self.report(**self._numbers())

    def preview(self, between: Callable[[], None]) -> None:
        """Sample the preview prompts with the LoRA as it is now."""
        names = render_previews(
            self.config,
            self.progress.step,
            self.places.samples,
            self.transformer,
            self.data.cache,
            {
                "job": self.config.job_id(),
                "lora": self.config.lora.model_dump(mode="json"),
                "base_sha256": self.data.base_sha256,
                "trigger": self.config.dataset.trigger,
            },
            between,
        )
        self.report(new_samples=names)

    def save(self) -> None:
        """Write a checkpoint of this step."""
        progress = self.progress
        progress.saved_at = progress.step
        progress.metrics_bytes = self.metrics.sync()
        save_checkpoint(
            self.places.checkpoints, progress, self.transformer, self.optimizer, self.config.keep_checkpoints
        )
        self.report(checkpoint=progress.step, **self._numbers())

    def keep_what_is_good(self) -> None:
        """Save a checkpoint, or go back to the newest one when the last steps could not be taken."""
        if self.progress.skipped_in_a_row:
            restored, _ = restore_latest(self.places.checkpoints, self.transformer, self.parameters, self.optimizer)
            self.progress = restored or self.progress
        else:
            self.save()

    def finish(self) -> Path:
        """Write the LoRA where the user looks for it; returns its path."""
        metadata = lora_metadata(self.config, self.progress, self.data.base_sha256, picture_count(self.data.samples))
        return write_final(self.config, self.transformer, metadata, self.places.job, self.places.loras)

    def close(self) -> None:
        """Give the memory back."""
        del self.transformer, self.parameters, self.optimizer, self.batches
        release_memory()

    def _report_caching(self, what: str, done: int, total: int) -> None:
        self.report(message=f"caching {what}: {done} of {total}" if total > 1 else f"reading the {what}")

    def _numbers(self) -> dict[str, Any]:
        progress = self.progress
        return {
            "step": progress.step,
            "loss_smooth": progress.loss_smooth,
            "lr": learning_rate_at(min(progress.step, self.config.steps - 1), self.config),
            "heldout_loss_base": progress.heldout_loss_base,
            "heldout_loss": progress.heldout_loss,
            "train_seconds": round(progress.train_seconds, 2),
        }


def run_training(
    config: TrainingConfig,
    places: Places,
    device: Device,
    control: Control,
    report: Report,
    before_load: Callable[[], None] = lambda: None,
) -> tuple[str, Path | None]:
    """Run a job to its end in this thread; returns the final state (completed or stopped) and the LoRA's path.

    Raises:
        Halted: after a checkpoint was saved.
        ChromaKitError: the job cannot go on; the newest checkpoint is kept.
    """
    with torch.inference_mode(False), torch.enable_grad():
        try:
            run = Run(config, places, device, control, report, before_load)
        except Stopped:
            return "stopped", None
        try:
            run.train()
            return "completed", run.finish()
        except Stopped:
            run.keep_what_is_good()
            return "stopped", run.finish()
        except Diverged:
            run.keep_what_is_good()
            report(lora_path=run.finish())
            raise
        except Halted:
            run.keep_what_is_good()
            raise
        finally:
            run.close()
