"""Measures what a LoRA of the embedded `tiny` model learns and what it spoils, with and without preservation.

    python -m tools.quality_study                  # what is not done yet: up to two hours of one free core
    python -m tools.quality_study --done           # page and numbers of what is done so far
    python -m tools.quality_study --only report    # page and image from docs/data/quality_study.json, in seconds

The real trainer on the example dataset, judged as in `tools.sigma_study`: how often the emblem is right (concept), and
how often ordinary prompts still are (ordinary; what falls is bleed). A seed has the same data order, noise and start in
every variant. Writes docs/data/quality_study.json, docs/images/quality_study.png and the tables of docs/quality.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from chroma_core.files import slug
from chroma_core.memory.plan import step_cost
from chroma_core.model.flavours import flavour
from chroma_core.training.config import TrainingConfig
from chroma_core.training.run.faults import plan_settings

from .charts import Axes, Sheet
from .pages import filled as filled_place
from .pages import markdown_table
from .sigma_study.report import DATA as SIGMA_DATA
from .sigma_study.report import DEFAULT as DRAW
from .sigma_study.report import paired
from .sigma_study.study import (
    CONCEPT_SEED,
    FIRST_SEED,
    ORDINARY_PROMPTS,
    SAMPLING,
    Judge,
    job_config,
    judged,
    write_runs,
)
from .tiny.build import check_prompts
from .tiny.example_dataset import write
from .tiny.world import SIZE, STANDARD_RADII, Scene, plain_caption
from .tiny.world import draw as draw_scene
from .verdict_study import DATA as VERDICT_DATA

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
COLUMNS = (*MEASURES, "loss")
SHARES = ("concept", "ordinary")
"""Those that are shares of images."""


class Use(NamedTuple):
    """How a LoRA is used: its strength, the guidance scale, and whether it is the running mean of its weights."""

    strength: float = 1.0
    guidance: float = 4.0
    ema: bool = False


USES = {
    "strength 0.65": Use(0.65),
    "strength 0.8": Use(0.8),
    "strength 0.9": Use(0.9),
    "guidance 3": Use(guidance=3.0),
    "guidance 2.5": Use(guidance=2.5),
    "strength 0.9, guidance 3": Use(0.9, 3.0),
    "strength 0.9, guidance 2.5": Use(0.9, 2.5),
    "EMA": Use(ema=True),
}
"""Other ways to use a LoRA than as `Use()`; training knows nothing of them."""
OPEN_PROMPTS = ("a sks emblem", "a star")
"""Prompts that leave nearly everything open: do `VARIETY_SEEDS` seeds of them differ?"""
VARIETY_SEEDS = 10
COLOURS = (
    (30, 30, 34), (120, 120, 126), (200, 120, 0), (37, 99, 235), (16, 150, 90), (220, 60, 40), (122, 75, 176),
    (0, 150, 170), (230, 90, 160), (110, 140, 30), (150, 90, 40), (70, 70, 200), (180, 180, 60), (240, 150, 130),
    (60, 90, 80), (160, 130, 200), (180, 30, 110), (20, 110, 40), (240, 90, 0),
)  # fmt: skip
LIGHT = (222, 222, 228)


def ordinary_things() -> list[tuple[str, str, str]]:
    """Shapes, colours and backgrounds of 24 prompts to preserve; none of them is judged."""
    judged_on = check_prompts(ORDINARY_PROMPTS)
    return [triple for triple in check_prompts(200, seed=7) if triple not in judged_on][:24]


def drawn(images: int) -> str:
    """Where the first images of the concept lie, relative to `ROOT`: 16 of them are the example's."""
    return f"quality-study/images/{images}"


ORDINARY_IMAGES = "quality-study/images/ordinary"
"""Where images of what is preserved lie, one for each prompt, for a regularisation set."""

