"""Kill training with SIGKILL at random moments, resume it, compare the LoRA bit for bit with an uninterrupted run's.

    python -m tools.kill_resume --kills 10 --seed 0
    python -m tools.kill_resume --kills 100 --seed 7 --jobs plain dora lokr

Trial i kills the job at a random moment of the i-th part of the time that the uninterrupted run took, so that kills are
spread over the whole of it; of six trials one waits for caching instead, one for a preview, and two for a checkpoint
that is being written. A trial may be killed more than once before it is left to end. Compared are LoRA, averaged LoRA,
checkpoints, previews and logged numbers. At the end stands how many kills fell where; the last line is `identical K of
N`, and the exit status is 0 when K = N.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
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


def write_images(folder: Path, seed: int, count: int = 8, size: tuple[int, int] = (64, 64)) -> Path:
    """Images of 4×4 random colours, with captions; returns the folder."""
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


def watch(phase: Any, every: float = 0.005) -> None:
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


ROOT = Path(__file__).resolve().parents[1]
NO_KILL = "nothing: it was over"
TARGETS = ("checkpoint", None, "caching", None, "preview", "checkpoint")
"""What the first kill of a trial waits for, in turn; None: for its moment alone."""


def train(config: dict[str, Any], output: str, phase: Any) -> None:
    """The process that gets killed: run or resume the job in `output`, telling in `phase` what it is doing."""
    for folder in (ROOT, ROOT / "scripts"):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    import torch

    from chroma_core.training.config import TrainingConfig
    from chroma_core.training.jobs.blocking import run_job

    torch.set_num_threads(1)  # bit for bit only holds for one and the same number of threads
    gc.freeze()  # what was imported stays: no collection looks through it
    watch(phase)
    status = run_job(TrainingConfig.parse(config), Path(output, "jobs"), Path(output, "loras"), "cpu")
    if status["state"] != "completed":
        raise SystemExit(f"the job {status['state']}: {status['message']}")


LIBRARIES = ["chroma_core.training.jobs.manager", "torch._dynamo", "transformers.models.auto.tokenization_auto"]
"""What a process would import first; the last two when it encodes captions, and makes its optimizer."""


class Trials:
    """Runs of one job in processes of their own.

    Processes are forked from a server that has imported the libraries (seconds each time otherwise) and nothing more.
    `seconds` is how long the uninterrupted run took, `visits` how long it stayed in each phase each time.
    """

    def __init__(self, config: dict[str, Any], work: Path):
        self.config, self.work = config, work
        self.seconds = 0.0
        self.visits: dict[str, list[float]] = defaultdict(list)
        self.context = multiprocessing.get_context("spawn" if os.name == "nt" else "forkserver")
        if os.name != "nt":
            if str(ROOT) not in sys.path:
                sys.path.insert(0, str(ROOT))
            self.context.set_forkserver_preload(LIBRARIES)

    def start(self, name: str):
        """Start or resume the run called `name`; returns the process and the shared number of its phase."""
        phase = self.context.RawValue("i", 0)
        process = self.context.Process(target=train, args=(self.config, str(self.work / name), phase), daemon=True)
        process.start()
        return process, phase

    def complete(self, name: str) -> None:
        """Let the run end. Raises RuntimeError when it failed."""
        process, _ = self.start(name)
        process.join()
        if process.exitcode != 0:
            raise RuntimeError(f"the run '{name}' ended with status {process.exitcode}")

    def measure(self, name: str) -> None:
        """Let the run end, and note how long it took, and each of its phases."""
        started = since = time.monotonic()
        process, phase = self.start(name)
        last = "start"
        while process.is_alive():
            time.sleep(0.005)
            if (now := PHASES[phase.value]) != last:
                self.visits[last].append(time.monotonic() - since)
                last, since = now, time.monotonic()
        process.join()
        if process.exitcode != 0:
            raise RuntimeError(f"the run '{name}' ended with status {process.exitcode}")
        self.seconds = time.monotonic() - started

    def kill(self, name: str, after: float, target: str | None = None, into: float = 0.0) -> tuple[str, str]:
        """Start the run and SIGKILL it after that share of the usual seconds; says in which phase and where.

        With a target: when it is next in that phase, and has been for the share `into` of such a phase's usual length.
        """
        process, phase = self.start(name)
        started = time.monotonic()
        self._wait(process, lambda: time.monotonic() - started >= after * self.seconds)
        if target is not None:
            wanted, usual = PHASES.index(target), self.visits.get(target) or [0.0]
            self._wait(process, lambda: phase.value == wanted)
            entered = time.monotonic()
            self._wait(process, lambda: time.monotonic() - entered >= into * min(usual))
        alive, where = process.is_alive(), PHASES[phase.value]
        process.kill()
        process.join()
        if not alive:
            return NO_KILL, NO_KILL
        half = where == "checkpoint" and any((self.work / name / "jobs").glob("*/checkpoints/.step-*.tmp"))
        return where, f"{reached(self.work / name)}, {where}{', a checkpoint half written' if half else ''}"

    @staticmethod
    def _wait(process: Any, ready: Callable[[], bool]) -> None:
        while process.is_alive() and not ready():
            time.sleep(0.002)


def reached(output: Path) -> str:
    """State and step that a killed run had reached, as its files tell."""
    jobs = list(output.glob("jobs/*/job.json"))
    if not jobs:
        return "before the job's first file"
    status = json.loads(jobs[0].read_text())
    logged = read_metrics(output)
    return f"{status['state']}, step {logged[-1]['step'] if logged else 0} {status['message']}".strip()


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
    """Whether two runs left the same: LoRA files tensor by tensor and bit by bit, previews, and logged numbers."""
    from safetensors.numpy import load_file

    def files(folder: Path) -> dict[str, Path]:
        kept = ("loras/*.safetensors", "jobs/*/checkpoints/step-*/lora.safetensors", "jobs/*/samples/*.png")
        return {str(path.relative_to(folder)): path for pattern in kept for path in folder.glob(pattern)}

    first, second = files(a), files(b)
    if first.keys() != second.keys() or read_metrics(a) != read_metrics(b):
        return False
    for name, path in first.items():
        if path.suffix == ".png":
            if path.read_bytes() != second[name].read_bytes():
                return False
            continue
        one, other = load_file(path), load_file(second[name])
        if one.keys() != other.keys() or any(one[key].tobytes() != other[key].tobytes() for key in one):
            return False
    return True


def kill_and_compare(
    model: dict[str, Any],
    work: Path,
    kills: int,
    seed: int,
    steps: int,
    say=print,
    jobs: Sequence[str] = ("plain",),
) -> int:
    """Run `kills` trials, the jobs in turn, in the folder `work`; returns how many ended like the uninterrupted run."""
    chance = random.Random(seed)
    data = write_images(work / "pictures", seed)
    write_images(work / "pictures-2", seed + 1, count=4, size=(128, 64))
    runs = {}
    for job in jobs:
        trials = runs[job] = Trials(job_config(data, model, steps, job), work / job)
        trials.complete("warm-up")  # the first process also starts the server
        shutil.rmtree(work / job / "warm-up")
        # Kill moments are parts of the time of the first run, which also fills its cache; trials have their own.
        trials.measure("reference")
        say(f"{job}: the uninterrupted run took {trials.seconds:.1f} s")
    identical, fallen, half = 0, Counter(), 0
    for i in range(kills):
        job = jobs[i % len(jobs)]
        trials, name, target = runs[job], f"trial-{i}", TARGETS[i // len(jobs) % len(TARGETS)]
        phase, place = NO_KILL, NO_KILL
        while phase == NO_KILL:  # the machine was faster than in the first run: try again, a little earlier
            shutil.rmtree(work / job / name, ignore_errors=True)
            after, started = 0.0 if target == "caching" else (i + chance.random()) / kills, time.monotonic()
            phase, place = trials.kill(name, after, target, chance.random())
            if phase == NO_KILL:
                trials.seconds = min(0.95 * trials.seconds, time.monotonic() - started)
        found = [(phase, place)]
        while chance.random() < 0.2:
            found.append(trials.kill(name, chance.random()))
        trials.complete(name)
        same = same_result(work / job / "reference", work / job / name)
        identical += same
        fallen.update(where for where, _ in found if where != NO_KILL)
        half += sum("half written" in place for _, place in found)
        places = "; ".join(place for _, place in found)
        say(f"{i + 1:3d}: {job} killed at {places} -> {'identical' if same else 'DIFFERENT'}")
        if same:
            shutil.rmtree(work / job / name)
    counts = ", ".join(f"{where} {fallen[where]}" for where in PHASES if fallen[where])
    say(f"{sum(fallen.values())} kills in {kills} trials: {counts}; {half} left a checkpoint half written")
    return identical


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, help="trials (default: 10)")
    parser.add_argument("--seed", type=int, default=0, help="of the kill moments and the images (default: 0)")
    parser.add_argument("--steps", type=int, default=24, help="length of the job (default: 24)")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=["plain"], help="taken in turn (default: plain)")
    parser.add_argument("--model", default=None, help="a diffusers folder instead of the embedded tiny model")
    parser.add_argument("--work", type=Path, default=None, help="keep the runs in this folder")
    options = parser.parse_args()
    model = {"folder": str(Path(options.model).resolve())} if options.model else {}
    with tempfile.TemporaryDirectory(prefix="chromakit-kills-") as temporary:
        work = options.work or Path(temporary)
        identical = kill_and_compare(model, work, options.kills, options.seed, options.steps, jobs=options.jobs)
    print(f"identical {identical} of {options.kills}")
    return 0 if identical == options.kills else 1


if __name__ == "__main__":
    sys.exit(main())
