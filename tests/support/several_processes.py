"""What `torchrun` runs for tests/core/training/test_processes.py, or a fork: the jobs of a list, one after the other.

The list is JSON, {"jobs": [{"config", "root", "sharding"}], "commands": [[…]]}. Process r writes what it found to
<list>.r.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from chroma_core.cli.main import main
from chroma_core.comfy.server import free_port
from chroma_core.training.config import TrainingConfig
from chroma_core.training.distributed.world import Processes
from chroma_core.training.jobs.blocking import run_distributed
from chroma_core.training.run import run


def work(path: Path) -> None:
    """Train the jobs of the list, then run its commands; each with whatever it ends with."""
    wanted = json.loads(path.read_text())
    found: list[dict] = []
    divided: list[tuple[int, int]] = []
    shard = run.shard

    def watched(transformer, *args):  # the real thing, and then a look at what each process holds
        blocks = (*transformer.transformer_blocks, *transformer.single_transformer_blocks)
        whole = sum(t.numel() for block in blocks for t in (*block.parameters(), *block.buffers()))
        shard(transformer, *args)
        tensors = [t for block in blocks for t in (*block.parameters(), *block.buffers())]
        here = sum((t.to_local() if isinstance(t, DTensor) else t).numel() for t in tensors)
        divided.append((here, whole))

    run.shard = watched
    for job in wanted["jobs"]:
        world = Processes("cpu", job["sharding"])
        root = Path(job["root"])
        config = TrainingConfig.parse(job["config"])
        status = run_distributed(config, root / "jobs", root / "loras", "cpu", world=world)
        found.append({"state": status["state"], "message": status["message"], "divided": divided[-1:]})
        divided.clear()
    codes = [main(command) for command in wanted["commands"]]
    rank = torch.distributed.get_rank()
    path.with_name(f"{path.name}.{rank}").write_text(json.dumps({"jobs": found, "codes": codes}))


def fork_two(path: Path) -> None:
    """The same without torchrun: this process and a fork of it."""
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    other = os.fork()
    rank = "0" if other else "1"
    os.environ.update(place, RANK=rank, LOCAL_RANK=rank)
    work(path)
    if other:
        assert os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]) == 0


if __name__ == "__main__":
    (work if "RANK" in os.environ else fork_two)(Path(sys.argv[1]))
