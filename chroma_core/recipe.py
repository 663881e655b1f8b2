"""The recipe: the numbers, beyond prompt, seed, steps and guidance, that decide a picture.

Runtimes disagree about them, which is why a LoRA's pictures differ between trainer and user. A recipe is a frozen value
that previews, the sampler node and the command line share and that every artefact records.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from .errors import ConfigError
from .schedule import FlowShift, parse_flow_shift

TextAttention = Literal["masked", "unpadded", "full"]
StateDtype = Literal["fp32", "bf16", "model"]


@dataclass(frozen=True)
class Recipe:
    """How text, noise, time and latents are computed.

    text_attention: T5 over padding: `masked` hides it, `unpadded` never adds it, `full` pads to 512 and attends to it.
    visible_padding: pad tokens, after the n real ones (with `</s>`), that the transformer sees.
    noise_dtype / time_dtype / latents_dtype: what the initial noise is drawn in, the time is rounded to before it is
        embedded, and the latents are kept in between steps; `model` is the transformer's own dtype.
    flow_shift: see `schedule.apply_flow_shift`.
    size_multiple: pixels that a picture's sides are floored to a multiple of.
    """

    name: str = "canonical"
    text_attention: TextAttention = "masked"
    visible_padding: int = 1
    noise_dtype: StateDtype = "fp32"
    time_dtype: StateDtype = "fp32"
    latents_dtype: StateDtype = "fp32"
    flow_shift: FlowShift = "dynamic"
    size_multiple: int = 32

    def __post_init__(self) -> None:
        if self.text_attention not in get_args(TextAttention):
            raise ConfigError(
                f"text_attention is {self.text_attention!r}; choose one of: {', '.join(get_args(TextAttention))}."
            )
        for name in ("noise_dtype", "time_dtype", "latents_dtype"):
            if getattr(self, name) not in get_args(StateDtype):
                raise ConfigError(
                    f"{name} is {getattr(self, name)!r}; choose one of: {', '.join(get_args(StateDtype))}."
                )
        if self.visible_padding < 0 or self.size_multiple % 16:
            raise ConfigError(
                "visible_padding must be 0 or more, and size_multiple a multiple of 16 (one image token)."
            )
        parse_flow_shift(self.flow_shift)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as written into LoRA headers, pictures and job files."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        """The inverse of `to_dict`; an unknown field is a ConfigError, because it would be a number not honoured."""
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise ConfigError(f"The recipe has fields that this version does not know: {', '.join(sorted(unknown))}.")
        return cls(**values)


RECIPES: dict[str, Recipe] = {
    r.name: r
    for r in (
        Recipe(),
        Recipe("comfyui", text_attention="unpadded", visible_padding=0, size_multiple=16),
        Recipe("ai-toolkit", text_attention="full", noise_dtype="bf16", time_dtype="bf16", latents_dtype="bf16"),
        Recipe("diffusers", noise_dtype="model", time_dtype="model", latents_dtype="model", size_multiple=16),
    )
}

CANONICAL = RECIPES["canonical"]


def recipe(name: str) -> Recipe:
    """Look up a recipe; raises ConfigError that lists the known ones."""
    try:
        return RECIPES[name]
    except KeyError:
        raise ConfigError(f"There is no recipe '{name}'. Choose one of: {', '.join(RECIPES)}.") from None
