"""Run Python with a simulated CUDA card, which has memory but computes nothing: `python run.py SCRIPT [ARGUMENTS]`.

See README.md beside this file.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
CACHE = HERE.parents[2] / "test-output" / "nullgpu"
RUNTIME, DRIVER = "libnullrt.so", "libcuda.so.1"


class CannotBuild(Exception):
    """There is no compiler, or no CUDA header; the words say which."""


def build() -> Path:
    """The folder of the two libraries, built where these sources were not built before."""
    digest = hashlib.sha256()
    for source in sorted(path for path in HERE.rglob("*") if path.suffix in (".c", ".h")):
        digest.update(source.read_bytes())
    folder = CACHE / digest.hexdigest()[:16]
    if folder.is_dir():
        return folder
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if sys.platform != "linux" or compiler is None:
        raise CannotBuild("the simulated card needs Linux and a C compiler")
    headers = next(
        (path for place in sys.path for path in Path(place).glob("nvidia/*/include/cuda_runtime_api.h")), None
    )
    if headers is None:
        raise CannotBuild("the simulated card needs the CUDA headers, which come with torch's wheel for CUDA")
    scratch = CACHE / f"{folder.name}.{os.getpid()}"
    scratch.mkdir(parents=True)
    shared = [compiler, "-shared", "-fPIC", "-O1", "-w"]
    includes = ["-I", HERE / "include", "-I", headers.parent]
    sources = [HERE / "runtime.c", HERE / "products.c", "-lpthread"]
    subprocess.run([*shared, *includes, "-o", scratch / RUNTIME, *sources], check=True)
    subprocess.run([*shared, "-o", scratch / DRIVER, HERE / "driver.c"], check=True)
    try:
        scratch.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(scratch)
    return folder


def environment(gib: float = 24, capability: int = 89) -> dict[str, str]:
    """The environment of a process that sees a card of that size and compute capability; builds the libraries."""
    folder = build()
    paths = [str(folder), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    return {
        "OMP_NUM_THREADS": "1",
        **os.environ,
        "LD_LIBRARY_PATH": os.pathsep.join(paths),
        "LD_PRELOAD": str(folder / RUNTIME),
        "NULL_GPU_LIBRARY": str(folder / RUNTIME),
        "NULL_GPU_GIB": os.environ.get("NULL_GPU_GIB", str(gib)),
        "NULL_GPU_SM": os.environ.get("NULL_GPU_SM", str(capability)),
    }


if __name__ == "__main__":
    try:
        os.execve(sys.executable, [sys.executable, *sys.argv[1:]], environment())
    except CannotBuild as error:
        sys.exit(str(error))
