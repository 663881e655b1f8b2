"""Files that are never half written."""

import json
import os
import stat
from pathlib import PureWindowsPath

import pytest
import torch
from safetensors import safe_open

from chroma_core.errors import ConfigError, JobError
from chroma_core.files import (
    atomic_folder,
    file_stem,
    read_json,
    remove_leftovers,
    sha256_file,
    slug,
    write_atomic,
    write_json,
)
from chroma_core.training.config import TrainingConfig
from chroma_core.training.run.checkpoint import step_name
from chroma_core.training.run.metrics import JobPaths
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


@pytest.mark.parametrize(
    "text", ["CON", "nul", "Aux.v2", "com1.safetensors", "a. ", "b...", "C:\\x", "a:b", "x?*", "LPT9"]
)
def test_names_of_files_are_names_on_windows(text):
    for suffix in (".safetensors", "-ema.safetensors", ""):
        name = f"{file_stem(text)}{suffix}"
        assert not PureWindowsPath(name).drive and PureWindowsPath(name).name == name == name.rstrip(". ")
        assert not set(name) & set('<>:"/\\|?*') and name.isprintable()
        assert name.split(".")[0].upper() not in {"CON", "PRN", "AUX", "NUL", "COM1", "LPT9"}
    assert file_stem("console.v2") == "console.v2"


def test_a_job_s_longest_path_leaves_room_on_windows():
    """Of 260 characters; ids have 80 + 9."""
    config = TrainingConfig.parse({"name": "x" * 80, "dataset": {"folder": "."}})
    temporary = f".{step_name(10**6)}.1234567-140123456789012.tmp"
    paths = JobPaths.of(PureWindowsPath(), config.job_id(), PureWindowsPath())
    assert len(str(paths.job / "checkpoints" / temporary / "weights.safetensors")) < 180
    assert len(str(paths.cache / "latents" / "00" / f".{'0' * 64}.safetensors.1234567-140123456789012.tmp")) < 180


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_job_file_of_a_windows_editor_is_the_same_job(tmp_path, mark):
    text = 'name = "x"\nsteps = 5\n[dataset]\nfolder = "d"\n[previews]\nprompts = ["a\u00e9"]\n'
    path = tmp_path / "job.toml"
    path.write_bytes(text.encode())
    plain = TrainingConfig.from_toml(path)
    path.write_bytes(mark + text.replace("\n", "\r\n").encode())
    assert TrainingConfig.from_toml(path) == plain


def test_a_broken_json_file_is_named_and_the_cure_said(tmp_path):
    path = tmp_path / "job.json"
    with pytest.raises(ConfigError, match=r"There is no file '.*job\.json'"):
        read_json(path)
    path.write_bytes(b'{"a": \xff')
    with pytest.raises(JobError, match=r"job\.json' cannot be read as JSON \(.*\).*Restore it from a backup"):
        read_json(path, JobError)
    write_json(path, {"a": [1]})
    assert read_json(path) == {"a": [1]}
