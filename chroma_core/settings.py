"""The base of all values that are parsed from what a user or a program wrote, their fields that are options, and what
to say of one that cannot be used."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from typing_extensions import Self

from .errors import ConfigError, check_text
from .options import Option


def option(default: Any, sentence: str, **about: Any) -> Any:
    """A field of `Settings` that is an option: `rank: int = option(16, "Size of the LoRA.", ge=1, le=1024, most=512)`.

    Args:
        default: `...` for one that the user has to give.
        sentence, about: of `Option`; what that does not know is pydantic's, the range for one.
    """
    shown = {field.name: about.pop(field.name) for field in dataclasses.fields(Option) if field.name in about}
    extra: dict[str, Any] = {"option": Option(sentence, **shown)}
    return Field(default, json_schema_extra=extra, **about)


class Settings(BaseModel):
    """A frozen value with no unknown fields, parsed from a node, a TOML file or JSON. `parse` is for a user's text."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def parse(cls, data: Any) -> Self:
        """`model_validate` with the errors as one paragraph. Raises ConfigError, also for text that is none."""
        check_text(data, "These settings cannot be used: ")
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ConfigError(f"These settings cannot be used: {'; '.join(map(_line, error.errors()))}.") from error


def _line(error: Any) -> str:
    where = ".".join(map(str, error["loc"])) or "settings"
    if error["type"] == "extra_forbidden":
        return f"{where} is not a known option (check its spelling)"
    message = error["msg"].removeprefix("Value error, ")
    if isinstance(error["input"], dict | list) or error["type"] == "missing":
        return f"{where}: {message}"
    return f"{where}: {message} (found {error['input']!r})"


_SIZES = {
    "missing": "is missing; it is required",
    "too_long": "has {actual_length} items; at most {max_length} are allowed",
    "too_short": "is empty; give at least one",
    "string_too_short": "is an empty text; it must not be",
    "string_too_long": "has {found} characters; at most {max_length} are allowed",
}
_EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "a text in quotes",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "model_type": "a JSON object",
    "model_attributes_type": "a JSON object",
    "finite_number": "a finite number",
}


def mistakes(error: ValidationError, model: type[BaseModel], items: Mapping[str, type[BaseModel]]) -> list[str]:
    """A line for every mistake; `items` are the models of the lists in `model`, by field."""
    details = error.errors()
    found = []
    for detail in details:
        loc = detail["loc"]
        # A list with a wrong item also counts as too short, by that item.
        if detail["type"] == "too_short" and any(len(d["loc"]) > len(loc) and d["loc"][0] == loc[0] for d in details):
            continue
        found.append(_mistake(detail, items[str(loc[0])] if len(loc) > 1 and loc[0] in items else model))
    return found


def _mistake(detail: Any, model: type[BaseModel]) -> str:
    loc, kind = detail["loc"], detail["type"]
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).lstrip(".")
    if kind == "extra_forbidden":
        close = near(str(loc[-1]), model)
        meant = f"did you mean {close[0]}?" if close else f"known are {', '.join(model.model_fields)}"
        return f"{where} is not a known field ({meant})"
    if kind in _SIZES:
        return f"{where} {_SIZES[kind].format(found=len(detail['input']), **detail.get('ctx', {}))}"
    found = f"{where} is {short(detail['input'])}"
    if kind in _EXPECTED:
        return f"{found}, and must be {_EXPECTED[kind]}"
    if kind in ("greater_than_equal", "less_than_equal"):
        metadata = model.model_fields[str(loc[-1])].metadata
        low = next(limit.ge for limit in metadata if hasattr(limit, "ge"))
        high = next(limit.le for limit in metadata if hasattr(limit, "le"))
        return f"{found}, and must be between {low} and {high}"
    message = detail["msg"].removeprefix("Value error, ").rstrip(".")
    return f"{found}: {message[0].lower()}{message[1:]}"


def near(name: str, model: type[BaseModel]) -> list[str]:
    """The field that a name may be meant for, if there is one."""
    return difflib.get_close_matches(name, list(model.model_fields), 1, cutoff=0.55)  # steps, sample_steps: .59


def short(value: Any) -> str:
    """A value as it is quoted in a message."""
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, str | bool | type(None)) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
