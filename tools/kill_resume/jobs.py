"""The jobs that `trials.py` kills, and a watch that tells what a job is doing at the moment."""

from __future__ import annotations

import random
import sys
import threading
import time
from pathlib import Path
from typing import Any

WORDS = ("a red circle", "a blue square", "a green circle on a blue background", "sks", "a photo of sks")

JOBS = ("plain", "dora", "lokr")


def job_config(data: Path, model: dict[str, Any], steps: int, job: str = "plain") -> dict[str, Any]:
    """A small job that passes through everything: caching, accumulation, dropout, validation, previews, checkpoints.

    `plain` is LoRA with AdamW. `dora` and `lokr` add what keeps a state of its own or draws by chance: averaged
    weights, Prodigy and schedule-free AdamW, the best checkpoint, gradient checkpointing, a second data set, random
    crops and latents drawn from the posterior, a regularisation set, paired and offset noise.
    """
    dataset = {"folder": str(data), "trigger": "sks", "caption_dropout": 0.2, "flip": True}
    second = {"folder": str(data.with_name(f"{data.name}-2")), "caption_dropout": 0.2, "weight": 0.5}
    common = {
        "name": "kill-resume",
        "model": {"flavour": "tiny", "precision": "fp32", "text_precision": "fp32", **model},
        "dataset": dataset,
        "validation_dataset": {"folder": str(data)},
        "validation_pictures": 2,
        "lora": {"rank": 4, "dropout": 0.1},
        "previews": {"prompts": ["[trigger]"], "every": steps // 3, "steps": 2, "guidance": 2.0},
        "steps": steps,
        "batch_size": 2,
        "gradient_accumulation": 2,
        "learning_rate": 1e-3,
        "warmup_steps": 5,
        "lr_schedule": "cosine",
        "gradient_checkpointing": False,
        "validate_every": steps // 2,
        "checkpoint_every": max(1, steps // 8),
        "keep_checkpoints": 2,
    }
    newer = {"gradient_checkpointing": True, "validate_every": max(1, steps // 4), "keep_best": True}
    changes: dict[str, dict[str, Any]] = {
        "plain": {},
        "dora": {
            **newer,
            "lora": {"kind": "dora", "rank": 4, "dropout": 0.1, "ema_decay": 0.9},
            "optimizer": "prodigy",
            "learning_rate": 1.0,
            "checkpointing_interval": 2,
            "more_datasets": [second],
            "objective": {"loss": "huber", "noise_offset": 0.05},
        },
        "lokr": {
            **newer,
            "lora": {"kind": "lokr", "rank": 2, "ema_decay": 0.9},
            "optimizer": "schedule-free",
            "lr_schedule": "constant",
            "dataset": {**dataset, "crop": "random", "random_crops": 2, "latents": "sample", "posterior_samples": 2},
            "more_datasets": [{**second, "regularisation": True}],
            "objective": {"pair_noise": True, "remap": "none"},
        },
    }
    return {**common, **changes[job]}


def write_pictures(folder: Path, seed: int, count: int = 8, size: tuple[int, int] = (64, 64)) -> Path:
    """Pictures of 4×4 random colours, with captions; returns the folder."""
    from PIL import Image

    chance = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        colours = bytes(chance.randrange(256) for _ in range(4 * 4 * 3))
        Image.frombytes("RGB", (4, 4), colours).resize(size).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(WORDS[i % len(WORDS)])
    return folder


PHASES = ("start", "caching", "loading", "training", "held-out loss", "preview", "checkpoint", "finish")
_FUNCTIONS = {
    "run_training": "loading",
    "prepare": "caching",
    "train": "training",
    "_measure": "held-out loss",
    "render_previews": "preview",
    "save_checkpoint": "checkpoint",
    "finish": "finish",
}
"""Functions of the trainer and what it is doing while they run; the innermost one counts."""


def watch(phase: Any, every: float = 0.002) -> None:
    """Write into the shared number `phase`, again and again, the index in `PHASES` of what the trainer is doing.

    It only reads the trainer's stack, from a thread of its own, so the job that is watched is the job that users run.
    """

    def look() -> None:
        while True:
            trainer = next((t.ident for t in threading.enumerate() if t.name == "chromakit-training"), None)
            frame = None if trainer is None else sys._current_frames().get(trainer)
            found = "start"
            while frame is not None:
                if "chroma_core" in frame.f_code.co_filename and frame.f_code.co_name in _FUNCTIONS:
                    found = _FUNCTIONS[frame.f_code.co_name]
                    break
                frame = frame.f_back
            phase.value = PHASES.index(found)
            time.sleep(every)

    threading.Thread(target=look, daemon=True).start()
