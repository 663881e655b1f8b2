"""What compiling the blocks costs, in a first process and, from what PyTorch keeps on disk, in a second.

    python -m benchmarks.compiling

A LoRA of rank 16 on two double and two single blocks, 256², bf16, with gradient checkpointing: seconds of CPU of the
first step and of later ones, and how many graphs were compiled and how many came from disk. The two processes share a
new folder for PyTorch's cache, which is deleted in the end.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters

from benchmarks.real_model import ROOT, job, transformer
from chroma_core.training.run.prepare import compile_blocks

WAYS = ("not compiled", "first process", "second process")


def measure(heads: int, compiled: bool) -> dict[str, Any]:
    """The first steps of this process."""
    model = transformer("bf16", (2, 2), "cuda" if torch.cuda.is_available() else "cpu", heads=heads)
    made = job(model, "bf16", 256, 40)
    if compiled:
        compile_blocks(model)
    seconds = []
    for _ in range(4):
        started = time.process_time()
        made.step()  # which waits for the loss
        seconds.append(time.process_time() - started)
    found = counters["inductor"]
    graphs = {"compiled": found["fxgraph_cache_miss"], "from_disk": found["fxgraph_cache_hit"]}
    return {"first_s": round(seconds[0], 2), "later_s": round(min(seconds[1:]), 3), **graphs}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=6, help="the width, 128 a head; 24 are the real one")
    parser.add_argument("--way", choices=WAYS, help="only one, in this process")
    options = parser.parse_args()
    if options.way:
        print(json.dumps({"way": options.way, **measure(options.heads, options.way != WAYS[0])}))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        places = {name: str(Path(folder) / name) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
        for way in WAYS:
            command = [sys.executable, "-m", "benchmarks.compiling", "--heads", str(options.heads), "--way", way]
            subprocess.run(command, cwd=ROOT, env={**os.environ, **places}, check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
