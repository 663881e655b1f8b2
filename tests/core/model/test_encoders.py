"""Text encoder and VAE against transformers and diffusers: the same names, and the same bits from the same weights."""

from __future__ import annotations

import pytest
import torch
import transformers
from diffusers import AutoencoderKL
from torch import nn

from chroma_core.loading.load import load_text_encoder, load_vae
from chroma_core.loading.spec import ModelSpec
from chroma_core.model.text_encoder import T5Encoder
from chroma_core.model.vae import Autoencoder
from chroma_core.parity.with_diffusers import text_encoder_of, theirs
from miniature import t5, vae

TINY = ModelSpec("tiny", precision="fp32", text_precision="fp32")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def shapes(module: nn.Module) -> list[tuple[str, torch.Size]]:
    return [(name, tensor.shape) for name, tensor in module.state_dict().items()]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "real"), [(7, 7), (300, 300), (512, 9)])
def test_the_text_encoder(dtype: torch.dtype, tokens: int, real: int):
    ours = load_text_encoder(TINY, "cpu").model.to(dtype)
    reference = theirs(text_encoder_of, ours)
    assert shapes(ours) == shapes(reference)
    ids = torch.randint(3, 880, (1, tokens), generator=torch.Generator().manual_seed(tokens))
    mask = torch.arange(tokens)[None] < real
    with torch.no_grad():
        expected = reference(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        assert as_theirs(ours(ids, mask), expected)


def as_theirs(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Bit for bit; before version 5 transformers added in another order, a few last digits away."""
    if int(transformers.__version__.partition(".")[0]) >= 5:
        return torch.equal(found, expected)
    near = 8 * torch.finfo(expected.dtype).eps
    return bool((found - expected).float().norm() <= near * expected.float().norm())


def test_half_precision_that_runs_over_stays_finite():
    """With weights that are too large for fp16, as T5-XXL's own are."""
    ours = t5().half()
    with torch.no_grad():
        ours.get_parameter("encoder.block.0.layer.1.DenseReluDense.wo.weight").mul_(3e4)
    ids = torch.arange(3, 11)[None]
    with torch.no_grad():
        found = ours(ids, torch.ones_like(ids))
        expected = theirs(text_encoder_of, ours)(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    assert found.isfinite().all() and as_theirs(found, expected)


def test_a_text_encoder_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="feed_forward_proj is 'relu'"):
        T5Encoder()


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("options", [{}, {"use_quant_conv": True, "use_post_quant_conv": True}])
@pytest.mark.parametrize("more", [{}, {"layers_per_block": 2, "mid_block_add_attention": False}])
def test_the_vae(dtype: torch.dtype, options: dict, more: dict):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ours = Autoencoder(**{**vars(vae().config), **options, **more}).to(dtype).eval()
    same_bits(ours, dtype)


def test_the_vae_of_tiny():
    same_bits(load_vae(TINY, "cpu"), torch.float32)


def same_bits(ours: Autoencoder, dtype: torch.dtype) -> None:
    reference = theirs(AutoencoderKL, ours)
    assert shapes(ours) == shapes(reference)
    pixels = torch.rand(2, 3, 96, 64, generator=torch.Generator().manual_seed(1)).to(dtype) * 2 - 1
    with torch.no_grad():
        found, expected = ours.encode(pixels), reference.encode(pixels).latent_dist
        assert torch.equal(found.mean, expected.mean) and torch.equal(found.std, expected.std)
        assert torch.equal(ours.decode(found.mean), reference.decode(expected.mean).sample)


@pytest.mark.parametrize("name", ["act_fn", "latents_mean", "down_block_types"])
def test_a_vae_of_another_kind_is_refused(name: str):
    with pytest.raises(ValueError, match=name):
        Autoencoder(**{**vars(vae().config), name: ("other",)})
