"""The study of noise levels: closed forms against real draws, the numbers that were kept, and the page made of them."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import integrate, stats

from chroma_core.sampling.schedule import SigmaSettings, draw_sigmas
from chroma_core.training.config import ObjectiveConfig
from chroma_core.training.step.objective import HELDOUT_SIGMAS
from tools.sigma_study.report import (
    DATA,
    DEFAULT,
    DENSITIES,
    IMAGES,
    PAGE,
    VARIANTS,
    filled,
    measured,
    paired,
)
from tools.tiny.example_dataset import decoys, draw_emblem, read_emblem
from tools.tiny.world import draw, sample_scene

KINKS = (0.0, 0.25, 0.5, 0.75, 1.0)


def study():
    return json.loads(DATA.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", VARIANTS)
def test_densities_integrate_to_one_and_are_those_of_the_draws(name):
    density = DENSITIES[name]

    def cdf(y: float) -> float:
        ends = [end for end in KINKS if end < y] + [y]
        pieces = zip(ends[:-1], ends[1:], strict=True)
        return sum(integrate.quad(lambda x: float(density(np.float64(x))), a, b)[0] for a, b in pieces)

    assert cdf(1.0) == pytest.approx(1, abs=1e-6)
    generator = torch.Generator().manual_seed(0)
    sigmas = draw_sigmas(20_000, SigmaSettings(**VARIANTS[name]), generator, 16).double().numpy()
    grid = np.linspace(0, 1, 201)
    table = np.array([0.0, *(cdf(y) for y in grid[1:])])
    expected = len(sigmas) * np.diff(table)
    seen = np.histogram(sigmas, grid)[0]
    visited = expected > 1e-6
    assert not seen[~visited].any()
    assert stats.chisquare(seen[visited], expected[visited] * seen.sum() / expected[visited].sum()).pvalue > 0.001


def test_the_default_of_the_page_is_the_default_of_the_trainer():
    objective = ObjectiveConfig()
    assert VARIANTS[DEFAULT] == {"draw": objective.draw, "remap": objective.remap}
    assert objective.flow_shift == "none"


def test_every_variant_has_the_same_seeds_and_every_number():
    kept = study()
    seeds = {name: {run["seed"] for run in kept["runs"] if run["variant"] == name} for name in VARIANTS}
    assert Counter((run["variant"], run["seed"]) for run in kept["runs"]).most_common(1)[0][1] == 1
    assert len(seeds[DEFAULT]) >= 5 and all(found == seeds[DEFAULT] for found in seeds.values())
    assert tuple(kept["settings"]["sigmas"]) == HELDOUT_SIGMAS
    for run in (kept["base"], *kept["runs"]):
        assert len(run["heldout_by_sigma"]) == len(HELDOUT_SIGMAS)
        assert all(np.isfinite(value) and -1 < value < 3 for value in measured(kept, run).values())


def test_the_page_is_what_the_script_makes_of_the_numbers():
    page = PAGE.read_text(encoding="utf-8")
    assert filled(page, study()) == page
    changed = study()
    changed["runs"][0]["concept_right"] += 0.5
    assert filled(page, changed) != page
    for name in ("sigma_densities.png", "sigma_study.png"):
        with Image.open(IMAGES / name) as image:
            assert f"images/{name}" in page and image.width >= 900


def test_paired_interval_is_that_of_a_t_test():
    a, b = np.array([0.1, 0.4, 0.3, 0.7, 0.5]), np.array([0.2, 0.1, 0.25, 0.4, 0.6])
    mean, low, high = paired(a.tolist(), b.tolist())
    interval = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (mean, low, high) == pytest.approx(((a - b).mean(), interval.low, interval.high))


def test_the_emblem_is_read_from_images_that_show_it_and_from_no_others():
    rng = np.random.default_rng(5)
    for background in ("red", "white", "blue", "black"):
        cx, cy, radius = (*rng.uniform(28, 36, 2), rng.uniform(19, 26))
        image = draw_emblem(background, cx, cy, radius)
        reading = read_emblem(image)
        assert reading.right(background) and not reading.right("pink")
        assert (reading.cx, reading.cy, reading.radius) == pytest.approx((cx, cy, radius), abs=2.5)
        mirrored = read_emblem(image[:, ::-1])
        assert not mirrored.right(background)
        assert not any(read_emblem(decoy).right(background) for decoy in decoys(background, cx, cy, radius))
    scenes = [sample_scene(rng) for _ in range(60)]
    assert not any(read_emblem(draw(scene)).right(scene.background) for scene in scenes)
