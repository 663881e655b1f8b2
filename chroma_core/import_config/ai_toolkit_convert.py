"""Conversions of ai-toolkit options that depend on their value or on other options."""

from __future__ import annotations

import re
from typing import Any

from .rules import (
    Given,
    Near,
    Outcome,
    Unreadable,
    custom,
    is_off,
    number,
    switch,
    text,
    whole,
)

OWN = "stored by ChromaKit's own quantised layers instead"
QTYPES: dict[str, str | Near] = {
    "qfloat8": "fp8-quanto",
    "qint8": "int8-quanto",
    "qint4": "int4-quanto",
    "float8": "fp8-torchao",
    "int8": Near("int8", OWN),
    "uint8": Near("int8", OWN),
    "int4": Near("int4", OWN),
    "uint4": Near("int4", OWN),
}


def quantised(parts: dict[str, str]) -> Outcome:
    """`parts`: our option → ai-toolkit's qtype."""
    values, reasons = {}, []
    for to, qtype in parts.items():
        found = QTYPES.get(qtype)
        if found is None:
            return Outcome("no counterpart", {}, f"there is no {qtype}: choose a precision, e.g. int8 or nf4")
        values[to] = found.value if isinstance(found, Near) else found
        reasons += [found.reason] if isinstance(found, Near) else []
    return Outcome("differs" if reasons else "maps", values, reasons[0] if reasons else "")


def quantize(value: Any, given: Given) -> Outcome:
    if not switch(value):
        return Outcome("ignored", {}, "not used")
    parts = {"model.precision": text(given.get("qtype", "qfloat8"))}
    if "quantize_te" not in given:  # it follows `quantize`
        parts["model.text_precision"] = text(given.get("qtype_te", "qfloat8"))
    return quantised(parts)


def quantize_te(value: Any, given: Given) -> Outcome:
    if not switch(value):
        return Outcome("ignored", {}, "not used")
    return quantised({"model.text_precision": text(given.get("qtype_te", "qfloat8"))})


def dtype(value: Any, given: Given) -> Outcome:
    known = {"bf16": "bf16", "bfloat16": "bf16", "fp16": "fp16", "float16": "fp16", "fp32": "fp32", "float32": "fp32"}
    word = known.get(text(value).lower())
    if word is None:
        raise Unreadable("bf16, fp16 or fp32")
    if not is_off(given.get("model.quantize")):
        same = word == "bf16"
        return Outcome("ignored" if same else "differs", {}, "a quantised base model computes in bf16 here")
    return Outcome("maps", {"model.precision": word})


def alpha(value: Any, given: Given) -> Outcome:
    rank, alpha = number(given.get("linear", given.get("rank", 16))), number(value)
    if text(given.get("type", "lora")).lower() == "lokr":
        return Outcome("maps", {"lora.alpha": alpha})
    if alpha == rank:
        return Outcome("maps", {"lora.alpha": alpha})
    return Outcome("differs", {"lora.alpha": rank}, "ai-toolkit trains Chroma at scale 1, whatever stands here")


def timesteps(value: Any, given: Given) -> Outcome:
    word = text(value)
    if word in ("shift", "flux_shift", "lumina2_shift"):
        return Outcome("maps", {"objective.draw": "uniform", "objective.flow_shift": "dynamic"})
    draws = {
        "sigmoid": ("logit_normal", ""),
        "linear": ("uniform", ""),
        "weighted": ("uniform", "the loss is not weighted by the noise level here"),
        "lognorm_blend": ("logit_normal", "without the blend with even draws"),
    }
    if word not in draws:
        return Outcome("no counterpart", {}, "draws are logit-normal, uniform or chroma")
    draw, reason = draws[word]
    return Outcome("differs" if reason else "maps", {"objective.draw": draw}, reason)


def linear_timesteps(value: Any, given: Given) -> Outcome:
    if not switch(value):
        return Outcome("ignored", {}, "not used")
    return Outcome("differs", {"objective.draw": "uniform"}, "the loss is not weighted by the noise level here")


