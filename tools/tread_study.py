"""Is TREAD (Krause et al. 2025) worth having? Loss and concept against time on the embedded `tiny` model.

    python -m tools.tread_study --time              # what it saves of a step, at width 768 and 512²
    python -m tools.tread_study --seeds 1 2 3       # jobs, in the same noise as docs/timesteps.md; prints rows

In training, half of the image's tokens, another half each step, go around all blocks but the first and the last: they
are put back as they were before the second block. Sampling and validation see every token. The pack has no such option;
this script puts it into the transformer for its own jobs. Rows: `tread` with 250 steps, `plain` with as many as take
that time where computing counts, and `plain` with 250.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chroma_core.model.transformer import ChromaTransformer
from chroma_core.training.config import TrainingConfig
from chroma_core.training.jobs.blocking import run_job

STEPS, SHARE = 250, 0.5


class Routing:
    """Takes part in every pass with gradients, block by block."""

    def __init__(self, share: float, seed: int = 0):
        self.share, self.draws = share, torch.Generator().manual_seed(seed)
        self.kept, self.whole = torch.empty(0), torch.empty(0)

    def run(self, model: ChromaTransformer, run: Any, index: int, block: Any, *args: Any) -> Any:
        """What `ChromaTransformer._run` does, with fewer tokens between the first and the last block."""
        doubles = len(model.transformer_blocks)
        last = doubles + len(model.single_transformer_blocks) - 1
        if not torch.is_grad_enabled() or index in (0, last):
            return run(model, index, block, *args)
        if index == 1:
            self.whole = args[0]
            tokens = self.whole.shape[1]
            order = torch.randperm(tokens, generator=self.draws)
            self.kept = order[: round(tokens * (1 - self.share))].sort().values.to(self.whole.device)
            args = (self.whole[:, self.kept], *args[1:])
        *tensors, rotary, mask = args
        text = len(rotary[0]) - self.whole.shape[1]
        places = torch.cat([torch.arange(text, device=self.kept.device), text + self.kept])
        rotary = tuple(turns[places] for turns in rotary)
        found = run(model, index, block, *tensors, rotary, None if mask is None else mask[..., places])
        if index < last - 1:
            return found
        image = self.whole.index_copy(1, self.kept, found[:, text:])
        return torch.cat([found[:, :text], image], dim=1)


@contextmanager
def routed(share: float) -> Iterator[None]:
    """Every transformer routes in its passes with gradients; share 0: none does."""
    plain, routing = ChromaTransformer._run, Routing(share)
    if share:
        ChromaTransformer._run = lambda self, *args: routing.run(self, plain, *args)  # type: ignore[method-assign]
    try:
        yield
    finally:
        ChromaTransformer._run = plain  # type: ignore[method-assign]


def saved(share: float, rounds: int) -> dict[str, float]:
    """CPU seconds of a step of width 768, 4+8 blocks, 512², without checkpointing: plain, routed, and their ratio."""
    from benchmarks.real_model import job, transformer

    made = job(transformer("bf16", (4, 8), "cpu", heads=6), "bf16", 512, 40, checkpointing=False)
    times: dict[float, list[float]] = {0.0: [], share: []}
    for number in range(rounds + 1):
        for each, found in times.items():
            with routed(each):
                started = time.process_time()
                made.step()
            if number:
                found.append(time.process_time() - started)
    plain, tread = min(times[0.0]), min(times[share])
    return {"plain_s": plain, "tread_s": tread, "ratio": tread / plain}


def row(judge: Any, share: float, steps: int, seed: int) -> dict[str, Any]:
    """One job, judged."""
    from tools.sigma_study.study import job_config

    with tempfile.TemporaryDirectory() as folder, routed(share):
        started = time.process_time()
        config = TrainingConfig.parse(job_config("quadratic", seed, steps))
        status = run_job(config, Path(folder) / "jobs", Path(folder) / "loras", "cpu")
        took = time.process_time() - started
        assert status["state"] == "completed", status["message"]
        found = judge.judge(Path(str(status["lora_path"])))
    losses: list[Tensor] = found.pop("heldout_by_sigma")
    loss = sum(losses) / len(losses)
    return {"way": "tread" if share else "plain", "steps": steps, "seed": seed, "loss": loss, "cpu_s": took, **found}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--time", action="store_true", help="only measure what a step saves")
    parser.add_argument("--rounds", type=int, default=4, help="how often the step is timed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="one job each")
    parser.add_argument("--share", type=float, default=SHARE, help="of the image's tokens that go around")
    parser.add_argument("--ratio", type=float, default=0.6, help="what --time said")
    options = parser.parse_args()
    if options.time:
        print(json.dumps(saved(options.share, options.rounds)))
        return 0
    from tools.sigma_study.study import Judge

    judge = Judge()
    for seed in options.seeds:
        for share, steps in ((options.share, STEPS), (0.0, round(STEPS * options.ratio)), (0.0, STEPS)):
            found = row(judge, share, steps, seed)
            print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in found.items()}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
