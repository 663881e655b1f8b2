"""The words in which the tables are written, and the engine that walks them.

A table has a `Rule` for every option of another trainer. Its `convert` answers with the value of our option, or says
that the value is only near (`Near`), that there is nothing like it here (`Lost`), or that it changes nothing (`Same`).
"""

from __future__ import annotations

import dataclasses
import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pydantic import BaseModel

from ..errors import ConfigError
from ..model.flavours import FLAVOURS
from ..training.config import TrainingConfig
from .read import ForeignPath, Unreadable, is_off, switch, text

Kind = Literal["maps", "differs", "no counterpart", "ignored", "unknown"]
Given = Mapping[str, Any]
"""All options that stand in the same section, by name, without those that are null."""


@dataclass(frozen=True)
class Near:
    """The value that comes nearest, and how it differs."""

    value: Any
    reason: str


@dataclass(frozen=True)
class Lost:
    """Nothing like it here: why, or what to do instead."""

    reason: str


@dataclass(frozen=True)
class Same:
    """It changes nothing of what is trained here: why."""

    reason: str


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


def maps(to: str, read: Callable[[Any], Any] = text, reason: str = "") -> Rule:
    """The same thing under another name."""
    return Rule(lambda value, given: read(value), to, reason)


def choice(to: str, words: Mapping[str, Any], reason: str = "") -> Rule:
    """A word for a word, or for one of the answers. A word that is not listed has no counterpart."""

    def convert(value: Any, given: Given) -> Any:
        word = text(value).strip()
        return words.get(word.lower(), Lost(f"there is no {word!r} here"))

    same, other = [], []
    for word, answer in words.items():
        if isinstance(answer, Near):
            other.append(f"`{word}` → `{answer.value}` (differs: {answer.reason})")
        elif isinstance(answer, Lost):
            other.append(f"`{word}`: no counterpart ({answer.reason})")
        elif isinstance(answer, Same):
            other.append(f"`{word}`: {answer.reason}")
        else:
            same.append(f"`{word}`" if word == answer else f"`{word}` → `{answer}`")
    return Rule(convert, to, "; ".join(filter(None, (reason, ", ".join(same), *other))))


def when_on(to: str, answer: Any, reason: str = "") -> Rule:
    """A switch that means something when it is on."""
    value, differs = (answer.value, f": {answer.reason}") if isinstance(answer, Near) else (answer, "")
    return Rule(
        lambda value, given: answer if switch(value) else Same("not used"),
        to,
        reason or f"true → `{str(value).lower()}`{differs}",
        "differs" if differs else "maps",
    )


def only(holds: Callable[[Any], bool], otherwise: str, same: str = "the same here", reason: str = "") -> Rule:
    """An option with one value that changes nothing here; any other has no counterpart."""
    return Rule(
        lambda value, given: Same(same) if holds(value) else Lost(otherwise),
        reason=reason or otherwise,
        kind="no counterpart",
    )


def lost(options: Mapping[str, str]) -> Table:
    """From reason → names: nothing like them here; no remark where the value says that it is not used."""

    def answer(reason: str) -> Callable[[Any, Given], Any]:
        return lambda value, given: Same("not used") if is_off(value) else Lost(reason)

    return _by_reason(options, answer, "no counterpart")


def ignored(options: Mapping[str, str]) -> Table:
    """From reason → names: they change nothing of what is trained here, whatever their value."""
    return _by_reason(options, lambda reason: lambda value, given: Same(reason), "ignored")


def _by_reason(options: Mapping[str, str], answer: Callable[[str], Callable[[Any, Given], Any]], kind: Kind) -> Table:
    rules = {reason: Rule(answer(reason), "", reason, kind) for reason in options}
    return {name: rules[reason] for reason, names in options.items() for name in names.split()}


def alike(words: str) -> dict[str, str]:
    """For `choice`: words that are the same here."""
    return {word: word for word in words.split()}


CONSTANT_LR = "a wave between the rate and nearly 0; the rate stays constant"
OWN_LAYERS = "stored by ChromaKit's own quantised layers instead"
START_FROM = Rule(
    lambda value, given: ForeignPath(text(value)) if text(value).strip() else Same("not used"), "lora.start_from"
)
STREAMED = when_on("model.offload", Near("block", "blocks are streamed by ChromaKit's own offloading"))
WEIGHTS = (".safetensors", ".sft", ".gguf")
REPOSITORIES = {f.repository.lower(): f.name for f in FLAVOURS.values() if f.repository}


