"""Going on with a job under other options: extended, changed freely, changed by force, refused."""

import json

import pytest
import torch
from safetensors import safe_open

from chroma_core.cli.main import main
from chroma_core.errors import ConfigError, JobError
from chroma_core.lora.files import read_lora
from chroma_core.training.config import TrainingConfig
from chroma_core.training.config.changes import differences, with_changes
from chroma_core.training.jobs.blocking import continue_job, run_job
from chroma_core.training.jobs.manager import JobManager
from chroma_core.training.run.checkpoint import checkpoints
from chroma_core.training.run.stepper import Stepper
from chroma_core.training.run.trained import JOB_KEY
from chroma_core.training.step.optimizers import OptimizerSettings
from training_cases import config, model_folder, write_dataset
from waiting import PATIENCE


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("changes")
    return model_folder(folder / "model"), write_dataset(folder / "data", 4)


@pytest.fixture
def manager(tmp_path):
    made = JobManager(tmp_path / "jobs", tmp_path / "loras", "cpu")
    yield made
    made.shutdown()


def weights(path):
    return {
        (name, key): tensor
        for name, module in read_lora(path).modules.items()
        for key, tensor in vars(module).items()
        if isinstance(tensor, torch.Tensor)
    }


def test_a_completed_job_that_is_extended_ends_where_a_longer_one_does(places, tmp_path, manager):
    longer = run_job(config(*places, steps=7), tmp_path / "other" / "jobs", tmp_path / "other" / "loras", "cpu")
    short = config(*places, steps=4, checkpoint_every=3)
    job = manager.ensure(short)
    assert job.wait(PATIENCE) and job.state == "completed"
    name = job.id
    assert manager.extend(name, 3) is job and job.wait(PATIENCE)
    status = job.status()
    assert (status["state"], status["id"], status["step"], status["steps"]) == ("completed", name, 7, 7)
    assert [line["step"] for line in job.metrics() if "loss" in line] == list(range(1, 8))
    assert status["warnings"] == longer["warnings"] and status["changes"][0]["changes"] == {"steps": [4, 7]}
    ours, theirs = weights(status["lora_path"]), weights(longer["lora_path"])
    assert ours and ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    with safe_open(status["lora_path"], framework="pt") as file:
        assert file.metadata()[JOB_KEY] == name
    # Asked for by its first options or by its present ones, it is this job; also in a new process.
    later = JobManager(manager.root, manager.loras_folder, "cpu")
    for found in (manager, later):
        for settings in (short, with_changes(short, {"steps": 7})):
            assert found.ensure(settings, "resume").id == name and len(found.list()) == 1
    later.shutdown()


def test_what_moves_the_weights_needs_force_and_is_recorded(places, tmp_path, manager):
    job = manager.ensure(config(*places, steps=4))
    assert job.wait(PATIENCE)
    with pytest.raises(JobError, match=r"learning_rate 0.01 → 0.001.*[Ff]orce"):
        manager.change(job.id, {"learning_rate": 1e-3, "steps": 6})
    assert job.config.steps == 4 and job.status()["changes"] == []
    with pytest.raises(JobError, match=r"lora.rank 4 → 8; optimizer .*start_from"):
        manager.change(job.id, {"lora": {"rank": 8}, "optimizer": "adafactor"}, force=True)
    with pytest.raises(JobError, match="4 steps are made already"):
        manager.change(job.id, {"steps": 3}, force=True)
    for wrong in ({"learning_rat": 1}, {"lora.ranks": 1}, {"steps.more": 1}, {"batch_size": 0}):
        with pytest.raises(ConfigError):
            manager.change(job.id, wrong)
    manager.change(job.id, {"learning_rate": 1e-3, "steps": 6, "previews.every": 7}, force=True)
    assert job.wait(PATIENCE) and job.state == "completed"
    rates = [line["lr"] for line in job.metrics() if "loss" in line]
    assert rates == [1e-2] * 4 + [1e-3] * 2
    (warning,) = [text for text in job.status()["warnings"] if "by force" in text]
    assert warning == "From step 4 on, by force: learning_rate 0.01 → 0.001."
    (line,) = [line for line in job.metrics() if "changes" in line]
    assert line["step"] == 4 and line["changes"]["learning_rate"] == [0.01, 0.001] and line["warning"] == warning
    with safe_open(job.status()["lora_path"], framework="pt") as file:
        assert json.loads(file.metadata()["chromakit.changes"]) == [line]
    # A free change of a completed job is taken and trains nothing.
    updated = job.status()["train_seconds"]
    assert manager.change(job.id, {"previews": {"every": 9}}).state == "completed"
    assert job.config.previews.every == 9 and job.status()["train_seconds"] == updated


def test_a_schedule_that_depends_on_the_steps_says_so_and_a_job_at_work_is_not_changed(places, manager):
    job = manager.ensure(config(*places, steps=2, lr_schedule="cosine"))
    assert job.wait(PATIENCE)
    with pytest.raises(JobError, match="steps 2 → 4 .the cosine schedule depends on it"):
        manager.extend(job.id, 2)
    with pytest.raises(ConfigError, match="whole number"):
        manager.extend(job.id, 0)
    running = manager.ensure(config(*places, steps=100_000))
    with pytest.raises(JobError, match="Stop it before"):
        manager.change(running.id, {"previews.every": 9})
    manager.stop(running.id)


