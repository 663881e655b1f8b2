"""SimpleTuner's `config.json` and dataset file: the functions that its tables (`simpletuner.yaml`) name."""

from __future__ import annotations

import math
from pathlib import Path, PurePosixPath
from typing import Any

from ..data.dataset import DatasetConfig
from .ai_toolkit import LARGEST
from .convert import Given, lost, near, table, unchanged
from .read import Unreadable, epochs_of, is_off, is_on, number, read_config, switch, text, whole

_DATA = read_config(Path(__file__).with_suffix(".yaml"))
FOR_ALL_SETS = tuple(_DATA["for_all_sets"].split())
"""Options of config.json that hold for every set which does not say otherwise."""
UNSTATED, UNSTATED_SETS = _DATA["config"]["unstated"], _DATA["datasets"]["unstated"]
"""What SimpleTuner takes for options that are not stated, in config.json and in a set."""
NOT_OF_LYCORIS = ("lora_rank", "lora_alpha", "lora_dropout", "flux_lora_target")
"""Options that mean nothing with lora_type lycoris."""
STORES = ("text_embeds", "image_embeds", "conditioning_image_embeds")
"""Kinds of dataset that only say where a cache lies."""
MASKS = ("mask", "segmentation")
"""Kinds of conditioning set whose images say where the loss counts."""


def plain_name(name: str) -> str:
    """SimpleTuner's names with and without dashes, deprecated and documented ones, as one name."""
    name = name.strip().lstrip("-").replace("-", "_")
    return _DATA["other_names"].get(name, name)


def no_remap(given: Given) -> bool:
    """Whether an option switches off SimpleTuner's tail remap for Chroma."""
    return any(is_on(given, f"{name}_schedule") for name in ("flux_fast", "flow_use_beta", "flow_use_uniform"))


def built_in(given: Given) -> dict[str, Any]:
    """What SimpleTuner does for Chroma without an option: the tail remap, except where a schedule switches it off."""
    return {"tail remap": {"objective.remap": "none" if no_remap(given) else "quadratic_split"}}


def precision(value: Any, given: Given) -> Any:
    word = text(value).lower()
    if given.get("base_model_precision", "no_change") != "no_change":
        if word == "bf16":
            return unchanged("base_model_precision says how weights are stored; computing is in bf16 here too")
        return near({}, "a quantised base model computes in bf16 here")
    if word == "fp8":
        return near("fp8", "the weights are stored in fp8 and computing is in bf16 here")
    known = {"bf16": "bf16", "fp16": "fp16", "no": "fp32", "fp32": "fp32"}
    if word not in known:
        raise Unreadable("no, fp16, bf16 or fp8")
    return known[word]


def epochs(value: Any, given: Given) -> Any:
    if whole(value) == 0:
        return unchanged("0: max_train_steps decides")
    if not is_off(given.get("max_train_steps")):
        return unchanged("max_train_steps goes first in SimpleTuner too")
    return {"steps": epochs_of(value)}


def warmup(value: Any, given: Given) -> Any:
    steps, schedule = whole(value), given.get("lr_scheduler")
    if steps and schedule == "constant":
        return unchanged("SimpleTuner's constant schedule has no warm-up")
    if steps and schedule in ("cosine", "cosine_with_restarts", "sine"):
        return near(0, f"for {schedule} SimpleTuner takes it as the period, not a warm-up")
    return steps


def cycles(value: Any, given: Given) -> Any:
    if given.get("lr_scheduler") in ("polynomial", "cosine_with_restarts"):
        return max(1, whole(value))
    return unchanged("read by no other schedule than the restarting one")


def betas(value: Any, given: Given) -> Any:
    return [number(given.get("optimizer_beta1", 0.9)), number(given.get("optimizer_beta2", 0.999))]


