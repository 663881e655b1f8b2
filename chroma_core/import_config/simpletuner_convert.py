"""Conversions of SimpleTuner options that depend on their value or on other options."""

from __future__ import annotations

from typing import Any

from .rules import (
    Given,
    Outcome,
    Unreadable,
    is_off,
    number,
    switch,
    text,
    whole,
)
from .shared import (
    no_remap,
)

OWN_PERIOD = ("cosine", "cosine_with_restarts", "sine")
"""Schedules whose period SimpleTuner takes from `lr_warmup_steps`."""


def aliases(name: str) -> str:
    """SimpleTuner's names with and without dashes, deprecated and documented ones, as one name."""
    name = name.strip().lstrip("-").replace("-", "_")
    return {
        "network_rank": "lora_rank",
        "network_alpha": "lora_alpha",
        "validation_steps": "validation_step_interval",
        "checkpointing_steps": "checkpoint_step_interval",
        "model_flavor": "model_flavour",
        "flux_t5_padding": "t5_padding",
        "adam_beta1": "optimizer_beta1",
        "adam_beta2": "optimizer_beta2",
    }.get(name, name)


def steps(value: Any, given: Given) -> Outcome:
    steps = whole(value)
    return Outcome("maps", {"steps": steps}) if steps else Outcome("ignored", {}, "0: the number of epochs decides")


def epochs(value: Any, given: Given) -> Outcome:
    if whole(value) == 0:
        return Outcome("ignored", {}, "0: max_train_steps decides")
    if not is_off(given.get("max_train_steps")):
        return Outcome("ignored", {}, "max_train_steps goes first in SimpleTuner too")
    return Outcome(
        "no counterpart",
        {},
        "steps are counted here: set steps = epochs × pictures × repeats / (batch_size × gradient_accumulation)",
    )


def seed(value: Any, given: Given) -> Outcome:
    if whole(value) > 0:
        return Outcome("maps", {"seed": whole(value)})
    return Outcome("no counterpart", {}, "a new seed at every start; a job has a fixed one")


def warmup(value: Any, given: Given) -> Outcome:
    steps, schedule = whole(value), given.get("lr_scheduler")
    if steps == 0:
        return Outcome("maps", {"warmup_steps": 0})
    if schedule == "constant":
        return Outcome("ignored", {}, "SimpleTuner's constant schedule has no warm-up")
    if schedule in OWN_PERIOD:
        return Outcome(
            "differs", {"warmup_steps": 0}, f"for {schedule} SimpleTuner takes it as the period, not a warm-up"
        )
    return Outcome("maps", {"warmup_steps": steps})


def cycles(value: Any, given: Given) -> Outcome:
    if given.get("lr_scheduler") != "polynomial" and given.get("lr_scheduler") != "cosine_with_restarts":
        return Outcome("ignored", {}, "read by no other schedule than the restarting one")
    return Outcome("maps", {"lr_cycles": max(1, whole(value))})


def precision(value: Any, given: Given) -> Outcome:
    word = text(value).lower()
    known = {"bf16": "bf16", "fp16": "fp16", "no": "fp32", "fp32": "fp32"}
    base = given.get("base_model_precision", "no_change")
    if base != "no_change":
        if word == "bf16":
            return Outcome(
                "ignored", {}, "base_model_precision says how weights are stored; computing is in bf16 here too"
            )
        return Outcome("differs", {}, "a quantised base model computes in bf16 here")
    if word == "fp8":
        return Outcome(
            "differs", {"model.precision": "fp8"}, "the weights are stored in fp8 and computing is in bf16 here"
        )
    if word not in known:
        raise Unreadable("no, fp16, bf16 or fp8")
    return Outcome("maps", {"model.precision": known[word]})


def betas(value: Any, given: Given) -> Outcome:
    pair = [number(given.get(f"optimizer_beta{i + 1}", default)) for i, default in enumerate((0.9, 0.999))]
    return Outcome("maps", {"betas": pair})


def ema(value: Any, given: Given) -> Outcome:
    if not switch(value):
        return Outcome("maps", {"lora.ema_decay": 0.0})
    return Outcome("maps", {"lora.ema_decay": number(given.get("ema_decay", 0.995))})


def guidance(value: Any, given: Given) -> Outcome:
    mode = text(given.get("flux_guidance_mode", "constant"))
    if mode not in ("constant", "random-range"):
        raise Unreadable("constant or random-range")
    constant = number(given.get("flux_guidance_value", 1.0))
    low, high = number(given.get("flux_guidance_min", 0.0)), number(given.get("flux_guidance_max", 4.0))
    return Outcome(
        "differs",
        {
            "objective.guidance": mode,
            "objective.guidance_range": [constant, constant] if mode == "constant" else [low, high],
        },
        "SimpleTuner's Chroma code does not hand this value to the model; here the model gets it",
    )


def shift(value: Any, given: Given) -> Outcome:
    shift = number(value)
    if shift in (0, 1):
        return Outcome("maps", {"objective.flow_shift": "none"})
    if "flow_schedule_auto_shift" in given and switch(given["flow_schedule_auto_shift"]):
        return Outcome("ignored", {}, "flow_schedule_auto_shift decides")
    return shifted(shift, given)


def auto_shift(value: Any, given: Given) -> Outcome:
    return shifted("dynamic", given) if switch(value) else Outcome("ignored", {}, "not used")


def shifted(shift: float | str, given: Given) -> Outcome:
    values = {"objective.flow_shift": shift}
    if no_remap(given):
        return Outcome("maps", values)
    return Outcome(
        "differs", values, "SimpleTuner shifts before its tail remap, ChromaKit after it: other noise levels"
    )


def noise_offset(value: Any, given: Given) -> Outcome:
    if number(value) == 0 or not switch(given.get("offset_noise", False)):
        return Outcome("ignored", {}, "not used without offset_noise")
    chance = number(given.get("noise_offset_probability", 0.25))
    return Outcome(
        "maps" if chance == 1 else "differs",
        {"objective.noise_offset": number(value)},
        ""
        if chance == 1
        else f"SimpleTuner adds it to {chance:g} of the samples (noise_offset_probability), here to all",
    )


def resume(value: Any, given: Given) -> Outcome:
    if is_off(value) or value == "latest":
        return Outcome("ignored", {}, "a job with the same settings always goes on from its newest checkpoint")
    return Outcome(
        "no counterpart", {}, "another program's checkpoint cannot be continued; lora.start_from takes its LoRA"
    )


def previews_off(value: Any, given: Given) -> Outcome:
    return Outcome("maps", {"previews.prompts": []}) if switch(value) else Outcome("ignored", {}, "not used")


def on_startup(value: Any, given: Given) -> Outcome:
    if switch(value):
        return Outcome("ignored", {}, "the first preview is always made before training")
    return Outcome("differs", {}, "the first preview is always made before training")


def tokens(value: Any, given: Given) -> Outcome:
    if whole(value) == 512:
        return Outcome("ignored", {}, "512 tokens here too")
    return Outcome("no counterpart", {}, "captions are read up to 512 tokens, as the model was trained")


def prompt(value: Any, given: Given) -> Outcome:
    off = "validation_disable" in given and switch(given["validation_disable"])
    return Outcome("ignored", {}, "validation_disable") if off else Outcome("maps", {"previews.prompts": [text(value)]})
