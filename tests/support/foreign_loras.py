"""LoRA files as other trainers write them, from the names that they document; no code of the pack's writer is used."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from chroma_core.names.transformer import to_original

HEADS = {
    "kohya": ("lora_unet_", "lora_down", "lora_up"),
    "ai-toolkit": ("diffusion_model.", "lora_A", "lora_B"),
    "onetrainer": ("lora_transformer_", "lora_down", "lora_up"),
    "lycoris": ("lycoris_", "lora_down", "lora_up"),
    "simpletuner": ("transformer.", "lora_A", "lora_B"),
    "diffusers": ("transformer.", "lora_A", "lora_B"),
    "peft": ("base_model.model.", "lora_A", "lora_B"),
}
"""Trainer → what stands before a layer's name, and what it calls the two matrices."""

ORIGINAL = {
    "double_blocks.{}.img_attn.qkv": (3, 1),
    "double_blocks.{}.img_attn.proj": (1, 1),
    "double_blocks.{}.img_mlp.0": (4, 1),
    "double_blocks.{}.img_mlp.2": (1, 4),
    "double_blocks.{}.txt_attn.qkv": (3, 1),
    "single_blocks.{}.linear1": (7, 1),
    "single_blocks.{}.linear2": (1, 5),
}
DIFFUSERS = {
    "transformer_blocks.{}.attn.to_q": (1, 1),
    "transformer_blocks.{}.attn.to_out.0": (1, 1),
    "transformer_blocks.{}.attn.add_v_proj": (1, 1),
    "transformer_blocks.{}.ff.net.0.proj": (4, 1),
    "transformer_blocks.{}.ff_context.net.2": (1, 4),
    "single_transformer_blocks.{}.attn.to_k": (1, 1),
    "single_transformer_blocks.{}.proj_mlp": (4, 1),
    "single_transformer_blocks.{}.proj_out": (1, 5),
}
"""Layers in the two layouts, with out and in in units of the model's width."""

Layers = dict[str, tuple[Tensor, Tensor]]


def foreign(
    trainer: str, width: int, doubles: int, singles: int, alpha: float | None = None, rank: int = 4, size: float = 1.0
) -> tuple[dict[str, Tensor], Layers]:
    """(tensors of the file, layer → (down, up) by the layout's own names); alpha None: the file states none."""
    prefix, down_name, up_name = HEADS[trainer]
    generator = torch.Generator().manual_seed(3)
    tensors: dict[str, Tensor] = {}
    layers: Layers = {}
    for template, (rows, columns) in (ORIGINAL if trainer in ("kohya", "ai-toolkit") else DIFFUSERS).items():
        for block in range(doubles if template.startswith(("double", "transformer")) else singles):
            name = template.format(block)
            key = prefix + (name.replace(".", "_") if prefix.endswith("_") else name)
            down = torch.randn(rank, columns * width, generator=generator) / (columns * width) ** 0.5
            up = torch.randn(rows * width, rank, generator=generator) * size / rank**0.5
            tensors |= {f"{key}.{down_name}.weight": down.clone(), f"{key}.{up_name}.weight": up.clone()}
            if alpha is not None:
                tensors[f"{key}.alpha"] = torch.tensor(float(alpha))
            layers[name] = (down, up)
    return tensors, layers


NORMS = (
    "double_blocks.{}.img_attn.norm.query_norm",
    "double_blocks.{}.txt_attn.norm.key_norm",
    "single_blocks.{}.norm.key_norm",
)
OUTSIDE = (
    "img_in",
    "final_layer.linear",
    "distilled_guidance_layer.in_proj",
    "distilled_guidance_layer.layers.0.out_layer",
)
"""What ComfyUI's own *Train LoRA* and *Extract and Save LoRA* also change."""

