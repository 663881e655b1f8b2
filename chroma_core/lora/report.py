"""What a LoRA file is, as plain values, as text and as an image: sizes, alpha, targets, base, recipe, training,
warnings, and how much it changes each layer."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from ..model.drawing import font_of
from .modules import KINDS, AdapterModule, FullModule, LokrModule, LoraFile, LoraModule, OftModule, quoted
from .settings import named_target

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
"""Rows of the image, and what a layer of a block is called. The single blocks' q, k, v stand in the image's rows."""

_BACKGROUND, _EMPTY, _INK = (24, 24, 27), (39, 39, 42), (212, 212, 216)
_RAMP = ((30, 41, 90), (37, 99, 235), (34, 197, 150), (250, 204, 21), (255, 246, 214))
_CELL, _LEFT, _TOP, _FOOT, _GAP = 14, 108, 34, 50, 10


@dataclass(frozen=True)
class Norms:
    """‖ΔW‖ by full layer name, and where the model's weights are known ‖W‖ by the same names."""

    change: Mapping[str, float]
    weight: Mapping[str, float] | None = None

    def of(self, layers: Iterable[str]) -> float:
        """‖ΔW‖ of some layers together, relative to their ‖W‖ where that is known."""
        names = list(layers)
        change = math.hypot(*(self.change[name] for name in names))
        if self.weight is None:
            return change
        return change / max(math.hypot(*(self.weight[name] for name in names)), 1e-30)


def update_norms(lora: LoraFile) -> Norms:
    """The size of the change in every layer, from the file alone."""
    return Norms({name: update_norm(module) for name, module in lora.modules.items()})


def update_norm(module: AdapterModule) -> float:
    """‖ΔW‖, the root of the sum of squares, from the factors alone; of a DoRA that of ΔV and of a rotation ‖R − I‖, for
    want of the weight; of a difference of the bias alone that of the bias."""
    if isinstance(module, LoraModule):
        # ‖up · down‖² = Σ (upᵀ up) ∘ (down downᵀ): rank × rank numbers instead of out × in.
        up, down = module.up.double(), module.down.double()
        return float(((up.T @ up) * (down @ down.T)).sum().clamp_min(0).sqrt() * abs(module.scale))
    if isinstance(module, LokrModule) and module.rows is None:
        return float(module.left.double().norm() * module.right.double().norm() * abs(module.scale))
    if isinstance(module, OftModule):
        turn = module.turn()
        return float((turn - torch.eye(turn.shape[-1])).norm())
    if isinstance(module, FullModule):
        found = module.diff if module.diff is not None else module.bias
        assert found is not None
        return float(found.double().norm())
    return float(module.update().norm())


def layer_group(name: str) -> str:
    """What kind of layer a full name is, in the words of the image; the name itself outside of blocks."""
    match = _BLOCK.match(name)
    if match is None:
        return name
    found = next((row for row, tail in _ROWS.items() if tail == match[3]), match[3])
    return found.replace("image", "single") if match[1] else found


def heat_map(norms: Norms) -> Image.Image:
    """Layers by block: a bright field is a large change, ‖ΔW‖ or where the weights are known ‖ΔW‖ / ‖W‖; above them
    that of the whole block. Double blocks left, single blocks right, the rest in words."""
    fields: dict[tuple[int, bool, int], float] = {}
    outside: dict[str, float] = {}
    tails = list(_ROWS.values())
    blocks: dict[tuple[bool, int], list[str]] = {}
    for name in norms.change:
        match = _BLOCK.match(name)
        if match is None or match[3] not in tails:
            outside[name] = norms.of([name])
        else:
            single, block = bool(match[1]), int(match[2])
            fields[1 + tails.index(match[3]), single, block] = norms.of([name])
            blocks.setdefault((single, block), []).append(name)
    fields |= {(0, single, block): norms.of(names) for (single, block), names in blocks.items()}
    doubles, singles = (max((b + 1 for _, s, b in fields if s == single), default=0) for single in (False, True))
    width = max(_LEFT + (doubles + singles) * _CELL + _GAP + 16, 360)
    rows = ["whole block", *_ROWS]
    image = Image.new("RGB", (width, _TOP + len(rows) * _CELL + _FOOT), _BACKGROUND)
    draw = ImageDraw.Draw(image)
    font = font_of(11)
    highest = max([*fields.values(), *outside.values()], default=0.0)
    what = "size of the change per layer" if norms.weight is None else "change per layer, relative to the weight"
    draw.text((8, 8), f"{what}: dark blue 0, bright {highest:.3g}", _INK, font)
    for row, label in enumerate(rows):
        top = _TOP + row * _CELL
        draw.text((8, top), label, _INK, font)
        for single, count in ((False, doubles), (True, singles)):
            for block in range(count):
                left = _LEFT + block * _CELL + (doubles * _CELL + _GAP if single else 0)
                norm = fields.get((row, single, block))
                colour = _EMPTY if norm is None else _colour(norm / highest if highest else 0.0)
                draw.rectangle((left, top, left + _CELL - 2, top + _CELL - 2), colour)
    foot = _TOP + len(rows) * _CELL + 4
    draw.text((_LEFT, foot), f"{doubles} double blocks", _INK, font)
    draw.text(
        (_LEFT + doubles * _CELL + _GAP, foot + (0 if doubles > 8 else 14)), f"{singles} single blocks", _INK, font
    )
    if outside:
        draw.text((8, foot + 28), ", ".join(f"{name} {norm:.3g}" for name, norm in outside.items()), _INK, font)
    return image


