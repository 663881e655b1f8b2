"""The study of preservation: its prompts, its costs, and the page that is made of its numbers."""

import json

import pytest
from PIL import Image

from chroma_core.training.config import TrainingConfig
from tools.quality_study import (
    DATA,
    IMAGE,
    MORE,
    OPEN_PROMPTS,
    PAGE,
    PLAIN,
    THINGS,
    USES,
    VARIANTS,
    by_variant,
    cost,
    filled,
    step_price,
    variant_config,
)
from tools.sigma_study.report import DATA as SIGMA_DATA
from tools.sigma_study.study import ORDINARY_PROMPTS, job_config
from tools.tiny.build import check_prompts
from tools.tiny.world import plain_caption


def study():
    return json.loads(DATA.read_text(encoding="utf-8"))


def test_the_page_is_what_the_script_makes_of_the_numbers():
    page = PAGE.read_text(encoding="utf-8")
    assert filled(page, study()) == page
    changed = study()
    changed["runs"][-1]["concept_right"] += 0.5
    assert filled(page, changed) != page
    with Image.open(IMAGE) as image:
        assert f"images/{IMAGE.name}" in page and image.width >= 900


def test_numbers_and_variants_belong_together():
    kept = study()
    assert kept["settings"]["variants"] == json.loads(json.dumps(VARIANTS))
    found = by_variant(kept)
    assert set(found) == set(VARIANTS) and len(found[PLAIN]) >= 5
    plain = json.loads(SIGMA_DATA.read_text(encoding="utf-8"))["runs"]
    assert {run["seed"]: run["concept_right"] for run in plain if run["variant"] == "quadratic"} == {
        seed: run["concept"] for seed, run in found[PLAIN].items()
    }, "the plain job is that of the study of noise levels"
    assert variant_config(PLAIN, 3) == {**job_config("quadratic", 3, 250), "name": "quality-plain-3"}
    for name in VARIANTS:
        assert TrainingConfig.parse(variant_config(name, 1)).job_id()


def test_no_prompt_is_preserved_and_judged():
    assert len(THINGS) == 24
    assert not set(THINGS) & {plain_caption(*triple) for triple in check_prompts(ORDINARY_PROMPTS)}


def test_other_uses_and_variety_belong_to_their_runs():
    kept = study()
    for run in kept["runs"]:
        assert set(run["uses"]) >= {use for use, seeds in MORE.get(run["variant"], {}).items() if run["seed"] <= seeds}
        assert set(run["uses"]) <= set(USES)
    assert set(kept["base"]["variety"]) == set(OPEN_PROMPTS) and MORE.keys() <= VARIANTS.keys()
    nearest = max(kept["runs"], key=lambda run: min(run["concept_right"] - 0.8, run["ordinary_right"] - 0.92))
    assert nearest["variant"] == "class and prompts × 3, 600 steps"


def test_a_third_of_second_passes_is_half_a_job_more():
    assert cost(PLAIN) == 1 and cost("class") == pytest.approx(1.5, abs=1e-3)
    assert step_price("class and prompts × 3, 600 steps") == pytest.approx(1.5, abs=1e-3)
    # 24 images of 25 steps with guidance are 1200 passes of one image; the plain job has 250 · 4 · 2 of them.
    assert cost("prompts") == pytest.approx(1.5 + 1200 / 2000, abs=1e-3)