def guidance(value: Any, given: Given) -> Any:
    mode = text(given.get("flux_guidance_mode", "constant"))
    if mode not in ("constant", "random-range"):
        raise Unreadable("constant or random-range")
    constant = number(given.get("flux_guidance_value", 1.0))
    low, high = number(given.get("flux_guidance_min", 0.0)), number(given.get("flux_guidance_max", 4.0))
    scale = [constant, constant] if mode == "constant" else [low, high]
    return near(
        {"objective.guidance": mode, "objective.guidance_range": scale},
        "SimpleTuner's Chroma code does not hand this value to the model; here the model gets it",
    )


def shift(value: Any, given: Given) -> Any:
    if is_on(given, "flow_schedule_auto_shift"):
        return unchanged("flow_schedule_auto_shift decides")
    return {"objective.flow_shift": "none"} if number(value) in (0, 1) else shifted(number(value), given)


def shifted(value: Any, given: Given) -> Any:
    """SimpleTuner shifts before its tail remap."""
    values = {"objective.flow_shift": value}
    return values if no_remap(given) else {**values, "objective.shift_first": True}


def lora_type(value: Any, given: Given) -> Any:
    kind, lycoris = text(value).lower(), given.get("lycoris")
    if kind == "standard":
        return unchanged("an ordinary LoRA")
    if kind != "lycoris":
        return lost(f"there is no {kind!r} here")
    if not isinstance(lycoris, dict):
        return near("lokr", "the file that lycoris_config names is not here: set in [lora] what it says")
    algo = text(lycoris.get("algo", "lora")).lower()
    if algo not in ("lora", "locon", "lokr"):
        return lost(f"there is no {algo!r} here: choose a kind in [lora]")
    # What is not stated is LyCORIS' own default.
    values: dict[str, Any] = {"lora.kind": "lokr" if algo == "lokr" else "lora", "lora.target": "all"}
    values["lora.rank"] = min(LARGEST, whole(lycoris.get("linear_dim", 4)))
    values["lora.alpha"] = number(lycoris.get("linear_alpha", 1))
    if algo == "lokr":
        values["lora.lokr_factor"] = whole(lycoris.get("factor", -1))
    elif is_on(lycoris, "dora_wd"):
        values["lora.kind"] = "dora"
    known = {"algo", "linear_dim", "linear_alpha", "dora_wd", *(["factor"] if algo == "lokr" else [])}
    others = ", ".join(
        str(key) for key in lycoris if key not in known and not (key == "multiplier" and lycoris[key] == 1)
    )
    reasons = [f"without counterpart in lycoris_config: {others}"] if others else []
    if values["lora.rank"] < whole(lycoris.get("linear_dim", 4)):
        reasons.append(f"{LARGEST} is the largest rank, at which a LoKr's second factor is whole")
    return near(values, "; ".join(reasons)) if reasons else values


def noise_offset(value: Any, given: Given) -> Any:
    if number(value) == 0 or not is_on(given, "offset_noise"):
        return unchanged("not used without offset_noise")
    chance = number(given.get("noise_offset_probability", 0.25))
    reason = f"SimpleTuner adds it to {chance:g} of the samples (noise_offset_probability), here to all"
    return number(value) if chance == 1 else near(number(value), reason)


def picture_size(value: Any, given: Given) -> Any:
    """`1024`, `1024x768` or several, separated by commas; below 16 megapixels."""
    first, *others = [part.strip().lower() for part in text(value).split(",")]
    width, _, height = first.partition("x")
    sides = [number(width), number(height or width)]
    if not height and sides[0] < 16:
        sides = [megapixels(sides[0])] * 2
    size = {"previews.width": whole(sides[0]), "previews.height": whole(sides[1])}
    return near(size, "all previews have one size: the first is taken") if others else size


def megapixels(area: float) -> int:
    """The side in pixels of a square with `area` million pixels, to the next multiple of 64 (1.0 → 1024)."""
    if area < 0:
        raise Unreadable("a size above 0")
    return max(64, 64 * round(math.sqrt(area * 1e6) / 64))


