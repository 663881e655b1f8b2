"""ComfyUI and another process with the same output folder: each sees what the other trains, and leaves it alone."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from _host import Host, PromptFailed, start_host
from chroma_core.errors import JobError
from chroma_core.training.jobs.manager import JobManager
from prompts import job_of, train, until_not
from waiting import PATIENCE, until

ENDLESS = 1_000_000
SETTINGS, CHOICE = "/chromakit/settings", "prompts_while_training"
ACTIONS = ("pause", "resume", "stop", "sample", "save", "delete", "extend", "change")
BODIES = {"extend": {"steps": 5}, "change": {"changes": {"checkpoint_every": 7}}}


@pytest.fixture
def ours(server: Host) -> Iterator[JobManager]:
    """The other process: this one, with what the command line trains with."""
    output = server.base / "output"
    manager = JobManager(output / "chromakit" / "jobs", output / "loras", "cpu")
    yield manager
    manager.shutdown()


def files(folder: Path) -> dict[str, tuple[int, int, int]]:
    found = ((path, path.stat()) for path in folder.rglob("*"))
    return {str(path): (stat.st_ino, stat.st_mtime_ns, stat.st_size) for path, stat in found}


def refused(host: Host, job: str) -> None:
    """Every action, at once, since each waits a while for the folder."""
    with ThreadPoolExecutor(len(ACTIONS)) as pool:
        answers = pool.map(lambda name: host.post(f"/chromakit/jobs/{job}/{name}", BODIES.get(name)), ACTIONS)
    for name, (status, answer) in zip(ACTIONS, answers, strict=True):
        assert status == 409 and "trained by another process" in answer["error"], (name, status, answer)


def test_each_is_refused_what_the_other_trains(server: Host, ours: JobManager):
    prompt = train("shared output", ENDLESS, preview_prompt="a star")
    job = job_of(server.run(prompt))
    until(lambda: server.get(f"/chromakit/jobs/{job}")["step"] >= 2, "two steps")
    assert ours.get(job).status()["elsewhere"] and not server.get(f"/chromakit/jobs/{job}")["elsewhere"]
    for ask in (ours.resume, ours.delete, ours.stop, lambda job: ours.extend(job, 5)):
        with pytest.raises(JobError, match="trained by another process"):
            ask(job)
    assert server.post(f"/chromakit/jobs/{job}/stop")[0] == 200
    assert until_not(server, job) == "stopped"

    until(lambda: not ours.get(job).elsewhere, "ComfyUI letting go of it")
    ours.resume(job)
    until(lambda: ours.get(job).state == "running", "the other process' training")
    ours.pause(job)
    shown = until(
        lambda: (now := server.get(f"/chromakit/jobs/{job}"))["state"] == "paused" and now, "its pause, seen in ComfyUI"
    )
    (listed,) = (each for each in server.get("/chromakit/jobs?brief=true") if each["id"] == job)
    assert shown["elsewhere"] and listed["elsewhere"]
    before = files(ours.root / job)
    refused(server, job)
    with pytest.raises(PromptFailed, match="trained by another process"):
        server.run(prompt)
    assert files(ours.root / job) == before

    ours.shutdown()
    assert ours.get(job).wait(PATIENCE)
    left = until(
        lambda: not (now := server.get(f"/chromakit/jobs/{job}"))["elsewhere"] and now, "the end of the other process"
    )
    assert left["state"] == "interrupted" and left["step"] == ours.get(job).status()["step"]
    assert server.post(f"/chromakit/jobs/{job}/delete")[0] == 200
    assert job not in {each.id for each in ours.list()} and not (ours.root / job).exists()


@pytest.mark.skipif(os.name == "nt", reason="Windows ends a process without asking")
def test_two_comfyuis_share_their_folders(server: Host, tmp_path: Path):
    """Each trains one job; neither can do anything to the other's, and one goes on with what the other left.

    The other begins with the settings that are saved, and ends by SIGTERM, which docker stop, systemd and Slurm send;
    a restart by Ctrl-C is in tests/browser/test_jobs_tab.py.
    """
    assert server.post(SETTINGS, {CHOICE: "finish"})[0] == 200
    shared = [word for name in ("output", "user") for word in (f"--{name}-directory", str(server.base / name))]
    other = start_host(tmp_path, extra=tuple(shared))
    try:
        assert other.get(SETTINGS) == {CHOICE: "finish", "choices": ["yield", "finish", "refuse"], "held": 0}
        assert "settings.json" not in other.log_tail(10_000)
        hosts = (server, other)
        jobs = [
            job_of(host.run(train(f"of {which}", ENDLESS, preview_prompt="a star")))
            for which, host in zip(("one", "two"), hosts, strict=True)
        ]
        for own, job, foreign in ((server, jobs[0], other), (other, jobs[1], server)):
            until(lambda own=own, job=job: own.get(f"/chromakit/jobs/{job}")["step"] >= 2, "two steps")
            shown = until(
                lambda foreign=foreign, job=job: (
                    (now := foreign.get(f"/chromakit/jobs/{job}"))["state"] == "running" and now
                ),
                "the other's training, seen here",
            )
            assert shown["elsewhere"] and not own.get(f"/chromakit/jobs/{job}")["elsewhere"]
            refused(foreign, job)
        assert server.post(f"/chromakit/jobs/{jobs[0]}/stop")[0] == 200
        load, asked = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1)), time.time()
        other.process.send_signal(signal.SIGTERM)
        assert other.process.wait(60) == 0
        saved = json.loads((server.base / "output" / "chromakit" / "jobs" / jobs[1] / "job.json").read_text())
        assert saved["state"] == "interrupted" and saved["checkpoint"] == saved["step"] >= 2
        assert saved["updated"] - asked < 10 * load, "docker stop kills after ten seconds"
        left = until(
            lambda: not (now := server.get(f"/chromakit/jobs/{jobs[1]}"))["elsewhere"] and now, "the end of the other"
        )
        assert (left["state"], left["checkpoint"], left["step"]) == ("interrupted", saved["step"], saved["step"])
        assert server.post(f"/chromakit/jobs/{jobs[1]}/resume")[0] == 200
        until(lambda: server.get(f"/chromakit/jobs/{jobs[1]}")["step"] > left["step"], "a step after the other's last")
        assert server.post(f"/chromakit/jobs/{jobs[1]}/stop")[0] == 200
        for job in jobs:
            assert until_not(server, job) == "stopped"
            assert server.post(f"/chromakit/jobs/{job}/delete")[0] == 200
    finally:
        other.stop()
        server.post(SETTINGS, {CHOICE: "yield"})
