"""Files and folders that are no usable model: each is refused with what it is, what is wrong, and what to do."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open

from chroma_core.errors import ModelFileError
from chroma_core.weights.opening import open_weights
from weight_files import (
    cut,
    raw_entry,
    shard_name,
    write_gguf,
    write_lfs_pointer,
    write_pickle,
    write_raw_safetensors,
    write_safetensors,
    write_shards,
    write_web_page,
)

TENSORS = {"a.weight": torch.ones(8, 8), "b.weight": torch.ones(8, 8), "c.bias": torch.ones(8)}
REMEDIES = ("Download", "download", "Choose", "choose", "Use ", "use ", "git lfs pull", "Check", "expected")


def refuse(path: Path, message: str) -> None:
    with pytest.raises(ModelFileError, match=message) as caught:
        open_weights(path)
    text = str(caught.value)
    assert path.name in text and "\n" not in text and text.endswith(".")
    assert any(remedy in text for remedy in REMEDIES), text


# Headers, each also refused by the safetensors library itself

HUGE = 1 << 62
HEADERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "absurd header length": (lambda p: write_raw_safetensors(p, {}, length=HUGE), "header claims"),
    "largest header length": (lambda p: write_raw_safetensors(p, {}, length=2**64 - 1), "header claims"),
    "header beyond the end": (lambda p: write_raw_safetensors(p, {}, length=5000), "claims 5,000 bytes, but the file"),
    "seven bytes": (lambda p: p.write_bytes(b"\x10\0\0\0\0\0\0"), "only 7 bytes"),
    "no JSON": (lambda p: write_raw_safetensors(p, b'{"a": '), "not the JSON"),
    "no text": (lambda p: write_raw_safetensors(p, b'{"\xff\xfe": 1}'), "not the JSON"),
    "bottomless JSON": (
        lambda p: write_raw_safetensors(p, b'{"a":' + b"[" * 100_000),
        "nested too deeply|not the JSON",
    ),
    "a list": (lambda p: write_raw_safetensors(p, b"[1]     "), "not a table"),
    "a number for a tensor": (lambda p: write_raw_safetensors(p, {"w": 3}), "'w' lies"),
    "no offsets": (lambda p: write_raw_safetensors(p, {"w": {"dtype": "F32", "shape": [2]}}), "'w' lies"),
    "negative shape": (lambda p: write_raw_safetensors(p, {"w": raw_entry(shape=[-2])}, bytes(8)), "'w' lies"),
    "fractional shape": (lambda p: write_raw_safetensors(p, {"w": raw_entry(shape=[2.0])}, bytes(8)), "'w' lies"),
    "text for a shape": (lambda p: write_raw_safetensors(p, {"w": raw_entry(shape="2")}, bytes(8)), "'w' lies"),
    "unknown dtype": (lambda p: write_raw_safetensors(p, {"w": raw_entry("Q4")}, bytes(8)), "'Q4', which is no known"),
    "shape and bytes differ": (lambda p: write_raw_safetensors(p, {"w": raw_entry(shape=[3])}, bytes(8)), "not fit"),
    "enormous shape": (lambda p: write_raw_safetensors(p, {"w": raw_entry(shape=[HUGE, 9])}, bytes(8)), "not fit"),
    "offsets beyond the end": (
        lambda p: write_raw_safetensors(p, {"w": raw_entry(shape=[HUGE // 4], end=HUGE)}, bytes(8)),
        "bytes of 4,611",
    ),
    "overlapping tensors": (
        lambda p: write_raw_safetensors(p, {"v": raw_entry(), "w": raw_entry(begin=4, end=12)}, bytes(12)),
        "'w' overlaps",
    ),
    "a gap": (
        lambda p: write_raw_safetensors(p, {"v": raw_entry(), "w": raw_entry(begin=12, end=20)}, bytes(20)),
        "'w' leaves a gap",
    ),
    "bytes after the end": (lambda p: write_raw_safetensors(p, {"w": raw_entry()}, bytes(9)), "1 bytes follow"),
    "metadata that are no texts": (
        lambda p: write_raw_safetensors(p, {"__metadata__": {"a": 1}, "w": raw_entry()}, bytes(8)),
        "metadata",
    ),
    "half a character in the metadata": (
        lambda p: write_raw_safetensors(p, {"__metadata__": {"a": "\ud800"}, "w": raw_entry()}, bytes(8)),
        "half a character",
    ),
    "cut in the header": (lambda p: cut(write_safetensors(p, TENSORS), 0.1), "header claims"),
    "cut in the weights": (lambda p: cut(write_safetensors(p, TENSORS), 0.9), "bytes of"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_damaged_headers(tmp_path: Path, case: str):
    write, message = HEADERS[case]
    path = tmp_path / "chroma.safetensors"
    write(path)
    refuse(path, message)
    with pytest.raises((SafetensorError, OverflowError)), safe_open(path, framework="pt"):
        pass


def test_a_name_that_is_listed_twice(tmp_path: Path):
    entry = json.dumps(raw_entry())
    write_raw_safetensors(tmp_path / "x.safetensors", f'{{"w": {entry}, "w": {entry}}}'.encode(), bytes(8))
    refuse(tmp_path / "x.safetensors", "'w' is listed twice")


def test_a_hand_made_header_is_sound(tmp_path: Path):
    """The headers above are refused for their one fault, not for being hand-made. Names may begin like a pickle's."""
    header = {"__metadata__": {"a": "b"}, "w": raw_entry(), "p" * 400: raw_entry(begin=8, end=16)}
    text = json.dumps(header).encode()
    text += b" " * (0x280 - len(text))  # the length 0x280 is written 80 02, which is how pickles begin
    path = write_raw_safetensors(tmp_path / "x.safetensors", text, struct.pack("<4f", 1, 2, 3, 4))
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert open_weights(path).read("w", torch.float32).tolist() == [1, 2]


