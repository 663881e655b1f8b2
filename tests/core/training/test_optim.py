"""Optimizers: AdamW as it always was, exact resumes, what decays, what is skipped, loss scaling."""

import io
import math
import sys

import pytest
import torch
from torch.nn import Parameter

from chroma_core.errors import ConfigError
from chroma_core.training.run.stepper import LossScale, Stepper
from chroma_core.training.step.optimizers import OptimizerSettings, Schedule, check_optimizer, check_schedule
from training_cases import config

NAMES = ("adamw", "adamw8bit", "adafactor", "prodigy", "schedule-free", "came")
OPTIONAL = {"prodigy": "prodigyopt", "schedule-free": "schedulefree", "came": "came_pytorch"}
STATE_BYTES = {"adamw": 8, "adamw8bit": 2, "adafactor": 0, "prodigy": 16, "schedule-free": 8, "came": 4}
"""Bytes of state that every parameter has; 8-bit AdamW's scales and the factored optimizers' sums come on top."""


def needs(name: str) -> None:
    if name in OPTIONAL:
        pytest.importorskip(OPTIONAL[name])


def settings(name: str = "adamw", **changes) -> OptimizerSettings:
    return OptimizerSettings(name, **{"learning_rate": 1.0 if name == "prodigy" else 1e-3, **changes})


def parameters() -> list[Parameter]:
    """As a LoRA's: a random `down` large enough for 8-bit state, a zero `up`, a vector."""
    generator = torch.Generator().manual_seed(1)
    down = torch.randn(16, 320, generator=generator) / 20
    return [Parameter(down), Parameter(torch.zeros(320, 16)), Parameter(torch.ones(320))]


def loss(weights: list[Parameter], step: int) -> torch.Tensor:
    """The LoRA learns to copy a random projection, from other inputs at every step."""
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(8, 320, generator=generator)
    target = x @ torch.randn(320, 320, generator=torch.Generator().manual_seed(9)) / 20
    down, up, magnitude = weights
    return (x @ down.T @ up.T * magnitude - target).square().mean()


def train(stepper: Stepper, first: int, last: int, rate: float | None = None) -> list[tuple[float, bool]]:
    results = []
    for step in range(first, last):
        stepper.backward(loss(stepper.parameters, step))
        results.append(stepper.apply(rate or stepper.settings.learning_rate, 1.0))
    return results


def through_a_file(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def same(a: Stepper, b: Stepper) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters, b.parameters, strict=True))


def test_adamw_is_what_it_was(tmp_path):
    """Bit for bit the optimizer and the clipping of the training step before there was a Stepper."""
    made = config(tmp_path, tmp_path, learning_rate=1e-3, weight_decay=0.01)
    matrices = parameters()[:2]
    old = torch.optim.AdamW(matrices, lr=made.learning_rate, weight_decay=made.weight_decay)
    magnitude = torch.ones(320)
    stepper = Stepper([Parameter(p.detach().clone()) for p in matrices], settings())
    for step in range(5):
        rate = made.schedule().at(step)
        value = loss([*matrices, magnitude], step)
        value.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(matrices, 0.05))
        for group in old.param_groups:
            group["lr"] = rate
        old.step()
        old.zero_grad(set_to_none=True)
        stepper.backward(loss([*stepper.parameters, magnitude], step))
        assert stepper.apply(rate, 0.05) == (norm, False)
        assert norm > 0.05 or step == 0
        assert all(torch.equal(a, b) for a, b in zip(matrices, stepper.parameters, strict=True))
    # An older checkpoint is this optimizer's bare state.
    resumed = Stepper([Parameter(p.detach().clone()) for p in matrices], settings())
    resumed.load_state_dict(through_a_file(old.state_dict()))
    for made in (resumed, stepper):
        made.backward(loss([*made.parameters, magnitude], 5))
        made.apply(1e-3, 0.05)
    assert same(resumed, stepper)


