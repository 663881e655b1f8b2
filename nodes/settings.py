"""Training settings beyond the common knobs."""

from __future__ import annotations

from typing import Any, get_args

from comfy_api.latest import io

from ..chroma_core.lora.modules import AdapterKind
from ..chroma_core.sampling.recipe import RECIPES, parse_overrides
from ..chroma_core.sampling.sampler import Method
from ..chroma_core.sampling.schedule import SigmaDraw, SigmaRemap, Spacing
from ..chroma_core.sampling.text import TextPadding
from ..chroma_core.training.step.lr import LrSchedule
from ..chroma_core.training.step.objective import LossKind
from ..chroma_core.training.step.optimizers import OptimizerName
from .schedule import SHIFTS, flow_shift_of
from .sockets import MAX_SEED, ChromaTrainingType, schema

ADVANCED: dict[str, Any] = {"optional": True, "advanced": True}

ADAPTER = {"adapter": "kind", "dropout": "dropout", "ema_decay": "ema_decay"}
"""Widgets and the fields of the LoRA's configuration that they set."""

PLAIN = (
    "gradient_accumulation", "warmup_steps", "lr_schedule", "weight_decay", "max_grad_norm", "recipe",
    "gradient_checkpointing", "checkpoint_every", "keep_checkpoints", "validate_every", "optimizer", "lr_cycles",
    "lr_power", "checkpointing_interval", "compile", "checkpoint_minutes", "keep_best", "tensorboard",
)  # fmt: skip
OBJECTIVE = ("loss", "huber_delta", "prior_weight", "noise_offset", "pair_noise", "text_padding")
PREVIEWS = ("steps", "guidance", "seed", "width", "height", "negative", "method", "spacing", "tail_bias")
"""Widgets that set a field of the same name: of the job, of its objective, of its previews (these after preview_)."""


