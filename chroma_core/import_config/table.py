"""How the tables are read (a `.yaml` for each trainer), and the engine that walks them."""

from __future__ import annotations

import operator
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_type_hints

from ..errors import ConfigError
from ..options import option_of
from ..training.config import TrainingConfig
from .read import Unreadable, ask, is_off, is_on, number, switch, text, whole

Kind = Literal["maps", "differs", "no counterpart", "ignored", "unknown"]
Given = Mapping[str, Any]
"""All options that stand in the same section, by name, without those that are null; `value` and `option` are the value
and the name of the one that is converted."""
Functions = Mapping[str, Callable[..., Any]]


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


def without(values: Any, others: Sequence[Any], where: str = "") -> Any:
    """The values, and a remark with the names of what has no counterpart."""
    return near(values, f"without counterpart{where}: {', '.join(map(str, others))}") if others else values


def table(section: Mapping[str, Any], functions: Functions, model: type = TrainingConfig) -> dict[str, Rule]:
    """The rules of a data file's section: `options` by name, `lost` and `ignored` from a reason to names.

    An option is the name of ours that it is taken over into, or has: `to`, our option or several; `why` and `kind`, as
    what docs/import.md has it; `cases`, of which the first that holds answers; and then one of

    - nothing else: it is read as our option's type has it, or by the function `read`.
    - by: a function of the value and all given options.
    - words, alike: a word for a word, for [a word, how it differs], or for the reason of `same` or `lost`; `alike` are
      those that are the same here. A word that is not listed has no counterpart (for the reason `unlisted`), or is an
      error where it says what it `must` be.
    - fields: a section inside the option, its names and ours; others have no counterpart.
    - when_on: what a switch becomes that is on; `differs`, how that differs.
    - only, at_most: the values that change nothing here, because of `same`; `otherwise`, why there are no others.

    A case has a condition (`if`, see `holds`; without one it always holds) and what comes of it: `same`, `lost` or
    `differs` with a reason, in which `$name` is the value of an option; `must`, an error; `by`, a function; `gives`,
    the value, or several by our options' names, where `=name` is the value of an option of the section. Without any of
    them the option is read as it would be without cases.

    `lost`: nothing like them here; no remark where the value says that it is not used. `ignored`: they change nothing
    of what is trained here, whatever their value. `unstated` and `assumed` are not read here: they have what the
    trainer takes for an option that the file does not state, see `trainers.Tables`.
    """
    entries = {}
    for option, entry in section.get("options", {}).items():
        entries[option] = {"to": entry} if isinstance(entry, str) else entry
    for reason, names in section.get("lost", {}).items():
        cases = [{"if": "not value used", "same": "not used"}, {"lost": reason}]
        entries |= dict.fromkeys(names.split(), {"why": reason, "kind": "no counterpart", "cases": cases})
    for reason, names in section.get("ignored", {}).items():
        entries |= dict.fromkeys(names.split(), {"why": reason, "kind": "ignored", "cases": [{"same": reason}]})
    return {option: _rule(option, entry, functions, model) for option, entry in entries.items()}


def _rule(option: str, entry: Mapping[str, Any], functions: Functions, model: type) -> Rule:
    """An entry as cases alone."""
    reason, kind = entry.get("why", ""), entry.get("kind", "maps")
    last: list[dict[str, Any]] = [{key: entry[key] for key in ("by", "fields") if key in entry}]
    if "words" in entry or "alike" in entry:
        words = dict.fromkeys(entry.get("alike", "").split()) | entry.get("words", {})
        last = [{**entry, "words": words}]
        reason = reason or _listed(words)
    elif "when_on" in entry:
        answer, differs = entry["when_on"], {key: entry[key] for key in ("differs",) if key in entry}
        last = [{"if": "not value on", "same": "not used"}, {"gives": answer, **differs}]
        reason = reason or ": ".join([f"true → `{str(answer).lower()}`", *differs.values()])
        kind = "differs" if differs else kind
    elif "otherwise" in entry:
        limit, reason, kind = entry.get("only", entry.get("at_most")), reason or entry["otherwise"], "no counterpart"
        holds = f"value {'<=' if 'at_most' in entry else '='} {limit}"
        if isinstance(limit, bool):
            holds = "value on" if limit else "not value on"
        last = [{"if": holds, "same": entry.get("same", "the same here")}, {"lost": entry["otherwise"]}]
    cases = (*entry.get("cases", ()), *last)
    return Rule(option, entry.get("to", ""), reason, kind, cases, entry.get("read", ""), functions, model)


