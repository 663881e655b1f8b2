"""What a weights file is, from the names and shapes of its tensors alone: a part of Chroma, or what else.

File names and headers are not asked: people rename files, and most headers are empty. A file that is not Chroma's gets
an `Identity` with part None, a title for people, and the tensor that gave it away.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

from .foreign import Kind, Shape, find_foreign

Part = Literal["transformer", "text_encoder", "vae"]
PARTS: tuple[Part, ...] = get_args(Part)

TITLES: Mapping[Part, str] = MappingProxyType(
    {"transformer": "a Chroma transformer", "text_encoder": "a T5 encoder", "vae": "a Flux VAE"}
)

NO_METADATA: Mapping[str, str] = MappingProxyType({})


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


def identify(shapes: Mapping[str, Shape], metadata: Mapping[str, str] = NO_METADATA) -> Identity:
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
        or _unknown(shapes, metadata)
    )


def _unknown(shapes: Mapping[str, Shape], metadata: Mapping[str, str]) -> Identity:
    evidence = ", ".join(list(shapes)[:3])
    header = " ".join(
        (metadata.get("modelspec.architecture", ""), *(k for k in metadata if k.startswith("ss_network")))
    )
    if "/lora" in header or "ss_network" in header:
        return Identity(None, "adapter", "a LoRA in an unknown dialect", evidence=evidence)
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
