"""The objective's formulas against closed forms, scipy and finite definitions."""

import math
from itertools import permutations

import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding
from scipy import stats

from chroma_core.data.cache import LatentTextCache
from chroma_core.errors import ConfigError
from chroma_core.model.latents import image_ids
from chroma_core.sampling.recipe import CANONICAL, RECIPES
from chroma_core.sampling.text import TextEncoder, batch_conditions, zero_padded
from chroma_core.training.config import ObjectiveConfig
from chroma_core.training.step.objective import draw_noise, loss, pair_noise, squared_errors
from miniature import t5, tokenizer, transformer


def pair(B: int = 3, seed: int = 0, size: int = 6):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(B, 4, size, size, generator=generator).requires_grad_(),
        torch.randn(B, 4, size, size, generator=generator),
    )


def test_pseudo_huber_is_the_squared_error_for_small_errors_and_linear_for_large_ones():
    delta, zero = 0.1, torch.zeros(1)

    def huber(a: float) -> float:
        return squared_errors(torch.tensor([a], dtype=torch.float32), zero, "huber", delta).item()

    for a in (0.01, 0.05, 0.1, 0.7, 3.0):
        assert huber(a) == pytest.approx(2 * delta**2 * (math.sqrt(1 + (a / delta) ** 2) - 1), rel=1e-5)
        assert huber(-a) == huber(a)
    for a in (1e-6, 1e-4, 1e-3, 1e-2):  # the first term that it leaves out of a² is a⁴/4δ²
        assert huber(a) == pytest.approx(a**2, rel=(a / delta) ** 2 / 4 + 1e-6)
    assert (huber(201.0) - huber(200.0)) == pytest.approx(2 * delta, rel=1e-3)
    assert squared_errors(torch.tensor([3.0]), zero).item() == 9.0


def test_huber_gradient_is_bounded_and_right():
    prediction, target = pair()
    loss(prediction, target, "huber", 0.2).backward()
    a = (prediction - target).detach()
    expected = 2 * a / (1 + (a / 0.2) ** 2).sqrt() / a.numel()
    assert prediction.grad is not None and torch.allclose(prediction.grad, expected, atol=1e-7)
    assert prediction.grad.abs().max() < 2 * 0.2 / a.numel()


