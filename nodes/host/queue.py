"""Who wants the machine: prompts, or the training jobs that yield to them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from comfy_execution.utils import get_executing_context
from server import PromptServer

_lock = threading.Lock()
_waiting: set[str] = set()
_working = 0


def busy() -> bool:
    """Whether a prompt wants the machine (any thread). One that only waits for a job does not."""
    running, pending = PromptServer.instance.prompt_queue.get_current_queue_volatile()
    with _lock:
        if running:
            return _working > 0 or any(item[1] not in _waiting for item in running)
        return bool(pending)


@contextmanager
def waiting() -> Iterator[None]:
    """While a node waits for a job, its prompt does not hold the job up."""
    context = get_executing_context()
    prompt_id = context.prompt_id if context else ""
    with _lock:
        _waiting.add(prompt_id)
    try:
        yield
    finally:
        with _lock:
            _waiting.discard(prompt_id)


@contextmanager
def working() -> Iterator[None]:
    """While a node computes, jobs yield, even if another node of its prompt waits for one."""
    global _working
    with _lock:
        _working += 1
    try:
        yield
    finally:
        with _lock:
            _working -= 1


def computing() -> bool:
    """Whether one of our nodes computes right now (any thread)."""
    with _lock:
        return _working > 0
