"""Jobs in the background: asking twice, steering, yielding, failing, and being found again."""

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load, save_file
from torch.nn.modules.module import register_module_forward_hook

import forked
from chroma_core.cli.main import main
from chroma_core.errors import JobError
from chroma_core.loading.load import load_transformer
from chroma_core.lora.adapters import attach
from chroma_core.lora.files import read_lora
from chroma_core.model.transformer import Block
from chroma_core.training.jobs.blocking import run_job
from chroma_core.training.jobs.job import FolderLock, Job
from chroma_core.training.jobs.manager import JobManager
from chroma_core.training.run import faults
from training_cases import config, model_folder, write_dataset
from waiting import PATIENCE, stays, until

LONG = {"steps": 100_000, "checkpoint_every": 0, "validate_every": 0}


@contextmanager
def another_has(folder: Path) -> Iterator[None]:
    """Inside a `with` block a job's folder is not the manager's: to whom it belongs is a matter of the open file."""
    lock = FolderLock(folder)
    until(lock.take, "the folder's lock")
    yield
    lock.let_go()


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("jobs")
    return model_folder(folder / "model"), write_dataset(folder / "data", 4)


@pytest.fixture
def manager(tmp_path):
    made = JobManager(tmp_path / "jobs", tmp_path / "loras", "cpu")
    yield made
    made.shutdown()


def test_a_folder_is_taken_again_though_locking_changes_its_file(tmp_path, monkeypatch):
    """filelock truncates the file as it locks it, but for its newest versions."""
    lock, other = FolderLock(tmp_path), FolderLock(tmp_path)
    acquire = lock._file.acquire

    def truncated(**given):
        os.utime(tmp_path / ".lock", (1, 1))
        return acquire(**given)

    assert lock.take() and not other.take()
    lock.let_go()
    monkeypatch.setattr(lock._file, "acquire", truncated)
    assert lock.take() and not other.take()
    lock.let_go()
    assert other.take()
    other.let_go()


def test_a_job_runs_to_its_end_and_asking_again_does_not_train_again(places, manager):
    settings = config(*places, validation_dataset={"folder": str(places[1])}, previews={"prompts": "sks", "steps": 2})
    heard = []
    manager.subscribe(lambda status: heard.append((status["state"], threading.current_thread().name)))

    def broken(status):
        raise RuntimeError("a listener's own fault")

    manager.subscribe(broken)
    before = torch.get_rng_state()
    job = manager.ensure(settings)
    assert manager.ensure(settings) is job and manager.list() == [job]
    assert job.wait(PATIENCE)
    assert torch.equal(before, torch.get_rng_state())
    status = job.status()
    assert (status["state"], status["step"], status["steps"], status["message"]) == ("completed", 8, 8, "")
    assert status["heldout_loss"] < status["heldout_loss_base"]
    assert status["lora_name"] == "Test-Job.safetensors" and status["samples"] == [
        "step-000000-0.png",
        "step-000008-0.png",
    ]
    assert [path.name for path in job.latest_samples()] == ["step-000008-0.png"]
    assert [line["step"] for line in job.metrics() if "loss" in line] == list(range(1, 9))
    assert [line["step"] for line in job.metrics() if "heldout_loss" in line] == [0, 4, 8]
    assert job.metrics()[0]["heldout_images"] == 4, "different ones, though eight are measured"
    states = [state for state, _ in heard]
    assert [state for i, state in enumerate(states) if i == 0 or states[i - 1] != state] == [
        "queued",
        "preparing",
        "running",
        "completed",
    ]
    assert {thread for state, thread in heard if state != "queued"} == {"chromakit-training"}
    assert "a listener's own fault" in (job.folder / "log.txt").read_text()

    for mode in ("keep", "resume"):
        assert manager.ensure(settings, if_exists=mode) is job and job.state == "completed"
    with pytest.raises(JobError, match="nothing to resume"):
        manager.resume(job.id)
    for action in (manager.pause, manager.stop, manager.sample, manager.save):
        with pytest.raises(JobError, match="is completed"):
            action(job.id)

    later = JobManager(manager.root, manager.loras_folder, "cpu")
    found = later.get(job.id)
    assert json.loads(json.dumps(found.status())) == json.loads(json.dumps(status))
    assert found.wait(0) and later.ensure(settings) is found
    created = status["created"]
    again = manager.ensure(settings, if_exists="restart")
    assert again.wait(PATIENCE) and again.status()["created"] > created
    later.shutdown()


