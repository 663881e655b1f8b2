"""The workflows for the real Chroma: they set what the memory plan recommends, and their files can be fetched."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from _workflows import load_api, load_window, window_files
from chroma_core.memory import Machine, recommend
from chroma_core.memory.machine import GIB
from chroma_core.memory.plan import Settings, fits_on
from chroma_core.model.flavours import FLAVOURS
from tools.workflows.presets import CARDS, COMPUTER, FILES, IMAGE_SIZE, IMAGE_SIZES, TRAINING_SIZE, preset

PLAN = ("precision", "text_precision", "offload", "resident_blocks", "offload_during_startup")
NAMES = {card: (f"chroma_4_real_{card:02d}gb", f"chroma_4_real_{card:02d}gb_use") for card in CARDS}
"""The two of each card: to train, and to generate with what was trained."""
DOWNLOADS_FROM = "https://huggingface.co/"
"""One of the few places from which the host's page offers to download a model."""


def inputs(card: int, class_type: str) -> dict[str, Any]:
    """A node's widgets; of one that is in both workflows of the card they are the same, links apart."""
    nodes = [node for name in NAMES[card] for node in load_api(name).values() if node["class_type"] == class_type]
    first, *others = ({key: v for key, v in node["inputs"].items() if not isinstance(v, list)} for node in nodes)
    assert all(other == first for other in others)
    return first


def test_there_is_one_for_each_card():
    assert {name for name in window_files() if "_real_" in name} == {name for pair in NAMES.values() for name in pair}
    assert [preset(card).name for card in CARDS] == [train for train, _ in NAMES.values()]


def test_training_holds_out_a_tenth_shows_its_progress_and_does_not_wait():
    for train, use in NAMES.values():
        kinds, others = ({node["class_type"] for node in load_api(name).values()} for name in (train, use))
        assert "ChromaTrainingStatus" in kinds and "ChromaSampler" not in kinds
        assert "ChromaTrainLora" not in others and "ChromaWaitForTraining" not in kinds | others
    assert inputs(CARDS[0], "ChromaSavingSettings")["hold_out"] == 0.1
    assert inputs(CARDS[0], "ChromaApplyLora")["lora"] == f"{inputs(CARDS[0], 'ChromaTrainLora')['name']}.safetensors"


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
    checkpointing = inputs(card, "ChromaSpeedSettings")["gradient_checkpointing"]
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
    def without_plan(name: str) -> dict[str, Any]:
        prompt = load_api(name)
        for node in prompt.values():
            for name in (*PLAN, "gradient_checkpointing"):
                node["inputs"].pop(name, None)
            if node["class_type"] == "ChromaEmptyLatent":  # smaller for 4 GB
                del node["inputs"]["width"], node["inputs"]["height"]
        return prompt

    for names in zip(*NAMES.values(), strict=True):
        first, *others = (without_plan(name) for name in names)
        assert all(other == first for other in others)
        assert len({json.dumps(load_api(name), sort_keys=True) for name in names}) >= 3


@pytest.mark.parametrize(("card", "use"), [(card, use) for card in CARDS for use in (0, 1)])
def test_what_a_preset_loads_is_what_the_page_offers_to_download(card: int, use: int):
    graph = load_window(NAMES[card][use])
    (loader,) = (node for node in graph["nodes"] if node["type"] == "ChromaLoadModel")
    models = {model["name"]: model for model in loader["properties"]["models"]}
    assert {inputs(card, "ChromaLoadModel")[widget] for widget in FILES} == set(models) <= set(loader["widgets_values"])
    assert inputs(card, "ChromaLoadModel")["flavour"] == "base"
    assert {model["directory"] for model in models.values()} == {"diffusion_models", "text_encoders", "vae"}
    for name, model in models.items():
        assert model["url"].startswith(DOWNLOADS_FROM) and model["url"].endswith(f"/{name}")
        assert "/resolve/main/" in model["url"] and name.endswith(".safetensors")
    assert str(FLAVOURS["base"].repository) in models["Chroma1-Base.safetensors"]["url"]


@pytest.mark.parametrize(("card", "use"), [(card, use) for card in CARDS for use in (0, 1)])
def test_the_note_tells_what_is_set(card: int, use: int):
    graph = load_window(NAMES[card][use])
    (note,) = (node["widgets_values"][0] for node in graph["nodes"] if node["type"] == "MarkdownNote")
    rows = dict(re.findall(r"\| (\w+) \| `?(\w+)`? \|", note))
    loader = inputs(card, "ChromaLoadModel")
    assert {name: loader[name] for name in PLAN[:3]} == {name: rows[name] for name in PLAN[:3]}
    assert (use or inputs(card, "ChromaDataset")["folder"] in note) and f"GPU of {card} GB" in note
