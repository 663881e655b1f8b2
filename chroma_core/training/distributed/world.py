"""Who trains: one process, or several in a distributed run, seen from one of them.

`World` is the interface and also the single process, `ALONE`, whose methods do nothing. `Processes` are the ranks of a
distributed run: one a device, started by `torchrun` or `accelerate launch`. All of them hold the same adapter and
optimizer and take the same step; the rows of the step's batch are dealt among the ranks and the gradients of the
trained parameters are summed, once a step. Rank 0, the main one, is the only one that writes.

Why the sum is ours and not torch's `DistributedDataParallel`: the sum over ranks is the same, but the wrapper wants a
forward pass with a gradient for every parameter on every rank (the last batch of a bucket may leave a rank without
rows), sends frozen weights and buffers around at the start, and does not know weights that move (streaming).

With FSDP2 the frozen blocks are divided among the processes, each gathered only while it computes. What is trained
stays whole in every process, like the embedders and the approximator: an adapter is about a hundredth of the model, so
dividing it would save little, and every optimizer, the average, checkpoints and the finished file work on it as they do
in one process. Its gradients are summed as without FSDP.
"""

from __future__ import annotations

import inspect
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal, TypeVar, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...errors import ConfigError, JobError, first_line
from ...model.device import best_device, device_count
from ...model.quantised import QuantisedLinear
from ...model.transformer import ChromaTransformer
from ..config import TrainingConfig
from ..control import Control, Halted, Stopped

T = TypeVar("T")
Sharding = Literal["ddp", "fsdp"]
"""ddp: every process holds the whole model. fsdp: the frozen blocks are divided among them (see `shard`)."""

SUMMED_AT_ONCE = 1 << 26
"""Numbers in one message of the gradient sum: 256 MB in fp32."""

_jobs, _meetings = itertools.count(), itertools.count()

POLL_SECONDS = 0.02
MEETING_SECONDS = 600.0
"""How long ranks wait for each other at the start: the launcher has started all of them."""
GRACE_SECONDS = 5.0
"""How long a rank that lost another one waits for the other's message."""


class ProcessLost(JobError):
    """Another process of the job failed or was killed."""


