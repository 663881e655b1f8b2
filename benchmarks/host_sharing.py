"""A real ComfyUI on a simulated card, a job and prompts interleaved, the card filled in every phase of the job.

    python -m benchmarks.host_sharing                       # cards of 8 and 24 GB, 30 prompts each
    python -m benchmarks.host_sharing --cards 8 --prompts 5

`tiny` trains with held-out loss, previews and checkpoints. Between prompts a thread inside ComfyUI takes every free
byte of the card for a while, again and again, from before the job starts; prompts are of the job's own model (which is
lent), of another one, and without any. Then the job is paused, resumed, stopped and resumed on the full card, and a
second one runs from its images to its LoRA, resumed where it paused for want of memory. The card computes nothing: what
counts are states, bytes, and that every wait is told. Linux with a C compiler.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.real_model import ROOT

for folder in ("scripts", "tests/support"):
    sys.path.insert(0, str(ROOT / folder))

from _host import Host, start_host  # noqa: E402
from nullgpu.run import environment  # noqa: E402  # pyright: ignore[reportMissingImports]
from prompts import at_defaults, dataset, job_of, node, text_to_image, train  # noqa: E402  # pyright: ignore[reportMissingImports]
from waiting import until  # noqa: E402  # pyright: ignore[reportMissingImports]

HELD_SECONDS = (0.2, 4.0)
"""For how long the card is full at a time."""


class Watch:
    """Polls a job's status in a thread: what it said, and for how long it said that it waits."""

    def __init__(self, host: Host):
        self.host, self.job, self.full = host, "", False
        self.states: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.seen_full: Counter[str] = Counter()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def status(self) -> dict[str, Any]:
        return self.host.get(f"/chromakit/jobs/{self.job}")

    def report(self) -> str:
        """For an error message: the job's status and its log's end."""
        log = (self.host.base / "output/chromakit/jobs" / self.job / "log.txt").read_text(encoding="utf-8")
        return json.dumps(self.status(), indent=1) + log[-3000:] + self.host.log_tail()

    def _run(self) -> None:
        last = ""
        while not self._ended.wait(0.03):
            if not self.job:
                continue
            now = self.status()
            said = now["waits_for"] or ("yielded" if now["yielded"] else now["state"])
            if said != last:
                self.waits[said] += 1
                last = said
            self.states[now["state"]] += 1
            if self.full:
                self.seen_full[said] += 1

    def end(self) -> None:
        self._ended.set()
        self._thread.join()


@contextmanager
def comfyui(card: float, switch: Path) -> Iterator[Host]:
    """A ComfyUI on a simulated card of so many GiB, whose card is full while the file `switch` exists."""
    before = dict(os.environ)
    os.environ.update(environment(gib=card))
    os.environ.update(PYTHONPATH=str(ROOT / "tests/support/nullgpu/in_comfyui"), NULL_GPU_FILL=str(switch))
    try:
        with (
            tempfile.TemporaryDirectory() as base,
            start_host(Path(base), cpu=False, extra=("--disable-cuda-malloc",)) as host,
        ):
            yield host
    finally:
        os.environ.clear()
        os.environ.update(before)


def prompt_of(number: int) -> dict[str, Any]:
    """The job's own model, another precision, or nothing that needs a model."""
    if number % 3 == 2:
        return {
            "image": node("EmptyImage", width=64, height=64, batch_size=1, color=number),
            "save": node("SaveImage", images=["image", 0], filename_prefix="test"),
        }
    prompt = text_to_image(f"a star, number {number}", seed=number)
    if number % 3 == 1:
        prompt["load"]["inputs"].update(precision="bf16")
    return prompt


def run_one(card: float, prompts: int, seed: int) -> dict[str, Any]:
    """One card's whole story, as a row of the table."""
    draws = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        switch = Path(folder, "full")
        with comfyui(card, switch) as host:
            watch = Watch(host)

            @contextmanager
            def full(seconds: float) -> Iterator[None]:
                switch.touch()
                watch.full = True
                ends = time.monotonic() + seconds
                try:
                    yield
                    time.sleep(max(0.0, ends - time.monotonic()))
                finally:
                    watch.full = False
                    switch.unlink()
                    until(lambda: not switch.with_suffix(".held").exists(), "the card to be free again")

            try:
                return _story(host, watch, full, prompts, draws) | {"card": card}
            finally:
                watch.end()