def conditioning(value: Any, given: Given) -> Any:
    """The sets that go with this one: masks are beside the images here."""
    wanted = [text(item) for item in (value if isinstance(value, list) else [value])]
    if all(item in given["mask_sets"] for item in wanted):
        return near({"masks": "files"}, "masks lie beside the images here, see below")
    return lost("no conditioning images")


def resume(value: Any, given: Given) -> Any:
    if is_off(value) or value == "latest":
        return unchanged("a job with the same settings always goes on from its newest checkpoint")
    return lost("another program's checkpoint cannot be continued; lora.start_from takes its LoRA")


def last_folder(value: Any) -> str:
    return PurePosixPath(text(value).replace("\\", "/")).name or "imported"


def seed(value: Any, given: Given) -> Any:
    return whole(value) if whole(value) > 0 else lost("a new seed at every start; a job has a fixed one")


def steps(value: Any, given: Given) -> Any:
    return whole(value) or unchanged("0: the number of epochs decides")


def ema(value: Any, given: Given) -> Any:
    return number(given.get("ema_decay", 0.995)) if switch(value) else 0.0


def auto_shift(value: Any, given: Given) -> Any:
    return shifted("dynamic", given) if switch(value) else unchanged("not used")


def prompt(value: Any, given: Given) -> Any:
    return unchanged("validation_disable") if is_on(given, "validation_disable") else [text(value)]


def on_startup(value: Any, given: Given) -> Any:
    reason = "the first preview is always made before training"
    return unchanged(reason) if switch(value) else near({}, reason)


def uses(value: Any) -> int:
    return whole(value) + 1


def fixed_caption(given: Given) -> bool:
    strategy = given.get("caption_strategy")
    return is_on(given, "only_instance_prompt") or strategy in ("instanceprompt", "instance_prompt")


def caption_source(value: Any, given: Given) -> Any:
    known = {"textfile": "files", "filename": "filenames"}
    none = lost("captions come from text files, metadata.jsonl/csv, file names or one sentence")
    return "fixed" if fixed_caption(given) else known.get(text(value), none)


def instance_prompt(value: Any, given: Given) -> Any:
    if fixed_caption(given):
        return {"caption_source": "fixed", "default_caption": text(value)}
    if is_on(given, "prepend_instance_prompt"):
        return {"caption_prefix": text(value)}
    return unchanged("not used with this caption strategy")


def resolution(value: Any, given: Given) -> Any:
    kind, size = given.get("resolution_type", "pixel_area"), number(value)
    if kind == "area" or size < 16:
        return [megapixels(size)]
    reason = "the resolution is the side of a square with the bucket's area here, not the shorter side"
    return near([whole(size)], reason) if kind == "pixel" else [whole(size)]


def crop(value: Any, given: Given) -> Any:
    if not switch(value):
        return "centre"
    style, aspect = given.get("crop_style", "center"), given.get("crop_aspect", "square")
    ours = "random" if style == "random" else "centre"
    if aspect in ("square", "random"):
        return near(ours, f"crop_aspect {aspect}: images keep their own shape here (aspect buckets)")
    if style not in ("center", "centre", "random"):
        return near(ours, f"crop_style {style}: crops are centred or random")
    return ours


def shuffle(value: Any, given: Given) -> Any:
    if not isinstance(value, dict) or not is_on(value, "enable"):
        return unchanged("not used")
    if value.get("split_on", "comma") != "comma":
        return lost("only tags between commas are shuffled")
    values = {"tag_shuffles": whole(value.get("count", 1)), "keep_tags": whole(value.get("position_start", 0))}
    if switch(value.get("include_original", True)):
        return values
    return near(values, "the caption as written is always one of the orders")


def sigma_bias(value: Any, given: Given) -> Any:
    if number(value) == 0:
        return unchanged("not used")
    reason = "SimpleTuner moves the draw before its tail remap, ChromaKit moves the noise level after it"
    return near(round(number(value) / math.log(8), 6), reason)


OPTIONS, SET_OPTIONS = table(_DATA["config"], globals()), table(_DATA["datasets"], globals(), DatasetConfig)
