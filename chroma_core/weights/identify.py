"""What a weights file is, from the names and shapes of its tensors alone: a part of Chroma, or what else; and the words
with which it is refused.

File names and headers are not asked: people rename files, and most headers are empty. A file that is not Chroma's gets
an `Identity` with part None, a title for people, and the tensor that gave it away.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from ..errors import ModelFileError, counted, first_few

Kind = Literal["adapter", "transformer", "text_encoder", "vae", "other"]
Shape = tuple[int, ...]

USE_APPLY_LORA = "A LoRA changes a model but is none: load it with the node Chroma Apply LoRA (folder models/loras)."
PIXEL_SPACE = "Radiance works on pixels instead of latents; pixel space is not supported, only Chroma 1 is."


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


_ADAPTER = (
    r"lora_[AB]\b|lora_(?:up|down|mid)\b|lora\.(?:up|down)\.|\w+_lora\.(?:up|down)|lora_(?:unet|te\d?|transformer)_"
    r"|lokr_w[12]|hada_[wt][12]|oft_(?:blocks|diag|R)|dora_scale|lora_magnitude_vector|diff_b?$|lora_linear_layer\."
)
_FLUX2_VAE, _SD_VAE = "a Flux 2 VAE (32 latent channels)", "a Stable Diffusion VAE (4 latent channels)"
_VIDEO_VAE, _RADIANCE = "a video VAE (3-D convolutions)", "Chroma Radiance (pixel space)"
_NO_GATE = "a T5 encoder of version 1.0, whose feed-forward layers have no gate"

_TABLE: dict[Kind, tuple[tuple[str, str, str], ...]] = {
    "adapter": (
        ("a LoRA", "adapter", _ADAPTER),
        ("a ControlNet", "original", r"controlnet_\w*blocks\.|controlnet_x_embedder|control_model\.|input_hint_block"),
        ("an IP-Adapter", "original", r"ip_adapter\.|ip_adapter_\w+\.|image_proj\w*\.|ip_layers\."),
    ),
    "transformer": (
        (_RADIANCE, "original", r"nerf_blocks\.|nerf_image_embedder\.|nerf_final_layer|img_in_patch\."),
        ("a Flux 2 transformer", "diffusers", r"single_transformer_blocks\.\d+\.attn\.to_qkv_mlp_proj"),
        ("a Flux 2 transformer", "original", r"double_stream_modulation_(?:img|txt)\."),
        ("a HunyuanVideo transformer", "original", r"txt_in\.individual_token_refiner\."),
        ("a Flux transformer", "original", r"(?:double_blocks\.\d+\.(?:img|txt)_mod|single_blocks\.\d+\.modulation)\."),
        ("a Flux transformer", "original", r"(?:vector_in|guidance_in|time_in)\.in_layer\."),
        ("an AuraFlow transformer", "diffusers", r"joint_transformer_blocks\.\d+\."),
        ("an AuraFlow transformer", "original", r"double_layers\.\d+\.attn\.w1q"),
        ("a Stable Diffusion 3 model", "original", r"joint_blocks\.\d+\.context_block\."),
        ("a Stable Diffusion 3 transformer", "diffusers", r"pos_embed\.pos_embed$"),
        ("a Flux transformer", "diffusers", r"single_transformer_blocks\.\d+\.norm\.linear\."),
        ("a Flux transformer", "diffusers", r"transformer_blocks\.\d+\.norm1_context\.linear\."),
        ("a Qwen-Image transformer", "diffusers", r"transformer_blocks\.\d+\.(?:img|txt)_mod\."),
        (
            "a Stable Diffusion XL checkpoint",
            "original",
            r"label_emb\.0\.0\.|conditioner\.embedders\.\d+\.(?:transformer|model)\.",
        ),
        ("a Stable Diffusion XL UNet", "diffusers", r"add_embedding\.linear_1\."),
        ("a Stable Diffusion checkpoint (1.x or 2.x)", "original", r"(?:input|output)_blocks\.\d+\.\d+\."),
        ("a Stable Diffusion UNet", "diffusers", r"(?:down|up)_blocks\.\d+\.attentions\.\d+\.transformer_blocks\."),
        ("a Wan transformer", "original", r"blocks\.\d+\.cross_attn\.norm_q\."),
        ("a PixArt or LTX transformer", "diffusers", r"adaln_single\.|t_block\.1\."),
        ("a Lumina 2 or Z-Image transformer", "original", r"noise_refiner\.\d+\."),
        ("a HiDream transformer", "original", r"(?:double|single)_stream_blocks\.\d+\.block\."),
        ("a Stable Cascade model", "original", r"clip_txt_mapper\.|clip_mapper\.|clf\.1\."),
        ("a Mochi transformer", "original", r"t5_yproj\."),
        ("a Hunyuan-DiT transformer", "original", r"mlp_t5\.0\."),
        ("a Cosmos transformer", "original", r"blocks\.block\d+\.blocks\.|blocks\.\d+\.mlp\.layer1\."),
        ("a Kandinsky transformer", "original", r"visual_transformer_blocks\.\d+\."),
    ),
    "text_encoder": (
        (
            "a UMT5 text encoder",
            "huggingface",
            r"encoder\.block\.1\.layer\.0\.SelfAttention\.relative_attention_bias\.",
        ),
        ("a UMT5 text encoder", "llama.cpp", r"enc\.blk\.1\.attn_rel_b\."),
        (_NO_GATE, "huggingface", r"encoder\.block\.\d+\.layer\.1\.DenseReluDense\.wi\."),
        (
            "a CLIP text encoder",
            "huggingface",
            r"text_model\.(?:encoder|embeddings)\.|resblocks\.\d+\.attn\.|text_projection",
        ),
        ("a language model", "huggingface", r"layers\.\d+\.self_attn\.[qk]_(?:proj|norm)\."),
        ("a language model", "llama.cpp", r"(?<!enc\.)(?<!dec\.)blk\.\d+\.attn_(?:q|k|qkv)\."),
    ),
    "vae": (
        (_FLUX2_VAE, "ldm", r"decoder\.conv_in\.weight$"),
        (_SD_VAE, "ldm", r"decoder\.conv_in\.weight$"),
        (_VIDEO_VAE, "ldm", r"conv\w*\.weight$"),
        (_VIDEO_VAE, "original", r"encoder\.downsamples\.\d+\."),
        ("a tiny preview VAE (TAESD)", "ldm", r"taesd_(?:en|de)coder\.|(?:en|de)coder\.layers\.\d+\.conv\."),
    ),
    "other": (
        ("a CLIP vision model", "huggingface", r"vision_model\."),
        ("an upscaling model", "original", r"conv_first\.|RRDB_trunk\.|model\.1\.sub\.\d+\."),
        ("a textual inversion embedding", "embedding", r"(?:emb_params|clip_[lg]|t5xxl)$"),
        ("the optimizer state of a training run", "optimizer", r"exp_avg(?:_sq)?$|optimizer\."),
    ),
}
"""Kind → (title, layout, pattern). From most to least telling; every pattern was taken from the named model's own
parameter names. It fits at the start of a name or after a dot, so that any prefix may stand before it."""

_FITS: dict[tuple[str, str], Callable[[Shape], bool]] = {
    (_FLUX2_VAE, "ldm"): lambda shape: len(shape) == 4 and shape[1] == 32,
    (_SD_VAE, "ldm"): lambda shape: len(shape) == 4 and shape[1] == 4,
    (_VIDEO_VAE, "ldm"): lambda shape: len(shape) == 5,
}
_REMEDIES = {"a LoRA": USE_APPLY_LORA, _RADIANCE: PIXEL_SPACE}

FOREIGN: tuple[Foreign, ...] = tuple(
    Foreign(
        kind, title, layout, re.compile(rf"(?:^|\.)(?:{pattern})"), _FITS.get((title, layout)), _REMEDIES.get(title, "")
    )
    for kind, rows in _TABLE.items()
    for title, layout, pattern in rows
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


Part = Literal["transformer", "text_encoder", "vae"]
PARTS: tuple[Part, ...] = get_args(Part)

TITLES: dict[Part, str] = {"transformer": "a Chroma transformer", "text_encoder": "a T5 encoder", "vae": "a Flux VAE"}


@dataclass(frozen=True)
class Identity:
    """What a file holds.

    part: which part of Chroma; None for anything else.
    layout: 'original' | 'diffusers' | 'huggingface' | 'ldm' | 'llama.cpp', and words of their own for foreign files.
    title: for people, with an article: 'a Flux transformer', 'a LoRA', 'a Stable Diffusion XL checkpoint'.
    prefix: what stands before every name of the part in the file, such as 'model.diffusion_model.'; '' for nothing.
    evidence: the name of a tensor that shows it; '' for a file without tensors.
    remedy: a sentence on what to do with a foreign file instead; may be ''.
    """

    part: Part | None
    layout: str
    title: str
    prefix: str = ""
    evidence: str = ""
    remedy: str = ""


# One telling name for each part and layout. Blocks come first; the approximator alone, common to both of the
# transformer's layouts, decides for a file that was cut down to it.
_ANCHORS: tuple[tuple[Part, str, str], ...] = (
    (
        "transformer",
        "original",
        r"(?:double_blocks\.\d+\.(?:img|txt)_(?:attn|mlp)\.|single_blocks\.\d+\.(?:linear|norm))",
    ),
    ("transformer", "diffusers", r"single_transformer_blocks\.\d+\.(?:attn|proj_mlp|proj_out)\."),
    ("transformer", "diffusers", r"transformer_blocks\.\d+\.(?:ff_context\.|attn\.norm_added_)"),
    ("transformer", "original", r"distilled_guidance_layer\.layers\.\d+\.in_layer\."),
    ("transformer", "diffusers", r"distilled_guidance_layer\.layers\.\d+\.linear_1\."),
    ("text_encoder", "huggingface", r"encoder\.block\.\d+\.layer\.0\.SelfAttention\."),
    ("text_encoder", "llama.cpp", r"enc\.blk\.\d+\.(?:attn|ffn)_"),
    ("vae", "diffusers", r"(?:encoder\.down|decoder\.up)_blocks\.\d+\.resnets\."),
    ("vae", "ldm", r"(?:encoder\.down|decoder\.up)\.\d+\.block\."),
)
_COMPILED = tuple((part, layout, re.compile(rf"(?:^|\.)(?={pattern})")) for part, layout, pattern in _ANCHORS)


def identify(shapes: Mapping[str, Shape], metadata: Mapping[str, str] | None = None) -> Identity:
    """What a file with tensors of these names and shapes is.

    A checkpoint of several parts is named after its transformer, since that is what people call it by; `find_part`
    finds the others inside it.

    Args:
        shapes: logical tensors (without quantisation scales) and their shapes.
        metadata: the file's header entries, asked only when the names say nothing.
    """
    if not shapes:
        return Identity(None, "empty", "a file without tensors")
    return (
        _foreign(shapes, "adapter")
        or _foreign(shapes, "transformer")
        or next(filter(None, (find_part(shapes, part) for part in PARTS)), None)
        or _foreign(shapes, "text_encoder", "vae", "other")
        or _unknown(shapes, metadata or {})
    )


def _unknown(shapes: Mapping[str, Shape], metadata: Mapping[str, str]) -> Identity:
    evidence = ", ".join(list(shapes)[:3])
    header = " ".join(
        (metadata.get("modelspec.architecture", ""), *(k for k in metadata if k.startswith("ss_network")))
    )
    if "/lora" in header or "ss_network" in header:
        return Identity(None, "adapter", "a LoRA in an unknown key format", evidence=evidence)
    return Identity(None, "unknown", "an unknown model", evidence=evidence)


def find_part(shapes: Mapping[str, Shape], part: Part) -> Identity | None:
    """Where a part of Chroma stands in a file, which may hold other parts too; None when it is not there.

    A full Flux checkpoint holds the T5 encoder and the VAE that Chroma uses; Stable Diffusion 3's VAE has the same
    shape as Flux's but other latents, so it is told apart by its neighbours.
    """
    for own, layout, anchor in _COMPILED:
        if own != part:
            continue
        found: Counter[str] = Counter()
        first: dict[str, str] = {}
        for name in shapes:
            if match := anchor.search(name):
                found[name[: match.end()]] += 1
                first.setdefault(name[: match.end()], name)
        # The fullest prefix wins (a second copy with fewer tensors is a remnant), then the shortest.
        for prefix in sorted(found, key=lambda p: (-found[p], len(p))):
            names = [name for name in shapes if name.startswith(prefix)]
            if find_foreign(shapes, names, (part, "adapter")) is None and not _is_sd3(shapes, part):
                return Identity(part, layout, TITLES[part], prefix, first[prefix])
    return None


def _foreign(shapes: Mapping[str, Shape], *kinds: Kind) -> Identity | None:
    found = find_foreign(shapes, kinds=kinds)
    if found is None:
        return None
    entry, name = found
    prefix = name[: entry.pattern.search(name).start()]  # type: ignore[union-attr]
    return Identity(None, entry.layout, entry.title, f"{prefix}." if prefix else "", name, entry.remedy)


def _is_sd3(shapes: Mapping[str, Shape], part: Part) -> bool:
    if part != "vae":
        return False
    found = find_foreign(shapes, kinds=("transformer",))
    return found is not None and "Stable Diffusion 3" in found[0].title


FOLDERS: dict[Part, str] = {
    "transformer": "models/diffusion_models",
    "text_encoder": "models/text_encoders",
    "vae": "models/vae",
}
"""Where ComfyUI keeps files of each part."""

_SIGNS: dict[Part, str] = {
    "transformer": "Chroma files hold double_blocks.0.img_attn.qkv.weight (or, in diffusers' layout, "
    "transformer_blocks.0.attn.to_q.weight) and distilled_guidance_layer.in_proj.weight, and no img_mod.",
    "text_encoder": "T5-XXL files hold encoder.block.0.layer.0.SelfAttention.q.weight (or, in GGUF, "
    "enc.blk.0.attn_q.weight), such as t5xxl_fp16.safetensors.",
    "vae": "Flux VAE files (ae.safetensors) hold decoder.conv_in.weight with 16 latent channels.",
}


def refuse(path: Path | str, found: Identity, part: Part) -> ModelFileError:
    """For a file in which `part` is not to be found; `found` is what it holds instead."""
    layout = f" ({found.layout} layout)" if found.layout in ("original", "diffusers", "ldm", "llama.cpp") else ""
    shown = f": it has {found.evidence}" if found.evidence else ""
    expected = f"Expected {TITLES[part]} in the field '{part}' (folder {FOLDERS[part]})."
    advice = found.remedy
    if found.part is not None:
        advice = f"Name it in the field '{found.part}' (folder {FOLDERS[found.part]}) instead."
    return ModelFileError(
        " ".join(filter(None, (f"'{path}' is {found.title}{layout}{shown}.", advice, expected, _SIGNS[part])))
    )


def incomplete(path: Path | str, found: Identity, missing: Sequence[str], of: int) -> ModelFileError:
    """For a part that lacks tensors: how many, and the first three."""
    return ModelFileError(
        f"'{path}' is {found.title} ({found.layout} layout), but lacks {counted(len(missing), 'tensor')} of {of}: "
        f"{first_few(missing)}. "
        "The download may be incomplete, or this is one of several shards: download it again, or choose the folder or "
        "index file of all shards."
    )


FEW = 4
"""Surplus tensors that are only said: what else a tool put into a file. A layer that a variant adds to every block, or
a block, has more."""


def ignored(path: Path | str, found: Identity, extra: Sequence[str]) -> str:
    """The sentence for a part with a few tensors that it should not have."""
    return (
        f"'{Path(path).name}' holds {counted(len(extra), 'tensor')} that {found.title} does not have, and "
        f"{'it is' if len(extra) == 1 else 'they are'} ignored: {first_few(extra, FEW)}. If the images are wrong, the "
        "file is a variant with another architecture."
    )


def surplus(path: Path | str, found: Identity, extra: Sequence[str], by_config: bool) -> ModelFileError:
    """For a part with tensors that it should not have."""
    reason = "that its config.json has no place for" if by_config else f"that {found.title} does not have"
    return ModelFileError(
        f"'{path}' looks like {found.title} ({found.layout} layout), but holds {counted(len(extra), 'tensor')} "
        f"{reason}: {first_few(extra)}. It is a variant with another architecture, or its files do not belong "
        "together."
    )


def misshapen(
    path: Path | str, found: Identity, wrong: Mapping[str, tuple[Shape, Shape]], origin: str
) -> ModelFileError:
    """For tensors (name → shape found, shape expected) that contradict the rest; `origin`: who asks for the shape."""
    listed = "; ".join(
        f"'{name}' is {list(there)}, but {origin} for {list(wanted)}"
        for name, (there, wanted) in list(wrong.items())[:3]
    )
    more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
    return ModelFileError(
        f"'{path}' is {found.title} ({found.layout} layout) with {counted(len(wrong), 'tensor')} of the wrong shape: "
        f"{listed}{more}. The file is damaged, or its parts come from different models."
    )
