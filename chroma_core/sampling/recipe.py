"""The recipe: the numbers, beyond prompt, seed, steps and guidance, that decide an image.

Runtimes disagree about them, which is why a LoRA's images differ between trainer and user. A recipe is a frozen value
that previews, the sampler node and the command line share and that every artefact records.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

from ..errors import ConfigError, check_choice, did_you_mean
from .schedule import FlowShift, parse_flow_shift
from .solvers import MultistepTime

TextAttention = Literal["masked", "unpadded", "full"]
StateDtype = Literal["fp32", "bf16", "model"]

CHOICES: dict[str, tuple[str, ...]] = {
    "text_attention": get_args(TextAttention),
    "noise_dtype": get_args(StateDtype),
    "time_dtype": get_args(StateDtype),
    "latents_dtype": get_args(StateDtype),
    "multistep_time": get_args(MultistepTime),
}
"""The fields that have a fixed set of values."""

MAX_PADDING = 256
"""Pad tokens that may be visible: half of the 512 text positions."""


@dataclass(frozen=True)
class Recipe:
    """How text, noise, time and latents are computed.

    text_attention: T5 over padding: `masked` hides it, `unpadded` never adds it, `full` pads to 512 and attends to it.
    visible_padding: pad tokens, after the n real ones (with `</s>`), that the transformer sees.
    noise_dtype / time_dtype / latents_dtype: what the initial noise is drawn in, the time is rounded to before it is
        embedded, and the latents are kept in between steps; `model` is the transformer's own dtype.
    flow_shift: see `schedule.apply_flow_shift`.
    size_multiple: pixels that an image's sides are floored to a multiple of.
    multistep_time: see `solvers.MultistepTime`; only the method `dpmpp_2m` reads it.
    """

    name: str = "canonical"
    text_attention: TextAttention = "masked"
    visible_padding: int = 1
    noise_dtype: StateDtype = "fp32"
    time_dtype: StateDtype = "fp32"
    latents_dtype: StateDtype = "fp32"
    flow_shift: FlowShift = "dynamic"
    size_multiple: int = 32
    multistep_time: MultistepTime = "half_log_snr"

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            check_choice(name, getattr(self, name), known)
        if not 0 <= self.visible_padding <= MAX_PADDING:
            raise ConfigError(f"visible_padding is {self.visible_padding}; it must be between 0 and {MAX_PADDING}.")
        if not 16 <= self.size_multiple <= 512 or self.size_multiple % 16:
            raise ConfigError(
                f"size_multiple is {self.size_multiple}; it must be a multiple of 16 (one image token), 512 at most."
            )
        parse_flow_shift(self.flow_shift)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as written into LoRA headers, images and job files."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        """The inverse of `to_dict`; an unknown field is a ConfigError, because it would be a number not honoured."""
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise ConfigError(f"The recipe has fields that this version does not know: {', '.join(sorted(unknown))}.")
        return cls(**values)

    def override(self, values: Mapping[str, Any]) -> Recipe:
        """The recipe with some fields changed; values may be texts. Its name then tells the changes.

        Raises ConfigError for a field that does not exist, or that cannot have the value.
        """
        known = [field.name for field in fields(self) if field.name != "name"]
        changed: dict[str, Any] = {}
        for name, value in values.items():
            if name not in known:
                raise ConfigError(
                    f"A recipe has no field '{name}' to override. The fields are: {', '.join(known)}."
                    f"{did_you_mean(name, known)}"
                )
            value = _read(name, value)
            if value != getattr(self, name):
                changed[name] = value
        if not changed:
            return self
        return replace(self, **changed, name=f"{self.name} with {_pairs(changed)}")

    def describe(self) -> str:
        """One line with every field, for people."""
        values = {name: value for name, value in self.to_dict().items() if name != "name"}
        return f"{self.name}: {_pairs(values)}"


def parse_overrides(text: str) -> dict[str, str]:
    """`noise_dtype=bf16, flow_shift=3.0` (commas or lines) → {field: value}, for `Recipe.override`.

    Raises ConfigError for a part without "=" and for a field that is given twice.
    """
    found: dict[str, str] = {}
    for part in filter(None, (piece.strip() for piece in text.replace("\n", ",").split(","))):
        name, separator, value = (piece.strip() for piece in part.partition("="))
        if not separator or not name or not value:
            raise ConfigError(f"The recipe override “{part}” must read field=value, e.g. flow_shift=3.0.")
        if name in found:
            raise ConfigError(f"The recipe field '{name}' is overridden twice. Leave one.")
        found[name] = value
    return found


def _read(name: str, value: Any) -> Any:
    if name in ("visible_padding", "size_multiple"):
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if isinstance(value, bool) or not number.is_integer():
            raise ConfigError(f"{name} is {value!r}; it must be a whole number.")
        return int(number)
    if name == "flow_shift":
        return parse_flow_shift(str(value))
    return value


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())


RECIPES: dict[str, Recipe] = {
    r.name: r
    for r in (
        Recipe(),
        Recipe("comfyui", text_attention="unpadded", visible_padding=0, size_multiple=16, multistep_time="log_sigma"),
        Recipe("ai-toolkit", text_attention="full", noise_dtype="bf16", time_dtype="bf16", latents_dtype="bf16"),
        Recipe("diffusers", noise_dtype="model", time_dtype="model", latents_dtype="model", size_multiple=16),
    )
}

CANONICAL = RECIPES["canonical"]


def recipe(name: str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Look up a recipe and change it by `overrides`; raises ConfigError that lists what there is."""
    try:
        return RECIPES[name].override(overrides or {})
    except KeyError:
        meant = did_you_mean(name, RECIPES)
        raise ConfigError(f"There is no recipe '{name}'. Choose one of: {', '.join(RECIPES)}.{meant}") from None
