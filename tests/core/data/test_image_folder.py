"""Images, captions and masks that a program hands over, as a dataset folder."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from chroma_core.data.dataset import DatasetConfig
from chroma_core.data.image_folder import bytes_in, captions_for, store_images, stored
from chroma_core.data.scan import scan
from chroma_core.data.views import load_mask
from chroma_core.errors import ConfigError, DataError

IMAGES = [Image.new("RGB", (64, 32), colour) for colour in ("red", "green", "blue")]


def test_captions_are_one_for_all_one_a_line_or_one_each():
    assert captions_for(["all"], 3) == ["all"] * 3
    assert captions_for(["a\n\n b\nc\n"], 3) == ["a", " b", "c"]
    assert captions_for(["a", "b\nb2", ""], 3) == ["a", "b\nb2", ""]
    assert captions_for(["a\nb"], 1) == ["a\nb"], "several captions of one image"
    assert captions_for([""], 2) == ["", ""]
    for texts, expected in ((["a\nb"], "3 images, but the caption text has 2 lines"), ([], "3 images and 0 cap")):
        with pytest.raises(DataError, match=expected):
            captions_for(texts, 3)


def test_no_image_is_an_error(tmp_path):
    with pytest.raises(DataError, match="has no images"):
        store_images(tmp_path, [], ["a"])


def test_masks_are_kept_beside_the_images_and_decide_the_name(tmp_path):
    mask = Image.fromarray(np.repeat(np.array([[0, 255]], np.uint8), 32, 1).repeat(32, 0))
    folder = store_images(tmp_path, IMAGES, ["a\nb\nc"], [mask, None, None])
    assert store_images(tmp_path, IMAGES, ["a\nb\nc"]) != folder
    assert store_images(tmp_path, IMAGES, ["a\nb\nc"], [None, mask, None]) != folder
    found = scan(DatasetConfig.parse({"folder": str(folder), "masks": "files"}))
    assert [item.masked for item in found.items] == [True, False, False]
    kept = load_mask(found.items[0].path, found.items[0].mask)
    assert kept is not None and np.array_equal(np.asarray(kept), np.asarray(mask))
    with pytest.raises(DataError, match="3 images and 1 mask"):
        store_images(tmp_path, IMAGES, ["a"], [mask])


def test_a_folder_is_what_its_name_says(tmp_path):
    """A file that was changed by hand is restored, and the rest is left alone."""
    folder = store_images(tmp_path, IMAGES, ["a"])
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    (folder / "00001.txt").write_text("changed")
    assert store_images(tmp_path, IMAGES, ["a"]) == folder
    assert (folder / "00001.txt").read_text() == "a"
    again = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert [name for name in times if times[name] != again[name]] == ["00001.txt"]


def test_how_much_is_kept_is_known(tmp_path):
    assert stored(tmp_path / "nowhere") == (0, 0)
    folders = [store_images(tmp_path, IMAGES[:n], ["a"]) for n in (1, 2)]
    assert stored(tmp_path) == (2, sum(map(bytes_in, folders)))
    assert bytes_in(folders[0]) == sum(path.stat().st_size for path in folders[0].iterdir()) > 0


def test_a_caller_can_stop_before_anything_is_written(tmp_path):
    def stop(done: int, total: int) -> None:
        assert total == 3
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store_images(tmp_path, IMAGES, ["a"], progress=stop)
    assert not list(tmp_path.iterdir())


def test_the_extension_of_caption_files_may_be_given_without_its_dot():
    assert DatasetConfig.parse({"folder": "x", "caption_extension": "caption"}).caption_extension == ".caption"
    for wrong in ("", " ", ".", "../txt"):
        with pytest.raises(ConfigError, match="caption_extension"):
            DatasetConfig.parse({"folder": "x", "caption_extension": wrong})
