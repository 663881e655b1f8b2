"""The schedule's tables from closed forms written out here in plain Python, and `beta` against SciPy."""

import math

import pytest
import torch
from scipy import stats

from chroma_core.sampling.schedule import sampling_sigmas, spaced_times

SIZES = [(64, 64), (256, 256), (512, 512), (512, 768), (768, 768), (1024, 1024), (1536, 1024)]
STEPS = [4, 8, 25, 32]


def closed_form(steps: int, width: int, height: int, shift: str | float, bias: float, spacing: str) -> list[float]:
    tokens = (width // 16) * (height // 16)
    factor = math.exp(0.5 + (tokens - 256) * 0.65 / 3840) if shift == "dynamic" else 1.0 if shift == "none" else shift
    sigmas = []
    for i in range(steps):
        u = 1 - i / steps
        t = u if spacing == "linear" else (round(9999 * float(stats.beta.ppf(u, 0.6, 0.6))) + 1) / 10000
        q = 2 * t * t if t < 0.5 else 1 - 2 * (1 - t) ** 2
        t = (1 - bias) * t + bias * q
        sigmas.append(factor / (factor + 1 / t - 1))
    return [*sigmas, 0.0]


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_table(size, steps):
    width, height = size
    tokens = width * height // 256
    for shift in ("dynamic", "none", 3.0):
        for bias in (0.0, 0.5, 1.0):
            for spacing in ("linear", "beta"):
                ours = sampling_sigmas(steps, tokens, tail_bias=bias, flow_shift=shift, spacing=spacing)
                assert ours.tolist() == pytest.approx(
                    closed_form(steps, width, height, shift, bias, spacing), rel=2e-7, abs=1e-12
                ), (shift, bias, spacing)


def test_some_numbers_by_hand():
    """1024²: μ = 1.15; σ = e^μ/(e^μ + 1/t − 1) at t = ¾, ½, ¼."""
    factor = math.e**1.15
    expected = [1, 3 * factor / (3 * factor + 1), factor / (factor + 1), factor / (factor + 3), 0]
    assert sampling_sigmas(4, 4096).tolist() == pytest.approx(expected, rel=1e-6)
    assert sampling_sigmas(4, 4096, flow_shift=3.0).tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0])


@pytest.mark.parametrize("steps", [1, 2, 3, 50, 499, 501, 1000])
def test_beta_lies_on_the_rows_of_comfyuis_table(steps):
    """Another algorithm for the same quantiles; above 500 steps some fall on one row, which then stands once."""
    rows = {round(9999 * float(stats.beta.ppf(1 - i / steps, 0.6, 0.6))) for i in range(steps)}
    assert spaced_times(steps, "beta").tolist() == [(row + 1) / 10000 for row in sorted(rows, reverse=True)]


def test_beta_is_dense_at_both_ends():
    gaps = spaced_times(25, "beta").diff().abs()
    assert gaps[0] < gaps[12] / 2 > gaps[-1]
    assert spaced_times(25, "beta")[0] == 1


def test_a_part_is_a_piece_of_the_whole():
    whole = sampling_sigmas(12, 1024, tail_bias=0.3, denoise=0.6)
    part = sampling_sigmas(12, 1024, tail_bias=0.3, denoise=0.6, start_step=3, end_step=7)
    assert torch.equal(part, whole[3:8]) and part[-1] > 0
    assert torch.equal(sampling_sigmas(12, 1024, start_step=3, end_step=99), sampling_sigmas(12, 1024)[3:])


def test_denoise_of_beta_counts_as_for_linear():
    assert torch.equal(
        sampling_sigmas(10, 1024, spacing="beta", denoise=0.5), sampling_sigmas(20, 1024, spacing="beta")[-11:]
    )
