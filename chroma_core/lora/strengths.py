"""How strong a LoRA is in which blocks, and over the course of sampling.

The strength of a layer at a step is strength · factor of its blocks · factor of the step.

| text | meaning |
|---|---|
| blocks `double_blocks.*:0.5, single_blocks.30-37:0` | the first pattern that selects a layer gives its factor |
| schedule `0:.2, .5:.8, 1:1` | factors over the run, 0 the first step and 1 the last, straight lines in between |

Patterns: see `names.transformer`. Before the first point of a schedule its factor holds, after the last one that of the
last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import numpy as np
from torch import nn

from ..errors import ConfigError, LoraError, shortened
from ..names.transformer import selects, without_ranges
from .adapters import set_strength
from .modules import quoted

MOST = 100
"""Points of a schedule, and patterns of blocks: what is longer was pasted by mistake."""

LARGEST = 100.0
"""Of a factor."""

Points = tuple[tuple[float, float], ...]


def parse_blocks(text: str, what: str = "The LoRA's strength per block") -> tuple[tuple[str, float], ...]:
    """Patterns and their factors; empty for an empty text. Raises ConfigError, which begins with `what`."""
    found = []
    for part, pattern, factor in _pairs(text, what, "double_blocks.0-5:0.5"):
        without_ranges(pattern)
        found.append((pattern, _number(factor, part, what)))
    return tuple(found)


def parse_schedule(text: str) -> Points:
    """Points (place in the run 0..1, factor) with rising places; empty for an empty text. Raises ConfigError."""
    what, found = "The LoRA's strength over the steps", []
    for part, place, factor in _pairs(text, what, "0:0.2, 0.5:0.8, 1:1"):
        at = _number(place, part, what)
        if not 0 <= at <= 1:
            raise ConfigError(f"{what} has a point at {at:g} (“{part}”); 0 is the first step and 1 the last.")
        if found and at <= found[-1][0]:
            raise ConfigError(
                f"{what} has a point at {at:g} (“{part}”) after one at {found[-1][0]:g}; places must rise. For a jump "
                "write two that lie close together, e.g. 0.5:1, 0.501:0."
            )
        found.append((at, _number(factor, part, what)))
    return tuple(found)


def factor_at(points: Points, place: float) -> float:
    """The schedule's factor at a place of the run, 0 the first step and 1 the last; 1 without points."""
    return float(np.interp(place, [at for at, _ in points], [factor for _, factor in points])) if points else 1.0


def layer_strengths(layers: Iterable[str], strength: float, blocks: str = "") -> dict[str, float]:
    """The strength of each layer of a LoRA, by diffusers' names.

    Raises ConfigError for a text that cannot be read, LoraError for a pattern that selects none of the layers.
    """
    layers = tuple(layers)
    patterns = parse_blocks(blocks)
    lost = [pattern for pattern, _ in patterns if not any(selects(pattern, layer) for layer in layers)]
    if lost:
        raise LoraError(
            f"The LoRA's strength per block names {quoted(lost)}, which is none of its {len(layers)} layers, e.g. "
            f"{quoted(layers[:2])}. Name blocks or layers that it changes, e.g. double_blocks.0-5 or *.attn.*."
        )
    return {layer: strength * _factor(patterns, layer) for layer in layers}


def follow(transformer: nn.Module, name: str, strengths: Mapping[str, float], schedule: str) -> Callable[[float], bool]:
    """What sets a live LoRA to its strength at a place of the run, from 0 to 1, and tells whether that is another than
    it set before; see `transformer.step_hooks`."""
    points, before = parse_schedule(schedule), math.nan

    def at(place: float) -> bool:
        nonlocal before
        last, before = before, factor_at(points, place)
        set_strength(transformer, name, {layer: strength * before for layer, strength in strengths.items()})
        return last != before

    return at


def _factor(patterns: Iterable[tuple[str, float]], layer: str) -> float:
    return next((factor for pattern, factor in patterns if selects(pattern, layer)), 1.0)


def _pairs(text: str, what: str, example: str) -> list[tuple[str, str, str]]:
    """The parts of `a:1, b:2` as (part, a, 1)."""
    parts = [part for part in (piece.strip() for piece in text.replace("\n", ",").split(",")) if part]
    if len(parts) > MOST:
        raise ConfigError(f"{what} has {len(parts)} parts; at most {MOST} are allowed.")
    found = []
    for part in parts:
        name, colon, value = (piece.strip() for piece in part.rpartition(":"))
        if not (colon and name and value):
            raise ConfigError(f"{what} has the part “{shortened(part)}”; it must read like {example}.")
        found.append((part, name, value))
    return found


def _number(text: str, part: str, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not abs(value) <= LARGEST:  # also of NaN
        raise ConfigError(
            f"{what} has the part “{shortened(part)}”: '{shortened(text)}' must be a number, at most 100."
        )
    return value
