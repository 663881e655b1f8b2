"""What `study.py` writes from its numbers: tables and images of docs/timesteps.md; densities in closed form.

σ lies in (0, 1). A remap y = g(σ) turns the density p into the sum of p(σ)/|g′(σ)| over every σ that it takes to y.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from chroma_core.sampling.schedule import SigmaSettings, draw_sigmas, sampling_sigmas

from ..charts import INK, Axes, Sheet, round_ticks
from ..pages import filled as filled_place
from ..pages import markdown_table

VARIANTS: dict[str, dict[str, Any]] = {
    "none": {"draw": "logit_normal", "remap": "none"},
    "quadratic": {"draw": "logit_normal", "remap": "quadratic"},
    "quadratic_split": {"draw": "logit_normal", "remap": "quadratic_split"},
    "chroma": {"draw": "chroma", "remap": "none"},
    "simpletuner": {"draw": "logit_normal", "remap": "quadratic_split", "flow_shift": 3.0, "shift_first": True},
}
"""What the study compares: names, and the options of a job's objective that they stand for. `simpletuner` is what
SimpleTuner does for Chroma when nothing is set."""

DEFAULT = "quadratic"

Density = Callable[[np.ndarray], np.ndarray]


def logit_normal(sigma: np.ndarray) -> np.ndarray:
    """The density of sigmoid(N(0, 1)): φ(logit σ) / (σ(1−σ))."""
    logit = np.log(sigma / (1 - sigma))
    return np.exp(-(logit**2) / 2) / (np.sqrt(2 * np.pi) * sigma * (1 - sigma))


def chroma(sigma: np.ndarray) -> np.ndarray:
    """(2 − 7.7(σ−½)²) / (2 − 7.7/12)."""
    return (2 - 7.7 * (sigma - 0.5) ** 2) / (2 - 7.7 / 12)


def towards_zero(density: Density, y: np.ndarray) -> np.ndarray:
    """The density of σ²: p(√y) / (2√y)."""
    return density(np.sqrt(y)) / (2 * np.sqrt(y))


def towards_one(density: Density, y: np.ndarray) -> np.ndarray:
    """The density of 1 − (1−σ)²: p(1 − √(1−y)) / (2√(1−y))."""
    return density(1 - np.sqrt(1 - y)) / (2 * np.sqrt(1 - y))


def quadratic(y: np.ndarray) -> np.ndarray:
    """Logit-normal, then σ² or 1 − (1−σ)² by a fair coin: half of each."""
    return (towards_zero(logit_normal, y) + towards_one(logit_normal, y)) / 2


def quadratic_split(y: np.ndarray) -> np.ndarray:
    """Logit-normal, then σ² below ½ (which ends below ¼) and 1 − (1−σ)² from ½ on (which begins at ¾)."""
    outer = np.where(y < 0.25, towards_zero(logit_normal, y), towards_one(logit_normal, y))
    return np.where((y < 0.25) | (y >= 0.75), outer, 0.0)


def shifted(sigma: np.ndarray, shift: float = 3.0) -> np.ndarray:
    """The density of the logit-normal after a constant shift s, which adds ln s to the logit: N(ln s, 1) there."""
    logit = np.log(sigma / (1 - sigma)) - math.log(shift)
    return np.exp(-(logit**2) / 2) / (np.sqrt(2 * np.pi) * sigma * (1 - sigma))


def shifted_split(y: np.ndarray) -> np.ndarray:
    """Shift 3, and then the split remap."""
    outer = np.where(y < 0.25, towards_zero(shifted, y), towards_one(shifted, y))
    return np.where((y < 0.25) | (y >= 0.75), outer, 0.0)


DENSITIES: dict[str, Density] = {
    "none": logit_normal,
    "quadratic": quadratic,
    "quadratic_split": quadratic_split,
    "chroma": chroma,
    "simpletuner": shifted_split,
}


def share(name: str, low: float, high: float, points: int = 20_000) -> float:
    """How much of the draws falls between two noise levels (midpoint rule)."""
    width = (high - low) / points
    return float(DENSITIES[name](low + width * (np.arange(points) + 0.5)).sum() * width)


ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "timesteps.md"
DATA = ROOT / "docs" / "data" / "sigma_study.json"
IMAGES = ROOT / "docs" / "images"

COLOURS = {
    "none": (37, 99, 235),
    "quadratic": (30, 30, 34),
    "quadratic_split": (220, 60, 40),
    "chroma": (16, 150, 90),
    "simpletuner": (214, 120, 0),
}
SCHEDULES: dict[str, tuple[dict[str, Any], tuple[int, int, int]]] = {
    "linear, dynamic shift (default)": ({}, (31, 95, 191)),
    "tail bias 0.5": ({"tail_bias": 0.5}, (209, 112, 31)),
    "tail bias 1": ({"tail_bias": 1.0}, (168, 50, 28)),
    "beta, dynamic shift": ({"spacing": "beta"}, (43, 138, 75)),
    "beta, no shift": ({"spacing": "beta", "flow_shift": "none"}, (122, 75, 176)),
    "linear, no shift": ({"flow_shift": "none"}, (119, 119, 119)),
}
BANDS = {"loss, σ < ¼": (0.0, 0.25), "¼ ≤ σ < ¾": (0.25, 0.75), "σ ≥ ¾": (0.75, 1.0), "all σ": (0.0, 1.0)}
MEASURES = {
    "emblem right": "concept_right",
    "overlap": "concept_iou",
    "likeness": "likeness",
    "ordinary right": "ordinary_right",
    "drift": "ordinary_drift",
}
SHARES = ("concept_right", "ordinary_right")
"""Measures that are shares of images, shown in per cent."""


def measured(study: dict[str, Any], run: dict[str, Any]) -> dict[str, float]:
    """The table's numbers of one run, by column."""
    sigmas, losses = np.array(study["settings"]["sigmas"]), np.array(run["heldout_by_sigma"])
    inside = {name: (sigmas >= low) & (sigmas < high) for name, (low, high) in BANDS.items()}
    found = {name: float(losses[which].mean()) for name, which in inside.items()}
    return found | {name: run[key] for name, key in MEASURES.items()}


