"""The solvers on a flow whose solution is known, against diffusers' DPM-Solver, and their promises about batches."""

import math

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from chroma_core.errors import ConfigError
from chroma_core.model.latents import pack
from chroma_core.sampling.recipe import CANONICAL, RECIPES
from chroma_core.sampling.sampler import SamplingSettings, initial_noise, sample
from chroma_core.sampling.schedule import sampling_sigmas
from chroma_core.sampling.solvers import SOLVERS, Method, UniPC
from chroma_core.sampling.text import TextCondition
from miniature import transformer

MEAN, DEVIATION = 0.3, 0.5
H, W, SEED = 8, 8, 5


def condition(tokens: int, seed: int) -> TextCondition:
    states = torch.randn(tokens, 32, generator=torch.Generator().manual_seed(seed))
    return TextCondition(states, f"prompt {seed}", tokens - 1)


RED, BLUE, EMPTY = condition(6, 1), condition(9, 2), condition(2, 3)


def run(model, positive=(RED,), negative=None, recipe=CANONICAL, sigmas=None, **settings) -> Tensor:
    values = SamplingSettings(**{"steps": 6, "seed": SEED} | settings)
    return sample(
        model, list(positive), negative, width=8 * W, height=8 * H, settings=values, recipe=recipe, sigmas=sigmas
    )


class Gaussian(torch.nn.Module):
    """The exact velocity when data is N(m, s²): x_σ is normal too, with variance (1−σ)²s² + σ²."""

    def __init__(self):
        super().__init__()
        self.x_embedder = torch.nn.Linear(1, 1)

    def at_step(self, place):
        pass

    def modulation(self, sigma):
        return sigma[:, None, None]

    def forward(self, latents, text, sigma, ids, mask, modulation):
        return velocity(latents, float(sigma[0]))


def velocity(x: Tensor, sigma: float) -> Tensor:
    """E[ε − x₀ | x]."""
    centred = (x - (1 - sigma) * MEAN) / ((1 - sigma) ** 2 * DEVIATION**2 + sigma**2)
    return sigma * centred - (MEAN + (1 - sigma) * DEVIATION**2 * centred)


def solution(x: Tensor, sigma: float) -> Tensor:
    """Where the flow takes `x` at σ = 1: its place in units of the deviation stays the same."""
    return (1 - sigma) * MEAN + math.sqrt((1 - sigma) ** 2 * DEVIATION**2 + sigma**2) * x


def order(method: Method, recipe: str, steps: int, first: float, last: float) -> float:
    """log2 of what halving the step divides the error by, from σ = `first` to `last`; fp64."""
    place = initial_noise([SEED], (16, H, W)).double()

    def error(n: int) -> float:
        levels = torch.linspace(first, last, n + 1, dtype=torch.float64).tolist()
        solver = SOLVERS[method](levels, velocity, RECIPES[recipe].multistep_time)
        x = solution(place, first)
        for i in range(n):
            x = solver.step(i, x, velocity(x, levels[i]))
        return float((x - solution(place, last)).abs().max())

    return math.log2(error(steps) / error(2 * steps))


ORDERS = [
    ("euler", "canonical", 1.0, 1.0),
    ("heun", "canonical", 2.0, 2.0),
    ("dpmpp_2m", "canonical", 2.0, 1.7),
    ("dpmpp_2m", "comfyui", 2.0, 1.8),
    ("unipc", "canonical", 3.0, 2.1),
]
"""Method, recipe, order between σ = .9 and .5, order over a whole run at 64 steps.

The multistep methods work along a λ that is infinite at σ = 0, the paper's at σ = 1 too, which costs a whole run a
factor of log N: 1.8 at 256 steps, 2 in the limit.
"""


@pytest.mark.parametrize(("method", "recipe", "inside", "whole"), ORDERS)
def test_order_of_convergence(method, recipe, inside, whole):
    assert order(method, recipe, 16, 0.9, 0.5) == pytest.approx(inside, abs=0.1)
    assert order(method, recipe, 64, 1.0, 0.0) == pytest.approx(whole, abs=0.15)


def test_second_order_pays_at_few_steps():
    exact = solution(initial_noise([SEED], (16, H, W)), 0.0)
    errors = {method: float((run(Gaussian(), method=method, steps=8) - exact).abs().mean()) for method in SOLVERS}
    assert max(errors["heun"], errors["dpmpp_2m"], errors["unipc"]) < errors["euler"] / 2


@pytest.mark.parametrize("settings", [{}, {"tail_bias": 0.7}, {"spacing": "beta"}, {"flow_shift": 3.0}, {"steps": 1}])
@pytest.mark.parametrize("method", SOLVERS)
def test_a_straight_flow_is_solved_exactly(method, settings):
    class Straight(Gaussian):
        def forward(self, latents, text, sigma, ids, mask, modulation):
            return (latents - target) / sigma[:, None, None]

    image = torch.randn(1, 16, H, W)
    target = pack(image)
    assert (run(Straight(), method=method, **settings) - image).abs().max() <= 2e-5


