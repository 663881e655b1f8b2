"""Who trains: one process, or several together, seen from one of them.

`World` is the interface and also the single process, `ALONE`, whose verbs do nothing; several are
`processes.Processes`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from torch import Tensor

from ...errors import ConfigError, JobError
from ..control import Control

T = TypeVar("T")


class ProcessLost(JobError):
    """Another process of the job failed or was killed."""


class World:
    """The processes of one job, seen from one of them. This class is the single process; `Processes` are several.

    rank: 0 … size − 1; `main` is rank 0. sharded: whether the blocks are divided (FSDP2), so that every forward pass
    needs all processes.
    """

    rank = 0
    size = 1
    sharded = False

    @property
    def main(self) -> bool:
        """Whether this process writes the job's files."""
        return self.rank == 0

    def control(self, busy: Callable[[], bool]) -> Control:
        """The switches of a job."""
        return Control(busy)

    def enter(self) -> None:
        """Called first in the thread that trains."""

    def first(self, work: Callable[[], T]) -> T | None:
        """Do something in the main process while the others wait; they return None, or raise what it raised."""
        return work()

    def first_then_all(self, work: Callable[[], T]) -> T:
        """Do something in the main process, then in all others."""
        return work()

    def evaluate(self, work: Callable[[], object]) -> None:
        """Run forward passes without gradients: in all processes if the model is divided, else in the main one."""
        work()

    def decide(self, choice: bool) -> bool:
        """The main process' choice, in all."""
        return choice

    def starts(self, rows: int, size: int) -> Iterator[tuple[int, bool]]:
        """The first row of each part of `size` rows that this process computes, of `rows` in all; and whether it
        counts: a process of a divided model that has no part left computes along with the others for nothing."""
        return ((start, True) for start in range(0, rows, size))

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors of one dtype and device by their sum over the processes."""

    def total(self, number: float) -> float:
        """The sum of a number over the processes."""
        return number

    @contextmanager
    def connected(self) -> Iterator[None]:
        """Inside this `with` block a lost connection to another process is a ProcessLost."""
        yield


ALONE = World()


def launched() -> bool:
    """Whether `torchrun` or `accelerate launch` started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def part_size(batch_size: int, effective_batch: int, world_size: int) -> int:
    """Rows that a device computes at a time: the largest divisor of its share that is no more than `batch_size`.

    The effective batch is the job's, whatever the number of processes; it is dealt evenly. Where the processes divide
    the gradient accumulation, and for one process, this is `batch_size` itself.
    Raises ConfigError, naming the numbers of processes that would do, when the batch cannot be dealt evenly.
    """
    share, rest = divmod(effective_batch, world_size)
    if rest:
        good = ", ".join(str(n) for n in range(1, effective_batch + 1) if effective_batch % n == 0)
        raise ConfigError(
            f"This job's step has {effective_batch} samples (batch_size × gradient_accumulation), which cannot be "
            f"dealt evenly to {world_size} processes. Start it with one of these numbers of processes: {good}. Or "
            "choose another gradient_accumulation, which makes it another job."
        )
    return max(n for n in range(1, min(batch_size, share) + 1) if share % n == 0)
