"""The disk cache: what is encoded, what is found again, what makes a new entry."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

import miniature
from chroma_core.data.cache import LatentTextCache, component_key
from chroma_core.data.samples import cache_samples, cache_texts, caption_texts, fingerprint
from chroma_core.data.scan import DatasetConfig, scan
from chroma_core.errors import DataError
from chroma_core.model.images import to_tensor
from chroma_core.model.latents import LatentFormat
from chroma_core.sampling.recipe import CANONICAL
from chroma_core.sampling.text import TextEncoder
from training_cases import write_dataset


class Loads:
    """Lends one model and counts how often it was asked for."""

    def __init__(self, model):
        self.model, self.count = model, 0

    @contextmanager
    def __call__(self):
        self.count += 1
        yield self.model


@pytest.fixture(scope="module")
def vae():
    return miniature.vae()


@pytest.fixture(scope="module")
def encoder():
    return TextEncoder(miniature.t5(), miniature.tokenizer())  # type: ignore[arg-type]


def read(folder, **options):
    return scan(DatasetConfig.parse({"folder": str(folder), **options}))


def test_latents_are_the_posterior_mean_in_model_space_and_are_found_again(tmp_path, vae):
    found = read(write_dataset(tmp_path / "data", 3))
    loads = Loads(vae)
    cache = LatentTextCache(tmp_path / "cache", "vae", "t5", CANONICAL)
    samples, unreadable = cache_samples(found, cache, 64, loads)
    assert (len(samples), unreadable, loads.count) == (3, [], 1)
    from chroma_core.data.images import load_image

    with torch.no_grad():
        z = vae.encode(to_tensor(load_image(found.items[1].path))).mean[0]
    latents = cache.latents(samples[1].latents[0])
    assert latents.shape == (16, 8, 8) and latents.dtype == torch.float32
    assert torch.equal(latents, LatentFormat.of(vae).to_model(z))

    again = LatentTextCache(tmp_path / "cache", "vae", "t5", CANONICAL)
    assert fingerprint(cache_samples(found, again, 64, loads)[0]) == fingerprint(samples)
    assert loads.count == 1, "nothing was missing, so the VAE must not be loaded"


def test_a_changed_image_model_bucket_or_damaged_entry_is_encoded_again(tmp_path, vae):
    data = write_dataset(tmp_path / "data", 3)
    loads = Loads(vae)

    def encode(vae_key="vae", **options):
        before = loads.count
        cache = LatentTextCache(tmp_path / "cache", vae_key, "t5", CANONICAL)
        samples, _ = cache_samples(read(data, **options), cache, 64, loads)
        return samples, loads.count - before

    samples, _ = encode()
    assert encode(caption_dropout=0.5)[1] == 0
    assert encode(vae_key="another")[1] == 1
    assert encode(resolution=128, upscale=True)[1] == 1
    mirrored, loaded = encode(flip=True)
    assert loaded == 1 and [len(sample.latents) for sample in mirrored] == [2, 2, 2]
    cache = LatentTextCache(tmp_path / "cache", "vae", "t5", CANONICAL)
    assert not torch.equal(cache.latents(mirrored[0].latents[0]), cache.latents(mirrored[0].latents[1]))
    (data / "00.png").write_bytes((data / "01.png").read_bytes())
    assert encode()[1] == 0, "the content is what counts, and that of 01.png is known"
    samples[2].latents[0].write_bytes(b"torn")
    assert encode()[1] == 1
    assert cache.latents(samples[2].latents[0]).shape == (16, 8, 8)


def test_interrupted_caching_goes_on_where_it_was(tmp_path, vae):
    found = read(write_dataset(tmp_path / "data", 4))
    cache = LatentTextCache(tmp_path / "cache", "vae", "t5", CANONICAL)
    calls = []

    def between():
        calls.append(1)
        if len(calls) == 4:  # once before loading, then before each entry
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache_samples(found, cache, 64, Loads(vae), between)
    todo = []
    cache_samples(found, cache, 64, Loads(vae), progress=lambda what, done, total: todo.append((what, done, total)))
    assert todo == [("latents", 0, 2), ("latents", 1, 2)]


def test_an_image_that_breaks_while_decoding_is_skipped_and_named(tmp_path, vae):
    data = write_dataset(tmp_path / "data", 3)
    whole = (data / "01.png").read_bytes()
    (data / "01.png").write_bytes(whole[: len(whole) // 2])
    found = read(data)
    assert len(found.items) == 3, "its header is fine"
    cache = LatentTextCache(tmp_path / "cache", "vae", "t5", CANONICAL)
    samples, unreadable = cache_samples(found, cache, 64, Loads(vae))
    assert [sample.name for sample in samples] == ["00.png", "02.png"]
    assert [name for name, _ in unreadable] == ["01.png"]
    for path in data.glob("*.png"):
        path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="could be decoded"):
        cache_samples(read(data), LatentTextCache(tmp_path / "other", "vae", "t5", CANONICAL), 64, Loads(vae))


def test_repeats_and_resolutions_multiply_samples_not_entries(tmp_path, vae):
    found = read(write_dataset(tmp_path / "data", 2, size=(128, 128)), resolutions=(64, 128), repeats=3)
    cache = LatentTextCache(tmp_path / "cache", "vae", "t5", CANONICAL)
    samples, _ = cache_samples(found, cache, 64, Loads(vae))
    assert len(samples) == 12
    assert {sample.bucket for sample in samples} == {(64, 64), (128, 128)}
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 4


def test_texts_equal_a_fresh_encoding_and_depend_on_the_recipe(tmp_path, encoder):
    loads = Loads(encoder)
    cache = LatentTextCache(tmp_path, "vae", "t5", CANONICAL)
    assert cache_texts(["sks", "a red circle", "sks", ""], cache, loads) == []
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3
    fresh, cached = encoder.encode("a red circle"), cache.text("a red circle")
    assert torch.equal(fresh.states, cached.states)
    assert (cached.real_tokens, cached.truncated, cached.text) == (fresh.real_tokens, 0, "a red circle")
    assert cache_texts(["", "sks"], cache, loads) == [] and loads.count == 1
    unpadded = LatentTextCache(tmp_path, "vae", "t5", replace(CANONICAL, text_attention="unpadded", visible_padding=0))
    cache_texts(["sks"], unpadded, loads)
    assert loads.count == 2
    assert unpadded.text("sks").states.shape[0] == cache.text("sks").states.shape[0] - 1
    long = "red " * 600
    assert cache_texts([long], cache, loads) == [long]
    with pytest.raises(DataError, match="Resume the job"):
        cache.text("never encoded")


def test_dropout_asks_for_the_empty_caption(tmp_path, vae):
    found = read(write_dataset(tmp_path / "data", 2), trigger="sks", caption_dropout=0.1)
    cache = LatentTextCache(tmp_path / "cache", "vae", "t5", CANONICAL)
    samples, _ = cache_samples(found, cache, 64, Loads(vae))
    assert caption_texts(samples) == ["sks a red circle", "sks on a blue background", ""]
    assert caption_texts([replace(sample, caption_dropout=0.0) for sample in samples])[-1] != ""


def test_a_component_is_known_by_its_files(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    first = component_key(tmp_path)
    assert component_key(tmp_path) == first
    (tmp_path / "config.json").write_text("{ }")
    second = component_key(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    assert len({first, second, component_key(tmp_path)}) == 3
