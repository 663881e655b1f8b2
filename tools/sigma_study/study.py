"""Measures how the noise levels that training visits decide what a LoRA of the embedded `tiny` model learns.

    python -m tools.sigma_study.study                  # 25 jobs, 20 minutes on one free core; what is done stays done
    python -m tools.sigma_study.study --only report    # page and images from docs/data/sigma_study.json, in seconds

Five ways to draw noise levels, the same seeds for each, everything else the same: the real trainer on the example data
set, then held-out loss at each noise level and what the LoRA generates. Writes docs/data/sigma_study.json, the images
docs/images/sigma_*.png and the tables of docs/timesteps.md. How it is measured and what came out: docs/timesteps.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny is far slower on many threads

import diffusers
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from chroma_core.lora.adapters import attach, detach
from chroma_core.lora.files import read_lora
from chroma_core.sampling.sampler import SamplingSettings, sample
from chroma_core.training.config import TrainingConfig
from chroma_core.training.jobs.blocking import run_job
from chroma_core.training.step.objective import HELDOUT_SIGMAS, heldout_loss

from ..tiny.build import check_prompts, load
from ..tiny.example_dataset import decoys, read_emblem
from ..tiny.vae import decode, encode
from ..tiny.world import plain_caption, read_image
from .report import DATA, VARIANTS, write_report

ROOT = Path(__file__).resolve().parents[2]
DATASETS = ROOT / "example_datasets"
STEPS, SEEDS = 250, 5
FIRST_SEED = 1
NOISES = 4
"""Noises for each held-out image and noise level: more than the trainer's own one, for a calmer number."""
IMAGES_PER_CAPTION, ORDINARY_PROMPTS = 4, 24
CONCEPT_SEED, ORDINARY_SEED = 1000, 5000
"""Of the noise that images start from: the same for every LoRA."""
SAMPLING: dict[str, Any] = {"steps": 20, "guidance": 4.0}  # as previews and the demo


def job_config(variant: str, seed: int, steps: int) -> dict[str, Any]:
    """The demo's job, shorter, with the noise levels of that variant."""
    model = {"flavour": "tiny", "precision": "fp32", "text_precision": "fp32"}
    return {
        "name": f"sigma-{variant.replace('_', '-')}-{seed}",
        "model": model,
        "dataset": {"folder": str(DATASETS / "sks_emblem"), "trigger": "sks", "caption_dropout": 0.1},
        "validation_dataset": {"folder": str(DATASETS / "sks_emblem_heldout"), "trigger": "sks"},
        "lora": {"rank": 16, "target": "all+ffs"},
        "objective": VARIANTS[variant],
        "steps": steps,
        "batch_size": 4,
        "learning_rate": 2e-3,
        "lr_schedule": "cosine",
        "seed": seed,
        "gradient_checkpointing": False,
        "validate_every": 0,
        "checkpoint_every": 0,
        "keep_checkpoints": 1,
    }


class Judge:
    """The model, the images held out and the prompts; `judge` measures the model with or without a LoRA."""

    sampling: ClassVar = SAMPLING

    def __init__(self) -> None:
        self.vae, self.text, self.transformer = load()
        files = sorted((DATASETS / "sks_emblem_heldout").glob("*.png"))
        self.captions = [file.with_suffix(".txt").read_text(encoding="utf-8").strip() for file in files]
        images = np.stack([np.array(Image.open(file).convert("RGB")) for file in files])
        self.readings = [read_emblem(image) for image in images]
        self.latents = encode(self.vae, images).clone()
        self.decoys = [
            encode(self.vae, decoys(r.background, r.cx, r.cy, r.radius)).clone() for r in self.readings
        ]  # [12, 16, 8, 8] for each
        self.ordinary = check_prompts(ORDINARY_PROMPTS)
        self.empty = self.text.encode("")
        self.base_ordinary: dict[float | None, Tensor] = {}

    def generate(self, prompts: list[str], seed: int, guidance: float | None = None) -> Tensor:
        """Latents [B, 16, 8, 8] of the prompts; image i starts from the noise of seed + i."""
        conditions = [self.text.encode(prompt) for prompt in prompts]
        settings = SamplingSettings(**self.sampling, seed=seed)
        if guidance is not None:
            settings = replace(settings, guidance=guidance)
        return sample(self.transformer, conditions, self.empty, width=64, height=64, settings=settings)

    def judge(
        self, lora: Path | None, sheet: Path | None = None, guidance: float | None = None, strength: float = 1.0
    ) -> dict[str, Any]:
        """Every number of one LoRA (None: the base, which comes first); `sheet` is a file for the images."""
        with self.wearing(lora, strength):
            return self._measured(sheet, guidance)

    @contextmanager
    def wearing(self, lora: Path | None, strength: float = 1.0) -> Iterator[None]:
        """The model with a LoRA (None: without), inside a `with` block."""
        if lora is not None:
            attach(self.transformer, read_lora(lora), strength)
        try:
            yield
        finally:
            if lora is not None:
                detach(self.transformer, "lora")

    def _measured(self, sheet: Path | None, guidance: float | None) -> dict[str, Any]:
        held = list(zip(self.latents, (self.text.encode(caption) for caption in self.captions), strict=True))
        losses = heldout_loss(self.transformer, held * NOISES)
        which = [i for i in range(len(self.captions)) for _ in range(IMAGES_PER_CAPTION)]
        concept = self.generate([self.captions[i] for i in which], CONCEPT_SEED, guidance)
        ordinary = self.generate([plain_caption(*triple) for triple in self.ordinary], ORDINARY_SEED, guidance)
        before = self.base_ordinary.setdefault(guidance, ordinary)
        images, plain = decode(self.vae, concept), decode(self.vae, ordinary)
        emblems = [read_emblem(image) for image in images]
        shapes = [read_image(image) for image in plain]
        if sheet is not None:
            cells = np.concatenate([images, plain])
            rows = [np.concatenate(list(cells[i : i + 12]), axis=1) for i in range(0, len(cells), 12)]
            Image.fromarray(np.concatenate(rows)).save(sheet)
        return {
            "heldout_by_sigma": [round(loss, 6) for loss in losses],
            "concept_right": float(
                np.mean([e.right(self.readings[i].background) for e, i in zip(emblems, which, strict=True)])
            ),
            "concept_iou": float(np.mean([e.iou for e in emblems])),
            "likeness": float(np.mean([self._likeness(z, i) for z, i in zip(concept, which, strict=True)])),
            "ordinary_right": float(
                np.mean([(r.shape, r.colour, r.background) == t for r, t in zip(shapes, self.ordinary, strict=True)])
            ),
            "ordinary_drift": float((ordinary - before).square().mean(dim=(1, 2, 3)).sqrt().mean()),
        }

    def _likeness(self, latents_CHW: Tensor, i: int) -> float:
        """1 − d(emblem) / mean d(decoys): 1 for held-out image i itself, 0 when it is no nearer than other shapes."""
        emblem = (latents_CHW - self.latents[i]).square().mean().sqrt()
        others = (latents_CHW - self.decoys[i]).square().mean(dim=(1, 2, 3)).sqrt().mean()
        return float(1 - emblem / others)


