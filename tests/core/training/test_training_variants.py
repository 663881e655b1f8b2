"""Every kind of training as a whole job: it ends, it can be cut in two at any step, and its files open again."""

import itertools

import pytest
import torch
from safetensors.torch import load_file

from chroma_core.loading.load import load_transformer
from chroma_core.lora.adapters import attach
from chroma_core.lora.files import read_lora, write_lora
from chroma_core.training.jobs.manager import JobManager
from lora_cases import inputs, predict, random_lora
from training_cases import config, model_folder, write_dataset
from waiting import PATIENCE

VARIANTS = {
    "rslora": {"lora": {"rank": 4, "kind": "rslora"}},
    "dora": {"lora": {"rank": 4, "kind": "dora"}},
    "lokr": {"lora": {"rank": 4, "kind": "lokr"}},
    "patterns": {"lora": {"rank": 4, "rank_pattern": {"transformer_blocks.0.*": 2}, "dropout": 0.2}},
    "average": {"lora": {"rank": 4, "ema_decay": 0.9}},
    "adamw8bit": {"optimizer": "adamw8bit"},
    "adafactor": {"optimizer": "adafactor"},
    "prodigy": {"optimizer": "prodigy", "learning_rate": 1.0},
    "schedule-free": {"optimizer": "schedule-free", "lora": {"rank": 4, "ema_decay": 0.9}},
    "came": {"optimizer": "came", "warmup_steps": 2},
    "restarts": {"lr_schedule": "restarts", "lr_cycles": 2},
    "objective": {
        "objective": {"loss": "huber", "noise_offset": 0.05, "pair_noise": True, "guidance": "random-range",
                      "guidance_range": (1.0, 4.0)},
        "batch_size": 2,
    },
    "zero": {"objective": {"text_padding": "zero"}},
    "unmodified": {"objective": {"text_padding": "unmodified"}},
    "interval": {"gradient_checkpointing": True, "checkpointing_interval": 3},
    "fp16": {"precision": "fp16"},
}  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("variants")
    return model_folder(folder / "model"), write_dataset(folder / "data", 4), write_dataset(folder / "more", 3, seed=1)


def settings(places, variant: dict):
    changes = dict(variant)
    if "precision" in changes:
        changes["model"] = {**config(*places[:2]).model.to_dict(), "precision": changes.pop("precision")}
    held_out = {"folder": str(places[1])}
    return config(
        *places[:2], **{"validation_dataset": held_out, "previews": {"prompts": "sks", "steps": 2}, **changes}
    )


def train(where, job_config, cuts=()):
    """The finished files of a job that was shut down after each step in `cuts` and taken up again."""
    for cut in (*cuts, None):
        calls = itertools.count()
        manager = JobManager(where / "jobs", where / "loras", "cpu", busy=lambda calls=calls: bool(next(calls) < 0))
        job = manager.ensure(job_config)
        while cut is not None and job.status()["step"] < cut and not job.wait(0.01):
            pass
        if cut is None:
            assert job.wait(PATIENCE) and job.state == "completed", job.status()["message"]
        manager.shutdown()
    return {path.name: load_file(path) for path in sorted((where / "loras").iterdir())}, job


@pytest.mark.parametrize("name", VARIANTS)
def test_a_job_that_was_cut_in_two_gives_the_same_files(places, tmp_path, name):
    job_config = settings(places, VARIANTS[name])
    whole, job = train(tmp_path / "whole", job_config)
    parts, _ = train(tmp_path / "parts", job_config, cuts=(3,))
    assert whole.keys() == parts.keys() and len(whole) == (2 if job_config.lora.ema_decay else 1)
    for file in whole:
        assert whole[file].keys() == parts[file].keys()
        assert all(torch.equal(whole[file][key], parts[file][key]) for key in whole[file]), file
    assert len(job.samples()) == 2
    model = load_transformer(job_config.model, "cpu")
    call, dtype = inputs(model), model.x_embedder.weight.dtype
    before = predict(model, call, dtype)
    for file in whole:
        attach(model, read_lora(tmp_path / "whole" / "loras" / file), name=file)
    after = predict(model, call, dtype)
    assert torch.isfinite(after).all() and not torch.equal(before, after)


def test_averaged_weights_are_others_than_the_last(places, tmp_path):
    files, _ = train(tmp_path, settings(places, VARIANTS["average"]))
    raw, average = files["Test-Job.safetensors"], files["Test-Job-ema.safetensors"]
    assert any(not torch.equal(raw[key], average[key]) for key in raw)


def test_several_sets_are_mixed_and_regularisation_is_one_of_them(places, tmp_path):
    more = {"folder": str(places[2]), "caption_dropout": 0.0, "weight": 2.0}
    plain, _ = train(tmp_path / "one", settings(places, {}))
    two, _ = train(tmp_path / "two", settings(places, {"more_datasets": [more]}))
    kept, _ = train(tmp_path / "kept", settings(places, {"more_datasets": [{**more, "regularisation": True}]}))
    files = [found["Test-Job.safetensors"] for found in (plain, two, kept)]
    for a, b in itertools.combinations(files, 2):
        assert any(not torch.equal(a[key], b[key]) for key in a)


def test_a_job_goes_on_from_a_lora(places, tmp_path):
    model = load_transformer(config(*places[:2]).model, "cpu")
    path = tmp_path / "start.safetensors"
    write_lora(path, random_lora(model, target="all", rank=4, alpha=4.0, size=0.1))
    fresh, _ = train(tmp_path / "fresh", settings(places, {"learning_rate": 1e-9}))
    lora = {"rank": 4, "start_from": str(path)}
    begun, _ = train(tmp_path / "begun", settings(places, {"learning_rate": 1e-9, "lora": lora}))
    start, end = load_file(path), begun["Test-Job.safetensors"]
    assert all(torch.allclose(start[key], end[key], atol=1e-6) for key in start if "lora_" in key)
    assert any(not torch.equal(fresh["Test-Job.safetensors"][key], end[key]) for key in end)
