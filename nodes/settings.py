"""Training settings beyond the common knobs: all of them in one node, and by subject in nodes that are chained."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import Any, ClassVar

from comfy_api.latest import io

from ..chroma_core.lora.strengths import parse_blocks
from ..chroma_core.sampling.recipe import parse_overrides
from ..chroma_core.training.config import LoraConfig, ObjectiveConfig, PreserveConfig, PreviewConfig, TrainingConfig
from .option_widgets import ADVANCED, changed, defaults_of, lines, nested, unfolded, values_at, widget, with_options
from .schedule import SHIFTS, flow_shift_of, shift_value, shift_widgets
from .sockets import ChromaTrainingType, TrainingPart, schema

SECTIONS = {
    "": TrainingConfig,
    "lora": LoraConfig,
    "objective": ObjectiveConfig,
    "previews": PreviewConfig,
    "preserve": PreserveConfig,
}

WIDGETS: dict[str, Any] = {
    "gradient_accumulation": "gradient_accumulation",
    "warmup_steps": "warmup_steps",
    "lr_schedule": "lr_schedule",
    "weight_decay": "weight_decay",
    "max_grad_norm": "max_grad_norm",
    "sigma_draw": "objective.draw",
    "sigma_remap": "objective.remap",
    "sigma_scale": "objective.scale",
    "sigma_shift": io.Combo.Input(
        "sigma_shift", options=SHIFTS, default="none", tooltip="Flow shift of the drawn noise levels."
    ),
    "sigma_shift_value": shift_value("sigma_shift_value", default=3.0, tooltip="Read when sigma_shift is constant."),
    "sigma_minimum": "objective.minimum",
    "sigma_maximum": "objective.maximum",
    "gradient_checkpointing": "gradient_checkpointing",
    "checkpoint_every": "checkpoint_every",
    "keep_checkpoints": "keep_checkpoints",
    "validate_every": "validate_every",
    "preview_steps": "previews.steps",
    "preview_guidance": "previews.guidance",
    "preview_seed": "previews.seed",
    "preview_width": "previews.width",
    "preview_height": "previews.height",
    "preview_negative": "previews.negative",
    "save_dtype": "lora.save_dtype",
    "recipe": "recipe",
    "target_patterns": io.String.Input(
        "target_patterns",
        multiline=True,
        default="",
        tooltip="Names of the layers to train, one a line, * for anything, instead of Chroma Train LoRA's target. E.g. "
        "transformer_blocks.*.attn.to_q",
    ),
    "optimizer": "optimizer",
    "lr_cycles": "lr_cycles",
    "lr_power": "lr_power",
    "adapter": "lora.kind",
    "dropout": "lora.dropout",
    "ema_decay": "lora.ema_decay",
    "loss": "objective.loss",
    "huber_delta": "objective.huber_delta",
    "prior_weight": "objective.prior_weight",
    "noise_offset": "objective.noise_offset",
    "pair_noise": "objective.pair_noise",
    "text_padding": "objective.text_padding",
    "checkpointing_interval": "checkpointing_interval",
    "compile": "compile",
    "checkpoint_minutes": "checkpoint_minutes",
    "keep_best": "keep_best",
    "full_rank_blocks": io.String.Input(
        "full_rank_blocks",
        default="",
        tooltip="Empty: a LoRA. Else train the weights of these blocks themselves, and end with a whole model: e.g. "
        "double_blocks.0-3, single_blocks.30-37. Rank, alpha, target and save_dtype are then not read; use a learning "
        "rate of 1e-6 to 1e-5.",
        **ADVANCED,
    ),
    "preview_method": "previews.method",
    "preview_spacing": "previews.spacing",
    "preview_tail_bias": "previews.tail_bias",
    "recipe_overrides": widget(TrainingConfig, "recipe_overrides", kind=io.String, default=""),
    "tensorboard": "tensorboard",
    "deterministic": "deterministic",
    "sigma_shift_first": "objective.shift_first",
    "lr_pattern": widget(TrainingConfig, "lr_pattern", kind=io.String, default=""),
    "preserve_class": "preserve.class_weight",
    "preserve_class_word": "preserve.class_word",
    "preserve_blank": "preserve.blank_weight",
    "preserve_prompts": widget(
        PreserveConfig, "prompts", "preserve_prompts", kind=io.String, multiline=True, default=""
    ),
    "preserve_prompts_weight": "preserve.prompts_weight",
    "preserve_images": "preserve.images",
    "preserve_share": "preserve.share",
    "hold_out": "hold_out",
    "keep_loras": "keep_loras",
    "stop_when_memorising": "stop_when_memorising",
    "compile_auto": "compile_auto",
}
"""The node's widgets in their order: the option of a job that one sets, else an input of its own."""