def _listed(words: Mapping[str, Any]) -> str:
    """What docs/import.md says of a choice."""
    same, other = [], []
    for word_, found in words.items():
        if isinstance(found, list):
            values = found[0].items() if isinstance(found[0], dict) else ()
            becomes = ", ".join(f"{path} = {answer}" for path, answer in values) or found[0]
            other.append(f"`{word_}` → `{becomes}` (differs: {found[1]})")
        elif isinstance(found, dict):
            ((kind, reason),) = found.items()
            other.append(f"`{word_}`: no counterpart ({reason})" if kind == "lost" else f"`{word_}`: {reason}")
        else:
            same.append(f"`{word_}`" if found in (None, word_) else f"`{word_}` → `{found}`")
    return "; ".join(filter(None, (", ".join(same), *other)))


@dataclass(frozen=True)
class Rule:
    """A line of a table; `to`, `reason` and `kind` are what docs/import.md shows. The rest is as `table` has it."""

    option: str
    to: str
    reason: str
    kind: Kind
    cases: tuple[Mapping[str, Any], ...]
    read: str
    functions: Functions
    model: type

    def convert(self, value: Any, given: Given) -> Any:
        """The value for our option `to`, several as a dictionary, or an `Answer`. Raises Unreadable."""
        given = {**given, "value": value, "option": self.option}
        case = next(case for case in self.cases if "if" not in case or holds(case["if"], given))
        for outcome, answer in (("same", unchanged), ("lost", lost)):
            if outcome in case:
                return answer(_said(case[outcome], given))
        if "words" in case:
            return self._word(case, given)
        if "must" in case:
            raise Unreadable(case["must"])
        if "by" in case:
            return self.functions[case["by"]](value, given)
        if "fields" in case:
            return self._fields(case["fields"], value)
        found = self._filled(case["gives"], self.to, given) if "gives" in case else self._read(value, self.to)
        return near(found, _said(case["differs"], given)) if "differs" in case else found

    def _read(self, value: Any, to: str) -> Any:
        """A value as our option `to` has it."""
        if self.read:
            return self.functions[self.read](value)
        *sections, name = to.split(".")
        model = self.model
        for section in sections:
            model = get_type_hints(model)[section]
        return (READERS.get(name) or READERS[option_of(model, name).kind])(value)

    def _filled(self, gives: Any, to: str, given: Given) -> Any:
        """What a case gives, with the values of other options in their places."""
        if isinstance(gives, dict):
            return {path: self._filled(each, path, given) for path, each in gives.items()}
        if isinstance(gives, list):
            return [self._filled(each, to, given) for each in gives]
        if isinstance(gives, str) and gives.startswith("="):
            return ask(given, gives[1:], lambda value: self._read(value, to))
        return gives

    def _word(self, case: Mapping[str, Any], given: Given) -> Any:
        name = text(given["value"]).strip()
        if name.lower() not in case["words"]:
            if "must" in case:
                raise Unreadable(case["must"])
            return lost(_said(case.get("unlisted", ""), given) or f"there is no {name!r} here")
        found = case["words"][name.lower()]
        if isinstance(found, list):
            return near(*found)
        if isinstance(found, dict):
            return lost(found["lost"]) if "lost" in found else unchanged(found["same"])
        return name.lower() if found is None else found

    def _fields(self, names: Mapping[str, str], value: Any) -> Any:
        if not isinstance(value, dict):
            raise Unreadable("a section with options")
        values = {names[key]: self._read(item, names[key]) for key, item in value.items() if key in names}
        return without(values, [key for key in value if key not in names])


