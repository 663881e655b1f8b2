"""Kill training with SIGKILL at random moments, resume it, compare the LoRA bit for bit with an uninterrupted run's.

    python scripts/kill_resume.py --kills 10 --seed 0

Trial i kills the job at a random moment of the i-th part of the time that the uninterrupted run took, so that kills are
spread over caching, training, previews and validation; every third trial waits for a checkpoint to be half written
instead. A trial may be killed more than once before it is left to end. The last line is `identical K of N`; the exit
status is 0 when K = N.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NO_KILL = "nothing: it was over"
WORDS = ("a red circle", "a blue square", "a green circle on a blue background", "sks", "a photo of sks")


def job_config(data: Path, model: dict[str, Any], steps: int) -> dict[str, Any]:
    """A small job that passes through everything: caching, accumulation, dropout, validation, previews, checkpoints."""
    return {
        "name": "kill-resume",
        "model": {"flavour": "tiny", "precision": "fp32", "text_precision": "fp32", **model},
        "dataset": {"folder": str(data), "trigger": "sks", "caption_dropout": 0.2, "flip": True},
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


def write_pictures(folder: Path, seed: int, count: int = 8) -> Path:
    """Pictures of 4×4 random colours, with captions; returns the folder."""
    from PIL import Image

    chance = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        colours = bytes(chance.randrange(256) for _ in range(4 * 4 * 3))
        Image.frombytes("RGB", (4, 4), colours).resize((64, 64)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(WORDS[i % len(WORDS)])
    return folder


def train(config: dict[str, Any], output: str) -> None:
    """The process that gets killed: run or resume the job in `output`."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    import torch

    from chroma_core.training.config import TrainingConfig
    from chroma_core.training.jobs import run_job

    torch.set_num_threads(1)  # bit for bit only holds for one and the same number of threads
    status = run_job(TrainingConfig.parse(config), Path(output, "jobs"), Path(output, "loras"), "cpu")
    if status["state"] != "completed":
        raise SystemExit(f"the job {status['state']}: {status['message']}")


class Trials:
    """Runs of one job in processes of their own.

    Processes are forked from a server that has imported the libraries (seconds each time otherwise) and nothing more.
    """

    def __init__(self, config: dict[str, Any], work: Path):
        self.config, self.work = config, work
        self.context = multiprocessing.get_context("spawn" if os.name == "nt" else "forkserver")
        if os.name != "nt":
            if str(ROOT) not in sys.path:
                sys.path.insert(0, str(ROOT))
            self.context.set_forkserver_preload(["chroma_core.training.jobs"])

    def start(self, name: str):
        """Start or resume the run called `name`."""
        process = self.context.Process(target=train, args=(self.config, str(self.work / name)), daemon=True)
        process.start()
        return process

    def complete(self, name: str) -> float:
        """Let the run end; returns its seconds. Raises RuntimeError when it failed."""
        started = time.monotonic()
        process = self.start(name)
        process.join()
        if process.exitcode != 0:
            raise RuntimeError(f"the run '{name}' ended with status {process.exitcode}")
        return time.monotonic() - started

    def kill(self, name: str, after: float, in_checkpoint: bool = False) -> str:
        """Start the run and SIGKILL it after that many seconds, or at the next half-written checkpoint; says where."""
        process = self.start(name)
        started = time.monotonic()
        while process.is_alive():
            if time.monotonic() - started >= after and (not in_checkpoint or any(self._half_written(name))):
                break
            time.sleep(0.0005)
        alive = process.is_alive()
        half = [path.name for path in self._half_written(name)]
        process.kill()
        process.join()
        return f"{self.where(name)}{', a checkpoint half written' if half else ''}" if alive else NO_KILL

    def where(self, name: str) -> str:
        """State and step that a killed run had reached, as its files tell."""
        jobs = list((self.work / name / "jobs").glob("*/job.json"))
        if not jobs:
            return "before the job's first file"
        status = json.loads(jobs[0].read_text())
        logged = read_metrics(self.work / name)
        return f"{status['state']}, step {logged[-1]['step'] if logged else 0} {status['message']}".strip()

    def _half_written(self, name: str):
        return (self.work / name / "jobs").glob("*/checkpoints/.step-*.tmp")


def read_metrics(output: Path) -> list[dict[str, Any]]:
    """The run's metrics without the seconds, which no two runs share."""
    values = []
    for file in output.glob("jobs/*/metrics.jsonl"):
        for line in file.read_text().splitlines():
            try:
                values.append({k: v for k, v in json.loads(line).items() if k != "seconds"})
            except ValueError:  # cut off by the kill
                continue
    return values


def same_result(a: Path, b: Path) -> bool:
    """Whether two runs ended with the same LoRA, tensor by tensor and bit by bit, and logged the same numbers."""
    from safetensors.numpy import load_file

    first, second = (load_file(folder / "loras" / "kill-resume.safetensors") for folder in (a, b))
    tensors = first.keys() == second.keys() and all(first[k].tobytes() == second[k].tobytes() for k in first)
    return tensors and read_metrics(a) == read_metrics(b)


def kill_and_compare(model: dict[str, Any], work: Path, kills: int, seed: int, steps: int, say=print) -> int:
    """Run `kills` trials in the folder `work`; returns how many ended like the uninterrupted run."""
    chance = random.Random(seed)
    trials = Trials(job_config(write_pictures(work / "pictures", seed), model, steps), work)
    trials.complete("warm-up")  # the first process also starts the server
    shutil.rmtree(work / "warm-up")
    # Kill moments are parts of the time of the first run, which also fills its cache; trials have caches of their own.
    seconds = trials.complete("reference")
    say(f"the uninterrupted run took {seconds:.1f} s")
    identical = 0
    for i in range(kills):
        name = f"trial-{i}"
        places = [NO_KILL]
        while places == [NO_KILL]:  # the machine was faster than in the first run: try again, a little earlier
            shutil.rmtree(work / name, ignore_errors=True)
            places = [trials.kill(name, seconds * (i + chance.random()) / kills, in_checkpoint=i % 3 == 2)]
            seconds *= 0.95 if places == [NO_KILL] else 1
        while chance.random() < 0.2:
            places.append(trials.kill(name, seconds * chance.random()))
        trials.complete(name)
        same = same_result(work / "reference", work / name)
        identical += same
        say(f"{i + 1:3d}: killed at {'; '.join(places)} -> {'identical' if same else 'DIFFERENT'}")
        if same:
            shutil.rmtree(work / name)
    return identical


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, help="trials (default: 10)")
    parser.add_argument("--seed", type=int, default=0, help="of the kill moments and the pictures (default: 0)")
    parser.add_argument("--steps", type=int, default=24, help="length of the job (default: 24)")
    parser.add_argument("--model", default=None, help="a diffusers folder instead of the embedded tiny model")
    parser.add_argument("--work", type=Path, default=None, help="keep the runs in this folder")
    options = parser.parse_args()
    model = {"folder": str(Path(options.model).resolve())} if options.model else {}
    with tempfile.TemporaryDirectory(prefix="chromakit-kills-") as temporary:
        work = options.work or Path(temporary)
        identical = kill_and_compare(model, work, options.kills, options.seed, options.steps)
    print(f"identical {identical} of {options.kills}")
    return 0 if identical == options.kills else 1


if __name__ == "__main__":
    sys.exit(main())
