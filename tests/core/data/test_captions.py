"""Where captions come from and what is done to them: metadata, file names, prefix and suffix, tags, variety."""

import json

import pytest
from PIL import Image

from chroma_core.data.captions import caption_from_name, prepared, tag_variants, wrapped
from chroma_core.data.scan import DatasetConfig, scan
from chroma_core.data.warnings import low_variety
from chroma_core.errors import ConfigError, DataError


def read(folder, **options):
    return scan(DatasetConfig.parse({"folder": str(folder), "trigger": "", **options}))


def captions(found):
    return {item.name: item.captions for item in found.items}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub").mkdir()
    for i, name in enumerate(("a.png", "b.png", "c.png", "sub/a.png")):
        Image.new("RGB", (64, 64), (i, 0, 0)).save(tmp_path / name)
    return tmp_path


def test_metadata_jsonl_names_captions_and_counts_doubtful_rows(folder):
    rows = [
        json.dumps({"file_name": "a.png", "text": "the first"}),
        json.dumps({"file_name": "a.png", "text": "again"}),
        json.dumps({"file_name": "./sub\\a.png", "text": ["one", " two\nlines ", 3, ""]}),
        json.dumps({"file_name": "gone.png", "text": "not there"}),
        json.dumps({"file_name": "../../a.png", "text": "outside"}),
        json.dumps({"file_name": str(folder / "b.png"), "text": "absolute"}),
        "{damaged",
        "[1, 2]",
        json.dumps({"text": "no name"}),
        "",
        json.dumps({"file_name": "c.png", "text": None}),
    ]
    (folder / "metadata.jsonl").write_text("\ufeff" + "\n".join(rows), encoding="utf-8")
    found = read(folder, caption_source="metadata")
    assert captions(found) == {"a.png": ("the first",), "sub/a.png": ("one", "two lines")}
    assert found.skipped == [(name, "no caption in the metadata") for name in ("b.png", "c.png")]
    text = "\n".join(found.warnings)
    assert "1 row for an image that has one already (the first counts), e.g. a.png in metadata.jsonl line 2" in text
    assert "3 rows for an image that is not there, e.g. gone.png in metadata.jsonl line 4" in text
    assert "3 rows without a readable file_name, e.g. metadata.jsonl line 7" in text


def test_metadata_csv_is_relative_to_its_folder_and_may_be_quoted(folder):
    (folder / "metadata.csv").write_text('file_name,caption\na.png,"red, ""very"" red"\nb.png\n')
    (folder / "sub" / "metadata.csv").write_text("file_name,caption\r\na.png,in sub\r\n../c.png,from sub\r\n")
    found = read(folder, caption_source="metadata", caption_column="caption", missing_caption="empty")
    assert captions(found) == {
        "a.png": ('red, "very" red',),
        "b.png": ("",),
        "c.png": ("from sub",),
        "sub/a.png": ("in sub",),
    }
    with pytest.raises(DataError, match="has a column 'text'"):
        read(folder, caption_source="metadata")


def test_metadata_that_is_missing_or_no_text_is_an_error_that_says_so(folder):
    with pytest.raises(DataError, match=r"no metadata\.jsonl or metadata\.csv"):
        read(folder, caption_source="metadata")
    (folder / "metadata.csv").write_bytes("file_name,text\na.png,café".encode("latin-1"))
    with pytest.raises(DataError, match=r"'metadata\.csv' is not UTF-8"):
        read(folder, caption_source="metadata")


@pytest.mark.parametrize(
    ("name", "caption"),
    [
        ("sub/red_car.png", "red car"),
        ("red_car (2).png", "red car"),
        ("red__car_017.jpeg", "red car"),
        ("red-car-3.png", "red-car"),
        ("f1.5 lens.jpg", "f1.5 lens"),
        ("mk2.png", "mk2"),
        ("0001.png", ""),
    ],
)
def test_captions_from_file_names(name, caption):
    assert caption_from_name(name) == caption


