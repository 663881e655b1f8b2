"""Conversions that both tools' tables use."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any

from .rules import Given, Lost, Near, Outcome, Same, Unreadable, number, switch, text, whole

CONSTANT_LR = "a wave between the rate and nearly 0; the rate stays constant"

REPOSITORIES = {
    "lodestones/chroma1-base": "base",
    "lodestones/chroma1-hd": "hd",
    "lodestones/chroma1-flash": "flash",
}
"""The published models by their names on the Hub, in lower case."""

WEIGHTS = (".safetensors", ".sft", ".gguf")


class ForeignPath(str):
    """A path as the foreign file has it: made absolute where it exists, see `apply.resolve`."""


def path(value: Any) -> ForeignPath:
    """A path that is not empty."""
    read = text(value).strip()
    if not read:
        raise Unreadable("a path")
    return ForeignPath(read)


def file_name(value: Any) -> str:
    """The last part of a path, on either system's spelling."""
    return PurePosixPath(text(value).replace("\\", "/")).name or "imported"


def is_local(name: str) -> bool:
    """Whether a model's name is a place on this computer and no repository: a repository is `owner/name`."""
    return name.lower().endswith(WEIGHTS) or re.fullmatch(r"[\w.-]+/[\w.-]+", name) is None or name.startswith(".")


def model_source(value: Any, given: Given) -> Outcome:
    """A repository, a folder or a single file as the model."""
    name = text(value).strip()
    if not name:
        return Outcome("ignored", {}, "not used")
    flavour = REPOSITORIES.get(name.lower())
    if flavour:
        return Outcome("maps", {"model.flavour": flavour})
    if name.lower().endswith(WEIGHTS):
        return Outcome("maps", {"model.transformer": ForeignPath(name)})
    if re.match(r"lodestones/chroma\b", name, re.IGNORECASE):
        reason = (
            "a development version of Chroma; the published weights of the flavour are used: name a file in "
            "model.transformer"
        )
        return Outcome("differs", {} if "model_flavour" in given else {"model.flavour": "base"}, reason)
    if is_local(name):
        return Outcome("maps", {"model.folder": ForeignPath(name)})
    return Outcome(
        "no counterpart", {}, "other repositories are not loaded: download it and name its folder in model.folder"
    )


def part_source(part: str) -> Callable[[Any, Given], Outcome]:
    """One part of the model from a file or folder of this computer."""

    def convert(value: Any, given: Given) -> Outcome:
        name = text(value).strip()
        if not name:
            return Outcome("ignored", {}, "not used")
        if is_local(name):
            return Outcome("maps", {f"model.{part}": ForeignPath(name)})
        return Outcome(
            "no counterpart",
            {},
            f"the {part} comes from the flavour's repository, a file or a folder: name one in model.{part}",
        )

    return convert


def no_remap(given: Given) -> bool:
    """Whether a SimpleTuner option switches off its tail remap for Chroma."""
    names = ("flux_fast_schedule", "flow_use_beta_schedule", "flow_use_uniform_schedule")
    return any(name in given and switch(given[name]) for name in names)


def picture_size(value: Any, given: Given) -> Outcome:
    """`1024`, `1024x768` or several, separated by commas; below 16 megapixels."""
    first, *others = [part.strip().lower() for part in text(value).split(",")]
    width, _, height = first.partition("x")
    sides = [number(width), number(height or width)]
    if not height and sides[0] < 16:
        sides = [megapixels(sides[0])] * 2
    size = {"previews.width": whole(sides[0]), "previews.height": whole(sides[1])}
    if others:
        return Outcome("differs", size, "all previews have one size: the first is taken")
    return Outcome("maps", size)


def megapixels(area: float) -> int:
    """The side in pixels of a square with `area` million pixels, to the next multiple of 64 (1.0 → 1024)."""
    return max(64, 64 * round(math.sqrt(area * 1e6) / 64))


def single_prompt(value: Any, given: Given) -> Outcome:
    """How many pictures a prompt gets."""
    if whole(value) <= 1:
        return Outcome("ignored", {}, "one picture a prompt here too")
    return Outcome("no counterpart", {}, "a prompt gives one picture: write it several times into previews.prompts")


def quanto_names() -> dict[str, Any]:
    """Precisions of quantised weights, by SimpleTuner's names."""
    own = "stored by ChromaKit's own quantised layers instead"
    return {
        "no_change": Same("not quantised"),
        "bf16": "bf16",
        "int8-quanto": "int8-quanto",
        "int4-quanto": "int4-quanto",
        "fp8-quanto": "fp8-quanto",
        "nf4-bnb": "nf4-bnb",
        "fp8-torchao": "fp8-torchao",
        "int8-torchao": Near("int8", own),
        "int4-torchao": Near("int4", own),
        "fp8uz-quanto": Near("fp8-quanto", "the fp8 format of other hardware"),
        "int2-quanto": Lost("2 bits are not offered: int4, nf4"),
    }
