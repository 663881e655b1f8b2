"""How a running job is steered, and its slot on the device, which it shares with prompts.

Requests come from other threads and are looked at between small pieces of work. The trainer never calls ComfyUI: it
asks `busy()` and waits; pause, stop and the rest are flags that it polls, so ComfyUI's own Cancel cannot reach it.

While a prompt runs the job rests at a gate and keeps its place on the device until somebody wants that: a prompt that
needs the memory makes it leave and waits for its word (`DeviceSlot.make_leave`), a prompt for the very model that is
trained borrows it where it lies (`DeviceSlot.lend`). The job comes back when ComfyUI has made room and the memory is
free, whoever had it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from ..model.device import free_memory, release_memory
from ..streaming import module_bytes, to_device, to_host

POLL_SECONDS = 0.02
ROOM_SECONDS = 120.0
"""How long a job waits for ComfyUI to make room, and after it ran out of memory for anybody to, before it tries
without."""
SETTLE_SECONDS = 5.0
"""How long it waits for memory that ComfyUI has freed to be there: who plans with less than there is would never see
it."""

AskRoom = Callable[[int], Callable[[], bool]]
"""`ask_room(needed)` asks for bytes of the device, from the worker's thread; what it returns says whether they are
free now."""


class Stopped(Exception):
    """The job was asked to stop and keep what it has."""


class Halted(Exception):
    """The process is going down: save a checkpoint, to be resumed later."""


def nothing() -> None:
    """For a module to which nothing belongs."""


def no_need_to_ask(needed: int) -> Callable[[], bool]:
    """For a device that nobody else uses."""
    return lambda: True


@dataclass(frozen=True)
class Loan:
    """What of a job can be lent: equal `key`s mean equal weights and computation; `plain()` is the module without what
    is trained, inside a `with` block."""

    key: object
    plain: Callable[[], AbstractContextManager[nn.Module]]


class DeviceSlot:
    """What of a job is on the device. One module at a time; the worker's thread brings it and takes it away.

    `away` says that the module waits in RAM, so that nothing of the job is on the device. `rest_seconds` above 0: the
    job ran out of memory, perhaps by another program's doing, and waits for room for so long at least.
    """

    def __init__(self, device: torch.device | str, ask_room: AskRoom = no_need_to_ask):
        self.device = torch.device(device)
        self.away = False
        self.rest_seconds = 0.0
        self._ask_room = ask_room
        self._room: Callable[[], bool] | None = None
        self._asked_at = 0.0
        self._module: nn.Module | None = None
        self._loan: Loan | None = None
        self._follow: Callable[[], None] = nothing
        self._coming = False
        self._resting = False
        self._unwanted = self._wanted = self._lent = 0
        self._changed = threading.Condition()

    # --- the worker's thread ------------------------------------------------------------------------------------------

    @contextmanager
    def coming(self) -> Iterator[None]:
        """Inside this block a component is on its way to the device: who wants it to leave waits until it is there."""
        self._set(coming=True)
        try:
            yield
        finally:
            self._set(coming=False)

    def take(self, module: nn.Module, loan: Loan | None = None, follow: Callable[[], None] = nothing) -> None:
        """From now on `module`, which is on the device, is the one to move; prompts may borrow it as `loan` says.

        follow: moves what belongs to it to where it is now; called after each move.
        """
        self._set(module=module, loan=loan, follow=follow, away=False)

    def leave(self) -> None:
        """Nothing of the job is on the device any more."""
        with self._changed:
            self._changed.wait_for(lambda: not self._lent)
        self._set(module=None, loan=None, follow=nothing, away=False)

    def rest(self) -> None:
        """At a gate, where the job does not go on: do what others want of the slot."""
        with self._changed:
            leave = self._unwanted > 0 and not self._lent
            come = self._wanted > 0 and self.away and not leave
            self._resting = not (leave or come)
            self._changed.notify_all()
        if leave:
            self.step_aside()
        elif come:
            self.return_now()
        self._set(resting=True)

    def ready(self, needed: int = 0) -> bool:
        """At a gate, where the job goes on: be back on the device, with `needed` bytes free beside what it has there.

        False as long as that takes: ComfyUI makes room, or a prompt still wants something of the slot.
        """
        with self._changed:
            wished = bool(self._lent or self._unwanted or self._wanted)
            self._resting = wished
        if wished:
            self.rest()
            return False
        if self.away and self._module is not None:
            needed += sum(module_bytes(self._module).values())
        if needed and not self._has_room(needed):
            return False
        self.return_now()
        return True

    def step_aside(self) -> None:
        """Leave the device to others. Called again, it does nothing."""
        if self._module is not None and not self.away:
            self._to_host(self._module)
            release_memory()
            self._set(away=True)

    def return_now(self) -> None:
        """Take the device again, if it was left, whoever has it."""
        if self._module is not None and self.away:
            try:
                to_device(self._module, self.device)
                self._follow()
            except BaseException:  # not enough memory: nothing of it is to lie there
                self._to_host(self._module)
                raise
            self._set(away=False)

    def _to_host(self, module: nn.Module) -> None:
        to_host(module, keep=True)
        self._follow()

    def _has_room(self, needed: int) -> bool:
        if self._room is None:
            release_memory()
            self._room, self._asked_at = self._ask_room(needed), time.monotonic()
        waited = time.monotonic() - self._asked_at
        made, free = self._room(), free_memory(self.device)
        there = made and (free is None or (free >= needed and waited >= self.rest_seconds))
        patience = SETTLE_SECONDS if made and not self.rest_seconds else ROOM_SECONDS
        if there or waited > patience:
            self._room = None
            return True
        return False

    def _set(self, **values: object) -> None:
        with self._changed:
            for name, value in values.items():
                setattr(self, name if name == "away" else f"_{name}", value)
            self._changed.notify_all()

    # --- other threads ------------------------------------------------------------------------------------------------

    @property
    def in_use(self) -> bool:
        """Whether a component of the job is on the device, on its way there, or waits to come back."""
        return self._module is not None or self._coming

    @property
    def lent(self) -> bool:
        """Whether a prompt computes with the job's module now."""
        return self._lent > 0

    def device_bytes(self) -> int:
        """Bytes that the job's module holds on the device now. Never waits."""
        module = self._module
        if module is None or self.away:
            return 0
        return sum(size for name, size in module_bytes(module).items() if torch.device(name).type == self.device.type)

    def make_leave(self, check: Callable[[], None] = lambda: None, seconds: float = ROOM_SECONDS) -> bool:
        """Return when nothing of the job is on the device: True; False when `seconds` have passed before, or when it is
        lent: whoever has it is the one that asks.

        The job leaves at its next gate, and stays away for as long as a prompt runs. `check` is called all the while
        and may raise.
        """
        if self.lent:
            return False
        with self._wish("_unwanted"):
            return self._wait(lambda: self.away or (self._module is None and not self._coming), check, seconds)

    @contextmanager
    def lend(
        self, key: object, check: Callable[[], None] = lambda: None, seconds: float = ROOM_SECONDS
    ) -> Iterator[nn.Module | None]:
        """The job's module without what is trained, on the device, inside a `with` block; the job rests meanwhile.

        None when it has nothing to lend for this key, or cannot come to a gate within `seconds`.
        """
        with self._changed:
            loan = self._loan if self._loan is not None and self._loan.key == key else None
        if loan is None:
            yield None
            return
        with self._wish("_wanted"):
            there = self._wait(lambda: self._loan is not loan or (self._resting and not self.away), check, seconds)
            with self._changed:
                lent = there and self._loan is loan and self._resting and not self.away
                self._lent += lent
        if not lent:
            yield None
            return
        try:
            with loan.plain() as module:
                yield module
        finally:
            with self._changed:
                self._lent -= 1
                self._changed.notify_all()

    @contextmanager
    def _wish(self, name: str) -> Iterator[None]:
        with self._changed:
            setattr(self, name, getattr(self, name) + 1)
        try:
            yield
        finally:
            with self._changed:
                setattr(self, name, getattr(self, name) - 1)

    def _wait(self, met: Callable[[], bool], check: Callable[[], None], seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while True:
            check()
            with self._changed:
                if self._changed.wait_for(met, 0.1):
                    return True
            if time.monotonic() > deadline:
                return False


class Control:
    """The switches of one job.

    Args:
        busy: whether ComfyUI works on a prompt now; polled between steps.
        on_wait: called from the worker with (paused, yielded, short of room) whenever one of them changes.
        slot: the job's slot on the device.
        waits: how often the worker has waited so far, so that others may have used the device.
    """

    def __init__(self, busy: Callable[[], bool] = lambda: False):
        self.busy = busy
        self.on_wait: Callable[[bool, bool, bool], None] = lambda paused, yielded, short: None
        self.pause = threading.Event()
        self.stop = threading.Event()
        self.halt = threading.Event()
        self.sample = threading.Event()
        self.save = threading.Event()
        self.slot: DeviceSlot | None = None
        self.waits = 0
        self._changed = threading.Event()
        self._waiting = (False, False, False)

    def changed(self) -> None:
        """Wake the worker at once after a switch was turned."""
        self._changed.set()

    def gate(self, serve: Callable[[bool], None] | None = None, pausable: bool = True, needed: int = 0) -> None:
        """Return when work may go on; wait while paused, while ComfyUI is busy, and until the device has room.

        Args:
            serve: called first and all through a pause, with whether the device is free, to do what was asked for.
            pausable: False for work that was asked for during a pause.
            needed: bytes that the work to come takes on the device beside what the job has there.
        Raises:
            Stopped, Halted: instead of returning.
        """
        while True:
            if self.halt.is_set():
                raise Halted
            if self.stop.is_set():
                raise Stopped
            if self._may_go_on(serve, pausable, needed):
                return
            self.waits += 1
            self._changed.clear()
            self._changed.wait(POLL_SECONDS)

    def between_parts(self) -> None:
        """`gate` inside a step, which a pause waits for."""
        self.gate(pausable=False)

    def between_blocks(self) -> None:
        """Inside a part of a step or of a preview: raise Halted when the process is going down, which has seconds. The
        weights are still those of the last whole step. Any thread: a backward pass has its own. Not for one of several
        processes, which end at the same place."""
        if self.halt.is_set() and not (self.slot is not None and self.slot.lent):  # then it is a prompt that computes
            raise Halted

    def _may_go_on(self, serve: Callable[[bool], None] | None, pausable: bool, needed: int) -> bool:
        yielded, short = self.busy(), False
        asked = self.pause.is_set()
        paused = asked and pausable
        if self.slot is not None:
            if yielded or (paused and not self.sample.is_set()):
                self.slot.rest()
            else:
                short = not self.slot.ready(needed)
        self._announce(paused or (asked and self._waiting[0]), yielded, short)  # a pause lasts while it serves
        if serve is not None:
            serve(not yielded and not short)
        return not (paused or yielded or short)

    def _announce(self, *waiting: bool) -> None:
        if waiting != self._waiting:
            self._waiting = waiting  # type: ignore[assignment]
            self.on_wait(*waiting)
