"""From a foreign configuration to our own: one pass over the tables, with a line for every option that it has."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from ..errors import ChromaKitError, ConfigError
from ..training.config.config import TrainingConfig
from .fields import missing
from .rules import Given, Outcome, Table, Unreadable
from .shared import ForeignPath

LineKind = Literal["maps", "differs", "no counterpart", "unknown", "ignored"]


@dataclass(frozen=True)
class Line:
    """What became of one foreign option. `values`: our dotted options with what was written."""

    option: str
    value: str
    kind: LineKind
    values: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""

    @property
    def is_remark(self) -> bool:
        """Whether the user should know: the run will not be the same in this point."""
        return self.kind in ("differs", "no counterpart", "unknown")


@dataclass(frozen=True)
class Imported:
    """A finished import. `values` is what stands in the job file; `todo` what is left to do before it can run."""

    tool: str
    sources: tuple[str, ...]
    values: dict[str, Any]
    config: TrainingConfig
    lines: tuple[Line, ...]
    todo: tuple[str, ...]

    def of(self, *kinds: LineKind) -> list[Line]:
        """The lines of some kinds, in the file's order."""
        return [line for line in self.lines if line.kind in kinds]

    @property
    def remarks(self) -> list[Line]:
        """Everything that differs, has no counterpart or is not known."""
        return [line for line in self.lines if line.is_remark]


def shown(value: Any) -> str:
    """A value on one line, short, whatever it is."""
    brief = reprlib.Repr()
    brief.maxstring = brief.maxother = 80
    brief.maxdict = brief.maxlist = 6
    brief.maxlevel = 3
    if isinstance(value, bool):
        return str(value).lower()
    return brief.repr(value)


class Values:
    """Our options as they are collected, each with the foreign option that set it."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.found: dict[str, Any] = {}
        self.origin: dict[str, str] = {}

    def put(self, path: str, value: Any, option: str) -> None:
        """Raises ConfigError when another foreign option set it to something else."""
        if path in self.found and self.found[path] != value:
            raise ConfigError(
                f"'{self.file}': {self.origin[path]} says {path} = {shown(self.found[path])}, and {option} says "
                f"{shown(value)}. Remove one of the two."
            )
        self.found[path], self.origin[path] = value, option


def translate(
    table: Table,
    given: Given,
    into: Values,
    *,
    file: str,
    prefix: str = "",
    context: Given | None = None,
    known: Callable[[str, Any], str] = missing,
    spelled: Mapping[str, str] | None = None,
) -> list[Line]:
    """Apply a table to one section; null options are left out, for every tool reads them as not set.

    Args:
        prefix: stands before the option's name in lines and errors (`train.`).
        context: further options that a rule may look at, with dotted names.
        known: why one of our options cannot be written; see `fields.missing`.
        spelled: how the file spells an option, where that differs.
    Raises:
        ConfigError: a value that the foreign tool could not use either, or two options that contradict each other.
    """
    lines = []
    for option, value in given.items():
        name, rule = prefix + (spelled or {}).get(option, option), table.get(option)
        if value is None:
            lines.append(Line(name, "null", "ignored", {}, "not set"))
            continue
        if rule is None:
            lines.append(Line(name, shown(value), "unknown", {}, "not an option that this import knows"))
            continue
        try:
            outcome = rule.convert(value, {**(context or {}), **{k: v for k, v in given.items() if v is not None}})
        except Unreadable as error:
            raise ConfigError(f"'{file}': the option {name} is {shown(value)}; it must be {error}.") from error
        lines.append(record(name, shown(value), outcome, into, known))
    return lines


def record(name: str, value: str, outcome: Outcome, into: Values, known: Callable[[str, Any], str] = missing) -> Line:
    """Write an outcome's values, as far as these options exist here, and say so in its line."""
    absent = {path: why for path, v in outcome.values.items() if (why := known(path, v))}
    written = {path: v for path, v in outcome.values.items() if path not in absent}
    for path, v in written.items():
        into.put(path, v, name)
    if absent:
        reasons = [*absent.values(), *([outcome.reason] if written and outcome.reason else [])]
        return Line(name, value, "differs" if written else "no counterpart", written, "; ".join(reasons))
    return Line(name, value, outcome.kind, written, outcome.reason)


def resolve(value: Any, folders: Sequence[Path]) -> Any:
    """Foreign paths are relative to wherever the tool was started: taken from the first folder where they exist.

    One that exists nowhere stays as it stands (and is then relative to the job file).
    """
    if not isinstance(value, ForeignPath):
        return value
    for folder in folders:
        place = folder / os.path.expanduser(value)
        if place.exists():
            return str(place.resolve())
    return str(value)


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """`{"lora.rank": 16}` as `{"lora": {"rank": 16}}`."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *sections, last = path.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return tree


def validate(values: dict[str, Any], origin: Mapping[str, str], file: str) -> TrainingConfig:
    """Our own checks, with the foreign option's name in the message. Raises ConfigError."""
    try:
        TrainingConfig.model_validate(values)
    except ValidationError as error:
        problems = []
        for problem in error.errors():
            place = [str(part) for part in problem["loc"]]
            path = next((p for n in range(len(place), 0, -1) if (p := ".".join(place[:n])) in origin), ".".join(place))
            message = problem["msg"].removeprefix("Value error, ")
            problems.append(f"{origin.get(path, path)} (our {path}) is {shown(problem['input'])}: {message}")
        raise ConfigError(f"'{file}' cannot become a job: {'; '.join(problems)}.") from error
    except ChromaKitError as error:
        raise ConfigError(f"'{file}' cannot become a job: {error}") from error
    try:
        return TrainingConfig.parse(values)
    except ChromaKitError as error:
        raise ConfigError(f"'{file}' cannot become a job: {error}") from error