def test_an_unknown_job_is_named(manager):
    with pytest.raises(JobError, match="no training job 'nothing-12345678'"):
        manager.get("nothing-12345678")


def test_pause_freezes_sample_and_save_work_meanwhile_stop_leaves_a_lora(places, manager):
    settings = config(*places, **LONG, previews={"prompts": ["sks"], "steps": 2, "every": 0})
    waiting_settings = config(*places, name="second")
    job, waiting = manager.ensure(settings), manager.ensure(waiting_settings)
    until(lambda: job.status()["step"] >= 3)
    assert waiting.state == "queued"
    manager.pause(job.id)
    until(lambda: job.state == "paused")
    frozen = job.status()["step"]
    logged = len(job.metrics())
    stays(lambda: job.status()["step"] == frozen and len(job.metrics()) == logged, "paused")
    assert job.status()["samples"] == []
    told = []
    forget = manager.subscribe(lambda status: told.append(status["state"]))
    manager.sample(job.id)
    until(lambda: job.status()["samples"] == [f"step-{frozen:06d}-0.png"])
    manager.save(job.id)
    until(lambda: (job.folder / "checkpoints" / f"step-{frozen:06d}").is_dir())
    assert job.state == "paused" and job.status()["step"] == frozen
    forget()
    assert told and {*told} <= {"paused", "queued"}, "it may be resumed all the while"
    manager.resume(job.id)
    until(lambda: job.status()["step"] > frozen and job.state == "running")
    with pytest.raises(JobError, match="Stop it before"):
        manager.ensure(settings, if_exists="restart")
    manager.stop(job.id)
    assert job.wait(PATIENCE)
    status = job.status()
    assert status["state"] == "stopped" and frozen < status["step"] < 100_000
    assert status["checkpoint"] == status["step"]
    attach(load_transformer(settings.model, "cpu"), read_lora(status["lora_path"]))
    assert manager.ensure(settings) is job and job.state == "stopped"
    assert waiting.wait(PATIENCE) and waiting.state == "completed"
    manager.ensure(settings, if_exists="resume")
    until(lambda: job.status()["step"] > status["step"])
    manager.pause(job.id)
    until(lambda: job.state == "paused")
    manager.ensure(settings, if_exists="resume")
    until(lambda: job.state == "running")


def test_pause_and_stop_also_work_before_the_first_step(places, tmp_path):
    hold = threading.Event()
    manager = JobManager(tmp_path / "jobs", tmp_path / "loras", "cpu", busy=lambda: not hold.is_set())
    try:
        job, waiting = manager.ensure(config(*places)), manager.ensure(config(*places, name="second"))
        until(lambda: job.state == "preparing")
        assert manager.stop(waiting.id).state == "stopped" and waiting.wait(0)
        manager.pause(job.id)
        hold.set()
        until(lambda: job.state == "paused")
        assert job.status()["step"] == 0 and not list((tmp_path / "jobs" / "cache").rglob("*.safetensors"))
        manager.stop(job.id)
        assert job.wait(PATIENCE)
        status = job.status()
        assert (status["state"], status["lora_path"]) == ("stopped", None) and "there is no LoRA" in status["message"]
        manager.resume(job.id)
        assert job.wait(PATIENCE) and job.state == "completed"
    finally:
        hold.set()
        manager.shutdown()


def test_the_trainer_waits_while_the_host_is_busy_and_the_result_is_the_same(places, tmp_path):
    busy = threading.Event()
    manager = JobManager(tmp_path / "jobs", tmp_path / "loras", "cpu", busy=busy.is_set)
    settings = config(*places, steps=40)
    told = []
    manager.subscribe(lambda status: told.append(status["yielded"]))
    job = manager.ensure(settings)
    until(lambda: job.status()["step"] >= 2)
    busy.set()
    until(lambda: job.status()["yielded"])
    until(lambda: told[-1:] == [True])  # at once: no step comes that could tell it later
    step = job.status()["step"]
    stays(lambda: job.status()["step"] == step < 40 and job.state == "running", "yielded")
    busy.clear()
    assert job.wait(PATIENCE) and job.status()["yielded"] is False
    manager.shutdown()
    undisturbed = run_job(settings, tmp_path / "other", tmp_path / "other-loras", "cpu")
    ours, theirs = read_lora(job.status()["lora_path"]), read_lora(undisturbed["lora_path"])
    assert all(torch.equal(ours.modules[name].up, theirs.modules[name].up) for name in theirs.modules)


