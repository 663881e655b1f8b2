"""The job manager of this host process: made at first use, yielding to prompts, heard by every open page."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

from ..chroma_core.errors import JobError
from ..chroma_core.training.jobs import ACTIVE, Job, JobManager
from . import host

EVENT = "chromakit.job"
"""The websocket event that carries a job's status."""
DELETED = "chromakit.job.deleted"
"""The one that carries the id of a job that is gone."""

_lock = threading.Lock()
_manager: JobManager | None = None
_states: dict[str, str] = {}
_upsets: Counter[str] = Counter()


def manager() -> JobManager:
    """The one manager. It saves its running job when the host ends; jobs left unfinished earlier are `interrupted`."""
    global _manager
    with _lock:
        if _manager is None:
            _manager = JobManager(
                host.jobs_folder(),
                host.loras_folder(),
                host.device(),
                busy=host.busy,
                before_load=host.free_models_soon,
            )
            _manager.subscribe(_heard)
        return _manager


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
    _states.pop(job, None)
    _upsets[job] += 1
    host.broadcast(DELETED, {"id": job})
    return {"id": job}


def fingerprint() -> list[tuple[str, int]]:
    """Equal as long as no job failed, was taken up again or got lost: then the host may replay what job nodes gave.

    It only ever grows, so a value from before a change never comes back.
    """
    return sorted(_upsets.items())


def _heard(status: dict[str, Any]) -> None:
    """Tell the pages, and note what makes cached results stale. Called from the training thread."""
    job, state = status["id"], status["state"]
    before = _states.get(job)
    _states[job] = state
    if before != state and (before not in (None, *ACTIVE) or state in ("failed", "interrupted")):
        _upsets[job] += 1
    host.broadcast(EVENT, status)
