"""A training job as one frozen value, parsed once from nodes, TOML or JSON."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_serializer, field_validator
from typing_extensions import Self

from ..data.scan import DatasetConfig
from ..data.settings import Settings
from ..errors import ConfigError
from ..files import slug
from ..flavours import flavour
from ..latents import snap_size
from ..loading.spec import ModelSpec
from ..lora.adapters import LoraSettings
from ..recipe import Recipe, recipe
from ..sampling import Method, SamplingSettings
from ..schedule import FlowShift, SigmaDraw, SigmaRemap, SigmaSettings, parse_flow_shift

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]


class LoraConfig(Settings):
    """The adapter: rank, scale (alpha / rank; alpha defaults to the rank) and the modules it is added to."""

    rank: int = Field(default=16, ge=1, le=1024)
    alpha: float | None = Field(default=None, gt=0)
    target: str | tuple[str, ...] = "all"
    dropout: float = Field(default=0.0, ge=0, lt=1)
    save_dtype: Literal["fp32", "bf16"] = "fp32"

    def settings(self) -> LoraSettings:
        """What `lora.adapters.add_trainable` takes."""
        return LoraSettings(rank=self.rank, alpha=self.alpha, target=self.target, dropout=self.dropout)


class ObjectiveConfig(Settings):
    """How noise levels are drawn; see `schedule.SigmaSettings`."""

    draw: SigmaDraw = "logit_normal"
    remap: SigmaRemap = "quadratic"
    scale: float = 1.0
    flow_shift: FlowShift = "none"
    minimum: float = 0.0
    maximum: float = 1.0

    @field_validator("flow_shift", mode="before")
    @classmethod
    def _read_shift(cls, value: str | float) -> FlowShift:
        return parse_flow_shift(value)

    def sigmas(self) -> SigmaSettings:
        """The same numbers as the schedule takes them. Raises ConfigError."""
        return SigmaSettings(self.draw, self.remap, self.scale, self.flow_shift, self.minimum, self.maximum)


class PreviewConfig(Settings):
    """Pictures made during training: at step 0, every `every` steps (0: only when asked for) and at the end.

    `width` and `height` 0 mean the flavour's size. `[trigger]` in a prompt becomes the data set's trigger word. Prompt
    i uses `seed` + i.
    """

    prompts: tuple[str, ...] = ()
    negative: str = ""
    every: int = Field(default=250, ge=0)
    steps: int = Field(default=20, ge=1, le=150)
    guidance: float = Field(default=4.0, ge=0, le=100)
    seed: int = Field(default=42, ge=0)
    width: int = Field(default=0, ge=0)
    height: int = Field(default=0, ge=0)
    tail_bias: float = Field(default=0.0, ge=0, le=1)
    method: Method = "euler"

    @field_validator("prompts", mode="before")
    @classmethod
    def _one_prompt(cls, value: Any) -> Any:
        return ((value,) if value.strip() else ()) if isinstance(value, str) else value

    def sampling(self, index: int) -> SamplingSettings:
        """The sampler's settings for prompt `index`."""
        return SamplingSettings(
            steps=self.steps,
            guidance=self.guidance,
            seed=self.seed + index,
            tail_bias=self.tail_bias,
            method=self.method,
        )


class TrainingConfig(Settings):
    """Everything that decides a training run. Equal configurations are the same job.

    One step is one optimizer step over `batch_size` × `gradient_accumulation` samples of one bucket. The learning rate
    rises linearly over `warmup_steps`, then follows `lr_schedule` (cosine and linear end at 0). `validate_every` and
    `checkpoint_every` 0 leave the start and the end.
    """

    name: str = Field(min_length=1, max_length=80)
    model: ModelSpec = ModelSpec()
    dataset: DatasetConfig
    validation_dataset: DatasetConfig | None = None
    validation_pictures: int = Field(default=8, ge=1)
    lora: LoraConfig = LoraConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    previews: PreviewConfig = PreviewConfig()
    recipe: str = "canonical"
    steps: int = Field(default=1000, ge=1)
    batch_size: int = Field(default=1, ge=1)
    gradient_accumulation: int = Field(default=1, ge=1)
    learning_rate: float = Field(default=2e-4, gt=0)
    warmup_steps: int = Field(default=0, ge=0)
    lr_schedule: Literal["constant", "cosine", "linear"] = "constant"
    weight_decay: float = Field(default=0.01, ge=0)
    max_grad_norm: float = Field(default=1.0, ge=0)
    seed: int = Field(default=42, ge=0)
    gradient_checkpointing: bool = True
    validate_every: int = Field(default=250, ge=0)
    checkpoint_every: int = Field(default=250, ge=0)
    keep_checkpoints: int = Field(default=3, ge=1)

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

    @classmethod
    def parse(cls, data: Any) -> Self:
        """Validate, including what only shows when options are taken together. Raises ConfigError, one paragraph."""
        config = super().parse(data)
        config.objective.sigmas()
        config.preview_size()
        return config

    @classmethod
    def from_toml(cls, path: Path | str) -> Self:
        """Read a job file; data set folders in it are relative to the file. Raises ConfigError."""
        path = Path(path)
        try:
            data = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"The job file '{path}' cannot be read: {error.strerror or error}.") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"The job file '{path.name}' is not valid TOML: {error}.") from error
        for key in ("dataset", "validation_dataset"):
            section = data.get(key)
            if isinstance(section, dict) and isinstance(section.get("folder"), str):
                section["folder"] = str((path.parent / section["folder"]).resolve())
        return cls.parse(data)

    @property
    def effective_batch(self) -> int:
        """Samples per optimizer step."""
        return self.batch_size * self.gradient_accumulation

    @property
    def resolution(self) -> int:
        """The flavour's own size in pixels."""
        return flavour(self.model.flavour).size

    def recipe_value(self) -> Recipe:
        """The recipe that text states and previews follow."""
        return recipe(self.recipe)

    def preview_size(self) -> tuple[int, int]:
        """Width and height of previews in pixels, as they come out. Raises ConfigError."""
        size = self.resolution
        return snap_size(self.previews.width or size, self.previews.height or size, self.recipe_value().size_multiple)

    def canonical_json(self) -> str:
        """One text for equal configurations."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))

    def job_id(self) -> str:
        """The job's name in URLs and folders: a readable part and a hash of the whole configuration."""
        digest = hashlib.sha256(self.canonical_json().encode()).hexdigest()[:8]
        return f"{slug(self.name).lower()}-{digest}"
