"""An imported job as a commented job.toml. https://toml.io/en/v1.0.0"""

from __future__ import annotations

import json
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..files import write_atomic
from .apply import Imported, Line

WIDTH = 118
BARE = re.compile(r"[A-Za-z0-9_-]+")


def write_job(imported: Imported, path: Path | str) -> Path:
    """Write the job file, atomically. Raises ConfigError when there is a file of that name, or it cannot be written."""
    path = Path(path)
    if path.exists():
        raise ConfigError(
            f"'{path}' exists already and is not overwritten. Choose another name with --output, or remove it."
        )
    try:
        write_atomic(path, job_toml(imported))
    except OSError as error:
        raise ConfigError(f"'{path}' cannot be written: {error.strerror or error}.") from error
    return path


def job_toml(imported: Imported) -> str:
    """The text of the job file: where it comes from, the remarks, then the options."""
    head = [
        f"A ChromaKit job, imported from {imported.tool}: {', '.join(imported.sources)}.",
        "Options that stand neither here nor there have ChromaKit's defaults; docs/import.md says where these differ.",
    ]
    groups = [
        ("To do first:", [f"- {line}" for line in imported.todo]),
        ("Different from the original:", [f"- {describe(line)}" for line in imported.of("differs")]),
        ("Without counterpart:", [f"- {describe(line)}" for line in imported.of("no counterpart")]),
        ("Not known, and so left out:", [f"- {describe(line)}" for line in imported.of("unknown")]),
    ]
    for title, items in groups:
        head += ["", title, *items] if items else []
    comments = "\n".join(line for text in head for line in comment(text))
    return f"{comments}\n\n{toml(imported.values)}"


def describe(line: Line) -> str:
    """One remark: the option, its value, what was written instead, why."""
    written = ", ".join(f"{path} = {toml_value(value)}" for path, value in line.values.items())
    return f"{line.option} = {line.value}" + (f" → {written}" if written else "") + f": {line.reason}"


def comment(text: str) -> list[str]:
    """A text as comment lines. Nothing in it can end the comment: what is no printable character is escaped."""
    safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return [f"# {line}" for line in textwrap.wrap(safe, WIDTH - 2, subsequent_indent="  ", break_on_hyphens=False)] or [
        "#"
    ]


def toml(values: Mapping[str, Any]) -> str:
    """A dictionary of texts, numbers, truth values, lists and dictionaries as TOML; None is left out."""
    return "\n\n".join(_tables(values, "")).strip() + "\n"


def _tables(values: Mapping[str, Any], path: str) -> list[str]:
    lines, tables = [], []
    for key, value in values.items():
        name = f"{path}.{toml_key(key)}" if path else toml_key(key)
        if isinstance(value, Mapping):
            tables.append((f"[{name}]", value, name))
        elif isinstance(value, Sequence) and not isinstance(value, str) and value and isinstance(value[0], Mapping):
            tables += [(f"[[{name}]]", item, name) for item in value]
        elif value is not None:
            lines.append(f"{toml_key(key)} = {toml_value(value)}")
    texts = ["\n".join(lines)] if lines else []
    for title, table, name in tables:
        first, *others = _tables(table, name) or [""]
        own = any(not isinstance(v, Mapping) for v in table.values()) or not table
        texts += [f"{title}\n{first}".rstrip(), *others] if own else [title, first, *others]
    return texts


def toml_key(key: str) -> str:
    """A key, quoted where it must be."""
    return key if BARE.fullmatch(key) else _quoted(key)


def toml_value(value: Any) -> str:
    """A text, number, truth value or list of them."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        if not math.isfinite(value):
            return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
        return str(int(value)) + ".0" if value.is_integer() and abs(value) < 1e15 else repr(value)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, Sequence):
        return f"[{', '.join(map(toml_value, value))}]"
    raise TypeError(f"{type(value).__name__} has no form in TOML")


def _quoted(text: str) -> str:
    """A basic string: JSON's escapes are TOML's, except that DEL must be escaped and half a surrogate cannot be."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"The text {ascii(text)} holds half a character (a lone surrogate). Correct it.") from error
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007F")
