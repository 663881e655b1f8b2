"""Captions: reading, wrapping, shuffled tags, the trigger word, and which caption a sample gets at a step.

A caption goes through, in this order: shuffling of its tags, prefix and suffix, the trigger word. All that training may
draw is known before it starts, because text states are cached: hence shuffles are a small number of fixed variants.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch

from ..sampling.text import TRIGGER, apply_trigger
from .randomness import generator, integer, uniform


def read_captions(path: Path) -> tuple[str, ...]:
    """The captions of a text file, one a non-empty line (UTF-8, byte order mark allowed).

    Raises OSError when the file cannot be read and ValueError when it is not UTF-8.
    """
    lines = path.read_text(encoding="utf-8-sig").splitlines()
    return tuple(line.strip() for line in lines if line.strip())


def caption_from_name(name: str) -> str:
    """`red_car (2).png` → `red car`: underscores are spaces, a closing number is dropped. May be empty (`0001.png`)."""
    stem = name.rsplit("/", 1)[-1].rsplit(".", 1)[0]
    words = " ".join(stem.replace("_", " ").split())
    return re.sub(r"(?:^|[\s-]+)(?:\d+|\(\d+\))$", "", words).strip()


def wrapped(caption: str, prefix: str, suffix: str) -> str:
    """Prefix, caption and suffix with one space between; none before a suffix that begins with punctuation."""
    prefix, caption, suffix = prefix.strip(), caption.strip(), suffix.strip()
    front = " ".join(part for part in (prefix, caption) if part)
    if not suffix or not front:
        return front or suffix
    return front + ("" if suffix[0] in ",.;:!?" else " ") + suffix


def tag_variants(caption: str, shuffles: int, keep: int) -> tuple[str, ...]:
    """The caption as written, followed by up to `shuffles` other orders of its tags (parts between commas).

    The first `keep` tags stay where they are. Orders depend on the caption alone, so that they are the same in every
    run, and are all different: a caption with few tags has fewer.
    """
    tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
    head, tail = tags[:keep], tags[keep:]
    variants = {", ".join(tags): caption}
    if len(tail) > 1:
        for i in range(4 * shuffles):  # a repeated order is drawn again, though not for ever
            if len(variants) > shuffles:
                break
            order = torch.randperm(len(tail), generator=generator(0, f"tags/{caption}", i)).tolist()
            shuffled = ", ".join(head + [tail[j] for j in order])
            variants.setdefault(shuffled, shuffled)
    return tuple(variants.values())


def with_trigger(caption: str, trigger: str) -> str:
    """The caption as it is trained: `[trigger]` replaced, or the trigger word put in front when it is nowhere in it.

    Raises PromptError for `[trigger]` without a trigger word.
    """
    if TRIGGER in caption or not trigger:
        return apply_trigger(caption, trigger)
    if re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption, re.IGNORECASE):
        return caption
    return f"{trigger} {caption}".strip()


def prepared(
    captions: Sequence[str], trigger: str, prefix: str = "", suffix: str = "", shuffles: int = 0, keep: int = 0
) -> tuple[str, ...]:
    """All captions that training may draw for a picture.

    The captions as written come first. Then, caption after caption, its shuffled orders; where the captions have
    unequal numbers of orders, those with fewer are repeated, so that each caption of the file is drawn equally often.

    Raises PromptError as `with_trigger` does.
    """

    def finish(caption: str) -> str:
        return with_trigger(wrapped(caption, prefix, suffix) if prefix or suffix else caption, trigger)

    variants = [tag_variants(caption, shuffles, keep) for caption in captions] if shuffles else [(c,) for c in captions]
    longest = max(map(len, variants), default=0)
    rest = [finish(own[i % len(own)]) for own in variants for i in range(1, longest)]
    return (*map(finish, captions), *rest)


def pick_caption(captions: Sequence[str], dropout: float, random: torch.Generator) -> str:
    """One of the captions, or with probability `dropout` (0..1) the empty one: truly empty, without the trigger.

    Both numbers are always drawn, so that dropout does not change which caption the others get.
    """
    dropped, choice = uniform(random) < dropout, integer(len(captions), random)
    return "" if dropped else captions[choice]
