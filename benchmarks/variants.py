"""Every kind of adapter, optimizer and stored base trained on `tiny`: what it learns, and its time against the plain.

python benchmarks/variants.py --write      about five minutes on one CPU core; rewrites the table in docs/optimizers.md

Each row is a whole job of the real trainer on the bundled images, with the same seed, steps and batches. The held-out
loss is the job's own. The time of a step is the median of its `seconds`, a ratio to the first row of the same run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.pages import fill, markdown_table  # noqa: E402

PAGE = ROOT / "docs" / "optimizers.md"
DATA = ROOT / "example_datasets" / "sks_emblem"

VARIANTS: dict[str, dict[str, Any]] = {
    "LoRA, AdamW, fp32 base": {},
    "bf16 base": {"model": {"precision": "bf16"}},
    "int8 base": {"model": {"precision": "int8"}},
    "fp8 base": {"model": {"precision": "fp8"}},
    "int4 base": {"model": {"precision": "int4"}},
    "nf4 base": {"model": {"precision": "nf4"}},
    "rsLoRA": {"lora": {"kind": "rslora"}},
    "DoRA": {"lora": {"kind": "dora"}},
    "LoKr": {"lora": {"kind": "lokr"}},
    "adamw8bit": {"optimizer": "adamw8bit"},
    "adafactor": {"optimizer": "adafactor"},
    "prodigy (rate 1)": {"optimizer": "prodigy", "learning_rate": 1.0},
    "schedule-free": {"optimizer": "schedule-free"},
    "came (rate 6e-4, 20 steps warm-up)": {"optimizer": "came", "learning_rate": 6e-4, "warmup_steps": 20},
    "DoRA, adamw8bit, nf4 base": {"optimizer": "adamw8bit", "lora": {"kind": "dora"}, "model": {"precision": "nf4"}},
    "single_blocks.4-5 in full rank": {"full": {"target": "single_blocks.4-5", "layouts": ["original"]}},
    "compiled (inductor)": {"compile": True},
}


def config(name: str, changes: dict[str, Any], steps: int) -> dict[str, Any]:
    """The job of a row."""
    model = {"flavour": "tiny", "precision": "fp32", "text_precision": "fp32", **changes.get("model", {})}
    values: dict[str, Any] = {
        "name": name,
        "dataset": {"folder": str(DATA), "trigger": "sks"},
        "validation_dataset": {"folder": f"{DATA}_heldout"},
        "steps": steps,
        "batch_size": 4,
        "learning_rate": 2e-3,
        "gradient_checkpointing": False,
        "validate_every": 0,
        "checkpoint_every": 0,
        **{key: value for key, value in changes.items() if key not in ("model", "lora")},
        "model": model,
    }
    if "full" in changes:
        values["learning_rate"] = 2e-4
    else:
        values["lora"] = {"rank": 16, "target": "all+ffs", **changes.get("lora", {})}
    return values


def state_bytes(checkpoint: Path) -> int:
    """Bytes of the optimizer's tensors in a checkpoint."""
    import torch

    def size(value: Any) -> int:
        if isinstance(value, torch.Tensor):
            return value.numel() * value.element_size()
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
        return sum(map(size, parts))

    return size(torch.load(checkpoint / "optimizer.pt", weights_only=True))


def measure(name: str, changes: dict[str, Any], steps: int, folder: Path) -> dict[str, Any]:
    """One row: losses, seconds a step, bytes of the optimizer's state; or why it did not run."""
    from chroma_core.training.config import TrainingConfig
    from chroma_core.training.jobs.blocking import run_job
    from chroma_core.training.run.metrics import MetricsLog

    status = run_job(TrainingConfig.parse(config(name, changes, steps)), folder / "jobs", folder / "loras", "cpu")
    if status["state"] != "completed":
        return {"name": name, "reason": status["message"]}
    job = folder / "jobs" / status["id"]
    seconds = [line["seconds"] for line in MetricsLog(job / "metrics.jsonl").read() if "seconds" in line]
    newest = sorted((job / "checkpoints").iterdir())[-1]
    return {
        "name": name,
        "before": status["heldout_loss_base"],
        "after": status["heldout_loss"],
        "seconds": statistics.median(seconds[len(seconds) // 4 :]),
        "state": state_bytes(newest),
    }


def table(rows: list[dict[str, Any]], steps: int) -> str:
    """The rows as Markdown."""
    first = rows[0]["seconds"]
    lines = [
        (row["name"], f"did not run: {row['reason']}")
        if "reason" in row
        else (
            row["name"],
            f"{row['before']:.3f} → {row['after']:.3f}",
            f"{row['seconds'] / first:.2f} ×",
            f"{row['state'] / 2**20:.2f} MiB",
        )
        for row in rows
    ]
    return (
        f"{steps} steps of batch 4 on `tiny`, rank 16, target `all+ffs`, rate 2e-3 (full rank: 2e-4), one CPU core:\n\n"
        + markdown_table(lines, ("", "validation loss before → after", "step time", "optimizer's state"))
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=80, help="training steps of each job (default: 80)")
    parser.add_argument("--only", action="append", help="a row's name; repeat for several")
    parser.add_argument("--write", action="store_true", help="put the table into docs/optimizers.md")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, changes in VARIANTS.items():
            if options.only and name not in options.only:
                continue
            rows.append(measure(name, changes, options.steps, Path(folder)))
            print(rows[-1], flush=True)
    text = table(rows, options.steps)
    print(text)
    if options.write:
        fill(PAGE, "variants", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
