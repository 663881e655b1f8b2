"""The job manager of this host process: made at first use, yielding to prompts, heard by every open page."""

from __future__ import annotations

import signal
import threading
from collections import Counter

from ..chroma_core.errors import JobError
from ..chroma_core.training.jobs.manager import ACTIVE, Job, JobManager, JobStatus
from . import host

EVENT = "chromakit.job"
"""The websocket event that carries a job's status."""
DELETED = "chromakit.job.deleted"
"""The one that carries the id of a job that is gone."""

_lock = threading.Lock()
_manager: JobManager | None = None
_heard_lock = threading.Lock()
_latest: dict[str, JobStatus] = {}
_upsets: Counter[str] = Counter()


def manager() -> JobManager:
    """The one manager. It saves its running job when ComfyUI ends; jobs left unfinished earlier are `interrupted`."""
    global _manager
    with _lock:
        if _manager is None:
            _manager = JobManager(
                host.jobs_folder(),
                host.loras_folder(),
                host.device(),
                busy=host.busy,
                ask_room=host.room_for_job,
            )
            for job in _manager.list():
                _note(job.status())
            _manager.subscribe(_heard)
            host.share_device_with(_manager.slot)
        return _manager


def end_as_ctrl_c_does() -> None:
    """Let SIGTERM (docker stop, systemd, Slurm) end ComfyUI as Ctrl-C does, so that the running job is saved.

    Only where nobody else handles it, and in the main thread, which alone may say so.
    """
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def find(job: str) -> Job:
    """The job behind an id that came over a link. Raises JobError, and lets the train node run again next time."""
    try:
        return manager().get(job)
    except JobError:
        _upsets[job] += 1
        raise


def delete(job: str) -> dict[str, str]:
    """Delete a job that is not at work, and tell the pages. Raises JobError."""
    manager().delete(job)
    with _heard_lock:
        _latest.pop(job, None)
        _upsets[job] += 1
    host.broadcast(DELETED, {"id": job})
    return {"id": job}


def fingerprint() -> list[tuple[str, int]]:
    """Equal as long as no job failed, was taken up again or got lost: then ComfyUI may replay what job nodes gave.

    It only ever grows, so a value from before a change never comes back.
    """
    if _manager is not None:  # another process may have taken one up
        _manager.look_around()
    return sorted(_upsets.items())


def at_work() -> JobStatus | None:
    """The status of the job that has the machine or is about to take it; None when there is none, or it is paused.

    Any thread. It waits for nothing but a lock of its own, so ComfyUI's queue may ask while it is locked itself. Jobs
    behind a paused one are not about to begin.
    """
    with _heard_lock:
        heard = [status for status in _latest.values() if not status["elsewhere"]]
    # A change of state can be seen a moment before it is told: in between it is written down.
    states = _manager.states() if _manager is not None else {}
    by_state = {states.get(status["id"], status["state"]): status for status in heard}
    for state in ("running", "preparing", "paused", "queued"):
        if state in by_state:
            return by_state[state] if state != "paused" else None
    return None


def _heard(status: JobStatus) -> None:
    """Tell the pages and the prompts that may wait, and note what makes cached results stale.

    Called from the training thread, or from the one that steered a job; the manager may be locked.
    """
    _note(status)
    host.wake_prompts()
    host.broadcast(EVENT, status)


def _note(status: JobStatus) -> None:
    job, state = status["id"], status["state"]
    with _heard_lock:
        latest = _latest.get(job)
        if latest is not None and latest["updated"] > status["updated"]:
            return  # another thread has told of a newer one
        _latest[job] = status
        if latest is None:
            return
        before = latest["state"]
        taken_up = before not in ACTIVE and status["updated"] > latest["updated"]
        if taken_up or status["elsewhere"] or (before != state and state in ("failed", "interrupted")):
            _upsets[job] += 1
