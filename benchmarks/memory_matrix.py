"""The memory plan against a simulated card: every precision, size and way to train, by the moment of a job.

    python -m benchmarks.memory_matrix                  # a quarter of an hour; needs no GPU
    python -m benchmarks.memory_matrix --precisions int8 --sizes 512

Writes docs/data/memory_matrix.json and the table in docs/memory.md. The whole 8.9 B model is allocated, in a process
for each precision, and nothing is computed: what is compared are bytes, and they are the same on every machine.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
import weakref
from contextlib import nullcontext
from typing import Any

import torch

from benchmarks.real_model import GIB, SIMULATED, Job, condition, job, recompute, run_python, transformer
from benchmarks.whole_job import convolved
from chroma_core.memory.anatomy import FLUX_VAE
from chroma_core.memory.plan import HELDOUT_ROWS, Settings, heldout_rows
from chroma_core.model.device import release_memory
from chroma_core.model.precision import PRECISIONS
from chroma_core.model.transformer import ChromaTransformer
from chroma_core.model.vae import Autoencoder
from chroma_core.sampling.sampler import SamplingSettings, sample
from chroma_core.streaming import away
from chroma_core.training.step.objective import heldout_loss
from tools.docs.memory_table import MOMENTS, PAGE, SIMULATED_PEAKS, WAYS, simulated_table
from tools.pages import fill

CARD_GIB = 96
TEXT = 128


def measured(name: str, sizes: list[int]) -> list[dict[str, Any]]:
    """A row for each size, way and moment of one precision."""
    torch.nn.Conv2d._conv_forward = convolved  # type: ignore[method-assign]
    rows: list[dict[str, Any]] = []
    for resident in (0, 2, 18):
        model = transformer(name, device="cuda", resident=resident)
        made, vae = job(model, name), Autoencoder(**FLUX_VAE).requires_grad_(False).eval()
        for way, changes in WAYS.items():
            if changes.get("resident_blocks", 0) != resident:
                continue
            recompute(model, int(changes["gradient_checkpointing"]))
            for size in sizes:
                settings = Settings("base", name, size=size, **changes)
                made.batches.shape = (*made.batches.shape[:2], size // 8, size // 8)
                row = {"precision": name, "size": size, "way": way}
                found = moments(made, vae, settings)
                rows += [{**row, "moment": moment, "gib": round(found[moment] / GIB, 3)} for moment in MOMENTS]
        gone = [weakref.ref(model)]
        del model, made
        release_memory(gone)
    return rows


def moments(made: Job, vae: Autoencoder, settings: Settings) -> dict[str, int]:
    """What is allocated at most in each of `MOMENTS`."""
    size, rows = settings.pixels, heldout_rows(settings, HELDOUT_ROWS)
    image = torch.zeros(16, size // 8, size // 8), condition(TEXT)
    return {
        "step": peak(made.step),
        "held-out loss": peak(lambda: heldout_loss(made.model, [image], rows=rows)),
        "preview": peak(lambda: preview(made.model, vae, settings)),
    }


def peak(work: Any) -> int:
    """Bytes allocated at most while `work` runs a second time."""
    work()
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_allocated()


@torch.no_grad()
def preview(model: ChromaTransformer, vae: Autoencoder, settings: Settings) -> None:
    """One step of sampling with guidance, then the VAE: beside the model, or in its place."""
    size, text = settings.pixels, condition(TEXT)
    one = SamplingSettings(steps=1, guidance=4.0)
    latents = sample(model, [text], text, width=size, height=size, settings=one)
    with away(model, torch.device("cuda")) if settings.offload == "block" else nullcontext():
        vae.to("cuda")
        vae.decode(latents)
        vae.to("cpu")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--precisions",
        nargs="+",
        choices=list(PRECISIONS),
        default=list(PRECISIONS),
        help="those of the transformer (default: all)",
    )
    parser.add_argument("--sizes", nargs="+", type=int, default=[512, 1024], help="pixels a side")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        warnings.filterwarnings("ignore")
        print(json.dumps(measured(options.one, options.sizes)))
        return 0
    if SIMULATED:
        print("Run this without the simulated card: it starts one for each precision.", file=sys.stderr)
        return 2
    rows = []
    for name in options.precisions:
        print(name, file=sys.stderr, flush=True)
        arguments = ["-m", "benchmarks.memory_matrix", "--one", name, "--sizes", *map(str, options.sizes)]
        done = run_python(arguments, CARD_GIB)
        done.check_returncode()
        rows += json.loads(done.stdout.splitlines()[-1])
    if options.precisions == list(PRECISIONS):
        SIMULATED_PEAKS.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n", encoding="utf-8")
        fill(PAGE, "simulated", simulated_table(rows))
    print(simulated_table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