THIRD = 0.3334
"""One step in three."""
THINGS = [plain_caption(*triple) for triple in ordinary_things()]
PROMPTS = {"preserve.prompts": THINGS, "preserve.share": THIRD}
CLASS = {"preserve.class_weight": 1, "preserve.share": THIRD}
BLANK = {"preserve.blank_weight": 1, "preserve.share": THIRD}
SET = {"folder": ORDINARY_IMAGES, "regularisation": True, "weight": round(THIRD, 2)}
"""24 images beside 16 of the concept: at this weight a third of the steps."""
STRONG = {**PROMPTS, "preserve.prompts_weight": 3, "steps": 400}
NO_DROPOUT = {"dataset.caption_dropout": 0}
EVEN = {"objective.draw": "uniform", "objective.remap": "none"}
OPTIONS: dict[str, dict[str, Any]] = {
    "constant rate": {"lr_schedule": "constant", "lora.ema_decay": 0.99},
    "warm-up of 50 steps": {"warmup_steps": 50},
    "target all": {"lora.target": "all"},
    "target context+ffs, σ uniform": {"lora.target": "context+ffs", **EVEN},
    "rank 4": {"lora.rank": 4},
    "rank 64": {"lora.rank": 64},
    "dropout 0.3": {"dataset.caption_dropout": 0.3},
    "4 images": {"dataset.folder": drawn(4)},
    "40 images": {"dataset.folder": drawn(40)},
    "σ uniform": EVEN,
    "σ uniform from 0.25 on": {**EVEN, "objective.minimum": 0.25},
}
"""Variants without preservation that differ from `plain` in an option or two."""
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
    "class, 400 steps, no dropout": {**CLASS, **NO_DROPOUT, "steps": 400},
    "class, 600 steps": {**CLASS, "steps": 600},
    "class and prompts × 3, 400 steps": {**STRONG, **CLASS},
    "class and prompts × 3, 600 steps": {**STRONG, **CLASS, "steps": 600, "lora.ema_decay": 0.99},
    "class and 8 prompts × 3, 400 steps, σ uniform": {**STRONG, **CLASS, **EVEN, "preserve.prompts": THINGS[:8]},
    "regularisation set, 600 steps": {"more_datasets": [SET], "steps": 600},
    **OPTIONS,
}
"""What the study compares: names, and options that differ from the job of `plain`, by dotted names. A running mean
changes no LoRA."""

REPEATED = {
    PLAIN: SEEDS,
    "class, 400 steps": 3,
    "class and prompts × 3, 400 steps": 3,
    "class and prompts × 3, 600 steps": SEEDS,
}
"""Runs of a variant; the others have one, which says little about each."""

MORE = {
    **{name: {"guidance 2.5": 1} for name in (PLAIN, "plain, 600 steps", "class", "prompts × 3, 400 steps")},
    "prompts × 3, 400 steps, no dropout": {"guidance 2.5": 1},
    "class, 400 steps, no dropout": {"strength 0.8": 1, "guidance 2.5": 1},
    "class, 600 steps": dict.fromkeys([use for use in USES if use not in ("guidance 2.5", "EMA")], 1),
    "class, share 1/4, 600 steps": {"strength 0.9, guidance 3": 1},
    "class and prompts × 3, 400 steps": {"guidance 3": 3},
    "class and prompts × 3, 600 steps": {"strength 0.8": 1, "guidance 3": SEEDS, "EMA": 1},
    "class and 8 prompts × 3, 400 steps, σ uniform": {"guidance 3": 1},
    "constant rate": {"EMA": 1},
}
"""`USES` that LoRAs of a variant are judged at as well, and of how many seeds."""


def variant_config(name: str, seed: int) -> dict[str, Any]:
    """The options of a job."""
    values = deepcopy(job_config(DRAW, seed, STEPS))
    values["name"] = f"quality-{slug(name)}-{seed}"
    for path, value in VARIANTS[name].items():
        *sections, last = path.split(".")
        place = values
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = deepcopy(value)
    for dataset in (values["dataset"], *values.get("more_datasets", [])):
        dataset["folder"] = str(ROOT / dataset["folder"])
    return values


