"""Changes of a dataset folder: each is taken back and done again as if nothing had been, also by another process."""

from io import BytesIO

import pytest
from PIL import Image

from chroma_core.data import history
from chroma_core.data.dataset import DatasetConfig
from chroma_core.data.editing import Changed, entries
from chroma_core.data.images import load_image
from chroma_core.data.remembered import Remembered
from chroma_core.data.views import read_crops
from chroma_core.errors import DataError


@pytest.fixture
def folder(tmp_path):
    """An image with caption and mask, one without, one in a format that is not read, one that none can read."""
    where = tmp_path / "set"
    where.mkdir()
    Image.new("RGB", (200, 100), (200, 0, 0)).save(where / "a.png")
    (where / "a-masklabel.png").write_bytes(png((200, 100), 255))
    Image.new("RGB", (80, 80), (0, 0, 200)).save(where / "b.jpg")
    Image.new("RGBA", (40, 60), (0, 200, 0, 128)).save(where / "c.tga")
    (where / "d.heic").write_bytes(b"what only a telephone reads")
    for name, text in {"a": "a red zxq\n", "c": "a green zxq\n"}.items():
        (where / f"{name}.txt").write_text(text)
    return where


def png(size, value):
    stream = BytesIO()
    Image.new("L", size, value).save(stream, "PNG")
    return stream.getvalue()


def tree(folder):
    """Files of the dataset itself; an empty caption counts as none."""
    files = [path for path in folder.rglob("*") if path.is_file() and ".removed" not in path.parts]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files if path.stat().st_size}


def seen(folder):
    config = DatasetConfig(folder=str(folder), trigger="zxq", resolutions=(64,))
    return {entry["name"]: entry for entry in entries(config, 64, Remembered())[0]}


