"""A soak of one real ComfyUI: jobs, prompts and pages for hours; are the images right, and does anything grow?

    python -m tools.soak                                             # 30 jobs, 10 020 steps, 200 prompts, 5 pages
    python -m tools.soak --jobs 5 --steps 20 --prompts 10 --pages 2  # a try, a minute

First a ComfyUI that does nothing else generates every prompt's image. Then another one, on the same folder, trains the
jobs one after the other (their kinds in turn; each is paused and resumed, every other one stopped and resumed), while
the prompts are queued evenly over the steps and the pages listen as the window does: all but the first of them reload
now and then. ComfyUI keeps the outputs of 50 nodes (`--cache-lru 50`): by default it keeps those of every prompt until
memory is short, which is growth, too. At the end stand: images that differ in a bit; LoRAs of one kind that differ in a
bit; endings of jobs that the first page did not hear of; errors in ComfyUI's log; and how resident memory, threads and
open files of ComfyUI changed with the steps, by the median slope of all pairs of samples after the first turn of kinds.
Exit status 0 if nothing differed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from itertools import combinations
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, ROOT / "scripts", ROOT / "tests" / "support"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from _host import Host, start_host  # noqa: E402
from prompts import ACTIVE, at_defaults, dataset, job_of, node, text_to_image, train  # noqa: E402  # pyright: ignore[reportMissingImports]
from waiting import until  # noqa: E402  # pyright: ignore[reportMissingImports]

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"adapter": "dora", "optimizer": "prodigy", "ema_decay": 0.9, "dropout": 0.1},
    "lokr": {"adapter": "lokr", "optimizer": "schedule-free", "gradient_checkpointing": "on"},
    "loss": {"loss": "huber", "noise_offset": 0.05, "pair_noise": True, "keep_best": True},
    "rslora": {"adapter": "rslora", "optimizer": "adafactor", "lr_schedule": "cosine", "gradient_accumulation": 2},
}
"""Settings of the jobs; the kinds take turns."""
LORA = "soaked"
BOUNDED = ("--cache-lru", "50")
MIB = 2**20


def prompt_of(number: int) -> dict[str, Any]:
    """The `number`-th prompt, no two alike: two precisions, sizes, samplers, batches, with a LoRA and without."""
    seeded = {"seed": 1000 + number, "steps": 4 + number % 3}
    made = text_to_image(f"a star, number {number}", (64, 96)[number % 2], 1 + (number % 5 == 0), **seeded)
    if number % 4 == 1:
        made["load"]["inputs"].update(precision="bf16")
    if number % 3 == 2:
        made["lora"] = node("ChromaApplyLora", model=["load", 0], lora=f"{LORA}.safetensors", strength=0.8)
        made["sample"]["inputs"].update(model=["lora", 0])
    return made


def job_prompt(host: Host, number: int, steps: int) -> dict[str, Any]:
    """The `number`-th job, with previews, validation and checkpoints."""
    kind = list(KINDS)[number % len(KINDS)]
    part = max(1, steps // 5)
    made = train(f"soak-{number}-{kind}", steps, preview_prompt="a star", preview_every=part)
    if kind == "dora":
        made["train"]["inputs"].update(learning_rate=1.0)  # Prodigy finds its own
    made["held"] = dataset("sks_emblem_heldout")
    every = {"validate_every": part, "checkpoint_every": part, "keep_checkpoints": 2}
    made["settings"] = at_defaults(host, "ChromaTrainingSettings", **every, **KINDS[kind])
    made["train"]["inputs"].update(validation_dataset=["held", 0], settings=["settings", 0])
    return made


def images(host: Host, prompt: dict[str, Any]) -> list[bytes]:
    """The pixels that a prompt gives."""
    return [image.tobytes() for image in host.images(host.run(prompt, timeout=3600))]


class Growth:
    """Samples of a process's resident memory (bytes), threads and open files, beside a count of work done."""

    NAMES = ("memory", "threads", "handles")

    def __init__(self, pid: int):
        self.process = psutil.Process(pid)
        self.samples: list[tuple[int, ...]] = []

    def sample(self, done: int) -> None:
        process = self.process
        handles = process.num_handles() if sys.platform == "win32" else process.num_fds()
        self.samples.append((done, process.memory_info().rss, process.num_threads(), handles))

    def slopes(self, since: int, per: int) -> dict[str, float]:
        """Of each name, by how much it grows in `per` of the work: the median over all pairs of samples after `since`
        (about 400 samples, evenly spread)."""
        later = [sample for sample in self.samples if sample[0] >= since]
        later = later[:: max(1, len(later) // 400)]
        pairs = [(a, b) for a, b in combinations(later, 2) if b[0] > a[0]]
        return {
            name: per * statistics.median((b[i] - a[i]) / (b[0] - a[0]) for a, b in pairs) if pairs else 0.0
            for i, name in enumerate(self.NAMES, 1)
        }

    def parts(self, length: int) -> list[tuple[int, ...]]:
        """The medians of each `length` of the work."""
        found: dict[int, list[tuple[int, ...]]] = defaultdict(list)
        for sample in self.samples:
            found[sample[0] // length].append(sample)
        return [tuple(int(statistics.median(column)) for column in zip(*found[i], strict=True)) for i in sorted(found)]


class Pages(threading.Thread):
    """Pages of the window: each listens on a websocket and fetches what the window fetches.

    `heard` holds by page the jobs whose completion it was told; `answers` counts HTTP answers by status.
    """

    def __init__(self, host: Host, count: int):
        super().__init__(name="pages")
        self.host, self.count = host, count
        self.heard: dict[int, set[str]] = {page: set() for page in range(count)}
        self.answers: Counter[int] = Counter()
        self.events: Counter[str] = Counter()
        self.reloads = 0
        self._over = threading.Event()

    def run(self) -> None:
        asyncio.run(self._all())

    def end(self) -> None:
        self._over.set()
        self.join()

    async def _all(self) -> None:
        await asyncio.gather(*[self._page(page) for page in range(self.count)])

    async def _page(self, page: int) -> None:
        draws = random.Random(page)
        while not self._over.is_set():
            await self._opened(page, draws.uniform(20, 90) if page else float("inf"))
            self.reloads += not self._over.is_set()

    async def _opened(self, page: int, seconds: float) -> None:
        import aiohttp

        ends, looks = time.monotonic() + seconds, 0.0
        timeout = aiohttp.ClientTimeout(total=600)
        async with (
            aiohttp.ClientSession(self.host.url, timeout=timeout) as session,
            session.ws_connect(f"/ws?clientId=page-{page}-{self.reloads}") as socket,
        ):
            await self._fetch(session, "settings")
            while not self._over.is_set() and time.monotonic() < ends:
                if time.monotonic() > looks:
                    await self._look(session)
                    looks = time.monotonic() + 10
                try:
                    message = await socket.receive(timeout=1)
                except asyncio.TimeoutError:
                    continue
                event = message.json() if message.type == aiohttp.WSMsgType.TEXT else {}
                self.events[event.get("type", message.type.name.lower())] += 1
                if event.get("type") == "chromakit.job" and event["data"]["state"] == "completed":
                    self.heard[page].add(event["data"]["id"])

    async def _look(self, session: Any) -> None:
        """The list, and the curve, log and status of the job that is at work."""
        jobs = await self._fetch(session, "jobs?brief=true")
        for job in [job["id"] for job in jobs if job["state"] in ACTIVE][:1]:
            for path in ("", "/curve", "/log"):
                await self._fetch(session, f"jobs/{job}{path}", parsed=path != "/log")

    async def _fetch(self, session: Any, path: str, parsed: bool = True) -> Any:
        async with session.get(f"/chromakit/{path}") as answer:
            self.answers[answer.status] += 1
            return await answer.json() if parsed else await answer.read()


def quiet(base: Path, prompts: int) -> tuple[list[list[bytes]], dict[str, float]]:
    """Every prompt's images from a ComfyUI without jobs, and what 100 prompts add there; trains the LoRA first."""
    with start_host(base, extra=BOUNDED) as host:
        job = job_of(host.run(train(LORA, 10)))
        until(lambda: host.get(f"/chromakit/jobs/{job}")["state"] == "completed", "the LoRA", report=host.log_tail)
        growth, found = Growth(host.process.pid), []
        for number in range(prompts):
            found.append(images(host, prompt_of(number)))
            growth.sample(number)
    return found, growth.slopes(prompts // 5, 100)


def same_loras(statuses: list[dict[str, Any]], base: Path) -> int:
    """How many of the jobs' LoRAs, below ComfyUI's base folder, differ in a bit from the first of their kind."""
    from safetensors.numpy import load_file

    first: dict[str, dict[str, bytes]] = {}
    different = 0
    for status in statuses:
        kind = status["name"].rpartition("-")[2]
        tensors = {name: tensor.tobytes() for name, tensor in load_file(base / status["lora_path"]).items()}
        different += tensors != first.setdefault(kind, tensors)
    return different


class Soak:
    """The run itself, on one ComfyUI; `step` counts the steps of all jobs."""

    def __init__(self, host: Host, options: argparse.Namespace, expected: list[list[bytes]]):
        self.host, self.options, self.expected = host, options, expected
        self.growth, self.pages = Growth(host.process.pid), Pages(host, options.pages)
        self.step, self.ended = 0, False
        self.wrong: list[int] = []
        self.trouble: list[BaseException] = []

    def status(self, job: str) -> dict[str, Any]:
        return self.host.get(f"/chromakit/jobs/{job}")

    def run(self) -> list[dict[str, Any]]:
        """Train all jobs; their last statuses."""
        asking = threading.Thread(target=self._prompts)
        self.pages.start()
        asking.start()
        try:
            statuses = [self._job(number) for number in range(self.options.jobs)]
            time.sleep(5)  # what is on its way to the pages arrives
        finally:
            self.ended = True
            asking.join()
            self.pages.end()
        if self.trouble:
            raise self.trouble[0]
        return statuses

    def _job(self, number: int) -> dict[str, Any]:
        before, steps = self.step, self.options.steps
        job = job_of(self.host.run(job_prompt(self.host, number, steps), timeout=3600))
        acts = [(0.3, "pause"), (0.3, "resume")] + [(0.6, "stop"), (0.6, "resume")] * (number % 2)
        while (status := self.status(job))["state"] != "completed":
            self.step = before + status["step"]
            self.growth.sample(self.step)
            if acts and status["step"] >= acts[0][0] * steps:
                action = acts.pop(0)[1]
                answer = self.host.post(f"/chromakit/jobs/{job}/{action}")
                state = {"pause": "paused", "stop": "stopped", "resume": "running"}[action]
                if answer[0] != 200 or not until(lambda s=state: self.status(job)["state"] in (s, "completed"), action):
                    raise RuntimeError(f"{job}: {action} was answered by {answer}")
            elif status["state"] not in ACTIVE:
                raise RuntimeError(f"{job} {status['state']}: {status['message']}\n{self.host.log_tail()}")
            time.sleep(1)
        self.step = before + steps
        self.growth.sample(self.step)
        memory, threads, handles = self.growth.samples[-1][1:]
        seconds = status["train_seconds"]
        print(
            f"{job}: step {self.step}, {seconds:.0f} s, {memory / MIB:.1f} MiB, {threads} threads, {handles} handles",
            flush=True,
        )
        return status

    def _prompts(self) -> None:
        """Queue each prompt when its share of the steps is done, and compare its images."""
        try:
            every = self.options.jobs * self.options.steps / max(1, self.options.prompts)
            for number, expected in enumerate(self.expected):
                while self.step < number * every and not self.ended:
                    time.sleep(0.05)
                if images(self.host, prompt_of(number)) != expected:
                    self.wrong.append(number)
        except BaseException as error:
            self.trouble.append(error)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=30, help="one after another, of five kinds (default: 30)")
    parser.add_argument("--steps", type=int, default=334, help="of each job (default: 334)")
    parser.add_argument("--prompts", type=int, default=200, help="spread over the steps (default: 200)")
    parser.add_argument("--pages", type=int, default=5, help="connections that listen as a page does (default: 5)")
    parser.add_argument("--out", type=Path, help="write all numbers into this file, too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="chromakit-soak-") as folder:
        base, started = Path(folder), time.monotonic()
        expected, prompts_alone = quiet(base, options.prompts)
        print(f"{options.prompts} prompts without jobs: {json.dumps(prompts_alone)} in 100 prompts", flush=True)
        with start_host(base, extra=BOUNDED) as host:
            soak = Soak(host, options, expected)
            statuses = soak.run()
            log = host.log_path.read_text(encoding="utf-8", errors="replace")
        total, turn = options.jobs * options.steps, len(KINDS) * options.steps
        found = {
            "steps": total,
            "prompts": options.prompts,
            "prompts_wrong": soak.wrong,
            "loras": len(statuses),
            "loras_different": same_loras(statuses, base),
            "pages": options.pages,
            "page_reloads": soak.pages.reloads,
            "endings_heard_by_the_first_page": len(soak.pages.heard[0]),
            "answers": dict(soak.pages.answers),
            "events": dict(soak.pages.events.most_common()),
            "tracebacks": log.count("Traceback"),
            "slopes_per_1000_steps": soak.growth.slopes(min(turn, total // 2), 1000),
            "slopes_per_100_prompts_without_jobs": prompts_alone,
            "medians_by_turn_of_kinds": soak.growth.parts(turn),
            "hours": round((time.monotonic() - started) / 3600, 2),
        }
    print(json.dumps(found, indent=1))
    if options.out:
        options.out.write_text(json.dumps(found | {"samples": soak.growth.samples}) + "\n", encoding="utf-8")
    wrong = found["prompts_wrong"] or found["loras_different"] or found["tracebacks"] or set(found["answers"]) != {200}
    return int(bool(wrong) or found["endings_heard_by_the_first_page"] != options.jobs)


if __name__ == "__main__":
    sys.exit(main())
