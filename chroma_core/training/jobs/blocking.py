"""Training in the foreground: one job, for the command line and for scripts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..config import TrainingConfig
from ..config.changes import with_changes
from ..run.run import Device
from .job import Job
from .manager import IfExists, JobManager, Listener


def run_job(
    config: TrainingConfig,
    root: Path,
    loras_folder: Path,
    device: Device,
    on_status: Listener = lambda status: None,
    if_exists: IfExists = "resume",
) -> dict[str, Any]:
    """Run (or resume) one job in the foreground; returns its final status. Ctrl-C saves and leaves it interrupted."""
    return _foreground(root, loras_folder, device, on_status, lambda manager: manager.ensure(config, if_exists))


def continue_job(
    job_id: str,
    root: Path,
    loras_folder: Path,
    device: Device,
    on_status: Listener = lambda status: None,
    config: TrainingConfig | None = None,
    extend: int = 0,
    force: bool = False,
) -> dict[str, Any]:
    """Go on with a job of that id in the foreground; returns its final status.

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

    return _foreground(root, loras_folder, device, on_status, begin)


def _foreground(
    root: Path, loras_folder: Path, device: Device, on_status: Listener, begin: Callable[[JobManager], Job]
) -> dict[str, Any]:
    manager = JobManager(root, loras_folder, device)
    manager.subscribe(on_status)
    try:
        job = begin(manager)
        while not job.wait(1.0):  # in slices, so that Ctrl-C is heard on every system
            pass
    finally:
        manager.shutdown()
    return job.status()