def test_shutdown_saves_and_the_next_manager_goes_on(places, tmp_path):
    settings = config(*places, steps=30, checkpoint_every=0)
    manager = JobManager(tmp_path / "jobs", tmp_path / "loras", "cpu")
    job = manager.ensure(settings)
    until(lambda: job.status()["step"] >= 3)
    manager.shutdown()
    assert job.state == "interrupted" and 3 <= job.status()["checkpoint"] < 30
    later = JobManager(tmp_path / "jobs", tmp_path / "loras", "cpu")
    assert later.get(job.id).state == "interrupted"
    assert later.ensure(settings).wait(PATIENCE)
    status = later.get(job.id).status()
    assert status["state"] == "completed"
    job = later.get(job.id)
    assert [line["step"] for line in job.metrics()] == list(range(31))
    found = job.verdict()
    assert found is not None and not found.measured and status["verdict"] == found.to_dict(job.id)
    later.shutdown()


@pytest.mark.parametrize("where", ["forward", "backward", "preview"])
def test_a_slow_step_is_given_up_at_the_next_block_when_the_process_ends(places, tmp_path, where):
    """The block at work may take as long as it likes; after it none begins, and the last whole step is saved."""
    averaged = {"optimizer": "schedule-free", "lora": {"rank": 4, "ema_decay": 0.9}}
    previews = {"prompts": "sks", "steps": 2, "every": 2}
    settings = config(*places, steps=4, checkpoint_every=0, validate_every=0, previews=previews, **averaged)
    reached, ends, begun = threading.Event(), threading.Event(), []
    manager = JobManager(tmp_path / "jobs", tmp_path / "loras", "cpu")

    def slow(*_) -> None:
        begun.append(where)
        reached.set()
        assert ends.wait(PATIENCE)

    def block_ended(module, args, output) -> None:
        preview = not torch.is_grad_enabled()
        if isinstance(module, Block) and job.status()["step"] == 2 and preview == (where == "preview"):
            if where == "backward":
                (output if isinstance(output, torch.Tensor) else output[-1]).register_hook(slow)
            else:
                slow()

    hooked = register_module_forward_hook(block_ended)
    try:
        job = manager.ensure(settings)
        control = manager._controls[job.id]
        until(reached.is_set, "the block", report=lambda: job.status()["message"])
        ending = threading.Thread(target=manager.shutdown)
        ending.start()
        until(control.halt.is_set, "the end")
        ends.set()
        ending.join()
    finally:
        hooked.remove()
    assert len(begun) == 1 and (job.state, job.status()["checkpoint"]) == ("interrupted", 2)
    done = run_job(settings, tmp_path / "jobs", tmp_path / "loras", "cpu")
    undisturbed = run_job(settings, tmp_path / "other", tmp_path / "other-loras", "cpu")
    ours, theirs = (load(Path(each["lora_path"]).read_bytes()) for each in (done, undisturbed))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_job_of_a_dead_process_is_interrupted_that_of_a_living_one_is_left_alone(places, tmp_path):
    settings = config(*places)
    folder = tmp_path / "jobs" / settings.job_id()
    folder.mkdir(parents=True)
    Job(folder, settings, {"state": "running", "step": 5}).write()
    with another_has(folder):
        watching = JobManager(tmp_path / "jobs", tmp_path / "loras", "cpu")
        assert watching.get(settings.job_id()).state == "running"
        with pytest.raises(JobError, match="another process"):
            watching.ensure(settings)
    (tmp_path / "jobs" / "foreign").mkdir()
    (tmp_path / "jobs" / "foreign" / "job.json").write_text("{}")
    later = JobManager(tmp_path / "jobs", tmp_path / "loras", "cpu")
    found = later.get(settings.job_id())
    assert (found.state, found.status()["step"]) == ("interrupted", 5) and len(later.list()) == 1
    assert json.loads((folder / "job.json").read_text())["state"] == "interrupted"
    watching.shutdown()
    later.shutdown()


def test_failures_are_one_paragraph_and_can_be_mended(places, tmp_path, manager):
    settings = config(places[0], tmp_path / "pictures")
    job = manager.ensure(settings)
    assert job.wait(PATIENCE)
    assert job.state == "failed" and "does not exist" in job.status()["message"]
    assert "DataError" in (job.folder / "log.txt").read_text()
    write_dataset(tmp_path / "pictures", 3)
    (tmp_path / "pictures" / "01.png").write_bytes(b"broken")
    assert manager.ensure(settings) is job and job.wait(PATIENCE)
    status = job.status()
    assert status["state"] == "completed" and "1 image was skipped: 01.png" in status["warnings"][0]