CHANGES = {
    "captions": lambda folder: history.caption(folder, {"b.jpg": "a blue zxq", "a.png": "zxq"}, {}, "captions"),
    "crop": lambda folder: history.crop(folder, {"a.png": 1.0}, "crop"),
    "out": lambda folder: history.take_out(folder, ["a.png", "c.tga"], "out"),
    "convert": lambda folder: history.convert(folder, ["c.tga"], "convert"),
    "mask": lambda folder: history.mask(folder, "a.png", png((100, 50), 90), "mask"),
    "first mask": lambda folder: history.mask(folder, "b.jpg", png((40, 40), 90), "first mask"),
    "no mask": lambda folder: history.mask(folder, "a.png", b"", "no mask"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_taken_back_and_done_again(folder, change):
    before, crops = tree(folder), read_crops(folder)
    CHANGES[change](folder)
    after, moved = tree(folder), read_crops(folder)
    assert (after, moved) != (before, crops)
    assert [step["label"] for step in history.read_history(folder)["done"]] == [change]
    for _ in range(2):
        history.undo(folder)
        assert read_crops(folder) == crops and {**tree(folder), "chromakit-crops.json": 0} == {
            **before, "chromakit-crops.json": 0,
        }  # fmt: skip
        history.redo(folder)
        assert read_crops(folder) == moved and tree(folder) == after
    with pytest.raises(DataError, match="nothing to redo"):
        history.redo(folder)


def test_many_changes_are_taken_back_in_turn_and_a_new_one_ends_what_was_undone(folder):
    before = tree(folder)
    for change in CHANGES.values():
        if change is not CHANGES["out"]:
            change(folder)
    for _ in range(len(CHANGES) - 1):
        history.undo(folder)
    assert {**tree(folder), "chromakit-crops.json": b""} == {**before, "chromakit-crops.json": b""}
    batch = history.take_out(folder, ["b.jpg"], "another")
    assert history.read_history(folder)["undone"] == [] and not (folder / "b.jpg").exists()
    assert history.bring_back(folder, batch) == ["b.jpg"]


def test_what_was_changed_elsewhere_meanwhile_stays_and_bars_no_other_step(folder):
    history.crop(folder, {"a.png": 1.0})
    history.caption(folder, {"a.png": "zxq"}, {"a.png": "a red zxq"})
    (folder / "a.txt").write_text("by another hand")
    with pytest.raises(Changed):
        history.undo(folder)
    assert (folder / "a.txt").read_text() == "by another hand"
    history.undo(folder)
    assert read_crops(folder) == {}


def test_captions_of_one_group_are_one_step(folder):
    for name in ("b.jpg", "d.heic"):
        history.caption(folder, {name: f"of {name}"}, {name: ""}, "all", "g1")
    history.undo(folder)
    assert seen(folder)["b.jpg"]["caption"] == seen(folder)["d.heic"]["caption"] == ""


def test_formats_that_are_not_read_are_listed_with_what_mends_it(folder):
    found = seen(folder)
    assert list(found) == ["a.png", "b.jpg", "c.tga", "d.heic"]
    assert found["c.tga"]["convertible"] and found["c.tga"]["skipped"] == ".tga files are not read. Convert it."
    assert not found["d.heic"]["convertible"] and "install pillow-heif" in found["d.heic"]["skipped"]
    assert history.convert(folder, ["c.tga"]) == ["c.png"]
    assert seen(folder)["c.png"]["skipped"] == "" and (folder / ".removed/1/c.tga").is_file()
    with Image.open(folder / "c.png") as image:
        assert (image.size, image.mode) == ((40, 60), "RGBA")
    with pytest.raises(DataError, match="'d.heic' cannot be converted"):
        history.convert(folder, ["d.heic"])


def test_a_mask_that_cannot_be_used_is_none(folder):
    before = tree(folder)
    for content, why in (
        (b"no image", "not an image"),
        (png((50, 50), 255), "another shape"),
        (png((200, 100), 0), "black"),
    ):
        with pytest.raises(DataError, match=why):
            history.mask(folder, "a.png", content)
    assert tree(folder) == before and seen(folder)["a.png"]["mask"] and not seen(folder)["b.jpg"]["mask"]
    history.mask(folder, "a.png", png((100, 50), 90))
    assert load_image(folder / "a-masklabel.png").getpixel((0, 0)) == (90, 90, 90)


def test_large_files_are_read_later(folder):
    config = DatasetConfig(folder=str(folder), trigger="zxq", resolutions=(64,))
    (folder / "e.png").write_bytes((folder / "a.png").read_bytes())
    (folder / "e.txt").write_text("zxq")
    known = Remembered(None, 0)
    first = {entry["name"]: entry for entry in entries(config, 64, known)[0]}
    assert {path.name for path in known.unread} == {"a.png", "b.jpg", "e.png"}
    assert first["e.png"]["size"] == (200, 100) and not first["e.png"]["twin"] and not first["e.png"]["notes"]
    assert seen(folder)["e.png"]["twin"] == "a.png"


@pytest.mark.parametrize("text", ["", "[]", '{"format": 1, "done": [1], "undone": []}', '{"format": 2}'])
def test_a_history_that_cannot_be_read_is_left_alone_and_everything_else_works(folder, text):
    kept = folder / ".removed/history.json"
    kept.parent.mkdir()
    kept.write_text(text)
    (warning,) = history.history_or_none(folder)[1]
    assert "history.json' " in warning and "no change of this dataset can be undone" in warning
    before = tree(folder)
    for name, change in CHANGES.items():
        change(folder)
        assert tree(folder) != before, name
        before = tree(folder)
        if "out" in name:
            (batch,) = (path.name for path in kept.parent.iterdir() if path.is_dir())
            history.bring_back(folder, batch)
    with pytest.raises(DataError, match="cannot be read|later version"):
        history.undo(folder)
    assert kept.read_text() == text


def test_a_forged_step_moves_nothing_from_elsewhere(folder):
    (folder.parent / "mine.png").write_bytes(b"mine")
    forged = {"batch": "1", "leaving": ["../mine.png"], "coming": []}, {"batch": "../..", "coming": ["mine.png"]}
    for step in forged:
        history._write(folder, {"done": [], "undone": [history.Step(**step)]})
        with pytest.raises(DataError):
            history.redo(folder)
    assert (folder.parent / "mine.png").read_bytes() == b"mine" and not (folder / "mine.png").exists()
