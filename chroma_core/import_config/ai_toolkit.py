"""ai-toolkit's YAML: the functions that its tables (`ai_toolkit.yaml`) name, and what it does without an option."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data.dataset import DatasetConfig
from ..options import option_of
from ..sampling.schedule import dynamic_mu
from ..training.config.job import LoraConfig
from .convert import Draft, Given, lost, near, table, unchanged
from .layers import EVERY_BLOCK, original
from .prompts import of_line, of_object, plain
from .read import Unreadable, is_off, is_on, number, read_config, switch, text, whole

QTYPES = {
    "qfloat8": "fp8-quanto",
    "qint8": "int8-quanto",
    "qint4": "int4-quanto",
    "float8": "fp8-torchao",
    **dict.fromkeys(("int8", "uint8"), "int8"),
    **dict.fromkeys(("int4", "uint4"), "int4"),
}


FUSED = "ai-toolkit has one LoRA for q, k and v together (and one for linear1); here each layer has its own"

LARGEST, LONGEST = int(option_of(LoraConfig, "rank").bound("le") or 0), 15360
"""The largest rank of a job, and the longest side of a layer of Chroma's: a LoKr's second factor is whole where the
rank reaches half its longer side."""


def quantised(qtypes: dict[str, str]) -> Any:
    """`qtypes`: our option → ai-toolkit's qtype."""
    values, reason = {}, ""
    for to, qtype in qtypes.items():
        if qtype not in QTYPES:
            return lost(f"there is no {qtype}: choose a precision, e.g. int8 or nf4")
        values[to] = QTYPES[qtype]
        if values[to] in ("int8", "int4"):
            reason = "stored by ChromaKit's own quantised layers instead"
    return near(values, reason) if reason else values


def quantize(value: Any, given: Given) -> Any:
    if not switch(value):
        return unchanged("not used")
    qtypes = {"model.precision": text(given.get("qtype", "qfloat8"))}
    if "quantize_te" not in given:  # it follows `quantize`
        qtypes["model.text_precision"] = text(given.get("qtype_te", "qfloat8"))
    return quantised(qtypes)


def quantize_te(value: Any, given: Given) -> Any:
    if not switch(value):
        return unchanged("not used")
    return quantised({"model.text_precision": text(given.get("qtype_te", "qfloat8"))})


def dtype(value: Any, given: Given) -> Any:
    known = {"bf16": "bf16", "bfloat16": "bf16", "fp16": "fp16", "float16": "fp16", "fp32": "fp32", "float32": "fp32"}
    word = known.get(text(value).lower())
    if word is None:
        raise Unreadable("bf16, fp16 or fp32")
    if is_off(given.get("model.quantize")):
        return word
    reason = "a quantised base model computes in bf16 here"
    return unchanged(reason) if word == "bf16" else near({}, reason)


def is_whole(given: Given) -> bool:
    return is_on(given, "lokr_full_rank") and text(given.get("type", "lora")).lower() == "lokr"


def rank(value: Any, given: Given) -> Any:
    return unchanged("lokr_full_rank decides") if is_whole(given) else whole(value)


def full_rank(value: Any, given: Given) -> Any:
    if not is_whole(given):
        return unchanged("not used")
    factor = whole(given.get("lokr_factor", -1))
    reason = f"with lokr_factor {factor} the second factor of the longest layers is a product of rank {LARGEST} here"
    return near(LARGEST, reason) if 0 < factor < LONGEST / (2 * LARGEST) else LARGEST


def alpha(value: Any, given: Given) -> Any:
    if is_whole(given):
        return unchanged("whole factors have no alpha")
    rank, alpha = number(given.get("linear", given.get("rank", 16))), number(value)
    if text(given.get("type", "lora")).lower() == "lokr" or alpha == rank:
        return alpha
    return near(rank, "ai-toolkit trains Chroma at scale 1, whatever stands here")


def accumulation(value: Any, given: Given) -> Any:
    return whole(value) * max(whole(given.get("gradient_accumulation_steps", 1)), 1)


def batches_an_update(value: Any, given: Given) -> Any:
    batches = whole(value)
    if batches < 1:
        return lost("an update after a whole epoch: set gradient_accumulation")
    if batches == 1:
        return unchanged("the same here")
    reason = f"ai-toolkit counts each batch as a step, ChromaKit each update: divide steps and intervals by {batches}"
    return near({}, reason)


