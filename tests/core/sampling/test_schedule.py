"""Sigmas against closed formulas, diffusers' scheduler and the author's density."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from scipy import integrate, stats

from chroma_core.errors import ConfigError
from chroma_core.sampling.schedule import (
    SigmaSettings,
    apply_flow_shift,
    apply_sigma_bias,
    apply_tail_bias,
    draw_sigmas,
    dynamic_mu,
    parse_flow_shift,
    sampling_sigmas,
    sigma_density,
)

N = 20_000


def draw(n: int = N, seed: int = 0, **settings) -> torch.Tensor:
    return draw_sigmas(n, SigmaSettings(**settings), torch.Generator().manual_seed(seed), image_tokens=1024)


@pytest.mark.parametrize(("size", "mu"), [(512, 0.63), (768, 0.8467), (1024, 1.15), (1536, 2.0167)])
def test_flow_shift_table(size, mu):
    tokens = (size // 16) ** 2
    assert dynamic_mu(tokens) == pytest.approx(mu, abs=5e-5)
    sigma = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    expected = math.exp(dynamic_mu(tokens)) / (math.exp(dynamic_mu(tokens)) + 1 / sigma - 1)
    assert torch.allclose(apply_flow_shift(sigma, "dynamic", tokens), expected, atol=1e-12)


@pytest.mark.parametrize("size", [64, 512, 768, 1024, 1536])
@pytest.mark.parametrize("steps", [1, 4, 25, 32])
def test_plain_schedule_equals_diffusers(size, steps):
    tokens = (size // 16) ** 2
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist(), mu=dynamic_mu(tokens))
    assert torch.allclose(sampling_sigmas(steps, tokens), scheduler.sigmas.float(), atol=1e-6)


def test_constant_shift_formula():
    sigma = torch.linspace(0, 1, 11, dtype=torch.float64)
    assert torch.allclose(apply_flow_shift(sigma, 3.0, 0), 3 * sigma / (1 + 2 * sigma))
    assert torch.equal(apply_flow_shift(sigma, "none", 0), sigma)


def test_tail_bias_crowds_both_ends_and_is_continuous():
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    assert torch.equal(apply_tail_bias(t, 0.0), t)
    biased = apply_tail_bias(t, 1.0)
    assert biased[250].item() == pytest.approx(2 * 0.25**2) and biased[750].item() == pytest.approx(1 - 2 * 0.25**2)
    assert (biased.diff() >= 0).all() and biased.diff().max() < 0.0025  # slope 2 at most: no jump at one half
    assert torch.allclose(biased + biased.flip(0), torch.ones_like(t))
    half = apply_tail_bias(t, 0.5)
    assert torch.allclose(half, (t + biased) / 2)


@pytest.mark.parametrize("bias", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("shift", ["dynamic", "none", 3.0])
def test_every_schedule_falls_from_one_to_zero(bias, shift):
    sigmas = sampling_sigmas(25, 1024, tail_bias=bias, flow_shift=shift)
    assert sigmas.dtype == torch.float32 and sigmas.shape == (26,)
    assert sigmas[0] == 1 and sigmas[-1] == 0 and (sigmas.diff() < 0).all()


def test_denoise_takes_the_tail_of_a_longer_schedule():
    assert torch.equal(sampling_sigmas(10, 1024, denoise=0.5), sampling_sigmas(20, 1024)[-11:])


def test_logit_normal_draw():
    sigma = draw(remap="none").double()
    assert stats.kstest(torch.logit(sigma).numpy(), "norm").pvalue > 0.01


def test_author_density():
    z = 2 - 7.7 / 12

    def cdf(t):
        return (2 * t - 7.7 * ((t - 0.5) ** 3 + 0.125) / 3) / z

    assert [cdf(0.05), cdf(0.25), cdf(0.5)] == pytest.approx([0.00961, 0.16143, 0.5], abs=5e-6)
    assert stats.kstest(draw(draw="chroma", remap="none").double().numpy(), cdf).pvalue > 0.01


def test_quadratic_remap_of_uniform():
    """By a fair coin σ² or 1−(1−σ)²: F(x) = (√x + 1 − √(1−x)) / 2."""
    sigma = draw(draw="uniform", remap="quadratic").double().numpy()
    assert stats.kstest(sigma, lambda x: (x**0.5 + 1 - (1 - x) ** 0.5) / 2).pvalue > 0.01
    assert ((sigma > 0.25) & (sigma < 0.75)).any()


def test_quadratic_split_never_visits_the_middle():
    sigma = draw(draw="uniform", remap="quadratic_split")
    assert not ((sigma >= 0.25) & (sigma < 0.75)).any()
    plain = draw(draw="uniform", remap="none")
    assert torch.allclose(sigma, torch.where(plain < 0.5, plain**2, 1 - (1 - plain) ** 2), atol=1e-6)


def test_a_density_has_area_one_and_is_that_of_the_draws():
    flat = sigma_density(SigmaSettings("uniform", "none"), 4096)
    assert len(flat) == 40 and sum(flat) / 40 == pytest.approx(1) and flat == pytest.approx([1.0] * 40, abs=0.12)
    squeezed = sigma_density(SigmaSettings("uniform", "none", minimum=0.5, maximum=0.75), 4096, bins=4)
    assert squeezed == pytest.approx([0, 0, 4, 0], abs=0.01)
    centres = [(i + 0.5) / 40 for i in range(40)]
    expected = [stats.norm.pdf(math.log(c / (1 - c))) / (c * (1 - c)) for c in centres]
    assert sigma_density(SigmaSettings(remap="none"), 4096) == pytest.approx(expected, abs=0.12)


def test_draws_keep_their_limits_and_their_seed():
    sigma = draw(draw="uniform", remap="quadratic", minimum=0.2, maximum=0.6)
    assert sigma.min() >= 0.2 and sigma.max() <= 0.6
    assert torch.equal(draw(seed=3), draw(seed=3)) and not torch.equal(draw(seed=3), draw(seed=4))


def test_shifted_draw_is_the_shift_of_the_draw():
    plain = draw(remap="none", draw="uniform").double()
    assert torch.allclose(
        draw(remap="none", draw="uniform", flow_shift=3.0).double(), 3 * plain / (1 + 2 * plain), atol=1e-6
    )


def test_a_shift_before_the_remap_is_simpletuners_density():
    """Shift 3 adds ln 3 to the logit, so below ½, and after the split remap below ¼, falls the share Φ(−ln 3).

    The median is the remap of 3/4; the mean is integrated numerically over the normal variable."""
    settings = {"remap": "quadratic_split", "flow_shift": 3.0, "shift_first": True}
    sigma = draw(400_000, **settings).double()
    low = stats.norm.cdf(-math.log(3))
    assert float((sigma < 0.25).double().mean()) == pytest.approx(low, abs=0.003) and 0.135 < low < 0.137
    assert not bool(((sigma >= 0.25) & (sigma < 0.75)).any())
    assert float(sigma.median()) == pytest.approx(1 - (1 - 3 / 4) ** 2, abs=0.002)

    def remapped(z: float) -> float:
        shifted = 1 / (1 + math.exp(-z - math.log(3)))
        return shifted**2 if shifted < 0.5 else 1 - (1 - shifted) ** 2

    mean = sum(
        integrate.quad(lambda z: remapped(z) * stats.norm.pdf(z), *ends)[0]
        for ends in ((-12, -math.log(3)), (-math.log(3), 12))
    )
    assert float(sigma.mean()) == pytest.approx(mean, abs=0.002) and mean == pytest.approx(0.8246, abs=1e-4)
    after = draw(400_000, remap="quadratic_split", flow_shift=3.0).double()
    # The usual order is another density: below ¼ lies 3σ²/(1 + 2σ²) < ¼, σ < √.1.
    usual = stats.norm.cdf(math.log(0.1**0.5 / (1 - 0.1**0.5)))
    assert float((after < 0.25).double().mean()) == pytest.approx(usual, abs=0.003)


def test_sigma_bias_is_a_monotone_map_with_zero_the_identity():
    sigma = torch.linspace(0, 1, 1001, dtype=torch.float64)

    def biased(b: float) -> torch.Tensor:
        return apply_sigma_bias(sigma, torch.full_like(sigma, b))

    assert torch.equal(biased(0.0), sigma)
    for b in (-1.0, -0.3, 0.5, 1.0):
        moved = biased(b)
        assert moved[0] == 0 and moved[-1] == 1 and (moved.diff() > 0).all()
        assert torch.allclose(torch.logit(moved[1:-1]), torch.logit(sigma[1:-1]) + b * math.log(8), atol=1e-9)
        assert torch.allclose(apply_sigma_bias(moved, torch.full_like(sigma, -b)), sigma, atol=1e-12)
    assert biased(1.0)[500].item() == pytest.approx(8 / 9) and biased(-1.0)[500].item() == pytest.approx(1 / 9)


def test_biased_draws_have_the_shifted_density_row_by_row():
    settings = SigmaSettings(remap="none")

    def both(bias):
        return draw_sigmas(N, settings, torch.Generator().manual_seed(0), 1024, bias).double()

    mixed = both([0.5, 0.0] * (N // 2))
    # logit-normal: the logit moves by b·ln 8 and keeps its deviation
    assert stats.kstest((torch.logit(mixed[::2]) - 0.5 * math.log(8)).numpy(), "norm").pvalue > 0.01
    assert torch.equal(mixed[1::2], both(None)[1::2]) and torch.equal(both([0.0] * N), both(None))
    limited = SigmaSettings(minimum=0.2, maximum=0.6)
    sigma = draw_sigmas(N, limited, torch.Generator().manual_seed(0), 1024, [1.0] * N)
    assert sigma.min() >= 0.2 and sigma.max() <= 0.6 and sigma.median() > 0.5


@pytest.mark.parametrize(
    "bad",
    [
        lambda: apply_sigma_bias(torch.rand(2), torch.tensor([0.0, 1.1])),
        lambda: apply_sigma_bias(torch.rand(1), torch.tensor([math.nan])),
        lambda: sampling_sigmas(0, 16),
        lambda: sampling_sigmas(5, 16, denoise=0.0),
        lambda: sampling_sigmas(5, 16, tail_bias=1.5),
        lambda: parse_flow_shift("much"),
        lambda: parse_flow_shift(-1),
        lambda: SigmaSettings(draw="gauss"),  # type: ignore[arg-type]
        lambda: SigmaSettings(minimum=0.5, maximum=0.5),
    ],
)
def test_bad_values_are_named(bad):
    with pytest.raises(ConfigError):
        bad()
