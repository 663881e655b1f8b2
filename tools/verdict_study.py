"""Measures how often the verdict on a training job is right, on jobs of the embedded `tiny` model.

    python -m tools.verdict_study                  # 50 runs, half an hour of one free core; what is done stays done
    python -m tools.verdict_study --only report    # docs/data/verdict_study.json and the tables of docs/verdict.md

Jobs over rates, sizes of the dataset, ranks and steps, each with its own seed. What a verdict may use is the job's
metrics; what it is judged by is never seen by the trainer: the loss on other images with other noises, of the LoRA of
every validation, and the image test. docs/verdict.md says how a job's truth follows from them.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, astuple, dataclass
from itertools import product
from pathlib import Path
from statistics import mean, median
from typing import Any, ClassVar, NamedTuple, get_args

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny is far slower on many threads

import numpy as np
import torch
from scipy.stats import beta

from chroma_core.training.config import TrainingConfig
from chroma_core.training.jobs.blocking import run_job
from chroma_core.training.jobs.job import Job as Finished
from chroma_core.training.run.kept import kept_loras
from chroma_core.training.run.verdict import LIMITS, Limits, Record, Training, kind_of, kind_of_training, verdict
from chroma_core.training.step.objective import heldout_loss

from .pages import fill, markdown_table
from .sigma_study.study import CONCEPT_SEED, ORDINARY_SEED, Judge
from .tiny.example_dataset import read_emblem, write
from .tiny.vae import decode
from .tiny.world import plain_caption, read_image

ROOT = Path(__file__).resolve().parents[1]
DATA, PAGE = ROOT / "docs" / "data" / "verdict_study.json", ROOT / "docs" / "verdict.md"
STEPS, VALIDATIONS = 80, 10
LENGTHS = (40, 56, 80)
"""Steps of the jobs that one run stands for: at a constant rate the shorter ones are, bit for bit, its beginning."""
JUDGED_EVERY = 16
"""Steps between the LoRAs whose loss the judge measures: those of every second validation, and of every length."""
CONCEPTS, ORDINARY = 1, 8
"""Images of each caption that is held out, and of ordinary prompts, in an image test."""


@dataclass(frozen=True)
class Case:
    """A run. images: in the dataset, captions as drawn or, with `alike`, one for all of them."""

    images: int
    rate: float
    rank: int = 16
    alike: bool = False

    @property
    def name(self) -> str:
        return f"{self.images}{'alike' if self.alike else ''}-{self.rate:g}-r{self.rank}"


def cases() -> list[Case]:
    """All runs."""
    found = [Case(8, rate) for rate in (2e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2)]
    found += [Case(16, rate) for rate in (1e-3, 4e-3, 8e-3, 1.6e-2, 6.4e-2)]
    found += [Case(4, rate) for rate in (2e-3, 8e-3, 1.6e-2)]
    found += [Case(40, rate) for rate in (2e-3, 8e-3, 3.2e-2)]
    found += [Case(8, rate, rank=2) for rate in (4e-3, 3.2e-2)]
    found += [Case(16, rate, rank=64) for rate in (4e-3, 1.6e-2)]
    found += [Case(16, rate, alike=True) for rate in (1e-3, 4e-3)]
    return [*found, *LATER, *LATEST, *NEWEST]


LATEST = (
    *(Case(20, rate, rank=4) for rate in (2e-3, 8e-3, 2.4e-2)),
    *(Case(10, rate) for rate in (1.5e-3, 6e-3, 1.2e-2)),
    *(Case(32, rate) for rate in (3e-3, 6e-3, 2.4e-2)),
    *(Case(16, rate, rank=8) for rate in (2e-3, 6e-3, 1.6e-2)),
    *(Case(24, rate, rank=32) for rate in (1.5e-3, 4e-3, 1e-2)),
    *(Case(8, rate, rank=8) for rate in (2e-3, 5e-3, 1e-2)),
    *(Case(24, 4e-3, rank=32, alike=True), Case(10, 6e-3, alike=True)),
)
"""Runs by which nothing was chosen of what is said without held-out images."""

LATER = (
    *(Case(16, 1e-3, rank=64), Case(16, 2e-3), Case(8, 4e-3), Case(40, 4e-3)),
    *(Case(24, rate, rank=8) for rate in (3e-3, 1.2e-2)),
    *(Case(12, rate, rank=32) for rate in (3e-3, 1.2e-2)),
)

NEWEST = (
    *(Case(14, rate) for rate in (2e-3, 6e-3, 1.5e-2)),
    *(Case(28, rate, rank=8) for rate in (2e-3, 6e-3, 1.8e-2)),
    *(Case(36, rate, rank=32) for rate in (1.5e-3, 5e-3, 1.2e-2)),
    *(Case(9, rate, rank=8) for rate in (2e-3, 5e-3, 1.4e-2)),
)

FRESH = (
    *NEWEST,
    *(Case(16, rate, rank=8) for rate in (2e-3, 6e-3, 1.6e-2)),
    *(Case(24, rate, rank=32) for rate in (1.5e-3, 1e-2)),
    *(Case(20, 8e-3, rank=4), Case(10, 1.5e-3), Case(10, 6e-3, alike=True)),
)
"""Runs made with the verdict as it is: nothing of what it says by held-out images was chosen by them."""


def datasets(folder: Path) -> None:
    """Draw what the cases train on, and what the smallest, of which nothing is held out, are validated on."""
    for images in sorted({case.images for case in cases()}):
        write(folder / str(images), images, np.random.default_rng(images), middle=0.6)
        alike = folder / f"{images}alike"
        write(alike, images, np.random.default_rng(images), middle=0.6)
        for caption in alike.glob("*.txt"):
            caption.write_text("a sks emblem\n", encoding="utf-8")
    write(folder / "validation", 4, np.random.default_rng(5), middle=0.3)


def job_config(case: Case, seed: int, data: Path) -> dict[str, Any]:
    """The job of a case."""
    folder = data / f"{case.images}{'alike' if case.alike else ''}"
    apart = {"validation_dataset": {"folder": str(data / "validation"), "trigger": "sks"}}
    return {
        "name": case.name,
        "model": {"flavour": "tiny", "precision": "fp32", "text_precision": "fp32"},
        "dataset": {"folder": str(folder), "trigger": "sks", "caption_dropout": 0.1},
        **({"hold_out": 0.1} if case.images >= 8 else apart),
        "lora": {"rank": case.rank},
        "steps": STEPS,
        "batch_size": 1,
        "learning_rate": case.rate,
        "seed": seed,
        "gradient_checkpointing": False,
        "validate_every": STEPS // VALIDATIONS,
        "checkpoint_every": 0,
        "keep_checkpoints": 1,
        "keep_best": False,
        "keep_loras": 100,
    }


class Truth(Judge):
    """What the trainer never sees: other images and noises, and the images that a LoRA makes."""

    sampling: ClassVar = {"steps": 8, "guidance": 4.0}

    def loss(self, lora: Path | None) -> list[float]:
        """On images and noises that the trainer never has, at each noise level."""
        with self.wearing(lora):
            held = list(zip(self.latents, (self.text.encode(caption) for caption in self.captions), strict=True))
            return [round(loss, 5) for loss in heldout_loss(self.transformer, held)]

    def images(self, lora: Path | None) -> dict[str, float]:
        """The image test: shares of the concept and of ordinary prompts that come out right."""
        which, ordinary = [*range(len(self.captions))] * CONCEPTS, self.ordinary[:ORDINARY]
        with self.wearing(lora):
            concept = self.generate([self.captions[i] for i in which], CONCEPT_SEED)
            plain = self.generate([plain_caption(*triple) for triple in ordinary], ORDINARY_SEED)
        emblems = [read_emblem(image) for image in decode(self.vae, concept)]
        shapes = [read_image(image) for image in decode(self.vae, plain)]
        right = [e.right(self.readings[i].background) for e, i in zip(emblems, which, strict=True)]
        kept = [(r.shape, r.colour, r.background) == t for r, t in zip(shapes, ordinary, strict=True)]
        found = {"concept": right, "iou": [e.iou for e in emblems], "ordinary": kept}
        return {name: round(float(np.mean(values)), 4) for name, values in found.items()}


def run_case(case: Case, seed: int, output: Path, truth: Truth) -> dict[str, Any]:
    """Train and judge one job."""
    config = TrainingConfig.parse(job_config(case, seed, output / "data"))
    status = run_job(config, output / "jobs", output / "loras", "cpu")
    if status["state"] == "interrupted":
        raise SystemExit("interrupted: the same command goes on")
    job = Finished.read(output / "jobs" / config.job_id())
    kept = {one.step: one.path for one in kept_loras(job.folder / "loras")}
    by_step = {step: truth.loss(path) for step, path in kept.items() if step % JUDGED_EVERY == 0 or step in LENGTHS}
    best = min(by_step, key=lambda step: sum(by_step[step]), default=0)
    shown = sorted({best, *LENGTHS} & kept.keys())
    return {
        "case": asdict(case),
        "seed": seed,
        "state": status["state"],
        "message": status["message"],
        "metrics": [compact(line) for line in job.metrics()],
        "truth": by_step,
        "pictures": {step: truth.images(kept[step]) for step in shown},
        "seconds": status["train_seconds"],
    }


KEYS = ("step", "loss", "grad_norm", "heldout_loss", "heldout_by_sigma", "heldout_loss_base", "heldout_by_sigma_base")
KEYS += ("heldout_images", "images", "captions", "skipped", "sigma")


def compact(line: dict[str, Any]) -> dict[str, Any]:
    """What a verdict reads of a line of the metrics, in five digits."""

    def short(value: Any) -> Any:
        if isinstance(value, list):
            return [short(each) for each in value]
        return float(f"{value:.5g}") if isinstance(value, float) else value

    return {key: short(line[key]) for key in KEYS if key in line}


def study(output: Path, train: bool = True) -> Iterator[dict[str, Any]]:
    """What the judge finds of the base, then every run, done now or before; without `train`, those that are done."""
    output.mkdir(parents=True, exist_ok=True)
    datasets(output / "data")
    truth = Truth()
    yield {"truth": truth.loss(None), "pictures": truth.images(None)}
    listed = list(enumerate(cases()))
    order = np.random.default_rng(0).permutation(len(listed))  # so that what is done is a fair part of all
    for i, case in (listed[k] for k in order):
        result = output / f"{case.name}.json"
        if train and not result.is_file():
            started = time.monotonic()
            found = run_case(case, 100 + i, output, truth)
            result.write_text(json.dumps(found), encoding="utf-8")
            print(f"{i + 1:2} {case.name}: {found['state']} ({time.monotonic() - started:.0f} s)", flush=True)
        if result.is_file():
            yield json.loads(result.read_text(encoding="utf-8"))


# --- what is true of a job -------------------------------------------------------------------------------------------

CLEARLY = 0.05
"""Of what the best step gained, by the judge's loss, what is a difference."""