def study(seeds: int, steps: int, output: Path, only: list[str]) -> bool:
    """Train and judge what is not done yet, seed by seed; once all is done, write `DATA`. Whether all is done."""
    output.mkdir(parents=True, exist_ok=True)
    judge = Judge()
    base = judge.judge(None, output / "base.png")
    print(f"base: {_short(base)}", flush=True)
    runs = []
    for seed in range(FIRST_SEED, FIRST_SEED + seeds):
        for variant in VARIANTS:
            wanted = not only or variant in only
            found = judged(variant, seed, job_config(variant, seed, steps), judge, output, wanted)
            runs += [found] if found else []
    if len(runs) < seeds * len(VARIANTS):
        print(f"{len(runs)} of {seeds * len(VARIANTS)} runs are done; numbers and page stay as they are until all are")
        return False
    common = job_config("none", 0, steps)
    settings = {key: common[key] for key in ("lora", "steps", "batch_size", "learning_rate", "lr_schedule")}
    settings |= {"painting": SAMPLING, "noises": NOISES, "ordinary_prompts": ORDINARY_PROMPTS}
    settings |= {"concept_pictures": IMAGES_PER_CAPTION * len(judge.captions), "sigmas": HELDOUT_SIGMAS}
    write_runs(DATA, settings, base, runs)
    return True


def judged(
    variant: str, seed: int, values: dict[str, Any], judge: Judge, output: Path, wanted: bool = True
) -> dict[str, Any] | None:
    """The numbers of one job, trained and judged, or as an earlier call has left them; None if it is not `wanted`."""
    config = TrainingConfig.parse(values)
    result = output / f"{config.job_id()}.json"
    if not result.is_file():
        if not wanted:
            return None
        started, used = time.monotonic(), time.process_time()
        status = run_job(config, output / "jobs", output / "loras", "cpu")
        if status["state"] != "completed" or status["lora_path"] is None:
            raise SystemExit(f"{variant}, seed {seed}: the job {status['state']}: {status['message']}")
        used = time.process_time() - used
        numbers = judge.judge(Path(str(status["lora_path"])), result.with_suffix(".png"))
        numbers |= {"trainer_heldout_loss": status["heldout_loss"], "train_seconds": status["train_seconds"]}
        found = {"variant": variant, "seed": seed, **numbers, "cpu_seconds": round(used, 1)}
        result.write_text(json.dumps(found) + "\n", encoding="utf-8")
        print(f"{variant}, seed {seed} ({time.monotonic() - started:.0f} s): {_short(found)}", flush=True)
    return json.loads(result.read_text(encoding="utf-8"))


def write_runs(path: Path, settings: dict[str, Any], base: dict[str, Any], runs: list[dict[str, Any]]) -> None:
    """A study's numbers as JSON, one run a line."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "diffusers": diffusers.__version__}
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ",\n".join("    " + json.dumps(run) for run in runs)
    head = {"settings": settings, "versions": versions, "base": base}
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items())
    path.write_text(f'{{\n{lines},\n  "runs": [\n{rows}\n  ]\n}}\n', encoding="utf-8")


def _short(values: dict[str, Any]) -> str:
    loss = sum(values["heldout_by_sigma"]) / len(HELDOUT_SIGMAS)
    numbers = ("concept_right", "concept_iou", "likeness", "ordinary_right", "ordinary_drift")
    return f"held-out loss {loss:.4f}, " + ", ".join(f"{key} {values[key]:.3f}" for key in numbers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"runs of each variant (default: {SEEDS})")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"length of each job (default: {STEPS})")
    parser.add_argument("--output", type=Path, default=ROOT / "sigma-study", help="jobs and LoRAs (sigma-study)")
    parser.add_argument(
        "--only", nargs="+", default=[], choices=[*VARIANTS, "report"], help="train these alone, or only write the page"
    )
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error("one seed has no spread: --seeds must be 2 or more")
    torch.set_num_threads(1)
    only = [name for name in options.only if name != "report"]
    if options.only == ["report"] or study(options.seeds, options.steps, options.output.resolve(), only):
        write_report()


if __name__ == "__main__":
    main()
