"""The noise levels of imported jobs against each trainer's own way of drawing them, written down here in numpy."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats

from chroma_core.import_config import import_config
from chroma_core.sampling.schedule import draw_sigmas

N, TOKENS = 40_000, 1024


def imported(put, name: str, content: dict) -> np.ndarray:
    objective = import_config(put(name, content)).config.objective
    return draw_sigmas(N, objective.sigmas(), torch.Generator().manual_seed(1), TOKENS).double().numpy()


def shifted(sigma: np.ndarray, shift: float) -> np.ndarray:
    return shift * sigma / (1 + (shift - 1) * sigma)


def same(found: np.ndarray, expected: np.ndarray) -> None:
    """Kolmogorov–Smirnov: two samples of one distribution, up to the trainers' thousand steps."""
    assert stats.ks_2samp(found, expected).statistic < 1.63 * math.sqrt(2 / N) + 0.001


def onetrainer(distribution: str, weight: float, bias: float, shift: float, rng: np.random.Generator) -> np.ndarray:
    """Timesteps of OneTrainer's noise mixin over 1000."""
    if distribution == "INVERTED_PARABOLA":  # weights over shifted steps: the inverse shift, and its derivative
        line = np.linspace(0, 1, 1000)
        inverse = line / (shift - shift * line + line)
        weights = np.clip(-weight * (inverse - (bias + 0.5)) ** 2 + 2, 0, None)
        weights *= shift / (shift + line - line * shift) ** 2
        return rng.choice(1000, N, p=weights / weights.sum()) / 1000
    if distribution == "LOGIT_NORMAL":
        drawn = 1 / (1 + np.exp(-rng.normal(bias, weight + 1, N)))
    else:
        drawn = rng.random(N)
    return shifted(drawn, shift)


@pytest.mark.parametrize(
    ("distribution", "weight", "bias", "shift"),
    [
        ("INVERTED_PARABOLA", 7.7, 0.0, 1.0),
        ("INVERTED_PARABOLA", 7.7, 0.0, 1.8),
        ("LOGIT_NORMAL", 0.0, 0.0, 1.0),
        ("LOGIT_NORMAL", 0.2, 0.5, 1.5),
        ("LOGIT_NORMAL", 0.0, -0.7, 1.0),
        ("UNIFORM", 0.0, 0.0, 2.5),
    ],
)
def test_onetrainers(put, distribution, weight, bias, shift):
    config = {
        "training_method": "LORA", "model_type": "CHROMA_1", "timestep_distribution": distribution,
        "noising_weight": weight, "noising_bias": bias, "timestep_shift": shift,
    }  # fmt: skip
    same(imported(put, "a.json", config), onetrainer(distribution, weight, bias, shift, np.random.default_rng(0)))


def by_index(index: np.ndarray, shift: float = 3.0) -> np.ndarray:
    """sd-scripts' `sigma`: a place in the scheduler's table, which begins at σ = 1 and is shifted."""
    table = shifted(np.linspace(1, 1 / 1000, 1000), shift)
    return table[np.minimum((index * 1000).astype(int), 999)]


FLUX = math.exp((1.15 - 0.5) / (4096 - 256) * (TOKENS - 256) + 0.5)
SD_SCRIPTS: dict[str, tuple[dict, Callable[[np.random.Generator], np.ndarray]]] = {
    "nothing stated": ({}, lambda rng: by_index(rng.random(N))),
    "sigma, logit-normal": (
        {"timestep_sampling": "sigma", "weighting_scheme": "logit_normal", "logit_mean": 0.4, "logit_std": 0.8},
        lambda rng: by_index(1 / (1 + np.exp(-rng.normal(0.4, 0.8, N)))),
    ),
    "uniform": ({"timestep_sampling": "uniform"}, lambda rng: rng.random(N)),
    "sigmoid": (
        {"timestep_sampling": "sigmoid", "sigmoid_scale": 1.3},
        lambda rng: 1 / (1 + np.exp(-1.3 * rng.normal(size=N))),
    ),
    "shift": (
        {"timestep_sampling": "shift", "discrete_flow_shift": 3.1582},
        lambda rng: shifted(1 / (1 + np.exp(-rng.normal(size=N))), 3.1582),
    ),
    "flux_shift": (
        {"timestep_sampling": "flux_shift"},
        lambda rng: shifted(1 / (1 + np.exp(-rng.normal(size=N))), FLUX),
    ),
}


@pytest.mark.parametrize("name", SD_SCRIPTS)
def test_sd_scripts(put, name):
    options, draw = SD_SCRIPTS[name]
    config = {"model_type": "chroma", "network_module": "networks.lora_flux", "network_dim": 4} | options
    same(imported(put, "k.json", config), draw(np.random.default_rng(0)))
