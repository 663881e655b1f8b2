"""A training job as one frozen value, parsed once from nodes, TOML or JSON."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_serializer, field_validator, model_validator
from typing_extensions import Self

from ...data.captions import without_trigger
from ...data.scan import DatasetConfig
from ...errors import ConfigError
from ...files import slug
from ...loading.spec import PLACEMENT, ModelSpec
from ...lora.settings import LoraSettings
from ...model.flavours import flavour
from ...model.latents import snap_size
from ...model.precision import computed_on, precision
from ...names.transformer import without_ranges
from ...options import MAX_SEED, identity
from ...sampling.recipe import RECIPES, Recipe, recipe
from ...sampling.sampler import Method, SamplingSettings
from ...sampling.schedule import FlowShift, SigmaDraw, SigmaRemap, SigmaSettings, Spacing, parse_flow_shift
from ...sampling.text import TRIGGER, TextPadding, apply_trigger
from ...settings import Settings, option
from ..step.objective import GuidanceMode, LossKind
from ..step.optimizers import LrSchedule, OptimizerName, OptimizerSettings, Schedule, check_schedule
from .preserve import PreserveConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

if TYPE_CHECKING:
    import torch


MODEL_PATHS = ("folder", "transformer", "text_encoder", "tokenizer", "vae", "quantised_folder")
"""Fields of a `ModelSpec` that are paths."""

HELD_OUT = 0.1
"""The share of its images that a job holds out by itself."""

FULL_RANK_RATE = 1e-5
"""The learning rate of full-rank training where none is given: a LoRA's is far too high for the weights themselves."""


class LoraConfig(LoraSettings):
    """The adapter in training, what it starts from, and what is kept of it."""

    start_from: str | None = option(None, "A LoRA file of the same shape to go on from.")
    ema_decay: float = option(
        0.0,
        "Above 0: also keep a running mean of the weights, saved as -ema. 0.999 is usual.",
        ge=0,
        lt=1,
        most=0.9999,
        step=0.0001,
        advanced=True,
    )
    save_dtype: Literal["fp32", "bf16"] = option("fp32", "Precision of the finished LoRA. bf16 halves the file.")


class FullConfig(Settings):
    """Full-rank training: weights and biases of linear layers in blocks (see `fullrank.layers`) instead of an adapter.

    All other layers keep the type that they have in the base's files.
    """

    target: str | tuple[str, ...] = option(..., "The blocks to train, e.g. double_blocks.0-3, single_blocks.30-37.")
    norms: bool = option(False, "Also train the blocks' query and key norms.")
    save_dtype: Literal["bf16", "fp16", "fp32"] = option(
        "bf16", "Precision of the trained weights in the finished model."
    )
    layouts: tuple[Literal["original", "diffusers"], ...] = option(
        ("original", "diffusers"),
        "Layouts to write. original: one file as ComfyUI loads it. diffusers: a folder.",
        min_length=1,
    )
    ema_decay: float = option(0.0, "Above 0: also write a model of the weights' running mean, as -ema.", ge=0, lt=1)


