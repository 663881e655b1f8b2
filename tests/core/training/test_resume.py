"""SIGKILL at random moments, and at file operations: a resumed run ends with the bits of the uninterrupted one."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import forked
from chroma_core.training.jobs.manager import JobManager
from tools import kill_resume
from training_cases import config, killed, model_folder, verdicts, write_dataset
from waiting import PATIENCE


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork server on Windows; run tools/kill_resume.py")
def test_six_kills_six_identical_results(tmp_path):
    lines = []
    model = {"folder": str(model_folder(tmp_path / "model"))}
    identical = kill_resume.kill_and_compare(model, tmp_path / "runs", kills=6, seed=1, steps=6, say=lines.append)
    assert identical == 6, "\n".join(lines)
    assert any("half written" in line for line in lines) and any("running" in line for line in lines)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL on Windows")
def test_killed_at_a_file_operation_the_job_goes_on_to_the_same_end(tmp_path):
    """A sample; docs/training.md has what all of them gave."""
    options = "--job", "plain", "--every", 150, "--first", 40
    ended = forked.run(forked.FULL, "tools/kill_at_files.py", "--model", model_folder(tmp_path / "model"), *options)
    lines = ended.stdout.splitlines()
    assert ended.returncode == 0 and lines[-1] == "identical 3 of 3", ended.stdout + ended.stderr
    assert "preparing" in ended.stdout and "running" in ended.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL on Windows")
def test_killed_and_resumed_it_says_the_same(tmp_path):
    """At every validation, before the kill and after it, up to the last, at which the job ends by itself."""
    places = model_folder(tmp_path / "model"), write_dataset(tmp_path / "data", 2)
    apart = {"validation_dataset": {"folder": str(write_dataset(tmp_path / "apart", 2, seed=1))}}
    often = {"steps": 60, "validate_every": 4, "checkpoint_every": 10, "stop_when_memorising": 2}
    settings = config(*places, **apart, **often, learning_rate=0.06)
    killed(tmp_path / "killed", 25, settings)
    jobs = []
    for name in ("killed", "whole"):
        manager = JobManager(tmp_path / name / "jobs", tmp_path / name / "loras", "cpu")
        job = manager.resume(settings.job_id()) if name == "killed" else manager.ensure(settings)
        assert job.wait(PATIENCE) and job.state == "completed", job.status()["message"]
        manager.shutdown()
        jobs.append(job)
    again, whole = jobs
    assert "running at step 2" in (again.folder / "log.txt").read_text()
    assert verdicts(again) == verdicts(whole) and len({each["kind"] for each in verdicts(whole)}) >= 3
    for name in ("step", "best_step", "message", "verdict", "heldout_loss", "kept"):
        assert again.status()[name] == whole.status()[name], name


def test_whatever_differs_is_seen(tmp_path):
    """The comparison itself: one bit of a LoRA, a missing checkpoint, another preview, another logged number."""

    def run(name: str, **changes) -> Path:
        folder = tmp_path / name
        for part in ("loras", "jobs/j/checkpoints/step-000008", "jobs/j/samples"):
            (folder / part).mkdir(parents=True)
        weights = np.arange(4, dtype=np.float32)
        save_file({"down": weights}, folder / "loras" / "kill-resume.safetensors")
        save_file({"down": changes.get("average", weights)}, folder / "loras" / "kill-resume-ema.safetensors")
        save_file({"down": weights}, folder / "jobs/j/checkpoints/step-000008/lora.safetensors")
        (folder / "jobs/j/samples/step-000008-0.png").write_bytes(changes.get("image", b"png"))
        line = f'{{"step": 8, "loss": {changes.get("loss", 0.5)}, "seconds": {changes.get("seconds", 1)}}}\n{{"step"'
        (folder / "jobs/j/metrics.jsonl").write_text(line)
        return folder

    reference = run("reference")
    assert kill_resume.same_result(reference, run("same", seconds=2))
    average = np.arange(4, dtype=np.float32)
    average.view(np.uint32)[2] ^= 1
    for i, changes in enumerate(({"average": average}, {"image": b"PNG"}, {"loss": 0.25})):
        assert not kill_resume.same_result(reference, run(f"other-{i}", **changes))
    fewer = run("fewer")
    shutil.rmtree(fewer / "jobs/j/checkpoints/step-000008")
    assert not kill_resume.same_result(reference, fewer)
