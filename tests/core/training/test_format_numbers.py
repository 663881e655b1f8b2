"""What is on disk has a format number: the first release's job goes on, a later version's files are left alone.

tests/recorded/first_release was written by commit 7b104d0, which knew no numbers: a job that ended at
step 2 of 6, its data, and the metrics and the LoRA of the same job when that code trained it to the end.
"""

import json
import logging
import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from chroma_core.cli.main import main
from chroma_core.data import editing, history, remembered
from chroma_core.errors import ChromaKitError, ConfigError, JobError
from chroma_core.files import check_format, sha256_file
from chroma_core.loading import model_files
from chroma_core.training.jobs import job as jobs
from chroma_core.training.jobs.manager import JobManager
from chroma_core.training.run import checkpoint
from chroma_core.training.run import grid as grids

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


def _images(data: Path) -> Path:
    """Remember what was read of an image."""
    known = remembered.Remembered(data)
    assert known.facts(data / "0.png")[0].width == 64
    known.save()
    return data / "images.json"


def _digests(data: Path) -> Path:
    """Remember the digest of a large file."""
    key, digest = f"{data}/x {model_files.AT_ONCE + 1} 5", "a" * 64
    model_files._known.clear()
    model_files._remember(key, digest)
    assert model_files._known == {key: digest}
    return model_files.remembered_in()


def _caption(data: Path) -> Path:
    """Change a caption and take an image out, which also works where neither can be kept for an undo."""
    text = (data / "0.txt").read_text().strip() + "!"
    history.caption(data, {"0.png": text}, {})
    batch = history.take_out(data, ["0.png"])
    assert not (data / "0.png").exists() and history.bring_back(data, batch) == ["0.png"]
    assert (data / "0.txt").read_text().strip() == text
    for warning in history.history_or_none(data)[1]:
        logging.getLogger().warning(warning)
    return data / ".removed/history.json"


def _crop(data: Path) -> Path:
    """Move a crop."""
    editing.move_crops(data, {"0.png": 0.1})
    return data / "chromakit-crops.json"


def _grid(data: Path) -> Path:
    """Ask for another grid of a job; its ratings stay."""
    grids.put_grid(data, grids.GridChoice(steps=(2,), strengths=(1.0,), prompts=()), {})
    return data / "grid.json"


KEPT = {
    "chroma_core/data/remembered.py": _images,
    "chroma_core/loading/model_files.py": _digests,
    "chroma_core/data/history.py": _caption,
    "chroma_core/data/editing.py": _crop,
    "chroma_core/training/run/grid.py": _grid,
}
"""By the module that keeps it: what writes a file, and returns where."""
ELSEWHERE = {
    "chroma_core/training/jobs/job.py",  # above
    "chroma_core/training/run/checkpoint.py",  # above
    "chroma_core/loading/quantised_files.py",  # whose number is in the file's name
    "nodes/while_training.py",  # tests/host/test_prompts_while_training.py
}


@pytest.mark.parametrize("module", KEPT)
def test_a_later_version_s_file_is_left_alone(module, tmp_path, root, monkeypatch, caplog):
    data = tmp_path / "data"
    shutil.copytree(root / "tests/recorded/first_release/data", data)
    monkeypatch.setattr(model_files.constants, "HF_HOME", str(tmp_path))
    monkeypatch.setattr(remembered, "SETTLED", -1)
    file = KEPT[module](data)
    for number in (2, "2", [1]):
        changed(file, format=number)
        before = file.read_text()
        caplog.clear()
        try:
            KEPT[module](data)
        except ChromaKitError as error:
            logging.getLogger().warning(error)
        assert f"has the format {number!r}, {LATER}" in caplog.text and file.read_text() == before


def test_every_file_with_a_number_is_held_to_that(root):
    sources = [*root.glob("chroma_core/**/*.py"), *root.glob("nodes/**/*.py")]
    writers = {path for path in sources if re.search(r'"format": (\w+_)?FORMAT\b', path.read_text(encoding="utf-8"))}
    assert {path.relative_to(root).as_posix() for path in writers} == KEPT.keys() | ELSEWHERE


@pytest.mark.parametrize("found", [0, 3, -1, "2", 1.0, True, [1]])
def test_any_other_number_is_refused(found):
    with pytest.raises(ConfigError, match="formats 1 to 2. Update ChromaKit"):
        check_format("It", found, 2)


def test_no_number_is_the_first():
    for found in (None, 1, 2):
        check_format("It", found, 2)
