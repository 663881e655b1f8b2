"""LoRA files as other trainers write them, from the names that they document; no code of the pack's writer is used."""

from __future__ import annotations

import torch
from torch import Tensor

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
