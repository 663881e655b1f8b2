"""The words with which a weights file is refused: what it is, what was expected, what to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from ..errors import ModelFileError
from .identify import TITLES, Identity, Part

Shape = tuple[int, ...]

FOLDERS: Mapping[Part, str] = MappingProxyType(
    {"transformer": "models/diffusion_models", "text_encoder": "models/text_encoders", "vae": "models/vae"}
)
"""Where ComfyUI keeps files of each part."""

_SIGNS: Mapping[Part, str] = MappingProxyType(
    {
        "transformer": "Chroma files hold double_blocks.0.img_attn.qkv.weight (or, in diffusers' layout, "
        "transformer_blocks.0.attn.to_q.weight) and distilled_guidance_layer.in_proj.weight, and no img_mod.",
        "text_encoder": "T5-XXL files hold encoder.block.0.layer.0.SelfAttention.q.weight (or, in GGUF, "
        "enc.blk.0.attn_q.weight), such as t5xxl_fp16.safetensors.",
        "vae": "Flux VAE files (ae.safetensors) hold decoder.conv_in.weight with 16 latent channels.",
    }
)


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
        f"'{path}' is {found.title} ({found.layout} layout), but lacks {_tensors(missing)} of {of}: {_first(missing)}. "
        "The download may be incomplete, or this is one of several shards: download it again, or choose the folder or "
        "index file of all shards."
    )


def surplus(path: Path | str, found: Identity, extra: Sequence[str], by_config: bool) -> ModelFileError:
    """For a part with tensors that it should not have."""
    reason = "that its config.json has no place for" if by_config else f"that {found.title} does not have"
    return ModelFileError(
        f"'{path}' looks like {found.title} ({found.layout} layout), but holds {_tensors(extra)} {reason}: "
        f"{_first(extra)}. It is a variant with another architecture, or its files do not belong together."
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
        f"'{path}' is {found.title} ({found.layout} layout) with {_tensors(list(wrong))} of the wrong shape: "
        f"{listed}{more}. The file is damaged, or its parts come from different models."
    )


def _tensors(names: Sequence[str]) -> str:
    return f"{len(names)} tensor{'' if len(names) == 1 else 's'}"


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