def step_price(name: str) -> float:
    """What a mean step of a variant costs beside one of `plain`. A step on `SET`, every third, has a forward pass more,
    for its target."""
    config = TrainingConfig.parse(variant_config(name, FIRST_SEED))
    return step_cost(plan_settings(config)) + THIRD / 2 * any(each.regularisation for each in config.more_datasets)


def cost(name: str) -> float:
    """What a job of a variant computes, beside one of `plain`; the images of its prompts included."""
    config = TrainingConfig.parse(variant_config(name, FIRST_SEED))
    steps = config.steps * step_price(name) * config.effective_batch * 2
    images = len(config.preserve.prompts) * config.preserve.images if "prompts" in config.preserve.weights else 0
    generated = images * flavour(config.model.flavour).steps * 2
    return (steps + generated) / (STEPS * config.effective_batch * 2)


def by_variant(study: Mapping[str, Any]) -> dict[str, dict[int, dict[str, float]]]:
    """variant → seed → column → number, of the variants that the study has."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    for run in study["runs"]:
        numbers = {column: run[key] for column, key in MEASURES.items()}
        numbers["loss"] = float(np.mean(run["heldout_by_sigma"]))
        found.setdefault(run["variant"], {})[run["seed"]] = numbers
    return found


def tables(study: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Name and text of each table of the page."""
    found, base = by_variant(study), study["base"]
    without = by_variant({"runs": [{**base, "variant": "", "seed": 0}]})[""][0]
    rows: list[list[object]] = [["without LoRA", "", "", "", *(_number(c, [without[c]]) for c in COLUMNS)]]
    for name in (name for name in found if name not in OPTIONS):
        rows.append([f"`{name}`", f"{step_price(name):.2f}", f"{cost(name):.2f}", *_cells(found[name])])
    yield "results", markdown_table(rows, ["", "a step", "the job", "seeds", *COLUMNS])

    drawn_as = by_variant(json.loads(SIGMA_DATA.read_text(encoding="utf-8")))
    rows = [[f"`{name}`", *_cells(found[name])] for name in (PLAIN, *OPTIONS) if name in found]
    rows += [[f"`σ: {name}`", *_cells(runs)] for name, runs in drawn_as.items() if name != DRAW]
    yield "options", markdown_table(rows, ["", "seeds", *COLUMNS])

    rows = [["without LoRA", use, "", *(_number(c, [base["uses"][use][c]]) for c in SHARES)] for use in base["uses"]]
    for name in found:
        for use in USES:
            both = [run["uses"][use] for run in study["runs"] if run["variant"] == name and use in run.get("uses", {})]
            if both:
                rows.append([f"`{name}`", use, len(both), *(_number(c, [one[c] for one in both]) for c in SHARES)])
    yield "uses", markdown_table(rows, ["", "used at", "seeds", *SHARES])

    rows = [["without LoRA", *(f"{base['variety'][prompt]:.2f}" for prompt in OPEN_PROMPTS)]]
    for run in study["runs"]:
        if "variety" in run:
            rows.append([f"`{run['variant']}`", *(f"{run['variety'][prompt]:.2f}" for prompt in OPEN_PROMPTS)])
    yield "variety", markdown_table(rows, ["", *(f"*{prompt}*" for prompt in OPEN_PROMPTS)])

    yield "rates", rates()

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
    yield "paired", markdown_table(rows, ["", "seeds", *SHARES])


