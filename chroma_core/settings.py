"""The base of all values that are parsed from what a user or a program wrote, their fields that are options, and what
to say of one that cannot be used."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from typing_extensions import Self

from .errors import ConfigError, check_text, did_you_mean, nearest
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
            lines = (_line(each, cls) for each in error.errors())
            raise ConfigError(f"These settings cannot be used: {'; '.join(lines)}.") from error


def _line(error: Any, model: type[BaseModel]) -> str:
    where = ".".join(map(str, error["loc"])) or "settings"
    if error["type"] == "extra_forbidden":
        meant = field_meant(model, error["loc"])
        return f"{where} is not a known option ({f'did you mean {meant}?' if meant else 'check its spelling'})"
    message = error["msg"].removeprefix("Value error, ") + choice_meant(error)
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


def mistakes(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """A line for every mistake."""
    details = error.errors()
    found = []
    for detail in details:
        loc = detail["loc"]
        # A list with a wrong item also counts as too short, by that item.
        if detail["type"] == "too_short" and any(len(d["loc"]) > len(loc) and d["loc"][0] == loc[0] for d in details):
            continue
        found.append(_mistake(detail, model_at(model, loc[:-1])))
    return found


def _mistake(detail: Any, model: type[BaseModel]) -> str:
    loc, kind = detail["loc"], detail["type"]
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).lstrip(".")
    if kind == "extra_forbidden":
        near = nearest(loc[-1], model.model_fields)
        meant = f"did you mean {near}?" if near else f"known are {', '.join(model.model_fields)}"
        return f"{where} is not a known field ({meant})"
    if kind in _SIZES:
        return f"{where} {_SIZES[kind].format(found=len(detail['input']), **detail.get('ctx', {}))}"
    found = f"{where} is {short(detail['input'])}"
    if kind in _EXPECTED:
        return f"{found}, and must be {_EXPECTED[kind]}"
    limits = getattr(model.model_fields.get(str(loc[-1])), "metadata", ())  # the key of a table is no field
    low, high = (next((getattr(one, end) for one in limits if hasattr(one, end)), None) for end in ("ge", "le"))
    if kind in ("greater_than_equal", "less_than_equal") and low is not None and high is not None:
        return f"{found}, and must be between {low} and {high}"
    message = detail["msg"].removeprefix("Value error, ").rstrip(".") + choice_meant(detail)
    return f"{found}: {message[0].lower()}{message[1:]}"


def short(value: Any) -> str:
    """A value as it is quoted in a message."""
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, str | bool | type(None)) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def choice_meant(error: Any) -> str:
    """`did_you_mean` for a pydantic error about a value that is none of a few texts; empty for all others."""
    if error["type"] != "literal_error":
        return ""
    meant = did_you_mean(error["input"], re.findall(r"'([^']+)'", error["ctx"]["expected"]))
    return f".{meant}" if meant else ""


def field_meant(model: type[BaseModel], place: Sequence[int | str]) -> str | None:
    """The option that an unknown one may be meant for: one of that name in another table, else one near by.

    place: where it was found, as pydantic says it: names, numbers in lists, names of a union's members.
    """
    name, here = str(place[-1]), _fields_of(model_at(model, place[:-1]))
    elsewhere = (path for path in _paths(model) if path.rpartition(".")[2] == name)
    return min(elsewhere, key=lambda path: path.count("."), default=None) or nearest(name, here)


def model_at(model: type, place: Sequence[int | str]) -> Any:
    """The model or dataclass that reads what stands at a place in `model`; see `field_meant`."""
    for part in place:
        model = _inside(_fields_of(model).get(str(part))) or model
    return model


def _fields_of(owner: type) -> Mapping[str, Any]:
    """The types of the fields of a pydantic model or a dataclass by name."""
    if dataclasses.is_dataclass(owner):
        return {field.name: field.type for field in dataclasses.fields(owner)}
    return {name: field.annotation for name, field in owner.model_fields.items()}  # pyright: ignore


def _inside(annotation: Any) -> type | None:
    """The model or dataclass that a field's type is, or has in it."""
    if inspect.isclass(annotation) and (issubclass(annotation, BaseModel) or dataclasses.is_dataclass(annotation)):
        return annotation
    return next(filter(None, map(_inside, get_args(annotation))), None)


def _paths(owner: type, before: str = "") -> Iterator[str]:
    """The dotted names of all fields, those of tables in tables too."""
    for name, annotation in _fields_of(owner).items():
        yield f"{before}{name}"
        if inner := _inside(annotation):
            yield from _paths(inner, f"{before}{name}.")
