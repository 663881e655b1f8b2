"""The LoRAs of earlier steps: which stay, one of them put to use, and a job that ends with its best by itself."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

import chroma_core
from chroma_core.cli.main import main
from chroma_core.data.scan import DatasetConfig, hold_out, scan
from chroma_core.errors import ConfigError, JobError
from chroma_core.lora.files import read_lora, read_metadata
from chroma_core.training.jobs.job import Job
from chroma_core.training.jobs.manager import JobManager
from chroma_core.training.run import kept
from chroma_core.training.run.kept import kept_loras, superfluous
from chroma_core.training.run.verdict import memorising_for
from training_cases import config, model_folder, verdicts, write_dataset
from waiting import PATIENCE, until

EXAMPLES = Path(chroma_core.__file__).parents[1] / "example_datasets"


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kept")
    for name, source, numbers in (("trained", "sks_emblem", (1,)), ("measured", "sks_emblem_heldout", range(1, 7))):
        (folder / name).mkdir()
        for path in (EXAMPLES / source / f"{number:02d}{end}" for number in numbers for end in (".png", ".txt")):
            shutil.copy(path, folder / name)
    return folder


def left_after(steps: int, keep: int, safe: set[int]) -> list[int]:
    """What is left when one step after the other is kept."""
    left: list[int] = []
    for step in range(1, steps + 1):
        left.append(step)
        gone = superfluous(left, keep, safe)
        left = [each for each in left if each not in gone]
    return left


def test_the_earlier_the_fewer_stay():
    left = left_after(200, 12, {37, 5})
    assert len(left) == 12 and {5, 37} < set(left) and left[-3:] == [198, 199, 200]
    gaps = [b - a for a, b in zip(left, left[1:], strict=False)]
    free = [gap for gap, a, b in zip(gaps, left, left[1:], strict=False) if not {a, b} & {5, 37}]
    assert free == sorted(free, reverse=True) and free[0] >= 16 * free[-1]
    assert left_after(20, 1, set()) == [18, 19, 20], "the last three always stay"
    assert set(left_after(20, 1, {2, 3})) == {2, 3, 18, 19, 20}


def test_a_short_disk_keeps_fewer(tmp_path, monkeypatch):
    for step in range(1, 11):
        kept.kept_path(tmp_path, step).write_bytes(b"x" * 1000)
    kept.kept_path(tmp_path, 2).with_suffix(".used").write_text("two.safetensors")
    disk = namedtuple("disk", "free")
    monkeypatch.setattr(kept.shutil, "disk_usage", lambda _: disk(50_000))
    kept.thin(tmp_path, 100, best=4)
    assert [one.step for one in kept_loras(tmp_path)] == [2, 4, 6, 8, 9, 10], "a tenth of 60 kB"
    monkeypatch.setattr(kept.shutil, "disk_usage", lambda _: disk(0))
    kept.thin(tmp_path, 100, best=4)
    assert [(one.step, one.used) for one in kept_loras(tmp_path)] == [
        (2, "two.safetensors"), (4, None), (8, None), (9, None), (10, None),
    ]  # fmt: skip


def settings(places, **changes):
    """`tiny` learns an image by heart: the loss on six others is lowest at step 40 and then rises."""
    own: dict[str, Any] = {
        "model": {"flavour": "tiny", "precision": "fp32", "text_precision": "fp32"},
        "dataset": {"folder": str(places / "trained"), "trigger": "sks"},
        "validation_dataset": {"folder": str(places / "measured")},
        **{"steps": 72, "lora": {"rank": 16}, "learning_rate": 6e-3, "validate_every": 8, "checkpoint_every": 0},
        **{"keep_loras": 4, "stop_when_memorising": 1, "keep_checkpoints": 1},
    }
    return config(places, places, **{**own, **changes})


@pytest.fixture(scope="module")
def ended(places, tmp_path_factory) -> tuple[Path, Job]:
    """A job that ended by itself."""
    folder = tmp_path_factory.mktemp("ended")
    manager = JobManager(folder / "jobs", folder / "loras", "cpu")
    job = manager.ensure(settings(places))
    assert job.wait(PATIENCE) and job.state == "completed", job.status()["message"]
    manager.shutdown()
    return folder, job


def same(path, other) -> bool:
    """Whether two LoRA files hold the same bits."""
    found, expected = read_lora(path).modules, read_lora(other).modules
    return found.keys() == expected.keys() and all(
        torch.equal(one, two)
        for name, module in found.items()
        for one, two in zip(module.factors().values(), expected[name].factors().values(), strict=True)
    )


def test_a_job_that_memorises_ends_with_its_best_step(ended):
    folder, job = ended
    status = job.status()
    assert 0 < status["best_step"] < status["step"] < status["steps"] == 72
    assert f"Ended by itself at step {status['step']}: the last 1 validation said" in status["message"]
    assert status["verdict"]["kind"] == "memorises" and memorising_for(job.metrics()) == 1
    measured = {line["step"]: line["heldout_loss"] for line in job.metrics() if "heldout_loss" in line}
    assert status["heldout_loss"] == min(measured.values()) == measured[status["best_step"]]
    header = json.loads(read_metadata(status["lora_path"])["chromakit.training"])
    assert (header["steps"], header["heldout_loss"]) == (status["best_step"], status["heldout_loss"])
    assert same(
        status["lora_path"], job.folder / "checkpoints" / f"step-{status['best_step']:06d}" / "lora.safetensors"
    )
    log = (job.folder / "log.txt").read_text()
    assert "verdict: Best at step" in log
    assert status["best_step"] in [one["step"] for one in status["kept"]] and len(status["kept"]) == 4


@pytest.mark.parametrize("how", ["interrupted", "stopped", "completed"])
def test_resumed_or_extended_it_says_the_same_and_ends_the_same(places, ended, tmp_path, how: str):
    _, job = ended
    first = JobManager(tmp_path / "jobs", tmp_path / "loras", "cpu")
    again = first.ensure(settings(places, **({"steps": 16} if how == "completed" else {})))
    if how != "completed":
        until(lambda: again.status()["step"] >= 10)
        if how == "stopped":
            first.stop(again.id)
    if how != "interrupted":
        assert again.wait(PATIENCE)
    first.shutdown()
    assert again.state == how
    second = JobManager(tmp_path / "jobs", tmp_path / "loras", "cpu")
    again = second.extend(again.id, 56) if how == "completed" else second.resume(again.id)
    assert again.wait(PATIENCE) and again.state == "completed"
    second.shutdown()
    assert verdicts(again) == verdicts(job) and len(verdicts(job)) >= 4
    for name in ("step", "best_step", "message", "heldout_loss", "kept"):
        assert again.status()[name] == job.status()[name], name
    assert same(again.status()["lora_path"], job.status()["lora_path"])


def test_a_step_is_used_by_command_and_manager(ended, capsys):
    folder, job = ended
    best, first = job.status()["best_step"], job.status()["kept"][0]["step"]
    assert main(["jobs", "use", job.id, "best", "--output", str(folder)]) == 0
    path = Path(capsys.readouterr().out.strip())
    assert path == folder / "loras" / f"Test-Job-step-{best:06d}.safetensors"
    final = read_lora(job.status()["lora_path"])
    assert read_lora(path).metadata == final.metadata, "the same recipe and header as the final one"
    manager = JobManager(folder / "jobs", folder / "loras", "cpu")
    assert manager.use(job.id).name == path.name
    assert manager.use(job.id, first).is_file()
    used = {one["step"]: one["used"] for one in manager.get(job.id).status()["kept"]}
    assert used[best] == path.name and str(used[first]).endswith(f"step-{first:06d}.safetensors")
    kept.thin(job.folder / "loras", 1, best)
    assert {best, first} <= {one.step for one in kept_loras(job.folder / "loras")}, "what is in use stays"
    with pytest.raises(JobError, match=r"no LoRA of step 1: there are \d LoRAs, of"):
        manager.use(job.id, 1)
    manager.shutdown()
    assert main(["jobs", "show", job.id, "--output", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "since then it memorises" in shown and f"python -m chroma_core jobs use {job.id} {best}" in shown
    assert f"LoRA of step {best} (best, used as {path.name})" in shown
    assert main(["jobs", "list", "--output", str(folder), "--json"]) == 0
    (listed,) = json.loads(capsys.readouterr().out)
    assert listed["id"] == job.id and listed["verdict"]["kind"] == "memorises"
    assert main(["jobs", "use", "nothing", "3", "--output", str(folder)]) == 1
    assert main(["jobs", "use", job.id, "last", "--output", str(folder)]) == 1
    assert "There is no job 'nothing'" in capsys.readouterr().err


def test_a_branch_goes_on_from_a_step_at_another_rate(ended):
    folder, job = ended
    first = job.status()["kept"][0]["step"]
    manager = JobManager(folder / "jobs", folder / "loras", "cpu")
    branch = manager.branch(job.id, first, 5e-3)
    manager.stop(branch.id)
    assert branch.wait(PATIENCE) and branch.id != job.id
    assert branch.config.learning_rate == 5e-3
    assert str(branch.config.lora.start_from).endswith(f"Test-Job-step-{first:06d}.safetensors")
    manager.shutdown()


def test_images_are_held_out_by_their_content(tmp_path):
    whole = scan(DatasetConfig(folder=str(write_dataset(tmp_path / "data", 40)), flip=True))
    trained, apart = hold_out(whole, 0.1, most=8)
    assert apart is not None and len(apart.items) == 4 and not apart.config.flip
    assert {p.name for p in trained.items} | {p.name for p in apart.items} == {p.name for p in whole.items}
    assert [p.name for p in trained.items] == [p.name for p in whole.items if p not in apart.items]
    first = apart.items[0]
    shutil.copy(first.path, tmp_path / "data" / "copy.png")
    (tmp_path / "data" / "copy.txt").write_text("the same again")
    _, again = hold_out(scan(whole.config), 0.1, most=8)
    assert again is not None and {p.name for p in again.items} == {p.name for p in apart.items} | {"copy.png"}
    assert [len(hold_out(whole, share, most)[1].items) for share, most in ((0.01, 8), (0.5, 8), (0.5, 30))] == [
        2,
        8,
        20,
    ]
    few = scan(DatasetConfig(folder=str(write_dataset(tmp_path / "few", 7))))
    assert hold_out(few, 0.5, 8) == (few, None)


def test_a_job_holds_images_out_and_says_so(tmp_path):
    model = model_folder(tmp_path / "model")
    manager = JobManager(tmp_path / "jobs", tmp_path / "loras", "cpu")
    many, few = write_dataset(tmp_path / "many", 10), write_dataset(tmp_path / "few", 7)
    options: dict[str, Any] = {"steps": 2, "hold_out": 0.1, "checkpoint_every": 0}
    job = manager.ensure(config(model, many, **options))
    small = manager.ensure(config(model, few, **{**options, "steps": 26}))
    assert job.wait(PATIENCE) and small.wait(PATIENCE)
    assert job.state == small.state == "completed", job.status()["message"]
    status, (base, *_) = job.status(), job.metrics()
    assert len(status["held_out"]) == 2 and status["verdict"]["kind"] == "early" and status["best_step"]
    assert (base["images"], base["captions"]) == (8, len({f"{i % 5}" for i in range(10)}))
    assert "2 images held out for the validation loss" in (job.folder / "log.txt").read_text()
    manager.shutdown()
    status, found = small.status(), small.verdict()
    assert found is not None and not found.measured and status["verdict"] == found.to_dict(small.id)
    assert small.metrics()[0] == {"step": 0, "images": 7, "captions": 5} and found.at == 26
    assert status["held_out"] == [] and status["kept"] == []
    assert any(
        "No image is held out (hold_out): the dataset has 7 images, and at" in each for each in status["warnings"]
    )
    with pytest.raises(JobError, match="no best step: it has no validation loss"):
        manager.use(small.id)


def test_an_option_left_alone_is_no_part_of_a_jobs_id(tmp_path):
    places = tmp_path, tmp_path
    assert config(*places).job_id() == config(*places, hold_out=0.0, keep_loras=12, stop_when_memorising=0).job_id()
    assert config(*places).job_id() != config(*places, hold_out=0.1).job_id()
    assert config(*places, stop_when_memorising=2) == config(*places, stop_when_memorising=2, hold_out=0.1)
    assert config(*places, stop_when_memorising=2, hold_out=0.2).hold_out == 0.2
    apart = {"validation_dataset": {"folder": str(tmp_path)}}
    assert config(*places, stop_when_memorising=2, **apart).hold_out == 0
    with pytest.raises(ConfigError, match="keep_best = false does not keep"):
        config(*places, stop_when_memorising=2, hold_out=0.1, keep_best=False)