def _colour(share: float) -> tuple[int, int, int]:
    places = np.linspace(0, 1, len(_RAMP))
    red, green, blue = (round(np.interp(share, places, channel)) for channel in zip(*_RAMP, strict=True))
    return red, green, blue


_ALPHA_SOURCES = {
    "tensors": "stated in the file's tensors",
    "configuration": "stated in the file's header or in the adapter_config.json beside it",
    "absent": "not stated: taken as the rank, so that the factor is 1",
    "mixed": "stated for some layers; for the others taken as the rank, so that their factor is 1",
}
_TITLE = {
    "modelspec.title": "title",
    "chromakit.trigger": "trigger",
    "modelspec.trigger_phrase": "trigger",
    "modelspec.author": "author",
    "modelspec.description": "description",
    "modelspec.license": "licence",
}
_PARTS = ("recipe", "training", "versions", "converted_from")
_SOME = 1e-12
LONGEST_FIELD = 2000
"""Characters of a header field that a description shows."""


def describe(lora: LoraFile) -> str:
    """What a LoRA holds, in a few lines for a person."""
    kinds = [module.kind for module in lora.modules.values()]
    words = {**KINDS, "lora": ""}
    counted = " and ".join(
        f"{kinds.count(kind)} {words[kind]} layers".replace("  ", " ") for kind in KINDS if kind in kinds
    )
    lines = [
        f"{counted}, {f'rank {_listed(lora.ranks)}' if lora.ranks else 'full rank'}, alpha {_listed(lora.alphas)}, "
        f"{lora.parameters:,} parameters in {', '.join(lora.dtypes)} ({lora.key_format} key format)"
    ]
    if lora.unmatched:
        lines.append(f"{len(lora.unmatched)} keys are not Chroma's: {quoted(lora.unmatched)}")
    lines += [f"{key}: {_short(value)}" for key, value in sorted(lora.metadata.items()) if key != "format"]
    return "\n".join(lines)


def _short(value: str) -> str:
    """Some trainers write every tag of their dataset into one field."""
    return value if len(value) <= LONGEST_FIELD else f"{value[:LONGEST_FIELD]}… ({len(value):,} characters)"


def lora_report(
    lora: LoraFile,
    name: str = "",
    path: Path | None = None,
    warnings: Sequence[str] = (),
    norms: Norms | None = None,
) -> dict[str, Any]:
    """Everything that is known of a LoRA, as values for JSON.

    Args:
        name: what to call it.
        path: its file, for the size in bytes.
        warnings: from elsewhere, such as a base that differs; they come first among the `warnings`.
        norms: sizes of the change, where they are known already, and better than from the file.
    """
    norms = norms or update_norms(lora)
    header = lora.metadata
    return {
        "file": name,
        "bytes": path.stat().st_size if path is not None and path.is_file() else None,
        "dialect": lora.key_format,
        "kinds": lora.kinds,
        "modules": len(lora.modules),
        "parameters": lora.parameters,
        "dtypes": lora.dtypes,
        "ranks": lora.ranks,
        "alphas": lora.alphas,
        "alpha_source": lora.alpha_source,
        "target": named_target(list(lora.modules)),
        "groups": _groups(lora, norms),
        "base": {
            "sha256": header.get("chromakit.base_sha256"),
            "flavour": header.get("chromakit.flavour"),
            "file": header.get("chromakit.base_file"),
        },
        "trigger": header.get("chromakit.trigger") or header.get("modelspec.trigger_phrase"),
        **{key: _json(header.get(f"chromakit.{key}")) for key in _PARTS},
        "unmatched": list(lora.unmatched),
        "warnings": [*warnings, *_warnings(lora, norms.change)],
        "metadata": dict(header),
    }


