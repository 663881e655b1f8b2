"""An option, defined once, as a field of the value that reads it: annotated, or by `settings.option`, the same.

    rank: Annotated[int, Field(ge=1, le=1024), Option("Size of the LoRA: how much it can learn.", most=512)] = 16
    rank: int = option(16, "Size of the LoRA: how much it can learn.", ge=1, le=1024, most=512)

The field gives name, type, range and default, `Option` the sentence and what a widget shows. From these come the nodes'
widgets and tooltips, the flags of the commands, the commented job file and the tables in the docs.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass
from functools import lru_cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

MAX_SEED = 2**53 - 1
"""The largest whole number that a web page, or any JSON reader, holds exactly."""


@dataclass(frozen=True)
class Option:
    """What is said of an option beyond its field.

    sentence: tooltip, help line, comment and row of a table; Markdown is not read. unit: of the number.
    choices: the names that a text may be, where its type does not list them.
    least, most, step, round: of the widget; `least` and `most` where its range is narrower than the field's.
    advanced: the widget is folded away. since: the version that it came with, unless job ids were first recorded with
    it: at its default such an option is no part of a job's identity (see `identity`).
    """

    sentence: str
    unit: str = ""
    choices: tuple[str, ...] = ()
    least: float | None = None
    most: float | None = None
    step: float | None = None
    round: float | None = None
    advanced: bool = False
    since: str = ""


@dataclass(frozen=True)
class Described:
    """An option with its field: `kind` is bool, int, float or str, or object for lists and tables.

    ge, gt, le, lt: the range that is accepted; required: there is no default.
    """

    name: str
    kind: type
    default: Any
    required: bool
    choices: tuple[str, ...]
    bounds: tuple[tuple[str, float], ...]
    option: Option

    @property
    def sentence(self) -> str:
        """What the option does."""
        return self.option.sentence

    def bound(self, *names: str) -> float | None:
        """The first of the bounds `ge`, `gt`, `le`, `lt` that there is."""
        return next((value for name in names for key, value in self.bounds if key == name), None)

    @property
    def least(self) -> float | None:
        """The lowest number that a widget offers."""
        return self.bound("ge") if self.option.least is None else self.option.least

    @property
    def most(self) -> float | None:
        """The highest number that a widget offers."""
        return self.bound("le") if self.option.most is None else self.option.most

    @property
    def range(self) -> str:
        """The values that are accepted, in words; empty where the type says it all."""
        if self.choices:
            return " | ".join(self.choices)
        low, high = self.bound("ge", "gt"), self.bound("le", "lt")
        above, below = self.bound("gt") is not None, self.bound("lt") is not None
        if low is None and high is None:
            text = ""
        elif high is None:
            text = f"above {low:g}" if above else f"{low:g} or more"
        else:
            text = f"{'above ' if above else ''}{low or 0:g} {'to below' if below else 'to'} {high:g}"
        return f"{text} {self.option.unit}".strip()


@lru_cache(maxsize=64)
def options_of(owner: type) -> dict[str, Described]:
    """The options of a pydantic model or a dataclass by name, in the order of its fields."""
    return {
        name: _described(name, annotation, extras, default)
        for name, annotation, extras, default in _fields(owner)
        if any(isinstance(each, Option) for each in extras)
    }


def option_of(owner: type, name: str) -> Described:
    """One of `options_of`."""
    return options_of(owner)[name]


def identity(value: Any, dumped: Any) -> Any:
    """`dumped`, the JSON of `value`, without options that came later and are at their default, at any depth.

    So a new option leaves the identity of everything that does not use it as it was.
    """
    if isinstance(dumped, dict) and (dataclasses.is_dataclass(value) or hasattr(type(value), "model_fields")):
        later = {name: each.default for name, each in options_of(type(value)).items() if each.option.since}
        own = {name: getattr(value, name) for name in dumped}
        return {
            name: identity(own[name], dumped[name]) for name in own if name not in later or own[name] != later[name]
        }
    if isinstance(dumped, list):
        return [identity(inner, as_json) for inner, as_json in zip(value, dumped, strict=True)]
    return dumped


def _fields(owner: Any) -> Iterator[tuple[str, Any, Sequence[Any], Any]]:
    """Name, type, what else is said of it, and default (MISSING without one) of every field."""
    if not dataclasses.is_dataclass(owner):
        for name, f in owner.model_fields.items():
            extras = [*f.metadata, *(f.json_schema_extra or {}).values()]
            yield name, f.annotation, extras, MISSING if f.is_required() else f.default
        return
    hints = get_type_hints(owner, include_extras=True)
    for f in dataclasses.fields(owner):
        annotation, *extras = get_args(hints[f.name]) if get_origin(hints[f.name]) is Annotated else [hints[f.name]]
        yield f.name, annotation, extras, f.default if f.default_factory is MISSING else f.default_factory()


def _described(name: str, annotation: Any, extras: Sequence[Any], default: Any) -> Described:
    option = next(each for each in extras if isinstance(each, Option))
    constraints = [inner for each in extras for inner in (each, *getattr(each, "metadata", ()))]
    bounds = tuple((key, getattr(c, key)) for c in constraints for key in ("ge", "gt", "le", "lt") if hasattr(c, key))
    kinds = [annotation]
    if get_origin(annotation) in (Union, types.UnionType):
        kinds = [each for each in get_args(annotation) if each is not type(None)]
    choices = option.choices
    if get_origin(kinds[0]) is Literal and len(kinds) == 1:
        choices, kinds = get_args(kinds[0]), [str]
    kind = kinds[0] if kinds[0] in (bool, int, float, str) else object
    return Described(name, kind, default, default is MISSING, choices, bounds, option)