def test_an_unexpected_error_names_its_type_and_keeps_the_worker_alive(places, tmp_path):
    def broken():
        raise ZeroDivisionError("seven by zero")

    manager = JobManager(tmp_path / "jobs", tmp_path / "loras", "cpu", busy=broken)
    for name in ("one", "two"):
        job = manager.ensure(config(*places, name=name))
        assert job.wait(PATIENCE)
        assert job.status()["message"].startswith("ZeroDivisionError: seven by zero")
        assert "Traceback" in (job.folder / "log.txt").read_text()
    manager.shutdown()


def test_divergence_stops_with_the_last_good_lora(places, manager):
    settings = config(*places, steps=60, learning_rate=1e35, max_grad_norm=0, weight_decay=0, checkpoint_every=1)
    job = manager.ensure(settings)
    assert job.wait(PATIENCE)
    status = job.status()
    assert status["state"] == "failed" and "10 steps in a row" in status["message"], status["message"]
    assert "learning rate" in status["message"] and status["skipped_steps"] == faults.MAX_SKIPPED_IN_A_ROW
    lora = read_lora(status["lora_path"])
    assert all(module.up.isfinite().all() and module.down.isfinite().all() for module in lora.modules.values())


@pytest.mark.parametrize("steps", [4, 30])
def test_a_model_that_gives_no_numbers_fails_in_words_and_without_a_lora(places, tmp_path, manager, steps):
    """It is not the learning rate, which has moved nothing yet; and a job without a step taken is not completed."""
    folder = tmp_path / "broken"
    shutil.copytree(places[0], folder)
    (weights,) = (folder / "transformer").glob("*.safetensors")
    tensors = load(weights.read_bytes())
    tensors["proj_out.weight"][0, 0] = float("nan")
    save_file(tensors, weights, {"format": "pt"})
    previews = {"prompts": "a star", "every": 100, "steps": 1}
    job = manager.ensure(config(folder, places[1], steps=steps, checkpoint_every=1, previews=previews))
    assert job.wait(PATIENCE)
    status = job.status()
    assert status["state"] == "failed" and "the model itself" in status["message"], status["message"]
    assert status["lora_path"] is None and not list((tmp_path / "loras").glob("*"))
    assert status["skipped_steps"] == min(steps, faults.MAX_SKIPPED_IN_A_ROW)
    said = " ".join(status["warnings"])
    assert "Step 1 was skipped" in said and "There are no previews of step 0" in said