RUINED = 0.5
"""Of the base's share of right ordinary images, below which a LoRA has ruined it."""


class Job(NamedTuple):
    """A run up to one of its lengths."""

    run: dict[str, Any]
    length: int

    def loss(self, step: int) -> float:
        """By the judge; of a step that he measured."""
        return mean(self.run["truth"][str(step)])

    @property
    def steps(self) -> list[int]:
        return [step for step in map(int, self.run["truth"]) if step <= self.length]

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return [line for line in self.run["metrics"] if line["step"] <= self.length]

    @property
    def without_heldout(self) -> list[dict[str, Any]]:
        """Its metrics as a job has them that holds nothing out."""
        lines: list[dict[str, Any]] = [{k: v for k, v in line.items() if "heldout" not in k} for line in self.metrics]
        return [line for line in lines if len(line) > 1]

    @property
    def kind(self) -> tuple[Any, ...]:
        """Jobs that differ in their rate alone have the same."""
        case = self.run["case"]
        return case["images"], case["rank"], case["alike"], self.length


def jobs_of(study: dict[str, Any]) -> list[Job]:
    """All jobs that can be judged, those of a run beside one another: of captions that are alike, only beside a run
    that has the same images with their own."""
    own = {(run["case"]["images"], run["case"]["rate"]) for run in study["runs"] if not run["case"]["alike"]}
    runs = [r for r in study["runs"] if not r["case"]["alike"] or (r["case"]["images"], r["case"]["rate"]) in own]
    return [Job(run, length) for run in runs for length in LENGTHS]