def by_variant(study: dict[str, Any]) -> dict[str, dict[int, dict[str, float]]]:
    """variant → seed → column → number."""
    found: dict[str, dict[int, dict[str, float]]] = {name: {} for name in VARIANTS}
    for run in study["runs"]:
        found[run["variant"]][run["seed"]] = measured(study, run)
    return found


def paired(values: Sequence[float], others: Sequence[float]) -> tuple[float, float, float]:
    """Mean difference of pairs and the ends of its 95 % interval (Student's t with n − 1 degrees of freedom)."""
    differences = np.array(values) - np.array(others)
    mean = float(differences.mean())
    half = float(stats.t.ppf(0.975, len(differences) - 1) * differences.std(ddof=1) / math.sqrt(len(differences)))
    return mean, mean - half, mean + half


def tables(study: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Name and text of each table of the page."""
    rows = [
        [f"`{name}`", *(f"{100 * share(name, low, high):.0f} %" for low, high in tuple(BANDS.values())[:3])]
        for name in VARIANTS
    ]
    yield "shares", markdown_table(rows, ["", "σ < ¼", "¼ ≤ σ < ¾", "σ ≥ ¾"])

    columns = [*BANDS, *MEASURES]
    found, base = by_variant(study), measured(study, study["base"])
    rows = [["without LoRA", *(_number(column, base[column]) for column in columns)]]
    for name, runs in found.items():
        cells = []
        for column in columns:
            numbers = np.array([run[column] for run in runs.values()])
            cells.append(f"{_number(column, numbers.mean())} ± {_number(column, numbers.std(ddof=1), spread=True)}")
        rows.append([f"`{name}`", *cells])
    yield "results", markdown_table(rows, ["", *columns])

    rows = []
    for name, runs in found.items():
        if name != DEFAULT:
            cells = []
            for column in columns:
                mean, low, high = paired(*([x[seed][column] for seed in runs] for x in (runs, found[DEFAULT])))
                words = f"{_number(column, mean, True)} ({_number(column, low, True)} … {_number(column, high, True)})"
                cells.append(f"**{words}**" if low > 0 or high < 0 else words)
            rows.append([f"`{name}` − `{DEFAULT}`", *cells])
    yield "paired", markdown_table(rows, ["", *columns])


def _number(column: str, value: float, signed: bool = False, spread: bool = False) -> str:
    if MEASURES.get(column) in SHARES:
        text = f"{100 * value:{'+' if signed else ''}.0f}{'' if spread or signed else ' %'}"
    else:
        text = f"{value:{'+' if signed else ''}.{4 if column in BANDS else 3}f}"
    return text.replace("-", "−")


def filled(page: str, study: dict[str, Any]) -> str:
    """The page with its tables exchanged; text outside the marks is written by hand."""
    for name, table in tables(study):
        page = filled_place(page, name, table)
    return page


def draw_schedules(path: Path) -> None:
    """The sigmas of 25 steps at 1024², for each option of the schedule."""
    steps, tokens = 25, 4096
    sheet = Sheet(760, 420)
    axes = Axes(sheet, (46, 16, 744, 380), (0, steps), (0, 1))
    axes.grid(range(0, steps + 1, 5), [i / 5 for i in range(6)], "step")
    sheet.text(*axes.at(0.6, 0.5), "sigma")
    for i, (name, (options, colour)) in enumerate(SCHEDULES.items()):
        sigmas = sampling_sigmas(steps, tokens, **options).tolist()
        axes.curve(range(steps + 1), sigmas, colour)
        for step, sigma in enumerate(sigmas):
            sheet.dot(*axes.at(step, sigma), colour, 2)
        x, y = axes.at(0.6, 0.42 - 0.065 * i)
        sheet.line([(x, y), (x + 22, y)], colour, 3)
        sheet.text(x + 28, y, name)
    sheet.save(path, colours=64)


def draw_densities(path: Path, draws: int = 200_000) -> None:
    """One chart a variant: the closed form as a line over a histogram of real draws."""
    sheet = Sheet(960, 250)
    edges = np.linspace(0, 1, 51)
    xs = np.linspace(0.002, 0.998, 800)
    step = 928 // len(VARIANTS)
    for i, (name, objective) in enumerate(VARIANTS.items()):
        left = 40 + i * step
        axes = Axes(sheet, (left, 34, left + step - 36, 200), (0, 1), (0, 3), name)
        axes.grid((0, 0.25, 0.5, 0.75, 1), (0, 1, 2, 3), "sigma")
        settings = SigmaSettings(**objective)
        sigmas = draw_sigmas(draws, settings, torch.Generator().manual_seed(0), 16)
        axes.bars(edges.tolist(), np.histogram(sigmas.numpy(), edges, density=True)[0].tolist())
        axes.curve(xs.tolist(), DENSITIES[name](xs).tolist(), COLOURS[name])
    sheet.save(path)


def draw_results(study: dict[str, Any], path: Path) -> None:
    """Held-out loss against the default at every noise level, and the images' measures run by run."""
    sheet = Sheet(960, 760)
    sigmas = study["settings"]["sigmas"]
    losses = {
        name: {run["seed"]: np.array(run["heldout_by_sigma"]) for run in study["runs"] if run["variant"] == name}
        for name in VARIANTS
    }
    relative = {
        name: np.stack([runs[seed] / losses[DEFAULT][seed] - 1 for seed in runs]) for name, runs in losses.items()
    }
    spread = np.concatenate([r.mean(0) + s * r.std(0, ddof=1) for r in relative.values() for s in (-1, 1)])
    ticks = round_ticks(float(spread.min()), float(spread.max()), 7)
    title = f"held-out loss against {DEFAULT} (mean and standard deviation over seeds; lower is better)"
    axes = Axes(sheet, (70, 40, 940, 370), (0, 1), (ticks[0], ticks[-1]), title)
    axes.sheet.area(
        [axes.at(x, y) for x in (0.25, 0.75) for y in (axes.y if x == 0.25 else axes.y[::-1])], (0, 0, 0, 10)
    )
    axes.grid((0, 0.25, 0.5, 0.75, 1), ticks, "sigma (shaded: where quadratic_split never trains)", percent=True)
    for name, rows in relative.items():
        mean, deviation = rows.mean(0), rows.std(0, ddof=1)
        if name != DEFAULT:
            axes.band(sigmas, (mean - deviation).tolist(), (mean + deviation).tolist(), COLOURS[name])
        axes.curve(sigmas, mean.tolist(), COLOURS[name], 2.5)
        for sigma, value in zip(sigmas, mean, strict=True):
            sheet.dot(*axes.at(sigma, value), COLOURS[name])
    for i, name in enumerate(VARIANTS):
        x = 90 + 880 // len(VARIANTS) * i
        sheet.line([(x, 424), (x + 24, 424)], COLOURS[name], 3)
        sheet.text(x + 32, 424, name)
    found, base = by_variant(study), measured(study, study["base"])
    shown = ("emblem right", "likeness", "ordinary right")
    for i, column in enumerate(shown):
        left = 70 + i * 305
        arrow = "share of pictures" if MEASURES[column] in SHARES else "1: the held-out picture"
        panel = Axes(sheet, (left, 480, left + 255, 700), (-0.6, len(VARIANTS) - 0.4), (0, 1), f"{column} ({arrow})")
        panel.grid((), (0, 0.2, 0.4, 0.6, 0.8, 1))
        level = panel.at(0, base[column])[1]
        sheet.line([(left, level), (left + 255, level)], (150, 150, 150), 1.5)
        below = base[column] > 0.5
        sheet.text(left + 255, level + (10 if below else -9), "without LoRA", "rm", 11, (110, 110, 110))
        for j, (name, runs) in enumerate(found.items()):
            numbers = [run[column] for run in runs.values()]
            for k, number in enumerate(numbers):
                sheet.dot(*panel.at(j + 0.1 * (k - (len(numbers) - 1) / 2), number), (*COLOURS[name], 150))
            middle = float(np.mean(numbers))
            sheet.line([panel.at(j - 0.33, middle), panel.at(j + 0.33, middle)], COLOURS[name], 3)
            sheet.text(panel.at(j, 0)[0], 716 + 15 * (j % 2), name, "mm", 12, INK)
    sheet.save(path)


def write_report() -> None:
    """Tables into docs/timesteps.md, images into docs/images."""
    study = json.loads(DATA.read_text(encoding="utf-8"))
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), study), encoding="utf-8")
    draw_schedules(IMAGES / "sigmas.png")
    draw_densities(IMAGES / "sigma_densities.png")
    draw_results(study, IMAGES / "sigma_study.png")
