"""What a contact sheet says about each image."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from chroma_core.data import editing
from chroma_core.data.contact_sheet import bucket_counts, contact_sheet, most_telling
from chroma_core.data.remarks import REMARKS, Remark, codes_of
from chroma_core.data.remembered import Remembered
from chroma_core.data.scan import DatasetConfig, DatasetScan, scan
from chroma_core.data.warnings import image_warnings
from chroma_core.model.drawing import fitting, font_of, wrap

AMBER = (251, 191, 36)


def write(folder: Path, name: str, size: tuple[int, int], caption: str | None, seed: int) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / name)
    if caption is not None:
        (folder / name).with_suffix(".txt").write_text(caption)


@pytest.fixture
def messy(tmp_path: Path) -> DatasetScan:
    write(tmp_path, "a.png", (256, 256), "a dog on a lawn", 0)
    write(tmp_path, "b.png", (256, 256), "a dog in the snow", 0)
    write(tmp_path, "c.png", (160, 160), "a dog", 1)
    write(tmp_path, "d.png", (90, 90), "a dog", 2)
    write(tmp_path, "e.png", (40, 400), None, 3)
    write(tmp_path, "f.png", (512, 256), "a dog by the sea", 4)
    write(tmp_path, "200_x/g.png", (256, 256), "a dog on a wall", 5)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "broken.txt").write_text("a dog")
    return scan(DatasetConfig.parse({"folder": str(tmp_path), "resolution": 256, "default_caption": "a cat"}))


def test_each_image_has_its_own_notes(messy: DatasetScan):
    assert image_warnings(messy.config, messy.items) == {
        "200_x/g.png": ["200 repeats by its folder's name"],
        "a.png": ["more than once in this set"],
        "b.png": ["same image as a.png"],
        "c.png": ["small: 160×160", "2 images have this caption"],
        "d.png": ["tiny: 90×90", "2 images have this caption"],
        "e.png": ["tiny: 40×400, enlarged", "no caption: default used"],
    }
    unknown = messy.config.model_copy(update={"resolutions": ()})
    assert "c.png" in image_warnings(unknown, messy.items) and "small" not in str(image_warnings(unknown, messy.items))


def test_masks_are_missed_where_most_images_have_one(messy: DatasetScan):
    folder, config = Path(messy.config.folder), messy.config.model_copy(update={"masks": "files"})
    assert "mask" not in str(image_warnings(config, scan(config).items))
    for name in "abcd":
        with Image.open(folder / f"{name}.png") as image:
            Image.new("L", image.size, 255).save(folder / f"{name}-masklabel.png")
    found = image_warnings(config, scan(config).items)
    assert found["f.png"] == ["no mask: all of it is trained"] and "mask" not in str(found["a.png"])


def test_buckets_are_counted_once_an_image_and_size(messy: DatasetScan):
    counts = dict(bucket_counts(messy, 1024))
    assert sum(counts.values()) == len(messy.items) and counts[256, 256] == 3
    both = messy.config.model_copy(update={"resolutions": (256, 512)})
    counts = dict(bucket_counts(DatasetScan(both, messy.items, [], []), 1024))
    assert counts[256, 256] == 3, "an image that is too small for the second size is not trained twice"


def test_doubtful_images_are_shown_first_in_the_order_of_the_set(messy: DatasetScan):
    assert [item.name for item in most_telling(messy, 16)] == [item.name for item in messy.items]
    assert [item.name for item in most_telling(messy, 6)] == ["200_x/g.png", *(f"{name}.png" for name in "abcde")]


def test_doubtful_images_have_a_frame(messy: DatasetScan):
    """Amber frames, one for each thumbnail with a note; an image whose mask does not fit gets one on the sheet."""

    def framed(scan: DatasetScan, names: str) -> list[bool]:
        items = [item for item in scan.items if item.name[0] in names]
        sheet = contact_sheet(items, DatasetScan(scan.config, items, [], []), 256, columns=len(items), cell=192)
        row = next(y for y in range(sheet.height) if AMBER in {sheet.getpixel((x, y)) for x in range(sheet.width)})
        return [sheet.getpixel((192 * i + 96, row)) == AMBER for i in range(len(items))]

    assert framed(messy, "adf") == [False, True, False], "what is doubtful depends on the images of the scan"
    folder = Path(messy.config.folder)
    Image.new("L", (256, 256), 255).save(folder / "f-masklabel.png")
    config = messy.config.model_copy(update={"masks": "files"})
    assert framed(scan(config), "adf") == [False, True, True]


def test_text_on_a_sheet_keeps_to_its_width():
    font = font_of(16)
    for text in ("a word", "w" * 200, "a × b – c " * 30, "ab " + "c" * 90 + " d"):
        lines = wrap(text, font, 200, 3)
        assert 1 <= len(lines) <= 3 and all(font.getlength(line) <= 200 for line in lines)
        assert font.getlength(fitting(text, font, 120)) <= 120
    assert "".join(wrap("x" * 60, font, 200, 9)) == "x" * 60
    assert fitting("folder/picture.png", font, 90, keep_end=True).endswith("re.png")
    assert fitting("w", font, 1) == fitting("w", font, 1, keep_end=True) == "…"


def test_a_caption_without_blanks_is_not_measured_again_and_again():
    class Counting:
        measured = 0

        def getlength(self, text: str) -> float:
            self.measured += len(text)
            return 10.0 * len(text)

    font, page = Counting(), "漢" * 5000
    assert [len(line) for line in wrap(page, font, 200, 3)[:2]] == [20, 20]
    assert len(fitting(page, font, 200, keep_end=True)) == 20
    assert font.measured < 10 * len(page)


def test_what_is_said_has_codes_and_the_page_has_words_for_each(root: Path, messy: DatasetScan, tmp_path: Path):
    words = json.loads((root / "locales" / "en" / "main.json").read_text(encoding="utf-8"))
    assert words["chromakit"]["remark"] == REMARKS
    (tmp_path / "old.tga").write_bytes(b"of another time")
    images, found = editing.entries(messy.config, 256, Remembered())
    said = [*found.warnings, *(text for image in images for text in (*image["notes"], image["skipped"]) if text)]
    codes = codes_of(said)
    assert set(codes) == set(said) and len({code["code"] for code in codes.values()}) > 8
    assert all(REMARKS[code["code"]].format(**code["values"]) == text for text, code in codes.items())
    for text in said:
        assert isinstance(text, Remark) and json.loads(json.dumps(text)) == text == pickle.loads(pickle.dumps(text))
