"""Kill ComfyUI at random moments while it trains and generates, go on, compare with uninterrupted runs bit for bit.

    OMP_NUM_THREADS=1 python -m tools.kill_comfyui --kills 100 --terms 20 --seed 0

One job after the other, of three kinds (see `kill_resume.job_config`), is trained by a real ComfyUI that generates
images all the while. It is ended at random moments, by SIGKILL or as docker stop, systemd and Slurm end it, started
again, and told to resume the job. A job that has ended is compared with the same job as the command line trains it
without a break; an image with the first of its seed. After a SIGTERM it is looked up how many steps were lost. The
last line is `identical K of N kills, at most L steps lost by M SIGTERMs`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from itertools import cycle
from pathlib import Path
from typing import Any

import psutil

from chroma_core.comfy.server import Host, HostError, find_comfyui, start_comfyui
from chroma_core.files import read_json
from chroma_core.training.config import TrainingConfig
from chroma_core.training.jobs.job import Job
from tools.kill_resume import (
    JOBS,
    LIBRARIES,
    ROOT,
    Trials,
    job_config,
    reached,
    read_metrics,
    same_result,
    write_images,
)

SEEDS = 3


def image_prompt(seed: int) -> dict[str, Any]:
    """One small image of `tiny`."""
    links = {"model": ["load", 0], "positive": ["text", 0], "negative": ["text", 0], "latent": ["latent", 0]}
    numbers = {"seed": seed, "steps": 3, "guidance": 3.0, "tail_bias": 0.0, "denoise": 1.0}
    nodes = {
        "load": ("ChromaLoadModel", {"flavour": "tiny", "precision": "fp32", "text_precision": "fp32"}),
        "text": ("ChromaTextEncode", {"text_encoder": ["load", 1], "text": "a red star", "trigger": ""}),
        "latent": ("ChromaEmptyLatent", {"width": 64, "height": 64, "batch_size": 1}),
        "sample": ("ChromaSampler", {**links, **numbers}),
        "decode": ("VAEDecode", {"samples": ["sample", 0], "vae": ["load", 2]}),
        "save": ("SaveImage", {"images": ["decode", 0], "filename_prefix": "kills"}),
    }
    return {key: {"class_type": kind, "inputs": inputs} for key, (kind, inputs) in nodes.items()}


HOST_LIBRARIES = [
    *("torchvision", "torchaudio", "torchsde", "scipy.stats", "sqlalchemy.orm", "alembic.config", "kornia", "spandrel"),
    *("av", "aiohttp.web", "comfy_kitchen", "pydantic_settings"),
]
"""What ComfyUI imports of others first, too: a server that is killed a moment later is forked with it."""


def become(command: list[str], folder: str, log: str) -> None:
    """Do in this process what `command`, Python with a script of that folder, does."""
    os.setsid()
    number = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(number, stream)
    os.chdir(folder)
    sys.path = [folder, *(path for path in sys.path if path not in ("", str(ROOT), str(ROOT / "scripts")))]
    sys.argv = command[command.index("main.py") :]
    runpy.run_path("main.py", run_name="__main__")


class Forked:
    """A ComfyUI whose libraries were imported before, as `subprocess.Popen` would have it."""

    def __init__(self, command: list[str], folder: Path, log: Path):
        context = multiprocessing.get_context("forkserver")
        self._process = context.Process(target=become, args=(command, str(folder), str(log)), daemon=True)
        self._process.start()

    @property
    def pid(self) -> int | None:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self._process.pid or 0, number)

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout: float | None = None) -> int | None:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("ComfyUI", timeout or 0.0)
        return self.returncode


def cpu_seconds(host: Host) -> float:
    """What a server has computed so far: a measure of how far it came, however much else the machine has to do."""
    times = psutil.Process(host.process.pid).cpu_times()
    return times.user + times.system


class Prompts(threading.Thread):
    """Posts prompts to whatever server there is, one after the other, with pauses in which the job trains."""

    def __init__(self, seed: int):
        super().__init__(daemon=True)
        self.host: Host | None = None
        self.made, self.wrong, self.failures = 0, 0, list[str]()
        self._chance, self._first = random.Random(seed), dict[int, bytes]()
        self.start()

    def run(self) -> None:
        for seed in cycle(range(SEEDS)):
            host = self.host
            if host is not None:
                try:
                    (image,) = host.images(host.run(image_prompt(seed)))
                    self.made += 1
                    self.wrong += self._first.setdefault(seed, image.tobytes()) != image.tobytes()
                except (HostError, OSError) as error:
                    if host is self.host and host.alive():
                        self.failures.append(str(error)[:300])
                with suppress(psutil.NoSuchProcess):
                    until = cpu_seconds(host) + self._chance.uniform(0.0, 1.0)
                    while cpu_seconds(host) < until and host is self.host:
                        time.sleep(0.05)
            time.sleep(0.01)


class Trial:
    """A ComfyUI that is ended again and again, and the job that it is on."""

    def __init__(self, work: Path, references: dict[str, Trials], seed: int):
        self.work, self.base, self.references = work, work / "comfyui", references
        self.output = self.base / "output" / "chromakit"
        self.comfyui, self.prompts = find_comfyui(), Prompts(seed)
        self.host: Host | None = None
        self.kinds, self.kind, self.job, self.ended, self.seconds = cycle(references), "", "", 0, 8.0
        self.hits: dict[str, int] = {}
        self.different: list[str] = []
        self.identical = 0

    def begin(self) -> None:
        """Lay down the next job as one that waits to be resumed."""
        self.kind = next(self.kinds)
        config = TrainingConfig.parse(self.references[self.kind].config)
        self.job = config.job_id()
        shutil.rmtree(self.output / "jobs" / "cache", ignore_errors=True)
        folder = self.output / "jobs" / self.job
        folder.mkdir(parents=True)
        Job(folder, config, {"state": "interrupted"}).write()

    def work_on(self, seconds: float, number: signal.Signals | None) -> None:
        """Let ComfyUI compute for so many seconds; a job that ends is compared, and the next one begun, if a signal is
        to come."""
        if self.host is None:
            assert self.comfyui is not None, "set COMFYUI_PATH, or run scripts/test.py once"
            # One that is forked runs nothing at its exit.
            launch = None if number == signal.SIGTERM or os.name == "nt" else Forked
            self.prompts.host = self.host = start_comfyui(self.comfyui, self.base, launch=launch)
        now = begun = cpu_seconds(self.host)
        until, whole = now + seconds, False
        while (now := cpu_seconds(self.host)) < until:
            if not self.job:
                self.begin()
                begun, whole = now, True
            status = self.host.get(f"/chromakit/jobs/{self.job}")
            if status["state"] in ("failed", "stopped"):
                raise RuntimeError(f"{self.job} {status['state']}: {status['message']}")
            if status["state"] == "interrupted":
                self.host.post(f"/chromakit/jobs/{self.job}/resume")
            elif status["state"] == "completed":
                self.compare()
                if number is None:
                    return
                if whole:
                    self.seconds = now - begun
            else:
                time.sleep(0.05)

    def compare(self) -> None:
        """Put the job that has ended beside the uninterrupted one."""
        place = self.work / self.kind / f"ended-{self.ended}"
        (place / "jobs").mkdir(parents=True)
        shutil.move(self.output / "jobs" / self.job, place / "jobs" / self.job)
        shutil.move(self.base / "output" / "loras", place / "loras")
        hits = self.hits.pop(self.job, 0)
        if same_result(self.work / self.kind / "reference", place):
            self.identical += hits
            shutil.rmtree(place)
        else:
            self.different.append(str(place))
        self.ended, self.job = self.ended + 1, ""

    def end(self, number: signal.Signals) -> tuple[str, int]:
        """End ComfyUI; says what it was doing, and how many steps that it had taken the job must take again."""
        assert self.host is not None
        self.prompts.host = None
        begun = self.job and self.host.get(f"/chromakit/jobs/{self.job}")["state"] in ("running", "paused")
        self.host.process.send_signal(number)
        self.host.process.wait(60)
        self.host = None
        if not self.job:
            return "between two jobs", 0
        done = max([0, *(line["step"] for line in read_metrics(self.output) if begun and "loss" in line)])
        saved = read_json(self.output / "jobs" / self.job / "job.json")["checkpoint"] or 0
        if number == signal.SIGKILL:
            self.hits[self.job] = self.hits.get(self.job, 0) + 1
        half = any(self.output.glob("jobs/*/checkpoints/.step-*.tmp"))
        return f"{self.kind} at {reached(self.output)}{', a checkpoint half written' if half else ''}", max(
            0, done - saved
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, help="SIGKILLs (default: 10)")
    parser.add_argument("--terms", type=int, default=0, help="SIGTERMs (default: 0)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the datasets (default: 0)")
    parser.add_argument("--steps", type=int, default=16, help="length of the jobs (default: 16)")
    parser.add_argument("--minutes", type=float, default=1e9, help="end no more after so many (default: no limit)")
    parser.add_argument("--model", default=None, help="train a diffusers folder instead of the embedded tiny model")
    parser.add_argument("--work", type=Path, default=None, help="keep everything in this folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="chromakit-kills-") as temporary:
        return _run(options, options.work or Path(temporary))


def _run(options: argparse.Namespace, work: Path) -> int:
    chance, started = random.Random(options.seed), time.monotonic()
    model = {"folder": str(Path(options.model).resolve())} if options.model else {}
    data = write_images(work / "pictures", options.seed)
    write_images(work / "pictures-2", options.seed + 1, count=4, size=(128, 64))
    references = {kind: Trials(job_config(data, model, options.steps, kind), work / kind) for kind in JOBS}
    multiprocessing.get_context("forkserver").set_forkserver_preload([*LIBRARIES, *HOST_LIBRARIES])
    for trials in references.values():
        trials.complete("reference")
    trial = Trial(work, references, options.seed)
    numbers = [signal.SIGKILL] * options.kills + [signal.SIGTERM] * options.terms
    chance.shuffle(numbers)
    sent, lost = Counter(), list[int]()
    for i, number in enumerate(numbers, start=1):
        if time.monotonic() - started > 60 * options.minutes:
            break
        trial.work_on(chance.uniform(0.0, trial.seconds), number)
        place, again = trial.end(number)
        sent[number] += place != "between two jobs"
        if number == signal.SIGTERM:
            lost.append(again)
        print(f"{i:3d}: {number.name}, {place}; {again} steps again; {len(trial.different)} differ", flush=True)
    if trial.job:
        trial.work_on(3600.0, None)
    trial.prompts.host = None
    if trial.host is not None:
        trial.host.stop()
    prompts, most = trial.prompts, max(lost, default=0)
    print(f"{trial.ended} jobs compared, {len(trial.different)} different: {trial.different}")
    print(f"{prompts.made} images meanwhile, {prompts.wrong} of them wrong, {len(prompts.failures)} prompts failed")
    print(*prompts.failures[:3], sep="\n")
    kills, terms = sent[signal.SIGKILL], sent[signal.SIGTERM]
    print(f"identical {trial.identical} of {kills} kills, at most {most} steps lost by {terms} SIGTERMs")
    return 0 if trial.identical == kills and most <= 1 and not (prompts.wrong or prompts.failures) else 1


if __name__ == "__main__":
    sys.exit(main())
