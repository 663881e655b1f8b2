"""The moving average of the weights: its values, its state, and standing in for the weights."""

import pytest
import torch
from torch import nn

from chroma_core.errors import ConfigError
from chroma_core.training.step.ema import Ema


def parameters(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((3, 4), (5,))]


def walk(trained: list[nn.Parameter], ema: Ema, steps: range) -> None:
    """Steps that depend on their number alone."""
    for step in steps:
        with torch.no_grad():
            for parameter in trained:
                parameter += torch.full_like(parameter, 0.1 * (step + 1))
        ema.update(step)


def averages(ema: Ema) -> list[torch.Tensor]:
    return ema.state_dict()["averages"]


@pytest.mark.parametrize("decay", [0.0, 0.15, 0.9])
def test_the_average_is_the_formulas(decay):
    trained = parameters()
    expected = [parameter.detach().double() for parameter in trained]
    ema = Ema(trained, decay)
    for step in range(30):
        walk(trained, ema, range(step, step + 1))
        d = min(decay, (1 + step) / (10 + step))
        expected = [d * e + (1 - d) * p.detach().double() for e, p in zip(expected, trained, strict=True)]
    for average, value in zip(averages(ema), expected, strict=True):
        assert (average - value).abs().max() < 1e-5 * value.abs().max()
    if decay == 0:
        assert all(torch.equal(a, p) for a, p in zip(averages(ema), trained, strict=True))


def test_warm_up_begins_at_a_tenth():
    trained = [nn.Parameter(torch.zeros(1))]
    ema = Ema(trained, 0.999)
    with torch.no_grad():
        trained[0].fill_(1.0)
    ema.update(0)
    assert averages(ema)[0].item() == pytest.approx(0.9, abs=1e-7)


def test_averages_of_low_precision_weights_are_fp32():
    """At decay 0.999 a bf16 average would stand still: the share of a step is below its resolution."""
    trained = [nn.Parameter(torch.ones(2, dtype=torch.bfloat16))]
    ema = Ema(trained, 0.999)
    with torch.no_grad():
        trained[0].fill_(1.0078125)
    for step in range(10_000, 10_010):
        ema.update(step)
    assert averages(ema)[0].dtype == torch.float32
    assert 1.00007 < averages(ema)[0][0].item() < 1.00009


def test_swapped_shows_the_average_and_gives_the_weights_back():
    trained = parameters()
    ema = Ema(trained, 0.9)
    walk(trained, ema, range(5))
    raw, average = [p.detach().clone() for p in trained], averages(ema)
    for failing in (False, True):
        try:
            with ema.swapped():
                assert all(torch.equal(p, a) for p, a in zip(trained, average, strict=True))
                for act in (lambda: ema.update(5), lambda: ema.swapped().__enter__(), lambda: ema.load_state_dict({})):
                    with pytest.raises(RuntimeError, match="in the place of the weights"):
                        act()
                if failing:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            assert failing
        assert all(torch.equal(p, r) for p, r in zip(trained, raw, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(averages(ema), average, strict=True))


def test_a_resumed_average_is_the_same_bit_for_bit(tmp_path):
    whole, half = parameters(), parameters()
    ema, first = Ema(whole, 0.95), Ema(half, 0.95)
    walk(whole, ema, range(20))
    walk(half, first, range(8))
    torch.save(first.state_dict(), tmp_path / "ema.pt")
    kept = averages(first)
    resumed = Ema(half, 0.95)
    resumed.load_state_dict(torch.load(tmp_path / "ema.pt", weights_only=True))
    walk(half, resumed, range(8, 20))
    assert all(torch.equal(a, b) for a, b in zip(averages(resumed), averages(ema), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(averages(first), kept, strict=True))  # states are copies


def test_wrong_settings_and_states_are_errors():
    for decay in (-0.1, 1.0, float("nan")):
        with pytest.raises(ConfigError, match="EMA decay"):
            Ema(parameters(), decay)
    with pytest.raises(ConfigError, match="nothing to average"):
        Ema([], 0.9)
    ema = Ema(parameters(), 0.9)
    before = averages(ema)
    for other in (Ema(parameters(), 0.8), Ema(parameters()[:1], 0.9), Ema(parameters()[::-1], 0.9)):
        with pytest.raises(ConfigError, match="settings that it was started with"):
            ema.load_state_dict(other.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(averages(ema), before, strict=True))


def test_under_inference_mode_it_can_be_made_and_updated_outside():
    trained = parameters()
    with torch.inference_mode():
        ema = Ema(trained, 0.9)
    walk(trained, ema, range(2))
    assert not torch.equal(averages(ema)[0], trained[0])
