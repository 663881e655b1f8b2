"""How a running job is steered, and its slot on the device.

Requests come from other threads and are looked at between small pieces of work. The trainer never calls ComfyUI: it
asks `busy()` and waits; pause, stop and the rest are flags that it polls, so ComfyUI's own Cancel cannot reach it.
While a prompt runs the device belongs to it: the job's component waits in RAM, so that two transformers never share a
device, and comes back when the prompt is done.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..model.device import release_memory
from ..streaming import to_device, to_host

POLL_SECONDS = 0.02


class Stopped(Exception):
    """The job was asked to stop and keep what it has."""


class Halted(Exception):
    """The process is going down: save a checkpoint, to be resumed later."""


class DeviceSlot:
    """Who of a job's components is on the device.

    Args:
        device: the job's device.
        make_room: called before a component comes (back) to the device, e.g. to ask ComfyUI to free its own models.
    """

    def __init__(self, device: torch.device | str, make_room: Callable[[], None] = lambda: None):
        self.device = torch.device(device)
        self.make_room = make_room
        self.away = False
        self._module: nn.Module | None = None

    @contextmanager
    def taken_by(self, module: nn.Module) -> Iterator[None]:
        """`module` (on the device now) is the one to move, inside a `with` block."""
        self.take(module)
        try:
            yield
        finally:
            self.leave()

    def take(self, module: nn.Module) -> None:
        """From now on `module`, which is on the device, is the one to move."""
        self._module, self.away = module, False

    def leave(self) -> None:
        """Nothing of the job is on the device any more."""
        self._module, self.away = None, False

    def step_aside(self) -> None:
        """Leave the device to ComfyUI. Called again, it does nothing."""
        if self._module is not None and not self.away:
            to_host(self._module)
            release_memory()
            self.away = True

    def come_back(self) -> None:
        """Take the device again, if it was left."""
        if self._module is not None and self.away:
            self.make_room()
            to_device(self._module, self.device)
            self.away = False


class Control:
    """The switches of one job.

    Args:
        busy: whether ComfyUI works on a prompt now; polled between steps.
        on_wait: called from the worker with (paused, yielded) whenever either changes.
        slot: the job's slot on the device, which it leaves while ComfyUI is busy.
    """

    def __init__(self, busy: Callable[[], bool] = lambda: False):
        self.busy = busy
        self.on_wait: Callable[[bool, bool], None] = lambda paused, yielded: None
        self.pause = threading.Event()
        self.stop = threading.Event()
        self.halt = threading.Event()
        self.sample = threading.Event()
        self.save = threading.Event()
        self.slot: DeviceSlot | None = None
        self._changed = threading.Event()
        self._waiting = (False, False)

    def changed(self) -> None:
        """Wake the worker at once after a switch was turned."""
        self._changed.set()

    def gate(self, serve: Callable[[bool], None] | None = None, pausable: bool = True) -> None:
        """Return when work may go on; wait while paused or while ComfyUI is busy.

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
            if self.slot is not None and yielded:
                self.slot.step_aside()
            elif self.slot is not None and (not paused or self.sample.is_set()):
                self.slot.come_back()
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
