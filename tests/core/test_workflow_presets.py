"""The workflows for the real Chroma: they set what the memory plan recommends, and their files can be fetched."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from _workflows import FOLDER, load_api
from chroma_core.memory import Machine, recommend
from chroma_core.memory.machine import GIB
from chroma_core.memory.plan import Settings, fits_on
from chroma_core.model.flavours import FLAVOURS
from tools.workflows.presets import CARDS, COMPUTER, FILES, IMAGE_SIZE, IMAGE_SIZES, TRAINING_SIZE, preset

PLAN = ("precision", "text_precision", "offload", "resident_blocks", "offload_during_startup")
NAMES = {card: f"chroma_4_real_{card:02d}gb" for card in CARDS}
DOWNLOADS_FROM = "https://huggingface.co/"
"""One of the few places from which the host's page offers to download a model."""


def inputs(card: int, class_type: str) -> dict[str, Any]:
    (found,) = (node["inputs"] for node in load_api(NAMES[card]).values() if node["class_type"] == class_type)
    return found


def test_there_is_one_for_each_card():
    assert {path.stem for path in FOLDER.glob("chroma_4_real_*.json")} == set(NAMES.values())
    assert [preset(card).name for card in CARDS] == list(NAMES.values())


@pytest.mark.parametrize("card", CARDS)
def test_a_preset_sets_what_the_memory_plan_recommends_and_fits_in_both_uses(card: int):
    on = Machine("a card", card * GIB, COMPUTER * GIB)
    size = IMAGE_SIZES.get(card, IMAGE_SIZE)
    sampling = recommend(Settings("base", size=size), on, "sampling")
    training = recommend(Settings("base", size=TRAINING_SIZE), on, "training")
    assert sampling.fits and training.fits
    loader = inputs(card, "ChromaLoadModel")
    # The same weights are right for both on each of these cards; offload says where they wait while sampling.
    assert (loader["precision"], loader["text_precision"]) == (training.precision, training.text_precision)
    planned = {name: getattr(sampling, name) for name in PLAN}
    assert sampling.offload == "block" or sampling.resident_blocks == training.resident_blocks == 2
    planned["resident_blocks"] = min(sampling.resident_blocks, training.resident_blocks)
    assert {name: loader[name] for name in PLAN} == planned
    checkpointing = inputs(card, "ChromaTrainingSettings")["gradient_checkpointing"]
    assert checkpointing == training.gradient_checkpointing
    train = inputs(card, "ChromaTrainLora")
    chosen = Settings(
        **{name: loader[name] for name in PLAN},
        gradient_checkpointing=checkpointing,
        rank=train["rank"],
        target=train["target"],
        batch_size=train["batch_size"],
        size=inputs(card, "ChromaDataset")["resolution"],
    )
    assert fits_on(chosen, on, "training")
    image = inputs(card, "ChromaEmptyLatent")
    assert image["width"] == image["height"] == size
    assert fits_on(Settings(**{name: loader[name] for name in PLAN}, size=size), on, "sampling")


def test_presets_differ_in_the_memory_plan_alone():
    def without_plan(card: int) -> dict[str, Any]:
        prompt = load_api(NAMES[card])
        for node in prompt.values():
            for name in (*PLAN, "gradient_checkpointing"):
                node["inputs"].pop(name, None)
            if node["class_type"] == "ChromaEmptyLatent":  # smaller for 4 GB
                del node["inputs"]["width"], node["inputs"]["height"]
        return prompt

    first, *others = (without_plan(card) for card in CARDS)
    assert all(other == first for other in others)
    assert len({json.dumps(load_api(name), sort_keys=True) for name in NAMES.values()}) >= 3


@pytest.mark.parametrize("card", CARDS)
def test_what_a_preset_loads_is_what_the_page_offers_to_download(card: int):
    graph = json.loads((FOLDER / f"{NAMES[card]}.json").read_text(encoding="utf-8"))
    (loader,) = (node for node in graph["nodes"] if node["type"] == "ChromaLoadModel")
    models = {model["name"]: model for model in loader["properties"]["models"]}
    assert {inputs(card, "ChromaLoadModel")[widget] for widget in FILES} == set(models) <= set(loader["widgets_values"])
    assert inputs(card, "ChromaLoadModel")["flavour"] == "base"
    assert {model["directory"] for model in models.values()} == {"diffusion_models", "text_encoders", "vae"}
    for name, model in models.items():
        assert model["url"].startswith(DOWNLOADS_FROM) and model["url"].endswith(f"/{name}")
        assert "/resolve/main/" in model["url"] and name.endswith(".safetensors")
    assert str(FLAVOURS["base"].repository) in models["Chroma1-Base.safetensors"]["url"]


@pytest.mark.parametrize("card", CARDS)
def test_the_note_tells_what_is_set(card: int):
    graph = json.loads((FOLDER / f"{NAMES[card]}.json").read_text(encoding="utf-8"))
    (note,) = (node["widgets_values"][0] for node in graph["nodes"] if node["type"] == "MarkdownNote")
    rows = dict(re.findall(r"\| (\w+) \| `?(\w+)`? \|", note))
    loader = inputs(card, "ChromaLoadModel")
    assert {name: loader[name] for name in PLAN[:3]} == {name: rows[name] for name in PLAN[:3]}
    assert inputs(card, "ChromaDataset")["folder"] in note and f"GPU of {card} GB" in note
