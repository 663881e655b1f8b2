"""Captions: reading, wrapping, shuffled tags, the trigger word, and which caption a sample gets at a step.

A caption goes through, in this order: shuffling of its tags, prefix and suffix, the trigger word. All that training may
draw is known before it starts, because text states are cached: hence shuffles are a small number of fixed variants.

Captions stand in text files beside the images, or in `metadata.jsonl` or `metadata.csv`, as Hugging Face's imagefolder
datasets have them (https://huggingface.co/docs/datasets/image_dataset): a column `file_name`, relative to the metadata
file, and a column with the caption. A dataset may have one such file in every sub-folder.
"""

from __future__ import annotations

import csv
import io
import json
import posixpath
import re
import stat
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import DataError, counted, printable
from ..sampling.text import TRIGGER, apply_trigger
from .dataset import CaptionLines
from .order import generator, integer, uniform


def read_captions(path: Path, lines: CaptionLines = "each") -> tuple[str, ...]:
    """The captions of a text file, one a non-empty line (UTF-8, byte order mark allowed).

    lines: `joined` makes one caption of them all, with a space between, which T5 reads as it reads a line's end;
    `first` takes the first.
    Of a `.json` file: a text, a list of texts, or an object that has one of these as `caption`, `captions`, `text` or
    `prompt`.
    Raises OSError when the file cannot be read, UnicodeDecodeError when it is not UTF-8, and ValueError, which says
    what it is, for JSON that is damaged or has no caption, and for what is no file: reading a pipe might never end.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("no file but a folder, pipe, socket or device")
    text = path.read_bytes().decode("utf-8-sig")
    if path.suffix.lower() == ".json":
        try:
            return _in_json(json.loads(text))
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"damaged JSON ({error})") from error
    found = re.split(r"\r\n|\r|\n", text)  # other marks, as U+2028 or a form feed, belong to a text
    captions = tuple(line.strip() for line in found if line.strip())
    if lines == "joined" and captions:
        return (" ".join(captions),)
    return captions[:1] if lines == "first" else captions


def _in_json(value: Any) -> tuple[str, ...]:
    if isinstance(value, dict):
        value = next((value[key] for key in ("caption", "captions", "text", "prompt") if key in value), None)
    texts = _texts(value)
    if not texts:
        raise ValueError("JSON without a caption")
    return texts


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
    return caption if contains_trigger(caption, trigger) else f"{trigger} {caption}".strip()


def contains_trigger(caption: str, trigger: str) -> bool:
    """Whether the trigger word stands in a caption, as a word of its own or as `[trigger]`."""
    return TRIGGER in caption or re.search(_as_a_word(trigger), caption, re.IGNORECASE) is not None


def without_trigger(caption: str, triggers: Sequence[str], word: str = "") -> str:
    """The caption with `word` wherever one of the trigger words stands; one without them as it is."""
    pattern = "|".join(map(_as_a_word, sorted(triggers, key=len, reverse=True)))
    if not pattern or not re.search(pattern, caption, re.IGNORECASE):
        return caption
    return " ".join(re.sub(pattern, lambda _: word, caption, flags=re.IGNORECASE).split())


def _as_a_word(trigger: str) -> str:
    """The pattern of a trigger word that is no part of a longer word."""
    return rf"(?<!\w){re.escape(trigger)}(?!\w)"


def prepared(
    captions: Sequence[str], trigger: str, prefix: str = "", suffix: str = "", shuffles: int = 0, keep: int = 0
) -> tuple[str, ...]:
    """All captions that training may draw for an image.

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


NAMES = ("metadata.jsonl", "metadata.csv")


def read_metadata(folder: Path, images: set[str], column: str) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """What all metadata files of a dataset say: captions by the image's name in it, and warnings about rows.

    The first row of an image counts. Rows that cannot be used are counted in the warnings, each kind with an example.

    Args:
        images: the names of all images, relative to `folder`, with forward slashes.
        column: the column or key of the caption; in JSON a string or a list of strings.
    Raises:
        DataError: there is no metadata file, it is not UTF-8 text, or no row has the caption's column.
    """
    files = sorted(path for name in NAMES for path in folder.rglob(name) if path.is_file())
    if not files:
        raise DataError(
            f"The dataset folder '{folder.name}' has no {' or '.join(NAMES)}, but captions are to come from there. "
            "Add one with the columns file_name and text, or choose another caption source."
        )
    captions: dict[str, tuple[str, ...]] = {}
    unusable: defaultdict[str, list[str]] = defaultdict(list)
    rows, with_column = 0, 0
    for path in files:
        where = printable(path.relative_to(folder).as_posix())
        for number, row in _rows(path, where):
            place = f"{where} line {number}"
            if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
                unusable["without a readable file_name"].append(place)
                continue
            rows += 1
            with_column += column in row
            # Relative to the dataset; what leads out of it begins with a slash or two dots, as no image's name does.
            name = posixpath.normpath(posixpath.join(posixpath.dirname(where), row["file_name"].replace("\\", "/")))
            if name not in images:
                unusable["for an image that is not there"].append(printable(f"{row['file_name']} in {place}"))
            elif name in captions:
                unusable["for an image that has one already (the first counts)"].append(f"{name} in {place}")
            else:
                captions[name] = _texts(row.get(column))
    if rows and not with_column:
        raise DataError(
            f"No row of the metadata in '{folder.name}' has a column '{column}'. Rename the column of the captions to "
            f"'{column}', or set caption_column to its name."
        )
    return captions, [
        f"Metadata: {counted(len(places), 'row')} {what}, e.g. {places[0]}." for what, places in unusable.items()
    ]


def _rows(path: Path, where: str) -> Iterator[tuple[int, Any]]:
    """(line number, row); None for a line of JSON that is damaged."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"The metadata file '{where}' is not UTF-8 text. Save it as UTF-8.") from error
    except OSError as error:
        raise DataError(f"The metadata file '{where}' cannot be read: {error.strerror or error}.") from error
    if path.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""))
        try:
            for row in reader:
                yield reader.line_num, row
        except csv.Error:
            yield reader.line_num, None
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError):
                yield number, None


def _texts(value: Any) -> tuple[str, ...]:
    texts = value if isinstance(value, list) else [value]
    return tuple(" ".join(text.split()) for text in texts if isinstance(text, str) and text.strip())
