"""How the tables are read (a `.yaml` for each trainer), and the engine that walks them.

A table has a `Rule` for every option of another trainer. Its `convert` answers with the value of our option, or says
that the value is only `near`, that there is nothing like it here (`lost`), or that it changes nothing (`unchanged`).
"""

from __future__ import annotations

import operator
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_type_hints

from ..errors import ConfigError
from ..model.flavours import FLAVOURS
from ..options import option_of
from ..training.config import TrainingConfig
from .read import ForeignPath, Unreadable, is_off, number, path, switch, text, whole

Kind = Literal["maps", "differs", "no counterpart", "ignored", "unknown"]
Given = Mapping[str, Any]
"""All options that stand in the same section, by name, without those that are null."""


@dataclass(frozen=True)
class Answer:
    """What becomes of a value that is not simply taken over, and why. `value`: as `Rule.convert` has it."""

    kind: Kind
    reason: str
    value: Any = field(default_factory=dict)


def near(value: Any, reason: str) -> Answer:
    """The value that comes nearest, and how it differs."""
    return Answer("differs", reason, value)


def lost(reason: str) -> Answer:
    """Nothing like it here: why, or what to do instead."""
    return Answer("no counterpart", reason)


def unchanged(reason: str) -> Answer:
    """It changes nothing of what is trained here: why."""
    return Answer("ignored", reason)


@dataclass(frozen=True)
class Rule:
    """A line of a table; `kind`, `to` and `reason` are what docs/import.md shows.

    `convert` takes the value and all given options. It answers with the value for our option `to`, with several options
    as a dictionary, or with one of the three above.
    """

    convert: Callable[[Any, Given], Any]
    to: str = ""
    reason: str = ""
    kind: Kind = "maps"


Table = dict[str, Rule]


def table(
    section: Mapping[str, Mapping[str, Any]], functions: Mapping[str, Any], model: type = TrainingConfig
) -> Table:
    """The rules of a data file's section: `options` by name, `lost` and `ignored` from a reason to names.

    An option is the name of ours that it is taken over into, or has: `to`, our option or several; `why`, what
    docs/import.md says of it; and one of

    - nothing else: it is read as our option's type has it, or by the function `read`.
    - by: a function of the value and all given options; `kind` is what docs/import.md counts it as.
    - words, alike: a word for a word, for [a word, how it differs], or for the reason of `same` or `lost`; `alike` are
      those that are the same here. A word that is not listed has no counterpart.
    - when_on: what a switch becomes that is on; `differs`, how that differs.
    - only, at_most: the values that change nothing here, because of `same`; `otherwise`, why there are no others.

    `lost`: nothing like them here; no remark where the value says that it is not used. `ignored`: they change nothing
    of what is trained here, whatever their value. `unstated` is not read here: it has what the trainer takes for an
    option that the file does not state, see `Draft.walk`. `functions` are those of the tool's module.
    """
    rules = {}
    for option, entry in section.get("options", {}).items():
        rules[option] = _rule({"to": entry} if isinstance(entry, str) else entry, {**SHARED, **functions}, model)
    for reason, names in section.get("lost", {}).items():
        rules |= dict.fromkeys(names.split(), Rule(partial(_lost, reason), "", reason, "no counterpart"))
    for reason, names in section.get("ignored", {}).items():
        rules |= dict.fromkeys(names.split(), Rule(partial(_always, unchanged(reason)), "", reason, "ignored"))
    return rules


def _always(answer: Any, value: Any, given: Given) -> Any:
    return answer


def _lost(reason: str, value: Any, given: Given) -> Any:
    return unchanged("not used") if is_off(value) else lost(reason)


