"""What reading image files told, in the next process: nothing is opened again, and nothing that changed is missed."""

import json
import os
import sys

import pytest
import torch
from safetensors import safe_open

from chroma_core.data import remembered
from chroma_core.data.cache import LatentTextCache
from chroma_core.data.remembered import Remembered
from chroma_core.data.scan import DatasetConfig, scan
from chroma_core.weights.safetensors_files import save_safetensors
from training_cases import write_dataset


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A folder of images with a mask, and the folder that remembers them; however new they are, they are settled."""
    monkeypatch.setattr(remembered, "SETTLED", -1.0)
    folder = write_dataset(tmp_path / "data", 3)
    first = next(folder.glob("*.png"))
    (folder / f"{first.stem}-masklabel.png").write_bytes(first.read_bytes())
    return folder, tmp_path / "cache"


def seen(folder, known):
    return scan(DatasetConfig.parse({"folder": str(folder), "masks": "files"}), 64, known).items


def opened(monkeypatch) -> list[str]:
    names: list[str] = []
    whole = remembered.sha256_file
    monkeypatch.setattr(remembered, "sha256_file", lambda path: [names.append(path.name), whole(path)][1])
    return names


def test_the_next_process_opens_no_file_but_one_that_changed(places, monkeypatch):
    folder, cache = places
    names = opened(monkeypatch)
    known = Remembered(cache)
    items = seen(folder, known)
    known.save()
    assert len(names) == 4 and sum(item.masked for item in items) == 1

    names.clear()
    assert seen(folder, Remembered(cache)) == items and names == []

    last = items[-1].path
    content = last.read_bytes()
    before = last.stat()
    last.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # a byte that decoders do not look at
    os.utime(last, ns=(before.st_atime_ns, before.st_mtime_ns))
    again = seen(folder, Remembered(cache))
    assert names == [last.name] and again[:-1] == items[:-1] and again[-1].sha256 != items[-1].sha256


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere file names are text")
def test_a_name_of_foreign_bytes_is_remembered_too(places, monkeypatch):
    folder, cache = places
    first = next(path for path in folder.glob("*.png") if not path.stem.endswith("masklabel"))
    first.rename(folder / os.fsdecode(b"\xff.png"))
    known = Remembered(cache)
    items = seen(folder, known)
    known.save()
    names = opened(monkeypatch)
    assert len(items) == 2 and seen(folder, Remembered(cache)) == items and names == []


def test_a_file_that_was_just_written_is_read_again(tmp_path, monkeypatch):
    """It could be written once more with the very same times."""
    monkeypatch.setattr(remembered, "SETTLED", 1e6)
    folder, cache = write_dataset(tmp_path / "data", 2), tmp_path / "cache"
    known = Remembered(cache)
    seen(folder, known)
    known.save()
    assert not cache.exists()


def test_two_that_save_lose_nothing_of_one_another(places, tmp_path):
    folder, cache = places
    other = write_dataset(tmp_path / "other", 2)
    one, two = Remembered(cache), Remembered(cache)
    seen(folder, one), seen(other, two)
    one.save(), two.save()
    assert len(json.loads((cache / "images.json").read_text())["files"]) == 3 + 1 + 2


@pytest.mark.parametrize("content", ["", "{", "[]", '{"files": {}}', '{"format": 0, "files": {"x": 1}}'])
def test_a_file_that_cannot_be_used_counts_as_empty_and_is_replaced(places, content):
    folder, cache = places
    cache.mkdir()
    (cache / "images.json").write_text(content)
    known = Remembered(cache)
    seen(folder, known)
    known.save()
    assert len(json.loads((cache / "images.json").read_text())["files"]) == 4


def test_what_cannot_be_written_is_only_read_again(places, caplog):
    folder, cache = places
    cache.write_text("a file where the folder should be")
    known = Remembered(cache)
    assert len(seen(folder, known)) == 3
    known.save()
    assert "not remembered" in caplog.text


def test_an_entry_of_the_cache_says_what_it_is_unless_it_is_cut(tmp_path):
    path = tmp_path / "entry.safetensors"
    save_safetensors(path, {"latents": torch.zeros(16, 8, 8)}, {"bucket": "64x64", "why": "ü"})
    with safe_open(path, framework="pt") as file:
        assert LatentTextCache.about(path) == file.metadata() == {"bucket": "64x64", "why": "ü"}
    whole = path.read_bytes()
    for cut in (0, 5, 40, len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert LatentTextCache.about(path) is None
    path.write_bytes(whole + b"x")
    assert LatentTextCache.about(path) is None and LatentTextCache.about(tmp_path / "none") is None
