"""ComfyUI's prompt worker between two prompts: prompts that wait in its queue because something else has the machine,
and errands that other threads have it run, since nobody else may touch ComfyUI's models.

The worker takes prompts with `prompt_queue.get(timeout)`. `Holding` stands in for that one method of that one queue.
What it lets through is taken by ComfyUI's own method; everything else about the queue is untouched, so a held prompt
is an ordinary pending one: shown, counted, and deleted like any other.
"""

from __future__ import annotations

import inspect
import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

log = logging.getLogger("chromakit")


class Withdrawn(Exception):
    """A prompt was deleted while something was done for it."""


Item = tuple[Any, ...]
"""A prompt as the queue has it: (number, id, prompt, extra data, output nodes, sensitive data)."""


def can_hold(queue: Any) -> bool:
    """Whether this is a queue of the kind that `Holding` knows."""
    try:
        parameters = list(inspect.signature(queue.get).parameters)
    except (AttributeError, TypeError, ValueError):
        return False
    return (
        parameters == ["timeout"]
        and isinstance(getattr(queue, "queue", None), list)
        and isinstance(getattr(queue, "not_empty", None), threading.Condition)
    )


class Holding:
    """Stands in for `queue.get` from now on; see `can_hold`.

    Args:
        queue: ComfyUI's `PromptQueue`.
        holds: whether prompts have to wait now. Asked with the queue locked: it must not wait for any other lock whose
            owner may be about to call `wake`, `busy` or the queue.
        passes: whether a prompt may run all the same.
        before: called in the worker's thread with the prompt that is about to run, which still stands in the queue: one
            that is deleted meanwhile does not run. With it a function that raises `Withdrawn` then, for long waits.
    """

    def __init__(
        self,
        queue: Any,
        holds: Callable[[], bool],
        passes: Callable[[Item], bool],
        before: Callable[[Item, Callable[[], None]], None] = lambda item, check: None,
    ):
        self.holds, self.passes, self._before = holds, passes, before
        self._errands: deque[tuple[Future[None], Callable[[], None]]] = deque()
        self._queue, self._take = queue, queue.get
        queue.get = self.get

    def get(self, timeout: float | None = None) -> Any:
        """The next prompt that may run, as ComfyUI's own `get` gives it.

        None when the timeout (seconds; None: for ever) has passed, or something else woke the worker: it then looks at
        its flags (unload, free memory) and collects its garbage, also while prompts are held.
        """
        ready: Item | None = None
        while True:
            self._run_errands()
            with self._queue.not_empty:
                if not self._offer() and not self._errands:
                    self._queue.not_empty.wait(timeout)
                item = self._offer()
                if item is not None and item is ready:
                    return self._take(timeout)  # there is a prompt, so it does not wait
                if item is None and timeout is not None and not self._errands:
                    return None
            if item is not None:
                self._prepare(item)
                ready = item

    def _prepare(self, item: Item) -> None:
        def check() -> None:
            with self._queue.not_empty:
                if not any(other is item for other in self._queue.queue):
                    raise Withdrawn

        try:
            self._before(item, check)
        except Withdrawn:
            pass
        except Exception:  # the worker would end with it, and ComfyUI run no prompt any more
            log.exception("ChromaKit: a prompt begins although what comes before it has failed.")

    def ask(self, errand: Callable[[], None]) -> Future[None]:
        """Have the worker run this when it runs no prompt, before the next one. Any thread."""
        future: Future[None] = Future()
        with self._queue.not_empty:
            self._errands.append((future, errand))
            self._queue.not_empty.notify_all()
        return future

    def _run_errands(self) -> None:
        while self._errands:
            future, errand = self._errands.popleft()
            if future.set_running_or_notify_cancel():
                try:
                    errand()
                    future.set_result(None)
                except Exception as error:
                    future.set_exception(error)

    def wake(self) -> None:
        """What `holds` answers may have changed: the worker looks again at once. Any thread."""
        with self._queue.not_empty:
            if self._queue.queue:
                self._queue.not_empty.notify_all()

    def count(self) -> int:
        """How many prompts are held now. Any thread."""
        with self._queue.not_empty:
            return sum(not self.passes(item) for item in self._queue.queue) if self.holds() else 0

    def _offer(self) -> Item | None:
        """The prompt to take, if there is one; it is then the first in the queue's heap."""
        pending = self._queue.queue
        if not pending or not self.holds():
            return pending[0] if pending else None
        order = sorted(pending, key=lambda item: item[:2])
        first = next((item for item in order if self.passes(item)), None)
        if first is not None:
            # A sorted list is a heap, and stays one below whatever stands at its top: taking the top mends it.
            pending[:] = [first, *(item for item in order if item is not first)]
        return first
