"""Measures what a LoRA of the embedded `tiny` model learns and what it spoils, with and without preservation.

    python -m tools.quality_study                  # what is not done yet: up to an hour of one free core
    python -m tools.quality_study --only report    # page and image from docs/data/quality_study.json, in seconds

The real trainer on the example dataset, judged as in `tools.sigma_study`: how often the emblem is right (concept), and
how often ordinary prompts still are (ordinary; what falls is bleed). A seed has the same data order, noise and start in
every variant. Writes docs/data/quality_study.json, docs/images/quality_study.png and the tables of docs/quality.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from chroma_core.files import slug
from chroma_core.memory.plan import step_cost
from chroma_core.model.flavours import flavour
from chroma_core.training.config import TrainingConfig
from chroma_core.training.run.faults import plan_settings

from .charts import Axes, Sheet
from .pages import filled as filled_place
from .pages import markdown_table
from .sigma_study.report import paired
from .sigma_study.study import FIRST_SEED, ORDINARY_PROMPTS, SAMPLING, Judge, job_config, judged, write_runs
from .tiny.build import check_prompts
from .tiny.world import plain_caption

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "quality.md"
DATA = ROOT / "docs" / "data" / "quality_study.json"
IMAGE = ROOT / "docs" / "images" / "quality_study.png"
SEEDS = 5
STEPS = 250
PLAIN = "plain"
WANTED = (0.8, 0.92)
"""The corner that is aimed at: shares of right concepts and of right ordinary prompts."""
MEASURES = {
    "concept": "concept_right",
    "ordinary": "ordinary_right",
    "overlap": "concept_iou",
    "likeness": "likeness",
}
"""Columns of the table."""
SHARES = ("concept", "ordinary")
"""Those that are shares of images."""
GENTLE = 2.5
"""Another guidance scale that LoRAs of the first seed are judged at."""
COLOURS = (
    (30, 30, 34), (120, 120, 126), (200, 120, 0), (37, 99, 235), (16, 150, 90), (220, 60, 40), (122, 75, 176),
    (0, 150, 170), (230, 90, 160), (110, 140, 30), (150, 90, 40), (70, 70, 200),
)  # fmt: skip


def ordinary_things(count: int, seed: int = 7) -> list[str]:
    """Prompts to preserve; none of them is judged."""
    judged_on = check_prompts(ORDINARY_PROMPTS)
    found = [triple for triple in check_prompts(200, seed) if triple not in judged_on]
    return [plain_caption(*triple) for triple in found[:count]]


THIRD = 0.3334
"""One step in three."""
THINGS = ordinary_things(24)
PROMPTS = {"preserve.prompts": THINGS, "preserve.share": THIRD}
CLASS = {"preserve.class_weight": 1, "preserve.share": THIRD}
BLANK = {"preserve.blank_weight": 1, "preserve.share": THIRD}
STRONG = {**PROMPTS, "preserve.prompts_weight": 3, "steps": 400}
NO_DROPOUT = {"dataset.caption_dropout": 0}
VARIANTS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "plain, 600 steps": {"steps": 600},
    "no dropout": NO_DROPOUT,
    "blank": BLANK,
    "class": CLASS,
    "prompts": PROMPTS,
    "class, 400 steps": {**CLASS, "steps": 400},
    "class, share 1/4, 600 steps": {**CLASS, "preserve.share": 0.25, "steps": 600},
    "class and blank, 400 steps": {**CLASS, **BLANK, "steps": 400},
    "prompts × 3, 400 steps": STRONG,
    "prompts × 3 and blank, 400 steps": {**STRONG, **BLANK},
    "prompts × 3, 400 steps, no dropout": {**STRONG, **NO_DROPOUT},
    "prompts × 3 without images, 400 steps, no dropout": {**STRONG, **NO_DROPOUT, "preserve.images": 0},
}
"""What the study compares: names, and options that differ from the job of `plain`, by dotted names."""


REPEATED = (PLAIN,)
"""Variants with `SEEDS` runs; the others have one, which says little about each."""


def variant_config(name: str, seed: int) -> dict[str, Any]:
    """The options of a job."""
    values = job_config("quadratic", seed, STEPS)
    values["name"] = f"quality-{slug(name)}-{seed}"
    for path, value in VARIANTS[name].items():
        *sections, last = path.split(".")
        place = values
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return values


def cost(name: str) -> float:
    """What a job of a variant computes, beside one of `plain`; the images of its prompts included."""
    config = TrainingConfig.parse(variant_config(name, FIRST_SEED))
    steps = config.steps * step_cost(plan_settings(config)) * config.effective_batch * 2
    images = len(config.preserve.prompts) * config.preserve.images if "prompts" in config.preserve.weights else 0
    generated = images * flavour(config.model.flavour).steps * 2
    return (steps + generated) / (STEPS * config.effective_batch * 2)


def by_variant(study: Mapping[str, Any]) -> dict[str, dict[int, dict[str, float]]]:
    """variant → seed → column → number, of the variants that the study has."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    for run in study["runs"]:
        numbers = {column: run[key] for column, key in MEASURES.items()}
        numbers["loss"] = float(np.mean(run["heldout_by_sigma"]))
        numbers |= {f"gentle {column}": value for column, value in run.get("gentle", {}).items()}
        found.setdefault(run["variant"], {})[run["seed"]] = numbers
    return found