def timesteps(value: Any, given: Given) -> Any:
    word = text(value)
    if word in ("shift", "flux_shift", "lumina2_shift"):
        return shifted(sorted(given["sizes"]))
    draws = {
        "sigmoid": "logit_normal",
        "linear": "uniform",
        "weighted": near("uniform", "the loss is not weighted by the noise level here"),
        "lognorm_blend": near("logit_normal", "without the blend with even draws"),
    }
    return draws.get(word, lost("draws are logit-normal, uniform or chroma"))


def shifted(sizes: list[int]) -> Any:
    """Even draws, with the shift that ai-toolkit has for images of those sizes: Flux's, but for latents before they are
    packed, of which there are four times as many."""
    shifts = [round(math.exp(dynamic_mu(4 * (size // 16) ** 2)), 4) for size in sizes]
    values = {"objective.draw": "uniform", "objective.flow_shift": shifts[-1]}
    if len(shifts) == 1:
        return values
    others = ", ".join(f"{shift:g} at {size}" for shift, size in zip(shifts, sizes, strict=True))
    return near(values, f"ai-toolkit's shift is another at each size ({others}); here all have the largest one's")


def highest_level(value: Any, given: Given, everything: tuple[int, ...] = (0,)) -> Any:
    """A bound of the denoising steps; `everything`: steps that leave out nothing."""
    if whole(value) in everything:
        return unchanged("all noise levels")
    return near(round(1 - whole(value) / 1000, 6), "draws are squeezed into the range here, not drawn again")


def lowest_level(value: Any, given: Given) -> Any:
    return highest_level(value, given, (999, 1000))


def optimizer_params(value: Any, given: Given) -> Any:
    return parameters(value, {"weight_decay": "weight_decay", "betas": "betas"}, numbers)


def scheduler_params(value: Any, given: Given) -> Any:
    return parameters(value, {"num_warmup_steps": "warmup_steps", "warmup_steps": "warmup_steps"}, whole)


def parameters(value: Any, known: dict[str, str], read: Callable[[Any], Any]) -> Any:
    """A dictionary inside an option: known names map, the others are named in the reason."""
    if not isinstance(value, dict):
        raise Unreadable("a section with options")
    values = {known[key]: read(item) for key, item in value.items() if key in known}
    others = ", ".join(str(key) for key in value if key not in known)
    return near(values, f"without counterpart: {others}") if others else values


def numbers(value: Any) -> Any:
    return [number(item) for item in value] if isinstance(value, list) else number(value)


def ema(value: Any, given: Given) -> Any:
    if not isinstance(value, dict):
        raise Unreadable("a section with use_ema and ema_decay")
    if not is_on(value, "use_ema"):
        return 0.0
    others = ", ".join(str(key) for key in value if key not in ("use_ema", "ema_decay"))
    decay = number(value.get("ema_decay", 0.999))
    return near(decay, f"without counterpart: {others}") if others else decay


def pair_noise(value: Any, given: Given) -> Any:
    if whole(value) <= 1:
        return unchanged("not used")
    return near(True, "noises are paired inside the batch, not drawn from more")


def output_preservation(value: Any, given: Given) -> Any:
    kept = preserved(value, given, "diff_output_preservation", "preserve.class_weight")
    word = text(given.get("diff_output_preservation_class", ""))
    return {**kept, "preserve.class_word": word} if isinstance(kept, dict) else kept


def blank_preservation(value: Any, given: Given) -> Any:
    return preserved(value, given, "blank_prompt_preservation", "preserve.blank_weight")


def preserved(value: Any, given: Given, option: str, to: str) -> Any:
    """A comparison with the model without its LoRA, which ai-toolkit makes at every step."""
    weight = number(given.get(f"{option}_multiplier", 1.0))
    return {to: weight, "preserve.share": 1.0} if switch(value) and weight else unchanged("not used")


def negative(value: Any) -> str:
    return "" if is_off(value) else text(value)


SAMPLE_FIELDS = {
    "prompt": "prompt",
    "width": "width",
    "height": "height",
    "seed": "seed",
    "neg": "negative",
    "guidance_scale": "guidance",
    "sample_steps": "steps",
}
"""Fields of an entry of `samples`, and ours."""


def prompts(value: Any, given: Given) -> Any:
    if not is_off(given.get("train.disable_sampling")):
        return unchanged("disable_sampling")
    found, lost = [], []
    for item in value if isinstance(value, list) else [value]:
        fields, without = of_object(item, SAMPLE_FIELDS) if isinstance(item, dict) else ({"prompt": text(item)}, [])
        line, behind = of_line(fields.pop("prompt", ""))
        found.append({**line, **fields})
        lost += [*without, *behind]
    if len(found) > 1 and not is_on(given, "walk_seed"):  # all have the same one; here the i-th has the seed + i
        found = [{"seed": whole(given.get("seed", 0)), **entry} for entry in found]
    return near(plain(found), f"without counterpart: {', '.join(lost)}") if lost else plain(found)


def walk_seed(value: Any, given: Given) -> Any:
    if switch(value):
        return unchanged("prompt i has the seed + i here too")
    if len(given.get("prompts") or given.get("samples") or []) < 2:
        return unchanged("a single prompt")
    return unchanged("each prompt has been given the same seed")


def network_kwargs(value: Any, given: Given) -> Any:
    """`only_if_contains` and `ignore_if_contains`: parts of a layer's name, with dots or underscores."""
    if not isinstance(value, dict):
        raise Unreadable("a section with options")
    others = [str(key) for key in value if key not in ("only_if_contains", "ignore_if_contains")]
    only, ignored = (value.get(f"{which}_if_contains") or [] for which in ("only", "ignore"))
    if not (isinstance(only, list) and isinstance(ignored, list)):
        raise Unreadable("a section with lists of parts of layers' names")

    def has(name: str, parts: list[Any]) -> bool:
        full = f"transformer.{name}"
        return any(text(part) in full or text(part) in full.replace(".", "_") for part in parts)

    target = original(lambda name: (not only or has(name, only)) and not has(name, ignored))
    if not target:
        return lost(f"no layer of Chroma's blocks has such a name: {', '.join(map(str, [*only, *ignored]))}")
    if not (only or ignored):
        return lost("not built in") if others else unchanged("not used")
    reason = f"{FUSED}; without counterpart: {', '.join(others)}" if others else FUSED
    return near({"lora.target": target}, reason)


def caption_dropout(value: Any, given: Given) -> Any:
    reason = "a dropped caption is empty here; ai-toolkit leaves the trigger word in it"
    differs = number(value) > 0 and not is_off(given.get("trigger_word"))
    return near(number(value), reason) if differs else number(value)


def resolutions(value: Any) -> list[int]:
    return sorted({whole(size) for size in (value if isinstance(value, list) else [value])})


def sizes(datasets: Sequence[Mapping[str, Any]]) -> set[int]:
    """The sizes of all datasets, in pixels; ai-toolkit's own where none is stated."""
    return {size for item in datasets or [{}] for size in resolutions(item.get("resolution") or 512)}


def extension(value: Any) -> str:
    return "." + text(value).lstrip(".")


_DATA = read_config(Path(__file__).with_suffix(".yaml"))
SET_OPTIONS = table(_DATA["datasets"], globals(), DatasetConfig)
SECTIONS = {
    "" if name == "process" else name: table(section, globals())
    for name, section in _DATA.items()
    if name != "datasets"
}

UNSTATED = {
    "" if name == "process" else name: section["unstated"] for name, section in _DATA.items() if "unstated" in section
}
"""What ai-toolkit takes for options that are not stated, section by section."""

BUILT_IN_SET = {"caption_lines": "joined", "missing_caption": "empty", "repeat_folders": False}
"""What it does with images and captions without an option."""

DECAY = {"adamw": 0.01, "adamw8bit": 0.01}
"""The weight decay of its optimizers where none is stated; 0 for all others."""


def built_in(job: Draft, network: Given) -> None:
    """What ai-toolkit does for Chroma without an option: its own recipe, no tail remap, LoRAs on fused layers."""
    job.record("text and previews", "built in", {"recipe": "ai-toolkit"})
    job.record("noise levels", "built in", {"objective.remap": "none"})
    job.record("trained layers", "built in", near({"lora.target": list(EVERY_BLOCK)}, FUSED), over=False)
    decay = DECAY.get(job.values.get("optimizer", ""), 0.0)
    job.record("optimizer_params.weight_decay", f"{decay} (not stated)", {"weight_decay": decay}, over=False)
    if text(network.get("type", "lora")).lower() == "lokr" and not is_whole(network):
        alpha = number(network.get("alpha", 1.0))
        job.record("network.linear_alpha", f"{alpha:g} (not stated)", {"lora.alpha": alpha}, over=False)
