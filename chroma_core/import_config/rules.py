"""The vocabulary of the import tables: what becomes of one option of another trainer.

A table maps the foreign option's name to a `Rule`. A rule turns a value into an `Outcome`: it maps, it differs, it has
no counterpart, or it may be left out because it changes nothing here; all but the first with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["maps", "differs", "no counterpart", "ignored"]


class Unreadable(ValueError):
    """A value that the foreign tool could not use either. The text says what it must be."""


@dataclass(frozen=True)
class Outcome:
    """What one value becomes: `values` has our options as dotted paths (`lora.rank`)."""

    kind: Kind
    values: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""


Given = Mapping[str, Any]
"""All options that stand in the same section, by name, without those that are null."""


@dataclass(frozen=True)
class Rule:
    """A line of a table. `to` and `reason` are what docs/import.md shows; `convert` does the work."""

    kind: Kind
    convert: Callable[[Any, Given], Outcome]
    to: str = ""
    reason: str = ""


Table = dict[str, Rule]


def whole(value: Any) -> int:
    """A whole number, also written as text (`"16"`) or with a point (16.0)."""
    read = number(value)
    if read != int(read):
        raise Unreadable("a whole number")
    return int(read)


def number(value: Any) -> float:
    """A finite number, also written as text: YAML reads `1e-4` as text, and SimpleTuner's configure writes text."""
    try:
        read = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        read = math.nan
    if not math.isfinite(read):
        raise Unreadable("a number")
    return read


def switch(value: Any) -> bool:
    """true or false, also written as text."""
    known = {"true": True, "false": False}
    read = known.get(value.strip().lower()) if isinstance(value, str) else value
    if not isinstance(read, bool):
        raise Unreadable("true or false")
    return read


def text(value: Any) -> str:
    """A text; a number is taken as it is written."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise Unreadable("a text")
    return str(value)


def is_off(value: Any) -> bool:
    """Whether the value says that an option is not used: false, 0, empty, `none`, `no`."""
    return value in (None, False, 0, "", "false", "none", "None", "no", "0", "0.0") or value in ([], {})


def maps(to: str, read: Callable[[Any], Any] = text, reason: str = "") -> Rule:
    """The same thing under another name."""
    return Rule("maps", lambda value, given: Outcome("maps", {to: read(value)}), to, reason)


def differs(to: str, read: Callable[[Any], Any], reason: str) -> Rule:
    """The nearest that there is; a value that is off is taken over without a remark."""
    return Rule("differs", lambda value, given: Outcome("differs", {to: read(value)}, reason), to, reason)


def lost(reason: str) -> Rule:
    """Nothing like it here; no remark where the value says that it is not used."""

    def convert(value: Any, given: Given) -> Outcome:
        return Outcome("ignored", {}, "not used") if is_off(value) else Outcome("no counterpart", {}, reason)

    return Rule("no counterpart", convert, "", reason)


def ignored(reason: str) -> Rule:
    """Changes nothing of what is trained here, whatever its value."""
    return Rule("ignored", lambda value, given: Outcome("ignored", {}, reason), "", reason)


def ignored_all(names: str, reason: str) -> Table:
    """`ignored` for several names, separated by spaces."""
    return {name: ignored(reason) for name in names.split()}


def lost_all(names: str, reason: str) -> Table:
    """`lost` for several names, separated by spaces."""
    return {name: lost(reason) for name in names.split()}


@dataclass(frozen=True)
class Near:
    """In `choice`: the value that comes nearest, and how it differs."""

    value: Any
    reason: str


@dataclass(frozen=True)
class Lost:
    """In `choice`: a value without counterpart."""

    reason: str


@dataclass(frozen=True)
class Same:
    """In `choice`: a value that changes nothing here."""

    reason: str


def choice(to: str, known: Mapping[str, Any], reason: str = "") -> Rule:
    """A word for a word. A word that is not listed has no counterpart."""

    def convert(value: Any, given: Given) -> Outcome:
        word = text(value).strip()
        found = known.get(word.lower(), Lost(f"there is no {word!r} here"))
        if isinstance(found, Near):
            return Outcome("differs", {to: found.value}, found.reason)
        if isinstance(found, Lost):
            return Outcome("no counterpart", {}, found.reason)
        if isinstance(found, Same):
            return Outcome("ignored", {}, found.reason)
        return Outcome("maps", {to: found})

    return Rule("maps", convert, to, "; ".join(filter(None, (reason, *_spelled(known)))))


def _spelled(known: Mapping[str, Any]) -> list[str]:
    """The words of a `choice` for the documentation."""
    same = [f"`{word}`" if word == found else f"`{word}` → `{found}`" for word, found in known.items() if _plain(found)]
    other = []
    for word, found in known.items():
        if isinstance(found, Near):
            other.append(f"`{word}` → `{found.value}` (differs: {found.reason})")
        elif isinstance(found, Lost):
            other.append(f"`{word}`: no counterpart ({found.reason})")
        elif isinstance(found, Same):
            other.append(f"`{word}`: {found.reason}")
    return [", ".join(same), *other]


def _plain(found: Any) -> bool:
    return not isinstance(found, Near | Lost | Same)


def custom(convert: Callable[[Any, Given], Outcome], to: str, reason: str, kind: Kind = "maps") -> Rule:
    """A rule that depends on its value or on other options; `reason` describes it."""
    return Rule(kind, convert, to, reason)


def true_is(values: dict[str, Any], reason: str = "") -> Rule:
    """A switch that, when it is on, means these values; with a reason, not quite."""
    kind: Kind = "differs" if reason else "maps"

    def convert(value: Any, given: Given) -> Outcome:
        return Outcome(kind, values, reason) if switch(value) else Outcome("ignored", {}, "not used")

    shown = ", ".join(f"`{str(value).lower()}`" for value in values.values())
    return Rule(kind, convert, ", ".join(values), f"true → {shown}" + (f": {reason}" if reason else ""))