PATHS: dict[str, str] = {name: path for name, path in WIDGETS.items() if isinstance(path, str)}


SEEN = (
    "gradient_accumulation", "warmup_steps", "lr_schedule", "weight_decay", "sigma_draw", "sigma_remap",
    "checkpoint_every", "validate_every", "preview_steps", "preview_guidance",
)  # fmt: skip
"""The widgets of Chroma Training Settings that are not folded."""


def _inputs(*names: str) -> list[Any]:
    """The widgets of these names, or all, folded where Chroma Training Settings folds them."""
    found = []
    for name in names or WIDGETS:
        section, _, field = PATHS.get(name, "").rpartition(".")
        made = widget(SECTIONS[section], field, name) if name in PATHS else copy(WIDGETS[name])
        made.advanced = None if name in SEEN else True
        found.append(made)
    return found


def _linked() -> Any:
    return ChromaTrainingType.Input(
        "settings",
        optional=True,
        tooltip="From another node with training settings. What both set in different ways is an error.",
    )


def _output() -> Any:
    return ChromaTrainingType.Output("settings", tooltip="For Chroma Train LoRA, or the next node with settings.")


class ChromaTrainingSettings(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "training",
            node_id="ChromaTrainingSettings",
            display_name="Chroma Training Settings",
            description="Everything about training beyond the common knobs of Chroma Train LoRA. What you leave "
            "alone is the default.",
            search_aliases=[
                "training options",
                "optimizer",
                "learning rate schedule",
                "weight decay",
                "gradient accumulation",
                "timestep sampling",
                "sigmas",
                "dora",
                "lokr",
                "ema",
                "full finetune",
                "prior preservation",
                "differential output preservation",
                "blank preservation",
            ],
            inputs=[*_inputs(), _linked()],
            outputs=[_output()],
        )

    @classmethod
    def execute(cls, settings: TrainingPart | None = None, **inputs: Any) -> io.NodeOutput:
        return io.NodeOutput(joined("Chroma Training Settings", inputs, settings))


def joined(node: str, inputs: Mapping[str, Any], linked: TrainingPart | None) -> TrainingPart:
    """A node's widgets with the settings that are linked to it. Raises ConfigError where the two disagree."""
    defaults = defaults_of(_inputs())
    options = with_options(node, changed(inputs, defaults), linked and linked.options, defaults)
    return TrainingPart(settings_from({**defaults, **options}), options)


