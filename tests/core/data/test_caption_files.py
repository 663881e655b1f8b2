"""Caption files as people have them: endings, marks inside a text, JSON, and those that are passed over."""

import json
import os
import sys
from pathlib import Path

import pytest
from PIL import Image

from chroma_core.data.captions import read_captions
from chroma_core.data.contact_sheet import contact_sheet, summary
from chroma_core.data.images import image_extensions
from chroma_core.data.scan import DatasetConfig, DatasetScan, scan
from chroma_core.errors import DataError


def image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 64), "red").save(path)
    return path


def looked_at(folder, **options) -> DatasetScan:
    return scan(DatasetConfig.parse({"folder": str(folder), **options}))


def test_an_ending_in_capitals_is_the_same_ending(tmp_path):
    image(tmp_path / "a.PNG").with_suffix(".TXT").write_text("a star")
    image(tmp_path / "b.png").with_suffix(".txt").write_text("exact")
    (tmp_path / "b.TXT").write_text("not this one")
    assert [item.captions for item in looked_at(tmp_path).items] == [("a star",), ("exact",)]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere file names are text")
@pytest.mark.parametrize(
    ("source", "usable"), [("files", ["ok.png"]), ("metadata", ["ok.png"]), ("filenames", ["half.png", "ok.png"])]
)
def test_half_a_character_is_no_caption_and_stops_nothing(tmp_path, source, usable):
    """In JSON, in metadata, and in a file's name of foreign bytes: named, and all that is said can be written."""
    for name in ("half.png", "ok.png", os.fsdecode(b"na\xffme.png")):
        path = image(tmp_path / name)
        text = "a \ud800 star" if name == "half.png" else "a star"
        path.with_suffix(".json").write_text(json.dumps(text if "ok" in name else [text]))
    rows = [
        {"file_name": "half.png", "text": "\ud800"},
        {"file_name": "\ud800.png"},
        {"file_name": "ok.png", "text": "x"},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = looked_at(tmp_path, caption_extension=".json", caption_source=source, resolution=64)
    named = "na\\udcffme.png"
    assert {item.name for item in found.items} == {*usable, *([named] if source == "files" else [])}
    reasons = dict(found.skipped)
    assert reasons.pop(named if source == "filenames" else "half.png").startswith("its caption has half a character")
    assert all("no caption" in why for why in reasons.values())
    assert summary(found, 64).encode() and contact_sheet(found.items, found, 64)


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x0b", "\x0c", "\x1c", "\x85"])
def test_only_line_ends_divide_captions(tmp_path, mark):
    path = tmp_path / "a.txt"
    path.write_bytes(f"one{mark}caption\r\n\r\nanother\rthird\n".encode())
    assert read_captions(path) == (f"one{mark}caption", "another", "third")


@pytest.mark.parametrize(
    ("lines", "captions"),
    [("each", ("a red star", "at night")), ("joined", ("a red star at night",)), ("first", ("a red star",))],
)
def test_what_the_lines_of_a_caption_file_are(tmp_path, lines, captions):
    image(tmp_path / "a.png").with_suffix(".txt").write_text("a red star \r\n\r\n at night\n")
    image(tmp_path / "b.png").with_suffix(".txt").write_text(" \n")
    found = looked_at(tmp_path, caption_lines=lines)
    assert [item.captions for item in found.items] == [captions]
    assert [name for name, _ in found.skipped] == ["b.png"]


def test_joined_lines_are_the_same_tokens_as_the_lines():
    transformers = pytest.importorskip("transformers")
    folder = Path(__file__).parents[3] / ".host/ComfyUI/comfy/text_encoders/t5_tokenizer"
    if not folder.is_dir():
        pytest.skip("no ComfyUI, whose tokenizer is T5's own")
    tokenizer = transformers.T5TokenizerFast.from_pretrained(folder)
    whole = "a red house\nby the sea, \r\n\n at night\n"
    assert tokenizer(whole).input_ids == tokenizer("a red house by the sea, at night").input_ids


@pytest.mark.parametrize(
    ("value", "captions"),
    [
        ("a star", ("a star",)),
        (["a star", " ", "a  moon"], ("a star", "a moon")),
        ({"caption": "a star", "tags": 3}, ("a star",)),
        ({"captions": ["a star", "a moon"]}, ("a star", "a moon")),
        ({"text": "a star"}, ("a star",)),
    ],
)
def test_captions_in_json(tmp_path, value, captions):
    image(tmp_path / "a.png").with_suffix(".json").write_text(json.dumps(value))
    (item,) = looked_at(tmp_path, caption_extension=".json").items
    assert item.captions == captions


def test_json_without_a_caption_is_skipped_and_says_so(tmp_path):
    for name, text in {"a": "{", "b": '{"width": 3}', "c": '{"caption": "a star"}'}.items():
        image(tmp_path / f"{name}.png").with_suffix(".json").write_text(text)
    found = looked_at(tmp_path, caption_extension="json")
    assert [item.name for item in found.items] == ["c.png"]
    (_, first), (_, second) = found.skipped
    assert "damaged JSON" in first and "JSON without a caption" in second


@pytest.mark.parametrize("other", ["a.caption", "a.png.txt"])
def test_a_caption_in_a_file_of_another_name_earns_a_hint(tmp_path, other):
    image(tmp_path / "a.png")
    (tmp_path / other).write_text("a star")
    found = looked_at(tmp_path, missing_caption="empty")
    assert any(other in warning and "caption_extension" in warning for warning in found.warnings)
    with pytest.raises(DataError):
        looked_at(tmp_path)


def test_one_name_in_several_formats_is_remarked(tmp_path):
    for ending in ("png", "jpg", "webp"):
        image(tmp_path / f"a.{ending}")
    image(tmp_path / "b.png")
    for stem in "ab":
        (tmp_path / f"{stem}.txt").write_text("a star")
    warnings = looked_at(tmp_path).warnings
    assert any(warning.startswith("3 (a.jpg, …) share one caption file") for warning in warnings)


@pytest.mark.parametrize("ending", [".jfif", ".avif"])
def test_formats_that_pillow_has_are_read(tmp_path, ending):
    if ending not in image_extensions():
        pytest.skip(f"this Pillow has no {ending}")
    path = tmp_path / f"a{ending}"
    Image.new("RGB", (64, 48), "red").save(path, "JPEG" if ending == ".jfif" else "AVIF")
    path.with_suffix(".txt").write_text("a star")
    (item,) = looked_at(tmp_path).items
    assert (item.width, item.height, item.misnamed) == (64, 48, False)