def _story(host: Host, watch: Watch, full: Any, prompts: int, draws: random.Random) -> dict[str, Any]:
    images = 0
    watch.job = job_of(host.run(_job(host, "shared card", 1_000_000)))
    with full(2.0):  # images, captions, loading, the first held-out loss
        pass
    until(lambda: watch.status()["step"] >= 1, "the first step", report=watch.report)
    for number in range(prompts):
        step = watch.status()["step"]
        with full(draws.uniform(*HELD_SECONDS)):
            pass
        images += len(host.images(host.run(prompt_of(number))))
        until(lambda least=step: watch.status()["step"] > least, "the job to go on", report=watch.report)
        time.sleep(draws.uniform(0, 0.5))
    for action, state in (("pause", "paused"), ("resume", "running"), ("stop", "stopped"), ("resume", "running")):
        with full(1.0):
            assert host.post(f"/chromakit/jobs/{watch.job}/{action}")[0] == 200
        until(lambda wanted=state: watch.status()["state"] == wanted, state, report=watch.report)
    step = watch.status()["step"]
    until(lambda: watch.status()["step"] > step, "a step after resuming", report=watch.report)
    host.post(f"/chromakit/jobs/{watch.job}/stop")
    until(lambda: watch.status()["state"] == "stopped", "the end", report=watch.report)
    first = watch.status()
    watch.job = job_of(host.run(_job(host, "from images to LoRA", 20, resolution=96)))
    resumed = 0
    while (state := watch.status()["state"]) not in ("completed", "failed"):
        if state == "paused":  # the card was full at each of its tries: the user resumes it
            host.post(f"/chromakit/jobs/{watch.job}/resume")
            resumed += 1
        with full(draws.uniform(0.1, 1.0)):
            pass
        time.sleep(draws.uniform(0, 1.0))
    jobs = first, watch.status()
    rows = [row for job in jobs for row in _metrics(host, job["id"])]
    return {
        "prompts": prompts,
        "pictures": images,
        "states": [job["state"] for job in jobs],
        "steps": [job["step"] for job in jobs],
        "previews": sum(len(job["samples"]) for job in jobs),
        "heldout_losses": sum("heldout_loss" in row for row in rows),
        "resumed": resumed,
        "out_of_memory": sum("out_of_memory" in row for row in rows),
        "polled_states": dict(watch.states),
        "times_told": dict(watch.waits),
        "polled_while_full": dict(watch.seen_full),
        "loras": sum((host.base / job["lora_path"]).is_file() for job in jobs),
        "messages": [job["message"] for job in jobs],
        "log": [line for line in host.log_tail(5000).splitlines() if "Traceback" in line or "has not left" in line],
    }


def _job(host: Host, name: str, steps: int, **data: Any) -> dict[str, Any]:
    made = train(name, steps, preview_prompt="a star", preview_every=7)
    made["dataset"]["inputs"].update(data)
    made["held"] = dataset("sks_emblem_heldout", **data)
    made["settings"] = at_defaults(host, "ChromaTrainingSettings", validate_every=5, checkpoint_every=9)
    made["train"]["inputs"].update(validation_dataset=["held", 0], settings=["settings", 0])
    return made


def _metrics(host: Host, job: str) -> list[dict[str, Any]]:
    text = (host.base / "output/chromakit/jobs" / job / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cards", type=float, nargs="+", default=[8, 24], help="GiB of the simulated cards")
    parser.add_argument("--prompts", type=int, default=30, help="how many prompts are sent (default: 30)")
    parser.add_argument("--seed", type=int, default=1, help="of how long the card is full each time")
    options = parser.parse_args()
    wrong = 0
    for card in options.cards:
        row = run_one(card, options.prompts, options.seed)
        wrong += row["states"] != ["stopped", "completed"] or row["pictures"] != row["prompts"] or row["loras"] != 2
        print(json.dumps(row), flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