KIND_FILES = (
    "train-lora",
    "full",
    "native-loha",
    "dora-columns",
    "loha-dora-columns",
    "lokr-dora-columns",
    "oft",
    "oft-constrained",
    "linear-layer",
)
"""Kinds of file that ComfyUI's loader computes as their trainers do."""


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of a model's weights by the names of both layouts, without `.weight`."""
    weights = {name: tensor for name, tensor in model.state_dict().items() if name.endswith(".weight")}
    both = {**weights, **to_original(weights, norm_leaf="weight")}
    return {name.removesuffix(".weight"): tuple(tensor.shape) for name, tensor in both.items()}


def foreign_kind(
    kind: str, shapes: dict[str, tuple[int, ...]], doubles: int, singles: int, size: float = 0.5
) -> dict[str, Tensor]:
    """The tensors of a file of another kind than LoRA, every number random.

    shapes: of the model's weights, from `shapes_of`. Names and layouts are those of the program that writes such files.
    """
    generator = torch.Generator().manual_seed(11)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    native = kind in ("train-lora", "full") or kind.startswith("native-")
    templates = [*(ORIGINAL if native else DIFFUSERS), *(NORMS if kind in ("train-lora", "full") else ())]
    names = [
        template.format(block)
        for template in templates
        for block in range(doubles if template.startswith(("double", "transformer")) else singles)
    ]
    names += [name for name in OUTSIDE if name in shapes and native and not kind.startswith("native-")]
    tensors: dict[str, Tensor] = {}
    for name in names:
        shape = shapes[name]
        if kind in ("train-lora", "full"):
            key = f"diffusion_model.{name}"
        elif kind == "linear-layer":
            key = f"transformer.{name}"
        else:
            prefix = "lora_unet_" if native else "lora_transformer_" if kind == "dora-columns" else "lycoris_"
            key = prefix + name.replace(".", "_")
        if len(shape) == 1:
            tensors[f"{key}.diff"] = normal(*shape) * size
            continue
        out, into = shape
        low = {"down": normal(4, into) / into**0.5, "up": normal(out, 4) * size / 2}
        base = kind.removeprefix("native-")
        if base == "train-lora":
            tensors |= {f"{key}.lora_{leaf}.weight": tensor for leaf, tensor in low.items()}
            tensors |= {f"{key}.alpha": torch.tensor(1.0), f"{key}.diff_b": normal(out) * size}
        elif base == "full":
            tensors |= {f"{key}.diff": normal(out, into) * size / into**0.5, f"{key}.diff_b": normal(out) * size}
        elif base == "linear-layer":
            tensors |= {f"{key}.lora_linear_layer.{leaf}.weight": tensor for leaf, tensor in low.items()}
        elif base == "dora-columns":
            tensors |= {f"{key}.lora_{leaf}.weight": tensor for leaf, tensor in low.items()}
            tensors[f"{key}.alpha"] = torch.tensor(3.0)
        elif base.startswith("loha"):
            for side in ("w1", "w2"):
                tensors |= {f"{key}.hada_{side}_a": normal(out, 4), f"{key}.hada_{side}_b": normal(4, into)}
            tensors[f"{key}.alpha"] = torch.tensor(size / into**0.5)
        elif base.startswith("lokr"):
            tensors |= {f"{key}.lokr_w1": normal(4, 4) / into**0.25, f"{key}.lokr_w2_a": normal(out // 4, 2)}
            tensors |= {f"{key}.lokr_w2_b": normal(2, into // 4) / into**0.25, f"{key}.alpha": torch.tensor(size)}
        elif base.startswith("oft"):
            blocks = normal(out // 8, 8, 8) * size / 8
            constraint = 0.25 * float(blocks.norm()) if base == "oft-constrained" else 0.0
            tensors |= {f"{key}.oft_blocks": blocks, f"{key}.alpha": torch.tensor(constraint)}
        if base.endswith("dora-columns"):
            tensors[f"{key}.dora_scale"] = 0.5 + torch.rand(1, into, generator=generator)
    return tensors