def limit(name: str, off: int):
    def convert(value: Any, given: Given) -> Outcome:
        step = whole(value)
        if step in (off, 1000 if off else 0):
            return Outcome("ignored", {}, "all noise levels")
        reason = "draws are squeezed into the range here, not drawn again"
        return Outcome("differs", {f"objective.{name}": round(1 - step / 1000, 6)}, reason)

    return convert


def parameters(known: dict[str, str], value: Any) -> Outcome:
    """A dictionary inside an option: known names map, the others are named in the reason."""
    if not isinstance(value, dict):
        raise Unreadable("a section with options")
    values = {
        known[k]: [number(b) for b in v] if isinstance(v, list) else number(v) for k, v in value.items() if k in known
    }
    if "warmup_steps" in values:
        values["warmup_steps"] = whole(values["warmup_steps"])
    others = [str(k) for k in value if k not in known]
    if others:
        return Outcome("differs", values, f"without counterpart: {', '.join(others)}")
    return Outcome("maps", values)


def ema(value: Any, given: Given) -> Outcome:
    if not isinstance(value, dict):
        raise Unreadable("a section with use_ema and ema_decay")
    if not switch(value.get("use_ema", False)):
        return Outcome("maps", {"lora.ema_decay": 0.0})
    others = [k for k in value if k not in ("use_ema", "ema_decay")]
    reason = f"without counterpart: {', '.join(others)}" if others else ""
    return Outcome("differs" if others else "maps", {"lora.ema_decay": number(value.get("ema_decay", 0.999))}, reason)


def prompts(value: Any, given: Given) -> Outcome:
    if not is_off(given.get("train.disable_sampling")):
        return Outcome("ignored", {}, "disable_sampling")
    items = value if isinstance(value, list) else [value]
    flags, prompts = False, []
    for item in items:
        if isinstance(item, dict):
            flags |= set(item) - {"prompt"} != set()
            item = item.get("prompt")
        words = text(item)
        flags |= re.search(r"\s--\w", words) is not None
        prompts.append(re.split(r"\s+--(?=\w)", words)[0].strip())
    reason = "settings of single prompts are left out: all previews have the same size, steps and guidance"
    return Outcome("differs" if flags else "maps", {"previews.prompts": prompts}, reason if flags else "")


def walk(value: Any, given: Given) -> Outcome:
    if switch(value):
        return Outcome("ignored", {}, "prompt i has the seed + i here too")
    if len(given.get("prompts") or given.get("samples") or []) < 2:
        return Outcome("ignored", {}, "a single prompt")
    return Outcome("differs", {}, "prompt i has the seed + i here")


def dropout(value: Any, given: Given) -> Outcome:
    values = {"caption_dropout": number(value)}
    if number(value) > 0 and not is_off(given.get("trigger_word")):
        return Outcome("differs", values, "a dropped caption is empty here; ai-toolkit leaves the trigger word in it")
    return Outcome("maps", values)


def shuffle(value: Any, given: Given) -> Outcome:
    if not switch(value):
        return Outcome("ignored", {}, "not used")
    reason = (
        "captions have 8 fixed orders of their tags here, since text states are cached; ai-toolkit shuffles "
        "at every use"
    )
    return Outcome("differs", {"tag_shuffles": 8}, reason)


def resolutions(value: Any, given: Given) -> Outcome:
    sizes = value if isinstance(value, list) else [value]
    return Outcome("maps", {"resolutions": sorted({whole(size) for size in sizes})})


def extension(value: Any) -> str:
    return "." + text(value).lstrip(".")


def only(expected: Any, reason: str, same: str = "the same here"):
    """A switch that must have one value; the other one has no counterpart."""

    def convert(value: Any, given: Given) -> Outcome:
        return Outcome("ignored", {}, same) if switch(value) is expected else Outcome("no counterpart", {}, reason)

    return custom(convert, "", reason, "no counterpart")