# Files that are something else

OTHERS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "missing": ("gone.safetensors", lambda p: None, "There is no"),
    "empty": ("x.safetensors", lambda p: p.touch(), "not complete: it is empty"),
    "empty gguf": ("x.gguf", lambda p: p.touch(), "not complete: it is empty"),
    "reserved space": ("x.safetensors", lambda p: p.write_bytes(bytes(4096)), "begins with zeros"),
    "half download of the Hub": (
        "abc.incomplete",
        lambda p: write_safetensors(p, TENSORS),
        "name ends in .incomplete",
    ),
    "half download of a browser": ("x.safetensors.part", lambda p: write_safetensors(p, TENSORS), "ends in .part"),
    "pickle": ("x.pt", lambda p: write_pickle(p, TENSORS), "is a pickle.*never read"),
    "old pickle": ("x.ckpt", lambda p: write_pickle(p, TENSORS, legacy=True), "is a pickle"),
    "renamed pickle": ("x.safetensors", lambda p: write_pickle(p, TENSORS), "is a pickle.*whatever its name says"),
    "renamed old pickle": ("x.safetensors", lambda p: write_pickle(p, TENSORS, legacy=True), "is a pickle"),
    "pickle as gguf": ("x.gguf", lambda p: write_pickle(p, TENSORS), "is a pickle"),
    "web page": ("x.safetensors", write_web_page, "a web page"),
    "pointer": ("x.safetensors", write_lfs_pointer, "a pointer that git left.*git lfs pull"),
    "server's answer": ("x.safetensors", lambda p: p.write_text("Entry not found"), "begins with 'Entry not found'"),
    "configuration": ("config.json", lambda p: p.write_text('{\n  "a": 1\n}'), "a text that begins with '{'"),
    "noise": ("x.safetensors", lambda p: p.write_bytes(b"\x9f\x8e\x7d" * 500), "header claims"),
    "picture": ("x.png", lambda p: p.write_bytes(b"\x89PNG\r\n\x1a\n\xff\xff"), "neither safetensors nor GGUF"),
    "pipe": ("x.safetensors", lambda p: p.symlink_to("/dev/null"), "is not a file"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_files_that_are_no_weights(tmp_path: Path, case: str):
    name, write, message = OTHERS[case]
    write(tmp_path / name)
    refuse(tmp_path / name, message)


def test_a_download_that_is_still_under_way(tmp_path: Path):
    path = write_safetensors(tmp_path / "x.safetensors", TENSORS)
    control = tmp_path / "x.safetensors.aria2"
    control.touch()
    refuse(path, "still being downloaded")
    control.unlink()
    assert set(open_weights(path).shapes) == set(TENSORS)


# Shards and folders


def edit_index(index: Path, **changes: str | None) -> None:
    content = json.loads(index.read_text())
    for name, shard in changes.items():
        if shard is None:
            del content["weight_map"][name]
        else:
            content["weight_map"][name] = shard
    index.write_text(json.dumps(content))


def test_weights_that_bitsandbytes_packed(tmp_path: Path):
    """Their shapes say nothing of the layers: `a.weight` is one column."""
    packed = {"a.weight": torch.zeros(32, 1, dtype=torch.uint8), "a.weight.absmax": torch.zeros(1)}
    packed |= {"a.weight.quant_map": torch.zeros(16), "a.weight.quant_state.bitsandbytes__nf4": torch.zeros(9)}
    for name, tensors in {"nf4": packed, "int8": {"a.weight": torch.zeros(8, 8), "a.SCB": torch.zeros(8)}}.items():
        path = tmp_path / f"{name}.safetensors"
        write_safetensors(path, tensors)
        with pytest.raises(ModelFileError, match="quantised by bitsandbytes .*Take the unquantised file.*nf4-bnb"):
            open_weights(path)


def test_missing_shards(tmp_path: Path):
    index = write_shards(tmp_path, TENSORS, 3)
    for number in (1, 3):
        (tmp_path / shard_name(number, 3)).unlink()
    refuse(index, f"2 of its 3 parts are not beside it .{shard_name(1, 3)}, {shard_name(3, 3)}")


def test_a_damaged_shard(tmp_path: Path):
    index = write_shards(tmp_path, TENSORS, 2)
    cut(tmp_path / shard_name(2, 2))
    with pytest.raises(ModelFileError, match=f"{shard_name(2, 2)}' is damaged"):
        open_weights(index)


def test_shards_that_do_not_match_their_index(tmp_path: Path):
    index = write_shards(tmp_path, TENSORS, 2)
    edit_index(index, **{"d.weight": shard_name(1, 2)})
    refuse(index, "holds the tensor 'd.weight', but it does not")
    edit_index(index, **{"d.weight": None, "a.weight": shard_name(2, 2)})
    refuse(index, f"{shard_name(2, 2)}' holds the tensor 'a.weight', but it does not")
    edit_index(index, **{"a.weight": None})
    refuse(index, "does not list the tensor 'a.weight'")
    write_safetensors(tmp_path / shard_name(2, 2), {name: TENSORS[name] for name in ("a.weight", "b.weight")})
    edit_index(index, **{"a.weight": shard_name(1, 2)})
    refuse(index, f"'a.weight' is in '{shard_name(1, 2)}' and in '{shard_name(2, 2)}'")
    write_gguf(tmp_path / shard_name(2, 2), {"b.weight": TENSORS["b.weight"]})
    refuse(index, "is no safetensors file")


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/x.safetensors", "a\\x.safetensors", "C:x.safetensors", ".."]
)
def test_an_index_cannot_point_elsewhere(tmp_path: Path, name: str):
    index = write_shards(tmp_path, TENSORS, 2)
    edit_index(index, **{"a.weight": name})
    refuse(index, "parts must lie beside it")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "\xff"])
