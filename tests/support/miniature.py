"""Random miniature models that tests share: real classes, real shapes, small widths."""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from chroma_core.model.text_encoder import T5Encoder
from chroma_core.model.transformer import ChromaTransformer
from chroma_core.model.vae import Autoencoder

WIDTHS = {
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "axes_dims_rope": (4, 6, 6),
    "approximator_num_channels": 8,
    "approximator_hidden_dim": 32,
    "approximator_layers": 1,
    "in_channels": 64,
}


def transformer(layers: int = 2, single_layers: int = 2, seed: int = 0) -> ChromaTransformer:
    """A random transformer of width 32, in eval mode, frozen, without touching the global random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ChromaTransformer(num_layers=layers, num_single_layers=single_layers, **WIDTHS)
    return model.requires_grad_(False).eval()


def t5(vocabulary: int = 64, width: int = 32, seed: int = 0) -> T5Encoder:
    """A random T5 encoder of two layers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = T5Encoder(
            vocab_size=vocabulary,
            d_model=width,
            d_kv=16,
            d_ff=64,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    return model.eval()


def vae(seed: int = 0) -> Autoencoder:
    """A random VAE with Flux's latent channels, scale and shift."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Autoencoder(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 8, 16, 16),
            layers_per_block=1,
            latent_channels=16,
            norm_num_groups=4,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    return model.eval()


def tokenizer() -> PreTrainedTokenizerFast:
    """Words of a small vocabulary, `</s>` at the end."""
    words = [
        "<pad>",
        "</s>",
        "<unk>",
        "a",
        "red",
        "blue",
        "green",
        "circle",
        "square",
        "on",
        "background",
        "sks",
        "photo",
    ]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    backend.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def write_model_folder(folder: Path, seed: int = 0) -> Path:
    """A whole random model in diffusers layout, as its own libraries write it."""
    from chroma_core.parity import with_diffusers as reference

    reference.theirs(reference.ChromaTransformer2DModel, transformer(seed=seed)).save_pretrained(folder / "transformer")
    reference.theirs(reference.text_encoder_of, t5(seed=seed)).save_pretrained(folder / "text_encoder")
    reference.theirs(reference.AutoencoderKL, vae(seed)).save_pretrained(folder / "vae")
    tokenizer().save_pretrained(folder / "tokenizer")
    (folder / "model_index.json").write_text('{"_class_name": "ChromaPipeline"}')
    return folder


REAL_DEPTH = {
    **WIDTHS,
    "num_layers": 19,
    "num_single_layers": 38,
    "approximator_num_channels": 64,
    "approximator_layers": 5,
}
"""Chroma 1's depth at small widths, for comparisons with the host: at any other depth its forward differs, because it
hard-codes 344 modulation rows, and 64 approximator channels."""


def real_depth(layers: int = 19, single_layers: int = 38) -> ChromaTransformer:
    """19 + 38 blocks of width 32, with weights large enough that every block matters; frozen."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        built = ChromaTransformer(**{**REAL_DEPTH, "num_layers": layers, "num_single_layers": single_layers})
        torch.nn.init.normal_(built.distilled_guidance_layer.out_proj.weight, std=0.05)
    return built.requires_grad_(False).eval()
