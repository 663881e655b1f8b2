"""Patterns on the names of layers, in either layout: `double_blocks.0-3`, `single_transformer_blocks.*`, `*.attn.to_q`.

A range of blocks is `double_blocks.0-3`, both ends included; `*`, `?` and `[…]` match as in a shell. A name selects
everything below it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from ..errors import ConfigError
from .transformer import to_original_module

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
