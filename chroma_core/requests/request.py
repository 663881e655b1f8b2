"""The inference request: its fields and limits, and the images that it asks for with everything decided.

The names and the defaults are those of ai-toolkit-inference (`POST /v1/inference`), whose requests work unchanged. What
we do otherwise, and the fields that are ours, are listed in docs/requests.md.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    AllowInfNan,
    BaseModel,
    BeforeValidator,
    Field,
    PrivateAttr,
    Strict,
    ValidationError,
    field_validator,
)
from typing_extensions import Self

from ..errors import ChromaKitError, ConfigError, PromptError, check_text, nearest
from ..files import each_once
from ..loading.spec import LoraMode, Offload
from ..lora.strengths import parse_blocks, parse_schedule
from ..model.flavours import FLAVOURS, Flavour, flavour
from ..model.latents import snap_size
from ..model.precision import precision
from ..options import MAX_SEED, option_of
from ..sampling.recipe import recipe
from ..sampling.sampler import SamplingSettings
from ..sampling.text import TRIGGER, apply_trigger
from ..settings import Settings, mistakes, short

MODEL_ID = "chroma"
"""What the reference calls Chroma1-Base."""

SIZE_MULTIPLE = 32
"""Pixels that sides are floored to a multiple of, whatever the recipe."""

MAX_PROMPTS, MAX_LORAS = 64, 16

RANDOM = -1
"""The seed that asks for a random one."""

DEFAULT_SEED = 42
# Strict: "1024" and true are mistakes of the program that wrote the request, and must not become 1024 and 1.
Text = Annotated[str, Strict(), Field(max_length=10_000)]
Name = Annotated[str, Strict(), Field(min_length=1, max_length=1000)]
Whole = Annotated[int, BeforeValidator(lambda value: _whole(value)), Strict()]
Number = Annotated[float, Strict(), AllowInfNan(False)]


NULLABLE = {
    "": {"trigger_word", "loras"},
    "prompts": {
        "width", "height", "seed", "sample_steps", "guidance_scale", "neg", "trigger_word", "ctrl_img", "resolution",
        "sampler", "num_frames", "fps",
    },
    "loras": {"network_multiplier", "allow_partial", "blocks", "schedule"},
}  # fmt: skip
"""Fields, by the list that their object stands in, for which null means the default: programs send it for what they
leave out."""

WITHOUT_EFFECT = {
    "hf_token": "what a download needs is the server's, HF_TOKEN",
    "sampler": "requests use euler",
    "num_frames": "Chroma makes single images",
    "fps": "Chroma makes single images",
    "resolution": "sizes are width and height",
}
"""Fields of the reference that change nothing here, and why."""


def _whole(value: Any) -> Any:
    """42 for 42.0: some programs know no other numbers."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _asked(field: str, default: Any = None) -> Any:
    """A field that sets an option of `SamplingSettings`, within the range that the nodes have."""
    option = option_of(SamplingSettings, field)
    return Field(default, ge=option.least, le=option.most)


class RequestPrompt(Settings):
    """One image. What is left out is the model's default; without a seed it is the request's seed + its place."""

    prompt: Text
    width: Whole | None = Field(default=None, ge=64, le=4096)
    height: Whole | None = Field(default=None, ge=64, le=4096)
    seed: Whole | None = Field(default=None, ge=RANDOM, le=MAX_SEED)
    sample_steps: Whole | None = _asked("steps")
    guidance_scale: Number | None = _asked("guidance")
    neg: Text = ""
    trigger_word: Text | None = None


class RequestLora(Settings):
    """One LoRA. `path` is a name in ComfyUI's LoRA folders; on the command line a file, relative to the request's.

    These are ours: allow_partial: also where only some of its layers fit. blocks, schedule: see `lora.strengths`.
    """

    path: Name
    network_multiplier: Number = Field(default=1.0, ge=-2, le=2)
    allow_partial: Annotated[bool, Strict()] = False
    blocks: Text = ""
    schedule: Text = ""

    @field_validator("blocks", "schedule")
    @classmethod
    def _readable(cls, value: str, info) -> str:
        try:
            (parse_blocks if info.field_name == "blocks" else parse_schedule)(value)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return value


