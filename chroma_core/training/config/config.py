"""A training job as one frozen value, parsed once from nodes, TOML or JSON."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_serializer, field_validator, model_validator
from typing_extensions import Self

from ...data.scan import DatasetConfig
from ...data.settings import Settings
from ...errors import ConfigError
from ...files import slug
from ...loading.spec import PLACEMENT, ModelSpec
from ...lora.modules import AdapterKind
from ...lora.settings import LoraSettings
from ...model.flavours import flavour
from ...model.latents import snap_size
from ...model.precision import precision
from ...sampling.recipe import Recipe, recipe
from ...sampling.sampler import Method, SamplingSettings
from ...sampling.schedule import FlowShift, SigmaDraw, SigmaRemap, SigmaSettings, parse_flow_shift
from ...sampling.spacing import Spacing
from ...sampling.text import TextPadding, apply_trigger
from ..step.lr import LrSchedule, Schedule
from ..step.objective import GuidanceMode, LossKind, ObjectiveSettings
from ..step.optimizers import OptimizerName, OptimizerSettings, check_schedule

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]


MODEL_PATHS = ("folder", "transformer", "text_encoder", "tokenizer", "vae", "quantised_folder")
"""Fields of a `ModelSpec` that are paths."""

FULL_RANK_RATE = 1e-5
"""The learning rate of full-rank training where none is given: a LoRA's is far too high for the weights themselves."""


class LoraConfig(Settings):
    """The adapter: kind, rank, scale (alpha / rank; alpha defaults to the rank) and the modules it is added to.

    `rank_pattern` and `alpha_pattern` give layers whose full name matches a shell pattern a rank or alpha of their own;
    the first match counts. `start_from` is a LoRA file to go on from. `ema_decay` above 0 also keeps an exponential
    moving average of the weights, saved beside them.
    """

    kind: AdapterKind = "lora"
    rank: int = Field(default=16, ge=1, le=1024)
    alpha: float | None = Field(default=None, gt=0)
    target: str | tuple[str, ...] = "all"
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    dropout: float = Field(default=0.0, ge=0, lt=1)
    lokr_factor: int = Field(default=-1, ge=-1)
    start_from: str | None = None
    ema_decay: float = Field(default=0.0, ge=0, lt=1)
    save_dtype: Literal["fp32", "bf16"] = "fp32"

    def settings(self) -> LoraSettings:
        """What `lora.adapters.add_trainable` takes. Raises ConfigError."""
        return LoraSettings(
            rank=self.rank,
            alpha=self.alpha,
            target=self.target,
            dropout=self.dropout,
            kind=self.kind,
            rank_pattern=dict(self.rank_pattern),
            alpha_pattern=dict(self.alpha_pattern),
            lokr_factor=self.lokr_factor,
        )


class FullConfig(Settings):
    """Full-rank training: layers of blocks (see `fullrank.layers`), instead of an adapter.

    Weights and biases of the linear layers that `target` selects are trained, with `norms` also its query and key
    norms. `save_dtype` is that of the trained weights in the finished model; all others keep the type that they have
    in the base's files. `layouts`: `original` is one file as ComfyUI loads it, `diffusers` a folder. `ema_decay` as
    for adapters.
    """

    target: str | tuple[str, ...]
    norms: bool = False
    save_dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    layouts: tuple[Literal["original", "diffusers"], ...] = Field(default=("original", "diffusers"), min_length=1)
    ema_decay: float = Field(default=0.0, ge=0, lt=1)


class ObjectiveConfig(Settings):
    """What is minimised: noise levels (`schedule.SigmaSettings`) and all else (`objective.ObjectiveSettings`)."""

    draw: SigmaDraw = "logit_normal"
    remap: SigmaRemap = "quadratic"
    scale: float = 1.0
    flow_shift: FlowShift = "none"
    minimum: float = 0.0
    maximum: float = 1.0
    loss: LossKind = "mse"
    huber_delta: float = 0.1
    prior_weight: float = 1.0
    noise_offset: float = 0.0
    pair_noise: bool = False
    guidance: GuidanceMode = "none"
    guidance_range: tuple[float, float] = (1.0, 1.0)
    text_padding: TextPadding = "trim"

    @field_validator("flow_shift", mode="before")
    @classmethod
    def _read_shift(cls, value: str | float) -> FlowShift:
        return parse_flow_shift(value)

    def settings(self) -> ObjectiveSettings:
        """Everything but the noise levels, as the loop takes it. Raises ConfigError."""
        names = (f.name for f in fields(ObjectiveSettings))
        return ObjectiveSettings(**{name: getattr(self, name) for name in names})

    def sigmas(self) -> SigmaSettings:
        """The same numbers as the schedule takes them. Raises ConfigError."""
        return SigmaSettings(self.draw, self.remap, self.scale, self.flow_shift, self.minimum, self.maximum)