def _rule(entry: Mapping[str, Any], functions: Mapping[str, Any], model: type) -> Rule:
    to, reason = entry.get("to", ""), entry.get("why", "")
    if "by" in entry:
        return Rule(functions[entry["by"]], to, reason, entry.get("kind", "maps"))
    if "words" in entry or "alike" in entry:
        return _choice(entry)
    if "when_on" in entry:
        answer, differs = entry["when_on"], entry.get("differs")
        reason = reason or f"true → `{str(answer).lower()}`" + (f": {differs}" if differs else "")
        answer = near(answer, differs) if differs else answer
        kind = "differs" if differs else "maps"
        return Rule(lambda value, given: answer if switch(value) else unchanged("not used"), to, reason, kind)
    if "otherwise" in entry:
        limit = entry.get("only", entry.get("at_most"))
        read, same, otherwise = READERS[type(limit)], unchanged(entry.get("same", "the same here")), entry["otherwise"]
        holds = operator.le if "at_most" in entry else operator.eq
        return Rule(
            lambda value, given: same if holds(read(value), limit) else lost(otherwise),
            reason=reason or otherwise,
            kind="no counterpart",
        )
    read = functions[entry["read"]] if "read" in entry else READERS.get(_kind(to, model), text)
    return Rule(lambda value, given: read(value), to, reason)


def _choice(entry: Mapping[str, Any]) -> Rule:
    answers: dict[str, Any] = {word: word for word in entry.get("alike", "").split()}
    same, other = [f"`{word}`" for word in answers], []
    for word, found in entry.get("words", {}).items():
        if isinstance(found, list):
            answers[word] = near(*found)
            values = found[0].items() if isinstance(found[0], dict) else ()
            becomes = ", ".join(f"{path} = {answer}" for path, answer in values) or found[0]
            other.append(f"`{word}` → `{becomes}` (differs: {found[1]})")
        elif isinstance(found, dict):
            ((kind, reason),) = found.items()
            answers[word] = lost(reason) if kind == "lost" else unchanged(reason)
            other.append(f"`{word}`: no counterpart ({reason})" if kind == "lost" else f"`{word}`: {reason}")
        else:
            answers[word] = found
            same.append(f"`{word}`" if word == found else f"`{word}` → `{found}`")

    def convert(value: Any, given: Given) -> Any:
        word = text(value).strip()
        return answers.get(word.lower(), lost(f"there is no {word!r} here"))

    return Rule(convert, entry.get("to", ""), "; ".join(filter(None, (entry.get("why"), ", ".join(same), *other))))


def _kind(to: str, model: type) -> type:
    """The kind of our option `to`, as `options.Described` has it."""
    *sections, name = to.split(".")
    for section in sections:
        model = get_type_hints(model)[section]
    return option_of(model, name).kind


WEIGHTS = (".safetensors", ".sft", ".gguf")
REPOSITORIES = {f.repository.lower(): f.name for f in FLAVOURS.values() if f.repository}


def is_local(name: str) -> bool:
    """Whether a model's name is a place on this computer and no repository: a repository is `owner/name`."""
    return name.lower().endswith(WEIGHTS) or re.fullmatch(r"[\w.-]+/[\w.-]+", name) is None or name.startswith(".")


def model_source(value: Any, given: Given) -> Any:
    """A repository, a folder or a single file as the model."""
    name = text(value).strip()
    if not name:
        return unchanged("not used")
    if flavour := REPOSITORIES.get(name.lower()):
        return {"model.flavour": flavour}
    if name.lower().endswith(WEIGHTS):
        return {"model.transformer": ForeignPath(name)}
    if re.match(r"lodestones/chroma\b", name, re.IGNORECASE):
        return near(
            {} if "model_flavour" in given else {"model.flavour": "base"},
            "a development version of Chroma; the published weights of the flavour are used: name a file in "
            "model.transformer",
        )
    if is_local(name):
        return {"model.folder": ForeignPath(name)}
    return lost("other repositories are not loaded: download it and name its folder in model.folder")


def part_source(part: str, value: Any, given: Given) -> Any:
    """One part of the model from a file or folder of this computer."""
    name = text(value).strip()
    if not name:
        return unchanged("not used")
    if is_local(name):
        return ForeignPath(name)
    return lost(f"the {part} comes from the flavour's repository, a file or a folder: name one in model.{part}")


def start_from(value: Any, given: Given) -> Any:
    """The LoRA whose training goes on."""
    return ForeignPath(text(value)) if text(value).strip() else unchanged("not used")