def test_a_changed_job_is_not_changed_back_by_asking_for_it_again(places, tmp_path):
    settings = config(*places, steps=2)
    first = run_job(settings, tmp_path / "jobs", tmp_path / "loras", "cpu")
    done = continue_job(first["id"], tmp_path / "jobs", tmp_path / "loras", "cpu", extend=2)
    assert done["step"] == 4 and done["id"] == first["id"]
    again = run_job(settings, tmp_path / "jobs", tmp_path / "loras", "cpu")
    assert again["id"] == first["id"] and again["step"] == 4 and again["train_seconds"] == done["train_seconds"]


def test_command_line(places, tmp_path, capsys):
    file = tmp_path / "job.toml"
    lines = (
        'name = "By hand"\nsteps = {steps}\nlearning_rate = {rate}\ngradient_checkpointing = false\n'
        '[model]\nflavour = "tiny"\nfolder = "{model}"\nprecision = "fp32"\ntext_precision = "fp32"\n'
        '[lora]\nrank = 4\n[dataset]\nfolder = "{data}"\n'
    )

    def write(steps, rate):
        file.write_text(lines.format(steps=steps, rate=rate, model=places[0].as_posix(), data=places[1].as_posix()))

    where = ["--output", str(tmp_path / "out"), "--device", "cpu"]
    write(1, 0.01)
    assert main(["train", str(file), *where]) == 0
    name = json.loads(capsys.readouterr().out)["id"]
    assert main(["resume", name, "--extend", "1", *where]) == 0
    assert json.loads(capsys.readouterr().out) | {"id": name, "step": 2, "state": "completed"}
    write(3, 0.001)
    assert main(["train", str(file), "--job", name, *where]) == 1
    assert "learning_rate 0.01 → 0.001" in capsys.readouterr().err
    assert main(["train", str(file), "--job", name, "--force", *where]) == 0
    done = json.loads(capsys.readouterr().out)
    assert (done["id"], done["step"]) == (name, 3)
    for wrong in (["train"], ["train", str(file), "--resume", name], ["train", str(file), "--force"]):
        assert main([*wrong, *where]) == 1


def test_every_option_has_a_class(places):
    """Free, exact or fixed is decided for the options by name; a section must not lose its guard."""
    old = config(*places)
    expected = {"seed": "exact", "batch_size": "exact", "dataset.caption_dropout": "exact", "keep_best": "free"}
    expected |= {"model.offload": "free", "model.precision": "exact", "lora.kind": "fixed", "previews.prompts": "free"}
    expected |= {"tensorboard": "free", "lora.ema_decay": "fixed", "lora.save_dtype": "free"}
    new = with_changes(
        old,
        {"seed": 1, "batch_size": 2, "dataset.caption_dropout": 0.5, "keep_best": False, "model.offload": "model",
         "model.precision": "bf16", "lora": {"kind": "rslora", "ema_decay": 0.9, "save_dtype": "bf16"},
         "previews": {"prompts": ["a"]}, "tensorboard": True},
    )  # fmt: skip
    assert {change.field: change.kind for change in differences(old, new)} == expected
    assert with_changes(old, {"tensorboard": True}).job_id() == old.job_id()
    assert "lora" in TrainingConfig.model_fields


@pytest.mark.parametrize("name", ["adamw", "schedule-free", "prodigy"])
def test_forced_betas_and_weight_decay_are_those_of_the_steps_that_follow(name):
    def stepper(**options):
        torch.manual_seed(0)
        rate = 1.0 if name == "prodigy" else 1e-2
        parameters = [torch.nn.Parameter(torch.randn(4, 4)), torch.nn.Parameter(torch.randn(4))]
        return Stepper(parameters, OptimizerSettings(name, rate, **options))

    old = stepper()
    (old.parameters[0].sum() + old.parameters[1].sum()).backward()
    old.apply(1e-2, 1.0)
    new = stepper(betas=(0.8, 0.95), weight_decay=0.25)
    new.load_state_dict(old.state_dict())
    assert [tuple(group["betas"]) for group in new.optimizer.param_groups] == [(0.8, 0.95)] * 2
    assert [group["weight_decay"] for group in new.optimizer.param_groups] == [0.25, 0.0]


def test_an_average_with_another_decay_is_another_job(places, manager):
    job = manager.ensure(config(*places, steps=1, lora={"rank": 4, "ema_decay": 0.9}))
    assert job.wait(PATIENCE)
    with pytest.raises(JobError, match=r"ema_decay 0.9 → 0.5.*checkpoints do not fit"):
        manager.change(job.id, {"lora.ema_decay": 0.5}, force=True)


def test_checkpoints_are_in_the_order_of_their_steps_past_a_million(tmp_path):
    for step in (999_999, 1_000_000, 5):
        (tmp_path / f"step-{step:06d}").mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000005", "step-999999", "step-1000000"]
