"""A dataset folder being made: what it shows of itself, and changes that lose nothing."""

import json

import pytest
from PIL import Image

from chroma_core.data.buckets import choose_bucket, crop_box
from chroma_core.data.dataset import DatasetConfig
from chroma_core.data.editing import (
    Changed,
    caption_text,
    entries,
    image_path,
    move_crops,
    removed,
    trigger_check,
    write_captions,
)
from chroma_core.data.history import bring_back, take_out
from chroma_core.data.remembered import Remembered
from chroma_core.data.scan import scan
from chroma_core.data.views import views_of
from chroma_core.errors import ConfigError, DataError


@pytest.fixture
def folder(tmp_path):
    """Two good images of different shapes, a twin, one without a caption, one that is none."""
    where = tmp_path / "set"
    (where / "sub").mkdir(parents=True)
    Image.new("RGB", (200, 100), (200, 0, 0)).save(where / "a.png")
    Image.new("RGB", (100, 100), (0, 200, 0)).save(where / "sub" / "b.png")
    (where / "c.png").write_bytes((where / "a.png").read_bytes())
    Image.new("RGB", (80, 120), (0, 0, 200)).save(where / "d.png")
    (where / "e.png").write_bytes(b"no image")
    for name, text in {"a": "a red zxq\n", "sub/b": "a green zxq", "c": "a red sks", "e": "zxq"}.items():
        (where / f"{name}.txt").write_text(text)
    return where


def seen(folder, **options):
    config = DatasetConfig(folder=str(folder), trigger="zxq", resolutions=(64,), **options)
    return {entry["name"]: entry for entry in entries(config, 64, Remembered())[0]}


def tree(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_image_is_listed_with_the_trainers_own_crop(folder):
    found = seen(folder)
    assert list(found) == ["a.png", "c.png", "d.png", "e.png", "sub/b.png"]
    bucket = choose_bucket(200, 100, 64)
    left, top, right, bottom = crop_box(200, 100, bucket)
    assert (found["a.png"]["size"], found["a.png"]["bucket"]) == ((200, 100), bucket)
    assert found["a.png"]["frame"] == (left / 200, top / 100, right / 200, bottom / 100)
    assert (found["c.png"]["twin"], found["a.png"]["twin"], found["a.png"]["caption"]) == ("a.png", "", "a red zxq")
    assert found["d.png"]["skipped"] == "no caption in d.txt" and found["d.png"]["bucket"] is not None
    assert "unreadable" in found["e.png"]["skipped"] and found["e.png"]["size"] is None


def test_a_folder_without_anything_usable_is_shown_and_not_an_error(tmp_path):
    assert seen(tmp_path) == {}
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    assert seen(tmp_path)["a.png"]["skipped"]
    with pytest.raises(DataError, match="None of the 1 images"):
        scan(DatasetConfig(folder=str(tmp_path)))


def test_captions_are_written_all_or_none_and_never_over_what_was_not_seen(folder):
    write_captions(folder, {"d.png": "a blue zxq\r\nby night\n", "a.png": ""}, {"d.png": "", "a.png": "a red zxq"})
    assert (folder / "d.txt").read_bytes() == b"a blue zxq\nby night\n" and caption_text(folder / "a.png") == ""
    before = tree(folder)
    with pytest.raises(Changed, match="a.png"):
        write_captions(folder, {"d.png": "x", "a.png": "y"}, {"d.png": "a blue zxq\nby night", "a.png": "a red zxq"})
    with pytest.raises(DataError, match="no image '../set/a.png'"):
        write_captions(folder, {"d.png": "x", "../set/a.png": "y"}, {})
    with pytest.raises(ConfigError, match="half a character"):
        write_captions(folder, {"d.png": "\ud800"}, {})
    assert tree(folder) == before


def test_a_caption_file_keeps_the_spelling_of_its_ending(folder):
    (folder / "d.TXT").write_text("old")
    write_captions(folder, {"d.png": "new"}, {"d.png": "old"})
    assert (folder / "d.TXT").read_text() == "new\n" and not (folder / "d.txt").exists()


@pytest.mark.parametrize("name", ["", "a.txt", ".removed/1/a.png", "x/../a.png", "/etc/a.png", "a\0.png", "y" * 400])
def test_only_images_of_the_folder_have_a_path(folder, name):
    with pytest.raises(DataError, match="no image"):
        image_path(folder, name)


def test_links_to_other_places_are_refused(folder, tmp_path):
    (tmp_path / "other").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "other" / "x.png")
    (tmp_path / "secret.txt").write_text("secret")
    (folder / "linked").symlink_to(tmp_path / "other")
    with pytest.raises(DataError, match="no image"):
        image_path(folder, "linked/x.png")
    (folder / "d.txt").symlink_to(tmp_path / "secret.txt")
    assert caption_text(folder / "d.png") is None
    with pytest.raises(DataError, match="link"):
        write_captions(folder, {"d.png": "x"}, {})
    (folder / ".removed").symlink_to(tmp_path / "other")
    with pytest.raises(DataError, match="link"):
        take_out(folder, ["a.png"])
    assert (tmp_path / "secret.txt").read_text() == "secret" and (folder / "a.png").is_file()


