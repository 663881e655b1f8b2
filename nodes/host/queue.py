"""Who wants the machine: prompts, or the training jobs that yield to them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from comfy_execution.utils import get_executing_context
from server import PromptServer

from .holding import Holding, can_hold

_lock = threading.Lock()
_waiting: set[str] = set()
_working = 0
_holding: Holding | None = None


def busy() -> bool:
    """Whether a prompt wants the machine (any thread). One that only waits for a job, or is held, does not."""
    running, pending = PromptServer.instance.prompt_queue.get_current_queue_volatile()
    holding = _holding if _holding is not None and _holding.holds() else None
    if holding is not None:
        running, pending = [item for item in running if not holding.passes(item)], []
    with _lock:
        if running:
            return _working > 0 or any(item[1] not in _waiting for item in running)
        return bool(pending)


def watch_prompts(
    holds: Callable[[], bool],
    passes: Callable[[dict[str, Any], list[str] | None], bool],
    before: Callable[[dict[str, Any], Callable[[], None]], None],
) -> bool:
    """From now on prompts wait in the queue while `holds()`, but for those that pass; one that runs goes on.

    Args:
        holds: asked often, by any thread and with the queue locked; it must not wait for another lock for long.
        passes: whether a prompt (API format, ids of the output nodes that it runs for) may run all the same.
        before: called with the prompt that is about to run, in the thread that runs prompts, and with a function that
            raises when that prompt has been deleted.
    Returns:
        False: this version of ComfyUI has a queue of another kind, and nothing is ever held.
    """
    global _holding
    queue = PromptServer.instance.prompt_queue
    if _holding is None and can_hold(queue):
        _holding = Holding(
            queue, holds, lambda item: passes(item[2], item[4]), lambda item, check: before(item[2], check)
        )
    return _holding is not None


def between_prompts(errand: Callable[[], None]) -> Future[None] | None:
    """Have the thread that runs prompts run this when it runs none (any thread); None where it cannot be asked."""
    return _holding.ask(errand) if _holding is not None else None


def wake_prompts() -> None:
    """What `holds` answers may have changed: held prompts run at once if they may (any thread)."""
    if _holding is not None:
        _holding.wake()


def held_prompts() -> int:
    """How many prompts wait because they are held (any thread)."""
    return _holding.count() if _holding is not None else 0


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
