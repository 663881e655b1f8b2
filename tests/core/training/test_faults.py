"""What goes wrong in training is noticed, said in words, and loses nothing."""

import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch

import chroma_core
from chroma_core.fullrank.layers import count_trained
from chroma_core.loading.load import transformer_outline
from chroma_core.memory import Settings, estimate, in_gib
from chroma_core.model.device import is_out_of_memory
from chroma_core.training.config import TrainingConfig
from chroma_core.training.jobs.blocking import run_job
from chroma_core.training.jobs.job import Job
from chroma_core.training.jobs.manager import JobManager
from chroma_core.training.run.checkpoint import checkpoints, restore_latest, save_checkpoint
from chroma_core.training.run.faults import (
    DISK_MARGIN,
    MEMORY_TRIES,
    Pace,
    disk_shortage,
    out_of_memory,
    plan_settings,
    watch_loss,
)
from chroma_core.training.run.metrics import Progress
from training_cases import Bench, config, model_folder, write_dataset
from waiting import PATIENCE, until

EXAMPLE = Path(chroma_core.__file__).parents[1] / "example_datasets" / "sks_emblem"


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    return model_folder(folder / "model"), write_dataset(folder / "data", 4)


def test_divergence_is_a_loss_far_above_its_own_band(places):
    settings, progress = config(*places), Progress()
    generator = torch.Generator().manual_seed(0)

    def steps(count: int, level: float) -> list[str]:
        found = []
        for _ in range(count):
            progress.step += 1
            loss = level * float(torch.rand((), generator=generator) * 1.5 + 0.25)
            smooth = progress.loss_smooth
            progress.loss_smooth = loss if smooth is None else 0.98 * smooth + 0.02 * loss
            warning = watch_loss(progress, loss, settings)
            found += [warning] if warning else []
        return found

    assert steps(400, 0.5) == [], "losses scatter by a factor of seven; their means do not"
    (warning,) = steps(60, 4.0)
    assert "learning rate (1e-4 is cautious)" in warning and "checkpointing" in warning and "captions" in warning
    assert steps(400, 0.5) == []
    assert len(steps(60, 6.0)) == 1, "it is said again when it happens again"


def test_an_explosion_is_seen_at_once(places):
    """At a learning rate of 1 the loss goes from .6 to millions within five steps; the band knows what was before."""
    settings, progress = config(*places), Progress()

    def take(loss: float) -> str | None:
        progress.step += 1
        progress.smooth(loss)
        return watch_loss(progress, loss, settings)

    said = [take(loss) for loss in (0.6, 0.5, 40.0, 9e3, 2e6, *[2e6] * 300)]
    assert [step for step, warning in enumerate(said, 1) if warning] == [3]
    assert "as low as 0.58" in str(said[2]) and progress.diverged_at == 3 and progress.loss_lowest < 0.6
    progress = Progress()
    said = [take(0.6 * 1.3**step) for step in range(40)]  # slowly, but out of every bound
    assert sum(map(bool, said)) == 1
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):  # starts of sound jobs: single losses from a seventh to the whole
        progress = Progress()
        assert not any(take(0.25 + 1.5 * float(torch.rand((), generator=generator))) for _ in range(150))
    progress = Progress()  # a first loss near the end of the noise scale
    assert not any(take(loss) for loss in (0.02, 0.9, 1.4, 0.8, 1.2))


def test_a_result_worse_than_the_base_is_not_just_completed(places, tmp_path):
    held = {"validation_dataset": {"folder": str(places[1])}, "validate_every": 4, "checkpoint_every": 4}
    manager = JobManager(tmp_path / "jobs", tmp_path / "loras", "cpu")
    held |= {"model": {"flavour": "tiny"}, "dataset": {"folder": str(EXAMPLE), "trigger": "sks"}}
    held["validation_dataset"] = {"folder": f"{EXAMPLE}_heldout"}
    job = manager.ensure(config(*places, **held, learning_rate=1.0, name="wild"))
    assert job.wait(PATIENCE) and job.state == "completed"
    status = job.status()
    assert status["heldout_loss"] > 1.1 * status["heldout_loss_base"]
    assert "LoRA written, but worse than the base: the held-out loss is" in status["message"]
    assert any("worse than the base" in warning for warning in status["warnings"])
    assert any("worse than the base" in str(line.get("warning")) for line in job.metrics())
    job = manager.ensure(config(*places, **held, learning_rate=1e-4, name="calm"))
    assert job.wait(PATIENCE) and job.state == "completed" and not job.status()["message"]
    assert not any("worse" in warning for warning in job.status()["warnings"])
    manager.shutdown()


