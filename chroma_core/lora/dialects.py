"""How LoRA files name things: from a key in any known dialect to Chroma's layers, and the alpha that a header declares.

| dialect | keys | written by |
|---|---|---|
| `universal` | `transformer.<diffusers name>.lora_A/B.weight` and `.alpha` | ChromaKit, diffusers, SimpleTuner |
| `peft` | `base_model.model.<diffusers name>.lora_A/B[.adapter].weight` | PEFT's save_pretrained |
| `native` | `diffusion_model.<original name>.lora_A/B` or `lora_down/up` | ai-toolkit, ComfyUI |
| `kohya` | `lora_unet_<original name with _>.lora_down/up` and `.alpha` | sd-scripts and its descendants |
| `onetrainer` | `lora_transformer_<diffusers name with _>…` | OneTrainer |
| `lycoris` | `lycoris_<diffusers name with _>.lokr_w1…` | LyCORIS, SimpleTuner |
| `bare` | names without a prefix | various |

Prefix and layout mix freely in the wild (`diffusion_model.<diffusers name>` exists), so after its prefix a name is
looked up in both layouts, with dots and with underscores.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..names.transformer import Rows, to_diffusers_modules, to_original_module, unflatten

PREFIXES = (
    ("transformer.", "universal"),
    ("base_model.model.", "peft"),
    ("diffusion_model.", "native"),
    ("lora_unet_", "kohya"),
    ("lora_transformer_", "onetrainer"),
    ("lycoris_", "lycoris"),
    ("", "bare"),
)

_PART = re.compile(
    r"^(?P<module>.+)\.(?:(?P<down>lora_A|lora_down|lora\.down)|(?P<up>lora_B|lora_up|lora\.up))(?:\.\w+)?\.weight$"
)
_MAGNITUDE = re.compile(r"^(?P<module>.+)\.(?:dora_scale|lora_magnitude_vector)(?:\.\w+)*$")
_LOKR = re.compile(r"^(?P<module>.+)\.lokr_(?P<factor>w[12](?:_[ab])?|t2)(?:\.\w+)?$")

_FOREIGN = (
    (re.compile(r"\.hada_"), "LoHa"),
    (re.compile(r"\.oft_|\.oft\.|\.oft_blocks"), "OFT"),
    (re.compile(r"\.(a1|a2|b1|b2)\.weight$"), "GLoRA"),
    (re.compile(r"\.lora_mid\."), "LoCon with a middle matrix"),
    (re.compile(r"\.(diff|diff_b|w_norm|b_norm|set_weight)$"), "full weight differences"),
    (re.compile(r"^(lora_te|text_encoder|text_encoders|te\d?_)"), "a text encoder's LoRA"),
)


@dataclass(frozen=True)
class Part:
    """What one key of a LoRA file is, of the module with that raw name.

    kind: `down` or `up` (matrices), `alpha`, `magnitude` (of a DoRA), or of a LoKr `w1`, `w1_a`, `w1_b`, `w2`, `w2_a`,
    `w2_b`, `t2`.
    """

    module: str
    kind: str


def part_of(key: str) -> Part | None:
    """The part that a key names; None when it is no part of a LoRA, DoRA or LoKr."""
    match = _PART.match(key)
    if match is not None:
        return Part(match["module"], "down" if match["down"] else "up")
    match = _LOKR.match(key)
    if match is not None:
        return Part(match["module"], match["factor"])
    match = _MAGNITUDE.match(key)
    if match is not None:
        return Part(match["module"], "magnitude")
    return Part(key.removesuffix(".alpha"), "alpha") if key.endswith(".alpha") else None


def locate(module: str) -> tuple[str, tuple[Rows, ...]] | None:
    """Dialect of a raw module name, and the Chroma layers (diffusers names) that it stands for; None when unknown."""
    for prefix, dialect in PREFIXES:
        if module.startswith(prefix):
            rows = _layers(module.removeprefix(prefix))
            if rows is not None:
                return dialect, rows
    return None


def _layers(name: str) -> tuple[Rows, ...] | None:
    if to_original_module(name) is not None:
        return (Rows(name),)
    rows = to_diffusers_modules(name)
    if rows is None:
        dotted = unflatten(name)
        if dotted is not None and dotted != name:
            return _layers(dotted)
    return rows


def foreign_kinds(keys: list[str]) -> list[str]:
    """What those keys are known to hold, other than LoRA, DoRA and LoKr, as words for a message."""
    return [words for pattern, words in _FOREIGN if any(pattern.search(key) for key in keys)]


def looks_like_checkpoint(keys: list[str]) -> bool:
    """Whether these are the weights of a whole model."""
    roots = ("double_blocks.", "single_blocks.", "transformer_blocks.", "single_transformer_blocks.")
    return any(
        key.removeprefix("model.").removeprefix("diffusion_model.").startswith(roots) and key.endswith(".weight")
        for key in keys
    )


def declared_alpha(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """The alpha that a PEFT configuration gives a layer of that rank, as one number for scale = alpha / rank.

    Follows PEFT: `alpha_pattern` by regular expression on the name's end, else `lora_alpha` (`alpha` for a LoKr);
    rank-stabilised LoRA scales by alpha / √rank.
    """
    alpha = _by_pattern(config, "alpha_pattern", layer, config.get("lora_alpha", config.get("alpha", rank)))
    return alpha * (math.sqrt(rank) if config.get("use_rslora") else 1.0)


def declared_rank(config: Mapping[str, Any], layer: str) -> float | None:
    """The rank that a PEFT configuration gives a layer; None when it gives none."""
    return _by_pattern(config, "rank_pattern", layer, config["r"]) if "r" in config else None


def _by_pattern(config: Mapping[str, Any], option: str, layer: str, otherwise: Any) -> float:
    for pattern, value in (config.get(option) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return float(value)
    return float(otherwise)