def test_file_names_and_a_fixed_sentence_as_captions(folder):
    (folder / "a.txt").write_text("not read")
    assert captions(read(folder, caption_source="filenames"))["sub/a.png"] == ("a",)
    fixed = read(folder, caption_source="fixed", default_caption="a [trigger]", trigger="sks")
    assert set(captions(fixed).values()) == {("a sks",)}
    assert not any("default caption" in warning for warning in fixed.warnings), "nothing is missing"
    with pytest.raises(ConfigError, match="fixed.*default_caption"):
        read(folder, caption_source="fixed")


def test_prefix_and_suffix_are_inside_the_trigger():
    assert wrapped("a cat", "a photo of", ", grainy") == "a photo of a cat, grainy"
    assert wrapped("a cat", "", "on film ") == "a cat on film"
    assert wrapped("", "a photo", "") == "a photo"
    assert prepared(["a cat", "a dog"], "sks", "a photo of", "") == ("sks a photo of a cat", "sks a photo of a dog")
    assert prepared(["a cat"], "sks", "[trigger],") == ("sks, a cat",)
    assert prepared(["  as it is,  "], "") == ("  as it is,  ",)


def test_shuffled_tags_keep_the_first_ones_and_are_the_same_every_time():
    caption = "sks, hat,  red, blue, green"
    variants = tag_variants(caption, 5, 2)
    assert variants == tag_variants(caption, 5, 2) and variants[0] == caption
    assert len(set(variants)) == 6, "there are six orders of three tags"
    assert all(v.startswith("sks, hat, ") for v in variants[1:])
    assert all(sorted(v.split(", ")) == ["blue", "green", "hat", "red", "sks"] for v in variants[1:])
    assert len(tag_variants(caption, 60, 2)) == 6, "no more orders than there are"
    assert tag_variants("a, b", 9, 1) == ("a, b",)
    assert tag_variants("no tags at all", 9, 0) == ("no tags at all",)
    assert len(tag_variants("a, b, c, d, e, f", 3, 0)) == 4


def test_each_caption_of_a_file_is_drawn_equally_often_however_many_orders_it_has():
    drawn = prepared(["one sentence", "a, b, c, d"], "", shuffles=3)
    assert drawn[:2] == ("one sentence", "a, b, c, d") and len(drawn) == 8
    assert drawn.count("one sentence") == 4 and len(set(drawn)) == 5


def test_the_scan_keeps_written_captions_apart_from_shuffled_ones(folder):
    for name in ("a", "b", "c", "sub/a"):
        (folder / f"{name}.txt").write_text(f"sks, one, two, three, {name}")
    found = read(folder, tag_shuffles=4, keep_tags=1, caption_suffix="[trigger]", trigger="sks")
    assert found.items[0].captions == ("sks, one, two, three, a sks",)
    assert len(set(found.items[0].drawn)) == 5
    assert all(d.startswith("sks, ") and d.endswith(" sks") for d in found.items[0].drawn)
    assert found.items[0].drawn[0] == found.items[0].captions[0]


def test_identical_captions_are_counted(folder):
    for name in ("a", "b", "c", "sub/a"):
        (folder / f"{name}.txt").write_text("something else" if name == "c" else "a hat")
    assert read(folder).warnings == ["3 times the same caption: “a hat”."]


def test_prompt_variety_is_low_when_captions_say_little_about_each_image():
    good = [(f"sks hat on a {colour} table in the {place}",) for colour in ("red", "old") for place in "wxyz"]
    assert low_variety(good, "sks") == []
    poor = [(f"a photo of sks hat {i}",) for i in range(8)]
    assert low_variety(poor, "sks")[0].startswith(
        "Prompt variety is low: 8 different captions for 8 images, on average 1.0 words"
    )
    assert low_variety(poor[:7], "sks") == [], "too few to judge"
    few = [(f"sks {a} far away from {a}{a}",) for a in "xyz"] * 3
    assert "3 different captions for 9 images" in low_variety(few, "sks")[0]
    assert low_variety([("A hat, SKS!",), ("sks: hat a",)] * 4, "sks")[0].startswith("Prompt variety is low: 1 diff")