def rates() -> str:
    """The table of rates, ranks and sizes of the dataset: the runs of `tools.verdict_study` that were ever better than
    the base."""
    study = json.loads(VERDICT_DATA.read_text(encoding="utf-8"))
    rows = []
    for run in sorted(study["runs"], key=lambda run: [run["case"][name] for name in ("images", "rank", "rate")]):
        case, loss = run["case"], {step: float(np.mean(levels)) for step, levels in run["truth"].items()}
        best, last = min(loss, key=loss.__getitem__), max(loss, key=int)
        if not case["alike"] and loss[best] < np.mean(study["base"]["truth"]):
            shown = [f"{loss[last]:.3f}", f"{loss[best]:.3f}", best]
            ordinary = f"{100 * run['pictures'][last]['ordinary']:.0f} %"
            rows.append([case["images"], case["rank"], f"{case['rate']:g}", *shown, ordinary])
    columns = ["images", "rank", "rate", "loss at step 80", "lowest loss", "at step", "ordinary at step 80"]
    return markdown_table(rows, columns)


def _cells(runs: Mapping[int, Mapping[str, float]]) -> list[object]:
    """How many runs of a variant there are, and their numbers."""
    return [len(runs), *(_number(column, [run[column] for run in runs.values()]) for column in COLUMNS)]


def _number(column: str, values: Sequence[float]) -> str:
    """Mean and, of several, standard deviation."""
    factor, form, unit = (100, ".0f", " %") if column in SHARES else (1, ".3f", "")
    spread = f" ± {factor * np.std(values, ddof=1):{form}}" if len(values) > 1 else ""
    return f"{factor * np.mean(values):{form}}{unit}{spread}".replace("-", "−")


def _plain(name: str) -> str:
    """In letters that the font has."""
    return name.replace("×", "x").replace("σ", "sigma")


def draw(study: Mapping[str, Any], path: Path) -> None:
    """Concept against ordinary: a small dot a run, a large one the mean of a variant, and the corner that is wanted.
    Variants of one option are letters."""
    sheet = Sheet(1330, 560)
    axes = Axes(sheet, (60, 30, 620, 500), (0.4, 1.0), (0.0, 1.0), "concept right, against ordinary prompts right")
    axes.grid([i / 10 for i in range(4, 11)], [i / 10 for i in range(11)], "ordinary prompts right")
    corner = [axes.at(x, y) for x, y in ((WANTED[1], WANTED[0]), (1, WANTED[0]), (1, 1), (WANTED[1], 1))]
    sheet.area(corner, (16, 150, 90, 40))
    base = axes.at(study["base"]["ordinary_right"], 0)[0]
    sheet.line([(base, 30), (base, 500)], (150, 150, 150))
    sheet.text(base - 4, 490, "without LoRA", "rm", 11, (110, 110, 110))
    found = by_variant(study)
    for i, name in enumerate(name for name in OPTIONS if name in found):
        x, y = (float(np.mean([run[column] for run in found[name].values()])) for column in ("ordinary", "concept"))
        sheet.dot(*axes.at(max(x, 0.4), y), LIGHT, 5)
        sheet.text(*axes.at(max(x, 0.4), y), chr(ord("a") + i), "mm", 9)
        sheet.dot(1060, 50 + 24 * i, LIGHT, 7)
        sheet.text(1074, 50 + 24 * i, f"{chr(ord('a') + i)}: {_plain(name)} ({len(found[name])})")
    for i, name in enumerate(name for name in found if name not in OPTIONS):
        colour, runs = COLOURS[i], found[name]
        points = [(run["ordinary"], run["concept"]) for run in runs.values()]
        for x, y in points:
            sheet.dot(*axes.at(max(x, 0.4), y), (*colour, 110), 3)
        x, y = (float(np.mean(values)) for values in zip(*points, strict=True))
        x, y = axes.at(max(x, 0.4), y)
        sheet.dot(x, y, colour, 7)
        sheet.text(x + 9, y, str(i + 1), size=10)
        sheet.dot(650, 50 + 24 * i, colour, 7)
        sheet.text(664, 50 + 24 * i, f"{i + 1}: {_plain(name)} ({len(points)})")
    sheet.save(path, colours=250)


def filled(page: str, study: Mapping[str, Any]) -> str:
    """The page with its tables exchanged."""
    for name, table in tables(study):
        page = filled_place(page, name, table)
    return page