def report_text(report: dict[str, Any]) -> str:
    """The report for a person."""
    lines = [f"{report['file'] or 'LoRA'}: {_kinds(report)}, {report['dialect']} key format"]
    lines += [f"WARNING: {warning}" for warning in report["warnings"]]
    size = f", {report['bytes'] / 2**20:.1f} MiB" if report["bytes"] else ""
    lines += [
        f"{report['parameters']:,} numbers in {', '.join(report['dtypes'])}{size}",
        f"target: {report['target'] or 'a choice of its own'}",
        f"rank {_listed(report['ranks']) or 'none'}, alpha {_listed(report['alphas']) or 'none'} "
        f"({_ALPHA_SOURCES[report['alpha_source']]})",
        "",
        *_table(report["groups"]),
        "",
    ]
    base = report["base"]
    known = [base["flavour"], base["file"], f"sha256 {base['sha256'][:16]}…" if base["sha256"] else None]
    lines.append(f"base: {', '.join(filter(None, known)) or 'not stated'}")
    lines.append(f"trigger: {report['trigger'] or 'not stated'}")
    for key in _PARTS:
        if report[key]:
            lines.append(f"{key.replace('_', ' ')}: {_flat(report[key])}")
    told = {label: report["metadata"][key] for key, label in _TITLE.items() if key in report["metadata"]}
    lines += [f"{label}: {value}" for label, value in told.items() if label != "trigger"]
    return "\n".join(lines)


def _groups(lora: LoraFile, norms: Norms) -> list[dict[str, Any]]:
    """Layers of one kind together: how many, their ranks, alphas, shapes, and the mean size of the change."""
    gathered: dict[str, list[str]] = {}
    for name in lora.modules:
        gathered.setdefault(layer_group(name), []).append(name)
    groups = []
    for label, names in gathered.items():
        part = LoraFile({name: lora.modules[name] for name in names})
        shapes = sorted({module.shape for module in part.modules.values()})
        groups.append(
            {
                "layers": label,
                "count": len(names),
                "ranks": part.ranks,
                "alphas": part.alphas,
                "shapes": [list(shape) for shape in shapes],
                "mean_norm": sum(norms.change[name] for name in names) / len(names),
                "of_weight": None if norms.weight is None else norms.of(names),
            }
        )
    return groups


def _table(groups: list[dict[str, Any]]) -> list[str]:
    relative = any(group["of_weight"] is not None for group in groups)
    rows = [("layers", "count", "out×in", "rank", "alpha", "mean ‖ΔW‖", *(("‖ΔW‖ / ‖W‖",) if relative else ()))]
    for group in groups:
        rows.append(
            (
                group["layers"],
                str(group["count"]),
                " ".join("×".join(map(str, shape)) for shape in group["shapes"]),
                _listed(group["ranks"]) or "whole",
                _listed(group["alphas"]),
                f"{group['mean_norm']:.3g}",
                *((f"{group['of_weight']:.3g}",) if relative else ()),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _warnings(lora: LoraFile, norms: Mapping[str, float]) -> list[str]:
    found = []
    if lora.unmatched:
        found.append(f"{len(lora.unmatched)} keys are not Chroma's: {quoted(lora.unmatched)}.")
    still = [name for name, norm in norms.items() if norm < _SOME]
    if still and lora.kinds != ["dora"]:
        found.append(f"{len(still)} of {len(norms)} layers change nothing (all zero): {quoted(still)}.")
    strongest = max((abs(module.scale) for module in lora.modules.values()), default=0.0)
    if strongest > 8:
        found.append(f"alpha / rank is {strongest:g}, which is unusually strong.")
    folded = all(isinstance(module, LoraModule) and module.scale == 1 for module in lora.modules.values())
    if lora.alpha_source == "configuration" and not folded:
        found.append(
            "alpha stands in a configuration that ComfyUI does not read: there the factor would be 1. Convert the file "
            "to the universal key format for ComfyUI."
        )
    magnitudes = [module.factors().get("magnitude") for module in lora.modules.values()]
    if any(each is not None and each.ndim == 1 for each in magnitudes):
        found.append("It is a DoRA, which ComfyUI computes only nearly as it was trained (see docs/lora.md).")
    if any(isinstance(m, OftModule) and m.rescale is not None for m in lora.modules.values()):
        found.append("It is an OFT with rescale, which ComfyUI leaves out.")
    if "peft" in lora.key_format:
        found.append("ComfyUI's own loader does not read the peft key format. Convert it to universal for use there.")
    return found


def _kinds(report: dict[str, Any]) -> str:
    return f"{' and '.join(KINDS[kind] for kind in report['kinds'])} on {report['modules']} layers"


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _flat(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    return ", ".join(f"{k} {json.dumps(v) if isinstance(v, dict) else v}" for k, v in value.items() if v is not None)


def _json(text: str | None) -> Any:
    """What a header field holds; the text itself when it is no JSON."""
    if text is None:
        return None
    try:
        return json.loads(text)
    except ValueError:
        return text
