"""The inference request: its fields and limits, and the pictures that it asks for with everything decided.

The names and the defaults are those of ai-toolkit-inference (`POST /v1/inference`), whose requests work unchanged. What
we do otherwise, and the fields that are ours, are listed in docs/requests.md.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from pydantic import AllowInfNan, Field, Strict, ValidationError, field_validator
from typing_extensions import Self

from ..data.settings import Settings
from ..errors import ChromaKitError, PromptError
from ..loading.spec import LoraMode, Offload
from ..model.flavours import FLAVOURS, Flavour, flavour
from ..model.latents import snap_size
from ..model.precision import precision
from ..sampling.recipe import recipe
from ..sampling.sampler import SamplingSettings
from ..sampling.text import TRIGGER, apply_trigger
from .mistakes import kind, mistakes, read_json, short, unusable

MODEL_ID = "chroma"
"""What the reference calls Chroma1-Base."""

SIZE_MULTIPLE = 32
"""Pixels that sides are floored to a multiple of, whatever the recipe."""

MAX_PROMPTS, MAX_LORAS = 64, 16

RANDOM = -1
"""The seed that asks for a random one."""

DEFAULT_SEED = 42
MAX_SEED = 2**53 - 1
"""The largest whole number that every JSON reader holds exactly."""

# Strict: "1024" and true are mistakes of the program that wrote the request, and must not become 1024 and 1.
Text = Annotated[str, Strict(), Field(max_length=10_000)]
Name = Annotated[str, Strict(), Field(min_length=1, max_length=1000)]
Whole = Annotated[int, Strict()]
Number = Annotated[float, Strict(), AllowInfNan(False)]


class RequestPrompt(Settings):
    """One picture. What is left out is the model's default; without a seed it is the request's seed + its place."""

    prompt: Text
    width: Whole | None = Field(default=None, ge=64, le=4096)
    height: Whole | None = Field(default=None, ge=64, le=4096)
    seed: Whole | None = Field(default=None, ge=RANDOM, le=MAX_SEED)
    sample_steps: Whole | None = Field(default=None, ge=1, le=150)
    guidance_scale: Number | None = Field(default=None, ge=0, le=20)
    neg: Text = ""
    trigger_word: Text | None = None


class RequestLora(Settings):
    """One LoRA. `path` is a name in the host's LoRA folders; on the command line a file, relative to the request's."""

    path: Name
    network_multiplier: Number = Field(default=1.0, ge=-2, le=2)


class InferenceRequest(Settings):
    """What to paint with which model and LoRAs. All fields from `seed` on are ours.

    seed: of the prompts that have none; prompt i gets seed + i.
    folder, transformer, text_encoder, vae: files instead of the published ones; names in the host's model folders, on
        the command line paths relative to the request's file.
    """

    model: Annotated[str, Strict()] = MODEL_ID
    trigger_word: Text | None = None
    prompts: tuple[RequestPrompt, ...] = Field(min_length=1, max_length=MAX_PROMPTS)
    loras: tuple[RequestLora, ...] = Field(default=(), max_length=MAX_LORAS)
    seed: Whole = Field(default=DEFAULT_SEED, ge=RANDOM, le=MAX_SEED - MAX_PROMPTS)
    precision: Annotated[str, Strict()] = "bf16"
    text_precision: Annotated[str, Strict()] = "bf16"
    offload: Offload = "model"
    lora_mode: LoraMode = "live"
    recipe: Annotated[str, Strict()] = "canonical"
    folder: Name | None = None
    transformer: Name | None = None
    text_encoder: Name | None = None
    vae: Name | None = None

    @field_validator("model", "precision", "text_precision", "recipe")
    @classmethod
    def _known(cls, value: str, info) -> str:
        known: dict[str, Callable[[str], object]] = {
            "model": lambda name: name == MODEL_ID or flavour(name),
            "recipe": recipe,
        }
        try:
            known.get(info.field_name, precision)(value)
        except ChromaKitError as error:
            raise ValueError(str(error)) from None
        return value

    @classmethod
    def parse(cls, data: Any) -> Self:
        """A request that can be carried out as far as its text tells. Raises ConfigError naming every wrong field."""
        if not isinstance(data, dict):
            raise unusable(f"it is {kind(data)}, and must be a JSON object with at least `prompts`")
        try:
            request = cls.model_validate(data)
        except ValidationError as error:
            raise unusable("; ".join(mistakes(error, cls, {"prompts": RequestPrompt, "loras": RequestLora}))) from error
        request.pictures()
        return request

    @classmethod
    def read(cls, text: str | bytes) -> Self:
        """`parse` of a JSON text. Raises ConfigError, also for a key that stands twice in one object."""
        return cls.parse(read_json(text))

    @property
    def flavour(self) -> Flavour:
        """The model's flavour: `chroma` is Chroma1-Base."""
        return FLAVOURS["base" if self.model == MODEL_ID else self.model]

    def pictures(self, random_seed: Callable[[], int] = lambda: secrets.randbelow(2**32)) -> list[PlannedPicture]:
        """Every picture with everything decided; random seeds are drawn anew at each call.

        Raises ConfigError for `[trigger]` without a trigger word, naming the field.
        """
        defaults = self.flavour
        base = random_seed() if self.seed == RANDOM else self.seed
        found = []
        for i, asked in enumerate(self.prompts):
            seed = base + i if asked.seed is None else asked.seed
            width, height = (defaults.size if side is None else side for side in (asked.width, asked.height))
            width, height = snap_size(width, height, SIZE_MULTIPLE)
            found.append(
                PlannedPicture(
                    prompt=self._with_trigger(i, "prompt"),
                    neg=self._with_trigger(i, "neg"),
                    width=width,
                    height=height,
                    seed=random_seed() if seed == RANDOM else seed,
                    sample_steps=defaults.steps if asked.sample_steps is None else asked.sample_steps,
                    guidance_scale=defaults.guidance if asked.guidance_scale is None else asked.guidance_scale,
                )
            )
        return found

    def _with_trigger(self, i: int, field: Literal["prompt", "neg"]) -> str:
        asked = self.prompts[i]
        for name, word in ((f"prompts[{i}].trigger_word", asked.trigger_word), ("trigger_word", self.trigger_word)):
            if word and TRIGGER in word:
                raise unusable(
                    f"{name} is {short(word)}; it is what replaces {TRIGGER}, so it cannot contain it. Give the word "
                    "that the LoRA was trained with"
                )
        try:
            return apply_trigger(getattr(asked, field), asked.trigger_word, self.trigger_word)
        except PromptError:
            raise unusable(
                f"prompts[{i}].{field} is {short(getattr(asked, field))} and contains {TRIGGER}, but neither the "
                f"prompt nor the request has a trigger_word. Give one, or take {TRIGGER} out"
            ) from None


@dataclass(frozen=True)
class PlannedPicture:
    """One picture of a request with everything decided: texts with the trigger word in them, size as painted."""

    prompt: str
    neg: str
    width: int
    height: int
    seed: int
    sample_steps: int
    guidance_scale: float

    def settings(self) -> SamplingSettings:
        """What the sampler takes."""
        return SamplingSettings(steps=self.sample_steps, guidance=self.guidance_scale, seed=self.seed)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, under the request's own names."""
        return asdict(self)
