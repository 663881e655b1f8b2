"""Kill training at each of its file operations in turn, resume it, compare with an uninterrupted run bit for bit.

    OMP_NUM_THREADS=1 python -m tools.kill_at_files
    OMP_NUM_THREADS=1 python -m tools.kill_at_files --every 40

A short job writes, syncs, renames and removes some hundred times. Trial n is a process that runs it and is killed
(SIGKILL) at its n-th operation: a write is half done then, all others have not begun. Another process resumes the job.
Processes are forked from one that has run the job, so that a trial takes a second or two. The last line is `identical K
of N`, and the exit status is 0 when K = N. Not on Windows.
"""

from __future__ import annotations

import argparse
import builtins
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

from chroma_core.training.config import TrainingConfig
from chroma_core.training.jobs.blocking import run_job
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


def run(config: TrainingConfig, output: Path, kill_at: int = 0) -> tuple[str, list[str]]:
    """Run or resume the job in `output`; returns its final state, and what it did to files. Dies at operation
    `kill_at`, counted from 1."""
    done: list[str] = []

    def told(kind: str, path: str, half: Callable[[], None]) -> None:
        done.append(kind)
        if len(done) == kill_at:
            half()
            os.kill(os.getpid(), signal.SIGKILL)

    with FileOperations(output, told).watched():
        status = run_job(config, output / "jobs", output / "loras", "cpu")
    return status["state"], done


def forked(work: Callable[[], object]) -> int:
    """How a fork of this process ended that has done that: its exit status (0: `work` gave something true), or minus
    the signal that killed it."""
    sys.stdout.flush()
    child = os.fork()
    if not child:
        status = 2
        try:
            status = 0 if work() else 1
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_at_each(config: TrainingConfig, work: Path, every: int = 1, first: int = 1) -> tuple[int, list[str]]:
    """Kill the job at each `every`-th operation from the `first` one on.

    Returns how often, and what did not go on to the same end.
    """
    torch.set_num_threads(1)
    state, operations = run(config, work / "reference")
    assert state == "completed", state
    counts = ", ".join(f"{kind} {count}" for kind, count in sorted(Counter(operations).items()))
    print(f"{len(operations)} operations: {counts}")
    kills, wrong = 0, list[str]()
    for number in range(first, len(operations) + 1, every):
        output = work / f"trial-{number}"
        killed = forked(lambda number=number, output=output: run(config, output, number)[0] == "completed")
        if not killed:
            print(f"{number:4d}: it was over")  # `job.json` is written now and then, by the clock
            continue
        kills += 1
        place = f"{operations[number - 1]}, {reached(output)}"
        ended = forked(lambda output=output: run(config, output)[0] == "completed")
        if killed == -signal.SIGKILL and ended == 0 and same_result(work / "reference", output):
            shutil.rmtree(output)
        else:
            place += f" -> ended with {killed}, then with {ended}"
            wrong.append(f"{number}: {place}")
        print(f"{number:4d}: {place}", flush=True)
    return kills, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="kill at each n-th operation (default: at all)")
    parser.add_argument("--first", type=int, default=1, help="of them, counted from 1 (default: 1)")
    parser.add_argument("--steps", type=int, default=3, help="length of the job (default: 3)")
    parser.add_argument("--job", choices=JOBS, default="dora", help="which (default: dora)")
    parser.add_argument("--model", default=None, help="a diffusers folder instead of the embedded tiny model")
    options = parser.parse_args()
    model = {"folder": str(Path(options.model).resolve())} if options.model else {}
    with tempfile.TemporaryDirectory(prefix="chromakit-kills-") as work:
        data = write_images(Path(work, "pictures"), 0, count=2)
        write_images(Path(work, "pictures-2"), 1, count=2, size=(128, 64))
        config = TrainingConfig.parse(job_config(data, model, options.steps, options.job))
        kills, wrong = kill_at_each(config, Path(work), options.every, options.first)
    print(*wrong, f"identical {kills - len(wrong)} of {kills}", sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
