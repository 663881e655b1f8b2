"""Crops, posterior draws, masks, repeat folders and several sets: what is cached, drawn and counted."""

import statistics
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import miniature
from chroma_core.data.buckets import crop_box
from chroma_core.data.cache import LatentTextCache
from chroma_core.data.image_folder import store_images
from chroma_core.data.images import DatasetImage
from chroma_core.data.order import generator
from chroma_core.data.samples import (
    Sample,
    SampleSet,
    cache_samples,
    combine,
    fingerprint,
    image_count,
    multiples,
)
from chroma_core.data.scan import DatasetConfig, _folder_repeats, scan
from chroma_core.data.views import View, crop_positions
from chroma_core.errors import DataError
from chroma_core.model.images import to_tensor
from chroma_core.model.latents import LatentFormat
from chroma_core.sampling.recipe import CANONICAL
from training_cases import write_dataset

PLAIN = Sample("x", (64, 64), ("a",), 0.1, (Path("q.safetensors"),))


@pytest.fixture(scope="module")
def vae():
    return miniature.vae()


@pytest.fixture
def prepare(tmp_path, vae):
    """(scan options) → samples, what could not be used, and the number of VAE loads so far in `prepare.loads`."""

    @contextmanager
    def load():
        run.loads += 1
        yield vae

    def run(folder, **options):
        found = scan(DatasetConfig.parse({"folder": str(folder), **options}))
        return cache_samples(found, run.cache, 64, load)

    run.loads = 0
    run.cache = LatentTextCache(tmp_path / "cache", "vae", "t5", CANONICAL)
    return run


def test_plain_entries_and_fingerprints_keep_their_names():
    """Recorded with the version that had neither crops nor draws: its caches and jobs stay valid."""
    cache = LatentTextCache(Path("c"), "vae", "t5", CANONICAL)
    image = DatasetImage(64, 64, path=Path("x"), name="x", captions=("a",), sha256="0" * 64, drawn=("a",))
    names = [
        cache.latents_path(image, View((64, 64))),
        cache.latents_path(image, View((64, 96), flipped=True)),
        cache.text_path("a"),
    ]
    assert [path.name[:16] for path in names] == ["0e5c5dee70ac8748", "1997cfa0d7d220a2", "81c3b3c6645c076a"]
    assert fingerprint([PLAIN])[:16] == "9157c8d2fc6e225f"


def test_the_fingerprint_sees_all_that_training_sees():
    changes = (
        {"masks": (Path("m.safetensors"),)},
        {"regularisation": True},
        {"sigma_bias": 0.5},
        {"captions": ("b",)},
        {"latents": (Path("r.safetensors"),)},
        {"caption_dropout": 0.0},
    )
    assert len({fingerprint([replace(PLAIN, **change)]) for change in ({}, *changes)}) == len(changes) + 1
    assert fingerprint([replace(PLAIN, name="other")]) == fingerprint([PLAIN])


def test_random_crops_cover_the_overhang_and_stay_inside():
    positions = crop_positions("00", (200, 100), (64, 64), 8)
    assert positions == crop_positions("00", (200, 100), (64, 64), 8) != crop_positions("01", (200, 100), (64, 64), 8)
    assert [int(p * 8) for p in positions] == list(range(8)), "one in each eighth"
    for position in (0, *positions, 1):
        left, top, right, bottom = crop_box(200, 100, (64, 64), position)
        assert 0 <= left and right <= 200 and (top, bottom) == (0, 100) and right - left == pytest.approx(100)
    assert crop_box(100, 200, (64, 64), 1) == (0, 100, 100, 200)
    assert crop_positions("00", (128, 128), (64, 64), 8) == (0.5,), "nothing to choose"


def test_crops_flips_and_posterior_draws_multiply_views_not_samples(tmp_path, prepare):
    data = write_dataset(tmp_path / "data", 2, size=(96, 64))
    samples, _ = prepare(data, alignment=64, crop="random", random_crops=3, flip=True, latents="sample")
    assert [len(sample.latents) for sample in samples] == [3 * 2 * 4] * 2
    assert len({path for sample in samples for path in sample.latents}) == 48
    entries = [prepare.cache.latents(path) for path in samples[0].latents]
    assert len({entry.numpy().tobytes() for entry in entries}) == 24
    assert prepare(data, alignment=64, crop="random", random_crops=3, flip=True, latents="sample")[0] == samples
    assert prepare.loads == 1
    drawn = {samples[0].use(generator(0, "caption", i)).latents for i in range(300)}
    assert drawn == set(samples[0].latents)


