"""Processes that begin with the libraries imported: forks of one that has done that, at a tenth of a start's cost.

Like `python` with the same arguments, in all else: environment, folder, output and end are a process's own. Where
there is no fork, a process is started as usual.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LIGHT = "import torch, chroma_core.model.flavours, chroma_core.weights.opening"
"""What loads without huggingface_hub, which reads the environment once."""
FULL = "import torch._dynamo, transformers.models.auto.tokenization_auto, chroma_core.training.jobs.manager"
NATIVE = "import native_lora_check; native_lora_check.import_host()"
"""ComfyUI's own modules, as scripts/native_lora_check.py imports them."""


def run(
    imports: str,
    *arguments: object,
    cwd: Path = ROOT,
    env: dict[str, str] | None = None,
    timeout: int = 300,
    begun: Callable[[int], object] = lambda pid: None,
) -> subprocess.CompletedProcess[str]:
    """What `python *arguments` does, in a process that has run `imports`; arguments: -c CODE …, or FILE ….

    What `env` says to the loader of libraries (LD_PRELOAD: the simulated card) holds while `imports` run, too.
    `begun` is told the id of a process that is forked.
    """
    words = [str(argument) for argument in arguments]
    paths = os.pathsep.join(str(ROOT / folder) for folder in ("", "scripts", "tests/support"))
    environment = {**os.environ, **(env or {}), "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    if not hasattr(os, "fork"):
        command = [sys.executable, *words]
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)
    with tempfile.TemporaryDirectory() as folder:
        outputs = [str(Path(folder, name)) for name in ("stdout", "stderr")]
        loader = tuple((name, value) for name, value in environment.items() if name.startswith("LD_"))
        parent = _parent(imports, paths, loader)
        wanted = {"arguments": words, "cwd": str(cwd), "environment": environment, "outputs": outputs}
        code = parent.ask(begun, **wanted, timeout=timeout)
        stdout, stderr = (Path(path).read_text(encoding="utf-8") for path in outputs)
    return subprocess.CompletedProcess(words, code, stdout, stderr)


class _Parent:
    """The process that is forked, from outside."""

    def __init__(self, imports: str, paths: str, loader: tuple[tuple[str, str], ...]):
        environment = {**os.environ, **dict(loader), "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
        command = [sys.executable, __file__, imports]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        atexit.register(self.end)

    def end(self) -> None:
        """End it, and leave nothing of it open."""
        self.process.kill()
        self.process.communicate()

    def ask(self, begun: Callable[[int], object], **wanted: Any) -> int:
        """The exit status of a child that does what is wanted; negative: the signal that ended it."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(wanted), file=self.process.stdin, flush=True)
        child = self.process.stdout.readline()
        assert child, "the imports failed; their error is above"
        begun(int(child))
        return int(self.process.stdout.readline())


_parent = cache(_Parent)


def _serve(imports: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library says when it is imported is no answer
    exec(imports, {})  # noqa: S102
    gc.collect()
    gc.freeze()  # what was imported stays: a child looks through what is its own alone, and copies no page for it
    for line in sys.stdin:
        child = os.fork()
        if not child:
            _become(**json.loads(line))
        print(child, file=answers, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


def _become(arguments: list[str], cwd: str, environment: dict[str, str], outputs: list[str], timeout: int) -> None:
    """Do in this process what `python *arguments` does, and end it."""
    status: object = 1
    try:
        signal.alarm(timeout)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, path in enumerate(outputs, start=1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
        os.chdir(cwd)
        os.environ.clear()
        os.environ.update(environment)
        if arguments[0] == "-c":
            sys.path[0], sys.argv = cwd, ["-c", *arguments[2:]]
            exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})  # noqa: S102
        else:
            sys.path[0], sys.argv = str(Path(arguments[0]).parent), arguments
            runpy.run_path(arguments[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code
        if isinstance(status, str):
            print(status, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else int(status is not None))


if __name__ == "__main__":
    _serve(sys.argv[1])
