"""The transformer against diffusers' own, and its masks, its time and its gradients."""

import pytest
import torch
from diffusers import ChromaTransformer2DModel
from diffusers.pipelines.chroma.pipeline_chroma import ChromaPipeline

from chroma_core.errors import ConfigError
from chroma_core.model.latents import LatentFormat, image_ids, pack, snap_size, unpack
from miniature import WIDTHS, t5, transformer

IDS = image_ids(8, 12)


def inputs(B: int = 2, T: int = 7, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(B, 24, 64, generator=generator)
    text = torch.randn(B, T, 32, generator=generator)
    return latents, text, torch.tensor([0.3, 0.9])[:B]


@pytest.mark.parametrize(("layers", "single_layers"), [(2, 3), (19, 38)])
def test_equals_diffusers_on_an_unpadded_prompt(layers, single_layers):
    model = transformer(layers, single_layers)
    reference = ChromaTransformer2DModel(num_layers=layers, num_single_layers=single_layers, **WIDTHS).eval()
    reference.load_state_dict(model.state_dict())
    latents, text, sigma = inputs()
    with torch.no_grad():
        ours = model(latents, text, sigma, IDS)
        theirs = reference(latents, text, sigma, IDS, torch.zeros(7, 3), return_dict=False)[0]
    assert ours.abs().mean() > 0.1
    assert (ours - theirs).abs().max() <= 1e-5


@pytest.mark.parametrize("visible", [1, 3, 6])
def test_each_ragged_row_equals_its_solo_run(visible):
    model = transformer(3, 4)
    latents, text, sigma = inputs()
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, visible:] = False
    text = text.masked_fill(~mask[..., None], 1e4)  # what stands in masked places must not matter
    with torch.no_grad():
        both = model(latents, text, sigma, IDS, mask)
        first = model(latents[:1], text[:1, :visible], sigma[:1], IDS)
        second = model(latents[1:], text[1:], sigma[1:], IDS)
    assert (both[:1] - first).abs().max() <= 1e-5
    assert (both[1:] - second).abs().max() <= 1e-5


def test_trimmed_equals_masked_512():
    """n+1 tokens through T5 and transformer = 512 tokens, padded and masked (T5: n visible; transformer: n+1)."""
    encoder, model, n = t5(), transformer(3, 4), 9
    tokens = torch.randint(2, 64, (1, 512), generator=torch.Generator().manual_seed(3))
    tokens[:, n:] = 0
    positions = torch.arange(512)[None]
    latents, _, sigma = inputs(1)
    with torch.no_grad():
        long = encoder(tokens, positions < n)
        short = encoder(tokens[:, : n + 1], positions[:, : n + 1] < n)
        masked = model(latents, long, sigma, IDS, positions <= n)
        trimmed = model(latents, short, sigma, IDS)
    assert (masked - trimmed).abs().max() <= 1e-5


@pytest.mark.parametrize("masked", [False, True])
def test_gradient_checkpointing_changes_nothing(masked):
    latents, text, sigma = inputs()
    mask = None
    if masked:
        mask = torch.ones(2, 7, dtype=torch.bool)
        mask[1, 3:] = False
    results = []
    for checkpointing in (False, True):
        model = transformer(2, 3).requires_grad_(True)
        model.checkpointing_interval = int(checkpointing)
        output = model(latents, text, sigma, IDS, mask)
        output.square().mean().backward()
        results.append((output.detach(), {name: p.grad for name, p in model.named_parameters()}))
    (plain, plain_gradients), (saved, saved_gradients) = results
    assert torch.equal(plain, saved)
    for name, gradient in plain_gradients.items():
        assert gradient is not None and torch.equal(gradient, saved_gradients[name]), name


def test_time_is_embedded_in_fp32_even_when_the_model_is_bf16():
    """bf16 has 126 distinct times in [½, 1]; two that it cannot tell apart must still give different modulations."""
    model = transformer().to(torch.bfloat16)
    a, b = torch.tensor([0.7031]), torch.tensor([0.7041])
    assert a.bfloat16() == b.bfloat16()
    with torch.no_grad():
        assert not torch.equal(model.modulation(a), model.modulation(b))
        exact = transformer().modulation(a)
    assert (model.modulation(a).float() - exact).abs().max() < 0.05 * exact.abs().max()


def test_modulation_table_can_be_reused():
    model = transformer()
    latents, text, sigma = inputs()
    with torch.no_grad():
        assert torch.equal(
            model(latents, text, sigma, IDS), model(latents, text, sigma, IDS, None, model.modulation(sigma))
        )


def test_the_real_model_on_meta():
    with torch.device("meta"):
        from chroma_core.model.transformer import ChromaTransformer

        model = ChromaTransformer()
    assert sum(p.numel() for p in model.parameters()) == 8_899_983_424
    assert model.modulation_vectors == 344
    assert not [name for name, _ in model.named_buffers()]


def test_a_configuration_builds_the_same_model():
    model = transformer(3, 4)
    again = type(model)(**vars(model.config))
    assert {name: p.shape for name, p in again.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


def test_packing_equals_diffusers():
    x = torch.randn(2, 16, 8, 12)
    tokens = pack(x)
    assert torch.equal(tokens, ChromaPipeline._pack_latents(x, 2, 16, 8, 12))
    assert torch.equal(IDS, ChromaPipeline._prepare_latent_image_ids(2, 4, 6, torch.device("cpu"), torch.float32))
    assert torch.equal(unpack(tokens, 8, 12), x)


def test_sizes_are_floored_and_scale_is_undone():
    assert snap_size(1000, 95) == (992, 64)
    assert snap_size(1000, 95, 16) == (992, 80)
    for bad in ((0, 64), (64, 31), (5000, 64), (-64, 64)):
        with pytest.raises(ConfigError, match="between"):
            snap_size(*bad)
    z = torch.randn(1, 16, 4, 4)
    assert torch.allclose(LatentFormat().to_model(z), (z - 0.1159) * 0.3611)
    assert torch.allclose(LatentFormat().to_vae(LatentFormat().to_model(z)), z, atol=1e-6)
