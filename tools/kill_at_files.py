"""Kill training at each of its file operations in turn, resume it, compare with an uninterrupted run bit for bit.

    OMP_NUM_THREADS=1 python -m tools.kill_at_files
    OMP_NUM_THREADS=1 python -m tools.kill_at_files --every 40
    OMP_NUM_THREADS=1 python -m tools.kill_at_files --by full --first 100 --last 199

A short job writes, syncs, renames and removes some hundred times. Trial n is a process that runs it and is killed
(SIGKILL) at its n-th operation: a write is half done then, all others have not begun. With `--by` the operation fails
instead: once, with an I/O error (`error`) or for lack of a permission (`denied`), or it and all that write after it for
lack of space (`full`). The job must then not be, be completed, or be paused or failed in words. Another process resumes
it. Processes are forked from one that has run the job, so that a trial takes a second or two. The last line is
`identical K of N`, and the exit status is 0 when K = N. Not on Windows.
"""

from __future__ import annotations

import argparse
import builtins
import errno
import io
import os
import pathlib
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from chroma_core.errors import JobError
from chroma_core.training.config import TrainingConfig
from chroma_core.training.jobs.blocking import run_job
from chroma_core.training.jobs.job import ACTIVE
from chroma_core.training.jobs.manager import JobManager
from tools.kill_resume import JOBS, job_config, reached, same_result, write_images

Told = Callable[[str, str, Callable[[], None]], None]
"""told(kind, path, half): an operation is about to begin; `half` does half of it, where it can be halved."""


@contextmanager
def in_place(functions: dict[str, Callable[..., Any]]) -> Iterator[None]:
    """Inside a `with` block these are called instead of `open` and of the functions of `os` with their names."""
    with ExitStack() as patches:
        for name, function in functions.items():
            owners: list[Any] = [io, builtins] if name == "open" else [os]
            if sys.version_info < (3, 11) and name != "fsync":  # whose paths hold on to the functions themselves
                owners.append(pathlib._normal_accessor)  # type: ignore[attr-defined]
            for owner in owners:
                patches.enter_context(mock.patch.object(owner, name, function))
        yield


