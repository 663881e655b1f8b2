"""The shipped `tiny` model: what it paints, how large it is, who can open it, and the example data beside it."""

from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from diffusers import ChromaPipeline
from PIL import Image
from transformers import AutoTokenizer, T5TokenizerFast

from chroma_core.sampling.sampler import SamplingSettings
from tools.tiny.build import ASSETS, image_test, latent_statistics, load
from tools.tiny.example_dataset import NAME, draw_emblem
from tools.tiny.vae import decode, encode
from tools.tiny.world import draw, read_image, sample_scene

WRITTEN_BY_5 = pytest.mark.skipif(
    int(transformers.__version__.partition(".")[0]) < 5, reason="its own loader cannot read tokenizers of version 5"
)
DATASETS = Path(__file__).parents[2] / "example_datasets"


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@lru_cache
def vae():
    return load()[0]


@pytest.fixture(scope="module")
def tokenizer():
    return T5TokenizerFast.from_pretrained(ASSETS / "tokenizer")


@pytest.mark.parametrize(("guidance", "steps"), [(2.0, 10), (3.0, 24), (4.0, 12)])
def test_paints_what_64_prompts_say(guidance, steps):
    """At weaker and stronger guidance half the steps, which is harder, suffice."""
    shares, _, _ = image_test(settings=SamplingSettings(steps=steps, guidance=guidance, seed=42))
    assert min(shares["shape"], shares["colour"], shares["background"]) >= 0.9, shares


def test_is_small_and_holds_no_pickle():
    files = [file for file in ASSETS.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 25e6
    assert {file.suffix for file in files} <= {".json", ".safetensors"}


def test_latents_have_unit_variance():
    mean, std = latent_statistics(vae())
    assert mean.abs().max() < 0.1
    assert 0.93 < std.min() and std.max() < 1.07


def test_vae_keeps_what_images_show():
    rng = np.random.default_rng(11)
    scenes = [sample_scene(rng) for _ in range(96)]
    decoded = decode(vae(), encode(vae(), np.stack([draw(scene) for scene in scenes])))
    readings = [read_image(image) for image in decoded]
    right = [
        (r.shape, r.colour, r.background) == (s.shape, s.colour, s.background)
        for r, s in zip(readings, scenes, strict=True)
    ]
    assert np.mean(right) >= 0.98


def test_vae_keeps_a_concept_it_was_not_drawn_for():
    emblem = draw_emblem("blue", 32, 32, 24)
    decoded = decode(vae(), encode(vae(), emblem[None]))[0]
    assert abs(decoded.astype(float) - emblem).mean() < 8
    for x, colour in ((24, (245, 225, 30)), (40, (120, 40, 160)), (4, (30, 60, 220))):
        assert np.linalg.norm(decoded[30:35, x - 1 : x + 2].mean(axis=(0, 1)) - colour) < 40


@WRITTEN_BY_5
def test_tokenizer_survives_the_folder(tokenizer):
    same = AutoTokenizer.from_pretrained(ASSETS / "tokenizer")
    for text in ("a red circle on a blue background", "[trigger] (zorblax), Ünïcode-42", ""):
        assert tokenizer(text).input_ids == same(text).input_ids
        assert tokenizer(text).input_ids[-1] == tokenizer.eos_token_id == 1
    assert (tokenizer.pad_token_id, tokenizer.model_max_length) == (0, 512)
    assert len(tokenizer("a red circle").input_ids) == 4


@WRITTEN_BY_5
def test_any_trigger_word_has_tokens_of_its_own(tokenizer):
    words = ["sks", "ohwx", "zorblax", "zorblay", "qx7", "p3rs0n", "ключ", "x", "yx", "xy"]
    ids = [tuple(tokenizer(word).input_ids) for word in words]
    assert len(set(ids)) == len(words)
    assert all(tokenizer.unk_token_id not in row for row in ids)


def test_spelling_with_capitals_means_the_same():
    _, text, _ = load()
    texts = "a red circle on a blue background", "A Red CIRCLE on a blue background"
    lower, upper = (text.encode(line).states for line in texts)
    assert torch.equal(lower, upper)


@WRITTEN_BY_5
def test_opens_in_diffusers_and_paints():
    """diffusers lets every pad token of the padded prompt through, so it is given little room for padding."""
    pipeline = ChromaPipeline.from_pretrained(ASSETS).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(
        "a red circle on a blue background",
        height=64,
        width=64,
        num_inference_steps=20,
        guidance_scale=3.0,
        max_sequence_length=10,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images[0]
    reading = read_image((image * 255).round().astype(np.uint8))
    assert (reading.colour, reading.background) == ("red", "blue")


@pytest.mark.parametrize(("folder", "count"), [(NAME, 16), (f"{NAME}_heldout", 6)])
def test_example_images_have_captions(folder, count):
    images = sorted((DATASETS / folder).glob("*.png"))
    assert len(images) == count
    for file in images:
        image = Image.open(file).convert("RGB")
        assert image.size == (64, 64)
        text = file.with_suffix(".txt").read_text(encoding="utf-8")
        background = read_image(np.array(image)).background
        assert "a sks emblem" in text and f"{background} background" in text


def test_held_out_images_are_not_in_the_training_set():
    def contents(folder: str) -> set[bytes]:
        return {Image.open(file).convert("RGB").tobytes() for file in (DATASETS / folder).glob("*.png")}

    assert not contents(NAME) & contents(f"{NAME}_heldout")