COMPARE = {"=": operator.eq, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


def holds(condition: str | Sequence[str], given: Given) -> bool:
    """Whether a condition holds: any of a list, or all tests of a text, with `and` between and perhaps `not` before.

    Tests: `name on` (a switch), `name stated`, `name used` (stated, and neither false, 0, none nor empty),
    `name is word word …` (one of the words), and `name < number`, or another comparison.
    """
    if not isinstance(condition, str):
        return any(holds(each, given) for each in condition)
    return all(_test(part.split(), given) for part in condition.split(" and "))


def _test(words: list[str], given: Given) -> bool:
    if words[0] == "not":
        return not _test(words[1:], given)
    name, test, *rest = words
    value = given.get(name)
    if test == "on":
        return is_on(given, name)
    if test == "used":
        return not is_off(value)
    if test == "stated" or value is None:
        return value is not None
    if test == "is":
        return (
            ask(given, name, str if isinstance(value, bool) and {"true", "false"} & {*rest} else text).strip().lower()
            in rest
        )
    return COMPARE[test](ask(given, name, number), float(rest[0]))


def _said(reason: str, given: Given) -> str:
    """A reason with the values of options in the places of their names."""

    def plainly(found: re.Match[str]) -> str:
        value = given[found[1]]
        return f"{value:g}" if isinstance(value, float) else str(value).lower()

    return re.sub(r"\$(\w+)", plainly, reason)


def numbers(value: Any) -> Any:
    """A number, or a list of them."""
    return [number(item) for item in value] if isinstance(value, list) else number(value)


def flow_shift(value: Any) -> Any:
    """A factor above 0, to six places; 1 is none."""
    return "none" if number(value) == 1 else round(number(value), 6)


READERS: dict[Any, Callable[[Any], Any]] = {
    "flow_shift": flow_shift,
    int: whole,
    float: number,
    bool: switch,
    str: text,
    object: numbers,
}
"""How a foreign value is read: by our option's name, or its type."""


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
        rules: Mapping[str, Rule],
        options: Given,
        *,
        prefix: str = "",
        context: Mapping[str, Any] | None = None,
        spelled: Mapping[str, str] | None = None,
        unstated: Given | None = None,
    ) -> None:
        """Apply a table to one section; null options are left out, for every tool reads them as not set.

        Args:
            prefix: stands before the option's name in lines and errors (`train.`).
            context: further options that a rule may look at, and what they are where the file states none.
            spelled: how the file spells an option, where that differs.
            unstated: the trainer's own values of options, which hold where the file states none and no other option
                has set the same.
        Raises:
            ConfigError: a value that the foreign tool could not use either, or two options that contradict each other.
        """
        stated = {key: value for key, value in options.items() if value is not None}
        own = {key: value for key, value in (unstated or {}).items() if key not in stated}
        given = {**(context or {}), **own, **stated}
        names = {option: prefix + (spelled or {}).get(option, option) for option in (*options, *own)}
        for option, value in options.items():
            if value is None:
                self.lines.append(Line(names[option], "null", "ignored", {}, "not set"))
            elif option not in rules:
                reason = "not an option that this import knows"
                self.lines.append(Line(names[option], shown(value), "unknown", {}, reason))
            else:
                self.apply(rules[option], value, given, names)
        for option, value in own.items():
            self.apply(rules[option], value, given, names, over=False)

    def apply(self, rule: Rule, value: Any, given: Given, names: Mapping[str, str], over: bool = True) -> None:
        """One rule's answer; `names`: of the options, for lines and errors; `over`: see `record`."""
        try:
            answer = rule.convert(value, given)
        except Unreadable as error:
            culprit, found = (error.option, given[error.option]) if error.option in given else (rule.option, value)
            reason = f"'{self.file}': the option {names.get(culprit, culprit)} is {shown(found)}; it must be {error}."
            raise ConfigError(reason) from error
        self.record(names[rule.option], shown(value) + ("" if over else " (not stated)"), answer, rule.to, over)

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
