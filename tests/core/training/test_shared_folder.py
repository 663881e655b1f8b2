"""Several managers of one folder, as several ComfyUIs and command lines have it: a job is one's at a time.

To whom a folder belongs is a matter of the open file, so two managers in one process are as good as two processes.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from chroma_core.errors import ChromaKitError, JobError
from chroma_core.files import read_json
from chroma_core.training.config import TrainingConfig
from chroma_core.training.jobs.job import Job
from chroma_core.training.jobs.manager import JobManager
from training_cases import config, killed, model_folder, write_dataset
from waiting import PATIENCE, until

LONG = {"steps": 100_000, "checkpoint_every": 0, "validate_every": 0, "previews": {"prompts": "sks", "every": 0}}


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("shared")
    return model_folder(folder / "model"), write_dataset(folder / "data", 3)


@pytest.fixture
def two(tmp_path, monkeypatch) -> Iterator[tuple[JobManager, JobManager]]:
    monkeypatch.setattr("chroma_core.training.jobs.manager.LOCK_SECONDS", 0.1)
    made = [JobManager(tmp_path / "jobs", tmp_path / "loras", "cpu") for _ in range(2)]
    yield made[0], made[1]
    for manager in made:
        manager.shutdown()


def everything(manager: JobManager, settings: TrainingConfig) -> dict[str, Callable[[], object]]:
    """All that can be asked of a job and writes to its folder."""
    job = settings.job_id()
    steering = ("pause", "resume", "stop", "sample", "save", "delete")
    return {
        **{name: lambda name=name: getattr(manager, name)(job) for name in steering},
        **{name: lambda name=name: manager.ensure(settings, name) for name in ("keep", "resume", "restart")},
        "extend": lambda: manager.extend(job, 5),
        "change": lambda: manager.change(job, {"checkpoint_every": 7}),
        "change by force": lambda: manager.change(job, {"seed": 7}, force=True),
    }


def content(folder: Path) -> dict[str, tuple[bytes, int | bool]]:
    """Of locks no time: asking for one touches it, with filelock 3.12."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.name != ".lock" and path.stat().st_mtime_ns)
        for path in files
    }


def refused(ask: Callable[[], object]) -> str:
    with pytest.raises(JobError) as error:
        ask()
    return str(error.value)


def test_what_another_trains_or_has_queued_is_refused_and_nothing_is_written(places, two):
    first, second = two
    running, queued = config(*places, **LONG), config(*places, name="queued", **LONG)
    for settings in (running, queued):
        first.ensure(settings)
    until(lambda: first.get(running.job_id()).status()["step"] >= 2)
    first.pause(running.job_id())
    until(lambda: second.get(running.job_id()).state == "paused")
    assert {job.id: (job.state, job.elsewhere) for job in second.list()} == {
        running.job_id(): ("paused", True),
        queued.job_id(): ("queued", True),
    }
    before = content(first.root)
    for settings in (running, queued):
        assert second.get(settings.job_id()).status()["elsewhere"]
        for name, ask in everything(second, settings).items():
            assert "trained by another process" in refused(ask), name
    assert content(first.root) == before
    assert second.states() == {} and not any(job.elsewhere for job in first.list())

    first.stop(queued.job_id())
    first.stop(running.job_id())
    assert first.get(running.job_id()).wait(PATIENCE)
    until(lambda: not second.get(running.job_id()).elsewhere)
    assert [(job.state, job.elsewhere) for job in second.list()] == [("stopped", False)] * 2
    assert second.get(running.job_id()).status()["step"] == first.get(running.job_id()).status()["step"]

    second.resume(queued.job_id())  # now it is the other's
    for name, ask in everything(first, queued).items():
        assert "trained by another process" in refused(ask), name
    second.stop(queued.job_id())
    assert second.get(queued.job_id()).wait(PATIENCE)
    first.delete(queued.job_id())
    assert "no training job" in refused(lambda: second.resume(queued.job_id()))
    assert [job.id for job in second.list()] == [running.job_id()]


def test_of_two_that_ask_at_once_one_has_the_job_and_the_other_words(places, two):
    blocked = [config(*places, name=f"at work {i}", **LONG) for i in range(2)]
    for manager, settings in zip(two, blocked, strict=True):  # so that what comes then is queued, and ended at once
        manager.pause(manager.ensure(settings).id)
    wanted = config(*places, **LONG)
    actions: list[Callable[[JobManager], Job]] = [
        lambda manager: manager.ensure(wanted, "resume"),
        lambda manager: manager.resume(wanted.job_id()),
        lambda manager: manager.extend(wanted.job_id(), 1),
        lambda manager: manager.ensure(wanted, "restart"),
    ]
    for action in actions * 5:
        together, said = threading.Barrier(2), dict[JobManager, str]()

        def ask(manager: JobManager, action=action, together=together, said=said) -> None:
            together.wait()
            try:
                action(manager)
                said[manager] = ""
            except ChromaKitError as error:
                said[manager] = str(error)

        threads = [threading.Thread(target=ask, args=[manager]) for manager in two]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (winner,), (loser,) = ([m for m in two if bool(said[m]) == lost] for lost in (False, True))
        assert "another process" in said[loser], said
        assert winner.get(wanted.job_id()).state == "queued" and loser.get(wanted.job_id()).elsewhere
        winner.stop(wanted.job_id())


@pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL")
def test_what_a_killed_process_had_is_free_at_once(places, two):
    first, _ = two
    settings = [config(*places, **LONG), config(*places, name="queued", **LONG)]
    killed(first.root.parent, 2, *settings)
    left = [read_json(first.root / each.job_id() / "job.json")["state"] for each in settings]
    assert left == ["running", "queued"]
    assert [(job.state, job.elsewhere) for job in first.list()] == [("interrupted", False)] * 2
    job = first.resume(settings[0].job_id())
    until(lambda: job.state == "running" and job.status()["step"] >= 1)
    first.stop(job.id)


def test_what_another_wrote_and_cannot_be_read_is_not_written_over(places, two):
    first, second = two
    job = first.ensure(config(*places, **LONG))
    first.stop(job.id)
    assert job.wait(PATIENCE) and second.get(job.id).state == "stopped"
    (job.folder / "job.json").write_text("[]")
    for manager in two:
        assert "cannot be read" in refused(lambda manager=manager: manager.resume(job.id))
        assert manager.get(job.id).state == "stopped"
    third = JobManager(first.root, first.loras_folder, "cpu")  # which never could
    for mode in ("keep", "restart"):
        assert "cannot be read" in refused(lambda mode=mode: third.ensure(job.config, mode))
    third.shutdown()
    assert (job.folder / "job.json").read_text() == "[]"


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="whoever is asked may write everywhere")
def test_where_nothing_may_be_written_jobs_are_shown_and_left_alone(places, two):
    first, _ = two
    job = first.ensure(config(*places, **LONG))
    first.stop(job.id)
    assert job.wait(PATIENCE)
    job.folder.chmod(0o500)
    try:
        assert first.get(job.id).state == "stopped" and "cannot be written" in refused(lambda: first.resume(job.id))
    finally:
        job.folder.chmod(0o700)
