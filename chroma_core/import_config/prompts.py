"""Previews as other trainers write them: a text with settings behind it (`a fox --w 512 --n ugly`), or an object."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from .read import number, text, whole

FIELDS = {
    "width": whole,
    "height": whole,
    "seed": whole,
    "steps": whole,
    "guidance": number,
    "negative": text,
}
"""The fields of a `PreviewPrompt` besides its prompt, and how a foreign value is read."""

FLAGS = {
    "w": "width",
    "h": "height",
    "d": "seed",
    "seed": "seed",
    "s": "steps",
    "steps": "steps",
    "l": "guidance",
    "cfg": "guidance",
    "n": "negative",
}
"""What ai-toolkit and kohya's sd-scripts read behind a prompt, `--` before each."""


def of_line(line: str) -> tuple[dict[str, Any], list[str]]:
    """A prompt with its settings, and those of them that mean nothing here."""
    prompt, *settings = re.split(r"\s+--(?=\w)", line.strip())
    values: dict[str, Any] = {"prompt": prompt.strip()}
    lost = []
    for setting in settings:
        flag, _, value = setting.partition(" ")
        _put(values, lost, FLAGS.get(flag.lower(), ""), f"--{setting.strip()}", value.strip())
    return values, lost


def of_object(item: Mapping[str, Any], names: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """The same of an object; `names`: its names → fields of ours, or "" for what means nothing. Null is not set."""
    values: dict[str, Any] = {}
    lost = []
    for name, value in item.items():
        if value is not None:
            _put(values, lost, names.get(name, ""), f"{name} = {value}", value)
    return values, lost


def _put(values: dict[str, Any], lost: list[str], field: str, said: str, value: Any) -> None:
    if field == "prompt":
        values[field] = text(value)
    elif not field or field == "seed" and whole(value) < 0:
        lost.append(said)
    else:
        values[field] = FIELDS[field](value)


def plain(entries: Sequence[dict[str, Any]]) -> list[Any]:
    """The previews as a job has them: a text alone where nothing else is said."""
    return [entry["prompt"] if set(entry) == {"prompt"} else entry for entry in entries]