def test_an_index_that_is_none(tmp_path: Path, content: str):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(content, encoding="latin-1")
    refuse(path, "is no index of a model|is no JSON")


def test_a_missing_index(tmp_path: Path):
    refuse(tmp_path / "model.safetensors.index.json", "There is no")
    write_shards(tmp_path, TENSORS, 2).unlink()
    refuse(tmp_path / shard_name(1, 2), "one of 2 parts.*is not beside it")
    with pytest.raises(ModelFileError, match="one of 2 parts"):
        open_weights(tmp_path)


def test_folders_without_a_model(tmp_path: Path):
    for found, message in {
        "config.json": "choose another folder",
        "pytorch_model.bin": "'pytorch_model.bin' is a pickle",
        "model.safetensors.incomplete": "unfinished download",
        "model_index.json": "is a whole model; choose the sub-folder",
    }.items():
        folder = tmp_path / found.replace(".", "_")
        folder.mkdir()
        (folder / found).write_text("{}")
        refuse(folder, message)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read(tmp_path: Path):
    path = write_safetensors(tmp_path / "folder" / "x.safetensors", TENSORS)
    path.chmod(0)
    refuse(path, "cannot be read: Permission denied")
    path.parent.chmod(0)
    refuse(path.parent, "cannot be read: Permission denied")
    path.parent.chmod(0o700)


def test_a_folder_with_several_models(tmp_path: Path):
    for name in ("t5xxl_fp16.safetensors", "clip_l.safetensors"):
        write_safetensors(tmp_path / name, TENSORS)
    refuse(tmp_path, "several models .clip_l.safetensors, t5xxl_fp16.safetensors.")
