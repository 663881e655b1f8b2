"""A training job as one frozen value, parsed once from nodes, TOML or JSON."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_serializer, field_validator, model_validator
from typing_extensions import Self

from ...data.dataset import Settings
from ...data.scan import DatasetConfig
from ...errors import ConfigError
from ...files import slug
from ...loading.spec import PLACEMENT, ModelSpec
from ...lora.modules import AdapterKind
from ...lora.settings import TARGETS, LoraSettings
from ...model.flavours import flavour
from ...model.latents import snap_size
from ...model.precision import precision
from ...options import MAX_SEED, Option, identity
from ...sampling.recipe import RECIPES, Recipe, recipe
from ...sampling.sampler import Method, SamplingSettings
from ...sampling.schedule import FlowShift, SigmaDraw, SigmaRemap, SigmaSettings, Spacing, parse_flow_shift
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
    """The adapter: kind, rank, scale (alpha / rank; alpha defaults to the rank) and the modules it is added to."""

    kind: Annotated[
        AdapterKind,
        Option(
            "lora works everywhere. rslora scales with the rank's root. dora also learns each row's length (ComfyUI's "
            "own loader computes it a little otherwise). lokr is a Kronecker product.",
            advanced=True,
        ),
    ] = "lora"
    rank: Annotated[int, Field(ge=1, le=1024), Option("Size of the LoRA: how much it can learn.", most=512)] = 16
    alpha: Annotated[
        float | None, Field(gt=0), Option("Scale: alpha / rank. Unset: the same as rank.", least=0, most=512, step=1)
    ] = None
    target: Annotated[
        str | tuple[str, ...],
        Option(
            "Which layers learn. all: attention. +ffs: feed-forward too. context: the text side. tiny: a small share.",
            choices=tuple(TARGETS),
        ),
    ] = "all"
    rank_pattern: Annotated[
        dict[str, int],
        Option("Ranks of their own for layers whose full name matches a pattern; the first match counts."),
    ] = {}
    alpha_pattern: Annotated[dict[str, float], Option("The same for alphas.")] = {}
    dropout: Annotated[
        float, Field(ge=0, lt=1), Option("Dropout on the adapter's input.", most=0.9, step=0.05, advanced=True)
    ] = 0.0
    lokr_factor: Annotated[int, Field(ge=-1), Option("Size of LoKr's first factor. -1: both about equally large.")] = -1
    start_from: Annotated[str | None, Option("A LoRA file of the same shape to go on from.")] = None
    ema_decay: Annotated[
        float,
        Field(ge=0, lt=1),
        Option(
            "Above 0: also keep a running mean of the weights, saved as -ema. 0.999 is usual.",
            most=0.9999,
            step=0.0001,
            advanced=True,
        ),
    ] = 0.0
    save_dtype: Annotated[Literal["fp32", "bf16"], Option("Precision of the finished LoRA. bf16 halves the file.")] = (
        "fp32"
    )

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
    """Full-rank training: weights and biases of linear layers in blocks (see `fullrank.layers`) instead of an adapter.

    All other layers keep the type that they have in the base's files.
    """

    target: Annotated[
        str | tuple[str, ...], Option("The blocks to train, e.g. double_blocks.0-3, single_blocks.30-37.")
    ]
    norms: Annotated[bool, Option("Also train the blocks' query and key norms.")] = False
    save_dtype: Annotated[
        Literal["bf16", "fp16", "fp32"], Option("Precision of the trained weights in the finished model.")
    ] = "bf16"
    layouts: Annotated[
        tuple[Literal["original", "diffusers"], ...],
        Field(min_length=1),
        Option("Layouts to write. original: one file as ComfyUI loads it. diffusers: a folder."),
    ] = ("original", "diffusers")
    ema_decay: Annotated[
        float, Field(ge=0, lt=1), Option("Above 0: also write a model of the weights' running mean, as -ema.")
    ] = 0.0


class ObjectiveConfig(Settings):
    """What is minimised: noise levels (`schedule.SigmaSettings`) and all else (`objective.ObjectiveSettings`)."""

    draw: Annotated[
        SigmaDraw,
        Option("How noise levels are drawn. chroma: the density that Chroma's author trained with."),
    ] = "logit_normal"
    remap: Annotated[
        SigmaRemap,
        Option(
            "quadratic: more draws near both ends. quadratic_split: SimpleTuner's rule, which never trains the middle."
        ),
    ] = "quadratic"
    scale: Annotated[float, Option("Width of the logit_normal draw.", least=0.05, most=10, step=0.05)] = 1.0
    flow_shift: Annotated[FlowShift, Option("Flow shift of the drawn noise levels: none, dynamic or a number.")] = (
        "none"
    )
    minimum: Annotated[float, Option("Lowest noise level trained.", least=0, most=1, step=0.01)] = 0.0
    maximum: Annotated[float, Option("Highest noise level trained.", least=0, most=1, step=0.01)] = 1.0
    loss: Annotated[LossKind, Option("huber counts large errors less: for data with outliers.", advanced=True)] = "mse"
    huber_delta: Annotated[
        float,
        Option("The error at which huber turns from square to linear.", least=0.001, most=10, step=0.01, advanced=True),
    ] = 0.1
    prior_weight: Annotated[
        float,
        Option(
            "Weight of regularisation sets, which should stay as the model without LoRA generates them.",
            least=0,
            most=10,
            step=0.1,
            advanced=True,
        ),
    ] = 1.0
    noise_offset: Annotated[
        float,
        Option(
            "Standard deviation of a constant added to each channel of the noise. 0: off.",
            least=0,
            most=1,
            step=0.01,
            advanced=True,
        ),
    ] = 0.0
    pair_noise: Annotated[
        bool,
        Option("Pair noises and images of a batch by optimal transport; needs a batch above 1.", advanced=True),
    ] = False
    guidance: Annotated[GuidanceMode, Option("The guidance embedding in training. none is 0, as in sampling.")] = "none"
    guidance_range: Annotated[
        tuple[float, float], Option("Its value: the first number for constant, drawn between both for random-range.")
    ] = (1.0, 1.0)
    text_padding: Annotated[
        TextPadding,
        Option(
            "trim: real tokens and one pad, as sampling has it. zero, unmodified: 512 tokens, slower, to reproduce "
            "other trainers.",
            advanced=True,
        ),
    ] = "trim"

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

    prompts: Annotated[
        tuple[str | PreviewPrompt, ...],
        Option(
            "Texts, or tables with prompt, negative, steps, guidance, seed, width and height "
            "of their own. [trigger] stands for the trigger word."
        ),
    ] = ()
    negative: Annotated[str, Option("The previews' negative prompt.")] = ""
    every: Annotated[
        int, Field(ge=0), Option("Steps between previews. 0: only when asked.", unit="steps", most=100000)
    ] = 250
    steps: Annotated[int, Field(ge=1, le=150), Option("Sampling steps of a preview.")] = 20
    guidance: Annotated[float, Field(ge=0, le=100), Option("Guidance of a preview.", most=20, step=0.1)] = 4.0
    seed: Annotated[int, Field(ge=0), Option("Prompt i uses this + i.", most=MAX_SEED)] = 42
    width: Annotated[
        int, Field(ge=0), Option("Width in pixels. 0: the model's own size.", unit="pixels", most=4096, step=32)
    ] = 0
    height: Annotated[
        int, Field(ge=0), Option("Height in pixels. 0: the model's own size.", unit="pixels", most=4096, step=32)
    ] = 0
    tail_bias: Annotated[
        float,
        Field(ge=0, le=1),
        Option("Towards 1, a preview's steps crowd at both ends; see Chroma Sampler.", step=0.05, advanced=True),
    ] = 0.0
    method: Annotated[Method, Option("How previews are sampled; see Chroma Sampler.", advanced=True)] = "euler"
    spacing: Annotated[
        Spacing,
        Option("How a preview's steps lie between noise and image; see Chroma Sampler.", advanced=True),
    ] = "linear"
    flow_shift: Annotated[
        FlowShift | None, Option("Flow shift of previews: none, dynamic or a number. Unset: the recipe's.")
    ] = None

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
    follows `schedule()`. With `full` layers of the model itself are trained instead of the adapter `lora`;
    `more_datasets` are mixed with `dataset` (see `data.samples`).
    """

    name: Annotated[str, Field(min_length=1, max_length=80), Option("The LoRA's file name, in output/loras.")]
    model: ModelSpec = ModelSpec()
    dataset: DatasetConfig
    more_datasets: tuple[DatasetConfig, ...] = ()
    validation_dataset: DatasetConfig | None = None
    validation_pictures: Annotated[
        int, Field(ge=1), Option("Images of the validation set that the validation loss is measured on.")
    ] = 8
    lora: LoraConfig = LoraConfig()
    full: Annotated[FullConfig | None, Option("Trains the model's own weights instead.", since="0.1")] = None
    objective: ObjectiveConfig = ObjectiveConfig()
    previews: PreviewConfig = PreviewConfig()
    recipe: Annotated[
        str,
        Option(
            "How text is encoded for training and how previews are sampled; see Chroma Sampler.",
            choices=tuple(RECIPES),
        ),
    ] = "canonical"
    recipe_overrides: Annotated[
        dict[str, str | int | float],
        Option("Fields of the recipe to change, e.g. noise_dtype=bf16, flow_shift=3.0.", advanced=True),
    ] = {}
    steps: Annotated[
        int, Field(ge=1), Option("Optimizer steps. 1000 to 3000 for a real concept.", unit="steps", most=1000000)
    ] = 1000
    batch_size: Annotated[
        int, Field(ge=1), Option("Images in a batch. More: steadier, slower, more memory.", most=256)
    ] = 1
    gradient_accumulation: Annotated[int, Field(ge=1), Option("Batches added up before each step.", most=256)] = 1
    learning_rate: Annotated[
        float,
        Field(gt=0),
        Option("2e-4 is good; 1e-4 is cautious.", least=1e-7, most=1, step=1e-5, round=1e-7),
    ] = 2e-4
    warmup_steps: Annotated[
        int, Field(ge=0), Option("Steps in which the learning rate rises from 0.", unit="steps", most=10000)
    ] = 0
    lr_schedule: Annotated[
        LrSchedule, Option("How the learning rate goes on after the warm-up; all but constant end at 0.")
    ] = "constant"
    lr_cycles: Annotated[int, Field(ge=1), Option("Cosines of lr_schedule restarts.", most=100, advanced=True)] = 1
    lr_power: Annotated[
        float, Field(gt=0), Option("Power of lr_schedule polynomial.", least=0.1, most=10, step=0.1, advanced=True)
    ] = 2.0
    optimizer: Annotated[
        OptimizerName,
        Option(
            "adamw needs nothing. adamw8bit, prodigy, schedule-free and came need a package and say which; adafactor "
            "keeps almost no state. See docs/optimizers.md.",
            advanced=True,
        ),
    ] = "adamw"
    betas: Annotated[tuple[float, float], Option("The optimizer's decay rates of its two moments.")] = (0.9, 0.999)
    weight_decay: Annotated[float, Field(ge=0), Option("Weight decay of the optimizer.", most=1, step=0.001)] = 0.01
    max_grad_norm: Annotated[
        float, Field(ge=0), Option("Clip the gradient norm at this value. 0: never.", most=100, step=0.1)
    ] = 1.0
    seed: Annotated[int, Field(ge=0), Option("Same seed and settings, same LoRA.", most=MAX_SEED)] = 42
    gradient_checkpointing: Annotated[
        bool, Option("Compute again instead of remembering: far less memory, a third slower.")
    ] = True
    checkpointing_interval: Annotated[
        int,
        Field(ge=1),
        Option(
            "With gradient_checkpointing: compute only every n-th block again. More memory, faster.",
            most=64,
            advanced=True,
        ),
    ] = 1
    compile: Annotated[
        bool,
        Option("torch.compile for the blocks: slow to begin, then faster. Not with block offload.", advanced=True),
    ] = False
    validate_every: Annotated[
        int,
        Field(ge=0),
        Option(
            "Steps between measurements of the validation loss on held-out images. 0: only at the start and the end.",
            unit="steps",
            most=100000,
        ),
    ] = 250
    checkpoint_every: Annotated[
        int, Field(ge=0), Option("Steps between checkpoints. 0: only at the end.", unit="steps", most=100000)
    ] = 250
    checkpoint_minutes: Annotated[
        float,
        Field(ge=0),
        Option("Also save after so many minutes. 0: by steps only.", unit="minutes", most=10000, step=1, advanced=True),
    ] = 0.0
    keep_checkpoints: Annotated[int, Field(ge=1), Option("Checkpoints to keep; older ones are deleted.", most=100)] = 3
    keep_best: Annotated[
        bool,
        Option("Keep the checkpoint with the lowest validation loss beside the last ones.", advanced=True),
    ] = True
    tensorboard: Annotated[
        bool,
        Option(
            "Also write TensorBoard event files into the job's folder. Needs the package tensorboardX.", advanced=True
        ),
    ] = False

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
        Nor does who watches, nor an option that came later and is at its default: the job keeps the id that it had.
        """
        values = identity(self, self.model_dump(mode="json", exclude={"tensorboard"}))
        values["model"] = {k: v for k, v in values["model"].items() if k not in PLACEMENT}
        return json.dumps(values, sort_keys=True, separators=(",", ":"))

    def job_id(self) -> str:
        """The job's name in URLs and folders: a readable part and a hash of the whole configuration."""
        digest = hashlib.sha256(self.canonical_json().encode()).hexdigest()[:8]
        return f"{slug(self.name).lower()}-{digest}"