class ObjectiveConfig(Settings):
    """What is minimised: the noise levels, which `sigmas` gives as the schedule takes them, and all else.

    huber_delta: see `objective.squared_errors`; in units of the velocity, whose deviation is about 1.4. prior_weight:
    of samples whose target is the model without its adapter. noise_offset, pair_noise: see `objective`. guidance: the
    guidance embedding; `constant` is the first number of guidance_range, `random-range` is drawn evenly between both
    for each sample. text_padding: see `text.TextPadding`. Raises ConfigError for numbers that cannot work.
    """

    draw: SigmaDraw = option(
        "logit_normal", "How noise levels are drawn. chroma: the density that Chroma's author trained with."
    )
    remap: SigmaRemap = option(
        "quadratic",
        "quadratic: more draws near both ends. quadratic_split: SimpleTuner's rule, which never trains the middle.",
    )
    scale: float = option(1.0, "Width of the logit_normal draw.", least=0.05, most=10, step=0.05)
    flow_shift: FlowShift = option("none", "Flow shift of the drawn noise levels: none, dynamic or a number.")
    minimum: float = option(0.0, "Lowest noise level trained.", least=0, most=1, step=0.01)
    maximum: float = option(1.0, "Highest noise level trained.", least=0, most=1, step=0.01)
    loss: LossKind = option("mse", "huber counts large errors less: for data with outliers.", advanced=True)
    huber_delta: float = option(
        0.1, "The error at which huber turns from square to linear.", least=0.001, most=10, step=0.01, advanced=True
    )
    prior_weight: float = option(
        1.0,
        "Weight of regularisation sets, which should stay as the model without LoRA generates them.",
        least=0,
        most=10,
        step=0.1,
        advanced=True,
    )
    noise_offset: float = option(
        0.0,
        "Standard deviation of a constant added to each channel of the noise. 0: off.",
        least=0,
        most=1,
        step=0.01,
        advanced=True,
    )
    pair_noise: bool = option(
        False, "Pair noises and images of a batch by optimal transport; needs a batch above 1.", advanced=True
    )
    guidance: GuidanceMode = option("none", "The guidance embedding in training. none is 0, as in sampling.")
    guidance_range: tuple[float, float] = option(
        (1.0, 1.0), "Its value: the first number for constant, drawn between both for random-range."
    )
    text_padding: TextPadding = option(
        "trim",
        "trim: real tokens and one pad, as sampling has it. zero, unmodified: 512 tokens, slower, to reproduce "
        "other trainers.",
        advanced=True,
    )
    shift_first: bool = option(
        False, "Apply the flow shift before the remap, as SimpleTuner does.", advanced=True, since="0.1"
    )

    @field_validator("flow_shift", mode="before")
    @classmethod
    def _read_shift(cls, value: str | float) -> FlowShift:
        return parse_flow_shift(value)

    @model_validator(mode="after")
    def _numbers_work(self) -> Self:
        if not (math.isfinite(self.huber_delta) and self.huber_delta > 0):
            raise ConfigError(f"The delta of the Huber loss is {self.huber_delta}; it must be above 0 (0.1 is usual).")
        for field, number in (("prior weight", self.prior_weight), ("noise offset", self.noise_offset)):
            if not (math.isfinite(number) and number >= 0):
                raise ConfigError(f"The {field} is {number}; it must be 0 or more.")
        low, high = self.guidance_range
        if not (math.isfinite(low) and math.isfinite(high) and low <= high):
            raise ConfigError(f"The guidance range is {low} to {high}; it needs two numbers, the smaller one first.")
        return self

    def sigmas(self) -> SigmaSettings:
        """The same numbers as the schedule takes them. Raises ConfigError."""
        return SigmaSettings(
            self.draw, self.remap, self.scale, self.flow_shift, self.minimum, self.maximum, self.shift_first
        )


class PreviewPrompt(Settings):
    """One preview image. What is left out is the previews' own; `width` and `height` 0 mean the flavour's size."""

    prompt: str
    negative: str | None = None
    steps: int | None = Field(default=None, ge=1, le=150)
    guidance: float | None = Field(default=None, ge=0, le=100)
    seed: int | None = Field(default=None, ge=0)
    width: int | None = Field(default=None, ge=0)
    height: int | None = Field(default=None, ge=0)


class PreviewConfig(Settings):
    """Images made during training: at step 0, every `every` steps and at the end."""

    prompts: tuple[str | PreviewPrompt, ...] = option(
        (),
        "Texts, or tables with prompt, negative, steps, guidance, seed, width and height "
        "of their own. [trigger] stands for the trigger word.",
    )
    negative: str = option("", "The previews' negative prompt.")
    every: int = option(250, "Steps between previews. 0: only when asked.", ge=0, unit="steps", most=100000)
    steps: int = option(20, "Sampling steps of a preview.", ge=1, le=150)
    guidance: float = option(4.0, "Guidance of a preview.", ge=0, le=100, most=20, step=0.1)
    seed: int = option(42, "Prompt i uses this + i.", ge=0, most=MAX_SEED)
    width: int = option(0, "Width in pixels. 0: the model's own size.", ge=0, unit="pixels", most=4096, step=32)
    height: int = option(0, "Height in pixels. 0: the model's own size.", ge=0, unit="pixels", most=4096, step=32)
    tail_bias: float = option(
        0.0,
        "Towards 1, a preview's steps crowd at both ends; see Chroma Sampler.",
        ge=0,
        le=1,
        step=0.05,
        advanced=True,
    )
    method: Method = option("euler", "How previews are sampled; see Chroma Sampler.", advanced=True)
    spacing: Spacing = option(
        "linear", "How a preview's steps lie between noise and image; see Chroma Sampler.", advanced=True
    )
    flow_shift: FlowShift | None = option(
        None, "Flow shift of previews: none, dynamic or a number. Unset: the recipe's."
    )

    @field_validator("flow_shift", mode="before")
    @classmethod
    def _read_shift(cls, value: str | float | None) -> FlowShift | None:
        return None if value is None else parse_flow_shift(value)

    @field_validator("prompts", mode="before")
    @classmethod
    def _one_prompt(cls, value: Any) -> Any:
        return ((value,) if value.strip() else ()) if isinstance(value, str) else value


