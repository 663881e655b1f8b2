"""Two names for one weight: the original layout of Chroma's files and diffusers' layout, as pure maps both ways; and
patterns on the names of layers in either layout.

The original layout (`double_blocks.*`, `single_blocks.*`, `distilled_guidance_layer.*`, `img_in`, `txt_in`,
`final_layer`) is that of the released single files, of ComfyUI and of most LoRA trainers. It fuses what diffusers keeps
apart: `qkv` holds query, key and value row above row, `linear1` of a single block also the MLP's input (4 widths).
A *module* name has no `.weight` or `.bias`; a *parameter* name has. Norms store their weight as `.scale` in released
files and as `.weight` in ComfyUI; both are read.

Nothing here needs a model: block counts and widths come from the names and tensors themselves.

A pattern is `double_blocks.0-3`, `single_transformer_blocks.*`, `*.attn.to_q`. A range of blocks includes both ends;
`*`, `?` and `[…]` match as in a shell; a name selects everything below it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from ..errors import ConfigError, ModelFileError, first_few

MLP_RATIO = 4
"""Rows of the MLP's input in `linear1`, in units of the model's width (fixed in Chroma)."""

FILE_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
"""What checkpoints in the original layout may put before every name."""


APPROXIMATOR = "distilled_guidance_layer"
"""The approximator's name, in both layouts."""


@dataclass(frozen=True)
class Rows:
    """A module of the other layout, and its rows of the fused tensor: shares `start` to `stop` of `of`."""

    name: str
    start: int = 0
    stop: int = 1
    of: int = 1

    def span(self, rows: int) -> tuple[int, int]:
        """First and one-past-last row, for a fused tensor of `rows` rows; ModelFileError if they do not divide."""
        if rows % self.of:
            raise ModelFileError(
                f"A fused tensor for '{self.name}' has {rows} rows, which do not divide into {self.of} equal shares. "
                "The file belongs to another architecture."
            )
        return rows // self.of * self.start, rows // self.of * self.stop

    def take(self, fused: Tensor) -> Tensor:
        """The module's rows, as a view of the fused tensor (weight [rows, in], bias or LoRA-up alike)."""
        start, stop = self.span(fused.shape[0])
        return fused[start:stop]


def _fused(*parts: str, shares: tuple[int, ...] = ()) -> tuple[Rows, ...]:
    shares = shares or (1,) * len(parts)
    starts = [sum(shares[:i]) for i in range(len(parts))]
    return tuple(Rows(p, a, a + n, sum(shares)) for p, a, n in zip(parts, starts, shares, strict=True))