class InferenceRequest(Settings):
    """What to generate with which model and LoRAs. All fields from `seed` on are ours.

    first_block_cache: see `SamplingSettings`.
    seed: of the prompts that have none; prompt i gets seed + i.
    folder, transformer, text_encoder, vae: files instead of the published ones; names in ComfyUI's model folders, on
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
    first_block_cache: Number = _asked("first_block_cache", 0.0)
    _remarks: tuple[str, ...] = PrivateAttr(default=())

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
        check_text(data, "The request cannot be used: ")
        remarks: list[str] = []
        data = _taken(data, "", "", remarks)
        try:
            request = cls.model_validate(data)
        except ValidationError as error:
            raise unusable("; ".join(mistakes(error, cls))) from error
        request.images()
        request._remarks = tuple(remarks)
        return request

    @property
    def remarks(self) -> tuple[str, ...]:
        """What was asked for and has no effect, a sentence each."""
        return self._remarks

    @classmethod
    def read(cls, text: str | bytes) -> Self:
        """`parse` of a JSON text. Raises ConfigError, also for a key that stands twice in one object."""
        twice = "the key {!r} stands twice in one object; only one of them would count"
        try:
            value = json.loads(text, object_pairs_hook=each_once(twice))
        except (ValueError, RecursionError) as error:
            raise unusable(f"it is not valid JSON ({error})") from error
        return cls.parse(value)

    @property
    def flavour(self) -> Flavour:
        """The model's flavour: `chroma` is Chroma1-Base."""
        return FLAVOURS["base" if self.model == MODEL_ID else self.model]

    def images(self, random_seed: Callable[[], int] = lambda: secrets.randbelow(2**32)) -> list[PlannedImage]:
        """Every image with everything decided; random seeds are drawn anew at each call.

        Raises ConfigError for `[trigger]` without a trigger word, naming the field.
        """
        defaults = self.flavour
        base = random_seed() if self.seed == RANDOM else self.seed
        found = []
        for i, asked in enumerate(self.prompts):
            seed = base + i if asked.seed is None else asked.seed
            width, height = (defaults.size if side is None else side for side in (asked.width, asked.height))
            prompt, neg = self._with_trigger(i, "prompt"), self._with_trigger(i, "neg")
            steps = defaults.steps if asked.sample_steps is None else asked.sample_steps
            guidance = defaults.guidance if asked.guidance_scale is None else asked.guidance_scale
            size = snap_size(width, height, SIZE_MULTIPLE)
            seed = random_seed() if seed == RANDOM else seed
            found.append(PlannedImage(prompt, neg, *size, seed, steps, guidance))
        return found

    def settings(self, image: PlannedImage) -> SamplingSettings:
        """What the sampler takes for one of the images."""
        return SamplingSettings(
            steps=image.sample_steps,
            guidance=image.guidance_scale,
            seed=image.seed,
            first_block_cache=self.first_block_cache,
        )

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


_FIELDS: dict[str, type[BaseModel]] = {"": InferenceRequest, "prompts": RequestPrompt, "loras": RequestLora}


def _taken(data: dict[str, Any], kind_: str, where: str, remarks: list[str]) -> dict[str, Any]:
    """The fields of one object of a request that mean something here; `remarks` gets a sentence for each other.

    What could be a known field misspelt is left in, for the error that it is; all of a LoRA's fields could be.
    """
    found: dict[str, Any] = {}
    for name, value in data.items():
        known = name in _FIELDS[kind_].model_fields
        if value is None and name in NULLABLE[kind_]:
            continue
        if known and name in _FIELDS and isinstance(value, list):
            items = enumerate(value)
            value = [_taken(v, name, f"{name}[{i}].", remarks) if isinstance(v, dict) else v for i, v in items]
        if known or kind_ == "loras" or nearest(name, _FIELDS[kind_].model_fields) and name not in WITHOUT_EFFECT:
            found[name] = value
        elif name == "ctrl_img":
            raise unusable(f"{where}{name} is {short(value)}, but Chroma takes no control image; leave it out")
        else:
            why = WITHOUT_EFFECT.get(name, "there is no such field here")
            remarks.append(f"{where}{name} has no effect: {why}.")
    return found


@dataclass(frozen=True)
class PlannedImage:
    """One image of a request with everything decided: texts with the trigger word in them, size as sampled."""

    prompt: str
    neg: str
    width: int
    height: int
    seed: int
    sample_steps: int
    guidance_scale: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, under the request's own names."""
        return asdict(self)


def unusable(why: str) -> ConfigError:
    """The error of a request that cannot be carried out."""
    return ConfigError(f"The request cannot be used: {why}{'' if why.endswith('?') else '.'}")


def kind(data: Any) -> str:
    """What a JSON value is."""
    kinds = {list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"}
    return kinds.get(type(data), "null")