class PreviewPrompt(Settings):
    """One preview picture. What is left out is the previews' own; `width` and `height` 0 mean the flavour's size."""

    prompt: str
    negative: str | None = None
    steps: int | None = Field(default=None, ge=1, le=150)
    guidance: float | None = Field(default=None, ge=0, le=100)
    seed: int | None = Field(default=None, ge=0)
    width: int | None = Field(default=None, ge=0)
    height: int | None = Field(default=None, ge=0)


class PreviewConfig(Settings):
    """Pictures made during training: at step 0, every `every` steps (0: only when asked for) and at the end.

    A prompt is a text, or a table with settings of its own. `width` and `height` 0 mean the flavour's size. `[trigger]`
    in a prompt becomes the data set's trigger word. Prompt i uses `seed` + i unless it has its own. Without a
    `flow_shift` of their own previews take the recipe's.
    """

    prompts: tuple[str | PreviewPrompt, ...] = ()
    negative: str = ""
    every: int = Field(default=250, ge=0)
    steps: int = Field(default=20, ge=1, le=150)
    guidance: float = Field(default=4.0, ge=0, le=100)
    seed: int = Field(default=42, ge=0)
    width: int = Field(default=0, ge=0)
    height: int = Field(default=0, ge=0)
    tail_bias: float = Field(default=0.0, ge=0, le=1)
    method: Method = "euler"
    spacing: Spacing = "linear"
    flow_shift: FlowShift | None = None

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
    """One preview picture with everything decided: texts with the trigger word in them, size in pixels."""

    prompt: str
    negative: str
    width: int
    height: int
    settings: SamplingSettings