class ChromaTrainingSettings(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
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
            ],
            inputs=[
                io.Int.Input(
                    "gradient_accumulation", default=1, min=1, max=256, tooltip="Batches added up before each step."
                ),
                io.Int.Input(
                    "warmup_steps",
                    default=0,
                    min=0,
                    max=10000,
                    tooltip="Steps in which the learning rate rises from 0.",
                ),
                io.Combo.Input(
                    "lr_schedule",
                    options=list(get_args(LrSchedule)),
                    default="constant",
                    tooltip="How the learning rate goes on after the warm-up; all but constant end at 0.",
                ),
                io.Float.Input(
                    "weight_decay",
                    default=0.01,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="AdamW's pull of weights towards 0.",
                ),
                io.Float.Input(
                    "max_grad_norm",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Longer gradients are shortened. 0: never.",
                ),
                io.Combo.Input(
                    "sigma_draw",
                    options=list(get_args(SigmaDraw)),
                    default="logit_normal",
                    tooltip="How noise levels are drawn. chroma: the density that Chroma's author trained with.",
                ),
                io.Combo.Input(
                    "sigma_remap",
                    options=list(get_args(SigmaRemap)),
                    default="quadratic",
                    tooltip="quadratic: more draws near both ends. quadratic_split: SimpleTuner's rule, which never "
                    "trains the middle.",
                ),
                io.Float.Input(
                    "sigma_scale", default=1.0, min=0.05, max=10.0, step=0.05, tooltip="Width of the logit_normal draw."
                ),
                io.Combo.Input(
                    "sigma_shift", options=SHIFTS, default="none", tooltip="Flow shift of the drawn noise levels."
                ),
                io.Float.Input(
                    "sigma_shift_value",
                    default=3.0,
                    min=0.01,
                    max=100.0,
                    step=0.05,
                    tooltip="Read when sigma_shift is constant.",
                ),
                io.Float.Input(
                    "sigma_minimum", default=0.0, min=0.0, max=1.0, step=0.01, tooltip="Lowest noise level trained."
                ),
                io.Float.Input(
                    "sigma_maximum", default=1.0, min=0.0, max=1.0, step=0.01, tooltip="Highest noise level trained."
                ),
                io.Boolean.Input(
                    "gradient_checkpointing",
                    default=True,
                    tooltip="Compute again instead of remembering: far less memory, a third slower.",
                ),
                io.Int.Input(
                    "checkpoint_every",
                    default=250,
                    min=0,
                    max=100000,
                    tooltip="Steps between checkpoints. 0: only at the end.",
                ),
                io.Int.Input("keep_checkpoints", default=3, min=1, max=100, tooltip="Older ones are deleted."),
                io.Int.Input(
                    "validate_every",
                    default=250,
                    min=0,
                    max=100000,
                    tooltip="Steps between measurements of the loss on held-out pictures. 0: only at the start and "
                    "the end.",
                ),
                io.Int.Input("preview_steps", default=20, min=1, max=150, tooltip="Sampling steps of a preview."),
                io.Float.Input(
                    "preview_guidance", default=4.0, min=0.0, max=20.0, step=0.1, tooltip="Guidance of a preview."
                ),
                io.Int.Input("preview_seed", default=42, min=0, max=MAX_SEED, tooltip="Prompt i uses this + i."),
                io.Int.Input(
                    "preview_width", default=0, min=0, max=4096, step=32, tooltip="Pixels. 0: the model's own size."
                ),
                io.Int.Input(
                    "preview_height", default=0, min=0, max=4096, step=32, tooltip="Pixels. 0: the model's own size."
                ),
                io.String.Input("preview_negative", default="", tooltip="The previews' negative prompt."),
                io.Combo.Input(
                    "save_dtype",
                    options=["fp32", "bf16"],
                    default="fp32",
                    tooltip="Of the finished LoRA. bf16 halves the file.",
                ),
                io.Combo.Input(
                    "recipe",
                    options=list(RECIPES),
                    default="canonical",
                    tooltip="How text is encoded for training and how previews are painted; see Chroma Sampler.",
                ),
                io.String.Input(
                    "target_patterns",
                    multiline=True,
                    default="",
                    tooltip="Names of the layers to train, one a line, * for anything, instead of Chroma Train "
                    "LoRA's target. E.g. transformer_blocks.*.attn.to_q",
                ),
                io.Combo.Input(
                    "optimizer",
                    options=list(get_args(OptimizerName)),
                    default="adamw",
                    tooltip="adamw needs nothing. adamw8bit, prodigy, schedule-free and came need a package and say "
                    "which; adafactor keeps almost no state. See docs/optimizers.md.",
                    **ADVANCED,
                ),
                io.Int.Input(
                    "lr_cycles", default=1, min=1, max=100, tooltip="Cosines of lr_schedule restarts.", **ADVANCED
                ),
                io.Float.Input(
                    "lr_power",
                    default=2.0,
                    min=0.1,
                    max=10.0,
                    step=0.1,
                    tooltip="Of lr_schedule polynomial.",
                    **ADVANCED,
                ),
                io.Combo.Input(
                    "adapter",
                    options=list(get_args(AdapterKind)),
                    default="lora",
                    tooltip="lora works everywhere. rslora scales with the rank's root. dora also learns each row's "
                    "length (ComfyUI's own loader computes it a little otherwise). lokr is a Kronecker product.",
                    **ADVANCED,
                ),
                io.Float.Input(
                    "dropout", default=0.0, min=0.0, max=0.9, step=0.05, tooltip="Of the adapter's input.", **ADVANCED
                ),
                io.Float.Input(
                    "ema_decay",
                    default=0.0,
                    min=0.0,
                    max=0.9999,
                    step=0.0001,
                    tooltip="Above 0: also keep a running mean of the weights, saved as -ema. 0.999 is usual.",
                    **ADVANCED,
                ),
                io.Combo.Input(
                    "loss",
                    options=list(get_args(LossKind)),
                    default="mse",
                    tooltip="huber counts large errors less: for data with outliers.",
                    **ADVANCED,
                ),
                io.Float.Input(
                    "huber_delta", default=0.1, min=0.001, max=10.0, step=0.01, tooltip="Where huber bends.", **ADVANCED
                ),
                io.Float.Input(
                    "prior_weight",
                    default=1.0,
                    min=0.0,
                    max=10.0,
                    step=0.1,
                    tooltip="Weight of regularisation sets, which should stay as the model without LoRA paints them.",
                    **ADVANCED,
                ),
                io.Float.Input(
                    "noise_offset",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Deviation of a constant added to each channel of the noise. 0: off.",
                    **ADVANCED,
                ),
                io.Boolean.Input(
                    "pair_noise",
                    default=False,
                    tooltip="Pair noises and pictures of a batch by optimal transport; needs a batch above 1.",
                    **ADVANCED,
                ),
                io.Combo.Input(
                    "text_padding",
                    options=list(get_args(TextPadding)),
                    default="trim",
                    tooltip="trim: real tokens and one pad, as sampling has it. zero, unmodified: 512 tokens, slower, "
                    "to reproduce other trainers.",
                    **ADVANCED,
                ),
                io.Int.Input(
                    "checkpointing_interval",
                    default=1,
                    min=1,
                    max=64,
                    tooltip="With gradient_checkpointing: compute only every n-th block again. More memory, faster.",
                    **ADVANCED,
                ),
                io.Boolean.Input(
                    "compile",
                    default=False,
                    tooltip="torch.compile for the blocks: slow to begin, then faster. Not with block offload.",
                    **ADVANCED,
                ),
                io.Float.Input(
                    "checkpoint_minutes",
                    default=0.0,
                    min=0.0,
                    max=10000.0,
                    step=1.0,
                    tooltip="Also save after so many minutes. 0: by steps only.",
                    **ADVANCED,
                ),
                io.Boolean.Input(
                    "keep_best",
                    default=True,
                    tooltip="Keep the checkpoint with the lowest held-out loss beside the last ones.",
                    **ADVANCED,
                ),
                io.String.Input(
                    "full_rank_blocks",
                    default="",
                    tooltip="Empty: a LoRA. Else train the weights of these blocks themselves, and end with a whole "
                    "model: e.g. double_blocks.0-3, single_blocks.30-37. Rank, alpha, target and save_dtype are then "
                    "not read; use a learning rate of 1e-6 to 1e-5.",
                    **ADVANCED,
                ),
                io.Combo.Input(
                    "preview_method",
                    options=list(get_args(Method)),
                    default="euler",
                    tooltip="How previews are sampled; see Chroma Sampler.",
                    **ADVANCED,
                ),
                io.Combo.Input(
                    "preview_spacing",
                    options=list(get_args(Spacing)),
                    default="linear",
                    tooltip="How a preview's steps lie between noise and picture; see Chroma Sampler.",
                    **ADVANCED,
                ),
                io.Float.Input(
                    "preview_tail_bias",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Towards 1, a preview's steps crowd at both ends; see Chroma Sampler.",
                    **ADVANCED,
                ),
                io.String.Input(
                    "recipe_overrides",
                    default="",
                    tooltip="Fields of the recipe to change, e.g. noise_dtype=bf16, flow_shift=3.0.",
                    **ADVANCED,
                ),
                io.Boolean.Input(
                    "tensorboard",
                    default=False,
                    tooltip="Also write TensorBoard event files into the job's folder. Needs the package tensorboardX.",
                    **ADVANCED,
                ),
            ],
            outputs=[ChromaTrainingType.Output("settings", tooltip="For Chroma Train LoRA.")],
        )

    @classmethod
    def execute(cls, **inputs: Any) -> io.NodeOutput:
        return io.NodeOutput(settings_from(inputs))


