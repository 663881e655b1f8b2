"""The jobs of one folder: one thread trains one at a time; each can be looked at, paused, stopped and resumed."""

from __future__ import annotations

import atexit
import importlib
import os
import shutil
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, get_args

from ...errors import ConfigError, DiskFull, JobError, check_choice, did_you_mean, first_line
from ...files import disk_is_full, replace
from ..config import TrainingConfig
from ..config.changes import check_changes, differences, entry, with_changes
from ..control import AskRoom, Control, DeviceSlot, Halted, no_need_to_ask
from ..distributed.world import ALONE, World
from ..run.checkpoint import checkpoints
from ..run.kept import use_step
from ..run.metrics import JobPaths
from ..run.run import Device, run_training
from .job import ACTIVE, Job, JobState, JobStatus, check_folder

IfExists = Literal["keep", "resume", "restart"]
Listener = Callable[[JobStatus], None]

TRASH = ".deleted-"
"""How the folder of a job begins that is being deleted."""
LOCK_SECONDS = 2.0
"""How long what is asked of a job waits for its folder, which another process may be looking at."""


class JobManager:
    """Starts, finds and steers jobs.

    Several processes may have a manager of the same folder. A job belongs to the one that queued it, until it has ended
    or the process died: the manager holds the job's lock before it writes anything (see `_taken`), and what others
    wrote is read anew whenever jobs are asked for.

    Args:
        root: the folder of job folders; also holds the cache of latents and text states (`root/cache`).
        loras_folder: where finished LoRAs go.
        device: where jobs compute.
        busy: whether ComfyUI works on something now; the trainer waits between steps while it does.
        ask_room: asks ComfyUI, from the worker, for bytes of the device; see `control.AskRoom`.
        models_folder: where models of full-rank jobs go as single files; None: `diffusion_models` beside the LoRAs.
            As diffusers folders they go to `diffusers` beside it.
        world: the ranks of a distributed run, of which this is rank 0 (see `distributed`).
    """

    def __init__(
        self,
        root: Path,
        loras_folder: Path,
        device: Device,
        busy: Callable[[], bool] = lambda: False,
        ask_room: AskRoom = no_need_to_ask,
        models_folder: Path | None = None,
        world: World = ALONE,
    ):
        self.root, self.loras_folder, self.device = Path(root), Path(loras_folder), device
        self.models_folder = models_folder
        self._busy, self._ask_room, self._world = busy, ask_room, world
        self._jobs: dict[str, Job] = {}
        self._controls: dict[str, Control] = {}
        self._queue: list[Job] = []
        self._unreadable: dict[str, str] = {}
        self._listeners: list[Listener] = []
        self._changed = threading.Condition(threading.RLock())
        self._worker: threading.Thread | None = None
        self._at_work: Job | None = None
        self._closing = False
        self.root.mkdir(parents=True, exist_ok=True)
        for left in self.root.glob(f"{TRASH}*"):
            shutil.rmtree(left, ignore_errors=True)
        self.look_around()
        at_the_end(self.shutdown)

    # --- looking -----------------------------------------------------------------------------------------------------

    def list(self) -> list[Job]:
        """All jobs, newest first."""
        with self._changed:
            self.look_around()
            return sorted(self._jobs.values(), key=lambda job: job.status()["created"], reverse=True)

    def get(self, job_id: str) -> Job:
        """The job of that id. Raises JobError."""
        with self._changed:
            if job_id in self._jobs:
                self._look(self._jobs[job_id])
            else:
                self.look_around()
            if job_id not in self._jobs:
                check_folder(self.root / Path(job_id).name)
                raise JobError(
                    f"There is no training job '{job_id}' here. It may have been deleted; see the list of jobs."
                    f"{did_you_mean(job_id, self._jobs)}"
                )
            return self._jobs[job_id]

    def unreadable(self) -> dict[str, str]:
        """The folders of jobs that are left alone, and why: of a later version, say, or damaged."""
        with self._changed:
            self.look_around()
            return dict(self._unreadable)

    def states(self) -> dict[str, JobState]:
        """The state of each job that no other process works on, by its id. Any thread; never waits."""
        return {job.id: job.state for job in tuple(self._jobs.values()) if not job.elsewhere}

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Call `listener(status)` at every change of state and at most about twice a second in between.

        It runs in the worker thread (or the one that steered a waiting job). Returns a function that unsubscribes.
        """
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    # --- starting ----------------------------------------------------------------------------------------------------

    def ensure(self, config: TrainingConfig, if_exists: IfExists = "keep") -> Job:
        """The job of this configuration, started if there is none: asking twice does not train twice.

        Args:
            if_exists: `keep` leaves a queued, running, paused, completed or stopped job as it is and resumes an
                interrupted or failed one; `resume` also goes on with a paused or stopped one; `restart` trains again
                from nothing.
        Raises:
            JobError: `restart` of a job that is running, or a job that another process is training, or that a later
                version wrote.
        """
        check_choice("if_exists", if_exists, get_args(IfExists))
        check_folder(self.root / config.job_id())
        with self._changed:
            self.look_around()
            job = self._with(config)
            if job is not None:
                _check_here(job)
            if job is not None and if_exists == "restart":
                if job.state in ACTIVE:
                    raise JobError(f"The job '{job.id}' is {job.state}. Stop it before you restart it.")
                shutil.rmtree(self._out_of_sight(job), ignore_errors=True)
                job = None
            if job is None:
                return self._begin(config, if_exists)
            if _goes_on(job, if_exists):
                with self._taken(job):
                    if _goes_on(job, if_exists):
                        # Equal but for where the weights rest (perhaps it ran out of memory there) and who watches; or
                        # it was changed since, and stays so.
                        same = config.job_id() == job.config.job_id()
                        job.config = config if same else job.config
                        self._enqueue(job)
            elif job.state in ACTIVE and if_exists == "resume":
                self.resume(job.id)
            return job

    def _begin(self, config: TrainingConfig, if_exists: IfExists) -> Job:
        """A job that was not there a moment ago."""
        job = Job(self.root / config.job_id(), config)
        with _written_down(job):
            job.folder.mkdir(parents=True, exist_ok=True)
            self._lock_folder(job)
        if (job.folder / "job.json").exists():
            job.lock.let_go()
            self.look_around()
            if job.id in self._jobs:  # another process was quicker, and has ended it
                return self.ensure(config, if_exists)
            raise JobError(
                f"There is a job '{job.id}' in '{self.root}' already, which cannot be read: the log says why. Use the "
                "version of ChromaKit that wrote it, or move its folder away."
            )
        job.notify = self._tell
        self._jobs[job.id] = job
        try:
            self._enqueue(job)
        except JobError:  # it never was
            del self._jobs[job.id]
            job.remove()
            raise
        return job

    def _with(self, config: TrainingConfig) -> Job | None:
        """The job that began with these options, else the one that was changed to them."""
        wanted = config.job_id()
        changed = (job for job in self._jobs.values() if job.config.job_id() == wanted)
        return self._jobs.get(wanted) or next(changed, None)

    # --- going on under other options --------------------------------------------------------------------------------

    def change(self, job_id: str, changes: Mapping[str, Any] | TrainingConfig, force: bool = False) -> Job:
        """Go on with a job that does not run, under other options; it keeps its id, folder and checkpoints.

        A completed job that has no steps left takes the options and stays completed.

        Args:
            changes: the whole new configuration, or the options to replace (see `changes.with_changes`).
            force: also change options that move the weights; it is recorded in the job and in the LoRA.
        Raises:
            ConfigError: an unknown option, or values that cannot work.
            JobError: the job is unknown, at work (stop it first), or cannot go on so (see `changes.check_changes`).
        """
        with self._changed, self._taken(self.get(job_id)) as job:
            if job.state in ACTIVE:
                raise JobError(f"The job '{job.id}' is {job.state}. Stop it before you change its options.")
            new = changes if isinstance(changes, TrainingConfig) else with_changes(job.config, changes)
            newest = checkpoints(job.folder / "checkpoints")[-1:]
            step = int(newest[0].name.removeprefix("step-")) if newest else 0
            found = differences(job.config, new, step)
            check_changes(job.id, found, force)
            with _written_down(job):
                if found:
                    old, job.config = job.config, new
                    try:
                        job.update(surely=True, steps=new.steps, changes=[*job.status()["changes"], entry(step, found)])
                    except (OSError, ValueError):
                        job.config = old
                        raise
            if job.state != "completed" or step < new.steps:
                self._enqueue(job)
            return job

    def extend(self, job_id: str, steps: int, force: bool = False) -> Job:
        """Train `steps` steps more than the job was to have; exactly a longer job's with a constant learning rate.

        Other schedules depend on the number of steps, so that they need `force`. Raises as `change`.
        """
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ConfigError(f"A job is extended by a whole number of steps, at least 1; found {steps!r}.")
        return self.change(job_id, {"steps": self.get(job_id).config.steps + steps}, force)

    def use(self, job_id: str, step: int = 0) -> Path:
        """Put the LoRA of one of the job's steps into the LoRA folder; 0: of the best. It may be at work meanwhile.

        Returns the file. Raises JobError: the step is not kept, none is the best, another process works on the job.
        """
        with self.held(job_id) as (job, paths):
            path = use_step(paths, job.config, step or job.best_step())
        self._tell(job.status())
        return path

    @contextmanager
    def held(self, job_id: str) -> Iterator[tuple[Job, JobPaths]]:
        """A job, at work or not, and its folders, to which nobody else writes meanwhile. For what takes a moment."""
        with self._changed, self._taken(self.get(job_id)) as job, _written_down(job, "as it was"):
            yield job, self._paths(job)

    def branch(self, job_id: str, step: int, learning_rate: float) -> Job:
        """A job like this one at another learning rate, from the LoRA of one of its steps on; 0: from nothing.

        Raises as `use`, and ConfigError for a rate that cannot work.
        """
        config = with_changes(self.get(job_id).config, {"learning_rate": learning_rate})
        if step:
            config = with_changes(config, {"lora.start_from": str(self.use(job_id, step))})
        return self.ensure(config, "resume")

    def _paths(self, job: Job) -> JobPaths:
        return JobPaths.of(self.root, job.folder.name, self.loras_folder, self.models_folder)

    @contextmanager
    def _taken(self, job: Job) -> Iterator[Job]:
        """Inside a `with` block the job's folder is ours, and the job is as its folder says; ours it stays if it is
        active then.

        Raises JobError, and nothing was written, when another process works on it.
        """
        with self._changed:
            others = not job.lock.held
            if others:
                with _written_down(job):
                    self._lock_folder(job)
            try:
                if others:
                    self._reread(job)
                yield job
            finally:
                if job.state not in ACTIVE and job is not self._at_work:
                    job.lock.let_go()

    def _lock_folder(self, job: Job) -> None:
        """Take the folder that is not ours, with patience. Raises JobError, OSError."""
        deadline = time.monotonic() + LOCK_SECONDS
        while not job.lock.take():
            if not job.folder.is_dir():
                raise JobError(f"The job '{job.id}' was deleted by another process a moment ago.")
            if time.monotonic() > deadline:
                job.elsewhere = True
                _check_here(job)
            self._changed.wait(0.02)
        job.elsewhere = False

    def _enqueue(self, job: Job) -> None:
        """Queue a job, whose folder is ours and which is written down first.

        Raises JobError, all being as before, when that is impossible.
        """
        with _written_down(job):
            job.update(surely=True, state="queued", message="", yielded=False)
        self._controls[job.id] = self._world.control(self._busy)
        self._queue.append(job)
        if self._worker is None:
            self._worker = threading.Thread(target=self._work, name="chromakit-training", daemon=True)
            self._worker.start()
        self._changed.notify_all()

    # --- steering ----------------------------------------------------------------------------------------------------

    def pause(self, job_id: str) -> Job:
        """Hold the job after the step, cache entry or preview step that it is at. Raises JobError when it is over."""
        return self._turn(job_id, "pause", lambda control: control.pause.set())

    def resume(self, job_id: str) -> Job:
        """Let a paused job go on, or queue an ended one again. Raises JobError when it is completed."""
        with self._changed:
            job = self.get(job_id)
            _check_here(job)
            if job.state not in ACTIVE:
                with self._taken(job):
                    if job.state == "completed":
                        raise JobError(f"The job '{job.id}' is completed: there is nothing to resume.")
                    if job.state not in ACTIVE:
                        self._enqueue(job)
                    return job
        return self._turn(job_id, "resume", lambda control: control.pause.clear())

    def stop(self, job_id: str) -> Job:
        """End the job after its present step and write its LoRA. Raises JobError when it is over."""
        with self._changed:
            job = self.get(job_id)
            if job in self._queue:
                self._queue.remove(job)
                begun = bool(job.status()["checkpoint"])
                message = "Stopped before it went on." if begun else "Stopped before it began: there is no LoRA."
                job.update(state="stopped", message=message)
                job.lock.let_go()
                return job
        return self._turn(job_id, "stop", lambda control: control.stop.set())

    def sample(self, job_id: str) -> Job:
        """Make the previews after the present step. Raises JobError when it is over or has no preview prompt."""
        if not self.get(job_id).config.previews.prompts:
            raise JobError(f"The job '{job_id}' has no preview prompt, so there is nothing to sample.")
        return self._turn(job_id, "sample", lambda control: control.sample.set())

    def save(self, job_id: str) -> Job:
        """Write a checkpoint after the present step. Raises JobError when it is over."""
        return self._turn(job_id, "save", lambda control: control.save.set())

    def delete(self, job_id: str) -> None:
        """Remove a job that is not at work, with its checkpoints, previews and log. The LoRA that it wrote stays.

        Raises JobError when the job is at work, here or in another process.
        """
        with self._changed:
            job = self.get(job_id)
            _check_here(job)
            if job.state in ACTIVE:
                raise JobError(f"The job '{job.id}' is {job.state}. Stop it before you delete it.")
            trash = self._out_of_sight(job)
            self._controls.pop(job.id, None)
        shutil.rmtree(trash, ignore_errors=True)

    def _out_of_sight(self, job: Job) -> Path:
        """Forget a job that is not at work, and rename its folder in one step, so that half a folder is never taken for
        a job. Raises JobError."""
        # Its worker says that it ended before that is written down, and then the folder would come back.
        if not self._changed.wait_for(lambda: job is not self._at_work, LOCK_SECONDS):
            raise JobError(f"The job '{job.id}' has just ended and is still being written. Try again in a moment.")
        trash = self.root / f"{TRASH}{job.id}-{time.time_ns()}"
        with self._taken(job):
            if job.state in ACTIVE:
                raise JobError(f"The job '{job.id}' is {job.state} again.")
            if os.name == "nt":  # where a folder with an open file in it cannot be renamed, by nobody
                job.lock.let_go()
            try:
                replace(job.folder, trash)
            except FileNotFoundError:
                pass  # somebody was quicker
            except OSError as error:
                raise JobError(
                    f"The folder of the job '{job.id}' cannot be removed: {error.strerror or error}. Close what has "
                    "its files open, and try again."
                ) from error
            del self._jobs[job.id]
        return trash

    def _turn(self, job_id: str, action: str, switch: Callable[[Control], None]) -> Job:
        job = self.get(job_id)
        _check_here(job)
        control = self._controls.get(job_id)
        if job.state not in ACTIVE or control is None:
            raise JobError(f"The job '{job_id}' is {job.state}: it cannot {action} now.")
        switch(control)
        control.changed()
        return job

    def shutdown(self, timeout: float = 60.0) -> None:
        """Let the running job save a checkpoint, mark unfinished ones interrupted, end the thread."""
        with self._changed:
            self._closing = True
            for control in self._controls.values():
                control.halt.set()
                control.changed()
            for job in self._queue:
                job.update(state="interrupted", message="Interrupted before it began; resume it to start it.")
                job.lock.let_go()
            self._queue.clear()
            self._changed.notify_all()
        if self._worker is not None and self._worker is not threading.current_thread():
            self._worker.join(timeout)

    def slot(self) -> DeviceSlot | None:
        """The place on the device of the job that is at work; None when none is. Any thread; never waits."""
        for control in tuple(self._controls.values()):
            if control.slot is not None and control.slot.in_use:
                return control.slot
        return None

    # --- working -----------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._queue and not self._closing:
                    self._changed.wait()
                if self._closing:
                    return
                job = self._at_work = self._queue.pop(0)
                control = self._controls[job.id]
            try:
                self._run(job, control)
            except Exception as error:  # its folder cannot be used; the jobs after it are not to wait for ever
                job.fail(error)
            with self._changed:
                self._at_work = None
                if job not in self._queue:
                    self._controls.pop(job.id, None)
                    job.lock.let_go()
                self._changed.notify_all()

    def _run(self, job: Job, control: Control) -> None:
        working: JobState = "preparing"

        def report(**fields: Any) -> None:
            nonlocal working
            working = fields.get("state", working)
            job.update(**fields)

        def on_wait(paused: bool, yielded: bool, short: bool) -> None:
            waits_for = "prompt" if yielded else "memory" if short else ""
            job.update(state="paused" if paused else working, yielded=yielded, waits_for=waits_for)

        control.on_wait = on_wait
        try:
            state, written = run_training(
                job.config, self._paths(job), self.device, control, report, self._ask_room, self._world
            )
            message = "" if written else "Stopped before the first step: there is no LoRA."
            if not written and job.status()["checkpoint"]:
                message = "Stopped while preparing; resume it to go on."
            job.update(state=state, **{"message": message, **written}, yielded=False)
        except Halted:
            job.update(state="interrupted", message="The process ended; resume the job to go on.", yielded=False)
        except Exception as error:
            job.fail(error)

    def _tell(self, status: JobStatus) -> None:
        for listener in tuple(self._listeners):
            try:
                listener(status)
            except Exception:
                job = self._jobs.get(status["id"])
                if job is not None and job.lock.held:
                    job.log(f"A listener failed:\n{traceback.format_exc()}")
                else:
                    traceback.print_exc()

    # --- what others do to the folder ---------------------------------------------------------------------------------

    def look_around(self) -> None:
        """Look at every job anew: others may have begun, trained, changed, ended or deleted some."""
        with self._changed:
            found = {path.name: path for path in _folders(self.root) if not path.name.startswith(TRASH)}
            for job in tuple(self._jobs.values()):
                if job.id in found or job.lock.held:
                    self._look(job)
                else:
                    del self._jobs[job.id]
            for gone in self._unreadable.keys() - found.keys():
                del self._unreadable[gone]
            for name in sorted(found.keys() - self._jobs.keys()):
                if (job := self._read(found[name])) is not None:
                    self._jobs[name] = job
                    self._look(job)
                    self._tell(job.status())

    def _read(self, folder: Path) -> Job | None:
        if not (folder / "job.json").is_file():
            return None
        try:
            job = Job.read(folder)
        except Exception as error:  # a folder of another version must not keep the pack from starting
            why = f"its job.json lacks {error}" if isinstance(error, KeyError) else str(error)
            if folder.name not in self._unreadable:
                print(f"[ChromaKit] The training job in '{folder.name}' cannot be read and is left alone: {why}")
            self._unreadable[folder.name] = why
            return None
        self._unreadable.pop(folder.name, None)
        job.notify = self._tell
        return job

    def _look(self, job: Job) -> None:
        """Take over what another process has written of a job; one that a dead process worked on is interrupted."""
        if job.lock.held:
            return
        if not job.folder.is_dir():
            self._jobs.pop(job.id, None)
            return
        with suppress(JobError):
            self._reread(job)
        ours = False
        if job.state in ACTIVE:
            with suppress(OSError):  # where nothing may be written, nobody can tell
                ours = job.lock.take()
        job.elsewhere = job.state in ACTIVE and not ours
        if ours:
            try:
                self._reread(job)
                if job.state in ACTIVE:
                    job.update(state="interrupted", yielded=False, message="Found unfinished; resume it to go on.")
            finally:
                job.lock.let_go()

    def _reread(self, job: Job) -> None:
        """Raises JobError when what others have written cannot be read."""
        try:
            changed = job.reread()
        except Exception as error:
            raise JobError(
                f"What another process wrote of the job '{job.id}' cannot be read: {first_line(error)}."
            ) from error
        if changed:
            self._tell(job.status())


def at_the_end(method: Callable[[], None]) -> None:
    """Call a method when this process ends, if its object still is, and before thread pools close.

    `atexit` is after that: a job that was reading images with one failed instead of being interrupted.
    """
    importlib.import_module("concurrent.futures.thread")  # what is registered last comes first
    found, process = weakref.WeakMethod(method), os.getpid()

    def end() -> None:
        alive = found()
        if alive is not None and os.getpid() == process:  # a fork has no worker, and others' jobs
            alive()

    getattr(threading, "_register_atexit", atexit.register)(end)


def _folders(root: Path) -> list[Path]:
    try:
        return [path for path in root.iterdir() if path.is_dir()]
    except FileNotFoundError:
        return []


def _check_here(job: Job) -> None:
    """Raise JobError when another process works on a job."""
    if job.elsewhere:
        raise JobError(
            f"The job '{job.id}' is being trained by another process, which has the same folder. Wait for it, or stop "
            "it there."
        )


def _goes_on(job: Job, if_exists: IfExists) -> bool:
    """Whether a job that has ended is to be queued again."""
    return job.state in ("interrupted", "failed") or (job.state == "stopped" and if_exists == "resume")


@contextmanager
def _written_down(job: Job, stays: str = "not queued") -> Iterator[None]:
    """What cannot be written in a `with` block, as a JobError that says how the job stays."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise (DiskFull if disk_is_full(error) else JobError)(
            f"The job '{job.id}' cannot be written to '{job.folder}', so it is {stays}: "
            f"{first_line(error) or type(error).__name__}. Nothing was changed. Make room, or allow writing there."
        ) from error
