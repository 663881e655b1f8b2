"""One job from its configuration to its LoRA or model: prepare, load, generate, resume, train, finish.

`Run.train` is a loop over steps; before each one it does what is due there (held-out loss, previews, checkpoint) and
what was asked for (sample, save, pause, stop). Killed at any point, a new run on the same folder continues from the
newest checkpoint and ends with the same weights, bit for bit.
"""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from ...data.samples import fingerprint, image_count
from ...errors import NotFiniteError, first_line
from ...files import disk_is_full, remove_leftovers
from ...loading.load import Device, load_transformer
from ...memory import Settings, heldout_rows, peaks
from ...model.device import OwnMemory, is_out_of_memory, release_memory
from ...model.precision import slow_here
from ...streaming import module_bytes
from ..config import TrainingConfig
from ..config.changes import recorded
from ..control import AskRoom, Control, DeviceSlot, Halted, Stopped, no_need_to_ask
from ..distributed.world import ALONE, ProcessLost, World, check_sharding, shard
from ..step.ema import Ema
from ..step.objective import HELDOUT_SIGMAS
from ..step.optimizers import check_optimizer
from .checkpoint import (
    checkpoint_bytes,
    discard_old,
    is_whole,
    restore,
    restore_latest,
    save_checkpoint,
    step_name,
)
from .faults import (
    MEMORY_TRIES,
    NO_STEP,
    Diverged,
    Pace,
    disk_full,
    disk_shortage,
    give_up_if_broken,
    memory_in_words,
    out_of_memory,
    plan_settings,
    rest_seconds,
    resume_warnings,
    watch_heldout,
    watch_loss,
    watch_skips,
    worse_than_the_base,
)
from .kept import keep_lora
from .loop import Batches, StepResult, train_step
from .metrics import ROUNDING, EventFiles, JobPaths, MetricsLog, Progress, check_event_files
from .prepare import Prepared, compile_blocks, compiles, prepare
from .preserve import generate, planned
from .preview import render_previews
from .stepper import Stepper
from .trained import WrittenFiles, check_trained, file_metadata, loan_of, make_trained
from .validation import ended_by_itself, measure, told_of
from .verdict import memorising_for

Result = TypeVar("Result")
Report = Callable[..., None]
"""report(**fields): tell the job's status about something new."""