class FileOperations:
    """Operations of this process on files below a folder: each is told before it begins, to who may raise or kill."""

    def __init__(self, folder: Path, told: Told):
        self.folder, self._told = str(folder), told

    def tell(self, kind: str, path: Any, half: Callable[[], None] = lambda: None) -> None:
        name = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""
        if name.startswith(self.folder) and not name.endswith(".lock"):
            self._told(kind, name, half)

    @contextmanager
    def watched(self) -> Iterator[FileOperations]:
        """Inside a `with` block operations are told."""
        opened, saved, synced = io.open, torch.save, os.fsync

        def open_told(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if not any(letter in mode for letter in "wax+"):
                return opened(file, mode, *args, **kwargs)
            self.tell("open", file)
            return _Told(self, opened(file, mode, *args, **kwargs), file)

        def save_told(content: Any, path: Any, *args: Any, **kwargs: Any) -> None:
            def half() -> None:
                saved(content, path, *args, **kwargs)
                os.truncate(path, os.path.getsize(path) // 2)

            self.tell("write", path, half)
            saved(content, path, *args, **kwargs)

        def sync_told(number: int) -> None:
            self.tell("sync", os.readlink(f"/proc/self/fd/{number}") if sys.platform == "linux" else self.folder)
            synced(number)

        def told(kind: str, real: Callable[..., Any], which: int = 0) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                path, folder = args[which], kwargs.get("dir_fd")
                self.tell(kind, path if folder is None else f"/proc/self/fd/{folder}/{path}")
                return real(*args, **kwargs)

            return call

        functions: dict[str, Callable[..., Any]] = {
            "open": open_told,
            "fsync": sync_told,
            "replace": told("rename", os.replace, 1),
            "rename": told("rename", os.rename, 1),
            "mkdir": told("mkdir", os.mkdir),
            "unlink": told("remove", os.unlink),
            "rmdir": told("remove", os.rmdir),
        }
        with in_place(functions), mock.patch.object(torch, "save", save_told):
            yield self


class _Told:
    """An open file whose writing is told."""

    def __init__(self, operations: FileOperations, file: Any, path: Any):
        self._operations, self._file, self._path = operations, file, path

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _Told:
        self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)

    def write(self, content: Any) -> int:
        def half() -> None:
            self._file.write(content[: len(content) // 2])
            self._file.flush()

        self._operations.tell("write", self._path, half)
        return self._file.write(content)

    def truncate(self, *args: Any) -> int:
        self._operations.tell("truncate", self._path)
        return self._file.truncate(*args)


FAULTS = {"error": errno.EIO, "denied": errno.EACCES, "full": errno.ENOSPC}
"""How an operation may fail; `full` goes on failing, but for what makes room."""
SECONDS = 600
"""How long a trial may take before it counts as stuck."""


class Fault:
    """What happens to the operations of a process: at number `at`, counted from 1, it is killed, or one of `FAULTS`."""

    def __init__(self, by: str = "kill", at: int = 0):
        self.by, self.at, self.done = by, at, list[str]()

    def told(self, kind: str, path: str, half: Callable[[], None]) -> None:
        self.done.append(kind)
        number = len(self.done)
        goes_on = self.by == "full" and 0 < self.at < number and kind != "remove"
        if number != self.at and not goes_on:
            return
        half()
        if self.by == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(FAULTS[self.by], os.strerror(FAULTS[self.by]), path)


def run(config: TrainingConfig, output: Path, fault: Fault) -> bool:
    """Run or resume the job in `output`; whether it is completed."""
    with FileOperations(output, fault.told).watched():
        return run_job(config, output / "jobs", output / "loras", "cpu")["state"] == "completed"


def survived(config: TrainingConfig, output: Path, fault: Fault) -> bool:
    """Begin the job in `output`, and say what a fault makes of it; whether that is one of the ends it may come to."""
    with FileOperations(output, fault.told).watched():
        try:
            manager = JobManager(output / "jobs", output / "loras", "cpu")
            job = manager.ensure(config)
        except (JobError, OSError) as error:
            print(f"      refused: {error}")
            return not any(output.glob("jobs/*/job.json"))
        while job.state in ACTIVE and job.state != "paused":
            job.wait(0.05)
        status = job.status()
        print(f"      {status['state']} at step {status['step']}: {status['message'] or status['warnings']}")
        if status["state"] == "paused":
            return "nothing is lost" in status["message"]
        return status["state"] == "completed" or (status["state"] == "failed" and bool(status["message"]))


def forked(work: Callable[[], object]) -> int:
    """How a fork of this process ended that has done that: its exit status (0: `work` gave something true), or minus
    the signal that killed it."""
    sys.stdout.flush()
    child = os.fork()
    if not child:
        status = 2
        signal.alarm(SECONDS)
        try:
            status = 0 if work() else 1
        finally:
            sys.stdout.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def disturb_each(
    config: TrainingConfig, work: Path, by: str = "kill", numbers: slice = slice(None)
) -> tuple[int, list[str]]:
    """Kill the job at each of its operations with these numbers, counted from 0, or let each fail.

    Returns how often, and what did not go on to the same end.
    """
    torch.set_num_threads(1)
    plain = Fault()
    assert run(config, work / "reference", plain), "the job failed"
    counts = ", ".join(f"{kind} {count}" for kind, count in sorted(Counter(plain.done).items()))
    print(f"{len(plain.done)} operations: {counts}")
    begin = run if by == "kill" else survived
    disturbed, wrong = 0, list[str]()
    for number in range(1, len(plain.done) + 1)[numbers]:
        output = work / f"trial-{number}"
        first = forked(lambda number=number, output=output: begin(config, output, Fault(by, number)))
        if not first and by == "kill":
            print(f"{number:4d}: it was over")  # `job.json` is written now and then, by the clock
            continue
        disturbed += 1
        place = f"{plain.done[number - 1]}, {reached(output)}"
        then = forked(lambda output=output: run(config, output, Fault()))
        expected = -signal.SIGKILL if by == "kill" else 0
        if first == expected and then == 0 and same_result(work / "reference", output):
            shutil.rmtree(output)
        else:
            place += f" -> ended with {first}, then with {then}"
            wrong.append(f"{number}: {place}")
        print(f"{number:4d}: {place}", flush=True)
    return disturbed, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="at each n-th operation (default: at all)")
    parser.add_argument("--first", type=int, default=1, help="from this one on, counted from 1 (default: 1)")
    parser.add_argument("--last", type=int, default=None, help="up to this one (default: the last)")
    parser.add_argument("--by", choices=("kill", *FAULTS), default="kill", help="what happens (default: kill)")
    parser.add_argument("--steps", type=int, default=3, help="length of the job (default: 3)")
    parser.add_argument("--job", choices=JOBS, default="dora", help="which (default: dora)")
    parser.add_argument("--model", default=None, help="a diffusers folder instead of the embedded tiny model")
    options = parser.parse_args()
    model = {"folder": str(Path(options.model).resolve())} if options.model else {}
    with tempfile.TemporaryDirectory(prefix="chromakit-kills-") as work:
        data = write_images(Path(work, "pictures"), 0, count=2)
        write_images(Path(work, "pictures-2"), 1, count=2, size=(128, 64))
        config = TrainingConfig.parse(job_config(data, model, options.steps, options.job))
        numbers = slice(options.first - 1, options.last, options.every)
        disturbed, wrong = disturb_each(config, Path(work), options.by, numbers)
    print(*wrong, f"identical {disturbed - len(wrong)} of {disturbed}", sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
