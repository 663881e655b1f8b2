"""What is wrong with a request, as one paragraph: each field, what was found there, what it may be."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from ..errors import ConfigError

_EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "a text in quotes",
    "tuple_type": "a list",
    "model_type": "a JSON object",
    "model_attributes_type": "a JSON object",
    "finite_number": "a finite number",
}


def unusable(why: str) -> ConfigError:
    """The error of a request that cannot be carried out."""
    return ConfigError(f"The request cannot be used: {why}.")


def read_json(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ConfigError for what is no JSON, and for a key that stands twice."""
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise unusable(f"it is not valid JSON ({error})") from error


def mistakes(error: ValidationError, model: type[BaseModel], items: Mapping[str, type[BaseModel]]) -> list[str]:
    """A line for every mistake; `items` are the models of the lists in `model`, by field."""
    details = error.errors()
    found = []
    for detail in details:
        loc = detail["loc"]
        # A list with a wrong item also counts as too short, by that item.
        if detail["type"] == "too_short" and any(len(d["loc"]) > len(loc) and d["loc"][0] == loc[0] for d in details):
            continue
        found.append(_line(detail, items[str(loc[0])] if len(loc) > 1 and loc[0] in items else model))
    return found


def _line(detail: Any, model: type[BaseModel]) -> str:
    loc, kind_ = detail["loc"], detail["type"]
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).lstrip(".")
    if kind_ == "extra_forbidden":
        known = list(model.model_fields)
        near = difflib.get_close_matches(str(loc[-1]), known, 1, cutoff=0.55)  # "steps" for "sample_steps" is .59
        meant = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
        return f"{where} is not a known field ({meant})"
    if kind_ == "missing":
        return f"{where} is missing; it is required"
    if kind_ == "too_long":
        return f"{where} has {detail['ctx']['actual_length']} items; at most {detail['ctx']['max_length']} are allowed"
    if kind_ == "too_short":
        return f"{where} is empty; give at least one"
    if kind_ == "string_too_short":
        return f"{where} is an empty text; it must not be"
    if kind_ == "string_too_long":
        return f"{where} has {len(detail['input'])} characters; at most {detail['ctx']['max_length']} are allowed"
    found = f"{where} is {short(detail['input'])}"
    if kind_ in _EXPECTED:
        return f"{found}, and must be {_EXPECTED[kind_]}"
    if kind_ in ("greater_than_equal", "less_than_equal"):
        return f"{found}, and must be {_range(model, str(loc[-1]))}"
    message = detail["msg"].removeprefix("Value error, ").rstrip(".")
    return f"{found}: {message[0].lower()}{message[1:]}"


def _range(model: type[BaseModel], field: str) -> str:
    metadata = model.model_fields[field].metadata
    low = next(limit.ge for limit in metadata if hasattr(limit, "ge"))
    high = next(limit.le for limit in metadata if hasattr(limit, "le"))
    return f"between {low} and {high}"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object; only one of them would count")
    return value


def short(value: Any) -> str:
    """A value as it is quoted in a message."""
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, str | bool | type(None)) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def kind(data: Any) -> str:
    """What a JSON value is."""
    kinds = {list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"}
    return kinds.get(type(data), "null")