class TrainingConfig(Settings):
    """Everything that decides a training run. Equal configurations are the same job.

    One step is one optimizer step over `batch_size` × `gradient_accumulation` samples of one bucket. The learning rate
    follows `schedule()`. With `full` layers of the model itself are trained instead of the adapter `lora`. With
    gradient checkpointing every `checkpointing_interval`-th block is computed again instead of remembered.
    `more_datasets` are mixed with `dataset` (see `data.mixing`). `validate_every` and `checkpoint_every` 0 leave the
    start and the end; `checkpoint_minutes` above 0 also saves after so many minutes. Of the checkpoints the last
    `keep_checkpoints` stay, and with `keep_best` the one with the lowest held-out loss. `tensorboard` also
    writes event files.
    """

    name: str = Field(min_length=1, max_length=80)
    model: ModelSpec = ModelSpec()
    dataset: DatasetConfig
    more_datasets: tuple[DatasetConfig, ...] = ()
    validation_dataset: DatasetConfig | None = None
    validation_pictures: int = Field(default=8, ge=1)
    lora: LoraConfig = LoraConfig()
    full: FullConfig | None = None
    objective: ObjectiveConfig = ObjectiveConfig()
    previews: PreviewConfig = PreviewConfig()
    recipe: str = "canonical"
    recipe_overrides: dict[str, str | int | float] = {}
    steps: int = Field(default=1000, ge=1)
    batch_size: int = Field(default=1, ge=1)
    gradient_accumulation: int = Field(default=1, ge=1)
    learning_rate: float = Field(default=2e-4, gt=0)
    warmup_steps: int = Field(default=0, ge=0)
    lr_schedule: LrSchedule = "constant"
    lr_cycles: int = Field(default=1, ge=1)
    lr_power: float = Field(default=2.0, gt=0)
    optimizer: OptimizerName = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(default=0.01, ge=0)
    max_grad_norm: float = Field(default=1.0, ge=0)
    seed: int = Field(default=42, ge=0)
    gradient_checkpointing: bool = True
    checkpointing_interval: int = Field(default=1, ge=1)
    compile: bool = False
    validate_every: int = Field(default=250, ge=0)
    checkpoint_every: int = Field(default=250, ge=0)
    checkpoint_minutes: float = Field(default=0.0, ge=0)
    keep_checkpoints: int = Field(default=3, ge=1)
    keep_best: bool = True
    tensorboard: bool = False

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
                "Leave the set out, or train its pictures as a set of their own."
            )
        return self

    @classmethod
    def parse(cls, data: Any) -> Self:
        """Validate, including what only shows when options are taken together. Raises ConfigError, one paragraph."""
        config = super().parse(data)
        config.recipe_value()
        config.objective.sigmas()
        config.objective.settings()
        config.lora.settings()
        config.optimizer_settings()
        config.schedule()
        check_schedule(config.optimizer, config.lr_schedule)
        for entry in ("", *config.previews.prompts):
            own = entry if isinstance(entry, PreviewPrompt) else None
            config.preview_size(own and own.width, own and own.height)
        return config

    @classmethod
    def from_toml(cls, path: Path | str) -> Self:
        """Read a job file; data set folders and model files in it are relative to the file. Raises ConfigError."""
        path = Path(path)
        try:
            data = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"The job file '{path}' cannot be read: {error.strerror or error}.") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"The job file '{path.name}' is not valid TOML: {error}.") from error
        more = data.get("more_datasets")
        sections = [data.get("dataset"), data.get("validation_dataset"), *(more if isinstance(more, list) else ())]
        for section in sections:
            if isinstance(section, dict) and isinstance(section.get("folder"), str):
                section["folder"] = str((path.parent / section["folder"]).resolve())
        model = data.get("model")
        for key in MODEL_PATHS if isinstance(model, dict) else ():
            if isinstance(model.get(key), str):
                model[key] = str((path.parent / model[key]).resolve())
        return cls.parse(data)

    @property
    def ema_decay(self) -> float:
        """Of whatever is trained."""
        return self.lora.ema_decay if self.full is None else self.full.ema_decay

    @property
    def effective_batch(self) -> int:
        """Samples per optimizer step."""
        return self.batch_size * self.gradient_accumulation

    def optimizer_settings(self) -> OptimizerSettings:
        """What `stepper.Stepper` takes. Raises ConfigError."""
        dtype = precision(self.model.precision).dtype
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
        width, height = (
            self.previews.width if width is None else width,
            self.previews.height if height is None else height,
        )
        return snap_size(width or self.resolution, height or self.resolution, self.recipe_value().size_multiple)

    def preview_list(self) -> list[Preview]:
        """Every preview, in order. Raises PromptError for `[trigger]` without a trigger word, ConfigError for sizes."""
        shared, trigger = self.previews, self.dataset.trigger
        found = []
        for i, entry in enumerate(shared.prompts):
            own = PreviewPrompt(prompt=entry) if isinstance(entry, str) else entry
            width, height = self.preview_size(own.width, own.height)
            settings = SamplingSettings(
                steps=shared.steps if own.steps is None else own.steps,
                guidance=shared.guidance if own.guidance is None else own.guidance,
                seed=shared.seed + i if own.seed is None else own.seed,
                tail_bias=shared.tail_bias,
                method=shared.method,
                spacing=shared.spacing,
                flow_shift=shared.flow_shift,
            )
            negative = shared.negative if own.negative is None else own.negative
            found.append(
                Preview(apply_trigger(own.prompt, trigger), apply_trigger(negative, trigger), width, height, settings)
            )
        return found

    def canonical_json(self) -> str:
        """One text for equal configurations.

        Where weights rest in memory does not count: a job that ran out of memory goes on with another offload mode.
        Nor does who watches.
        """
        values = self.model_dump(mode="json", exclude={"tensorboard"})
        if self.full is None:  # the job keeps the name that it had before there was this option
            del values["full"]
        values["model"] = {k: v for k, v in values["model"].items() if k not in PLACEMENT}
        return json.dumps(values, sort_keys=True, separators=(",", ":"))

    def job_id(self) -> str:
        """The job's name in URLs and folders: a readable part and a hash of the whole configuration."""
        digest = hashlib.sha256(self.canonical_json().encode()).hexdigest()[:8]
        return f"{slug(self.name).lower()}-{digest}"
