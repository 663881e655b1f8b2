"""How much a LoRA changes each layer, and a picture of where it acts."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from PIL import Image, ImageDraw, ImageFont

from .modules import AdapterModule, LokrModule

_BLOCK = re.compile(r"^(single_)?transformer_blocks\.(\d+)\.(.+)$")
_ROWS = {
    "image q": "attn.to_q",
    "image k": "attn.to_k",
    "image v": "attn.to_v",
    "image out": "attn.to_out.0",
    "image mlp in": "ff.net.0.proj",
    "image mlp out": "ff.net.2",
    "text q": "attn.add_q_proj",
    "text k": "attn.add_k_proj",
    "text v": "attn.add_v_proj",
    "text out": "attn.to_add_out",
    "text mlp in": "ff_context.net.0.proj",
    "text mlp out": "ff_context.net.2",
    "single mlp in": "proj_mlp",
    "single out": "proj_out",
}
"""Rows of the picture, and what a layer of a block is called. The single blocks' q, k, v stand in the image's rows."""

_BACKGROUND, _EMPTY, _INK = (24, 24, 27), (39, 39, 42), (212, 212, 216)
_RAMP = ((30, 41, 90), (37, 99, 235), (34, 197, 150), (250, 204, 21), (255, 246, 214))
_CELL, _LEFT, _TOP, _FOOT, _GAP = 14, 108, 34, 50, 10


def update_norm(module: AdapterModule) -> float:
    """‖ΔW‖, the root of the sum of squares, from the factors alone; of a DoRA that of ΔV, for want of the weight."""
    if isinstance(module, LokrModule):
        if module.rows is not None:
            return float(module.delta().norm())
        return float(module.left.double().norm() * module.right.double().norm() * abs(module.scale))
    # ‖up · down‖² = Σ (upᵀ up) ∘ (down downᵀ): rank × rank numbers instead of out × in.
    up, down = module.up.double(), module.down.double()
    return float(((up.T @ up) * (down @ down.T)).sum().clamp_min(0).sqrt() * abs(module.scale))


def layer_group(name: str) -> str:
    """What kind of layer a full name is, in the words of the picture; the name itself outside of blocks."""
    match = _BLOCK.match(name)
    if match is None:
        return name
    found = next((row for row, tail in _ROWS.items() if tail == match[3]), match[3])
    return found.replace("image", "single") if match[1] else found


def heat_map(norms: Mapping[str, float]) -> Image.Image:
    """Layers by block: a bright field is a large change. Double blocks left, single blocks right, the rest in words.

    Args:
        norms: ‖ΔW‖ by full layer name, from `update_norm`.
    """
    fields: dict[tuple[int, bool, int], float] = {}
    outside: dict[str, float] = {}
    tails = list(_ROWS.values())
    for name, norm in norms.items():
        match = _BLOCK.match(name)
        if match is None or match[3] not in tails:
            outside[name] = norm
        else:
            fields[tails.index(match[3]), bool(match[1]), int(match[2])] = norm
    doubles, singles = (max((b + 1 for _, s, b in fields if s == single), default=0) for single in (False, True))
    width = max(_LEFT + (doubles + singles) * _CELL + _GAP + 16, 360)
    image = Image.new("RGB", (width, _TOP + len(_ROWS) * _CELL + _FOOT), _BACKGROUND)
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(11)
    highest = max(norms.values(), default=0.0)
    draw.text((8, 8), f"size of the change per layer: dark blue 0, bright {highest:.3g}", _INK, font)
    for row, label in enumerate(_ROWS):
        top = _TOP + row * _CELL
        draw.text((8, top), label, _INK, font)
        for single, count in ((False, doubles), (True, singles)):
            for block in range(count):
                left = _LEFT + block * _CELL + (doubles * _CELL + _GAP if single else 0)
                norm = fields.get((row, single, block))
                colour = _EMPTY if norm is None else _colour(norm / highest if highest else 0.0)
                draw.rectangle((left, top, left + _CELL - 2, top + _CELL - 2), colour)
    foot = _TOP + len(_ROWS) * _CELL + 4
    draw.text((_LEFT, foot), f"{doubles} double blocks", _INK, font)
    draw.text(
        (_LEFT + doubles * _CELL + _GAP, foot + (0 if doubles > 8 else 14)), f"{singles} single blocks", _INK, font
    )
    if outside:
        draw.text((8, foot + 28), ", ".join(f"{name} {norm:.3g}" for name, norm in outside.items()), _INK, font)
    return image


def _colour(share: float) -> tuple[int, int, int]:
    position = min(max(share, 0.0), 1.0) * (len(_RAMP) - 1)
    index = min(int(position), len(_RAMP) - 2)
    low, high = torch.tensor(_RAMP[index]), torch.tensor(_RAMP[index + 1])
    red, green, blue = (low + (high - low) * (position - index)).round().int().tolist()
    return red, green, blue