def test_posterior_draws_are_around_the_mean_by_its_deviation(tmp_path, prepare, vae):
    data = write_dataset(tmp_path / "data", 1)
    (sample,), _ = prepare(data, latents="sample", posterior_samples=64)
    (mean,), _ = prepare(data)
    pixels = to_tensor(Image.open(data / "00.png"))
    with torch.no_grad():
        posterior = vae.encode(pixels)
    to_model = LatentFormat.of(vae).to_model
    deviation = to_model(posterior.std[0]) - to_model(torch.zeros(()))
    draws = torch.stack([prepare.cache.latents(path) for path in sample.latents])
    z = (draws - prepare.cache.latents(mean.latents[0])) / deviation
    assert abs(float(z.mean())) < 0.01 and abs(float(z.std()) - 1) < 0.01


def test_an_interrupted_set_of_draws_is_completed_identically(tmp_path, prepare):
    data = write_dataset(tmp_path / "data", 1)
    (sample,), _ = prepare(data, latents="sample")
    before = [path.read_bytes() for path in sample.latents]
    sample.latents[2].unlink()
    sample.latents[0].write_bytes(b"torn")
    prepare(data, latents="sample")
    assert [path.read_bytes() for path in sample.latents] == before


def test_a_black_background_makes_new_entries_of_transparent_images_only(tmp_path, prepare):
    data = write_dataset(tmp_path / "data", 1)
    Image.new("RGBA", (64, 64), (255, 0, 0, 0)).save(data / "clear.png")
    (data / "clear.txt").write_text("clear")
    white, black = prepare(data)[0], prepare(data, background="black")[0]
    assert white[0].latents == black[0].latents and white[1].latents != black[1].latents
    assert not torch.equal(*(prepare.cache.latents(s[1].latents[0]) for s in (white, black)))


def test_mask_files_follow_crop_and_mirror_at_the_size_of_the_latents(tmp_path, prepare):
    data = write_dataset(tmp_path / "data", 2, size=(128, 64))
    mask = np.zeros((64, 128), np.uint8)
    mask[:, 32:64] = 255  # of the centred square: the left half
    Image.fromarray(mask).save(data / "00-masklabel.png")
    plain, _ = prepare(data, alignment=32, resolution=64)
    assert [sample.name for sample in plain] == ["00.png", "01.png"] and plain[0].masks == ()
    square = {"alignment": 64, "resolution": 64, "masks": "files", "flip": True}
    samples, refused = prepare(data, **square)
    assert refused == [] and samples[1].masks == () and len(samples[0].masks) == 2
    assert prepare.loads == 2, "masks need no VAE, another bucket does"
    left, right = (prepare.cache.mask(path) for path in samples[0].masks)
    assert left.shape == (1, 8, 8) and left.dtype == torch.float32
    assert torch.equal(left[0, :, :4], torch.ones(8, 4)) and torch.equal(left[0, :, 4:], torch.zeros(8, 4))
    assert torch.equal(right, left.flip(-1))
    floored = prepare.cache.mask(prepare(data, **square, mask_floor=0.25)[0][0].masks[0])
    assert torch.equal(floored, 0.25 + 0.75 * left)
    use = samples[0].use(generator(0, "caption", 0))
    assert samples[0].masks.index(use.mask) == samples[0].latents.index(use.latents)
    assert samples[1].use(generator(0, "caption", 0)).mask is None
    found = scan(DatasetConfig.parse({"folder": str(data)}))
    assert found.warnings == ["1 mask files are not used; set masks to 'files' to use them."]
    mask[:] = 255
    Image.fromarray(mask).save(data / "00-masklabel.png")
    changed, _ = prepare(data, **square)
    assert changed[0].latents == samples[0].latents and fingerprint(changed) != fingerprint(samples)


def test_the_alpha_channel_as_mask(tmp_path, prepare):
    data = write_dataset(tmp_path / "data", 1)
    image = Image.new("RGBA", (64, 64), (255, 0, 0, 255))
    image.paste((0, 0, 0, 51), (0, 0, 64, 32))
    image.save(data / "alpha.png")
    (data / "alpha.txt").write_text("alpha")
    samples, _ = prepare(data, masks="alpha")
    assert samples[0].masks == ()
    values = prepare.cache.mask(samples[1].masks[0])[0]
    assert torch.allclose(values[:4], torch.tensor(0.2)) and torch.equal(values[4:], torch.ones(4, 8))


def test_masks_that_cannot_be_used_leave_the_image_out_with_the_reason(tmp_path, prepare):
    data = write_dataset(tmp_path / "data", 4)
    Image.new("L", (64, 64), 0).save(data / "00-masklabel.png")
    Image.new("L", (64, 32), 255).save(data / "01-masklabel.png")
    (data / "02-masklabel.png").write_bytes(b"no picture")
    samples, refused = prepare(data, masks="files")
    assert [sample.name for sample in samples] == ["03.png"]
    assert refused == [
        ("00.png", "its mask is black all over, so nothing of it would be trained"),
        ("01.png", "its mask has another shape (64x32) than it (64x64)"),
        ("02.png", "its mask: not an image"),
    ]