class MainFailed(ProcessLost):
    """Rank 0 failed, and says why itself."""


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

    def on_main(self, work: Callable[[], T]) -> T | None:
        """Do something on rank 0 while the other ranks wait; they return None, or raise what it raised."""
        return work()

    def main_first(self, work: Callable[[], T]) -> T:
        """Do something on rank 0, then on all other ranks."""
        return work()

    def evaluate(self, work: Callable[[], object]) -> None:
        """Run forward passes without gradients: in all processes if the model is divided, else in the main one."""
        work()

    def broadcast(self, choice: bool) -> bool:
        """Rank 0's choice, on every rank."""
        return choice

    def starts(self, rows: int, size: int) -> Iterator[tuple[int, bool]]:
        """The first row of each part of `size` rows that this rank computes, of `rows` in all; and whether it counts.

        A rank of a sharded model that has no part left computes along for nothing, since the collectives need it.
        """
        return ((start, True) for start in range(0, rows, size))

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors of one dtype and device by their sum over the ranks."""

    @contextmanager
    def connected(self) -> Iterator[None]:
        """Inside this `with` block a lost connection to another rank is a ProcessLost."""
        yield


ALONE = World()


def launched() -> bool:
    """Whether `torchrun` or `accelerate launch` started this process as one of several.

    Raises ConfigError where a launcher meant to start several, but not so that they find each other.
    """
    found = os.environ
    how = "Start several with: torchrun --nproc_per_node N -m chroma_core train job.toml (see docs/training.md)."
    if "WORLD_SIZE" not in found:
        if "ACCELERATE_MIXED_PRECISION" in found and "MASTER_ADDR" in found:
            raise ConfigError(
                "accelerate launch was asked for several processes but started one, as it does where it finds no GPU "
                f"or is given --cpu. {how} For one process leave --num_processes out."
            )
        if any(int(found.get(name) or 1) > 1 for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")):
            rank = found.get("OMPI_COMM_WORLD_RANK") or found.get("PMI_RANK")
            text = f"mpirun started several processes, each of which would train the whole job. {how}"
            raise ConfigError(text) if rank == "0" else MainFailed(text)
        return False
    numbers = [found.get(name, "") for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK")]
    if numbers[0] == "1":
        return False
    if not all(number.isdecimal() for number in numbers) or int(numbers[1]) >= int(numbers[0]):
        stated = f"WORLD_SIZE is '{numbers[0]}', RANK '{numbers[1]}', LOCAL_RANK '{numbers[2]}'"
        raise ConfigError(f"{stated}: that is no process of a distributed run. {how} For one process unset all three.")
    return True


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


class Processes(World):
    """Several processes, connected through `accelerate`'s PartialState (NCCL, XCCL …; gloo on the CPU).

    Args:
        device: a device type, e.g. "cpu"; each process takes the one of its local rank. None: the best there is.
    Raises:
        ConfigError: on rank 0, when a rank lacks its device or is missing; the others raise MainFailed then.
    """

    def __init__(self, device: str | None = None, sharding: Sharding | None = None):
        from accelerate import PartialState

        if sharding is None:  # as `accelerate config` says
            sharding = "fsdp" if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true") else "ddp"
        if sharding not in get_args(Sharding):
            raise ConfigError(f"The sharding is {sharding!r}; choose ddp or fsdp.")
        # Until the processes are connected, rank 0 keeps the store that they meet at.
        kind, meeting = (device, None) if dist.is_initialized() else _agreed_device(device)
        state = PartialState(cpu=kind == "cpu")
        del meeting
        self.rank, self.size = state.process_index, state.num_processes
        self.device: torch.device = state.device  # type: ignore[assignment]
        self.sharded = sharding == "fsdp"
        self._cpu = dist.new_group(backend="gloo")  # decisions never wait for the accelerator
        # The launcher's own store, which outlives each of the processes; a part of it for each job.
        self._store = dist.PrefixStore(f"chromakit/{next(_jobs)}", dist.distributed_c10d._get_default_store())
        self._count = 0
        self.apart = False
        """Whether this rank does something that no other does: no collective may be called then."""

    def control(self, busy: Callable[[], bool] = lambda: False) -> Control:
        return SharedControl(self)

    def enter(self) -> None:
        if self.device.type == "cuda":  # the current device is a thread's own
            torch.cuda.set_device(self.device)

    def on_main(self, work: Callable[[], T]) -> T | None:
        self._count += 1
        name = f"first/{self._count}"
        if not self.main:
            error = self.receive(name)
            if error:
                raise {"Halted": Halted, "Stopped": Stopped}.get(error["type"], MainFailed)(error["message"])
            return None
        try:
            with self._apart():
                result = work()
        except BaseException as error:
            kind = type(error).__name__
            self.publish(name, {"type": kind, "message": f"Process 0 failed: {kind}: {error}"})
            raise
        self.publish(name, None)
        return result

    def main_first(self, work: Callable[[], T]) -> T:
        found: list[T] = []
        self.on_main(lambda: found.append(work()))
        if not self.main:
            with self._apart():
                found.append(work())
        return found[0]

    def evaluate(self, work: Callable[[], object]) -> None:
        if self.sharded:
            work()
        else:
            self.on_main(work)

    def broadcast(self, choice: bool) -> bool:
        return bool(self.sum_numbers(torch.tensor([float(choice and self.main)]))[0])

    def starts(self, rows: int, size: int) -> Iterator[tuple[int, bool]]:
        every = list(range(0, rows, size))
        mine = every[self.rank :: self.size]
        yield from ((start, True) for start in mine)
        if self.sharded:
            longest = len(every[:: self.size])
            yield from ((0, False) for _ in range(longest - len(mine)))

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        group: list[Tensor] = []
        for i, tensor in enumerate(tensors):
            group.append(tensor)
            if i + 1 == len(tensors) or sum(t.numel() for t in (*group, tensors[i + 1])) > SUMMED_AT_ONCE:
                flat = torch.cat([t.reshape(-1) for t in group])
                dist.all_reduce(flat)
                for t, summed in zip(group, flat.split([t.numel() for t in group]), strict=True):
                    t.copy_(summed.view_as(t))
                group = []

    def sum_numbers(self, numbers_cpu: Tensor) -> Tensor:
        """The sum of a few numbers on the CPU over the ranks, in place."""
        dist.all_reduce(numbers_cpu, group=self._cpu)
        return numbers_cpu

    def close(self) -> None:
        """Disconnect, when the job has ended well in all processes."""
        dist.destroy_process_group()

    # --- messages, kept by the launcher's store: a rank that comes late can still read them ---------------------------

    def publish(self, name: str, value: Any) -> None:
        """Leave a message for all ranks, as JSON."""
        self._store.set(name, json.dumps(value))

    def receive(self, name: str) -> Any:
        """Wait, however long it takes, for rank 0's message. Raises ProcessLost when one failed."""
        while not self._store.check([name]):
            self.raise_if_lost()
            time.sleep(POLL_SECONDS)
        return json.loads(self._store.get(name))

    def say_failed(self, message: str) -> None:
        """Leave the message of a rank that failed."""
        self.publish(f"failed/{self.rank}", message)

    def failed(self) -> tuple[int, str] | None:
        """Another rank that failed, and its message."""
        for rank in range(self.size):
            if rank != self.rank and self._store.check([f"failed/{rank}"]):
                return rank, json.loads(self._store.get(f"failed/{rank}"))
        return None

    def raise_if_lost(self) -> None:
        """Raise ProcessLost, with its message, when another rank failed."""
        found = self.failed()
        if found is not None:
            rank, message = found
            raise (ProcessLost if rank else MainFailed)(
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
                f"({first_line(error)}); the launcher's messages say which. What was "
                "trained until then is kept; start the job again to go on."
            ) from error

    @contextmanager
    def _apart(self) -> Iterator[None]:
        self.apart = True
        try:
            yield
        finally:
            self.apart = False


