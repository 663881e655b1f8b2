"""What `w8a8` changes on `tiny`: the loss of a whole job, and the image of the finished LoRA, beside `weights`.

    python -m benchmarks eight-bits --steps 80 --json

The same job (seed, steps, batches) with an int8 and an fp8 base in both compute modes; two more `weights` jobs with
other seeds show what chance changes. `curve`: the mean difference of the smoothed training losses at the same step.
`image`: mean difference of the 8-bit values of the job's last preview, whose noise is the same in all jobs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.turns import show
from benchmarks.variants import config
from chroma_core.training.config import TrainingConfig
from chroma_core.training.jobs.blocking import run_job
from chroma_core.training.run.metrics import MetricsLog


def trained(folder: Path, steps: int, precision: str, compute: str, seed: int) -> tuple[Any, Path]:
    """A finished job's status and folder."""
    name = f"{precision} {compute} {seed}"
    values = config(name, {"model": {"precision": precision, "compute": compute}}, steps)
    values |= {"seed": seed, "previews": {"prompts": ["a photo of [trigger]"], "every": steps, "steps": 20}}
    status = run_job(TrainingConfig.parse(values), folder / "jobs", folder / "loras", "cpu")
    assert status["state"] == "completed", status["message"]
    return status, folder / "jobs" / status["id"]


def curve(job: Path) -> np.ndarray:
    """The smoothed losses of a job."""
    return np.array([line["loss_smooth"] for line in MetricsLog(job / "metrics.jsonl").read() if "loss_smooth" in line])


def image(job: Path) -> np.ndarray:
    """The last preview."""
    return np.asarray(Image.open(sorted((job / "samples").rglob("*.png"))[-1]).convert("RGB")).astype(float)


def measure(steps: int, precision: str) -> dict[str, Any]:
    """Both modes of a precision, and chance."""
    runs = {"weights": ("weights", 0), "w8a8": ("w8a8", 0), "chance_1": ("weights", 1), "chance_2": ("weights", 2)}
    row: dict[str, Any] = {"precision": precision, "steps": steps}
    with tempfile.TemporaryDirectory() as folder:
        found = {key: trained(Path(folder), steps, precision, *run) for key, run in runs.items()}
        plain = found["weights"][1]
        row["before"] = found["weights"][0]["heldout_loss_base"]
        for key, (status, job) in found.items():
            row[f"{key}_after"] = status["heldout_loss"]
            if key != "weights":
                row[f"{key}_curve"] = float(np.abs(curve(job) - curve(plain)).mean())
                row[f"{key}_image"] = float(np.abs(image(job) - image(plain)).mean())
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=80, help="training steps of each job (default: 80)")
    parser.add_argument("--json", action="store_true", help="one JSON object a precision")
    options = parser.parse_args()
    for precision in ("int8", "fp8"):
        show(measure(options.steps, precision), options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
