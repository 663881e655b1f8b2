"""A whole job of the real Chroma, at the settings that the memory plan recommends for a card: does it fit there?

    python -m benchmarks.whole_job                          # simulated cards of 4 to 24 GB, less what a driver takes
    python -m benchmarks.whole_job --cards 6 --sizes 1024   # one of them
    python -m benchmarks.whole_job --here --sizes 512       # the CUDA card of this computer

From files to the finished LoRA: captions through T5, images through the VAE, loading, held-out losses, steps, previews,
checkpoints. The files hold zeros, and a simulated card computes nothing, so this says nothing but what fits and how
much is allocated. Every job runs in a process of its own. It takes 28 GB of empty (sparse) files, and RAM for what
the job keeps there.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.real_model import GIB, ROOT, SIMULATED, run_python
from chroma_core.memory import Machine, Settings, recommend
from chroma_core.memory.anatomy import FLUX_VAE, T5_XXL
from chroma_core.memory.plan import CHOSEN
from chroma_core.model.text_encoder import T5Encoder
from chroma_core.model.transformer import ChromaTransformer
from chroma_core.model.vae import Autoencoder
from chroma_core.training.config import TrainingConfig
from chroma_core.training.jobs.manager import JobManager
from chroma_core.weights.safetensors_files import write_safetensors
from tools.kill_resume import write_images

DRIVER_GIB = 0.6
"""What a driver and a desktop take of a card before anybody else."""
HOST_GIB = 32.0


def write_model(folder: Path) -> dict[str, str]:
    """The files of Chroma 1, T5-XXL and Flux's VAE, full of zeros; the places of `ModelSpec` that they belong to."""
    with torch.device("meta"):
        parts = {
            "transformer": ChromaTransformer().bfloat16(),
            "text_encoder": T5Encoder(**T5_XXL).bfloat16(),
            "vae": Autoencoder(**FLUX_VAE),
        }
    found = {"tokenizer": str(ROOT / "chroma_core" / "assets" / "tiny" / "tokenizer")}
    for name, module in parts.items():
        found[name] = str(folder / f"{name}.safetensors")
        state = module.state_dict()
        state.pop("encoder.embed_tokens.weight", None)
        if not Path(found[name]).exists():
            write_safetensors(found[name], state.items(), ())
    return found


def run_one(files: dict[str, str], card: float, size: int) -> dict[str, Any]:
    """Run the job in this process, on the card that it sees; `card`: GB that the recommendation is made for."""
    if SIMULATED:
        # It has no cuDNN, and torch's own convolution lays every neighbourhood out: nine images more.
        torch.nn.Conv2d._conv_forward = convolved  # type: ignore[method-assign]
        torch.isfinite = lambda numbers: torch.ones((), dtype=torch.bool)  # type: ignore[assignment] (it has no numbers)
    torch.cuda.reset_peak_memory_stats = lambda *_: None  # a job resets them, to know its own; here all counts
    machine = Machine("a card", round(card * GIB), round(HOST_GIB * GIB))
    plan = recommend(Settings("base", size=size), machine, "training")
    model = {name: getattr(plan, name) for name in CHOSEN}
    checkpointing = model.pop("gradient_checkpointing")
    with tempfile.TemporaryDirectory() as work:
        data = write_images(Path(work, "images"), 1, count=2, size=(size, size))
        config = TrainingConfig.parse(
            {
                "name": "whole job",
                "model": {"flavour": "base", **files, **model},
                "dataset": {"folder": str(data), "resolution": size},
                "validation_dataset": {"folder": str(data), "resolution": size},
                "steps": 2,
                "validate_every": 1,
                "checkpoint_every": 1,
                "gradient_checkpointing": checkpointing,
                "previews": {"prompts": "a picture", "every": 1, "steps": 1, "width": size, "height": size},
            }
        )
        manager = JobManager(Path(work, "jobs"), Path(work, "loras"), "cuda")
        job = manager.ensure(config)
        while not job.wait(1.0) and job.state != "paused":  # for want of memory
            pass
        status = job.status()
        manager.shutdown()
        log = next(Path(work, "jobs").glob("*/log.txt")).read_text(encoding="utf-8")
    statistics = torch.cuda.memory_stats()
    return {
        "card": card,
        "size": size,
        "simulated": SIMULATED,
        **model,
        "gradient_checkpointing": checkpointing,
        "fits": plan.fits,
        "planned_gib": round(plan.device_peak_bytes / GIB, 2),
        "allocated_gib": round(statistics["allocated_bytes.all.peak"] / GIB, 2),
        "reserved_gib": round(statistics["reserved_bytes.all.peak"] / GIB, 2),
        "retries": statistics["num_alloc_retries"],
        "out_of_memory": statistics["num_ooms"],
        "state": status["state"],
        "message": status["message"],
        "log": log.splitlines()[-4:] if status["state"] != "completed" else [],
    }


def convolved(layer: Any, x: Any, weight: Any, bias: Any) -> Any:
    """The shape of the result, without the result."""
    sides = (
        (side + 2 * padding - kernel) // stride + 1
        for side, padding, kernel, stride in zip(
            x.shape[2:], layer.padding, layer.kernel_size, layer.stride, strict=True
        )
    )
    return x.new_empty(x.shape[0], layer.out_channels, *sides)


def start_one(card: float, size: int, here: bool, files: Path) -> dict[str, Any]:
    """`run_one` in a process of its own, on a simulated card unless `here`."""
    arguments = ["-m", "benchmarks.whole_job", "--files", str(files), "--one", str(card), str(size)]
    done = run_python(arguments, None if here else card - DRIVER_GIB)
    if done.returncode:
        return {"card": card, "size": size, "state": f"ended with status {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cards", type=float, nargs="+", default=[4, 6, 8, 12, 16, 24], help="GB of the cards")
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024], help="pixels a side")
    parser.add_argument("--here", action="store_true", help="on the CUDA card of this computer, whatever it has")
    parser.add_argument("--files", type=Path, default=None, help="keep the empty model files in this folder")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--one", nargs=2, type=float, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        card, size = options.one
        print(json.dumps(run_one(write_model(options.files), card, int(size))))
        return 0
    wrong = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.files or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        write_model(folder)
        for card in options.cards:
            for size in options.sizes:
                row = start_one(card, size, options.here, folder)
                wrong += row["state"] != "completed"
                print(json.dumps(row) if options.json else _line(row), flush=True)
    return int(wrong > 0)


def _line(row: dict[str, Any]) -> str:
    if "planned_gib" not in row:
        return f"{row['card']:g} GB, {row['size']}: {row['state']}"
    chosen = f"{row['precision']}, T5 {row['text_precision']}, {row['offload']}, {row['resident_blocks']} resident"
    memory = f"planned {row['planned_gib']}, allocated {row['allocated_gib']}, reserved {row['reserved_gib']} GiB"
    return f"{row['card']:g} GB, {row['size']}: {row['state']} ({chosen}; {memory}) {row['message']}"


if __name__ == "__main__":
    sys.exit(main())