READERS: dict[type, Callable[[Any], Any]] = {int: whole, float: number, bool: switch}
SHARED: dict[str, Any] = {f.__name__: f for f in (path, model_source, start_from)}
SHARED |= {part: partial(part_source, part) for part in ("transformer", "vae", "text_encoder")}
"""What the data files of all tools name in `read` and `by`."""


def shown(value: Any) -> str:
    """A value on one line, short, whatever it is."""
    brief = reprlib.Repr()
    brief.maxstring = brief.maxother = 80
    brief.maxdict = brief.maxlist = 6
    brief.maxlevel = 3
    return str(value).lower() if isinstance(value, bool) else brief.repr(value)


@dataclass(frozen=True)
class Line:
    """What became of one foreign option. `values`: our dotted options with what was written."""

    option: str
    value: str
    kind: Kind
    values: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""


def overridden(
    lines: list[Line], prefix: str, shared: Given, sets: Sequence[Given], spelled: Mapping[str, str] | None = None
) -> None:
    """A line for each option that holds for all sets, where every set states it itself."""
    for name, value in shared.items():
        if sets and all(each.get(name) is not None for each in sets):
            lines.append(
                Line(prefix + (spelled or {}).get(name, name), shown(value), "ignored", {}, "every set says its own")
            )


class Draft:
    """Our options as they are collected, for the job or one of its datasets, with a line for each foreign option.

    Args:
        file: the foreign file's name, for errors.
        lines: what is added to; one list for the whole import.
    """

    def __init__(self, file: str, lines: list[Line]) -> None:
        self.file, self.lines = file, lines
        self.values: dict[str, Any] = {}
        self.origin: dict[str, str] = {}

    def walk(
        self,
        table: Table,
        options: Given,
        *,
        prefix: str = "",
        context: Given | None = None,
        spelled: Mapping[str, str] | None = None,
        unstated: Given | None = None,
    ) -> None:
        """Apply a table to one section; null options are left out, for every tool reads them as not set.

        Args:
            prefix: stands before the option's name in lines and errors (`train.`).
            context: further options that a rule may look at, with dotted names.
            spelled: how the file spells an option, where that differs.
            unstated: the trainer's own values of options, which hold where the file states none and no other option
                has set the same.
        Raises:
            ConfigError: a value that the foreign tool could not use either, or two options that contradict each other.
        """
        stated = {key: value for key, value in options.items() if value is not None}
        own = {key: value for key, value in (unstated or {}).items() if key not in stated}
        given = {**(context or {}), **own, **stated}
        for option, value in options.items():
            name, rule = prefix + (spelled or {}).get(option, option), table.get(option)
            if value is None:
                self.lines.append(Line(name, "null", "ignored", {}, "not set"))
            elif rule is None:
                self.lines.append(Line(name, shown(value), "unknown", {}, "not an option that this import knows"))
            else:
                try:
                    answer = rule.convert(value, given)
                except Unreadable as error:
                    reason = f"'{self.file}': the option {name} is {shown(value)}; it must be {error}."
                    raise ConfigError(reason) from error
                self.record(name, shown(value), answer, rule.to)
        for option, value in own.items():
            rule = table[option]
            self.record(prefix + option, f"{shown(value)} (not stated)", rule.convert(value, given), rule.to, False)

    def record(self, option: str, value: str, answer: Any, to: str = "", over: bool = True) -> None:
        """Write an answer's values, and say so in its line; with `over` False only what nothing has set yet."""
        if not isinstance(answer, Answer):
            answer = Answer("maps", "", answer)
        values = answer.value if isinstance(answer.value, dict) else {to: answer.value}
        if not over and values:
            values = {ours: each for ours, each in values.items() if ours not in self.values}
            if not values:
                return
        for ours, each in values.items():
            self.put(ours, each, option)
        self.lines.append(Line(option, value, answer.kind, values, answer.reason))

    def put(self, path: str, value: Any, option: str) -> None:
        """Raises ConfigError when another foreign option set it to something else."""
        if path in self.values and self.values[path] != value:
            raise ConfigError(
                f"'{self.file}': {self.origin[path]} says {path} = {shown(self.values[path])}, and {option} says "
                f"{shown(value)}. Remove one of the two."
            )
        self.values[path], self.origin[path] = value, option