def _own_device(named: str | None) -> dict[str, str]:
    """The type of device that this rank would compute on, and what speaks against it."""
    local_rank, beside = int(os.environ["LOCAL_RANK"]), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    try:
        if named is not None and ":" in named:
            raise ConfigError(f"Each process takes a device of its own, so --device {named} must be without a number.")
        kind = best_device(named).type
    except ConfigError as error:
        return {"kind": "", "trouble": str(error)}
    if kind == "mps":  # processes cannot be connected through it
        kind, trouble = "cpu", "Several processes cannot share Apple's GPU. Start one, or use --device cpu."
        return {"kind": kind, "trouble": trouble if named else ""}
    return {"kind": kind, "trouble": crowded(max(beside, local_rank + 1), device_count(kind))}


def crowded(processes: int, devices: int | None) -> str:
    """What is wrong with so many processes on a machine of so many GPUs (None: they share a CPU); "": nothing."""
    if devices is None or processes <= devices:
        return ""
    text = f"{processes} processes were started on a machine with {devices} GPU{'s' * (devices > 1)}, but each needs "
    return text + f"its own. Start {devices} (--nproc_per_node {devices}), or use --device cpu."


def _agreed_device(named: str | None) -> tuple[str, dist.Store]:
    """The type of device that all ranks compute on, and where they met to agree. Raises as `Processes`."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    trouble = ""
    try:
        meeting = next(iter(dist.rendezvous("env://", timeout=timedelta(seconds=MEETING_SECONDS))))[0]
        store = dist.PrefixStore(f"chromakit/meeting/{next(_meetings)}", meeting)
        store.set(str(rank), json.dumps(_own_device(named)))
        found = [json.loads(store.get(str(each))) for each in range(size)]
    except (RuntimeError, ValueError) as error:
        trouble = f"The {size} processes of this run did not find each other ({first_line(error)}). Start as many as "
        trouble += "WORLD_SIZE says, with the same --nnodes and --nproc_per_node on every machine."
        found, store = [], None
    trouble = trouble or next((each["trouble"] for each in found if each["trouble"]), "")
    kinds = list(dict.fromkeys(each["kind"] for each in found))
    if not trouble and len(kinds) > 1:
        trouble = f"The machines have different devices: {' and '.join(kinds)}. Choose one for all with --device."
    if trouble or store is None:
        raise ConfigError(trouble) if rank == 0 else MainFailed(trouble)
    return kinds[0], store


def _is_about_connections(error: RuntimeError) -> bool:
    """gloo raises a plain RuntimeError that names its source file, other back ends torch's DistError."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower() or "connection" in str(error).lower()