def test_dpmpp_2m_is_the_papers_as_diffusers_has_it():
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=2, flow_shift=3.0
    )
    scheduler.set_timesteps(20)
    assert scheduler.sigmas[0] < 1  # at 1 its λ would be infinite
    noise = initial_noise([SEED], (16, H, W))
    start = x = noise * float(scheduler.sigmas[0])
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(velocity(x, float(scheduler.sigmas[i])), t, x, return_dict=False)[0]
    ours = run(Gaussian(), method="dpmpp_2m", sigmas=scheduler.sigmas)
    assert torch.allclose(start, noise * scheduler.sigmas[0])
    assert (ours - x).abs().max() <= 1e-5
    assert (run(Gaussian(), method="euler", sigmas=scheduler.sigmas) - x).abs().max() > 1e-3


def test_unipc_takes_our_noise_levels():
    levels = sampling_sigmas(12, 16, tail_bias=0.5)
    whole = UniPC([float(s) for s in levels], velocity).scheduler.sigmas
    assert torch.equal(whole[1:], levels[1:]) and 0 < 1 - float(whole[0]) <= 2e-6
    part = sampling_sigmas(12, 16, denoise=0.6, end_step=8)
    assert torch.equal(UniPC([float(s) for s in part], velocity).scheduler.sigmas[:-1], part)
    with pytest.raises(ConfigError, match="noise levels that fall"):
        UniPC([0.5, 0.5, 0.0], velocity)


@pytest.mark.parametrize("method", SOLVERS)
def test_levels_closer_than_fp32_can_tell_are_no_number_trap(method):
    sigmas = torch.tensor([1.0, 1.0, 0.9, 0.9, 0.4, 0.0])
    if method == "unipc":
        sigmas = sigmas.unique().flip(0)
    assert torch.isfinite(run(Gaussian(), method=method, sigmas=sigmas)).all()


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("method", SOLVERS)
def test_a_batch_equals_its_singles(method, recipe):
    model, rules = transformer(), RECIPES[recipe]
    options = {"method": method, "steps": 4, "negative": EMPTY, "recipe": rules}
    batch = run(model, [RED, BLUE, RED], **options)
    singles = [run(model, [prompt], **options | {"seed": SEED + i}) for i, prompt in enumerate((RED, BLUE, RED))]
    # bf16 latents turn a last bit of fp32 into a last bit of bf16
    tolerance = 1e-5 if rules.latents_dtype == "fp32" or recipe == "diffusers" else 5e-2
    assert (batch - torch.cat(singles)).abs().max() <= tolerance
    assert (batch[0] - batch[2]).abs().max() > 0.5


@pytest.mark.parametrize("method", SOLVERS)
def test_a_mask_keeps_the_image_with_every_method(method):
    start, mask = torch.randn(2, 16, H, W), torch.zeros(2, H, W)
    mask[:, : H // 2] = 1
    mask[0, H // 2] = 0.4
    settings = SamplingSettings(4, 3.0, SEED, method=method)
    x = sample(
        transformer(), [RED, BLUE], EMPTY, width=8 * W, height=8 * H, settings=settings, start_BCHW=start,
        noise_mask_BHW=mask,
    )  # fmt: skip
    kept = mask[:, None].expand_as(x) == 0
    assert torch.equal(x[kept], start[kept])
    assert (x - start)[mask[:, None].expand_as(x) == 1].abs().mean() > 0.1


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_two_parts_are_the_whole_run(method):
    """Methods of one step; those that remember earlier steps start anew in the second part."""
    model, common = transformer(), {"width": 64, "height": 64, "recipe": CANONICAL}
    whole = sample(model, [RED], EMPTY, settings=SamplingSettings(6, 3.0, SEED, method=method), **common)
    first = sample(model, [RED], EMPTY, settings=SamplingSettings(6, 3.0, SEED, method=method, end_step=4), **common)
    rest = SamplingSettings(6, 3.0, SEED + 1, method=method, start_step=4, add_noise=False)
    second = sample(model, [RED], EMPTY, settings=rest, start_BCHW=first, **common)
    assert (second - whole).abs().max() <= 1e-5
    assert (first - whole).abs().max() > 0.1
    assert rest.run_steps == 2


@pytest.mark.parametrize(
    ("settings", "extra", "message"),
    [
        ({"start_step": 6}, {}, "none to run"),
        ({"start_step": 4, "end_step": 4}, {}, "none to run"),
        ({"start_step": -1}, {}, "none to run"),
        ({"spacing": "cosine"}, {}, "linear, beta"),
        ({"spacing": "beta", "steps": 1000}, {}, "different noise levels for 1000 steps"),
        ({"method": "dpm"}, {}, "euler, heun, dpmpp_2m, unipc"),
        ({"add_noise": False, "start_step": 3}, {}, "goes on from latents"),
        ({"add_noise": False}, {"start_BCHW": torch.ones(1, 16, 8, 8)}, "set start_step"),
        (
            {"add_noise": False, "start_step": 3},
            {"start_BCHW": torch.ones(1, 16, 8, 8), "noise_mask_BHW": torch.ones(1, 8, 8)},
            "noise mask",
        ),
        ({"steps": 1000, "end_step": 1, "tail_bias": 1.0, "flow_shift": 100.0}, {}, "pure noise"),
    ],
)
def test_what_cannot_be_is_refused(settings, extra, message):
    with pytest.raises(ConfigError, match=message):
        values = SamplingSettings(**{"steps": 6} | settings)
        sample(Gaussian(), [RED], None, width=64, height=64, settings=values, **extra)