class Run:
    """A job that is being worked on: prepare, load, generate, resume, train, finish, close, in this order.

    Use it outside inference mode, in one thread. `run_training` does all of it.
    """

    def __init__(
        self,
        config: TrainingConfig,
        paths: JobPaths,
        device: Device,
        control: Control,
        report: Report,
        ask_room: AskRoom = no_need_to_ask,
        world: World = ALONE,
    ):
        self.config, self.paths, self.device, self.control, self.report = config, paths, device, control, report
        self.world = world
        self.slot = control.slot = DeviceSlot(device, ask_room)
        self.metrics = MetricsLog(paths.job / "metrics.jsonl", writes=world.main)
        self.progress = Progress()
        self.event_files: EventFiles | None = None
        self._begun, self._pace = False, Pace()
        self._ended: Progress | None = None  # where the job stood when it ended by itself and went back to its best
        self._memory = OwnMemory(device, self._held)
        self._saved = time.monotonic()

    def prepare(self) -> None:
        """Check what can be checked early, then scan the dataset and cache it; T5 and the VAE come and go.

        Raises Stopped, Halted, and what `prepare.prepare` raises.
        """
        config, paths, world = self.config, self.paths, self.world
        for folder in (paths.job, paths.samples, paths.kept) if world.main else ():
            remove_leftovers(folder)
        if world.sharded:
            check_sharding(config)
        self.report(state="preparing", message="reading the dataset")
        check_optimizer(config.optimizer_settings(self.device), self.device)
        advice = check_trained(config, paths)
        advice += filter(None, [slow_here(config.model.precision, self.device)])
        check_event_files(config.tensorboard and world.main)
        self.data: Prepared = world.main_first(
            lambda: prepare(config, paths.cache, self.slot, self.control.gate, self._report_caching)
        )
        self.data.warnings[:0] = advice

    def load(self) -> None:
        """Load the transformer, put on it what is trained, and make the optimizer and the batches."""
        config, data, sharded = self.config, self.data, self.world.sharded
        found = {"warnings": data.warnings, "base_sha256": data.base_sha256, "held_out": data.held_out}
        self.report(message="loading the transformer", **found)
        self._forget()  # what an earlier attempt left there
        self.control.gate(needed=self._device_bytes())
        with self.slot.coming():
            self.transformer = load_transformer(config.model, "cpu" if sharded else self.device)
            alone = self.world.size == 1
            self.transformer.between_blocks = self.control.between_blocks if alone else None
            loan = loan_of(config, self.transformer, self.device) if alone and not self._compiled else None
            self.slot.take(self.transformer, loan, self._follow)
        self.trained = make_trained(config, self.transformer, self.paths, data.base_sha256)
        if sharded:
            shard(self.transformer, self.trained.parameters, torch.device(self.device))
        self.transformer.checkpointing_interval = self._plan.interval
        self.transformer.set_deterministic(config.deterministic)
        if self._compiled:
            compile_blocks(self.transformer)
        self.stepper = Stepper(self.trained.parameters, config.optimizer_settings(self.device), self.trained.factors)
        self.ema = Ema(self.trained.parameters, config.ema_decay) if config.ema_decay else None
        images = planned(config, data.cache, data.base_sha256)
        self.batches = Batches(data.samples, data.training_cache, config, images)

    def generate(self) -> None:
        """Have the base make the images of the prompts that it is to preserve, unless they are there."""
        config, cache, world, gate = self.config, self.data.cache, self.world, self.control.gate
        images, model = self.batches.generated, self.transformer
        if images:
            world.evaluate(lambda: generate(images, config, model, cache, gate, self._report_caching, world.main))

    def _device_bytes(self) -> int:
        """What the job is going to take of the device, by the memory plan; 0 where it has memory of its own."""
        return 0 if torch.device(self.device).type == "cpu" else peaks(self._plan).training

    @cached_property
    def _plan(self) -> Settings:
        """What the memory plan counts of the job."""
        # Of several processes each may have less than the plan counts.
        return plan_settings(self.config, self.device if self.world.size == 1 else None)

    @cached_property
    def _compiled(self) -> bool:
        """Whether the blocks are compiled."""
        return compiles(self.config, self.device, self.world.sharded, self.data.warnings)

    def _beside(self) -> int:
        """What of it is not the model."""
        model = sum(module_bytes(self.transformer).values()) if self._begun else 0
        return max(0, self._device_bytes() - model)

    def _follow(self) -> None:
        """After the model has moved."""
        for each in (getattr(self, "stepper", None), getattr(self, "ema", None)):
            if each is not None:
                each.follow()

    def _held(self) -> int:
        """What the job has on the device between two steps."""
        tensors = [*self.stepper.tensors(), *(self.ema.tensors() if self.ema else ())]
        beside = sum(t.numel() * t.element_size() for t in tensors if t.device.type != "cpu")
        return self.slot.device_bytes() + beside

    def resume(self) -> None:
        """Continue from the newest checkpoint, or start afresh."""
        self.warnings = warnings = list(self.data.warnings)
        data = fingerprint(self.data.samples)
        progress, damaged = self._restore()
        warnings += resume_warnings(progress, damaged, data, self._compiled)
        self.progress = progress or Progress()
        if self.world.main:  # a process that was killed may have come no further than to write the newest
            keep = self.config.keep_checkpoints, self.config.keep_best
            discard_old(self.paths.checkpoints, self.progress, *keep)
        self.progress.data, self.progress.rounding, self.progress.compiled = data, ROUNDING, self._compiled
        self.metrics.truncate(self.progress.metrics_bytes)
        if self.config.tensorboard and self.world.main:
            values, earlier = self.config.model_dump(mode="json"), self.metrics.read()
            folder = self.paths.job / "tensorboard"
            self.event_files = EventFiles(folder, self.progress.step, values, earlier, self._warn)
            self.metrics.also = self.event_files.add
        for change in recorded(self.paths.job):
            if change["warning"]:
                warnings.append(change["warning"])
            if change["step"] >= self.progress.step:  # cut off with the steps after the checkpoint, or not yet written
                self.metrics.append(**change)
        self._begun = True
        self.report(warnings=warnings, **self._numbers())

    def _warn(self, message: str) -> None:
        self.warnings.append(message)
        self.report(warnings=self.warnings)

    def _restore(self) -> tuple[Progress | None, list[str]]:
        # The main process first: it sets damaged checkpoints aside.
        return self.world.main_first(
            lambda: restore_latest(self.paths.checkpoints, self.trained, self.stepper, self.ema)
        )

    def train(self) -> None:
        """Train to the last step, or until the job may end by itself.

        Raises:
            Stopped, Halted: on request; `save` keeps what there is.
            Diverged: after ten skipped steps in a row, or if no step was taken at all.
        """
        self.report(state="running", message="")
        while True:
            self.surely(self._do_what_is_due)
            if self.surely(self._memorises_long_enough):
                self.surely(self._back_to_the_best)
                return
            if self.progress.step >= self.config.steps:
                if not self.progress.taken:
                    raise Diverged(NO_STEP)
                return
            self.surely(lambda: self.control.gate(self._do_what_was_asked))
            self.surely(self._step)

    def _step(self) -> None:
        stepper, step, started, waited = self.stepper, self.progress.step, time.perf_counter(), 0.0

        def between() -> None:
            nonlocal waited
            since = time.perf_counter()
            self.control.between_parts()
            waited += time.perf_counter() - since

        self._memory.begin(self.control.waits)
        # The compiler makes casts part of other kernels; what is divided is no tensor of its own.
        ready = not (self._compiled or self.world.sharded)
        casting = self.trained.casting if ready else nullcontext
        result = train_step(step, self.transformer, stepper, self.batches, self.config, self.world, between, casting)
        if self.ema is not None and not result.skipped:
            stepper.torn = True
            with stepper.as_trained():
                self.ema.update(step)
            stepper.torn = False
        self._count(result, time.perf_counter() - started - waited)

    def surely(self, work: Callable[[], Result]) -> Result:
        """What `work` gives; when memory or the disk does not suffice, it is undone, and done anew with more room.

        Every draw is a function of the step's number, so it gives what it would have given at once. After a few tries
        (on a full disk at once) the job is paused, and says what to change; resumed, it tries again.
        """
        tries, message, full = 0, "", False
        while True:
            try:
                if full:
                    self._wait_for_disk(message)
                    self._undo()
                elif tries:
                    self._make_way(message, tries)
                    self._undo()
                return work()
            except Exception as error:
                full = disk_is_full(error)
                if not (full or is_out_of_memory(error)) or self.world.size > 1:
                    raise
                # Only its words are kept: its frames hold what was allocated.
                device = torch.device(self.device)
                message = disk_full(error) if full else str(out_of_memory(error, self.config, device))
            tries += not full

    def _wait_for_disk(self, message: str) -> None:
        """Pause until the user has made room."""
        self.control.pause.set()
        self.control.sample.clear()
        self.report(message=message)
        self.control.gate()
        self.report(message="")

    def _undo(self) -> None:
        """Back to the last whole step: the present one left gradients at most, or else tore the weights."""
        if not self._begun:
            return
        if self.stepper.torn:
            restored, _ = self._restore()
            self.progress = restored or Progress(data=self.progress.data)
            self.metrics.truncate(self.progress.metrics_bytes)
            self.stepper.torn = False
        self.stepper.forget()

    def _make_way(self, message: str, tries: int) -> None:
        """Leave the device, so that what fills it gets through, and come back when there is room; or pause."""
        give_up = tries % MEMORY_TRIES == 0
        self.slot.step_aside()
        gc.collect()  # what the error left may lie in circles
        release_memory()
        self.metrics.append(step=self.progress.step, out_of_memory=True)
        self._recompute_more()
        if give_up:
            self.control.pause.set()
            self.control.sample.clear()
            self.report(message=f"Paused: {message}")
            if self._begun and not self.stepper.torn:
                self.stepper.forget()
                self.save(wait=False)
        self.slot.rest_seconds = rest_seconds(tries)
        try:
            self.control.gate(needed=self._beside())
        finally:
            self.slot.rest_seconds = 0.0
        if give_up:
            self.report(message="")

    def _recompute_more(self) -> None:
        """From now on compute every block again in the backward pass, if the job leaves that to the memory."""
        config = self.config
        if self._begun and config.gradient_checkpointing and not config.checkpointing_interval:
            self.transformer.checkpointing_interval = 1

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
            if result.skipped == "broken" and (warning := watch_skips(progress)):
                self.metrics.append(step=progress.step, warning=warning)
                self._warn(warning)
            give_up_if_broken(progress, self.config.learning_rate, self.trained.noun)
            return
        progress.skipped_in_a_row = 0
        progress.smooth(result.loss)
        warning = watch_loss(progress, result.loss, self.config)
        slow = None if torch.device(self.device).type == "cpu" else self._pace.watch(progress.step, seconds)
        for said in filter(None, (warning, slow)):
            self.metrics.append(step=progress.step, warning=said)
            self._warn(said)
        self.metrics.append(
            step=progress.step,
            loss=result.loss,
            loss_smooth=progress.loss_smooth,
            lr=result.learning_rate,
            grad_norm=result.grad_norm,
            sigma=result.sigma_mean,
            seconds=round(seconds, 4),
            **({} if result.preserved is None else {"preserved": result.preserved}),
        )
        memory = self._memory.read(None if self.control.busy() else self.control.waits)
        self.report(loss=result.loss, step_seconds_now=seconds, memory=memory, **self._numbers())

    def _do_what_is_due(self) -> None:
        """Held-out loss, previews and checkpoint of this step, each unless it was already done before a resume."""
        config, progress, step = self.config, self.progress, self.progress.step
        self.metrics.settle()

        def due(every: int) -> bool:
            return step == 0 or step == config.steps or (every > 0 and step % every == 0)

        judging = due(config.validate_every) and progress.validated_at != step
        looked = judging and bool(self.data.heldout)
        if judging:
            self.world.evaluate(self._validate)
        progress.validated_at = step if due(config.validate_every) else progress.validated_at
        previews = config.previews
        if previews.prompts and previews.every and due(previews.every) and progress.previewed_at != step:
            self.world.evaluate(lambda: self.preview(self.control.gate))
            progress.previewed_at, looked = step, True
        if looked:
            self.world.on_main(self._keep_lora)
        minutes = (time.monotonic() - self._saved) / 60
        saving = due(config.checkpoint_every) or 0 < config.checkpoint_minutes <= minutes
        saving = saving or (config.keep_best and progress.best_at == step > 0)
        # In the middle of skipped steps the weights may be what is broken: keep the checkpoints from before.
        saving = self.world.broadcast(saving)  # the clock and the best loss are the main process'
        if saving and progress.saved_at != step and not progress.skipped_in_a_row:
            self.save()

    def _do_what_was_asked(self, device_is_free: bool) -> None:
        """Save-now and sample-now, also in the middle of a pause."""
        if self.control.save.is_set():
            self.save()
            self.control.save.clear()
        if device_is_free and self.control.sample.is_set():
            self.control.sample.clear()  # first: who asks again meanwhile gets them again
            try:
                self.preview(lambda: self.control.gate(pausable=False))
            except BaseException:
                self.control.sample.set()
                raise
            self.world.on_main(self._keep_lora)

    def _validate(self) -> None:
        progress, metrics, rows = self.progress, self.metrics, len(HELDOUT_SIGMAS)
        if torch.device(self.device).type != "cpu":
            rows = heldout_rows(self._plan, rows)
        with self.stepper.as_trained():
            measure(self.transformer, self.trained, self.data, progress, metrics, rows, self.control.gate)
        if warning := watch_heldout(progress, self._best_checkpoint()):
            metrics.append(step=progress.step, warning=warning)
            self._warn(warning)
        self.report(**self._numbers(), verdict=told_of(metrics.read(), self.paths.job.name))

    def _memorises_long_enough(self) -> bool:
        """Whether the job ends here by itself. From the metrics alone, so that a resumed job ends at the same step."""
        wanted, progress = self.config.stop_when_memorising, self.progress
        if not wanted or progress.validated_at != progress.step or not self.data.heldout:
            return False
        long = self.world.main and memorising_for(self.metrics.read()) >= wanted
        return self.world.broadcast(long and is_whole(self._best()))

    def _back_to_the_best(self) -> None:
        """Take the weights of the step that measured best, with which the job then ends."""
        self._ended = self.progress
        self.progress = restore(self._best(), self.trained, self.stepper, self.ema)

    def _best(self) -> Path:
        return self.paths.checkpoints / step_name(self.progress.best_at)

    def _best_checkpoint(self) -> str | None:
        return self._best().name if self.progress.best_at > 0 and self._best().is_dir() else None

    def preview(self, between: Callable[[], None]) -> None:
        """Sample the preview prompts with the weights as they are now."""
        record = {
            "job": self.paths.job.name,
            **self.trained.record(),
            "base_sha256": self.data.base_sha256,
            "trigger": self.config.dataset.trigger,
        }
        config, step, folder = self.config, self.progress.step, self.paths.samples
        names: list[str] = []
        try:
            with self.stepper.as_trained():
                names = render_previews(
                    config, step, folder, self.transformer, self.data.cache, record, between, self.world.main
                )
        except NotFiniteError as error:
            self._warn(f"There are no previews of step {step}. {error}")
        if self.event_files is not None:
            self.event_files.images(step, [folder / name for name in names])
        self.report(new_samples=names)

    def _keep_lora(self) -> None:
        with self.stepper.as_trained():
            warning = keep_lora(self.paths.kept, self.config, self.progress, partial(self.trained.keep, self._header()))
        if warning:
            self._warn(warning)

    def _header(self) -> Callable[..., dict[str, str]]:
        images, job = image_count(self.data.samples), self.paths.job
        facts = self.config, self.progress, self.data.base_sha256, images
        return partial(file_metadata, *facts, job_id=job.name, changes=recorded(job))

    def save(self, wait: bool = True) -> None:
        """Write a checkpoint of this step; on a full disk, pause until there is room (with `wait`)."""
        self.world.on_main(partial(self._write_checkpoint, wait))
        self.progress.saved_at = self.progress.step

    def _write_checkpoint(self, wait: bool) -> None:
        progress, config = self.progress, self.config
        self._saved = time.monotonic()
        # The first one's size is not known yet: weights and two moments.
        needed = checkpoint_bytes(self.paths.checkpoints) or 12 * sum(p.numel() for p in self.trained.parameters)
        while wait and (shortage := disk_shortage(self.paths.job, needed)) is not None:
            self._wait_for_disk(shortage)
        progress.metrics_bytes = self.metrics.sync()
        keep = config.keep_checkpoints, config.keep_best
        save_checkpoint(self.paths.checkpoints, progress, self.trained, self.stepper, self.ema, *keep)
        self.report(checkpoint=progress.step, **self._numbers())

    def keep_what_is_good(self) -> None:
        """Save a checkpoint, or go back to the newest one when the last steps could not be taken."""
        if self.progress.skipped_in_a_row:
            self.progress = self._restore()[0] or self.progress
            return
        try:
            self.save(wait=False)
        except Exception as error:
            if not (isinstance(error, OSError) or disk_is_full(error)):
                raise
            self._warn(
                f"The checkpoint of step {self.progress.step} could not be written ({first_line(error)}): the newest "
                "one before it is kept, and the job goes on from there."
            )

    def finish(self) -> WrittenFiles:
        """Write the LoRA or model where the user looks for it; returns the status fields that say where.

        They are empty in a process that does not write.
        """
        written = self.surely(lambda: self.world.on_main(self._write_files)) or {}
        if (ended := self._ended) is not None and written:
            self.report(heldout_loss=self.progress.heldout_loss)
            return {**written, "message": ended_by_itself(self.config, ended, self.progress, self.trained.noun)}
        worse = worse_than_the_base(self.progress, self._best_checkpoint())
        return {**written, "message": f"{self.trained.noun} written, but {worse}"} if worse and written else written

    def _write_files(self) -> WrittenFiles:
        self.report(message=f"writing the {self.trained.noun}")
        write = partial(self.trained.write, self._header())
        if self.ema is not None:
            with self.ema.swapped():
                write(suffix="-ema")
        with self.stepper.as_trained():
            return write()

    def close(self) -> None:
        """Give the memory back."""
        if self.event_files is not None:
            self.event_files.close()
        self._forget()

    def _forget(self) -> None:
        self.slot.leave()
        gone = [weakref.ref(self.transformer)] if hasattr(self, "transformer") else []
        for name in ("transformer", "trained", "stepper", "ema", "batches"):
            self.__dict__.pop(name, None)
        release_memory(gone)

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
            "best_step": progress.best_at if progress.best_at > 0 else None,
            "train_seconds": round(progress.train_seconds, 2),
        }


def run_training(
    config: TrainingConfig,
    paths: JobPaths,
    device: Device,
    control: Control,
    report: Report,
    ask_room: AskRoom = no_need_to_ask,
    world: World = ALONE,
) -> tuple[Literal["completed", "stopped"], WrittenFiles]:
    """Run a job to its end in this thread; returns the final state and where its files are.

    Raises:
        Halted: after a checkpoint was saved.
        ChromaKitError: the job cannot go on; the newest checkpoint is kept.
    """
    with torch.inference_mode(False), torch.enable_grad(), memory_in_words(config, device):
        world.enter()
        try:
            run = Run(config, paths, device, control, report, ask_room, world)
            for stage in (run.prepare, run.load, run.generate, run.resume):
                run.surely(stage)
        except Stopped:
            return "stopped", {}
        try:
            with world.connected():
                run.train()
            return "completed", run.finish()
        except Stopped:
            run.keep_what_is_good()
            return "stopped", run.finish() if run.progress.taken else {}
        except Diverged:
            run.keep_what_is_good()
            if run.progress.taken:
                report(**run.finish())
            raise
        except (Halted, ProcessLost) as error:
            if world.main or isinstance(error, Halted):
                run.keep_what_is_good()
            raise
        finally:
            run.close()
