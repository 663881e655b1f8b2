"""What is on disk has a format number: the first release's job goes on, a later version's files are left alone.

tests/recorded/first_release was written by commit 7b104d0, which knew no numbers: a job that ended at
step 2 of 6, its data, and the metrics and the LoRA of the same job when that code trained it to the end.
"""

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from chroma_core.cli.main import main
from chroma_core.data.remembered import Remembered
from chroma_core.errors import ConfigError, JobError
from chroma_core.files import check_format, sha256_file
from chroma_core.loading import model_files
from chroma_core.training.jobs import job as jobs
from chroma_core.training.jobs.manager import JobManager
from chroma_core.training.run import checkpoint

NAME = "first-release-629fccf3"
LATER = "which a later version of ChromaKit writes; this one reads format 1"


@pytest.fixture
def first_release(tmp_path, monkeypatch, root):
    """A copy, with the present folder there: the job names its data `data`."""
    shutil.copytree(root / "tests/recorded/first_release", tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "jobs" / NAME


def manager() -> JobManager:
    return JobManager(Path("jobs"), Path("loras"), "cpu")


def written(folder: Path) -> dict[str, str]:
    """Every file but the lock, and its content."""
    return {
        str(path.relative_to(folder)): sha256_file(path)
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def changed(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_job_of_the_first_release_goes_on(first_release):
    found = manager()
    (job,) = found.list()
    assert (job.id, job.state, job.config.steps) == (NAME, "interrupted", 6)
    assert [line["step"] for line in job.metrics()] == [1, 2]
    assert job.curve.read()["total"] == 2
    assert [path.name for path in job.samples()] == ["step-000000-0.png"]
    assert found.ensure(job.config) is job and job.wait(120)
    status = job.status()
    found.shutdown()
    assert status["state"] == "completed", status["message"]
    # One addition is rounded otherwise since then, as the job says; no more.
    assert any("rounded sums otherwise" in warning for warning in status["warnings"])
    finished = [json.loads(line)["loss"] for line in Path("finished.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in job.metrics()] == pytest.approx(finished, rel=1e-5)
    now, then = load_file(status["lora_path"]), load_file("finished.safetensors")
    assert now.keys() == then.keys()
    assert max((now[name] - then[name]).abs().max().item() for name in now) < 1e-6
    assert json.loads((first_release / "job.json").read_text())["format"] == jobs.FORMAT
    (newest,) = first_release.glob("checkpoints/step-*")
    assert json.loads((newest / "state.json").read_text())["format"] == checkpoint.FORMAT


@pytest.mark.parametrize("if_exists", ["keep", "resume", "restart"])
def test_a_job_of_a_later_version_is_left_alone(first_release, if_exists, capsys):
    config = manager().get(NAME).config
    shutil.move(first_release, first_release.with_name(config.job_id()))
    folder = first_release.with_name(config.job_id())
    changed(folder / "job.json", format=jobs.FORMAT + 1)
    before, found = written(folder), manager()
    assert found.list() == [] and LATER in capsys.readouterr().out
    ((name, why),) = found.unreadable().items()
    assert name == folder.name and LATER in why
    for asked in (lambda: found.ensure(config, if_exists), lambda: found.get(folder.name)):
        with pytest.raises(JobError, match=f"'{folder.name}' has the format 2, {LATER}. Update ChromaKit"):
            asked()
    found.shutdown()
    assert written(folder) == before


def test_a_folder_that_was_mended_is_read_again(first_release):
    (first_release / "job.json").write_text("{}")
    found = manager()
    assert found.unreadable() == {NAME: "its job.json lacks 'config'"}
    shutil.rmtree(first_release)
    assert found.unreadable() == {}
    shutil.copytree(Path(__file__).parents[2] / "recorded/first_release/jobs" / NAME, first_release)
    assert [job.id for job in found.list()] == [NAME] and found.unreadable() == {}
    found.shutdown()


def test_the_command_line_lists_the_other_jobs(first_release, capsys):
    folder = first_release
    shutil.copytree(folder, folder.with_name("another"))
    changed(folder / "job.json", format=jobs.FORMAT + 1)
    assert main(["jobs", "list", "--output", ".", "--json"]) == 0
    out, said = capsys.readouterr()
    assert [each["id"] for each in json.loads(out)] == ["another"]
    assert f"'{folder.name}' cannot be read" in said and LATER in said


def test_a_checkpoint_of_a_later_version_is_not_taken_for_damaged(first_release):
    state = first_release / "checkpoints/step-000002/state.json"
    changed(state, format=checkpoint.FORMAT + 1)
    before, found = written(state.parent), manager()
    job = found.resume(NAME)
    assert job.wait(120)
    found.shutdown()
    assert job.state == "failed" and f"'step-000002' has the format 2, {LATER}" in job.status()["message"]
    assert written(state.parent) == before


def test_a_later_version_s_list_of_images_is_left_alone(tmp_path, root, caplog):
    file, text = tmp_path / "images.json", '{"format": 2, "files": {}}'
    file.write_text(text)
    image = tmp_path / "0.png"
    shutil.copy(root / "tests/recorded/first_release/data/0.png", image)
    os.utime(image, (1, 1))
    remembered = Remembered(tmp_path)
    facts = remembered.facts(image)
    remembered.save()
    assert facts[0].width == 64 and file.read_text() == text and LATER in caplog.text


def test_a_later_version_s_list_of_digests_is_left_alone(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(model_files.constants, "HF_HOME", str(tmp_path))
    monkeypatch.setattr(model_files, "_known", {})
    file = model_files.remembered_in()
    key, digest = f"{tmp_path}/x {model_files.AT_ONCE + 1} 5", "a" * 64
    model_files._remember(key, digest)
    assert json.loads(file.read_text()) == {"format": 1, key: digest} and model_files._stored() == {key: digest}
    changed(file, format=2)
    before = file.read_text()
    with caplog.at_level(logging.WARNING):
        model_files._remember(key, "b" * 64)
    assert file.read_text() == before and LATER in caplog.text and model_files._known[key] == "b" * 64


@pytest.mark.parametrize("found", [0, 3, -1, "2", 1.0, True, [1]])
def test_any_other_number_is_refused(found):
    with pytest.raises(ConfigError, match="formats 1 to 2. Update ChromaKit"):
        check_format("It", found, 2)


def test_no_number_is_the_first():
    for found in (None, 1, 2):
        check_format("It", found, 2)