def is_local(name: str) -> bool:
    """Whether a model's name is a place on this computer and no repository: a repository is `owner/name`."""
    return name.lower().endswith(WEIGHTS) or re.fullmatch(r"[\w.-]+/[\w.-]+", name) is None or name.startswith(".")


def model_source(value: Any, given: Given) -> Any:
    """A repository, a folder or a single file as the model."""
    name = text(value).strip()
    if not name:
        return Same("not used")
    if flavour := REPOSITORIES.get(name.lower()):
        return {"model.flavour": flavour}
    if name.lower().endswith(WEIGHTS):
        return {"model.transformer": ForeignPath(name)}
    if re.match(r"lodestones/chroma\b", name, re.IGNORECASE):
        return Near(
            {} if "model_flavour" in given else {"model.flavour": "base"},
            "a development version of Chroma; the published weights of the flavour are used: name a file in "
            "model.transformer",
        )
    if is_local(name):
        return {"model.folder": ForeignPath(name)}
    return Lost("other repositories are not loaded: download it and name its folder in model.folder")


MODEL_SOURCE = Rule(model_source, "model.flavour, model.folder or model.transformer", "see below")


def part_source(part: str) -> Rule:
    """One part of the model from a file or folder of this computer."""

    def convert(value: Any, given: Given) -> Any:
        name = text(value).strip()
        if not name:
            return Same("not used")
        if is_local(name):
            return ForeignPath(name)
        return Lost(f"the {part} comes from the flavour's repository, a file or a folder: name one in model.{part}")

    return Rule(convert, f"model.{part}", "a file or folder")


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

    @property
    def is_remark(self) -> bool:
        """Whether the user should know: the run will not be the same in this point."""
        return self.kind in ("differs", "no counterpart", "unknown")


class Draft:
    """Our options as they are collected, for the job or one of its data sets, with a line for each foreign option.

    Args:
        file: the foreign file's name, for errors.
        lines: what is added to; one list for the whole import.
        model: which configuration the options are of.
    """

    def __init__(self, file: str, lines: list[Line], model: type = TrainingConfig) -> None:
        self.file, self.lines, self.model = file, lines, model
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
    ) -> None:
        """Apply a table to one section; null options are left out, for every tool reads them as not set.

        Args:
            prefix: stands before the option's name in lines and errors (`train.`).
            context: further options that a rule may look at, with dotted names.
            spelled: how the file spells an option, where that differs.
        Raises:
            ConfigError: a value that the foreign tool could not use either, or two options that contradict each other.
        """
        given = {**(context or {}), **{key: value for key, value in options.items() if value is not None}}
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

    def record(self, option: str, value: str, answer: Any, to: str = "") -> None:
        """Write an answer's values, as far as these options exist here, and say so in its line."""
        kind, found, reason = _in_full(answer, to)
        absent = {path: why for path, v in found.items() if (why := missing(path, v, self.model))}
        written = {path: v for path, v in found.items() if path not in absent}
        for path, v in written.items():
            self.put(path, v, option)
        if absent:
            kind = "differs" if written else "no counterpart"
            reason = "; ".join([*absent.values(), *([reason] if written and reason else [])])
        self.lines.append(Line(option, value, kind, written, reason))

    def put(self, path: str, value: Any, option: str) -> None:
        """Raises ConfigError when another foreign option set it to something else."""
        if path in self.values and self.values[path] != value:
            raise ConfigError(
                f"'{self.file}': {self.origin[path]} says {path} = {shown(self.values[path])}, and {option} says "
                f"{shown(value)}. Remove one of the two."
            )
        self.values[path], self.origin[path] = value, option


def _in_full(answer: Any, to: str) -> tuple[Kind, dict[str, Any], str]:
    """An answer as its kind, our options and the reason."""
    if isinstance(answer, Lost | Same):
        return "no counterpart" if isinstance(answer, Lost) else "ignored", {}, answer.reason
    kind, value, reason = ("differs", answer.value, answer.reason) if isinstance(answer, Near) else ("maps", answer, "")
    return kind, value if isinstance(value, dict) else {to: value}, reason


def missing(path: str, value: Any, model: type = TrainingConfig) -> str:
    """Why `path` = `value` cannot be written: the option or its choice does not exist. Empty if it can."""
    kind: Any = model
    for part in path.split("."):
        known = _fields(kind)
        if part not in known:
            return f"this version of ChromaKit has no option {path}"
        kind = known[part]
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    if choices and value not in choices:
        return f"this version of ChromaKit has no {path} = {value!r} (it has {', '.join(map(repr, choices))})"
    return ""


def _fields(kind: Any) -> dict[str, Any]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return {name: field.annotation for name, field in kind.model_fields.items()}
    return get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}