@pytest.mark.parametrize("name", NAMES)
def test_it_learns(name):
    needs(name)
    stepper = Stepper(parameters(), settings(name))
    with stepper.as_trained():
        before = loss(stepper.parameters, 0).item()
    for _ in range(200):  # Prodigy takes a hundred to find the rate
        stepper.backward(loss(stepper.parameters, 0))
        assert not stepper.apply(1.0 if name == "prodigy" else 2e-3, 1.0)[1]
    with stepper.as_trained():
        assert loss(stepper.parameters, 0).item() < 0.5 * before
    estimate = stepper.optimizer.param_groups[0].get("d")
    assert (estimate is not None) == (name == "prodigy")
    assert estimate is None or estimate > 1e-4


@pytest.mark.parametrize("compute", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_a_resume_is_exact(name, compute):
    """6 steps are 3, save, load and 3 more, bit for bit; what is saved as the LoRA is what `as_trained` gives."""
    needs(name)
    chosen = settings(name, compute_dtype=compute)
    whole, first, second = (Stepper(parameters(), chosen) for _ in range(3))
    train(whole, 0, 6)
    train(first, 0, 3)
    with first.as_trained():
        weights = [parameter.detach().clone() for parameter in first.parameters]
        inside = through_a_file(first.state_dict())
    outside = through_a_file(first.state_dict())
    for state in (inside, outside):
        for parameter, weight in zip(second.parameters, weights, strict=True):
            parameter.data.copy_(weight)
        second.load_state_dict(state)
        assert same(first, second)
    train(second, 3, 6)
    assert same(whole, second)
    with whole.as_trained(), second.as_trained():
        assert same(whole, second)
    train(first, 3, 6)
    assert same(whole, first), "looking at the trained weights changes nothing"


@pytest.mark.parametrize("name", NAMES)
def test_only_matrices_decay(name):
    needs(name)
    results = []
    for decay in (0.0, 0.5):
        weights = [Parameter(torch.ones(64, 64)), Parameter(torch.ones(64)), Parameter(torch.ones(8, 4))]
        stepper = Stepper(weights, settings(name, weight_decay=decay))
        for _ in range(2):
            stepper.backward(sum((w * w.detach().cos()).sum() for w in weights))  # type: ignore[arg-type]
            stepper.apply(1.0 if name == "prodigy" else 1e-2, 0)
        with stepper.as_trained():
            results.append([weight.detach().clone() for weight in weights])
    (matrix, vector, small), (decayed, kept, small_decayed) = results
    assert torch.equal(vector, kept)
    assert (decayed < matrix).all() and (small_decayed < small).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_broken_step_touches_nothing(name, broken):
    needs(name)
    stepper = Stepper(parameters(), settings(name))
    train(stepper, 0, 2)
    before = through_a_file(stepper.state_dict())
    weights = [parameter.detach().clone() for parameter in stepper.parameters]
    if broken == "loss":
        stepper.backward(loss(stepper.parameters, 2) + math.inf)  # its gradient is finite
    else:
        stepper.backward(loss(stepper.parameters, 2))
        stepper.parameters[1].grad[0, 0] = math.nan  # type: ignore[index]
    _, skipped = stepper.apply(1e-3, 1.0)
    assert skipped and stepper.skip_reason == "broken"
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(weights, stepper.parameters, strict=True))
    assert str(through_a_file(stepper.state_dict())) == str(before)
    assert train(stepper, 2, 3)[0][1] is False and stepper.skip_reason == ""


def test_the_norm_is_measured_before_clipping():
    def gradient(limit: float) -> tuple[float, torch.Tensor]:
        weight = Parameter(torch.zeros(2, 2))
        stepper = Stepper([weight], settings(learning_rate=1.0))
        stepper.optimizer = torch.optim.SGD([weight], lr=1.0)
        stepper.backward((weight * torch.tensor([[3.0, 0.0], [0.0, 4.0]])).sum())
        norm, _ = stepper.apply(1.0, limit)
        return norm, -weight.detach()

    norm, clipped = gradient(1.0)
    assert norm == 5.0 and clipped.norm().item() == pytest.approx(1.0, abs=1e-5)
    norm, whole = gradient(0)
    assert norm == 5.0 and whole.norm().item() == 5.0


