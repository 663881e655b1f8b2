"""What the training tests share: a random miniature model on disk, small data sets, and a job configuration."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import torch
from PIL import Image

import forked
from chroma_core.loading.load import load_transformer
from chroma_core.training.config import TrainingConfig
from chroma_core.training.control import Control, DeviceSlot, Stopped
from chroma_core.training.jobs.job import Job
from chroma_core.training.run.loop import Batches, StepResult, train_step
from chroma_core.training.run.metrics import JobPaths
from chroma_core.training.run.prepare import prepare
from chroma_core.training.run.stepper import Stepper
from chroma_core.training.run.trained import make_trained
from chroma_core.training.run.verdict import Record, verdict
from miniature import write_model_folder

CAPTIONS = ("a red circle", "sks on a blue background", "a photo", "green square on red background", "sks")


def model_folder(folder: Path) -> Path:
    """A whole random miniature model; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        return write_model_folder(folder)


def write_dataset(folder: Path, count: int = 6, size: tuple[int, int] = (64, 64), seed: int = 0) -> Path:
    """`count` images of coarse random colours with captions of unequal length."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        blocks = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        blocks.resize(size).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(CAPTIONS[i % len(CAPTIONS)])
    return folder


def config(model: Path, data: Path, /, **changes: Any) -> TrainingConfig:
    """A job of 8 steps on the miniature, without previews; `changes` replace parts of it."""
    values: dict[str, Any] = {
        "name": "Test Job",
        "model": {"flavour": "tiny", "folder": str(model), "precision": "fp32", "text_precision": "fp32"},
        "dataset": {"folder": str(data), "caption_dropout": 0.0},
        "lora": {"rank": 4},
        "steps": 8,
        "learning_rate": 1e-2,
        "gradient_checkpointing": False,
        "checkpoint_every": 4,
        "validate_every": 4,
    }
    return TrainingConfig.parse({**values, **changes})


KILLED = """
import json, os, signal, sys
from pathlib import Path
from chroma_core.training.config import TrainingConfig
from chroma_core.training.jobs.manager import JobManager
manager = JobManager(Path(sys.argv[1], "jobs"), Path(sys.argv[1], "loras"), "cpu")
def look(status):
    if status["step"] >= int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
manager.subscribe(look)
configs = [TrainingConfig.parse(each) for each in json.loads(sys.argv[3])]
[manager.ensure(each) for each in configs][0].wait()
"""


def killed(folder: Path, step: int, *settings: TrainingConfig) -> None:
    """Start jobs in `folder`/jobs in another process, which SIGKILL ends when the first has reached that step."""
    given = "[" + ",".join(each.model_dump_json() for each in settings) + "]"
    ended = forked.run(forked.FULL, "-c", KILLED, folder, step, given)
    assert ended.returncode == -signal.SIGKILL, ended.stderr


def verdicts(job: Job) -> list[dict[str, Any]]:
    """What was said at each validation."""
    lines = job.metrics()
    ends = [i + 1 for i, line in enumerate(lines) if "heldout_loss" in line]
    return [found.to_dict("") for found in (verdict(Record.of(lines[:end])) for end in ends) if found]


def at_the_gate(control: Control, passed: threading.Semaphore, look: Callable[[], None] = lambda: None) -> Thread:
    """A started thread that passes the gate of `control` until it is stopped; after each time it looks, and says so."""

    def work() -> None:
        try:
            while True:
                control.gate()
                look()
                passed.release()
                control.stop.wait(0.005)
        except Stopped:
            pass

    worker = Thread(target=work)
    worker.start()
    return worker


class Bench:
    """A prepared configuration without a job around it: transformer with adapter, optimizer, batches."""

    def __init__(self, settings: TrainingConfig, cache: Path):
        self.config = settings
        self.data = prepare(settings, cache, DeviceSlot("cpu"), lambda **_: None, lambda *_: None)
        self.transformer = load_transformer(settings.model, "cpu")
        places = JobPaths(cache / "job", cache / "loras", cache, cache / "diffusion_models")
        self.trained = make_trained(settings, self.transformer, places, self.data.base_sha256)
        self.parameters = self.trained.parameters
        self.transformer.checkpointing_interval = int(settings.gradient_checkpointing)
        self.stepper = Stepper(self.parameters, settings.optimizer_settings(), self.trained.factors)
        self.batches = Batches(self.data.samples, self.data.cache, settings)


def bench(places: tuple[Path, Path, Path], /, **changes: Any) -> Bench:
    """A prepared configuration on (model folder, data set, cache); see `config`."""
    return Bench(config(places[0], places[1], **changes), places[2])


def steps(made: Bench, count: int, start: int = 0) -> list[StepResult]:
    """Train `count` steps, beginning with step `start`."""
    return [
        train_step(step, made.transformer, made.stepper, made.batches, made.config, casting=made.trained.casting)
        for step in range(start, start + count)
    ]