class SharedControl(Control):
    """Switches that all ranks obey at the same moment: halt and stop, whichever rank was told.

    Pause, sample-now and save-now belong to ComfyUI's window, where a job is one process. When rank 0 pauses by itself,
    waiting for room on the disk, the other ranks wait, too.
    """

    def __init__(self, world: Processes):
        super().__init__()
        self._world = world

    def between_parts(self) -> None:
        """Nothing: the ranks meet between steps."""

    def gate(self, serve: Callable[[bool], None] | None = None, pausable: bool = True, needed: int = 0) -> None:
        if self._world.apart:
            if self._world.main:
                super().gate(serve, pausable, needed)
            return
        asked = torch.tensor([float(self.halt.is_set()), float(self.stop.is_set())])
        halt, stop = self._world.sum_numbers(asked).tolist()
        if halt:
            raise Halted
        if stop:
            raise Stopped


def check_sharding(config: TrainingConfig) -> None:
    """Raise ConfigError when the job's options, or this torch, do not go with FSDP2."""
    try:
        from torch.distributed.fsdp import fully_shard

        known = "ignored_params" in inspect.signature(fully_shard).parameters
    except ImportError:
        known = False
    if not known:
        raise ConfigError(f"FSDP2 needs a newer torch than {torch.__version__} (2.7 or later). Use --sharding ddp.")
    if config.model.offload != "none":
        raise ConfigError(
            f"FSDP2 and offload '{config.model.offload}' exclude each other: both decide where the blocks are. Set "
            "offload = 'none' (it is the same job), or use --sharding ddp."
        )
    if config.full is not None:
        raise ConfigError(
            "FSDP2 divides what is not trained, but this job trains layers of the model itself. Use --sharding ddp for "
            "full-rank training, or train a LoRA."
        )
    if config.compile:
        raise ConfigError("FSDP2 and compile are not supported together. Set compile = false, or use --sharding ddp.")


def shard(transformer: ChromaTransformer, trained: Sequence[nn.Parameter], device: torch.device) -> None:
    """Divide the blocks of a frozen transformer with its adapter among all processes; the rest goes to `device` whole.

    Call it with the transformer in host memory, at the same place in every process: the device then never holds more
    than its share and one block. Codes and scales of a quantised base are divided like weights.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    blocks = (*transformer.transformer_blocks, *transformer.single_transformer_blocks)
    for block in blocks:
        _codes_as_parameters(block)
        fully_shard(block, mesh=mesh, ignored_params=set(trained))
    # The root divides nothing of its own: it lets one block be fetched while another computes.
    fully_shard(transformer, mesh=mesh, ignored_params=set(transformer.parameters()))
    nn.Module.to(transformer, device)


_CARRIER = torch.float8_e4m3fn
"""FSDP2 divides floats only; bytes of codes travel as if they were these."""


class _DividedLinear(QuantisedLinear):
    """A quantised linear whose codes and scales are parameters, so that FSDP2, which leaves buffers whole, divides
    them."""

    kept_as: dict[str, torch.dtype]

    def parts(self) -> dict[str, Tensor]:
        """Codes and scales by name, as they are in an undivided layer."""
        parts = super().parts()
        return {name: t.view(self.kept_as[name]) if t.dtype == _CARRIER else t for name, t in parts.items()}


def _codes_as_parameters(block: nn.Module) -> None:
    for module in block.modules():
        if type(module) is not QuantisedLinear:
            continue
        module.__class__ = _DividedLinear
        module.kept_as = {}  # type: ignore[assignment]
        for name, tensor in list(module.named_buffers(recurse=False)):
            if tensor.ndim == 0 or (tensor.element_size() > 1 and not tensor.is_floating_point()):
                continue  # a library's single numbers: whole in every process
            delattr(module, name)
            module.kept_as[name] = tensor.dtype
            values = tensor.view(_CARRIER) if tensor.element_size() == 1 else tensor
            module.register_parameter(name, nn.Parameter(values, requires_grad=False))
