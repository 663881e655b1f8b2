"""Captions from `metadata.jsonl` or `metadata.csv`, as Hugging Face's imagefolder data sets have them.

https://huggingface.co/docs/datasets/image_dataset: a column `file_name`, relative to the metadata file, and a column
with the caption. A data set may have one such file in every sub-folder.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import DataError

NAMES = ("metadata.jsonl", "metadata.csv")


@dataclass
class Metadata:
    """What the metadata files say: captions by the picture's name in the data set, and remarks on doubtful rows."""

    captions: dict[str, tuple[str, ...]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


def read_metadata(folder: Path, pictures: set[str], column: str) -> Metadata:
    """Read all metadata files of a data set.

    The first row of a picture counts. Rows that cannot be used are counted in the remarks, each kind with an example.

    Args:
        pictures: the names of all pictures, relative to `folder`, with forward slashes.
        column: the column or key of the caption; in JSON a string or a list of strings.
    Raises:
        DataError: there is no metadata file, it is not UTF-8 text, or no row has the caption's column.
    """
    files = sorted(path for name in NAMES for path in folder.rglob(name) if path.is_file())
    if not files:
        raise DataError(
            f"The data set folder '{folder.name}' has no {' or '.join(NAMES)}, but captions are to come from there. "
            "Add one with the columns file_name and text, or choose another caption source."
        )
    found = Metadata()
    doubts: dict[str, list[str]] = {}
    rows, with_column = 0, 0
    for path in files:
        where = path.relative_to(folder).as_posix()
        for number, row in _rows(path, where):
            place = f"{where} line {number}"
            if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
                doubts.setdefault("without a readable file_name", []).append(place)
                continue
            rows += 1
            with_column += column in row
            name = _inside(PurePosixPath(where).parent, row["file_name"])
            if name not in pictures:
                doubts.setdefault("for a picture that is not there", []).append(f"{row['file_name']} in {place}")
            elif name in found.captions:
                doubts.setdefault("for a picture that has one already (the first counts)", []).append(
                    f"{name} in {place}"
                )
            else:
                found.captions[name] = _texts(row.get(column))
    if rows and not with_column:
        raise DataError(
            f"No row of the metadata in '{folder.name}' has a column '{column}'. Rename the column of the captions to "
            f"'{column}', or set caption_column to its name."
        )
    found.remarks = [
        f"Metadata: {len(places)} {'row' if len(places) == 1 else 'rows'} {what}, e.g. {places[0]}."
        for what, places in doubts.items()
    ]
    return found


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


def _inside(folder: PurePosixPath, file_name: str) -> str:
    """The name relative to the data set; something that no picture is called when it leads out of it."""
    parts: list[str] = list(folder.parts)
    for part in file_name.replace("\\", "/").split("/"):
        if part == "..":
            if not parts:
                return ""
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    return "" if file_name.startswith(("/", "\\")) else "/".join(parts)


def _texts(value: Any) -> tuple[str, ...]:
    texts = value if isinstance(value, list) else [value]
    return tuple(" ".join(text.split()) for text in texts if isinstance(text, str) and text.strip())