def true_of(job: Job, study: dict[str, Any]) -> set[str]:
    """The verdicts that are right of a job, by what its trainer never saw. docs/verdict.md has the same in words."""
    rate, base = job.run["case"]["rate"], mean(study["base"]["truth"])
    losses = {step: job.loss(step) for step in job.steps}
    now, best = losses[job.length], min(losses.values())
    gain = max(base - best, 0.02 * base)
    alike = [other for other in jobs_of(study) if other.kind == job.kind]
    slower = [other for other in alike if other.run["case"]["rate"] < rate]
    calm = max(slower, key=lambda other: other.run["case"]["rate"], default=None)
    ordinary = job.run["pictures"][str(job.length)]["ordinary"]
    if now > base or ordinary < RUINED * study["base"]["pictures"]["ordinary"]:
        better = calm is None or calm.loss(job.length) < now - CLEARLY * gain
        return {"worse"} | ({"hot"} if better else set()) if now > base else {"hot"}
    if job.run["case"]["alike"]:
        own = [
            o for o in jobs_of(study) if o.kind == (*job.kind[:2], False, job.length) and o.run["case"]["rate"] == rate
        ]
        if own and own[0].loss(job.length) < now - CLEARLY * gain:
            return {"captions"}
    found = set()
    later = [job.loss(step) for step in map(int, job.run["truth"]) if step > job.length]
    before = max(step for step in job.steps if step <= 0.75 * job.length)
    rest = now - min(later) if later else losses[before] - now
    if now - best > CLEARLY * gain:
        found.add("memorises")
    else:
        found.add("learning" if rest > CLEARLY * gain else "settled")
    if CLEARLY * gain / 2 < rest < 2 * CLEARLY * gain and now - best < CLEARLY * gain:
        found |= {"learning", "settled"}
    if calm is not None and calm.loss(job.length) < now - CLEARLY * gain:
        found.add("hot")
    return found


