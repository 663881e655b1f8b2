"""Widgets of nodes from the options that they set: type, default, range, sentence and hints are the option's.

A saved workflow holds values by position, so nodes list their widgets in an order of their own, new ones at its end.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from comfy_api.latest import io

from ..chroma_core.errors import ConfigError, shortened
from ..chroma_core.options import Described, option_of

ADVANCED: dict[str, Any] = {"optional": True, "advanced": True}

_KINDS = {bool: io.Boolean, int: io.Int, float: io.Float, str: io.String}


def widget(owner: type, field: str, name: str = "", kind: Any = None, **changes: Any) -> Any:
    """The input for the option `field` of `owner`, under another `name` or of another kind than the type says.

    `changes` are the arguments of the input that this node has otherwise.
    """
    option = option_of(owner, field)
    hints = {**_hints(option), "default": option.default, "tooltip": option.sentence}
    hints |= ADVANCED if option.option.advanced else {}
    kind = kind or (io.Combo if option.choices else _KINDS[option.kind])
    return kind.Input(name or field, **{**hints, **changes})


SHOWN = 10
"""Widgets of a companion node that are not folded."""


class Options(dict[str, Any]):
    """Values of a companion node's widgets that are not at their default; JSON in a prompt is none."""


def unfolded(inputs: Iterable[Any]) -> list[Any]:
    """The widgets of a companion node: those that are folded on the other one, the first of them to be seen."""
    found = list(inputs)
    for place, each in enumerate(found):
        each.optional, each.advanced = True, True if place >= SHOWN else None
    return found


def defaults_of(inputs: Iterable[Any]) -> dict[str, Any]:
    """The widgets' defaults by name."""
    return {each.id: each.default for each in inputs}


def changed(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> Options:
    """Those of `values` that are not at their default."""
    return Options({name: value for name, value in values.items() if value != defaults.get(name, value)})


def with_options(
    node: str, own: Mapping[str, Any], linked: Mapping[str, Any] | None, defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """A node's own widgets with the `Options` that are linked to it. A widget at its default says nothing.

    Raises ConfigError for an option that the node lacks, or that is said on both in different ways.
    """
    for name, value in (linked or {}).items():
        if name not in defaults:
            raise ConfigError(
                f"{node} has no {name}, which the options that are linked to it set to {shortened(repr(value))}. "
                f"Leave it there at its default, or take that link away."
            )
        if own.get(name, defaults[name]) not in (defaults[name], value):
            raise ConfigError(
                f"{name} is {shortened(repr(own[name]))} on {node}, and {shortened(repr(value))} in the options that "
                f"are linked to it. Set it in one of them, and leave its default ({defaults[name]!r}) in the other."
            )
    return {**own, **(linked or {})}


def _hints(option: Described) -> dict[str, Any]:
    if option.choices:
        return {"options": list(option.choices)}
    if option.kind not in (int, float):
        return {}
    found = {"min": option.least, "max": option.most, "step": option.option.step, "round": option.option.round}
    return {key: option.kind(value) for key, value in found.items() if value is not None}


def lines(text: str) -> list[str]:
    """What stands on the lines of a widget, without empty ones."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def nested(values: Mapping[str, Any], paths: Mapping[str, str]) -> dict[str, Any]:
    """Values of widgets as a configuration; `paths` are the dotted names of what the widgets set."""
    found: dict[str, Any] = {}
    for name, path in paths.items():
        if name in values:
            section, _, field = path.rpartition(".")
            (found.setdefault(section, {}) if section else found)[field] = values[name]
    return found


def values_at(config: Any, paths: Mapping[str, str]) -> dict[str, Any]:
    """The way back: the widgets' values from a configuration."""
    found = {}
    for name, path in paths.items():
        section, _, field = path.rpartition(".")
        found[name] = getattr(getattr(config, section) if section else config, field)
    return found
