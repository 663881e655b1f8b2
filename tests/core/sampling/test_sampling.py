"""The sampler against diffusers' scheduler, closed forms, and its own promises about batches, seeds and masks."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from chroma_core.errors import ConfigError
from chroma_core.model.latents import image_ids, pack, unpack
from chroma_core.sampling.recipe import RECIPES
from chroma_core.sampling.sampler import SamplingSettings, initial_noise, sample
from chroma_core.sampling.schedule import dynamic_mu, sampling_sigmas
from chroma_core.sampling.text import TextCondition
from miniature import transformer


def condition(tokens: int, seed: int) -> TextCondition:
    states = torch.randn(tokens, 32, generator=torch.Generator().manual_seed(seed))
    return TextCondition(states, f"prompt {seed}", tokens - 1)


RED, BLUE, EMPTY = condition(6, 1), condition(9, 2), condition(2, 3)


def run(positive=(RED,), negative=EMPTY, **options):
    settings = SamplingSettings(**{"steps": 6, "seed": 5} | options.pop("settings", {}))
    return sample(
        options.pop("model", None) or transformer(),
        list(positive),
        negative,
        width=64,
        height=96,
        settings=settings,
        **options,
    )


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_equals_diffusers_scheduler_and_module(guidance):
    model = transformer(3, 4)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / 25, 25).tolist(), mu=dynamic_mu(24))
    x = pack(torch.randn((1, 16, 12, 8), generator=torch.Generator().manual_seed(5)))
    ids = image_ids(12, 8)
    with torch.no_grad():
        for t in scheduler.timesteps:
            sigma = (t / 1000).float()[None]
            v = model(x, RED.states[None], sigma, ids)
            if guidance > 1:
                u = model(x, EMPTY.states[None], sigma, ids)
                v = u + guidance * (v - u)
            x = scheduler.step(v, t, x, return_dict=False)[0]
    ours = run(model=model, settings={"steps": 25, "guidance": guidance})
    assert ours.abs().mean() > 0.1
    assert (ours - unpack(x, 12, 8)).abs().max() <= 1e-4 * ours.abs().max()


def test_guidance_up_to_one_is_a_single_pass():
    assert torch.equal(run(settings={"guidance": 1.0}), run(negative=None, settings={"guidance": 1.0}))
    assert torch.equal(run(settings={"guidance": 0.0}), run(negative=None))
    assert not torch.equal(run(settings={"guidance": 1.5}), run(negative=None))


def test_a_batch_equals_its_singles():
    batch = run([RED, BLUE], settings={"seed": 5})
    assert (batch[:1] - run([RED], settings={"seed": 5})).abs().max() <= 1e-5
    assert (batch[1:] - run([BLUE], settings={"seed": 6})).abs().max() <= 1e-5


def test_noise_is_fp32_from_the_seed_on_the_cpu():
    expected = torch.randn((1, 16, 4, 4), generator=torch.Generator().manual_seed(9))
    noise = initial_noise([9, 10], (16, 4, 4))
    assert torch.equal(noise[:1], expected) and not torch.equal(noise[1:], expected)
    assert torch.equal(run(), run())


def test_the_global_random_state_is_neither_read_nor_moved():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = run()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(run(), first)


class Flow(torch.nn.Module):
    """The exact velocity field of one point: v = (x − x₀)/σ. Euler and Heun must land on x₀ whatever the steps."""

    def __init__(self, target):
        super().__init__()
        self.x_embedder = torch.nn.Linear(1, 1)
        self.target = pack(target)

    def at_step(self, place):
        pass

    def modulation(self, sigma):
        return sigma[:, None, None]

    def forward(self, latents, text, sigma, ids, mask, modulation):
        return (latents - self.target) / sigma[:, None, None]


@pytest.mark.parametrize("method", ["euler", "heun"])
@pytest.mark.parametrize("settings", [{}, {"tail_bias": 0.7}, {"flow_shift": 3.0}, {"steps": 1}])
def test_the_straight_flow_is_integrated_exactly(method, settings):
    target = torch.randn(1, 16, 12, 8)
    x = run(model=Flow(target), negative=None, settings={"method": method, **settings})
    assert (x - target).abs().max() <= 1e-5


class Curved(Flow):
    """v = σ·x, whose exact solution from σ = 1 is x(σ) = x(1)·exp((σ² − 1)/2)."""

    def forward(self, latents, text, sigma, ids, mask, modulation):
        return latents * sigma[:, None, None]


def test_heun_is_second_order():
    """Halving the step divides Euler's error by about 2 and Heun's by about 4."""
    noise = initial_noise([5], (16, 12, 8))
    exact = noise * torch.exp(torch.tensor((0.25**2 - 1) / 2)) / (1 - 0.25)  # noise left: x / (1 − σ)

    def error(method, steps):
        sigmas = torch.linspace(1, 0.25, steps + 1)
        x = run(model=Curved(noise), negative=None, sigmas=sigmas, settings={"method": method})
        return (x - exact).abs().mean()

    assert error("euler", 8) / error("euler", 16) == pytest.approx(2, rel=0.1)
    assert error("heun", 8) / error("heun", 16) == pytest.approx(4, rel=0.1)


def test_image_to_image_starts_from_the_image():
    start = torch.randn(1, 16, 12, 8)
    sigmas = sampling_sigmas(6, 24, denoise=0.3)
    seen = []
    run(start_BCHW=start, settings={"denoise": 0.3}, on_step=lambda info: seen.append(info.sigma))
    assert seen == pytest.approx(sigmas[1:].tolist())
    barely = run(start_BCHW=start, sigmas=torch.tensor([0.001, 0.0]))
    assert (barely - start).abs().max() < 0.05


def test_inpainting_keeps_what_is_masked_out():
    start = torch.randn(1, 16, 12, 8)
    mask = torch.zeros(1, 12, 8)
    mask[:, :6] = 1
    x = run(start_BCHW=start, noise_mask_BHW=mask)
    assert (x[:, :, 6:] - start[:, :, 6:]).abs().max() <= 1e-6
    assert (x[:, :, :6] - start[:, :, :6]).abs().mean() > 0.1


def test_progress_and_interruption():
    seen = []

    def stop_at_three(info):
        seen.append((info.step, info.steps, info.denoised_BCHW.shape))
        if info.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(on_step=stop_at_three)
    assert seen == [(i, 6, (1, 16, 12, 8)) for i in (1, 2, 3)]


def test_recipes_change_the_image_and_tail_bias_too():
    plain = run()
    assert not torch.equal(plain, run(recipe=RECIPES["ai-toolkit"]))
    assert not torch.equal(plain, run(settings={"tail_bias": 0.5}))
    assert torch.equal(
        plain, run(recipe=RECIPES["diffusers"])
    )  # the same numbers when the model is fp32 and 64×96 fits


@pytest.mark.parametrize(
    "bad",
    [
        {"settings": {"steps": 0}},
        {"settings": {"guidance": -1.0}},
        {"settings": {"seed": -1}},
        {"settings": {"method": "dpm"}},
        {"positive": []},
        {"positive": [RED, BLUE], "negative": [EMPTY, EMPTY, EMPTY]},
        {"start_BCHW": torch.zeros(1, 16, 8, 8)},
    ],
)
def test_bad_values_are_named(bad):
    with pytest.raises(ConfigError):
        run(**bad)