def tables(study: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Name and text of each table of the page."""
    found, base = by_variant(study), study["base"]
    columns = (*MEASURES, "loss", *(f"gentle {column}" for column in SHARES))
    titles = {f"gentle {column}": f"{column}, guidance {GENTLE:g}" for column in SHARES}
    without = by_variant({"runs": [{**base, "variant": "", "seed": 0}]})[""][0]
    rows: list[list[object]] = [["without LoRA", "", "", *(_number(column, without[column]) for column in columns)]]
    for name, runs in found.items():
        cells = []
        for column in columns:
            numbers = [run[column] for run in runs.values() if column in run]
            spread = f" ± {_number(column, float(np.std(numbers, ddof=1)), unit=False)}" if len(numbers) > 1 else ""
            cells.append(_number(column, float(np.mean(numbers))) + spread if numbers else "")
        rows.append([f"`{name}`", f"{cost(name):.2f}", len(runs), *cells])
    yield "results", markdown_table(rows, ["", "cost", "seeds", *(titles.get(c, c) for c in columns)])

    rows = []
    for name, runs in found.items():
        seeds = [seed for seed in runs if seed in found[PLAIN]]
        if name != PLAIN and len(seeds) > 2:
            cells = []
            for column in SHARES:
                mean, low, high = paired(*([of[seed][column] for seed in seeds] for of in (runs, found[PLAIN])))
                words = " … ".join(f"{100 * end:+.0f}" for end in (low, high))
                cells.append(f"{100 * mean:+.0f} ({words})".replace("-", "−"))
            rows.append([f"`{name}` − `{PLAIN}`", len(seeds), *cells])
    yield "paired", markdown_table(rows, ["", "seeds", "concept", "ordinary"])


def _number(column: str, value: float, unit: bool = True) -> str:
    share = column.removeprefix("gentle ") in SHARES
    return f"{100 * value:.0f}{' %' if unit else ''}" if share else f"{value:.3f}".replace("-", "−")


def draw(study: Mapping[str, Any], path: Path) -> None:
    """Concept against ordinary: a small dot a run, a large one the mean of a variant, and the corner that is wanted."""
    sheet = Sheet(900, 560)
    axes = Axes(sheet, (60, 30, 620, 500), (0.4, 1.0), (0.3, 1.0), "concept right, against ordinary prompts right")
    axes.grid([i / 10 for i in range(4, 11)], [i / 10 for i in range(3, 11)], "ordinary prompts right")
    corner = [axes.at(x, y) for x, y in ((WANTED[1], WANTED[0]), (1, WANTED[0]), (1, 1), (WANTED[1], 1))]
    sheet.area(corner, (16, 150, 90, 40))
    base = axes.at(study["base"]["ordinary_right"], 0.3)[0]
    sheet.line([(base, 30), (base, 500)], (150, 150, 150))
    sheet.text(base - 4, 490, "without LoRA", "rm", 11, (110, 110, 110))
    for i, (name, runs) in enumerate(by_variant(study).items()):
        colour = COLOURS[i % len(COLOURS)]
        points = [(run["ordinary"], run["concept"]) for run in runs.values()]
        for x, y in points:
            sheet.dot(*axes.at(max(x, 0.4), y), (*colour, 110), 3)
        x, y = (float(np.mean(values)) for values in zip(*points, strict=True))
        sheet.dot(*axes.at(max(x, 0.4), y), colour, 7)
        sheet.dot(650, 50 + 24 * i, colour, 7)
        sheet.text(664, 50 + 24 * i, f"{name} ({len(points)})")
    sheet.save(path, colours=96)


def filled(page: str, study: Mapping[str, Any]) -> str:
    """The page with its tables exchanged."""
    for name, table in tables(study):
        page = filled_place(page, name, table)
    return page


def run(output: Path, only: Sequence[str]) -> None:
    """Train and judge what is wanted and not done yet, and write all that is done."""
    output.mkdir(parents=True, exist_ok=True)
    judge = Judge()
    base = judge.judge(None) | {"gentle": shares(judge.judge(None, guidance=GENTLE))}
    runs = []
    for name in VARIANTS:
        for seed in range(FIRST_SEED, FIRST_SEED + (SEEDS if name in REPEATED else 1)):
            values = variant_config(name, seed)
            found = judged(name, seed, values, judge, output, not only or name in only)
            if found and seed == FIRST_SEED:
                found["gentle"] = gentle(values, judge, output)
            runs += [found] if found else []
    write_runs(DATA, {"painting": SAMPLING, "gentle": GENTLE, "variants": VARIANTS}, base, runs)


def gentle(values: Mapping[str, Any], judge: Judge, output: Path) -> dict[str, float]:
    """The shares of a job's LoRA at guidance `GENTLE`, or as an earlier call has left them."""
    result = output / f"{TrainingConfig.parse(values).job_id()}-gentle.json"
    if not result.is_file():
        lora = output / "loras" / f"{values['name']}.safetensors"
        result.write_text(json.dumps(shares(judge.judge(lora, guidance=GENTLE))), encoding="utf-8")
    return json.loads(result.read_text(encoding="utf-8"))


def shares(numbers: Mapping[str, Any]) -> dict[str, float]:
    """What is kept of images at guidance `GENTLE`."""
    return {column: numbers[MEASURES[column]] for column in SHARES}


def write_report() -> None:
    """Tables into docs/quality.md, and the image."""
    study = json.loads(DATA.read_text(encoding="utf-8"))
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), study), encoding="utf-8")
    draw(study, IMAGE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "quality-study", help="jobs and LoRAs (quality-study)")
    parser.add_argument(
        "--only", nargs="+", default=[], choices=[*VARIANTS, "report"], help="train these alone, or only write the page"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.only != ["report"]:
        run(options.output.resolve(), options.only)
    write_report()


if __name__ == "__main__":
    main()
