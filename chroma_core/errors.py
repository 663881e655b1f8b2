"""The pack's own exceptions.

Every message is one readable paragraph: what was wrong, what was found, what to do. Nodes, routes and the command
line show it as it stands, without a stack trace.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def first_few(names: Iterable[str], limit: int = 3, quote: str = "") -> str:
    """The first few names for a message, each between two of `quote`, and how many more there are."""
    found = list(names)
    shown = ", ".join(f"{quote}{name}{quote}" for name in found[:limit])
    return f"{shown} and {len(found) - limit} more" if len(found) > limit else shown


def first_line(error: object, limit: int = 200) -> str:
    """The beginning of an error's text, for a message of ours; empty when it says nothing."""
    return next(iter(str(error).strip().splitlines()), "")[:limit]


def shortened(text: str, limit: int = 60) -> str:
    """The beginning of a text that is quoted in a message."""
    return text if len(text) <= limit else f"{text[:limit]}…"


LONGEST_NAME = 200
"""Letters of what could be a name misspelt; looking for anything longer takes long."""


def nearest(name: object, known: Iterable[object]) -> str | None:
    """What a name that is none of `known` may be meant for, whatever its capitals; None where nothing is near."""
    text, choices = str(name).lower(), {str(each).lower(): str(each) for each in known}
    near = difflib.get_close_matches(text, choices, 1, cutoff=0.55) if len(text) <= LONGEST_NAME else []
    return choices[near[0]] if near else None  # steps, sample_steps: .59


def did_you_mean(name: object, known: Iterable[object]) -> str:
    """` Did you mean 'x'?` for the end of a message, with a space before it; empty where nothing is near."""
    near = nearest(name, known)
    return f" Did you mean '{near}'?" if near else ""


def counted(number: int, what: str) -> str:
    """`1 image`, `2 images`."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


class ChromaKitError(Exception):
    """Base of everything that a user can cause or cure."""


class ConfigError(ChromaKitError):
    """An option has a value that cannot work: unknown flavour, size 0, a misspelt target."""


class ModelFileError(ChromaKitError):
    """A model folder, file or download is missing, foreign or damaged."""


class PrecisionError(ChromaKitError):
    """A precision back end is not installed or cannot run on this device."""


class NotFiniteError(ChromaKitError):
    """A model gave NaN or infinite numbers: an image of them would be black."""


class PromptError(ChromaKitError):
    """A prompt cannot be used as it stands, e.g. `[trigger]` without a trigger word."""


class LoraError(ChromaKitError):
    """A LoRA file cannot be read, or does not fit the model."""


class DataError(ChromaKitError):
    """A dataset is missing, empty or unreadable as a whole."""


class JobError(ChromaKitError):
    """A training job is unknown, or cannot do what was asked in its present state."""


class DiskFull(JobError):
    """A training job cannot be written down because the disk is full."""


def printable(text: str) -> str:
    """The text with half characters as escapes: Python makes them of a file name that is no UTF-8; nothing can write
    them."""
    return text.encode(errors="backslashreplace").decode()


def check_text(data: object, beginning: str = "") -> None:
    """Raise ConfigError for a text anywhere in nested values that no file can hold; `beginning` begins the message."""
    if isinstance(data, str):
        if any("\ud800" <= character <= "\udfff" for character in data):
            raise ConfigError(
                f"{beginning}{shortened(data)!r} has half a character (a lone surrogate), which no file can hold. Type "
                "it anew."
            )
    elif isinstance(data, dict):
        for key, value in data.items():
            check_text(key, beginning)
            check_text(value, beginning)
    elif isinstance(data, list | tuple):
        for value in data:
            check_text(value, beginning)


def check_choice(what: str, value: object, known: Iterable[str]) -> None:
    """Raise ConfigError, naming what there is, unless `value` is one of `known`; `what` begins the message."""
    choices = tuple(known)
    if value not in choices:
        meant = did_you_mean(value, choices)
        raise ConfigError(f"{what} is {shortened(repr(value))}; choose one of: {', '.join(choices)}.{meant}")
