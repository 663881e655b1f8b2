"""Files that are never half written."""

import json
import os
import stat

import pytest
import torch
from safetensors import safe_open

from chroma_core.errors import ConfigError, JobError
from chroma_core.files import (
    atomic_folder,
    read_json,
    remove_leftovers,
    sha256_file,
    slug,
    write_atomic,
    write_json,
)
from chroma_core.weights.safetensors_files import save_safetensors


def test_write_replaces_whole_files(tmp_path):
    path = tmp_path / "new folder" / "a.json"
    write_json(path, {"µ": 1})
    assert json.loads(path.read_text(encoding="utf-8")) == {"µ": 1}
    write_atomic(path, b"second")
    assert path.read_bytes() == b"second" and [p.name for p in path.parent.iterdir()] == ["a.json"]
    assert sha256_file(path) == "16367aacb67a4a017c8da8ab95682ccb390863780f7114dda0a0e0c55644c7c4"


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "a"
    write_atomic(path, "old")
    with pytest.raises(TypeError):
        write_atomic(path, 3)  # type: ignore[arg-type]
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(os.name == "nt", reason="modes are POSIX")
def test_safetensors_follow_the_umask_and_keep_metadata(tmp_path):
    path = tmp_path / "a.safetensors"
    save_safetensors(path, {"x": torch.arange(6.0).view(2, 3).T}, {"trigger": "sks"})
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask
    with safe_open(path, "pt") as file:
        assert torch.equal(file.get_tensor("x"), torch.arange(6.0).view(2, 3).T) and file.metadata() == {
            "trigger": "sks"
        }


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "step-1") as folder:
        (folder / "half").write_text("x")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with atomic_folder(tmp_path / "step-1") as folder:
        (folder / "whole").write_text("x")
        assert not (tmp_path / "step-1").exists()
    assert (tmp_path / "step-1" / "whole").read_text() == "x"
    with pytest.raises(OSError), atomic_folder(tmp_path / "step-1") as folder:
        (folder / "other").write_text("y")
    assert (tmp_path / "step-1" / "whole").exists()


def test_leftovers_of_a_killed_process_go(tmp_path):
    (tmp_path / ".step-2.1-1.tmp").mkdir()
    (tmp_path / ".a.json.1-1.tmp").write_text("half")
    (tmp_path / "a.json").write_text("whole")
    remove_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("My LoRA, v2", "My-LoRA-v2"),
        ("../../etc", "etc"),
        ("été", "ete"),
        ("", "untitled"),
        ("...", "untitled"),
        ("x" * 200, "x" * 80),
    ],
)
def test_slug(text, name):
    assert slug(text) == name


def test_a_broken_json_file_is_named_and_the_cure_said(tmp_path):
    path = tmp_path / "job.json"
    with pytest.raises(ConfigError, match=r"There is no file '.*job\.json'"):
        read_json(path)
    path.write_bytes(b'{"a": \xff')
    with pytest.raises(JobError, match=r"job\.json' cannot be read as JSON \(.*\).*Restore it from a backup"):
        read_json(path, JobError)
    write_json(path, {"a": [1]})
    assert read_json(path) == {"a": [1]}
