"""Files that another program has open, as Windows' scanners do: a job waits for them, and loses nothing."""

import errno
import os
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from chroma_core import files
from chroma_core.errors import JobError
from chroma_core.training.jobs.manager import JobManager
from training_cases import config, model_folder, write_dataset
from waiting import PATIENCE

OPERATIONS = ("replace", "rename", "unlink", "rmdir")


class Held(PermissionError):
    """What Windows raises for a file that is open elsewhere."""

    winerror = 32


class Holder:
    """Refuses file operations whose path contains a word: each so many times, or for as long as `seconds` say."""

    def __init__(self, monkeypatch, times: int = 0):
        self.times, self.held = times, ""
        self.refused: Counter = Counter()
        for name in OPERATIONS:
            monkeypatch.setattr(os, name, self._refusing(name, getattr(os, name)))

    def _refusing(self, name, real):
        def operation(*paths, **options):
            for path in map(str, paths):
                if self.held and self.held in path:
                    raise Held(errno.EACCES, "used by another process", path)
            key = (name, Path(str(paths[-1])).name)
            # Removing what is not there is no operation; dir_fd: the inside of a folder that is removed as one.
            if self.times and "dir_fd" not in options and (name in ("replace", "rename") or os.path.exists(paths[0])):
                if self.refused[key] < self.times:
                    self.refused[key] += 1
                    raise Held(errno.EACCES, "used by another process", str(paths[-1]))
            return real(*paths, **options)

        return operation


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("held")
    data = write_dataset(folder / "data", 3)
    return config(
        model_folder(folder / "model"),
        data,
        steps=6,
        checkpoint_every=1,
        keep_checkpoints=2,
        previews={"prompts": "sks", "steps": 1, "every": 3},
    )


def run(settings, folder: Path) -> tuple[JobManager, str]:
    manager = JobManager(folder / "jobs", folder / "loras", "cpu")
    job = manager.ensure(settings)
    assert job.wait(PATIENCE)
    return manager, job.id


def lora(folder: Path) -> dict:
    return {name: value.tolist() for name, value in load_file(folder / "loras" / "Test-Job.safetensors").items()}


@pytest.fixture(scope="module")
def undisturbed(settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    manager, name = run(settings, folder)
    assert manager.get(name).state == "completed"
    manager.shutdown()
    return lora(folder)


def test_every_operation_of_a_job_may_be_refused_for_a_moment(settings, undisturbed, tmp_path, monkeypatch):
    holder = Holder(monkeypatch, times=2)
    manager, name = run(settings, tmp_path)
    assert (manager.get(name).state, manager.get(name).status()["message"]) == ("completed", "")
    refused = {operation for operation, _ in holder.refused}
    assert {"replace", "rename"} <= refused
    for file in ("job.json", "Test-Job.safetensors", "step-000006-0.png", "step-000006", ".step-000001.discarded.tmp"):
        assert any(name == file for _, name in holder.refused), file
    assert lora(tmp_path) == undisturbed
    manager.delete(name)
    manager.shutdown()
    assert not list((tmp_path / "jobs").glob("*/job.json"))


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(files, "PATIENCE", 0.05)


def test_a_status_that_cannot_be_written_does_not_end_the_job(settings, undisturbed, tmp_path, monkeypatch, impatient):
    holder = Holder(monkeypatch)
    manager = JobManager(tmp_path / "jobs", tmp_path / "loras", "cpu")
    manager.subscribe(lambda status: setattr(holder, "held", "job.json" if status["step"] in (2, 3) else ""))
    job = manager.ensure(settings)
    assert job.wait(PATIENCE)
    assert job.state == "completed" and lora(tmp_path) == undisturbed
    assert "job.json was not written: " in "\n".join(job.log_lines())
    assert files.read_json(job.folder / "job.json")["state"] == "completed"
    manager.shutdown()


def test_an_old_checkpoint_that_stays_open_is_removed_later(settings, undisturbed, tmp_path, monkeypatch, impatient):
    holder = Holder(monkeypatch)
    manager = JobManager(tmp_path / "jobs", tmp_path / "loras", "cpu")
    manager.subscribe(lambda status: setattr(holder, "held", "step-000001.discarded" if status["step"] < 5 else ""))
    job = manager.ensure(settings)
    assert job.wait(PATIENCE)
    assert job.state == "completed" and lora(tmp_path) == undisturbed
    left = {path.name for path in (job.folder / "checkpoints").iterdir()}
    assert left == {"step-000005", "step-000006"}
    manager.shutdown()


def test_a_lora_that_stays_open_is_named_and_written_at_the_next_try(
    settings, undisturbed, tmp_path, monkeypatch, impatient
):
    holder = Holder(monkeypatch)
    holder.held = "Test-Job.safetensors"
    manager, name = run(settings, tmp_path)
    job = manager.get(name)
    assert job.state == "failed" and job.status()["step"] == 6
    assert "another program has had this open" in job.status()["message"]
    assert "Test-Job.safetensors" in job.status()["message"]
    holder.held = ""
    assert manager.resume(name).wait(PATIENCE)
    assert job.state == "completed" and lora(tmp_path) == undisturbed
    manager.shutdown()


def test_a_job_whose_folder_is_open_is_not_restarted_on_its_old_checkpoints(settings, tmp_path, monkeypatch, impatient):
    manager, name = run(settings, tmp_path)
    Holder(monkeypatch).held = name
    with pytest.raises(JobError, match=r"The folder of the job .* cannot be removed: another program .*try again"):
        manager.ensure(settings, if_exists="restart")
    assert manager.get(name).state == "completed"
    with pytest.raises(JobError, match="cannot be removed"):
        manager.delete(name)
    monkeypatch.undo()
    again = manager.ensure(settings, if_exists="restart")
    assert again.wait(PATIENCE) and again.state == "completed"
    assert [line["step"] for line in again.metrics() if "loss" in line] == [1, 2, 3, 4, 5, 6]
    manager.shutdown()


def test_patience_ends_and_other_errors_come_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PATIENCE", 0.2)
    tries, started = [], time.monotonic()

    def work():
        tries.append(1)
        raise Held(errno.EACCES, "used by another process", "x")

    with pytest.raises(PermissionError, match=r"open for 0 seconds .* Close it there"):
        files.patiently(work, tmp_path / "x")
    assert len(tries) > 2 and time.monotonic() - started >= 0.2
    tries.clear()

    def refused():
        tries.append(1)
        raise PermissionError(errno.EACCES, "read-only", "x")

    with pytest.raises(PermissionError, match="read-only"):
        files.patiently(refused, tmp_path / "x")
    assert len(tries) == 1


def test_a_checkpoint_that_may_not_be_read_now_is_not_taken_for_damaged(settings, undisturbed, tmp_path, monkeypatch):
    manager = JobManager(tmp_path / "jobs", tmp_path / "loras", "cpu")
    job = manager.ensure(settings)
    while job.status()["step"] < 3 and not job.wait(0.01):
        pass
    manager.shutdown()
    load = torch.load

    def held(path, *args, **options):
        raise Held(errno.EACCES, "used by another process", str(path))

    monkeypatch.setattr(torch, "load", held)
    again = JobManager(tmp_path / "jobs", tmp_path / "loras", "cpu")
    found = again.ensure(settings)
    assert found.wait(PATIENCE) and found.state == "failed" and "used by another process" in found.status()["message"]
    assert not list((found.folder / "checkpoints").glob("damaged-*"))
    monkeypatch.setattr(torch, "load", load)
    assert again.resume(found.id).wait(PATIENCE)
    assert found.state == "completed" and lora(tmp_path) == undisturbed
    again.shutdown()