def test_memory_that_does_not_suffice_names_the_prediction_and_the_knobs(places):
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"))
    assert not is_out_of_memory(RuntimeError("shapes do not match")) and not is_out_of_memory(ValueError("x"))
    message = str(out_of_memory(RuntimeError("out of memory: 9 GiB"), config(*places), torch.device("cpu")))
    for part in ("9 GiB", "Predicted were", "CPU", "precision", "batch size", "checkpoint is kept"):
        assert part in message


def test_the_prediction_for_full_rank_is_the_plans(places):
    full = {"target": "single_blocks.*", "ema_decay": 0.9}
    settings = config(*places, lora={}, full=full, optimizer="adafactor", learning_rate=1e-5)
    count = count_trained(transformer_outline(settings.model), full["target"])
    assert count > 0
    expected = Settings(
        "tiny", "fp32", text_precision="fp32", size=settings.resolution, gradient_checkpointing=False,
        optimizer="adafactor", ema=True, trained_parameters=count,
    )  # fmt: skip
    assert plan_settings(settings) == expected
    predicted = estimate(expected)
    message = str(out_of_memory(RuntimeError("out of memory"), settings, torch.device("cpu")))
    assert f"Predicted were {in_gib(predicted.training_peak_bytes)} at" in message


def test_memory_that_runs_out_while_a_checkpoint_is_read_removes_none(places, tmp_path, monkeypatch):
    bench = Bench(config(*places), tmp_path / "cache")
    folder = tmp_path / "checkpoints"
    for step in (1, 2):
        save_checkpoint(folder, Progress(step=step), bench.trained, bench.stepper, None, keep=2)

    def greedy(state):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    with monkeypatch.context() as patched, pytest.raises(torch.OutOfMemoryError):
        patched.setattr(bench.stepper, "load_state_dict", greedy)
        restore_latest(folder, bench.trained, bench.stepper)
    assert len(checkpoints(folder)) == 2
    progress, damaged = restore_latest(folder, bench.trained, bench.stepper)
    assert progress is not None and progress.step == 2 and not damaged


def test_a_job_that_runs_out_of_memory_says_so_and_goes_on_later(places, tmp_path):
    """The worker asks whether ComfyUI is busy between its steps; there the memory runs out, again and again."""
    manager = JobManager(tmp_path / "jobs", tmp_path / "loras", "cpu", busy=lambda: greedy())
    hungry = [True] * MEMORY_TRIES

    def greedy() -> bool:
        jobs = manager.list()
        if hungry and jobs and jobs[0].state == "running" and jobs[0].status()["step"] == 5:
            hungry.pop()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return False

    job = manager.ensure(config(*places))
    until(lambda: job.state == "paused")
    message, checkpoint = job.status()["message"], job.status()["checkpoint"]
    assert "20.00 GiB" in message and "What should fit here" in message and checkpoint == job.status()["step"] == 5
    manager.resume(job.id)
    assert job.wait(PATIENCE) and job.state == "completed" and not job.status()["message"]
    manager.shutdown()


def test_an_almost_full_disk_pauses_the_job_until_there_is_room(places, tmp_path, monkeypatch):
    Usage, full = namedtuple("Usage", "total used free"), [False]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1 << 40, 0, 0 if full[0] else 1 << 39))
    assert disk_shortage(tmp_path, 1 << 30) is None
    full[0] = True
    assert "almost full: 0 MB are free" in str(disk_shortage(tmp_path, 1 << 30))
    manager = JobManager(tmp_path / "jobs", tmp_path / "loras", "cpu")
    job = manager.ensure(config(*places))
    until(lambda: job.state == "paused")
    assert "disk is almost full" in job.status()["message"] and job.status()["step"] == 0
    manager.resume(job.id)
    until(lambda: job.state == "paused")
    full[0] = False
    manager.resume(job.id)
    assert job.wait(PATIENCE) and job.state == "completed" and job.status()["message"] == ""
    manager.shutdown()
    assert DISK_MARGIN > 0