def test_the_command_line_trains_and_resumes_without_a_host(places, tmp_path, root, capsys):
    settings = config(*places, steps=4)
    lines = [f"{key} = {json.dumps(value)}" for key, value in (("name", "cli"), ("steps", 4))]
    lines += ["[model]", 'flavour = "tiny"', f"folder = {json.dumps(str(places[0]))}", 'precision = "fp32"']
    lines += ["[dataset]", f"folder = {json.dumps(str(places[1]))}", "[lora]", "rank = 4"]
    (tmp_path / "job.toml").write_text("\n".join(lines))
    assert settings.steps == 4
    command = ["train", str(tmp_path / "job.toml"), "--output", str(tmp_path / "out"), "--device", "cpu"]
    own = [sys.executable, "-W", "ignore", "-m", "chroma_core", *command]
    done = subprocess.run(own, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert main(command) == 0
    for said in (done.stdout, capsys.readouterr().out):
        assert json.loads(said.strip().splitlines()[-1])["state"] == "completed"
    assert [path.name for path in (tmp_path / "out" / "loras").iterdir()] == ["cli.safetensors"]


@pytest.mark.parametrize("offload", ["model", "block"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_where_the_weights_rest_changes_neither_loras_nor_previews(places, tmp_path, offload, checkpointing):
    """And a prompt that comes in between, for which the model leaves the device, does not either."""
    written = {}
    for where in ("none", offload):
        settings = config(
            *places,
            model={**config(*places).model.to_dict(), "offload": where},
            gradient_checkpointing=checkpointing,
            previews={"prompts": "sks", "steps": 2, "every": 4},
        )
        calls = iter(range(10**9))
        busy = (lambda: False) if where == "none" else (lambda calls=calls: next(calls) % 7 < 3)
        manager = JobManager(tmp_path / where, tmp_path / f"{where}-loras", "cpu", busy=busy)
        job = manager.ensure(settings)
        assert job.wait(PATIENCE) and job.state == "completed", job.status()["message"]
        manager.shutdown()
        lora = (tmp_path / f"{where}-loras" / "Test-Job.safetensors").read_bytes()
        written[where] = [load(lora), *(Image.open(path).tobytes() for path in job.samples())]
    plain, moved = written["none"], written[offload]
    assert plain[0].keys() == moved[0].keys() and all(torch.equal(plain[0][k], moved[0][k]) for k in plain[0])
    assert plain[1:] == moved[1:] and len(plain) == 4


def test_the_log_says_what_happened(places, manager):
    job = manager.ensure(config(*places, previews={"prompts": "sks", "steps": 2, "every": 4}))
    assert job.wait(PATIENCE)
    lines = [line.split(" ", 2)[2] for line in job.log_lines()]
    assert lines[0] == "preparing at step 0" and lines[-1] == "completed at step 8"
    assert [line for line in lines if "checkpoint" in line] == [f"checkpoint of step {step}" for step in (0, 4, 8)]
    assert [line for line in lines if "previews" in line] == [f"1 previews of step {step}" for step in (0, 4, 8)]
    assert job.log_lines(2) == job.log_lines()[-2:]
    assert job.status()["memory"]["process"] > 2**20
    assert not set(job.summary()) & {"config", "recipe", "samples", "memory"} and job.summary()["kind"] == "lora"


def test_a_deleted_job_is_gone_and_its_lora_stays(places, manager):
    settings = config(*places)
    job = manager.ensure(settings)
    assert job.wait(PATIENCE)
    lora = job.status()["lora_path"]
    manager.delete(job.id)
    assert manager.list() == [] and [path.name for path in manager.root.iterdir()] == ["cache"]
    assert read_lora(lora).modules
    with pytest.raises(JobError, match="There is no training job"):
        manager.delete(job.id)
    again = manager.ensure(settings)
    assert again is not job and again.wait(PATIENCE) and again.state == "completed"


def test_a_job_that_has_just_ended_is_deleted_when_its_folder_is_let_go(places, manager, monkeypatch):
    """Its end is known before it is written down, which would make the folder anew."""
    job = manager.ensure(config(*places))
    assert job.wait(PATIENCE)
    monkeypatch.setattr("chroma_core.training.jobs.manager.LOCK_SECONDS", PATIENCE)
    deleting = threading.Thread(target=manager.delete, args=[job.id])
    with another_has(job.folder):
        deleting.start()
        stays(lambda: job.folder.is_dir() and deleting.is_alive(), "the folder while somebody writes to it")
        job.write()
    deleting.join(PATIENCE)
    assert manager.list() == [] and not job.folder.exists()


def test_a_job_that_another_process_trains_is_neither_deleted_nor_restarted(places, manager):
    settings = config(*places)
    job = manager.ensure(settings)
    assert job.wait(PATIENCE)
    with another_has(job.folder):
        for action in (lambda: manager.delete(job.id), lambda: manager.ensure(settings, "restart")):
            with pytest.raises(JobError, match="trained by another process"):
                action()
        assert manager.list() == [job] and (job.folder / "checkpoints").is_dir()


def test_a_job_at_work_is_not_deleted_and_half_a_deletion_is_finished(places, manager, tmp_path):
    job = manager.ensure(config(*places, **LONG))
    until(lambda: job.state == "running")
    with pytest.raises(JobError, match="Stop it before you delete it"):
        manager.delete(job.id)
    manager.stop(job.id)
    assert job.wait(PATIENCE) and (job.folder / "job.json").is_file()
    left = manager.root / ".deleted-job-1"
    left.mkdir()
    (left / "job.json").write_text((job.folder / "job.json").read_text())
    other = JobManager(manager.root, tmp_path / "loras", "cpu")
    assert [found.id for found in other.list()] == [job.id] and not left.exists()
    other.shutdown()


ENDING = """
import threading
from concurrent.futures import ThreadPoolExecutor
from chroma_core.training.jobs.manager import at_the_end

class Job:
    def end(self):
        with ThreadPoolExecutor(1) as pool:
            print(pool.submit(int, "7").result())

job, gone = Job(), Job()
at_the_end(job.end)
at_the_end(gone.end)
del gone
threading._shutdown()  # as Python does once the main thread has ended
"""


def test_what_is_halted_when_the_process_ends_still_has_its_thread_pools():
    done = forked.run(forked.FULL, "-c", ENDING)
    assert (done.returncode, done.stdout, done.stderr) == (0, "7\n", "")