@dataclass(frozen=True)
class Preview:
    """One preview image with everything decided: texts with the trigger word in them, size in pixels."""

    prompt: str
    negative: str
    width: int
    height: int
    settings: SamplingSettings


class TrainingConfig(Settings):
    """Everything that decides a training run. Equal configurations are the same job.

    One step is one optimizer step over `batch_size` × `gradient_accumulation` samples of one bucket. The learning rate
    follows `schedule()`. With `full` layers of the model itself are trained instead of the adapter `lora`;
    `more_datasets` are mixed with `dataset` (see `data.samples`).
    """

    name: str = option(..., "The LoRA's file name, in output/loras.", min_length=1, max_length=80)
    model: ModelSpec = ModelSpec()
    dataset: DatasetConfig
    more_datasets: tuple[DatasetConfig, ...] = ()
    validation_dataset: DatasetConfig | None = None
    validation_pictures: int = option(8, "Images of the validation set that the validation loss is measured on.", ge=1)
    lora: LoraConfig = LoraConfig()
    full: FullConfig | None = option(None, "Trains the model's own weights instead.", since="0.1")
    objective: ObjectiveConfig = ObjectiveConfig()
    previews: PreviewConfig = PreviewConfig()
    recipe: str = option(
        "canonical",
        "How text is encoded for training and how previews are sampled; see Chroma Sampler.",
        choices=tuple(RECIPES),
    )
    recipe_overrides: dict[str, str | int | float] = option(
        {}, "Fields of the recipe to change, e.g. noise_dtype=bf16, flow_shift=3.0.", advanced=True
    )
    steps: int = option(1000, "Optimizer steps. 1000 to 3000 for a real concept.", ge=1, unit="steps", most=1000000)
    batch_size: int = option(1, "Images in a batch. More: steadier, slower, more memory.", ge=1, most=256)
    gradient_accumulation: int = option(1, "Batches added up before each step.", ge=1, most=256)
    learning_rate: float = option(
        2e-4, "2e-4 is good; 1e-4 is cautious.", gt=0, least=1e-7, most=1, step=1e-5, round=1e-7
    )
    warmup_steps: int = option(0, "Steps in which the learning rate rises from 0.", ge=0, unit="steps", most=10000)
    lr_schedule: LrSchedule = option(
        "constant", "How the learning rate goes on after the warm-up; all but constant end at 0."
    )
    lr_cycles: int = option(1, "Cosines of lr_schedule restarts.", ge=1, most=100, advanced=True)
    lr_power: float = option(2.0, "Power of lr_schedule polynomial.", gt=0, least=0.1, most=10, step=0.1, advanced=True)
    optimizer: OptimizerName = option(
        "adamw",
        "adamw needs nothing. adamw8bit, prodigy, schedule-free and came need a package and say which; adafactor "
        "keeps almost no state. See docs/optimizers.md.",
        advanced=True,
    )
    betas: tuple[float, float] = option((0.9, 0.999), "The optimizer's decay rates of its two moments.")
    weight_decay: float = option(0.01, "Weight decay of the optimizer.", ge=0, most=1, step=0.001)
    max_grad_norm: float = option(1.0, "Clip the gradient norm at this value. 0: never.", ge=0, most=100, step=0.1)
    seed: int = option(42, "Same seed and settings, same LoRA.", ge=0, most=MAX_SEED)
    gradient_checkpointing: bool = option(
        True, "Compute again instead of remembering: far less memory, a third slower."
    )
    checkpointing_interval: int = option(
        0,
        "With gradient_checkpointing: compute only every n-th block again. 0: as few blocks as the memory allows.",
        ge=0,
        most=64,
        advanced=True,
    )
    compile: bool = option(
        False, "torch.compile for the blocks: slow to begin, then faster. Not with block offload.", advanced=True
    )
    deterministic: bool = option(
        False,
        "The same bits in every run, on a GPU too: attention without its fused kernel, slower and with more memory.",
        advanced=True,
        since="0.1",
    )
    validate_every: int = option(
        250,
        "Steps between measurements of the validation loss on held-out images. 0: only at the start and the end.",
        ge=0,
        unit="steps",
        most=100000,
    )
    checkpoint_every: int = option(
        250, "Steps between checkpoints. 0: only at the end.", ge=0, unit="steps", most=100000
    )
    checkpoint_minutes: float = option(
        0.0,
        "Also save after so many minutes. 0: by steps only.",
        ge=0,
        unit="minutes",
        most=10000,
        step=1,
        advanced=True,
    )
    keep_checkpoints: int = option(3, "Checkpoints to keep; older ones are deleted.", ge=1, most=100)
    keep_best: bool = option(
        True,
        "Keep the checkpoint with the lowest validation loss beside the last ones. Takes hold_out or a validation "
        "dataset.",
        advanced=True,
    )
    tensorboard: bool = option(
        False,
        "Also write TensorBoard event files into the job's folder. Needs the package tensorboardX.",
        advanced=True,
    )
    lr_pattern: dict[str, float] = option(
        {},
        "Factors on the learning rate by block or layer, e.g. single_blocks.*:0.5, *.attn.to_q:2. The first pattern "
        "that fits counts. Empty: 1 everywhere.",
        advanced=True,
        since="0.1",
    )
    preserve: PreserveConfig = option(PreserveConfig(), "What the LoRA must leave as it is.", since="0.1")
    hold_out: float = option(
        0.0,
        "Without a validation dataset: share of the images (at least 2) that are not trained on but measured on, from "
        "8 images on. 0.1 is usual, and taken by itself with stop_when_memorising. 0: none.",
        ge=0,
        le=0.5,
        step=0.05,
        advanced=True,
        since="0.1",
    )
    keep_loras: int = option(
        12,
        "LoRAs of previews and validations to keep, fewer of the early ones; never fewer than the last 3, the best and "
        "those in use. 0: none.",
        ge=0,
        most=1000,
        advanced=True,
        since="0.1",
    )
    stop_when_memorising: int = option(
        0,
        "End with the best step once so many validations in a row said that the LoRA memorises. 0: never.",
        ge=0,
        most=100,
        unit="validations",
        advanced=True,
        since="0.1",
    )
    compile_auto: bool = option(
        False,
        "Compile where it can pay: on CUDA with Triton, from 1000 steps on. A warning says why a job does not.",
        advanced=True,
        since="0.1",
    )

    @model_validator(mode="before")
    @classmethod
    def _default_rate(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("full") and "learning_rate" not in data:
            return {**data, "learning_rate": FULL_RANK_RATE}
        return data

    @field_validator("model", mode="before")
    @classmethod
    def _read_model(cls, value: Any) -> Any:
        return ModelSpec.from_dict(value) if isinstance(value, dict) else value

    @field_serializer("model")
    def _write_model(self, value: ModelSpec) -> dict[str, Any]:
        return value.to_dict()

    @field_validator("lr_pattern")
    @classmethod
    def _factors(cls, value: dict[str, float]) -> dict[str, float]:
        for pattern, factor in value.items():
            without_ranges(pattern)
            if not 0 < factor <= 100:  # also of NaN
                raise ConfigError(
                    f"The factor on the learning rate of '{pattern}' is {factor:g}; it must be above 0 and at most "
                    "100. To leave layers as they are, take them out of the target."
                )
        return value

    @field_validator("recipe")
    @classmethod
    def _known_recipe(cls, value: str) -> str:
        return recipe(value).name

    @model_validator(mode="after")
    def _full_rank_alone(self) -> Self:
        """Raise ConfigError for options that cannot go together with full-rank training."""
        if self.full is None:
            return self
        adapter = [
            name for name, field in type(self.lora).model_fields.items() if getattr(self.lora, name) != field.default
        ]
        if adapter:
            raise ConfigError(
                f"A job trains either a LoRA or the model's own layers, but has both [full] and options of [lora]: "
                f"{', '.join(adapter)}. Leave one of the two out; an average of the weights is ema_decay in [full]."
            )
        if self.model.offload == "block":
            raise ConfigError(
                "Full-rank training cannot be combined with block streaming (offload 'block'): blocks that are trained "
                "change, and would have to travel back after every step. Choose offload 'none' or 'model', fewer "
                "blocks, or a quantised precision: the chosen layers are never quantised, the others are."
            )
        if any(dataset.regularisation for dataset in (self.dataset, *self.more_datasets)):
            raise ConfigError(
                "A regularisation set keeps the model as it is without its LoRA, which is asked for its prediction at "
                "every step. In full-rank training the weights themselves change and there is no such model any more. "
                "Leave the set out, or train its images as a set of their own."
            )
        if self.preserve.weights:
            raise ConfigError(
                "[preserve] compares with the model without its LoRA at every second pass. In full-rank training the "
                "weights themselves change and there is no such model any more. Leave [preserve] out, or train a LoRA."
            )
        return self

    @model_validator(mode="after")
    def _preserves_what_is_not_learnt(self) -> Self:
        """Raise ConfigError for options of `preserve` that need a trigger word, or would preserve what it calls."""
        if self.preserve.class_weight and not self.triggers:
            raise ConfigError(
                "preserve.class_weight compares captions without the trigger word, and no dataset has one. Set its "
                "trigger, or preserve the empty caption (blank_weight) or prompts instead."
            )
        for prompt in self.preserve.prompts if self.preserve.weights else ():
            if not prompt.strip() or TRIGGER in prompt or without_trigger(prompt, self.triggers) != prompt:
                raise ConfigError(
                    f"The prompt “{prompt}” in [preserve] is empty, or calls the concept, which would be trained to "
                    "stay unlearnt. Name ordinary things there, without the trigger word; for the empty caption there "
                    "is blank_weight."
                )
        return self

    @model_validator(mode="before")
    @classmethod
    def _holds_out_to_stop(cls, values: Any) -> Any:
        """A job that is to stop by itself, and has nothing to tell by, holds out a share of its images."""
        if isinstance(values, dict) and values.get("stop_when_memorising"):
            if not values.get("hold_out") and values.get("validation_dataset") is None:
                return {**values, "hold_out": HELD_OUT}
        return values

    @model_validator(mode="after")
    def _can_stop_by_itself(self) -> Self:
        """Raise ConfigError when nothing would be there to go back to."""
        if self.stop_when_memorising and not self.keep_best:
            raise ConfigError(
                "stop_when_memorising ends the job with the step that measured best, which keep_best = false does not "
                "keep. Turn keep_best on, or leave stop_when_memorising at 0."
            )
        return self

    @classmethod
    def parse(cls, data: Any) -> Self:
        """Validate, including what only shows when options are taken together. Raises ConfigError, one paragraph."""
        config = super().parse(data)
        config.recipe_value()
        config.objective.sigmas()
        config.optimizer_settings()
        config.schedule()
        check_schedule(config.optimizer, config.lr_schedule)
        if config.lr_pattern and config.optimizer == "prodigy":
            raise ConfigError(
                "Prodigy finds one learning rate for all layers and takes no factors on it (lr_pattern). Leave "
                "lr_pattern out, or choose adamw."
            )
        for entry in ("", *config.previews.prompts):
            own = entry if isinstance(entry, PreviewPrompt) else None
            config.preview_size(own and own.width, own and own.height)
        return config

    @classmethod
    def from_toml(cls, path: Path | str) -> Self:
        """Read a job file; dataset folders and model files in it are relative to the file. Raises ConfigError."""
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8-sig")  # editors on Windows begin with a mark
        except OSError as error:
            raise ConfigError(f"The job file '{path}' cannot be read: {error.strerror or error}.") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"The job file '{path.name}' is not valid TOML: {error}.") from error
        return cls.from_text(text, path)

    @classmethod
    def from_text(cls, text: str, path: Path) -> Self:
        """`from_toml` of a text that is, or is going to be, in the file `path`."""
        try:
            data = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"The job file '{path.name}' is not valid TOML: {error}.") from error
        more = data.get("more_datasets")
        sections = [data.get("dataset"), data.get("validation_dataset"), *(more if isinstance(more, list) else ())]
        places = [(section, "folder") for section in sections] + [(data.get("model"), key) for key in MODEL_PATHS]
        for section, key in places:
            if isinstance(section, dict) and isinstance(section.get(key), str):
                section[key] = str((path.parent / section[key]).resolve())
        return cls.parse(data)

    @property
    def triggers(self) -> tuple[str, ...]:
        """The trigger words of all training sets."""
        words = (dataset.trigger for dataset in (self.dataset, *self.more_datasets))
        return tuple(dict.fromkeys(word for word in words if word))

    @property
    def ema_decay(self) -> float:
        """Of whatever is trained."""
        return self.lora.ema_decay if self.full is None else self.full.ema_decay

    @property
    def effective_batch(self) -> int:
        """Samples per optimizer step."""
        return self.batch_size * self.gradient_accumulation

    def optimizer_settings(self, device: torch.device | str = "cpu") -> OptimizerSettings:
        """What `stepper.Stepper` takes, for a model that computes on `device`. Raises ConfigError."""
        dtype = computed_on(precision(self.model.precision), device).dtype
        return OptimizerSettings(self.optimizer, self.learning_rate, self.betas, self.weight_decay, dtype)

    def schedule(self) -> Schedule:
        """The learning rate as a function of the step. Raises ConfigError."""
        return Schedule(
            self.lr_schedule, self.learning_rate, self.steps, self.warmup_steps, self.lr_cycles, self.lr_power
        )

    @property
    def resolution(self) -> int:
        """The flavour's own size in pixels."""
        return flavour(self.model.flavour).size

    def recipe_value(self) -> Recipe:
        """The recipe that text states and previews follow."""
        return recipe(self.recipe, self.recipe_overrides)

    def preview_size(self, width: int | None = None, height: int | None = None) -> tuple[int, int]:
        """Width and height of previews in pixels, as they come out. Raises ConfigError."""
        width = self.previews.width if width is None else width
        height = self.previews.height if height is None else height
        return snap_size(width or self.resolution, height or self.resolution, self.recipe_value().size_multiple)

    def preview_list(self) -> list[Preview]:
        """Every preview, in order. Raises PromptError for `[trigger]` without a trigger word, ConfigError for sizes."""
        shared, trigger = self.previews.model_dump(exclude={"prompts", "every"}), self.dataset.trigger
        found = []
        for i, entry in enumerate(self.previews.prompts):
            own = {"prompt": entry} if isinstance(entry, str) else entry.model_dump(exclude_none=True)
            values = {**shared, "seed": self.previews.seed + i, **own}
            width, height = self.preview_size(values.pop("width"), values.pop("height"))
            prompt, negative = (apply_trigger(values.pop(name), trigger) for name in ("prompt", "negative"))
            found.append(Preview(prompt, negative, width, height, SamplingSettings(**values)))
        return found

    def canonical_json(self) -> str:
        """One text for equal configurations.

        Where weights rest in memory does not count: a job that ran out of memory goes on with another offload mode.
        Nor does who watches, nor an option that came later and is at its default: the job keeps the id that it had.
        """
        values = identity(self, self.model_dump(mode="json", exclude={"tensorboard"}))
        values["model"] = {k: v for k, v in values["model"].items() if k not in PLACEMENT}
        values["checkpointing_interval"] = values["checkpointing_interval"] or 1  # both give the same LoRA
        return json.dumps(values, sort_keys=True, separators=(",", ":"))

    def job_id(self) -> str:
        """The job's name in URLs and folders: a readable part and a hash of the whole configuration."""
        digest = hashlib.sha256(self.canonical_json().encode()).hexdigest()[:8]
        return f"{slug(self.name).lower()}-{digest}"
