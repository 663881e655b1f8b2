"""A folder of awkward images and captions, each handled rightly, named and counted; nothing may crash."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import zlib
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import miniature
from chroma_core.data import images
from chroma_core.data.cache import LatentTextCache
from chroma_core.data.contact_sheet import contact_sheet, summary
from chroma_core.data.images import UnreadableImage, image_facts, load_alpha, load_image
from chroma_core.data.samples import cache_samples, caption_texts
from chroma_core.data.scan import DatasetConfig, DatasetScan, scan
from chroma_core.sampling.recipe import CANONICAL

pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow remarks on huge and damaged files

ROOT = Path(__file__).resolve().parents[3]
RED, WHITE, SIZE = (255, 0, 0), (255, 255, 255), (64, 64)


def png(width: int, height: int, bits: int, colour_type: int, rows: bytes) -> bytes:
    """A PNG written by hand, for what Pillow cannot write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def frames(mode: str = "RGB") -> list[Image.Image]:
    return [Image.new(mode, SIZE, colour) for colour in ("red", "blue")]


def noise(size: tuple[int, int] = (128, 128)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))


def write_images(folder: Path) -> None:
    (folder / "sub.dir").mkdir(parents=True)

    def save(image: Image.Image, name: str, **options) -> None:
        image.save(folder / name, **options)

    turned = Image.new("RGB", (128, 64), "red")
    turned.paste("blue", (0, 0, 64, 64))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: its left is the image's top
    save(turned, "turned.jpg", exif=exif, quality=95)
    save(Image.new("CMYK", SIZE, (0, 255, 255, 0)), "print.jpg")
    save(Image.new("I;16", SIZE, 32896), "deep_grey.png")
    red16 = b"\0" + struct.pack(">HHH", 65535, 0, 0) * 64
    (folder / "deep_rgb.png").write_bytes(png(64, 64, 16, 2, red16 * 64))
    save(Image.fromarray(np.full(SIZE, 0.5, np.float32)), "float.tiff")
    save(Image.new("RGB", SIZE, "red").quantize(4), "palette.png")
    save(Image.new("P", SIZE, 0), "palette_clear.png", transparency=0)
    save(Image.new("L", SIZE, 128), "grey.png")
    save(Image.new("1", SIZE, 1), "bits.png")
    save(Image.new("LA", SIZE, (0, 0)), "grey_clear.png")
    save(Image.new("RGBA", SIZE, (255, 0, 0, 128)), "half_clear.png")
    save(frames()[0], "animated.gif", save_all=True, append_images=frames()[1:])
    save(frames()[0], "animated.webp", save_all=True, append_images=frames()[1:], lossless=True)
    save(frames()[0], "pages.tiff", save_all=True, append_images=frames()[1:])
    (folder / "bomb.png").write_bytes(png(20000, 10000, 8, 2, b""))
    save(Image.new("L", (9500, 9500), 128), "large.jpg")
    (folder / "zero.png").write_bytes(b"")
    (folder / "words.png").write_bytes(b"this is not a picture")
    for name in ("cut.jpg", "cut.png"):
        save(noise(), name)
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])
    save(Image.new("RGB", SIZE, "red"), "really_jpeg.png", format="JPEG", quality=95)
    save(Image.new("RGB", (1, 1), "red"), "dot.png")
    save(Image.new("RGB", (3000, 10), "red"), "strip.png")
    (folder / "twin.png").write_bytes((folder / "grey.png").read_bytes())
    (folder / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic")
    save(Image.new("RGB", SIZE, (254, 0, 0)), "ünï 名前 (1).png")
    save(Image.new("RGB", SIZE, "red"), "sub.dir/UPPER.CASE.PNG", format="PNG")
    (folder / "folder.png").mkdir()
    os.symlink(folder / "nowhere.png", folder / "link.png")
    save(Image.new("RGB", SIZE, "red"), ".hidden.png")


USED = {  # the colour at the top and the size, both as decoded
    "turned.jpg": ((0, 0, 255), (64, 128)),
    "print.jpg": (RED, SIZE),
    "deep_grey.png": ((128, 128, 128), SIZE),
    "deep_rgb.png": (RED, SIZE),
    "float.tiff": ((127, 127, 127), SIZE),
    "palette.png": (RED, SIZE),
    "palette_clear.png": (WHITE, SIZE),
    "grey.png": ((128, 128, 128), SIZE),
    "bits.png": (WHITE, SIZE),
    "grey_clear.png": (WHITE, SIZE),
    "half_clear.png": ((255, 127, 127), SIZE),
    "animated.gif": (RED, SIZE),
    "animated.webp": (RED, SIZE),
    "pages.tiff": (RED, SIZE),
    "large.jpg": ((128, 128, 128), (4750, 4750)),
    "really_jpeg.png": (RED, SIZE),
    "dot.png": (RED, (1, 1)),
    "strip.png": (RED, (3000, 10)),
    "twin.png": ((128, 128, 128), SIZE),
    "ünï 名前 (1).png": (RED, SIZE),
    "sub.dir/UPPER.CASE.PNG": (RED, SIZE),
}
SKIPPED = {
    "bomb.png": "unreadable image: more than 178 million pixels, the safety limit; save it smaller",
    "zero.png": "unreadable image: the file is empty",
    "words.png": "unreadable image: not an image",
    "link.png": "unreadable image: no such file or directory",
}
BREAK_WHILE_DECODING = {"cut.jpg", "cut.png"}
IGNORED = {"phone.heic", "folder.png", ".hidden.png"}


@contextmanager
def load_vae():
    yield miniature.vae()


@pytest.fixture(scope="module")
def awkward(tmp_path_factory) -> tuple[Path, DatasetScan]:
    folder = tmp_path_factory.mktemp("awkward") / "data"
    write_images(folder)
    config = {"folder": str(folder), "caption_source": "fixed", "default_caption": "a picture", "resolution": 64}
    return folder, scan(DatasetConfig.parse(config))


def test_there_are_thirty_of_them(awkward):
    names = {path.relative_to(awkward[0]).as_posix() for path in awkward[0].rglob("*")} - {"sub.dir"}
    assert names == USED.keys() | SKIPPED.keys() | BREAK_WHILE_DECODING | IGNORED
    assert len(names) == 30


def test_each_awkward_image_is_used_or_named_with_its_reason(awkward):
    found = awkward[1]
    assert {item.name for item in found.items} == USED.keys() | BREAK_WHILE_DECODING
    assert dict(found.skipped) == SKIPPED


@pytest.mark.parametrize("name", USED)
def test_an_awkward_image_is_decoded_as_a_person_sees_it(awkward, name):
    folder, found = awkward
    image = load_image(folder / name)
    colour, size = USED[name]
    assert image.mode == "RGB" and image.size == size
    top = image.getpixel((size[0] // 2, 0))
    assert max(abs(a - b) for a, b in zip(top, colour, strict=True)) <= 3, top  # type: ignore[arg-type]
    item = next(item for item in found.items if item.name == name)
    assert (item.width, item.height) == ((9500, 9500) if name == "large.jpg" else size)


def test_the_report_counts_them(awkward):
    text = "\n".join(awkward[1].warnings)
    for part in (
        "4 images were skipped: bomb.png",
        "All captions are the same",
        "Identical images (1 too many): grey.png = twin.png",
        "3 with transparency are laid over white",
        "Of 3 (animated.gif, …) with several frames or pages only the first is used",
        "1 (really_jpeg.png) of another format than the name says",
        "1 (phone.heic) in a format that is not read",
        "1 smaller than the training resolution are trained at their own, smaller size, e.g. dot.png",
        "1 tiny",
        "2 with a side below 64 pixels are enlarged, e.g. dot.png",
    ):
        assert part in text, text


def test_caching_names_what_breaks_and_keeps_the_rest(awkward, tmp_path):
    found = awkward[1]
    cache = LatentTextCache(tmp_path, "vae", "t5", CANONICAL)
    samples, unreadable = cache_samples(found, cache, 64, load_vae)
    assert {name for name, _ in unreadable} == BREAK_WHILE_DECODING
    assert all(why.startswith("unreadable image: ") and str(tmp_path) not in why for _, why in unreadable)
    assert {sample.name for sample in samples} == USED.keys()
    for sample in samples:
        width, height = sample.bucket
        latents = cache.latents(sample.latents[0])
        assert latents.shape == (16, height // 8, width // 8) and bool(latents.isfinite().all())


def test_the_contact_sheet_shows_them_and_the_warnings(awkward):
    found = awkward[1]
    sheet = contact_sheet(found.items, found, 64, columns=6, cell=96)
    bare = contact_sheet(found.items, DatasetScan(found.config, found.items, [], []), 64, columns=6, cell=96)
    assert sheet.width == bare.width == 576 and sheet.height > bare.height + 100
    panel = sheet.crop((0, bare.height, sheet.width, sheet.height))
    assert len(panel.getcolors(100_000) or []) > 1
    assert all(f"warning: {warning}" in summary(found, 64) for warning in found.warnings)


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is in other units elsewhere")
def test_a_huge_image_costs_little_memory_and_comes_at_half_its_size(tmp_path):
    """One bit a pixel in the file; decoding it to RGB in one go takes 970 MB."""
    (tmp_path / "bits.png").write_bytes(png(13000, 13000, 1, 0, bytes(1626 * 13000)))
    code = f"""
import pathlib, resource
from chroma_core.data.images import load_image
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
image = load_image(pathlib.Path({str(tmp_path / "bits.png")!r}))
print(image.mode, *image.size, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    mode, *numbers = done.stdout.split()
    assert (mode, numbers[:2]) == ("RGB", ["6500", "6500"]), done.stderr
    assert int(numbers[2]) < 500, "MiB"


def test_an_image_converted_in_strips_is_the_same(awkward, monkeypatch):
    names = ("turned.jpg", "deep_grey.png", "half_clear.png", "grey_clear.png", "print.jpg", "strip.png")
    whole = [load_image(awkward[0] / name) for name in names]
    alpha = load_alpha(awkward[0] / "half_clear.png")
    monkeypatch.setattr(images, "_STRIP", 6)
    assert [load_image(awkward[0] / name).tobytes() for name in names] == [each.tobytes() for each in whole]
    assert (again := load_alpha(awkward[0] / "half_clear.png")) and alpha and again.tobytes() == alpha.tobytes()


def test_the_limit_holds_where_another_program_has_lifted_pillows(awkward, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    for read in (image_facts, load_image, load_alpha):
        with pytest.raises(UnreadableImage, match="178 million pixels"):
            read(awkward[0] / "bomb.png")


def test_randomly_damaged_files_are_decoded_or_refused_but_never_crash(awkward, tmp_path):
    random = np.random.default_rng(0)
    originals = [awkward[0] / name for name in USED if (awkward[0] / name).stat().st_size < 100_000]
    outcomes = Counter()
    for i in range(600):
        original = originals[i % len(originals)]
        content = bytearray(original.read_bytes())
        for place in random.integers(0, min(len(content), 200 if i % 2 else len(content)), 1 + i % 7):
            content[place] = random.integers(256)
        damaged = tmp_path / f"damaged{original.suffix}"
        damaged.write_bytes(content[: len(content) - i % 3 * len(content) // 8])
        for read in (image_facts, load_image, load_alpha):
            try:
                read(damaged)
                outcomes["decoded"] += 1
            except UnreadableImage as error:
                assert str(error) and str(tmp_path) not in str(error)
                outcomes["refused"] += 1
    assert min(outcomes["decoded"], outcomes["refused"]) > 100


CAPTIONS = {
    "bom": ("\ufeffa hat".encode(), ("sks a hat",)),
    "crlf": (b"one sks\r\n\r\n two \r\n", ("one sks", "sks two")),
    "old_mac": (b"one\rtwo", ("sks one", "sks two")),
    "no_newline": (b"a cat", ("sks a cat",)),
    "trigger": (b"[trigger] on [trigger]", ("sks on sks",)),
    "part_of_word": (b"flasks", ("sks flasks",)),
    "commas": (b", ,,", ("sks , ,,",)),
    "emoji": ("שלום 🎩 名".encode(), ("sks שלום 🎩 名",)),
    "long": (b"red " * 2000, ("sks " + "red " * 1999 + "red",)),
    "brackets": (b'{"a": [1]}', ('sks {"a": [1]}',)),
    "latin1": (b"caf\xe9", None),
    "utf16": ("a cat".encode("utf-16"), None),
    "empty": (b"", None),
    "blank": (b" \n\t\n", None),
    "missing": (None, None),
    "folder": ("folder", None),
}


def test_awkward_captions(tmp_path):
    for i, (name, (content, _)) in enumerate(CAPTIONS.items()):
        Image.new("RGB", SIZE, (i, 0, 0)).save(tmp_path / f"{name}.png")
        if content == "folder":
            (tmp_path / f"{name}.txt").mkdir()
        elif isinstance(content, bytes):
            (tmp_path / f"{name}.txt").write_bytes(content)
    found = scan(DatasetConfig.parse({"folder": str(tmp_path), "trigger": "sks", "resolution": 64}))
    assert {item.name[:-4]: item.captions for item in found.items} == {k: v for k, (_, v) in CAPTIONS.items() if v}
    assert {name[:-4]: why for name, why in found.skipped} == {
        "latin1": "its caption file is not UTF-8 text",
        "utf16": "its caption file is not UTF-8 text",
        **{name: f"no caption in {name}.txt" for name in ("empty", "blank", "missing", "folder")},
    }
    assert found.warnings[0].startswith("6 images were skipped: ") and found.warnings[0].endswith("and 1 more.")
    assert found.warnings[1] == "4 without a caption are left out."
    samples, _ = cache_samples(found, LatentTextCache(tmp_path / "cache", "v", "t", CANONICAL), 64, load_vae)
    assert len(caption_texts(samples)) == 11 + 1, "every caption once, and the empty one for dropout"
