"""Captions: reading, the trigger word, and which caption a sample gets at a step."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch

from ..text import TRIGGER, apply_trigger
from .randomness import integer, uniform


def read_captions(path: Path) -> tuple[str, ...]:
    """The captions of a text file, one a non-empty line (UTF-8, byte order mark allowed).

    Raises OSError when the file cannot be read and ValueError when it is not UTF-8.
    """
    lines = path.read_text(encoding="utf-8-sig").splitlines()
    return tuple(line.strip() for line in lines if line.strip())


def with_trigger(caption: str, trigger: str) -> str:
    """The caption as it is trained: `[trigger]` replaced, or the trigger word put in front when it is nowhere in it.

    Raises PromptError for `[trigger]` without a trigger word.
    """
    if TRIGGER in caption or not trigger:
        return apply_trigger(caption, trigger)
    if re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption, re.IGNORECASE):
        return caption
    return f"{trigger} {caption}".strip()


def pick_caption(captions: Sequence[str], dropout: float, random: torch.Generator) -> str:
    """One of the captions, or with probability `dropout` (0..1) the empty one: truly empty, without the trigger.

    Both numbers are always drawn, so that dropout does not change which caption the others get.
    """
    dropped, choice = uniform(random) < dropout, integer(len(captions), random)
    return "" if dropped else captions[choice]
