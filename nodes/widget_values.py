"""The values of a node's widgets as a page sends them, checked against the node's own inputs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from comfy_api.latest import io

from ..chroma_core.errors import ConfigError


@lru_cache(maxsize=32)
def inputs_of(node: type[io.ComfyNode]) -> dict[str, Any]:
    """A node's inputs by name, as they were when first asked for: what a combo offered may have changed since."""
    return {each.id: each for each in node.define_schema().inputs}


def read_widgets(inputs: Iterable[Any], values: object) -> dict[str, Any]:
    """A value for each of these inputs: the page's, else the default.

    Raises ConfigError for anything else than an object, for a name that is none of these, and for a value of another
    kind, out of the input's range, or not among its options.
    """
    known = {each.id: each for each in inputs}
    if not isinstance(values, dict):
        raise ConfigError(f"The request's body must be a JSON object with nothing but: {', '.join(known)}.")
    foreign = [name for name in values if name not in known]
    if foreign:
        raise ConfigError(f"The request has no field '{foreign[0]}'. It takes: {', '.join(known)}.")
    return {name: _read(each, values[name]) if name in values else each.default for name, each in known.items()}


def _read(widget: Any, value: Any) -> Any:
    if isinstance(widget, io.Combo.Input):
        if value not in widget.options:
            raise ConfigError(f"{widget.id} is {value!r}; choose one of: {', '.join(map(str, widget.options))}.")
        return value
    if isinstance(widget, io.Int.Input | io.Float.Input):
        whole = isinstance(widget, io.Int.Input)
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number or (whole and value != int(value)):
            raise ConfigError(f"{widget.id} is {value!r}; it must be a {'whole ' if whole else ''}number.")
        if not widget.min <= value <= widget.max:
            raise ConfigError(f"{widget.id} is {value}; it must be between {widget.min} and {widget.max}.")
        return int(value) if whole else float(value)
    kind = bool if isinstance(widget, io.Boolean.Input) else str
    if not isinstance(value, kind):
        raise ConfigError(f"{widget.id} is {value!r}; it must be {'true or false' if kind is bool else 'a text'}.")
    return value