def test_a_date_before_a_name_is_no_number_of_repeats():
    for folder, repeats in {
        "20240115_trip": 1,
        "1001_nights": 1,
        "1000_x": 1000,
        "0007_x": 7,
        f"{'9' * 5000}_x": 1,
        "3_dog/20240115_trip": 3,
        "٣_x": 1,
    }.items():
        assert _folder_repeats(f"{folder}/a.png") == repeats


def test_repeat_folders_count_their_images(tmp_path, prepare):
    for folder in ("3_dog", "3_dog/deeper", "1_cat", "0_out", "200_trip", "plain"):
        write_dataset(tmp_path / "data" / folder, 1, seed=len(folder))
    found = scan(DatasetConfig.parse({"folder": str(tmp_path / "data")}))
    assert {item.name.rsplit("/", 1)[0]: item.repeats for item in found.items} == {
        "1_cat": 1, "200_trip": 200, "3_dog": 3, "3_dog/deeper": 3, "plain": 1,
    }  # fmt: skip
    assert found.skipped == [("0_out/00.png", "its folder's name says 0 repeats")]
    assert any("1 (200_trip/00.png) with 100 repeats or more" in warning for warning in found.warnings)
    (tmp_path / "data" / "200_trip").rename(tmp_path / "data" / "trip")
    samples, _ = prepare(tmp_path / "data", repeats=2)
    names = [sample.name for sample in samples]
    assert len(names) == 2 * (3 + 3 + 1 + 1 + 1) and names.count("3_dog/00.png") == 6
    assert len(prepare(tmp_path / "data", repeats=2, repeat_folders=False)[0]) == 2 * 6


def test_sets_carry_their_flags_and_are_used_by_weight(tmp_path, prepare):
    dogs, _ = prepare(write_dataset(tmp_path / "dogs", 2), sigma_bias=0.3)
    others, _ = prepare(write_dataset(tmp_path / "others", 3, seed=1), regularisation=True, weight=0.5)
    assert {sample.sigma_bias for sample in dogs} == {0.3} and {s.regularisation for s in dogs} == {False}
    assert all(sample.regularisation for sample in others)
    sets = [SampleSet("dogs", dogs, 1.0), SampleSet("others", others, 0.5)]
    epoch = combine(sets)
    assert [sample.name for sample in epoch].count("dogs/00.png") == 2 and len(epoch) == 2 * 2 + 3
    assert image_count(epoch) == 5
    assert combine([SampleSet("dogs", dogs, 7.0)]) is dogs
    assert {s.name for s in combine([SampleSet("a", dogs), SampleSet("a", others)])} >= {"a 1/00.png", "a 2/00.png"}


def test_weights_become_whole_numbers_close_to_their_proportion():
    assert multiples([1, 1, 1]) == [1, 1, 1]
    assert multiples([1, 0.5]) == [2, 1] and multiples([3, 2]) == [3, 2] and multiples([0.001, 1]) == [1, 1000]
    for weights in np.random.default_rng(0).uniform(0.1, 3, (50, 3)):
        got = multiples(weights.tolist())
        errors = [abs(n / got[0] * weights[0] / w - 1) for n, w in zip(got, weights, strict=True)]
        assert min(got) >= 1 and max(errors) < 0.06 and statistics.median(errors) < 0.05


def test_the_held_out_variant_of_a_set_does_not_vary():
    config = DatasetConfig.parse(
        {"folder": "x", "repeats": 3, "flip": True, "crop": "center", "latents": "sample", "tag_shuffles": 3}
    )
    assert config.crop == "centre"
    held = config.held_out("sks")
    assert (held.trigger, held.repeats, held.flip, held.latents, held.tag_shuffles) == ("sks", 1, False, "mean", 0)
    assert DatasetConfig.parse({"folder": "x", "trigger": "own"}).held_out("sks").trigger == "own"


def test_images_that_are_handed_over_become_a_folder_named_by_content(tmp_path):
    images = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    folder = store_images(tmp_path, images, ["a red one\nred", "a blue one"])
    found = scan(DatasetConfig.parse({"folder": str(folder)}))
    assert [item.captions for item in found.items] == [("a red one", "red"), ("a blue one",)]
    (folder / "00001.txt").unlink()
    assert store_images(tmp_path, images, ["a red one\nred", "a blue one"]) == folder
    assert (folder / "00001.txt").read_text() == "a blue one"
    assert store_images(tmp_path, images, ["both"]) != folder
    with pytest.raises(DataError, match="2 images and 3 captions"):
        store_images(tmp_path, images, ["a", "b", "c"])