def test_what_is_removed_comes_back_as_it_was(folder):
    (folder / "a-masklabel.png").write_bytes((folder / "a.png").read_bytes())
    before = tree(folder)
    first, second = take_out(folder, ["a.png", "sub/b.png"]), take_out(folder, ["e.png"])
    assert list(seen(folder)) == ["c.png", "d.png"] and not (folder / "a.txt").exists()
    assert removed(folder) == {second: ["e.png"], first: ["a.png", "sub/b.png"]}
    (folder / "a.png").write_bytes(b"another")
    with pytest.raises(Changed, match="a.png"):
        bring_back(folder, first)
    (folder / "a.png").unlink()
    assert bring_back(folder, first) == ["a.png", "sub/b.png"] and bring_back(folder, second)
    (folder / ".removed/history.json").unlink()
    assert tree(folder) == before and removed(folder) == {}
    with pytest.raises(DataError, match="nothing removed"):
        bring_back(folder, first)


def test_a_caption_that_another_format_shares_stays(folder):
    Image.new("RGB", (64, 64)).save(folder / "a.jpg")
    take_out(folder, ["a.png"])
    assert (folder / "a.txt").is_file() and not (folder / "a.png").exists()


def test_a_moved_crop_is_what_is_trained_and_all_others_keep_their_entries(folder):
    config = DatasetConfig(folder=str(folder), resolutions=(64,))
    plain = {item.name: views_of(item, (64, 64), config) for item in scan(config).items}
    move_crops(folder, {"a.png": 0.25, "c.png": 0.5})
    moved = {item.name: views_of(item, (64, 64), config) for item in scan(config).items}
    assert [view.crop for view in moved.pop("a.png")] == [0.25] and plain.pop("a.png")
    assert moved == plain and not any(view.extras() for views in moved.values() for view in views)
    assert seen(folder)["a.png"]["crop"] == 0.25
    move_crops(folder, {"a.png": 0.5})
    assert json.loads((folder / "chromakit-crops.json").read_text())["crops"] == {}


@pytest.mark.parametrize(
    "text", ["", "[]", '{"format": 9, "crops": {"a.png": 0}}', '{"format": 1, "crops": {"a.png": []}}']
)
def test_a_damaged_file_of_crops_is_none(folder, text):
    (folder / "chromakit-crops.json").write_text(text)
    found = scan(DatasetConfig(folder=str(folder)))
    assert seen(folder)["a.png"]["crop"] == 0.5 and "all images are cropped at the centre" in found.warnings[0]
    with pytest.raises(DataError, match="cannot be read|later version"):
        move_crops(folder, {"a.png": 0.1})
    assert (folder / "chromakit-crops.json").read_text() == text


def test_the_trigger_check_names_who_lacks_it_and_what_stands_for_it():
    captions = {
        "1": ["a photo of zxq on a beach"],
        "2": ["ZXQ, hat, red"],
        "3": ["a photo of sks on a table"],
        "4": ["a zxg in the rain"],
        "5": ["a photo of widget on a beach", "zxq in the dark"],
        "6": ["a house"],
        "7": [],
        "8": ["[trigger] at night"],
    }
    found = trigger_check(captions, "zxq")
    assert (found["of"], found["lacking"]) == (7, ["3", "4", "5", "6"])
    assert {each["word"]: each["names"] for each in found["stands_as"]} == {"sks": ["3"], "zxg": ["4"], "widget": ["5"]}
    assert trigger_check(captions, "")["lacking"] == [] and trigger_check({}, "zxq")["of"] == 0
