"""Put the translated options together into one job: data sets in their places, paths found, the whole validated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .apply import Imported, Line, Values, nested, resolve, validate
from .fields import set_list

PLACEHOLDER = "pictures"
"""The data set's folder where the foreign file names none."""


def start_folders(file: Path) -> list[Path]:
    """Where a foreign path may start: the present folder, then the file's own and those above it."""
    return [Path.cwd(), *file.resolve().parents[:3]]


def finish(
    tool: str,
    sources: tuple[str, ...],
    values: Values,
    sets: list[tuple[str, Values]],
    lines: list[Line],
    folders: list[Path],
    todo: list[str],
) -> Imported:
    """The finished import.

    Args:
        sets: `image` or `eval`, with the options of a data set.
        folders: where paths of the foreign file may start.
    """
    tree = nested({path: resolve(value, folders) for path, value in values.found.items()})
    tree["name"] = str(tree["name"]).strip()[:80] or "imported"
    training = _merged([_resolved(part, folders) for kind, part in sets if kind == "image"]) or [{}]
    held_out = [_resolved(part, folders) for kind, part in sets if kind == "eval"]
    further = set_list()
    tree["dataset"] = training[0]
    if held_out:
        tree["validation_dataset"] = held_out[0]
    if training[1:] and further:
        tree[further] = training[1:]
    for part in (training[1:] if not further else []) + held_out[1:]:
        reason = "a job has one training and one held-out data set: put the pictures into sub-folders of one folder"
        lines.append(Line(str(part.get("folder", "?")), "a further data set", "no counterpart", {}, reason))
    if "folder" not in tree["dataset"]:
        tree["dataset"] = {"folder": PLACEHOLDER, **tree["dataset"]}
        todo.append(f"No data set is named: put the folder of your pictures in place of '{PLACEHOLDER}' in [dataset].")
    for part in (*training, *held_out[:1]):
        if "folder" in part and not Path(part["folder"]).is_dir():
            todo.append(f"The folder '{part['folder']}' is not on this computer: correct it in the job file.")
    origin = dict(values.origin)
    for kind, part in sets:
        place = "dataset" if kind == "image" else "validation_dataset"
        origin |= {f"{place}.{path}": option for path, option in part.origin.items()}
    config = validate(tree, origin, sources[0])
    return Imported(tool, sources, tree, config, tuple(lines), tuple(todo))


def _resolved(part: Values, folders: list[Path]) -> dict[str, Any]:
    return {key: resolve(value, folders) for key, value in part.found.items()}


def _merged(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One data set for those that differ in nothing but the resolution: the same folder trained at several sizes."""
    merged: list[dict[str, Any]] = []
    for part in parts:
        rest = {key: value for key, value in part.items() if key != "resolutions"}
        twin = next((m for m in merged if {k: v for k, v in m.items() if k != "resolutions"} == rest), None)
        if twin is None or "resolutions" not in twin or "resolutions" not in part:
            merged.append(dict(part))
        else:
            twin["resolutions"] = sorted({*twin["resolutions"], *part["resolutions"]})
    return merged
