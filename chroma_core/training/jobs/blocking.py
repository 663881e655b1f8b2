"""Blocking runs of one job, for the command line and for scripts: in one process, or distributed over several.

In a distributed run rank 0 has the job folder; the other ranks only compute.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...errors import ChromaKitError
from ..config import TrainingConfig
from ..config.changes import with_changes
from ..control import Halted
from ..distributed.world import MainFailed, Processes, ProcessLost, part_size
from ..run.metrics import JobPaths
from ..run.run import Device, run_training
from .job import ACTIVE, Job, JobEnd, JobStatus
from .manager import IfExists, JobManager, Listener

PATIENCE_SECONDS = 20.0
"""How long a process that was asked to end waits for its present step and checkpoint; launchers kill after 30."""


def run_job(
    config: TrainingConfig,
    root: Path,
    loras_folder: Path,
    device: Device,
    on_status: Listener = lambda status: None,
    if_exists: IfExists = "resume",
) -> JobStatus:
    """Run (or resume) one job to its end; returns its final status. Ctrl-C or SIGTERM saves and leaves it
    `interrupted`."""
    return _block_on(root, loras_folder, device, on_status, lambda manager: manager.ensure(config, if_exists))


def continue_job(
    job_id: str,
    root: Path,
    loras_folder: Path,
    device: Device,
    on_status: Listener = lambda status: None,
    config: TrainingConfig | None = None,
    extend: int = 0,
    force: bool = False,
) -> JobStatus:
    """Go on with a job of that id to its end; returns its final status.

    Args:
        config: its new options (None: as they are); see `JobManager.change`.
        extend: steps more than the job was to have.
    """

    def begin(manager: JobManager) -> Job:
        job = manager.get(job_id)
        values: dict[str, Any] | TrainingConfig = config or {}
        if extend:
            base = config or job.config
            values = with_changes(base, {"steps": base.steps + extend})
        return manager.change(job_id, values, force)

    return _block_on(root, loras_folder, device, on_status, begin)


def branch_job(
    job_id: str,
    step: int,
    learning_rate: float,
    root: Path,
    loras_folder: Path,
    device: Device,
    on_status: Listener = lambda status: None,
) -> JobStatus:
    """Run the job that `JobManager.branch` makes to its end; returns its final status."""
    return _block_on(root, loras_folder, device, on_status, lambda manager: manager.branch(job_id, step, learning_rate))


def _block_on(
    root: Path, loras_folder: Path, device: Device, on_status: Listener, begin: Callable[[JobManager], Job]
) -> JobStatus:
    manager = JobManager(root, loras_folder, device)
    manager.subscribe(on_status)
    with _asked_to_end() as ending:
        try:
            job = begin(manager)
            while not (job.wait(0.5) or ending.is_set()):  # in slices, so that signals are heard on every system
                pass
        finally:
            manager.shutdown()
    return job.status()


def run_distributed(
    config: TrainingConfig,
    root: Path,
    loras_folder: Path,
    device: Device,
    on_status: Listener = lambda status: None,
    if_exists: IfExists = "resume",
    *,
    world: Processes,
) -> JobEnd:
    """Run (or resume) one job; every process of `world` calls this. Ctrl-C or SIGTERM saves and leaves it interrupted.

    Returns the job's final status on rank 0; on the other ranks `state` and `message`. The folders must be the
    same for all of them.
    Raises ConfigError on rank 0, and MainFailed on the others, before anything is done, when the step's batch cannot be
    dealt evenly to the processes.
    """
    world.on_main(lambda: part_size(config.batch_size, config.effective_batch, world.size))
    with _asked_to_end() as ending:
        if world.main:
            manager = JobManager(root, loras_folder, device, world=world)
            status = _lead(manager, config, on_status, if_exists, world, ending)
        else:
            status = _follow(root, loras_folder, world, ending)
    return status


def _lead(
    manager: JobManager,
    config: TrainingConfig,
    on_status: Listener,
    if_exists: IfExists,
    world: Processes,
    ending: threading.Event,
) -> JobStatus:
    manager.subscribe(on_status)
    try:
        job = manager.ensure(config, if_exists)
    except ChromaKitError as error:
        world.say_failed(str(error))
        raise
    # Its folder and options may be those of a job that was changed to what was asked for.
    world.publish("start", {"state": job.state, "id": job.id, "config": job.config.model_dump(mode="json")})
    while not job.wait(0.5):
        if ending.is_set():
            manager.shutdown(PATIENCE_SECONDS)
            break
        if world.failed() is not None and not job.wait(2 * PATIENCE_SECONDS):  # it is stuck waiting for the other
            try:
                world.raise_if_lost()
            except ProcessLost as error:
                job.fail(error)
    status = job.status()
    if status["state"] != "completed":
        world.say_failed(status["message"])
    manager.shutdown(PATIENCE_SECONDS)
    return status


def _follow(root: Path, loras_folder: Path, world: Processes, ending: threading.Event) -> JobEnd:
    """Compute along until the job ends. No message where rank 0 has one."""
    control = world.control()
    ended: JobEnd = {"state": "interrupted", "message": "the process was asked to end"}

    def work() -> None:
        try:
            started = world.receive("start")
            state = started["state"]
            if state in ACTIVE:
                config, paths = TrainingConfig.parse(started["config"]), JobPaths.of(root, started["id"], loras_folder)
                state, _ = run_training(config, paths, world.device, control, lambda **_: None, world=world)
            ended.update(state=state, message="")
        except Halted:
            pass
        except MainFailed as error:
            ended.update(state="failed", message="")
            world.say_failed(str(error))
        except Exception as error:
            message = str(error) if isinstance(error, ChromaKitError) else f"{type(error).__name__}: {error}"
            ended.update(state="failed", message=message)
            world.say_failed(message)
            if not isinstance(error, ChromaKitError):
                sys.excepthook(type(error), error, error.__traceback__)

    thread = threading.Thread(target=work, name="chromakit-training", daemon=True)
    thread.start()
    while thread.is_alive() and not ending.is_set():
        thread.join(0.5)
    control.halt.set()
    thread.join(PATIENCE_SECONDS)
    return ended


@contextmanager
def _asked_to_end() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set, however often they come: launchers send both, to every process.

    Signals are left alone in any other thread than the main one, which alone may handle them.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *_: event.set()) for number in signals]
    try:
        yield event
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)
