"""The recipe `comfyui` is ComfyUI: its own Chroma, guider and samplers on the same inputs give the same latents."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import native_sampling
from chroma_core.model.latents import FLUX_LATENTS
from chroma_core.model.transformer import ChromaTransformer
from chroma_core.names.transformer import to_original
from chroma_core.sampling.recipe import RECIPES
from chroma_core.sampling.sampler import SamplingSettings, initial_noise, sample
from chroma_core.sampling.schedule import dynamic_mu, sampling_sigmas
from chroma_core.sampling.text import TextEncoder
from miniature import REAL_DEPTH, real_depth, t5, tokenizer

COMFYUI = RECIPES["comfyui"]
H, W, SEED, GUIDANCE = 6, 4, 5, 3.0
TOKENS = H * W // 4
HOST_T5 = {
    "d_ff": 64, "d_kv": 16, "d_model": 32, "dense_act_fn": "gelu_pytorch_tanh", "is_gated_act": True, "num_heads": 2,
    "num_layers": 2, "vocab_size": 64, "model_type": "t5",
}  # fmt: skip

PLAIN = SamplingSettings(4, GUIDANCE, SEED, spacing="beta")
CASES: dict[str, tuple[SamplingSettings, str]] = {
    "text": (SamplingSettings(25, GUIDANCE, SEED), "nothing"),
    "heun": (SamplingSettings(4, GUIDANCE, SEED, method="heun"), "nothing"),
    "dpmpp_2m": (SamplingSettings(6, GUIDANCE, SEED, method="dpmpp_2m"), "nothing"),
    "beta": (PLAIN, "nothing"),
    "picture": (SamplingSettings(4, GUIDANCE, SEED, denoise=0.5), "picture"),
    "hard mask": (SamplingSettings(4, GUIDANCE, SEED), "hard"),
    "soft mask": (SamplingSettings(5, GUIDANCE, SEED), "soft"),
    "soft mask, dpmpp_2m": (SamplingSettings(5, GUIDANCE, SEED, method="dpmpp_2m"), "soft"),
    "mask of another size": (SamplingSettings(4, GUIDANCE, SEED, denoise=0.7), "large"),
    "first part": (SamplingSettings(6, GUIDANCE, SEED, end_step=3), "nothing"),
    "second part": (SamplingSettings(6, GUIDANCE, SEED, start_step=3, add_noise=False), "picture"),
    "batch": (SamplingSettings(3, GUIDANCE, SEED, denoise=0.6), "batch"),
}


@pytest.fixture(scope="module")
def model() -> ChromaTransformer:
    """19 + 38 blocks of width 32, with weights large enough that every block matters."""
    return real_depth()


def encoder() -> TextEncoder:
    return TextEncoder(t5(), tokenizer())


def start(kind: str) -> tuple[Tensor, Tensor | None]:
    """Latents in VAE space to start from and a noise mask, as LATENT sockets carry them."""
    generator = torch.Generator().manual_seed(3)
    latent = torch.randn(2 if kind == "batch" else 1, 16, H, W, generator=generator)
    hard = torch.zeros(1, H, W)
    hard[:, : H // 2] = 1
    masks = {
        "hard": hard,
        "soft": torch.rand(1, H, W, generator=generator),
        "large": torch.rand(1, 8 * H, 8 * W, generator=generator).round(),
        "batch": torch.rand(2, H, W, generator=generator),
    }
    return (torch.zeros_like(latent) if kind == "nothing" else latent), masks.get(kind)


@pytest.fixture(scope="module")
def theirs(model, tmp_path_factory) -> dict[str, Tensor]:
    texts = encoder()
    positive, negative = (texts.encode(text, COMFYUI).states[None] for text in ("a red circle", ""))
    runs = {}
    for name, (settings, kind) in CASES.items():
        latent, mask = start(kind)
        noise = initial_noise([SEED + i for i in range(len(latent))], (16, H, W))
        runs[name] = {
            "sampler": settings.method,
            "cfg": GUIDANCE,
            "sigmas": settings.sigmas(TOKENS, COMFYUI),
            "noise": noise if settings.add_noise else torch.zeros_like(noise),
            "latent": latent,
            "positive": positive,
            "negative": negative,
            **({} if mask is None else {"mask": mask}),
        }
    schedules = {f"beta {steps}": (dynamic_mu(1024), steps) for steps in (1, 4, 25, 150, 600)}
    ids = torch.tensor([texts.tokenizer("a red circle").input_ids])
    weights = to_original(model.state_dict(), norm_leaf="weight")
    folder = tmp_path_factory.mktemp("host") / "sampling"
    return native_sampling.sample(
        folder, REAL_DEPTH, weights, runs, schedules, (HOST_T5, dict(texts.model.state_dict()), ids)
    )


def ours(model: ChromaTransformer, name: str, recipe=COMFYUI) -> Tensor:
    """The core's latents, brought into VAE space as the node does it."""
    settings, kind = CASES[name]
    latent, mask = start(kind)
    if mask is not None:
        mask = torch.nn.functional.interpolate(mask[:, None], size=(H, W), mode="bilinear")[:, 0]
    texts = encoder()
    x = sample(
        model,
        [texts.encode("a red circle", recipe)] * len(latent),
        texts.encode("", recipe),
        width=8 * W,
        height=8 * H,
        settings=settings,
        recipe=recipe,
        start_BCHW=FLUX_LATENTS.to_model(latent) if latent.count_nonzero() else None,
        noise_mask_BHW=mask,
    )
    return FLUX_LATENTS.to_vae(x)


@pytest.mark.parametrize("name", CASES)
def test_the_recipe_comfyui_is_the_host(model, theirs, name):
    result, expected = ours(model, name), theirs[name]
    error = float((result - expected).abs().max() / expected.abs().max())
    print(f"{name}: {error:.1e}")
    assert error <= 1e-4 and expected.std() > 0.5


def test_each_thing_that_a_case_is_about_matters(model, theirs):
    """The comparison could fail: another method, mask or recipe is further away than the tolerance."""
    pad, time = COMFYUI.override({"visible_padding": 1}), COMFYUI.override({"multistep_time": "half_log_snr"})
    assert (ours(model, "beta", pad) - theirs["beta"]).abs().max() > 1e-3
    assert (ours(model, "dpmpp_2m", time) - theirs["dpmpp_2m"]).abs().max() > 1e-3
    assert (ours(model, "dpmpp_2m") - theirs["heun"]).abs().max() > 1e-3
    assert (theirs["soft mask"] - theirs["hard mask"]).abs().max() > 1e-2


def test_the_hosts_t5_gives_the_recipes_text(theirs):
    """No padding: n tokens with `</s>`, through the host's own T5."""
    states = encoder().encode("a red circle", COMFYUI).states
    assert theirs["t5"].shape == (1, 4, 32)
    assert (states - theirs["t5"][0]).abs().max() <= 1e-5


@pytest.mark.parametrize("steps", [1, 4, 25, 150])
def test_beta_spacing_is_the_hosts_beta_scheduler(theirs, steps):
    assert torch.allclose(sampling_sigmas(steps, 1024, spacing="beta"), theirs[f"beta {steps}"], atol=1e-6)


def test_above_500_steps_the_host_leaves_levels_out(theirs):
    assert len(theirs["beta 600"]) < 601
    tail = sampling_sigmas(60, 1024, spacing="beta", denoise=0.1)
    assert torch.allclose(tail, theirs["beta 600"][-61:], atol=1e-6)
