"""The processes that train one job together: one a device, started by `torchrun` or `accelerate launch`.

All of them hold the same adapter and optimizer and take the same step; the rows of the step's batch are dealt among
them and the gradients of the trained parameters are summed, once a step. Process 0, the main one, is the only one that
writes. Every other run is one process, `world.ALONE`.

Why the sum is ours and not torch's `DistributedDataParallel`: the sum over ranks is the same, but the wrapper wants a
forward pass with a gradient for every parameter on every rank (the last batch of a bucket may leave a rank without
rows), sends frozen weights and buffers around at the start, and does not know weights that move (streaming).
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeVar, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from ...errors import ConfigError
from ..control import Control, Halted, Stopped
from .world import ProcessLost, World

T = TypeVar("T")
Sharding = Literal["ddp", "fsdp"]
"""ddp: every process holds the whole model. fsdp: the frozen blocks are divided among them (see `sharding`)."""

SUMMED_AT_ONCE = 1 << 26
"""Numbers in one message of the gradient sum: 256 MB in fp32."""

_jobs = itertools.count()

POLL_SECONDS = 0.02
GRACE_SECONDS = 5.0
"""How long a process that lost another one waits for the other's last words."""


class Processes(World):
    """Several processes, connected through `accelerate`'s PartialState (NCCL, XCCL …; gloo on the CPU).

    Args:
        device: a device type, e.g. "cpu"; each process takes the one of its local rank. None: the best there is.
    """

    def __init__(self, device: str | None = None, sharding: Sharding | None = None):
        from accelerate import PartialState

        if sharding is None:  # as `accelerate config` says
            sharding = "fsdp" if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true") else "ddp"
        if sharding not in get_args(Sharding):
            raise ConfigError(f"The sharding is {sharding!r}; choose ddp or fsdp.")
        if device is not None and ":" in device:
            raise ConfigError(f"Each process takes a device of its own, so --device {device} must be without a number.")
        state = PartialState(cpu=device == "cpu")
        self.rank, self.size = state.process_index, state.num_processes
        self.device: torch.device = state.device  # type: ignore[assignment]
        self.sharded = sharding == "fsdp"
        self._cpu = dist.new_group(backend="gloo")  # decisions never wait for the accelerator
        # The launcher's own store, which outlives each of the processes; a part of it for each job.
        self._store = dist.PrefixStore(f"chromakit/{next(_jobs)}", dist.distributed_c10d._get_default_store())
        self._count = 0
        self.apart = False
        """Whether this process does something that the others do not: it asks nobody then."""

    def control(self, busy: Callable[[], bool] = lambda: False) -> Control:
        return SharedControl(self)

    def enter(self) -> None:
        if self.device.type == "cuda":  # the current device is a thread's own
            torch.cuda.set_device(self.device)

    def first(self, work: Callable[[], T]) -> T | None:
        self._count += 1
        name = f"first/{self._count}"
        if not self.main:
            error = self.hear(name)
            if error:
                raise {"Halted": Halted, "Stopped": Stopped}.get(error["type"], ProcessLost)(error["message"])
            return None
        try:
            with self._apart():
                result = work()
        except BaseException as error:
            kind = type(error).__name__
            self.say(name, {"type": kind, "message": f"Process 0 failed: {kind}: {error}"})
            raise
        self.say(name, None)
        return result

    def first_then_all(self, work: Callable[[], T]) -> T:
        found: list[T] = []
        self.first(lambda: found.append(work()))
        if not self.main:
            with self._apart():
                found.append(work())
        return found[0]

    def evaluate(self, work: Callable[[], object]) -> None:
        if self.sharded:
            work()
        else:
            self.first(work)

    def decide(self, choice: bool) -> bool:
        return bool(self.together(torch.tensor([float(choice and self.main)]))[0])

    def starts(self, rows: int, size: int) -> Iterator[tuple[int, bool]]:
        every = list(range(0, rows, size))
        mine = every[self.rank :: self.size]
        yield from ((start, True) for start in mine)
        if self.sharded:
            longest = len(every[:: self.size])
            yield from ((0, False) for _ in range(longest - len(mine)))

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        group: list[Tensor] = []
        for i, tensor in enumerate(tensors):
            group.append(tensor)
            if i + 1 == len(tensors) or sum(t.numel() for t in (*group, tensors[i + 1])) > SUMMED_AT_ONCE:
                flat = torch.cat([t.reshape(-1) for t in group])
                dist.all_reduce(flat)
                for t, summed in zip(group, flat.split([t.numel() for t in group]), strict=True):
                    t.copy_(summed.view_as(t))
                group = []

    def total(self, number: float) -> float:
        return self.together(torch.tensor([number], dtype=torch.float64)).item()

    def together(self, numbers_cpu: Tensor) -> Tensor:
        """The sum of a few numbers on the CPU over the processes, in place."""
        dist.all_reduce(numbers_cpu, group=self._cpu)
        return numbers_cpu

    def close(self) -> None:
        """Disconnect, when the job has ended well in all processes."""
        dist.destroy_process_group()

    # --- words, kept by the launcher's store: whoever comes late can still read them ----------------------------------

    def say(self, name: str, value: Any) -> None:
        """Tell the others something, as JSON."""
        self._store.set(name, json.dumps(value))

    def hear(self, name: str) -> Any:
        """Wait, however long it takes, for what the main process says. Raises ProcessLost when one failed."""
        while not self._store.check([name]):
            self.raise_if_lost()
            time.sleep(POLL_SECONDS)
        return json.loads(self._store.get(name))

    def say_failed(self, message: str) -> None:
        """Leave this process' last words."""
        self.say(f"failed/{self.rank}", message)

    def failed(self) -> tuple[int, str] | None:
        """Another process that failed, and its last words."""
        for rank in range(self.size):
            if rank != self.rank and self._store.check([f"failed/{rank}"]):
                return rank, json.loads(self._store.get(f"failed/{rank}"))
        return None

    def raise_if_lost(self) -> None:
        """Raise ProcessLost, with its last words, when another process failed."""
        found = self.failed()
        if found is not None:
            rank, message = found
            raise ProcessLost(
                f"Process {rank} of 0 to {self.size - 1} failed, so the job cannot go on: {message} What was trained "
                "until then is kept; start the job again to go on."
            )

    @contextmanager
    def connected(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if not _is_about_connections(error):
                raise
            ends = time.monotonic() + GRACE_SECONDS
            while time.monotonic() < ends:
                self.raise_if_lost()
                time.sleep(POLL_SECONDS)
            raise ProcessLost(
                f"Another of the job's {self.size} processes was ended or cannot be reached any more "
                f"({(str(error).strip().splitlines() or [''])[0][:200]}); the launcher's messages say which. What was "
                "trained until then is kept; start the job again to go on."
            ) from error

    @contextmanager
    def _apart(self) -> Iterator[None]:
        self.apart = True
        try:
            yield
        finally:
            self.apart = False


def _is_about_connections(error: RuntimeError) -> bool:
    """gloo raises a plain RuntimeError that names its source file, other back ends torch's DistError."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower() or "connection" in str(error).lower()


class SharedControl(Control):
    """Switches that all processes obey at the same moment: halt and stop, whichever of them heard it.

    Pause, sample-now and save-now belong to the host's window, where a job is one process. A pause that the main
    process makes for itself, waiting for room on the disk, the others wait out.
    """

    def __init__(self, world: Processes):
        super().__init__()
        self._world = world

    def gate(self, serve: Callable[[bool], None] | None = None, pausable: bool = True) -> None:
        if self._world.apart:
            if self._world.main:
                super().gate(serve, pausable)
            return
        asked = torch.tensor([float(self.halt.is_set()), float(self.stop.is_set())])
        halt, stop = self._world.together(asked).tolist()
        if halt:
            raise Halted
        if stop:
            raise Stopped