# --- numbers and page ------------------------------------------------------------------------------------------------

WELL = ("learning", "settled", "falling")
"""Verdicts after which nobody would look for a fault."""


MEANS = {
    "diverged": {"hot", "worse"},
    "unsteady": {"hot", "worse"},
    "falling": {"learning"},
    "fallen": {"memorises", "settled"},
    "unclear": set(),
}
"""What must be true for a verdict without held-out images to be right; nothing makes *unclear* right, or wrong."""


class Judged(NamedTuple):
    """A job with the evidence of its verdict, and what is true of it. alone: by training loss and gradient norm."""

    job: Job
    evidence: dict[str, float]
    true: set[str]
    alone: bool

    def said(self, limits: Limits = LIMITS) -> str:
        return (kind_of_training if self.alone else kind_of)(self.evidence, limits)

    def right(self, limits: Limits = LIMITS) -> bool:
        """Whether the verdict is, under some limits."""
        said = self.said(limits)
        return bool(MEANS.get(said, {said}) & self.true)


def judged(study: dict[str, Any], alone: bool = False) -> list[Judged]:
    """Every job."""
    found = []
    for job in jobs_of(study):
        said = verdict(Record.of(job.without_heldout if alone else job.metrics))
        assert said is not None and said.measured is not alone
        found.append(Judged(job, said.evidence, true_of(job, study), alone))
    return found


