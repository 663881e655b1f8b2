"""Writing fails, anywhere in a job: it pauses or fails in words, goes on later, and gives what it would have given."""

import errno
import io
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save_file

from chroma_core.errors import ConfigError, DiskFull, JobError
from chroma_core.files import disk_is_full, read_json, write_json
from chroma_core.training.config import TrainingConfig
from chroma_core.training.jobs.manager import JobManager
from chroma_core.training.run.metrics import MetricsLog
from tools.kill_at_files import in_place
from training_cases import config, model_folder, write_dataset
from waiting import until

PATIENCE = 120.0


class Disk:
    """The operating system's writing below a folder, counted, and refused from the n-th time on."""

    def __init__(self, folder: Path, refuse: int, number: int = errno.ENOSPC, times: int = 1 << 30):
        self.folder, self.refuse, self.number, self.times, self.done = str(folder), refuse, number, times, 0

    def check(self, path: Any) -> None:
        if not str(path).startswith(self.folder) or str(path).endswith(".lock"):
            return
        self.done += 1
        if self.refuse <= self.done < self.refuse + self.times:
            raise OSError(self.number, os.strerror(self.number), str(path))

    def room(self) -> None:
        self.times = 0

    @contextmanager
    def plugged_in(self) -> Iterator["Disk"]:
        opened, replaced, renamed, made = io.open, os.replace, os.rename, os.mkdir

        def checked_open(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if any(letter in mode for letter in "wax+"):
                self.check(file)
            return opened(file, mode, *args, **kwargs)

        def checked(real: Callable[..., Any], which: int) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                self.check(args[which])
                return real(*args, **kwargs)

            return call

        by_name = {"replace": checked(replaced, 1), "rename": checked(renamed, 1), "mkdir": checked(made, 0)}
        with in_place({"open": checked_open, **by_name}):
            yield self


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("places")
    return model_folder(folder / "model"), write_dataset(folder / "data")


def settings(places: tuple[Path, Path]) -> TrainingConfig:
    return config(
        *places,
        steps=3,
        checkpoint_every=2,
        previews={"prompts": ["a cat"], "every": 2, "steps": 1},
        validation_dataset={"folder": str(places[1])},
        validate_every=2,
    )


def finished(manager: JobManager, job_id: str) -> dict[str, torch.Tensor]:
    job = manager.get(job_id)
    assert job.wait(PATIENCE) and job.state == "completed", job.status()["message"]
    return load(Path(str(job.status()["lora_path"])).read_bytes())


@pytest.fixture(scope="module")
def plain(places, tmp_path_factory) -> tuple[dict[str, torch.Tensor], int]:
    """What the job gives on a sound disk, and how often it writes."""
    root = tmp_path_factory.mktemp("plain")
    with Disk(root, 1 << 30).plugged_in() as disk:
        manager = JobManager(root / "jobs", root / "loras", "cpu")
        made = finished(manager, manager.ensure(settings(places)).id)
        manager.shutdown()
    return made, disk.done


@pytest.mark.parametrize("part", range(8))
@pytest.mark.parametrize("fault", ["full", "once"])
def test_a_write_that_fails_loses_nothing(places, plain, tmp_path, part, fault):
    """`full`: nothing can be written from the n-th time on, until there is room. `once`: an I/O error, or a missing
    permission, once."""
    wanted, writes = plain
    at = 2 + part * (writes - 2) // 8  # the first makes the folder of all jobs
    number, times = (errno.ENOSPC, 1 << 30) if fault == "full" else (errno.EACCES if part % 2 else errno.EIO, 1)
    with Disk(tmp_path, at, number, times).plugged_in() as disk:
        manager = JobManager(tmp_path / "jobs", tmp_path / "loras", "cpu")
        try:
            job = manager.ensure(settings(places))
        except JobError as error:
            assert (
                "cannot be written" in str(error)
                and manager.list() == []
                and (fault == "once" or isinstance(error, DiskFull))
            )
            disk.room()
            job = manager.ensure(settings(places))
        until(lambda: job.state in ("paused", "completed", "failed"), PATIENCE)
        state, message = job.state, job.status()["message"]
        print(f"write {at} of {writes}: {state}. {message}")
        if fault == "full":
            assert state == "completed" or (state == "paused" and "Training is paused and nothing is lost" in message)
        elif state == "failed":
            assert os.strerror(number) in message
        disk.room()
        if state != "completed":
            manager.resume(job.id)
        found = finished(manager, job.id)
        assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
        manager.shutdown()
    assert read_json(job.folder / "job.json")["state"] == "completed"
    assert [line["step"] for line in job.metrics() if "loss" in line] == [1, 2, 3]


def test_a_job_that_cannot_be_written_down_is_none(places, tmp_path):
    with Disk(tmp_path / "jobs", 1).plugged_in() as disk:
        manager = None
        with suppress(OSError):
            manager = JobManager(tmp_path / "jobs", tmp_path / "loras", "cpu")
        assert manager is None
        disk.room()
        manager = JobManager(tmp_path / "jobs", tmp_path / "loras", "cpu")
        for allowed in (0, 1, 2):
            disk.refuse, disk.times, disk.done = 1 + allowed, 1 << 30, 0
            with pytest.raises(DiskFull, match="cannot be written to .* so it is not queued: .*Nothing was changed"):
                manager.ensure(config(*places))
            assert manager.list() == [] and not any(p.is_dir() for p in (tmp_path / "jobs").glob("job-*"))
        disk.room()
        job = manager.ensure(config(*places))
        manager.pause(job.id)
        manager.stop(job.id)
        assert job.wait(PATIENCE)
        before = job.state, job.status()["message"]
        disk.refuse, disk.times, disk.done = 1, 1 << 30, 0
        for ask in (
            lambda: manager.resume(job.id),
            lambda: manager.extend(job.id, 2),
            lambda: manager.ensure(job.config, "resume"),
        ):
            with pytest.raises(DiskFull):
                ask()
            assert (job.state, job.status()["message"]) == before and job.ended.is_set()
        disk.room()
        manager.resume(job.id)
        finished(manager, job.id)
        manager.shutdown()


def test_half_a_character_is_refused_before_anything_is_written(places, tmp_path):
    for changes in ({"previews": {"prompts": ["a \ud800"]}}, {"previews": {"prompts": [{"prompt": "x\udcff"}]}}):
        with pytest.raises(ConfigError, match="half a character"):
            config(*places, **changes)
    # What others have named so (a file of foreign bytes) is kept as it is.
    write_json(tmp_path / "a.json", {"message": "skipped \udcff.png"})
    assert read_json(tmp_path / "a.json") == {"message": "skipped \udcff.png"}


def test_lines_that_could_not_be_written_are_kept(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(step=1, loss=1.0)
    with Disk(tmp_path, 1).plugged_in():
        log.append(step=2, loss=2.0)
        with pytest.raises(OSError) as error:
            log.settle()
        assert disk_is_full(error.value)
    log.append(step=3, loss=3.0)
    assert [line["step"] for line in log.read()] == [1, 2, 3]
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"st\xff\n{"step": 2}\n')
    assert [line["step"] for line in log.read()] == [1, 2]


def test_libraries_own_words_for_a_full_disk_are_known(tmp_path):
    """On a real disk of one megabyte, where one may be made (as root on Linux)."""
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], capture_output=True
    ).returncode:
        pytest.skip("no disk can be mounted here")
    try:
        for save in (torch.save, save_file):
            with pytest.raises(Exception, match="unexpected pos|No space left") as error:
                save({"a": torch.ones(1 << 20)}, tmp_path / "a")
            assert disk_is_full(error.value)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
    assert not disk_is_full(ValueError("x")) and not disk_is_full(None)
