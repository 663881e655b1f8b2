"""Learning-rate schedules, the old ones to the last bit and the new ones in numbers; and factors on the rate by block:
against training at other rates, layer by layer, and what is refused."""

import math

import pytest
import torch

from chroma_core.errors import ConfigError, JobError
from chroma_core.training.config import TrainingConfig
from chroma_core.training.config.changes import check_changes, differences
from chroma_core.training.run.metrics import JobPaths
from chroma_core.training.run.trained import check_trained
from chroma_core.training.step.optimizers import OptimizerName, Schedule
from training_cases import Bench, bench, config, model_folder, steps, write_dataset

RATE = 1e-3


def test_old_learning_rates_are_the_same_to_the_last_bit(tmp_path):
    for count, warmup, peak in ((10, 0, 1.0), (1000, 37, 2e-4), (7, 9, 3e-3)):
        for kind in ("constant", "linear", "cosine"):
            made = config(tmp_path, tmp_path, lr_schedule=kind, warmup_steps=warmup, steps=count, learning_rate=peak)
            for step in range(count):
                progress = (step - warmup) / max(1, count - warmup)
                factor = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
                expected = peak * (step + 1) / warmup if step < warmup else peak * factor[kind]
                assert made.schedule().at(step) == expected
                assert Schedule(kind, peak, count, warmup).at(step) == expected


def test_new_learning_rates():
    def rates(kind, count=10, **values) -> list[float]:
        schedule = Schedule(kind, 1.0, count, **values)
        return [round(schedule.at(step), 4) for step in range(count)]

    assert rates("restarts") == rates("cosine")
    assert rates("restarts", cycles=2) == rates("cosine", 5) * 2
    assert rates("restarts", 7, cycles=3)[:1] == [1.0] and min(rates("restarts", 7, cycles=3)) > 0
    assert rates("restarts", 12, warmup_steps=2, cycles=5)[2::2] == [1.0] * 5
    assert rates("polynomial", power=1.0) == rates("linear")
    assert rates("polynomial", 5, warmup_steps=1, power=2.0) == [1.0, 1.0, 0.5625, 0.25, 0.0625]
    assert Schedule("polynomial", 1.0, 10).at(10) == 0.0
    for values in ({"kind": "step"}, {"learning_rate": 0.0}, {"warmup_steps": -1}, {"cycles": 0}, {"power": 0.0}):
        with pytest.raises(ConfigError):
            Schedule(**values)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("rates")
    return model_folder(root / "model"), write_dataset(root / "set", count=2), root / "cache"


def moved(made: Bench, count: int = 1) -> dict[str, torch.Tensor]:
    """How far every trained tensor is from its start after some steps."""
    before = {n: p.detach().clone() for n, p in made.transformer.named_parameters() if p.requires_grad}
    steps(made, count)
    return {n: p.detach() - before[n] for n, p in made.transformer.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "schedule-free"])
def test_a_first_step_is_the_factor_times_as_long(places, optimizer: OptimizerName):
    """AdamW's, Adafactor's and the schedule-free step is linear in the rate, decay included."""
    shared = {"optimizer": optimizer, "learning_rate": RATE}
    pattern = {"single_blocks.1.*": 0.25, "*.attn.to_q": 2.0, "double_blocks.0": 0.5}
    plain, changed = moved(bench(places, **shared)), moved(bench(places, lr_pattern=pattern, **shared))
    seen = set()
    for name, step in plain.items():
        factor = 2.0 if ".to_q." in name else 0.5 if name.startswith("transformer_blocks.0.") else 1.0
        factor = 0.25 if name.startswith("single_transformer_blocks.1.") else factor
        seen.add(factor)
        if step.any():
            assert (changed[name] - factor * step).abs().max() <= 1e-3 * factor * step.abs().max() + 3e-8, name
        else:
            assert not changed[name].any()
    assert seen == {0.25, 2.0, 0.5, 1.0}


def test_several_steps_with_one_factor_everywhere_are_another_rate(places):
    by_factor = moved(bench(places, learning_rate=RATE, lr_pattern={"*": 0.5}), 4)
    by_rate = moved(bench(places, learning_rate=RATE / 2), 4)
    assert all(torch.equal(step, by_rate[name]) for name, step in by_factor.items())


def test_blocks_that_are_trained_themselves_have_it_too(places):
    full = {"full": {"target": "single_blocks.0-1"}, "lora": {}, "learning_rate": 1e-5, "weight_decay": 0.0}
    plain = moved(bench(places, **full))
    changed = moved(bench(places, lr_pattern={"single_blocks.1": 3.0}, **full))
    for name, step in plain.items():
        factor = 3.0 if ".1." in name[:30] else 1.0
        assert (changed[name] - factor * step).abs().max() <= 2e-2 * factor * step.abs().max() + 1e-9, name


def test_a_checkpoint_goes_on_with_the_same_bits(places, tmp_path):
    options = {"learning_rate": RATE, "lr_pattern": {"single_blocks.*": 0.5}}
    whole, first, second = (bench(places, **options) for _ in range(3))
    steps(whole, 4)
    steps(first, 2)
    first.trained.save(tmp_path / "w.safetensors")
    torch.save(first.stepper.state_dict(), tmp_path / "o.pt")
    second.trained.load(tmp_path / "w.safetensors")
    second.stepper.load_state_dict(torch.load(tmp_path / "o.pt", weights_only=True))
    steps(second, 2, 2)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters, second.parameters, strict=True))


def test_without_it_a_job_is_what_it_was(places):
    plain = config(places[0], places[1])
    assert "lr_pattern" not in plain.canonical_json()
    assert config(places[0], places[1], lr_pattern={}).job_id() == plain.job_id()
    other = config(places[0], places[1], lr_pattern={"single_blocks.*": 0.5})
    assert other.job_id() != plain.job_id()
    assert TrainingConfig.parse(other.model_dump(mode="json")).job_id() == other.job_id()
    (change,) = differences(plain, other)
    assert (change.field, change.kind) == ("lr_pattern", "fixed")
    with pytest.raises(JobError, match="cannot go on with lr_pattern"):
        check_changes("x", [change], force=True)


def test_what_cannot_be_is_refused(places, tmp_path):
    for changes, says in (
        ({"lr_pattern": {"single_blocks.*": 0.0}}, "above 0 and at most 100"),
        ({"lr_pattern": {"single_blocks.*": float("nan")}}, "above 0 and at most 100"),
        ({"lr_pattern": {"single_blocks.*": 1e6}}, "above 0 and at most 100"),
        ({"lr_pattern": {"single_blocks.7-3": 1.0}}, "the first block comes first"),
        ({"lr_pattern": {"single_blocks.*": 0.5}, "optimizer": "prodigy", "learning_rate": 1.0}, "one learning rate"),
    ):
        with pytest.raises(ConfigError, match=says):
            config(places[0], places[1], **changes)
    paths = JobPaths(tmp_path / "job", tmp_path / "loras", tmp_path / "cache", tmp_path / "models")
    for target in ({"lora": {"target": "attention"}}, {"full": {"target": "single_blocks.0"}, "lora": {}}):
        job = config(places[0], places[1], lr_pattern={"double_blocks.*.txt_mlp": 0.5}, **target)
        with pytest.raises(ConfigError, match=r"'double_blocks.\*.txt_mlp' selects none of the \d+ layers"):
            check_trained(job, paths)