@pytest.mark.parametrize("kind", ["mse", "huber"])
def test_a_full_mask_is_no_mask_bit_for_bit(kind):
    results = []
    for mask in (None, torch.ones(3, 1, 6, 6)):
        prediction, target = pair()
        value = loss(prediction, target, kind, 0.1, mask)
        value.backward()
        results.append((value.detach(), prediction.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_a_mask_weights_the_error_and_each_sample_counts_the_same():
    prediction, target = pair()
    mask = torch.zeros(3, 1, 6, 6)
    mask[0, :, :2, :2], mask[1, :, 3:], mask[2] = 1.0, 0.5, 0.25
    value = loss(prediction, target, mask_B1HW=mask)
    errors = (prediction - target).detach().square()
    rows = [errors[0, :, :2, :2].mean(), errors[1, :, 3:].mean(), errors[2].mean()]
    assert value.item() == pytest.approx(sum(row.item() for row in rows) / 3, rel=1e-6)
    value.backward()
    assert prediction.grad is not None and not prediction.grad[0, :, 2:].any() and not prediction.grad[1, :, :3].any()
    with torch.no_grad():  # whatever happens outside
        moved = prediction.clone()
        moved[0, :, 2:] += 100
        assert loss(moved, target, mask_B1HW=mask).item() == value.item()


def test_a_black_mask_adds_nothing():
    prediction, target = pair(2)
    mask = torch.ones(2, 1, 6, 6)
    mask[0] = 0
    value = loss(prediction, target, mask_B1HW=mask)
    assert value.item() == pytest.approx(loss(prediction[1:], target[1:]).item() / 2, rel=1e-6)


def test_weights_are_those_of_samples():
    prediction, target = pair(2)
    rows = [loss(prediction[i : i + 1], target[i : i + 1]).item() for i in range(2)]
    value = loss(prediction, target, weight_B=torch.tensor([0.3, 1.0]))
    assert value.item() == pytest.approx((0.3 * rows[0] + rows[1]) / 2, rel=1e-6)


def test_paired_noise_is_the_closest_order_of_the_same_noise():
    generator = torch.Generator().manual_seed(1)
    x0, noise = torch.randn(6, 2, 2, 2, generator=generator), torch.randn(6, 2, 2, 2, generator=generator)
    paired = pair_noise(x0, noise)
    distances = (x0[:, None] - noise[None]).double().square().sum(dim=(2, 3, 4))
    best = min(permutations(range(6)), key=lambda order: distances[range(6), order].sum().item())
    assert torch.equal(paired, noise[list(best)])
    assert (x0 - paired).square().sum() < (x0 - noise).square().sum()
    assert torch.equal(pair_noise(x0[:1], noise[:1]), noise[:1])


def test_noise_offset_is_one_constant_a_channel_beside_the_same_noise():
    plain = draw_noise((16, 8, 8), 42, 3, 1)
    shift = draw_noise((16, 8, 8), 42, 3, 1, offset=0.1) - plain
    assert torch.allclose(shift, shift[:, :1, :1].expand_as(shift), atol=1e-6)
    shifts = torch.cat(
        [
            (draw_noise((16, 1, 1), 42, step, 0, 0.1) - draw_noise((16, 1, 1), 42, step, 0)).flatten() / 0.1
            for step in range(100)
        ]
    )
    assert stats.kstest(shifts.numpy(), "norm").pvalue > 0.01
    assert not torch.equal(plain, draw_noise((16, 8, 8), 42, 3, 2))


def test_guidance_enters_the_modulation_and_none_is_zero():
    model = transformer()
    sigma, guidance = torch.tensor([0.3, 0.3]), torch.tensor([0.0, 3.5])
    with torch.no_grad():
        plain, guided = model.modulation(sigma), model.modulation(sigma, guidance)
        assert torch.equal(plain, model.modulation(sigma, torch.zeros(2))) and torch.equal(plain[0], guided[0])
        assert (plain[1] - guided[1]).abs().max() > 1e-3
        seen = []
        hook = model.distilled_guidance_layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        model.modulation(sigma, guidance)
        hook.remove()
        channels = model.config.approximator_num_channels // 4
        expected = get_timestep_embedding(1000 * guidance, channels, flip_sin_to_cos=True, downscale_freq_shift=0)
        assert torch.equal(seen[0][:, 5, channels : 2 * channels], expected)
        latents, text, ids = torch.randn(2, 24, 64), torch.randn(2, 4, 32), image_ids(8, 12)
        assert torch.equal(
            model(latents, text, sigma, ids, guidance_B=guidance), model(latents, text, sigma, ids, None, guided)
        )
        assert torch.equal(
            model(latents, text, sigma, ids, guidance_B=torch.zeros(2)), model(latents, text, sigma, ids)
        )


def test_text_padding():
    encoder, n = TextEncoder(t5(), tokenizer()), 4
    trim, unmodified = encoder.encode("a red circle"), encoder.with_padding().encode("a red circle")
    zero = zero_padded(trim)
    assert (trim.states.shape, zero.states.shape, unmodified.states.shape) == ((5, 32), (512, 32), (512, 32))
    assert torch.equal(zero.states[:n], trim.states[:n]) and not zero.states[n:].any()
    ids = torch.tensor([[3, 4, 7, 1] + [0] * 508])
    with torch.no_grad():
        long = encoder.model(ids, ids != 0)[0]
    assert (unmodified.states - long).abs().max() <= 1e-5 and unmodified.states[n:].abs().min(dim=1).values.max() > 0
    assert batch_conditions([zero, zero_padded(encoder.encode(""))])[1] is None, "all 512 are visible"
    for name in ("comfyui", "canonical"):  # T5 does not look at padding, kept or not
        kept = encoder.with_padding().encode("a red circle", RECIPES[name])
        assert (kept.states[:n] - trim.states[:n]).abs().max() <= 1e-5 and kept.states.shape[0] == 512
    full = encoder.with_padding().encode("a red circle", RECIPES["ai-toolkit"])
    assert torch.equal(full.states[:5], encoder.encode("a red circle", RECIPES["ai-toolkit"]).states)
    assert zero_padded(encoder.encode("red " * 600)).states.shape == (512, 32)


def test_kept_padding_has_cache_entries_of_its_own(tmp_path):
    """As training with `unmodified` sets it up: another text key, and the encoder with its padding kept."""
    encoder = TextEncoder(t5(), tokenizer())
    plain = LatentTextCache(tmp_path, "vae", "text", CANONICAL)
    kept = LatentTextCache(tmp_path, "vae", "text unmodified", CANONICAL)
    plain.add_text("a red circle", encoder)
    kept.add_text("a red circle", encoder.with_padding())
    assert plain.text_path("a red circle") != kept.text_path("a red circle")
    assert plain.text("a red circle").states.shape == (5, 32) and kept.text("a red circle").states.shape == (512, 32)
    assert kept.text("a red circle").real_tokens == 4


@pytest.mark.parametrize(
    "bad",
    [
        {"loss": "l1"},
        {"guidance": "random"},
        {"text_padding": "none"},
        {"huber_delta": 0.0},
        {"prior_weight": -1.0},
        {"noise_offset": math.nan},
        {"guidance_range": (2.0, 1.0)},
    ],
)
def test_bad_settings_are_named(bad):
    with pytest.raises(ConfigError):
        ObjectiveConfig.parse(bad)