def is_fresh(run: dict[str, Any], of: Sequence[Case] = FRESH) -> bool:
    """Whether a run was made with the verdict as it is."""
    return Case(**run["case"]) in of


def summary(study: dict[str, Any]) -> dict[str, int]:
    """How many verdicts are right, of how many, and how many were right with limits chosen without their run; the
    first two of `FRESH` runs; of all runs how many jobs are ruined, and how many of them are called well. `alone_…`:
    the same of what is said without held-out images, to which all of `LATEST` are fresh too, and how often nothing is
    said."""
    found: dict[str, int] = {}
    for name, alone, of, grid in (("", False, FRESH, GRID), ("alone_", True, (*LATEST, *NEWEST), ALONE_GRID)):
        rows = judged(study, alone)
        fresh = [row for row in rows if is_fresh(row.job.run, of)]
        known = [row for row in rows if not is_fresh(row.job.run, of)]
        ruined = [row.said() for row in rows if row.true <= {"hot", "worse"}]
        found |= {
            f"{name}right": sum(row.right() for row in known),
            f"{name}jobs": len(known),
            f"{name}unclear": sum(row.said() == "unclear" for row in known),
            f"{name}fresh_right": sum(row.right() for row in fresh),
            f"{name}fresh": len(fresh),
            f"{name}fresh_unclear": sum(row.said() == "unclear" for row in fresh),
            f"{name}ruined": len(ruined),
            f"{name}ruined_called_well": sum(said in WELL for said in ruined),
            f"{name}ruined_unclear": sum(said == "unclear" for said in ruined),
            f"{name}right_left_out": sum(_right_left_out(known, grid)),
        }
    return found


GRID = [
    Limits(*each)
    for each in product((0.15, 0.2, 0.25, 0.3, 0.35, 0.4), (-0.05, 0, 0.02, 0.05, 0.1), (0.03, 0.05, 0.07, 0.09, 0.12))
]
"""Limits to choose from."""

ALONE_GRID = [
    Limits(grown=grown, jump=jump, sunk=sunk)
    for grown, jump, sunk in product((1.05, 1.1, 1.2, 1.3), (4, 5, 6, 7, 8), (0.45, 0.5, 0.55, 0.6, 0.65))
]
"""Those of what is said without held-out images."""


def _right_left_out(rows: list[Judged], grid: list[Limits]) -> Iterator[bool]:
    """For each job, whether it is right under limits that suit the jobs of the other runs best; their median, where
    several do."""
    marks = {limits: [row.right(limits) for row in rows] for limits in grid}
    for left_out in {id(row.job.run) for row in rows}:
        own = [id(row.job.run) == left_out for row in rows]
        scores = {
            limits: sum(r for r, mine in zip(right, own, strict=True) if not mine) for limits, right in marks.items()
        }
        best = [limits for limits, score in scores.items() if score == max(scores.values())]
        chosen = Limits(*(median(values) for values in zip(*map(astuple, best), strict=True)))
        yield from (row.right(chosen) for row, mine in zip(rows, own, strict=True) if mine)


def confusion(rows: list[Judged], kinds: Sequence[str]) -> str:
    """The table of what is said with what is true."""
    counts = []
    for kind in kinds:
        own = [row for row in rows if row.said() == kind]
        wrong = Counter(" or ".join(sorted(row.true)) for row in own if not row.right())
        instead = "; ".join(f"{n} × {true}" for true, n in wrong.items())
        counts.append([kind, sum(row.right() for row in own), "–" if kind == "unclear" else wrong.total(), instead])
    return markdown_table(counts, ["the verdict said", "right", "wrong", "what was true then"])