def settings_from(inputs: dict[str, Any]) -> dict[str, Any]:
    """The node's widgets as a part of a `TrainingConfig`."""
    overrides = parse_overrides(inputs.get("recipe_overrides", ""))
    patterns = [line.strip() for line in inputs["target_patterns"].splitlines() if line.strip()]
    adapter = {
        **{field: inputs[name] for name, field in ADAPTER.items() if name in inputs},
        **({"target": patterns} if patterns else {}),
    }
    blocks = inputs.get("full_rank_blocks", "").strip()
    if blocks:  # what is left in `lora` and is no default is refused when the job is made
        full = {"target": blocks, "ema_decay": adapter.pop("ema_decay", 0.0)}
        kind = {"full": full, "lora": adapter}
    else:
        kind = {"lora": {"save_dtype": inputs["save_dtype"], **adapter}}
    return {
        **{name: inputs[name] for name in PLAIN if name in inputs},
        **kind,
        **({"recipe_overrides": overrides} if overrides else {}),
        "objective": {
            **{name: inputs[name] for name in OBJECTIVE if name in inputs},
            **sigma_fields(inputs),
        },
        "previews": {name: inputs[f"preview_{name}"] for name in PREVIEWS if f"preview_{name}" in inputs},
    }


def sigma_fields(inputs: dict[str, Any]) -> dict[str, Any]:
    """The node's sigma widgets as fields of `SigmaSettings`."""
    plain = {name: inputs[f"sigma_{name}"] for name in ("draw", "remap", "scale", "minimum", "maximum")}
    return {**plain, "flow_shift": flow_shift_of(inputs["sigma_shift"], inputs["sigma_shift_value"])}


NODES = [ChromaTrainingSettings]
