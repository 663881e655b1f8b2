"""The grid that a LoRA is chosen from: its images and ratings, the card and the folder of the one that is kept."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from chroma_core.errors import ConfigError, JobError
from chroma_core.files import sha256_file
from chroma_core.lora.files import read_metadata
from chroma_core.training.run import grid as grids
from chroma_core.training.run.grid import Grid, UsedLora, cells
from chroma_core.training.run.publish import Shown, keep, model_card, publish
from training_cases import config

HEADER = {
    "modelspec.title": "My | <LoRA>",
    "modelspec.description": "A lora for Chroma 1 (hd), trained with ChromaKit: 40 steps of 1 on 12 images.",
    "chromakit.flavour": "hd",
    "chromakit.trigger": "sks: #1",
    "chromakit.training": json.dumps({"kind": "lora", "rank": 16, "steps": 40, "heldout_loss": None}),
}


@pytest.fixture
def job(tmp_path):
    own = {"prompts": ["a [trigger] star", {"prompt": "a circle", "seed": 7}], "steps": 3, "seed": 100}
    return config(tmp_path, tmp_path, dataset={"folder": str(tmp_path), "trigger": "sks"}, previews=own)


def grid(**values) -> Grid:
    known = {"steps": (2, 4), "strengths": (0.7, 1.3), "prompts": ("a [trigger] star", "a cat")}
    loras = {step: UsedLora(name=f"x-{step}.safetensors", sha256=str(step)) for step in (2, 4)}
    return Grid(**{**known, "loras": loras, **values})


def test_every_image_has_a_name_of_its_own_that_changes_with_its_bits(job):
    found = cells(job, grid())
    assert [(cell.step, cell.strength, cell.prompt) for cell in found[:3]] == [(2, 0.7, 0), (2, 0.7, 1), (2, 1.3, 0)]
    assert len({cell.key for cell in found}) == 8 and cells(job, grid()) == found
    retrained = grid(loras={2: UsedLora(name="x", sha256="other"), 4: grid().loras[4]})
    keys = [cell.key for cell in cells(job, retrained)]
    assert keys[4:] == [cell.key for cell in found[4:]] and not set(keys[:4]) & {cell.key for cell in found}
    moved = job.model_copy(update={"model": job.model.__class__(**{**job.model.to_dict(), "offload": "model"})})
    assert cells(moved, grid()) == found, "where weights rest changes no image"
    other = job.model_copy(update={"recipe": "comfyui"})
    assert not {cell.key for cell in cells(other, grid())} & {cell.key for cell in found}


def test_a_prompt_that_the_previews_have_is_sampled_as_they_are(job):
    star, cat = grids.previews(job, ["a [trigger] star", "a cat"])
    assert star == job.preview_list()[0] and (cat.settings.seed, cat.settings.steps) == (101, 3)
    assert grids.previews(job, ["a circle"])[0].settings.seed == 7
    assert grids.previews(job, []) == job.preview_list()
    with pytest.raises(ConfigError, match="at least one prompt"):
        grids.previews(job.model_copy(update={"previews": job.previews.model_copy(update={"prompts": ()})}), [])


def test_the_best_is_the_highest_mean_and_the_more_ratings(job):
    found = cells(job, grid())
    rated = grid()
    for place, rating in ((0, 5), (1, 4), (2, 5), (3, 4), (4, 5)):
        rated = grids.rated(rated, found[place].key, rating)
    rows = grids.averages(rated, found)
    assert [(row.mean, row.rated) for row in rows] == [(4.5, 2), (4.5, 2), (5.0, 1), (None, 0)]
    assert grids.best(rows) == rows[2]
    rows = grids.averages(grids.rated(rated, found[4].key, 0), found)
    assert grids.best(rows) == rows[0] and grids.best(grids.averages(grid(), found)) is None
    for wrong in (6, -1):
        with pytest.raises(ConfigError, match="from 1 to 5"):
            grids.rated(grid(), "x", wrong)


def test_a_grid_is_read_as_it_was_written(tmp_path):
    assert grids.read_grid(tmp_path) is None
    grids.write_grid(tmp_path, grid(ratings={"a": 3}))
    assert grids.read_grid(tmp_path) == grid(ratings={"a": 3})
    path = grids.grid_path(tmp_path)
    for text, words in (('{"format": 2}', "later version"), ("[]", "is damaged"), ("{", "cannot be read as JSON")):
        path.write_text(text)
        with pytest.raises(JobError, match=words):
            grids.read_grid(tmp_path)


def test_an_image_counts_once_it_is_whole(tmp_path):
    folder = grids.images_folder(tmp_path)
    folder.mkdir()
    whole = folder / "abc_00002_.png"
    Image.new("RGB", (8, 8)).save(whole)
    (folder / "abc_00001_.png").write_bytes(whole.read_bytes()[:-5])
    assert grids.image_of(tmp_path, "abc") == whole and grids.image_of(tmp_path, "ab") is None


def test_a_card_says_what_the_header_says(job):
    preview = job.preview_list()[0]
    text = model_card(HEADER, "my.safetensors", 0.7, [Shown("my.png", preview)])
    start, front, body = text.split("---\n", 2)
    values = yaml.safe_load(front)
    assert start == "" and values == {
        "tags": ["text-to-image", "lora", "chroma", "template:diffusion-lora"],
        "pipeline_tag": "text-to-image",
        "base_model": "lodestones/Chroma1-HD",
        "base_model_relation": "adapter",
        "library_name": "diffusers",
        "instance_prompt": "sks: #1",
        "widget": [{"text": "a sks star", "output": {"url": "my.png"}}],
    }
    assert r"# My \| \<LoRA\>" in body and "| strength | 0.7 |" in body and "| rank | 16 |" in body
    assert "validation loss" not in body and "![a sks star](my.png)" in body
    own = model_card(
        {**HEADER, "chromakit.base_file": "mine.gguf", "chromakit.training": '{"kind": "lokr"}'}, "f", 1, []
    )
    values = yaml.safe_load(own.split("---\n")[1])
    assert not {"base_model", "library_name"} & set(values) and "| base | mine.gguf |" in own
    assert "| trigger word | none |" in model_card({}, "bare.safetensors", 1.0, [])


def test_what_is_kept_leaves_the_users_files_and_the_lora_alone(job, tmp_path):
    lora, image = tmp_path / "loras" / "my-step-000002.safetensors", tmp_path / "abc_00001_.png"
    lora.parent.mkdir()
    save_file({"x": torch.zeros(1)}, lora, HEADER)
    Image.new("RGB", (8, 8), "red").save(image)
    before, cell = sha256_file(lora), cells(job, grid())[0]
    written, stayed = keep(grid(), lora, cell, image)
    assert stayed == [] and set(written) == {"my-step-000002.png", "my-step-000002.md"}
    assert lora.with_suffix(".png").read_bytes() == image.read_bytes()
    lora.with_suffix(".md").write_text("mine")
    Image.new("RGB", (8, 8), "blue").save(image)
    again, stayed = keep(grid(written=written), lora, cell, image)
    assert stayed == ["my-step-000002.md"] and again.keys() == written.keys()
    assert lora.with_suffix(".png").read_bytes() == image.read_bytes()

    folders = [publish(tmp_path / "publish", lora, [(cell, image)] * 2) for _ in range(2)]
    assert [folder.name for folder in folders] == ["my-step-000002", "my-step-000002-2"]
    found = sorted(path.relative_to(folders[0]).as_posix() for path in folders[0].rglob("*.*"))
    assert found == ["README.md", "images/01.png", "images/02.png", "my-step-000002.safetensors"]
    assert sha256_file(folders[0] / lora.name) == before == sha256_file(lora)
    assert read_metadata(lora)["chromakit.trigger"] == "sks: #1"
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(JobError, match="cannot be written to"):
        publish(tmp_path / "file", lora, [(cell, image)])
