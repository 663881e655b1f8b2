"""What a file that is not Chroma's is instead: the names by which other models give themselves away.

A table from most to least telling. Every pattern was taken from the named model's own parameter names. It fits at the
start of a name or after a dot, so that any prefix may stand before it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["adapter", "transformer", "text_encoder", "vae", "other"]
Shape = tuple[int, ...]

USE_APPLY_LORA = "A LoRA changes a model but is none: load it with the node Chroma Apply LoRA (folder models/loras)."
PIXEL_SPACE = "Radiance paints pixels instead of latents; pixel space is not supported, only Chroma 1 is."


@dataclass(frozen=True)
class Foreign:
    """One kind of foreign file.

    title: for people, with its article. layout: as in `Identity`. pattern: a name that only it has. fits: what the
    tensor's shape must be in addition. remedy: a sentence on what to do with the file, where there is something to do.
    """

    kind: Kind
    title: str
    layout: str
    pattern: re.Pattern[str]
    fits: Callable[[Shape], bool] | None = None
    remedy: str = ""


def _foreign(
    kind: Kind,
    title: str,
    pattern: str,
    layout: str = "original",
    fits: Callable[[Shape], bool] | None = None,
    remedy: str = "",
) -> Foreign:
    return Foreign(kind, title, layout, re.compile(rf"(?:^|\.)(?:{pattern})"), fits, remedy)


def _is_3d_convolution(shape: Shape) -> bool:
    return len(shape) == 5


def _channels(axis: int, count: int) -> Callable[[Shape], bool]:
    return lambda shape: len(shape) == 4 and shape[axis] == count


_ADAPTER = (
    r"lora_[AB]\b|lora_(?:up|down|mid)\b|lora\.(?:up|down)\.|\w+_lora\.(?:up|down)|lora_(?:unet|te\d?|transformer)_"
    r"|lokr_w[12]|hada_[wt][12]|oft_(?:blocks|diag|R)|dora_scale|lora_magnitude_vector|diff_b?$|lora_linear_layer\."
)

FOREIGN: tuple[Foreign, ...] = (
    Foreign("adapter", "a LoRA", "adapter", re.compile(rf"(?:^|\.)(?:{_ADAPTER})"), remedy=USE_APPLY_LORA),
    _foreign(
        "adapter", "a ControlNet", r"controlnet_\w*blocks\.|controlnet_x_embedder|control_model\.|input_hint_block"
    ),
    _foreign("adapter", "an IP-Adapter", r"ip_adapter\.|ip_adapter_\w+\.|image_proj\w*\.|ip_layers\."),
    _foreign(
        "transformer",
        "Chroma Radiance (pixel space)",
        r"nerf_blocks\.|nerf_image_embedder\.|nerf_final_layer|img_in_patch\.",
        remedy=PIXEL_SPACE,
    ),
    _foreign(
        "transformer", "a Flux 2 transformer", r"single_transformer_blocks\.\d+\.attn\.to_qkv_mlp_proj", "diffusers"
    ),
    _foreign("transformer", "a Flux 2 transformer", r"double_stream_modulation_(?:img|txt)\."),
    _foreign("transformer", "a HunyuanVideo transformer", r"txt_in\.individual_token_refiner\."),
    _foreign(
        "transformer",
        "a Flux transformer",
        r"(?:double_blocks\.\d+\.(?:img|txt)_mod|single_blocks\.\d+\.modulation)\.",
    ),
    _foreign("transformer", "a Flux transformer", r"(?:vector_in|guidance_in|time_in)\.in_layer\."),
    _foreign("transformer", "an AuraFlow transformer", r"joint_transformer_blocks\.\d+\.", "diffusers"),
    _foreign("transformer", "an AuraFlow transformer", r"double_layers\.\d+\.attn\.w1q"),
    _foreign("transformer", "a Stable Diffusion 3 model", r"joint_blocks\.\d+\.context_block\."),
    _foreign("transformer", "a Stable Diffusion 3 transformer", r"pos_embed\.pos_embed$", "diffusers"),
    _foreign("transformer", "a Flux transformer", r"single_transformer_blocks\.\d+\.norm\.linear\.", "diffusers"),
    _foreign("transformer", "a Flux transformer", r"transformer_blocks\.\d+\.norm1_context\.linear\.", "diffusers"),
    _foreign("transformer", "a Qwen-Image transformer", r"transformer_blocks\.\d+\.(?:img|txt)_mod\.", "diffusers"),
    _foreign(
        "transformer",
        "a Stable Diffusion XL checkpoint",
        r"label_emb\.0\.0\.|conditioner\.embedders\.\d+\.(?:transformer|model)\.",
    ),
    _foreign("transformer", "a Stable Diffusion XL UNet", r"add_embedding\.linear_1\.", "diffusers"),
    _foreign("transformer", "a Stable Diffusion checkpoint (1.x or 2.x)", r"(?:input|output)_blocks\.\d+\.\d+\."),
    _foreign(
        "transformer",
        "a Stable Diffusion UNet",
        r"(?:down|up)_blocks\.\d+\.attentions\.\d+\.transformer_blocks\.",
        "diffusers",
    ),
    _foreign("transformer", "a Wan transformer", r"blocks\.\d+\.cross_attn\.norm_q\."),
    _foreign("transformer", "a PixArt or LTX transformer", r"adaln_single\.|t_block\.1\.", "diffusers"),
    _foreign("transformer", "a Lumina 2 or Z-Image transformer", r"noise_refiner\.\d+\."),
    _foreign("transformer", "a HiDream transformer", r"(?:double|single)_stream_blocks\.\d+\.block\."),
    _foreign("transformer", "a Stable Cascade model", r"clip_txt_mapper\.|clip_mapper\.|clf\.1\."),
    _foreign("transformer", "a Mochi transformer", r"t5_yproj\."),
    _foreign("transformer", "a Hunyuan-DiT transformer", r"mlp_t5\.0\."),
    _foreign("transformer", "a Cosmos transformer", r"blocks\.block\d+\.blocks\.|blocks\.\d+\.mlp\.layer1\."),
    _foreign("transformer", "a Kandinsky transformer", r"visual_transformer_blocks\.\d+\."),
    _foreign(
        "text_encoder",
        "a UMT5 text encoder",
        r"encoder\.block\.1\.layer\.0\.SelfAttention\.relative_attention_bias\.",
        "huggingface",
    ),
    _foreign("text_encoder", "a UMT5 text encoder", r"enc\.blk\.1\.attn_rel_b\.", "llama.cpp"),
    _foreign(
        "text_encoder",
        "a T5 encoder of version 1.0, whose feed-forward layers have no gate",
        r"encoder\.block\.\d+\.layer\.1\.DenseReluDense\.wi\.",
        "huggingface",
    ),
    _foreign(
        "text_encoder",
        "a CLIP text encoder",
        r"text_model\.(?:encoder|embeddings)\.|resblocks\.\d+\.attn\.|text_projection",
        "huggingface",
    ),
    _foreign("text_encoder", "a language model", r"layers\.\d+\.self_attn\.[qk]_(?:proj|norm)\.", "huggingface"),
    _foreign("text_encoder", "a language model", r"(?<!enc\.)(?<!dec\.)blk\.\d+\.attn_(?:q|k|qkv)\.", "llama.cpp"),
    _foreign("vae", "a Flux 2 VAE (32 latent channels)", r"decoder\.conv_in\.weight$", "ldm", _channels(1, 32)),
    _foreign(
        "vae",
        "a Stable Diffusion VAE (4 latent channels)",
        r"decoder\.conv_in\.weight$",
        "ldm",
        _channels(1, 4),
    ),
    _foreign("vae", "a video VAE (3-D convolutions)", r"conv\w*\.weight$", "ldm", _is_3d_convolution),
    _foreign("vae", "a video VAE (3-D convolutions)", r"encoder\.downsamples\.\d+\.", "original"),
    _foreign("vae", "a tiny preview VAE (TAESD)", r"taesd_(?:en|de)coder\.|(?:en|de)coder\.layers\.\d+\.conv\.", "ldm"),
    _foreign("other", "a CLIP vision model", r"vision_model\.", "huggingface"),
    _foreign("other", "an upscaling model", r"conv_first\.|RRDB_trunk\.|model\.1\.sub\.\d+\."),
    _foreign("other", "a textual inversion embedding", r"(?:emb_params|clip_[lg]|t5xxl)$", "embedding"),
    _foreign("other", "the optimizer state of a training run", r"exp_avg(?:_sq)?$|optimizer\.", "optimizer"),
)


def find_foreign(
    shapes: Mapping[str, Shape], names: Iterable[str] | None = None, kinds: Iterable[Kind] | None = None
) -> tuple[Foreign, str] | None:
    """The first entry of the table that fits one of `names` (default: all), and the name that shows it.

    `kinds` restricts the table. None when nothing is recognised.
    """
    names = list(shapes if names is None else names)
    wanted = None if kinds is None else set(kinds)
    for entry in FOREIGN:
        if wanted is not None and entry.kind not in wanted:
            continue
        for name in names:
            if entry.pattern.search(name) and (entry.fits is None or entry.fits(tuple(shapes[name]))):
                return entry, name
    return None