def run(output: Path, only: Sequence[str], train: bool = True) -> None:
    """Train and judge what is wanted and not done yet, and write all that is done."""
    output.mkdir(parents=True, exist_ok=True)
    for images in (4, 40):
        write(ROOT / drawn(images), images, np.random.default_rng(1), middle=0.6)
    draw_ordinary(ROOT / ORDINARY_IMAGES)
    judge = Judge()
    base = remembered(output / "base.json", lambda: judge.judge(None) | {"variety": variety(judge, None)})
    gentle = remembered(output / "base-guidance-3.json", lambda: judge.judge(None, guidance=3.0))
    assert base is not None and gentle is not None
    base["uses"] = {"guidance 3": {column: gentle[MEASURES[column]] for column in SHARES}}
    runs = []
    for name in VARIANTS:
        for seed in range(FIRST_SEED, FIRST_SEED + REPEATED.get(name, 1)):
            values = variant_config(name, seed)
            found = judged(name, seed, values, judge, output, train and (not only or name in only))
            if found:
                runs.append(found | further(name, seed, values, judge, output))
    settings = {"painting": SAMPLING, "uses": USES, "variants": VARIANTS}
    write_runs(DATA, settings, base, runs)


def draw_ordinary(folder: Path) -> None:
    """An image for each of `ordinary_things`, of medium size in the middle, with its caption."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, (shape, colour, background) in enumerate(ordinary_things()):
        scene = Scene(shape, colour, background, SIZE / 2, SIZE / 2, STANDARD_RADII[1], (0, 0))
        Image.fromarray(draw_scene(scene)).save(folder / f"{i + 1:02d}.png")
        caption = plain_caption(shape, colour, background)
        (folder / f"{i + 1:02d}.txt").write_text(caption + "\n", encoding="utf-8")


def further(name: str, seed: int, values: Mapping[str, Any], judge: Judge, output: Path) -> dict[str, Any]:
    """What is measured besides of a LoRA, now or by an earlier call: its shares at other `USES`, and its variety."""
    job = TrainingConfig.parse(values).job_id()
    lora = output / "loras" / f"{values['name']}.safetensors"
    wanted = MORE.get(name, {}) if lora.is_file() else {}
    uses = {}
    for use, (strength, guidance, ema) in USES.items():
        worn = lora.with_stem(f"{lora.stem}-ema") if ema else lora
        measure = (
            partial(judge.judge, worn, None, guidance, strength) if seed < FIRST_SEED + wanted.get(use, 0) else None
        )
        if found := remembered(output / f"{job}-{slug(use)}.json", measure):
            uses[use] = {column: found[MEASURES[column]] for column in SHARES}
    differ = partial(variety, judge, lora) if wanted and seed == FIRST_SEED else None
    found = remembered(output / f"{job}-variety.json", differ)
    return {"uses": uses} | ({"variety": found} if found else {})


def remembered(path: Path, measure: Callable[[], dict[str, Any]] | None) -> dict[str, Any] | None:
    """What a file holds; without one, what is measured now, if it may be."""
    if not path.is_file():
        if measure is None:
            return None
        path.write_text(json.dumps(measure()), encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


def variety(judge: Judge, lora: Path | None) -> dict[str, float]:
    """For each of `OPEN_PROMPTS`, the mean distance between two images of different seeds: the root mean square of the
    difference of their latents, whose standard deviation is about 1."""
    found = {}
    with judge.wearing(lora):
        for prompt in OPEN_PROMPTS:
            latents = judge.generate([prompt] * VARIETY_SEEDS, CONCEPT_SEED).flatten(1)
            pairs = torch.pdist(latents) / latents.shape[1] ** 0.5
            found[prompt] = round(float(pairs.mean()), 4)
    return found


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
    parser.add_argument("--done", action="store_true", help="train nothing: numbers and page of what is done so far")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.only != ["report"]:
        run(options.output.resolve(), options.only, train=not options.done)
    write_report()


if __name__ == "__main__":
    main()