def test_accumulated_parts_are_one_step():
    whole, parts = Stepper(parameters(), settings()), Stepper(parameters(), settings())
    whole.backward((loss(whole.parameters, 0) + loss(whole.parameters, 1)) / 2)
    for step in (0, 1):
        parts.backward(loss(parts.parameters, step) / 2)
    a, b = whole.apply(1e-3, 0)[0], parts.apply(1e-3, 0)[0]
    assert a == pytest.approx(b, rel=1e-6)


def test_loss_scaling_changes_no_bit_without_overflow():
    """The scale is a power of two: with fp32 gradients scaled and plain training are the same."""
    plain = Stepper(parameters(), settings())
    scaled = Stepper(parameters(), settings(compute_dtype=torch.float16))
    assert scaled.loss_scale == LossScale(65536.0, 0)
    assert train(plain, 0, 4) == train(scaled, 0, 4)
    assert same(plain, scaled) and scaled.loss_scale == LossScale(65536.0, 4)
    assert plain.loss_scale is None and "loss_scale" not in plain.state_dict()


def test_small_fp16_gradients_survive():
    """A gradient of 1e-9 is zero in fp16; scaled it comes through."""
    for compute, expected in ((torch.float32, 0.0), (torch.float16, 1e-9)):
        weight = Parameter(torch.ones(4, 4))
        stepper = Stepper([weight], settings(compute_dtype=compute))
        stepper.backward((weight.half() * 2).float().mul(0.5e-9).sum())
        norm, _ = stepper.apply(1e-3, 0)
        assert norm == pytest.approx(4 * expected, rel=1e-2)


def test_an_overflow_backs_off_and_is_told_apart():
    weight = Parameter(torch.ones(2, 2))
    stepper = Stepper([weight], settings(compute_dtype=torch.float16))

    def step(factor: float) -> tuple[float, bool]:
        stepper.backward((weight.half() * 1).float().mul(factor).sum())
        return stepper.apply(1e-3, 1.0)

    norm, skipped = step(4.0)  # 4 · 65536 is more than fp16 holds
    assert skipped and not math.isfinite(norm) and stepper.skip_reason == "overflow"
    assert torch.equal(weight, torch.ones(2, 2)) and not stepper.optimizer.state
    for _ in range(3):
        step(4.0)
    assert stepper.loss_scale == LossScale(8192.0, 1) and stepper.overflows == 3
    assert not stepper.skip_reason and not torch.equal(weight, torch.ones(2, 2))
    stepper.backward(weight.sum() * math.nan)
    assert stepper.apply(1e-3, 1.0)[1] and stepper.skip_reason == "broken" and stepper.overflows == 3
    assert stepper.loss_scale == LossScale(8192.0, 1)
    for _ in range(13):  # infinite at every scale: not the scale's fault
        step(1e30)
    assert stepper.loss_scale.scale == 1.0 and stepper.skip_reason == "overflow"
    assert step(1e30)[1] and stepper.skip_reason == "broken"


def test_the_loss_scale_grows_and_resumes():
    scale = LossScale(patience=3)
    for _ in range(7):
        scale.took_a_step()
    assert (scale.scale, scale.steps_without_overflow) == (2.0**18, 1)
    for _ in range(60):
        scale.took_a_step()
    assert scale.scale == 2.0**24
    for _ in range(40):
        scale.overflowed()
    assert scale.scale == 1.0
    chosen = settings(compute_dtype=torch.float16)
    one, other = Stepper(parameters(), chosen), Stepper(parameters(), chosen)
    one.loss_scale, one.overflows = LossScale(512.0, 1999), 7
    other.load_state_dict(through_a_file(one.state_dict()))
    train(other, 0, 1)
    assert other.loss_scale == LossScale(1024.0, 0) and other.overflows == 7


def test_schedule_free_trains_on_other_weights_than_it_gives():
    needs("schedule-free")
    stepper = Stepper(parameters(), settings("schedule-free"))
    train(stepper, 0, 3)
    before = [parameter.detach().clone() for parameter in stepper.parameters]
    with stepper.as_trained():
        averaged = [parameter.detach().clone() for parameter in stepper.parameters]
        assert not any(torch.equal(a, b) for a, b in zip(before, averaged, strict=True))
        with stepper.as_trained():
            assert all(torch.equal(a, b) for a, b in zip(stepper.parameters, averaged, strict=True))
        with pytest.raises(RuntimeError, match="as_trained"):
            stepper.apply(1e-3, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, stepper.parameters, strict=True))