class Subject(io.ComfyNode):
    """A node with the training settings of one subject; the settings of another may be linked to it."""

    node_id: ClassVar[str]
    title: ClassVar[str]
    says: ClassVar[str]
    aliases: ClassVar[list[str]]
    names: ClassVar[tuple[str, ...]]
    """Widgets of Chroma Training Settings: the first ten are seen."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "training",
            node_id=cls.node_id,
            display_name=cls.title,
            description=f"{cls.says} For Chroma Train LoRA; chain several.",
            search_aliases=cls.aliases,
            inputs=[*unfolded(_inputs(*cls.names)), _linked()],
            outputs=[_output()],
        )

    @classmethod
    def execute(cls, settings: TrainingPart | None = None, **inputs: Any) -> io.NodeOutput:
        return io.NodeOutput(joined(cls.title, inputs, settings))


class ChromaOptimizerSettings(Subject):
    node_id = "ChromaOptimizerSettings"
    title = "Chroma Optimizer Settings"
    says = "The optimizer and how the learning rate goes."
    aliases = ["adamw", "prodigy", "adafactor", "learning rate schedule", "cosine", "warmup", "weight decay", "ema"]
    names = (
        "optimizer", "lr_schedule", "warmup_steps", "lr_cycles", "lr_power", "lr_pattern", "weight_decay",
        "max_grad_norm", "ema_decay",
    )  # fmt: skip


class ChromaNoiseSettings(Subject):
    node_id = "ChromaNoiseSettings"
    title = "Chroma Noise Settings"
    says = "Which noise levels are trained how often, and the loss."
    aliases = ["timestep sampling", "sigmas", "timestep bias", "flow shift", "huber loss", "noise offset"]
    names = (
        "sigma_draw", "sigma_remap", "sigma_scale", "sigma_shift", "sigma_shift_value", "sigma_minimum",
        "sigma_maximum", "loss", "huber_delta", "noise_offset", "prior_weight", "pair_noise", "text_padding",
        "sigma_shift_first",
    )  # fmt: skip


class ChromaPreviewSettings(Subject):
    node_id = "ChromaPreviewSettings"
    title = "Chroma Preview Settings"
    says = "How the previews are sampled that training makes."
    aliases = ["sample images", "preview size", "sample steps", "validation prompts", "negative prompt"]
    names = (
        "preview_steps", "preview_guidance", "preview_seed", "preview_width", "preview_height", "preview_negative",
        "preview_method", "preview_spacing", "preview_tail_bias", "recipe", "recipe_overrides",
    )  # fmt: skip


class ChromaSavingSettings(Subject):
    node_id = "ChromaSavingSettings"
    title = "Chroma Saving Settings"
    says = "What is measured on held-out images, and what is kept when."
    aliases = ["hold out", "validation loss", "overfitting", "checkpoints", "save every", "best step", "tensorboard"]
    names = (
        "hold_out", "validate_every", "stop_when_memorising", "keep_best", "keep_loras", "checkpoint_every",
        "checkpoint_minutes", "keep_checkpoints", "save_dtype", "tensorboard",
    )  # fmt: skip


class ChromaAdapterSettings(Subject):
    node_id = "ChromaAdapterSettings"
    title = "Chroma Adapter Settings"
    says = "What is trained, and what has to stay as it is."
    aliases = ["dora", "lokr", "rslora", "dropout", "target modules", "full finetune", "prior preservation"]
    names = (
        "adapter", "dropout", "target_patterns", "preserve_class", "preserve_class_word", "preserve_blank",
        "preserve_prompts", "preserve_prompts_weight", "preserve_images", "preserve_share", "full_rank_blocks",
    )  # fmt: skip


class ChromaSpeedSettings(Subject):
    node_id = "ChromaSpeedSettings"
    title = "Chroma Speed Settings"
    says = "Memory against time: checkpointing, compiling, accumulation."
    aliases = ["gradient checkpointing", "compile", "gradient accumulation", "deterministic", "less memory", "faster"]
    names = (
        "gradient_accumulation", "gradient_checkpointing", "checkpointing_interval", "compile", "compile_auto",
        "deterministic",
    )  # fmt: skip


def settings_from(inputs: dict[str, Any]) -> dict[str, Any]:
    """The node's widgets as a part of a `TrainingConfig`."""
    settings = nested(inputs, PATHS)
    settings["objective"]["flow_shift"] = flow_shift_of(inputs["sigma_shift"], inputs["sigma_shift_value"])
    if patterns := lines(inputs["target_patterns"]):
        settings["lora"]["target"] = patterns
    if overrides := parse_overrides(inputs.get("recipe_overrides", "")):
        settings["recipe_overrides"] = overrides
    if pattern := dict(parse_blocks(inputs.get("lr_pattern", ""), "lr_pattern")):
        settings["lr_pattern"] = pattern
    if prompts := lines(inputs.get("preserve_prompts", "")):
        settings.setdefault("preserve", {})["prompts"] = prompts
    if blocks := inputs.get("full_rank_blocks", "").strip():
        del settings["lora"]["save_dtype"]  # what is left in `lora` and is no default is refused when the job is made
        settings["full"] = {"target": blocks, "ema_decay": settings["lora"].pop("ema_decay", 0.0)}
    return settings


def widgets_of(config: TrainingConfig) -> dict[str, Any]:
    """The node's widgets that mean a job's configuration."""
    shift, value = shift_widgets(config.objective.flow_shift, "none")
    target = config.lora.target
    own = {
        "sigma_shift": shift,
        "sigma_shift_value": value,
        "target_patterns": "" if isinstance(target, str) else "\n".join(target),
        "recipe_overrides": overrides_text(config),
        "lr_pattern": ", ".join(f"{pattern}:{factor:g}" for pattern, factor in config.lr_pattern.items()),
        "preserve_prompts": "\n".join(" ".join(prompt.split()) for prompt in config.preserve.prompts),
        "full_rank_blocks": config.full.target if config.full else "",
    }
    return {**values_at(config, PATHS), **own, "ema_decay": config.ema_decay}


def overrides_text(config: TrainingConfig) -> str:
    """What `parse_overrides` reads."""
    return ", ".join(f"{name}={value}" for name, value in config.recipe_overrides.items())


def sigma_fields(inputs: dict[str, Any]) -> dict[str, Any]:
    """The node's sigma widgets as fields of `SigmaSettings`."""
    names = ("draw", "remap", "scale", "minimum", "maximum", "shift_first")
    plain = {name: inputs[f"sigma_{name}"] for name in names}
    return {**plain, "flow_shift": flow_shift_of(inputs["sigma_shift"], inputs["sigma_shift_value"])}


SUBJECTS: list[type[Subject]] = [
    ChromaOptimizerSettings,
    ChromaNoiseSettings,
    ChromaPreviewSettings,
    ChromaSavingSettings,
    ChromaAdapterSettings,
    ChromaSpeedSettings,
]
"""Each option of Chroma Training Settings belongs to one of them."""

NODES = [ChromaTrainingSettings, *SUBJECTS]
