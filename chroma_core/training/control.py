"""How a running job is steered: requests from other threads, looked at between small pieces of work.

The trainer never calls the host. It asks `busy()` and waits; pause, stop and the rest are flags that it polls, so the
host's own Cancel cannot reach it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from .device_slot import Seat

POLL_SECONDS = 0.02


class Stopped(Exception):
    """The job was asked to stop and keep what it has."""


class Halted(Exception):
    """The process is going down: save a checkpoint, to be resumed later."""


class Control:
    """The switches of one job.

    Args:
        busy: whether the host works on a prompt now; polled between steps.
        on_wait: called from the worker with (paused, yielded) whenever either changes.
        seat: the job's place on the device, which it leaves while the host is busy.
    """

    def __init__(self, busy: Callable[[], bool] = lambda: False):
        self.busy = busy
        self.on_wait: Callable[[bool, bool], None] = lambda paused, yielded: None
        self.pause = threading.Event()
        self.stop = threading.Event()
        self.halt = threading.Event()
        self.sample = threading.Event()
        self.save = threading.Event()
        self.seat: Seat | None = None
        self._changed = threading.Event()
        self._waiting = (False, False)

    def changed(self) -> None:
        """Wake the worker at once after a switch was turned."""
        self._changed.set()

    def gate(self, serve: Callable[[bool], None] | None = None, pausable: bool = True) -> None:
        """Return when work may go on; wait while paused or while the host is busy.

        Args:
            serve: called first and all through a pause, with whether the device is free, to do what was asked for.
            pausable: False for work that was asked for during a pause.
        Raises:
            Stopped, Halted: instead of returning.
        """
        while True:
            if self.halt.is_set():
                raise Halted
            if self.stop.is_set():
                raise Stopped
            paused, yielded = pausable and self.pause.is_set(), self.busy()
            self._announce(paused, yielded)
            if self.seat is not None and yielded:
                self.seat.step_aside()
            elif self.seat is not None and (not paused or self.sample.is_set()):
                self.seat.come_back()
            if serve is not None:
                serve(not yielded)
            if not paused and not yielded:
                return
            self._changed.clear()
            self._changed.wait(POLL_SECONDS)

    def _announce(self, paused: bool, yielded: bool) -> None:
        if (paused, yielded) != self._waiting:
            self._waiting = (paused, yielded)
            self.on_wait(paused, yielded)
