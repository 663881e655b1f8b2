"""Prompts that wait in ComfyUI's queue although its worker is free, because something else has the machine.

The worker takes prompts with `prompt_queue.get(timeout)`. `Holding` stands in for that one method of that one queue.
What it lets through is taken by ComfyUI's own method; everything else about the queue is untouched, so a held prompt
is an ordinary pending one: shown, counted, and deleted like any other.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from typing import Any

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
    """

    def __init__(self, queue: Any, holds: Callable[[], bool], passes: Callable[[Item], bool]):
        self.holds, self.passes = holds, passes
        self._queue, self._take = queue, queue.get
        queue.get = self.get

    def get(self, timeout: float | None = None) -> Any:
        """The next prompt that may run, as ComfyUI's own `get` gives it.

        None when the timeout (seconds; None: for ever) has passed, or something else woke the worker: it then looks at
        its flags (unload, free memory) and collects its garbage, also while prompts are held.
        """
        with self._queue.not_empty:
            while not self._offer():
                self._queue.not_empty.wait(timeout)
                if timeout is not None and not self._offer():
                    return None
            return self._take(timeout)  # there is a prompt, so it does not wait

    def wake(self) -> None:
        """What `holds` answers may have changed: the worker looks again at once. Any thread."""
        with self._queue.not_empty:
            if self._queue.queue:
                self._queue.not_empty.notify_all()

    def count(self) -> int:
        """How many prompts are held now. Any thread."""
        with self._queue.not_empty:
            return sum(not self.passes(item) for item in self._queue.queue) if self.holds() else 0

    def _offer(self) -> bool:
        """Whether there is a prompt to take; the one to take is then the first in the queue's heap."""
        pending = self._queue.queue
        if not pending or not self.holds():
            return bool(pending)
        order = sorted(pending, key=lambda item: item[:2])
        first = next((item for item in order if self.passes(item)), None)
        if first is None:
            return False
        # A sorted list is a heap, and stays one below whatever stands at its top: taking the top mends it.
        pending[:] = [first, *(item for item in order if item is not first)]
        return True