_DOUBLE = {
    "img_attn.qkv": _fused("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.proj": _fused("attn.to_out.0"),
    "img_attn.norm.query_norm": _fused("attn.norm_q"),
    "img_attn.norm.key_norm": _fused("attn.norm_k"),
    "img_mlp.0": _fused("ff.net.0.proj"),
    "img_mlp.2": _fused("ff.net.2"),
    "txt_attn.qkv": _fused("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.proj": _fused("attn.to_add_out"),
    "txt_attn.norm.query_norm": _fused("attn.norm_added_q"),
    "txt_attn.norm.key_norm": _fused("attn.norm_added_k"),
    "txt_mlp.0": _fused("ff_context.net.0.proj"),
    "txt_mlp.2": _fused("ff_context.net.2"),
}
_SINGLE = {
    "linear1": _fused("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", shares=(1, 1, 1, MLP_RATIO)),
    "linear2": _fused("proj_out"),
    "norm.query_norm": _fused("attn.norm_q"),
    "norm.key_norm": _fused("attn.norm_k"),
}
_APPROXIMATOR = {"in_layer": _fused("linear_1"), "out_layer": _fused("linear_2")}
_TOP = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "final_layer.linear": "proj_out",
    "distilled_guidance_layer.in_proj": "distilled_guidance_layer.in_proj",
    "distilled_guidance_layer.out_proj": "distilled_guidance_layer.out_proj",
    "distilled_guidance_layer.norms.{}": "distilled_guidance_layer.norms.{}",
}


def _tables() -> tuple[dict[str, tuple[Rows, ...]], dict[str, Rows]]:
    """Both directions over name templates, in which `{}` stands for the block's number."""
    forward = {original: _fused(name) for original, name in _TOP.items()}
    for original_root, root, table in (
        ("double_blocks.{}", "transformer_blocks.{}", _DOUBLE),
        ("single_blocks.{}", "single_transformer_blocks.{}", _SINGLE),
        ("distilled_guidance_layer.layers.{}", "distilled_guidance_layer.layers.{}", _APPROXIMATOR),
    ):
        for tail, parts in table.items():
            forward[f"{original_root}.{tail}"] = tuple(replace(part, name=f"{root}.{part.name}") for part in parts)
    backward = {part.name: replace(part, name=original) for original, parts in forward.items() for part in parts}
    return forward, backward


_TO_DIFFUSERS, _TO_ORIGINAL = _tables()
_FLAT = {template.replace(".", "_"): template for template in (*_TO_DIFFUSERS, *_TO_ORIGINAL)}
_NUMBERED = re.compile(
    r"^((?:double_blocks|single_blocks|single_transformer_blocks|transformer_blocks"
    r"|distilled_guidance_layer[._](?:layers|norms))[._])(\d+)(?=[._]|$)"
)


def _template(name: str) -> tuple[str, str]:
    """A name with its block number replaced by `{}`, and that number ('' when it has none)."""
    match = _NUMBERED.match(name)
    if match is None:
        return name, ""
    return f"{match[1]}{{}}{name[match.end() :]}", match[2]


def to_diffusers_modules(original: str) -> tuple[Rows, ...] | None:
    """The diffusers modules that an original module holds, in row order; None for a name that is not Chroma's.

    `double_blocks.3.img_attn.qkv` → to_q, to_k, to_v of `transformer_blocks.3.attn`, a third of the rows each.
    """
    template, number = _template(original)
    parts = _TO_DIFFUSERS.get(template)
    if parts is None:
        return None
    return tuple(replace(part, name=part.name.format(number)) for part in parts)


def to_original_module(name: str) -> Rows | None:
    """The original module that holds a diffusers module, and which of its rows; None for an unknown name."""
    template, number = _template(name)
    found = _TO_ORIGINAL.get(template)
    return None if found is None else replace(found, name=found.name.format(number))


def unflatten(name: str) -> str | None:
    """A module name whose dots were written as underscores (kohya's habit) with its dots back, in either layout.

    `double_blocks_3_img_attn_qkv` → `double_blocks.3.img_attn.qkv`; None for a name that is not Chroma's.
    """
    template, number = _template(name)
    dotted = _FLAT.get(template)
    return None if dotted is None else dotted.format(number)


def _split_parameter(key: str) -> tuple[str, str]:
    module, _, leaf = key.rpartition(".")
    return module, "weight" if leaf == "scale" else leaf


def to_diffusers_keys(original_key: str) -> tuple[Rows, ...] | None:
    """Like `to_diffusers_modules`, for a parameter name with or without a checkpoint prefix."""
    for prefix in FILE_PREFIXES:
        original_key = original_key.removeprefix(prefix)
    module, leaf = _split_parameter(original_key)
    parts = to_diffusers_modules(module) if leaf in ("weight", "bias") else None
    return None if parts is None else tuple(replace(part, name=f"{part.name}.{leaf}") for part in parts)


def to_original_key(key: str, norm_leaf: str = "scale") -> Rows | None:
    """Like `to_original_module`, for a parameter name. `norm_leaf`: `scale` (released files) or `weight` (ComfyUI)."""
    module, leaf = _split_parameter(key)
    found = to_original_module(module) if leaf in ("weight", "bias") else None
    if found is None:
        return None
    is_norm = found.name.endswith("_norm") or ".norms." in found.name
    return replace(found, name=f"{found.name}.{norm_leaf if is_norm else leaf}")


def to_original(weights: Mapping[str, Tensor], norm_leaf: str = "scale") -> dict[str, Tensor]:
    """A state dict in diffusers' layout → the original one. Needs every part of a fused tensor.

    Raises ModelFileError that names unknown keys, or the parts that are missing.
    """
    gathered: dict[str, list[tuple[Rows, Tensor]]] = {}
    unknown = []
    for key, tensor in weights.items():
        found = to_original_key(key, norm_leaf)
        if found is None:
            unknown.append(key)
        else:
            gathered.setdefault(found.name, []).append((found, tensor))
    if unknown:
        raise ModelFileError(
            f"{len(unknown)} tensors are not those of a Chroma transformer in diffusers' layout, e.g. "
            f"{first_few(unknown)}. The file belongs to another model, or to another layout."
        )
    fused: dict[str, Tensor] = {}
    for name, parts in gathered.items():
        parts.sort(key=lambda part: part[0].start)
        edges = [0, *(rows.stop for rows, _ in parts)]
        if [rows.start for rows, _ in parts] != edges[:-1] or edges[-1] != parts[0][0].of:
            raise ModelFileError(
                f"'{name}' cannot be put together: only {len(parts)} of its parts are there. The model is incomplete."
            )
        fused[name] = parts[0][1] if len(parts) == 1 else torch.cat([tensor for _, tensor in parts])
    return fused


_RANGE = re.compile(r"^(\w+)\.(\d{1,3})-(\d{1,3})(?=\.|$)")


def without_ranges(part: str) -> list[str]:
    """`double_blocks.0-3.img_attn` → one pattern a block. Raises ConfigError for a range that ends before it begins."""
    match = _RANGE.match(part)
    if match is None:
        return [part]
    root, first, last = match[1], int(match[2]), int(match[3])
    if first > last:
        raise ConfigError(f"The range in '{part}' is empty: the first block comes first, as in {root}.{last}-{first}.")
    return [f"{root}.{number}{part[match.end() :]}" for number in range(first, last + 1)]


def names_of(layer: str) -> tuple[str, str]:
    """A layer's names in diffusers' layout and in the original one, where that has it; else the first twice."""
    original = to_original_module(layer)
    return layer, original.name if original else layer


def matches(pattern: str, names: Sequence[str]) -> bool:
    """Whether a pattern without a range selects the layer of those names."""
    return any(fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*") for name in names)


def selects(part: str, layer: str) -> bool:
    """Whether a pattern, also one with a range, selects a layer, given by diffusers' name. Raises ConfigError."""
    names = names_of(layer)
    return any(matches(pattern, names) for pattern in without_ranges(part))
