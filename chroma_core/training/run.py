"""One job from its configuration to its LoRA: prepare, load, resume, train, finish.

`Run.train` is a loop over steps; before each one it does what is due there (held-out loss, previews, checkpoint) and
what was asked for (sample, save, pause, stop). Killed at any point, a new run on the same folder continues from the
newest checkpoint and ends with the same weights, bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..data.samples import fingerprint, picture_count
from ..errors import ChromaKitError
from ..files import remove_leftovers
from ..loading.components import Device, load_transformer
from ..loading.moving import release_memory
from ..lora.adapters import adapters_disabled, add_trainable, start_from
from ..lora.formats import read_lora
from .changes import recorded
from .checkpoint import Progress, checkpoint_bytes, restore_latest, save_checkpoint
from .compiling import compile_blocks
from .config import TrainingConfig
from .control import Control, Halted, Stopped
from .ema import Ema
from .event_files import EventFiles, check_event_files
from .faults import disk_shortage, is_out_of_memory, out_of_memory, watch_loss
from .finish import lora_metadata, write_final
from .loop import Batches, StepResult, train_step
from .metrics import MetricsLog
from .objective import heldout_loss
from .places import Places
from .prepare import Prepared, prepare
from .preview import render_previews
from .seat import Seat
from .stepper import Stepper, check_optimizer

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
        self._saved = time.monotonic()
        for folder in (places.job, places.samples):
            remove_leftovers(folder)
        report(state="preparing", message="reading the data set")
        check_optimizer(config.optimizer_settings(), device)
        check_event_files(config.tensorboard)
        self.seat = control.seat = Seat(device, before_load)
        self.data: Prepared = prepare(config, places.cache, self.seat, control.gate, self._report_caching)
        report(message="loading the transformer", warnings=self.data.warnings, base_sha256=self.data.base_sha256)
        before_load()
        self.transformer = load_transformer(config.model, device)
        self.seat.take(self.transformer)
        self.parameters = add_trainable(self.transformer, config.lora.settings(), config.seed)
        if config.lora.start_from:
            start_from(self.transformer, read_lora(config.lora.start_from))
        if config.gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
            self.transformer.checkpointing_interval = config.checkpointing_interval
        if config.compile:
            compile_blocks(self.transformer)
        self.stepper = Stepper(self.parameters, config.optimizer_settings())
        self.ema = Ema(self.parameters, config.lora.ema_decay) if config.lora.ema_decay else None
        self.batches = Batches(self.data.samples, self.data.training_cache, config, config.objective.settings())
        self._resume()

    def _resume(self) -> None:
        """Continue from the newest checkpoint, or start afresh."""
        self.warnings = warnings = list(self.data.warnings)
        data = fingerprint(self.data.samples)
        progress, damaged = restore_latest(self.places.checkpoints, self.transformer, self.stepper, self.ema)
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
        self.event_files: EventFiles | None = None
        if self.config.tensorboard:
            values, earlier = self.config.model_dump(mode="json"), self.metrics.read()
            self.event_files = EventFiles(self.places.job / "tensorboard", self.progress.step, values, earlier)
            self.metrics.also = self.event_files.add
        for change in recorded(self.places.job):
            if change["warning"]:
                warnings.append(change["warning"])
            if change["step"] >= self.progress.step:  # cut off with the steps after the checkpoint, or not yet written
                self.metrics.append(**change)
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
            result = train_step(progress.step, self.transformer, self.stepper, self.batches, config)
            if self.ema is not None and not result.skipped:
                with self.stepper.as_trained():
                    self.ema.update(progress.step)
            self._count(result, time.perf_counter() - started)

    def _count(self, result: StepResult, seconds: float) -> None:
        """Write one step down."""
        progress = self.progress
        progress.step += 1
        progress.train_seconds += seconds
        if result.skipped:
            progress.skipped_steps += 1
            # fp16 that overflowed is repaired by a smaller loss scale; only what is broken counts towards giving up.
            progress.skipped_in_a_row += result.skipped == "broken"
            self.metrics.append(step=progress.step, skipped=result.skipped, lr=result.learning_rate)
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
        warning = watch_loss(progress, result.loss, self.config)
        if warning is not None:
            self.warnings.append(warning)
            self.metrics.append(step=progress.step, warning=warning)
            self.report(warnings=self.warnings)
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
        minutes = (time.monotonic() - self._saved) / 60
        saving = due(config.checkpoint_every) or 0 < config.checkpoint_minutes <= minutes
        saving = saving or (config.keep_best and progress.best_at == step > 0)
        # In the middle of skipped steps the weights may be what is broken: keep the checkpoints from before.
        if saving and progress.saved_at != step and not progress.skipped_in_a_row:
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
        with self.stepper.as_trained():
            self._measure()

    def _measure(self) -> None:
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
        if progress.best_loss is None or progress.heldout_loss < progress.best_loss:
            progress.best_loss, progress.best_at = progress.heldout_loss, progress.step
        self.report(**self._numbers())

    def preview(self, between: Callable[[], None]) -> None:
        """Sample the preview prompts with the LoRA as it is now."""
        record = {
            "job": self.places.job.name,
            "lora": self.config.lora.model_dump(mode="json"),
            "base_sha256": self.data.base_sha256,
            "trigger": self.config.dataset.trigger,
        }
        config, step, folder = self.config, self.progress.step, self.places.samples
        with self.stepper.as_trained():
            names = render_previews(config, step, folder, self.transformer, self.data.cache, record, between)
        if self.event_files is not None:
            self.event_files.pictures(step, [folder / name for name in names])
        self.report(new_samples=names)

    def save(self, wait: bool = True) -> None:
        """Write a checkpoint of this step; on a full disk, pause until there is room (with `wait`)."""
        progress = self.progress
        self._saved = time.monotonic()
        # The first one's size is not known yet: weights and two moments.
        needed = checkpoint_bytes(self.places.checkpoints) or 12 * sum(p.numel() for p in self.parameters)
        while wait and (shortage := disk_shortage(self.places.job, needed)) is not None:
            self.control.pause.set()
            self.report(message=shortage)
            self.control.gate()
            self.report(message="")
        self._where_the_optimizer_is()
        progress.saved_at = progress.step
        progress.metrics_bytes = self.metrics.sync()
        save_checkpoint(
            self.places.checkpoints,
            progress,
            self.transformer,
            self.stepper,
            self.ema,
            self.config.keep_checkpoints,
            self.config.keep_best,
        )
        self.report(checkpoint=progress.step, **self._numbers())

    def _where_the_optimizer_is(self) -> None:
        """Schedule-free AdamW averages with its state, which stays on the device when the weights step aside."""
        if self.config.optimizer == "schedule-free":
            self.seat.come_back()

    def keep_what_is_good(self) -> None:
        """Save a checkpoint, or go back to the newest one when the last steps could not be taken."""
        if self.progress.skipped_in_a_row:
            restored, _ = restore_latest(self.places.checkpoints, self.transformer, self.stepper, self.ema)
            self.progress = restored or self.progress
        else:
            self.save(wait=False)

    def finish(self) -> Path:
        """Write the LoRA where the user looks for it; returns its path."""
        pictures, job = picture_count(self.data.samples), self.places.job
        metadata = lora_metadata(self.config, self.progress, self.data.base_sha256, pictures, job.name, recorded(job))
        self._where_the_optimizer_is()
        write = partial(write_final, self.config, self.transformer, metadata, self.places.job, self.places.loras)
        if self.ema is not None:
            with self.ema.swapped():
                write(suffix="-ema")
        with self.stepper.as_trained():
            return write()

    def close(self) -> None:
        """Give the memory back."""
        if self.event_files is not None:
            self.event_files.close()
        self.seat.leave()
        del self.transformer, self.parameters, self.stepper, self.ema, self.batches
        release_memory()

    def _report_caching(self, what: str, done: int, total: int) -> None:
        self.report(message=f"caching {what}: {done} of {total}" if total > 1 else f"reading the {what}")

    def _numbers(self) -> dict[str, Any]:
        progress = self.progress
        return {
            "step": progress.step,
            "loss_smooth": progress.loss_smooth,
            "lr": self.config.schedule().at(min(progress.step, self.config.steps - 1)),
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
    with torch.inference_mode(False), torch.enable_grad(), _memory_in_words(config, device):
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


@contextmanager
def _memory_in_words(config: TrainingConfig, device: Device) -> Iterator[None]:
    """Out of memory, anywhere in a job, as an error that says what was predicted and what to change."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(error, config, torch.device(device)) from error
