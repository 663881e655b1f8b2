"""Bucket sizes, the choice of one, cropping; captions; the order of batches."""

from collections import Counter

import pytest
from PIL import Image

from chroma_core.data.buckets import bucket_table, choose_bucket, crop_box, resize_and_crop
from chroma_core.data.captions import pick_caption, with_trigger
from chroma_core.data.order import batches_per_epoch, epoch_batches, generator, integer, uniform


@pytest.mark.parametrize("resolution", [512, 768, 1024])
def test_buckets_have_nearly_one_area(resolution):
    table = bucket_table(resolution, 64)
    areas = [w * h / resolution**2 for w, h in table]
    assert (resolution, resolution) in table
    assert all(0.75 < area <= 1 for area in areas)
    assert all(w % 64 == h % 64 == 0 and max(w, h) <= 4 * min(w, h) for w, h in table)
    assert {(h, w) for w, h in table} == set(table)


def test_the_table_at_512_is_this_one():
    upright = [size for size in bucket_table(512, 64) if size[0] <= size[1]]
    assert upright == [
        (256, 832), (256, 896), (256, 960), (256, 1024), (320, 704), (320, 768), (384, 640), (448, 576), (512, 512),
    ]  # fmt: skip


def test_the_tiny_model_has_one_square_bucket():
    assert bucket_table(64, 64) == ((64, 64),)


@pytest.mark.parametrize(
    ("size", "bucket"),
    [((1000, 1000), (512, 512)), ((1920, 1080), (640, 384)), ((1080, 1920), (384, 640)), ((9000, 100), (1024, 256))],
)
def test_the_nearest_aspect_wins(size, bucket):
    assert choose_bucket(*size, 512, 64) == bucket


def test_small_images_are_enlarged_only_on_request():
    assert choose_bucket(256, 256, 1024, 64) == (256, 256)
    assert choose_bucket(256, 256, 1024, 64, upscale=True) == (1024, 1024)
    assert choose_bucket(10, 10, 1024, 64) == (64, 64)


@pytest.mark.parametrize(("size", "bucket"), [((1449, 2892), (704, 1408)), ((965, 330), (1408, 320))])
def test_rounding_puts_no_edge_outside_of_the_image(size, bucket):
    """-2e-13 pixels are enough for Pillow to refuse the box; one in sixty sizes of photographs gave such a number."""
    left, top, right, bottom = crop_box(*size, bucket)
    assert left >= 0 and top >= 0 and right <= size[0] and bottom <= size[1]
    assert resize_and_crop(Image.new("RGB", size), bucket).size == bucket


def test_cropping_is_centred_and_keeps_the_aspect():
    assert crop_box(200, 100, (64, 64)) == (50, 0, 150, 100)
    image = Image.new("RGB", (200, 100), "red")
    image.paste("blue", (50, 0, 150, 100))
    cropped = resize_and_crop(image, (64, 64))
    assert cropped.size == (64, 64)
    colours = [colour for _, colour in cropped.getcolors() or []]
    assert cropped.getpixel((32, 32)) == (0, 0, 255)
    assert min(colour[2] for colour in colours) > 240, "the filter may reach one pixel over the edge, the crop not"


def test_dropout_gives_the_truly_empty_caption_and_leaves_the_other_choices_alone():
    captions = [with_trigger("a photo", "sks"), "sks on a hill"]
    plain = [pick_caption(captions, 0.0, generator(1, "caption", i)) for i in range(2000)]
    dropped = [pick_caption(captions, 0.3, generator(1, "caption", i)) for i in range(2000)]
    counts = Counter(dropped)
    assert set(counts) == {"", "sks a photo", "sks on a hill"}
    assert 0.27 < counts[""] / 2000 < 0.33
    assert all(b in ("", a) for a, b in zip(plain, dropped, strict=True))
    assert 0.45 < plain.count("sks a photo") / 2000 < 0.55


def test_the_trigger_is_a_word_not_a_syllable():
    assert with_trigger("flasks on a table", "sks") == "sks flasks on a table"
    assert with_trigger("A photo of SKS.", "sks") == "A photo of SKS."
    assert with_trigger("", "sks") == "sks"


def test_order_is_a_function_of_seed_and_epoch():
    buckets = ["a"] * 7 + ["b"] * 4 + ["c"]
    first = epoch_batches(buckets, 3, seed=1, epoch=0)
    assert first == epoch_batches(buckets, 3, seed=1, epoch=0)
    assert first != epoch_batches(buckets, 3, seed=1, epoch=1)
    assert first != epoch_batches(buckets, 3, seed=2, epoch=0)
    assert sorted(i for batch in first for i in batch) == list(range(12))
    assert all(len({buckets[i] for i in batch}) == 1 and len(batch) <= 3 for batch in first)
    assert len(first) == batches_per_epoch(buckets, 3) == 3 + 2 + 1


def test_purposes_and_positions_draw_independently():
    values = [uniform(generator(*key)) for key in ((1, "noise", 0), (1, "noise", 1), (1, "sigma", 0), (2, "noise", 0))]
    assert len(set(values)) == 4
    assert uniform(generator(1, "noise", 0)) == values[0]
    assert Counter(integer(3, generator(0, "x", i)) for i in range(300)).keys() == {0, 1, 2}