def tables(study: dict[str, Any]) -> tuple[str, str, str]:
    """The confusion of what is said with what is true; every job with its verdict; the confusion of what is said
    without held-out images."""
    rows = judged(study)
    lines = []
    for run in study["runs"]:
        case, cells = run["case"], []
        for row in rows:
            if row.job.run is run:
                cells.append(row.said() if row.right() else f"**{row.said()}** ({' or '.join(sorted(row.true))})")
        cells = cells or ["not judged"]
        which = f"{case['images']}{' alike' if case['alike'] else ''}{', fresh' if is_fresh(run) else ''}"
        lines.append([which, case["rank"], f"{case['rate']:g}", *cells])
    columns = ["images", "rank", "rate", *(f"{length} steps" for length in LENGTHS)]
    both = confusion(rows, [*WELL[:2], "memorises", "hot", "worse", "captions"])
    return both, markdown_table(lines, columns), confusion(judged(study, alone=True), get_args(Training))


def _interval(right: int, of: int) -> str:
    """In what range the share lies that is right in the long run (Clopper and Pearson)."""
    low, high = beta.ppf(0.025, right, of - right + 1), beta.ppf(0.975, right + 1, of - right)
    return f"{low:.0%} to {high:.0%}"


def in_words(study: dict[str, Any]) -> str:
    """`summary` as a sentence."""
    found = summary(study)
    right, jobs, others = found["right"], found["jobs"], found["right_left_out"]
    well, fresh = found["fresh_right"], found["fresh"]
    return (
        f"Right: **{right} of {jobs}** jobs of the {jobs // len(LENGTHS)} runs that the limits were chosen by "
        f"({right / jobs:.0%}); {others} ({others / jobs:.0%}) with limits chosen by the others of them, run by run. "
        f"Of {fresh // len(LENGTHS)} fresh runs **{well} of {fresh}** ({well / fresh:.0%}; 95 % interval "
        f"{_interval(well, fresh)}, were they independent). Together {right + well} of {jobs + fresh} "
        f"({(right + well) / (jobs + fresh):.0%}). Of {found['ruined']} ruined jobs {found['ruined_called_well']} were "
        f"called well."
    )


def alone_in_words(study: dict[str, Any]) -> str:
    """The same of what is said without held-out images."""
    found = {key.removeprefix("alone_"): n for key, n in summary(study).items() if key.startswith("alone_")}
    right, jobs, others = found["right"], found["jobs"], found["right_left_out"]
    said, well, fresh = jobs - found["unclear"], found["fresh_right"], found["fresh"]
    later = fresh - found["fresh_unclear"]
    return (
        f"Of {jobs} jobs of the {jobs // len(LENGTHS)} runs that this was chosen by something is said of {said}, and "
        f"right is **{right}** ({right / said:.0%}); {others} with limits chosen by the others of them, run by run. "
        + (
            f"Of {fresh} jobs of {fresh // len(LENGTHS)} fresh runs something is said of {later}, and right is "
            f"**{well}** ({well / later:.0%}). "
            if fresh
            else ""
        )
        + f"Of {found['ruined']} ruined jobs {found['ruined_called_well']} were called well, and of "
        f"{found['ruined_unclear']} nothing was said."
    )


def write_report() -> None:
    """Fill docs/verdict.md from the numbers."""
    numbers = json.loads(DATA.read_text(encoding="utf-8"))
    (measured, listed, alone), said = tables(numbers), (in_words(numbers), alone_in_words(numbers))
    fill(PAGE, "accuracy", f"{said[0]}\n\n{measured}")
    fill(PAGE, "jobs", listed)
    fill(PAGE, "alone", f"{said[1]}\n\n{alone}")
    print(*said, sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "verdict-study", help="jobs and LoRAs (verdict-study)")
    parser.add_argument("--only", choices=["report"], help="only write the page, from the numbers that are there")
    parser.add_argument("--done", action="store_true", help="write numbers and page of what is done so far")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.only != "report":
        base, *runs = study(options.output.resolve(), train=not options.done)
        rows = ",\n".join("    " + json.dumps(run) for run in runs)
        DATA.write_text(f'{{\n  "base": {json.dumps(base)},\n  "runs": [\n{rows}\n  ]\n}}\n', encoding="utf-8")
    write_report()


if __name__ == "__main__":
    main()