def test_our_warm_up_is_schedule_frees_own():
    """Its average weighs every step by the largest rate so far; a rate given from outside counts the same."""
    needs("schedule-free")
    from schedulefree import AdamWScheduleFree

    stepper, weights = Stepper(parameters(), settings("schedule-free", weight_decay=0.0)), parameters()
    theirs = AdamWScheduleFree(weights, lr=1e-3, warmup_steps=4)
    theirs.train()
    schedule = Schedule("constant", 1e-3, 8, warmup_steps=4)
    for step in range(8):
        stepper.backward(loss(stepper.parameters, step))
        stepper.apply(schedule.at(step), 0)
        loss(weights, step).backward()
        theirs.step()
        theirs.zero_grad()
    theirs.eval()
    with stepper.as_trained():
        assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(stepper.parameters, weights, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_state_is_as_large_as_the_docs_say(name):
    needs(name)
    weight = Parameter(torch.randn(256, 1024, generator=torch.Generator().manual_seed(1)))
    stepper = Stepper([weight], settings(name))
    for _ in range(2):
        stepper.backward(weight.square().sum())
        stepper.apply(1e-3 if name != "prodigy" else 1.0, 0)
    size = sum(value.nbytes for value in stepper.optimizer.state[weight].values() if torch.is_tensor(value))
    assert STATE_BYTES[name] <= size / weight.numel() <= STATE_BYTES[name] + 0.06


def test_another_optimizers_state_is_refused():
    stepper = Stepper(parameters(), settings("adafactor"))
    with pytest.raises(ConfigError, match="The checkpoint's optimizer is adamw, the job's is adafactor"):
        stepper.load_state_dict(Stepper(parameters(), settings()).state_dict())


@pytest.mark.parametrize("name", [name for name in NAMES if name != "adamw"])
def test_a_missing_library_is_named(name, monkeypatch):
    from chroma_core.training.step.optimizers import _LIBRARIES

    library = _LIBRARIES[name]
    monkeypatch.setitem(sys.modules, library.module, None)  # how Python spells "cannot be imported"
    for attempt in (lambda: Stepper(parameters(), settings(name)), lambda: check_optimizer(settings(name), "cpu")):
        with pytest.raises(ConfigError) as caught:
            attempt()
        text = str(caught.value)
        assert "is not installed here" in text and f"pip install {library.package}" in text
        assert f"or choose {library.instead}." in text


@pytest.mark.parametrize("name", NAMES)
def test_the_trial_passes_here_and_names_what_fails(name):
    needs(name)
    check_optimizer(settings(name), "cpu")
    if name != "adamw":
        with pytest.raises(ConfigError, match="cannot be used on the device 'meta'.*Choose ad"):
            check_optimizer(settings(name), "meta")


def test_numbers_that_cannot_work():
    for values, message in (
        ({"name": "sgd"}, "choose one of: adamw, "),
        ({"learning_rate": 0.0}, "must be above 0"),
        ({"weight_decay": -1.0}, "weight decay is -1.0"),
        ({"betas": (0.9, 1.0)}, "betas is"),
        ({"name": "prodigy", "learning_rate": 2e-4}, "Set learning_rate = 1"),
        ({"name": "adafactor", "betas": (0.9, 0.99)}, "Adafactor keeps no running mean"),
        ({"name": "schedule-free", "betas": (0.0, 0.99)}, "choose 0.9"),
    ):
        with pytest.raises(ConfigError, match=message):
            OptimizerSettings(**values)
    check_schedule("adamw", "restarts")
    check_schedule("prodigy", "cosine")
    check_schedule("schedule-free", "constant")
    with pytest.raises(ConfigError, match="lr_schedule = 'constant'"):
        check_schedule("schedule-free", "cosine")
    with pytest.raises(ConfigError, match="against restarts"):
        check_schedule("prodigy", "restarts")