def test_the_best_checkpoint_stays_beside_the_last(places, tmp_path):
    """The held-out loss falls, then rises: the checkpoint of its lowest point is kept, whatever the retention."""
    bench = Bench(config(*places), tmp_path / "cache")
    progress, folder = Progress(), tmp_path / "checkpoints"
    for step, best in ((2, 2), (4, 2), (6, 2)):
        progress.step, progress.best_at = step, best
        save_checkpoint(folder, progress, bench.trained, bench.stepper, None, keep=1, keep_best=True)
    assert [path.name for path in checkpoints(folder)] == ["step-000002", "step-000006"]
    progress.step = progress.best_at = 8
    save_checkpoint(folder, progress, bench.trained, bench.stepper, None, keep=1, keep_best=True)
    assert [path.name for path in checkpoints(folder)] == ["step-000008"]


def test_an_old_checkpoint_that_a_killed_process_left_is_removed(places, tmp_path):
    """Killed between the newest checkpoint and the end of the oldest, with no other checkpoint to come."""
    settings = config(*places, steps=2, checkpoint_every=2, keep_checkpoints=1)
    folder = tmp_path / "jobs" / settings.job_id()
    run_job(settings, tmp_path / "jobs", tmp_path / "loras", "cpu")
    shutil.copytree(folder / "checkpoints" / "step-000002", folder / "checkpoints" / "step-000001")
    Job.read(folder).update(state="interrupted")
    assert run_job(settings, tmp_path / "jobs", tmp_path / "loras", "cpu")["state"] == "completed"
    assert [path.name for path in checkpoints(folder / "checkpoints")] == ["step-000002"]


def test_a_step_that_measures_best_is_saved(places, tmp_path):
    settings = config(
        *places, validation_dataset={"folder": str(places[1])}, validate_every=2, checkpoint_every=0, keep_checkpoints=1
    )
    manager = JobManager(tmp_path / "jobs", tmp_path / "loras", "cpu")
    job = manager.ensure(settings)
    assert job.wait(PATIENCE) and job.state == "completed", job.status()["message"]
    manager.shutdown()
    losses = {line["step"]: line["heldout_loss"] for line in job.metrics() if "heldout_loss" in line}
    best = min(losses, key=losses.__getitem__)
    assert sorted({best, 8}) == [int(path.name[5:]) for path in checkpoints(job.folder / "checkpoints")]


def test_previews_have_settings_of_their_own(places):
    read = TrainingConfig.parse(
        {
            **config(*places).model_dump(mode="json"),
            "dataset": {"folder": str(places[1]), "trigger": "sks"},
            "previews": {
                "prompts": ["a [trigger]", {"prompt": "b", "width": 96, "seed": 7, "guidance": 1.0, "steps": 3}],
                "negative": "blurry",
                "seed": 40,
            },
        }
    )
    first, second = read.preview_list()
    assert (first.prompt, first.negative, first.width, first.settings.seed, first.settings.steps) == (
        "a sks", "blurry", 64, 40, 20,
    )  # fmt: skip
    assert (second.width, second.height, second.settings.seed, second.settings.guidance) == (96, 64, 7, 1.0)
    assert TrainingConfig.parse(read.model_dump(mode="json")) == read


def test_steps_that_become_several_times_slower_are_warned_of_once():
    pace = Pace()

    def said(*seconds: float) -> list[str]:
        return [text for text in (pace.watch(step, value) for step, value in enumerate(seconds)) if text]

    assert not said(9.0, *[0.5] * 40), "the first step compiles and warms up"
    assert not said(*[0.5, 1.9] * 20), "a mixture of sizes"
    (warning,) = said(*[0.5] * 16, *[3.0] * 40)
    assert "3.5 times slower: 1.75 s" in warning or "6.0 times slower: 3.00 s" in warning, warning
    assert "0.50 s before" in warning and "offload 'block'" in warning
    assert not said(*[0.5] * 20)
    assert len(said(*[2.5] * 20)) == 1
