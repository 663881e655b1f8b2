"""The job that an import comes to: put together from the drafts, checked, written as a job.toml, reported."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tomlkit
from pydantic import ValidationError

from ..data.images import image_extensions
from ..data.views import is_mask
from ..errors import ChromaKitError, ConfigError, counted
from ..files import write_atomic
from ..training.config import TrainingConfig
from .read import Epochs, resolve
from .table import Draft, Kind, Line, shown

WIDTH = 118
NAME_LENGTH = max(getattr(limit, "max_length", 0) for limit in TrainingConfig.model_fields["name"].metadata)
REMARKS: tuple[Kind, ...] = ("differs", "no counterpart", "unknown")
PLACEHOLDER = "pictures"
"""The dataset's folder where the foreign file names none."""


@dataclass(frozen=True)
class Imported:
    """A finished import. `values` is what stands in the job file; `todo` what is left to do before it can run."""

    tool: str
    sources: tuple[str, ...]
    values: dict[str, Any]
    config: TrainingConfig
    lines: tuple[Line, ...]
    todo: tuple[str, ...]

    def of(self, *kinds: Kind) -> list[Line]:
        """The lines of some kinds, in the file's order."""
        return [line for line in self.lines if line.kind in kinds]

    @property
    def remarks(self) -> list[Line]:
        """What the user should know: the run will not be the same in these points."""
        return self.of(*REMARKS)


def finish(
    tool: str, sources: tuple[str, ...], job: Draft, sets: list[tuple[str, Draft]], folders: list[Path], todo: list[str]
) -> Imported:
    """The drafts as one job: datasets in their places, paths found, the whole validated. Raises ConfigError.

    Args:
        sets: `image` or `eval`, with the options of a dataset.
        folders: where paths of the foreign file may start.
    """
    _agreeing(job)
    _count_epochs(job, [_resolved(part, folders) for kind, part in sets if kind == "image"], todo)
    tree = _nested(_resolved(job, folders))
    tree["name"] = str(tree["name"]).strip()[:NAME_LENGTH] or "imported"
    training = _merged([_resolved(part, folders) for kind, part in sets if kind == "image"]) or [{}]
    held_out = [_resolved(part, folders) for kind, part in sets if kind == "eval"]
    tree["dataset"] = training[0]
    if held_out:
        tree["validation_dataset"] = held_out[0]
    if training[1:]:
        tree["more_datasets"] = training[1:]
    for part in held_out[1:]:
        reason = "a job has one training and one held-out dataset: put the images into sub-folders of one folder"
        job.lines.append(Line(str(part.get("folder", "?")), "a further dataset", "no counterpart", {}, reason))
    if "folder" not in tree["dataset"]:
        tree["dataset"] = {"folder": PLACEHOLDER, **tree["dataset"]}
        todo.append(f"No dataset is named: put the folder of your images in place of '{PLACEHOLDER}' in [dataset].")
    for part in (*training, *held_out[:1]):
        if "folder" in part and not Path(part["folder"]).is_dir():
            todo.append(f"The folder '{part['folder']}' is not on this computer: correct it in the job file.")
    origin = dict(job.origin)
    for kind, part in sets:
        place = "dataset" if kind == "image" else "validation_dataset"
        origin |= {f"{place}.{path}": option for path, option in part.origin.items()}
    config = _validated(tree, origin, sources[0])
    return Imported(tool, sources, tree, config, tuple(job.lines), tuple(todo))


def _agreeing(job: Draft) -> None:
    """What an optimizer of ours does not take is changed, and said, so that the job can be made."""
    optimizer, rate = job.values.get("optimizer"), job.values.get("learning_rate")
    schedule = job.values.get("lr_schedule", "constant")
    if optimizer == "prodigy" and not (rate is not None and 0.1 <= rate <= 10):
        # It finds the rate and multiplies it by `learning_rate`, which other optimizers' values are not.
        reason = "Prodigy finds the rate itself and multiplies it by this: 0.1 to 10; 1 is what its authors advise"
        _instead(job, "learning_rate", 1.0, reason)
    if optimizer == "prodigy" and schedule == "restarts":
        _instead(job, "lr_schedule", "cosine", "Prodigy's authors advise against restarts")
    if optimizer == "schedule-free" and schedule != "constant":
        _instead(job, "lr_schedule", "constant", "schedule-free averages in place of a schedule")
    if optimizer == "adafactor" and tuple(job.values.get("betas", (0.9, 0.999))) != (0.9, 0.999):
        _instead(job, "betas", [0.9, 0.999], "Adafactor has no betas here")


def _instead(job: Draft, path: str, value: Any, reason: str) -> None:
    """Another value for one of our options, and a remark in place of the line that set it."""
    origin = job.origin.get(path, path)
    job.values[path], job.origin[path] = value, origin
    before = next((line.value for line in job.lines if set(line.values) == {path}), "not set")
    job.lines[:] = [line for line in job.lines if set(line.values) != {path}]
    job.lines.append(Line(origin, before, "differs", {path: value}, reason))


def _count_epochs(job: Draft, sets: list[dict[str, Any]], todo: list[str]) -> None:
    """Steps in place of epochs, as far as the images are on this computer; without them, what is left to do."""
    asked = {path: value for path, value in job.values.items() if isinstance(value, Epochs)}
    if not asked:
        return
    images = sum(_uses(part) for part in sets)
    batch = int(job.values.get("batch_size", 1)) * int(job.values.get("gradient_accumulation", 1))
    if images:
        reason = f"{counted(images, 'image')} in an epoch, {batch} to a step"
    else:
        reason = "steps are counted here: images × repeats / (batch_size × gradient_accumulation) of them are an epoch"
        names = " and ".join(asked)
        todo.append(f"The images are not here, so epochs could not be counted in steps: set {names}.")
    for path, value in asked.items():
        if images:
            job.values[path] = max(1, round(value * math.ceil(images / max(1, batch))))
        else:
            del job.values[path]
    for i, line in enumerate(job.lines):
        if epochs := {path for path, value in line.values.items() if isinstance(value, Epochs)}:
            values = {path: job.values.get(path) if path in epochs else value for path, value in line.values.items()}
            values = {path: value for path, value in values.items() if value is not None}
            job.lines[i] = replace(line, kind="differs" if images else "no counterpart", values=values, reason=reason)


def _uses(part: Mapping[str, Any]) -> int:
    """How many images an epoch has of a dataset; 0 where its folder is not here."""
    folder = Path(str(part.get("folder", "")))
    if "folder" not in part or not folder.is_dir():
        return 0
    found = [path for path in folder.rglob("*") if path.suffix.lower() in image_extensions() and not is_mask(path)]
    return len(found) * int(part.get("repeats", 1))


def _resolved(draft: Draft, folders: Sequence[Path]) -> dict[str, Any]:
    return {path: resolve(value, folders) for path, value in draft.values.items()}


def start_folders(file: Path) -> list[Path]:
    """Where a foreign path may start: the present folder, then the file's own and those above it."""
    return [Path.cwd(), *file.resolve().parents[:3]]


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """`{"lora.rank": 16}` as `{"lora": {"rank": 16}}`."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *sections, last = path.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return tree


def _merged(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One dataset for those that differ in nothing but the resolution: the same folder trained at several sizes."""
    merged: list[dict[str, Any]] = []
    for part in parts:
        rest = {key: value for key, value in part.items() if key != "resolutions"}
        twin = next((m for m in merged if {k: v for k, v in m.items() if k != "resolutions"} == rest), None)
        if twin is None or "resolutions" not in twin or "resolutions" not in part:
            merged.append(dict(part))
        else:
            twin["resolutions"] = sorted({*twin["resolutions"], *part["resolutions"]})
    return merged


def _validated(values: dict[str, Any], origin: Mapping[str, str], file: str) -> TrainingConfig:
    """Our own checks, with the foreign option's name in the message. Raises ConfigError."""
    try:
        TrainingConfig.model_validate(values)
        return TrainingConfig.parse(values)
    except ValidationError as error:
        problems = []
        for problem in error.errors():
            place = [str(part) for part in problem["loc"]]
            path = next((p for n in range(len(place), 0, -1) if (p := ".".join(place[:n])) in origin), ".".join(place))
            message = problem["msg"].removeprefix("Value error, ")
            problems.append(f"{origin.get(path, path)} (our {path}) is {shown(problem['input'])}: {message}")
        raise ConfigError(f"'{file}' cannot become a job: {'; '.join(problems)}.") from error
    except ChromaKitError as error:
        raise ConfigError(f"'{file}' cannot become a job: {error}") from error


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
    titles = ("Different from the original:", "Without counterpart:", "Not known, and so left out:")
    for title, items in {"To do first:": imported.todo, **_remarks(imported, titles)}.items():
        head += ["", title, *(f"- {item}" for item in items)] if items else []
    comments = "\n".join(line for text in head for line in _comment(text))
    return f"{comments}\n\n{toml(imported.values)}"


def as_text(imported: Imported, path: Path) -> str:
    """What maps, what differs, what has no counterpart, what is unknown, what to do before training."""
    maps = [f"{line.option} = {line.value} → {_written(line)}" for line in imported.of("maps")]
    remarks = _remarks(imported, ("different", "without counterpart", "not known, left out"))
    groups = {"taken over": maps, **remarks, "to do before training": imported.todo}
    parts = [
        "\n".join([f"{title}:", *(f"  {_printable(item)}" for item in items)])
        for title, items in groups.items()
        if items
    ]
    left = len(imported.of("ignored"))
    counts = f"{len(maps)} taken over, {counted(len(imported.remarks), 'warning')}, {left} that change nothing here"
    return "\n\n".join([*parts, f"{path}: imported from {imported.tool} ({counts})"])


def _remarks(imported: Imported, titles: Sequence[str]) -> dict[str, list[str]]:
    """What differs, has no counterpart and is not known, under a title each."""
    return {title: [describe(line) for line in imported.of(kind)] for title, kind in zip(titles, REMARKS, strict=True)}


def as_json(imported: Imported, path: Path) -> dict[str, Any]:
    """The same as plain values; every option of the foreign file is in one of the lists."""

    def lines(kind: Kind) -> list[dict[str, Any]]:
        return [
            {"option": line.option, "value": line.value, "written": dict(line.values), "reason": line.reason}
            for line in imported.of(kind)
        ]

    return {
        "tool": imported.tool,
        "sources": list(imported.sources),
        "job": str(path),
        "mapped": lines("maps"),
        "differs": lines("differs"),
        "no_counterpart": lines("no counterpart"),
        "unknown": lines("unknown"),
        "ignored": lines("ignored"),
        "todo": list(imported.todo),
    }


def describe(line: Line) -> str:
    """One remark: the option, its value, what was written instead, why."""
    return f"{line.option} = {line.value}" + (f" → {_written(line)}" if line.values else "") + f": {line.reason}"


def _written(line: Line) -> str:
    return ", ".join(f"{path} = {_on_a_line(value)}" for path, value in line.values.items())


def _on_a_line(value: Any) -> str:
    if not isinstance(value, Mapping):
        return tomlkit.item(_writable(value)).as_string()
    table = tomlkit.inline_table()
    table.update(_writable(value))
    return table.as_string()


def _comment(text: str) -> list[str]:
    """A text as comment lines; nothing in it can end the comment."""
    lines = textwrap.wrap(_printable(text), WIDTH - 2, subsequent_indent="  ", break_on_hyphens=False)
    return [f"# {line}" for line in lines] or ["#"]


def _printable(text: str) -> str:
    """No control characters of a foreign file reach the terminal or the job file's comments."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def toml(values: Mapping[str, Any]) -> str:
    """A dictionary of texts, numbers, truth values, lists and dictionaries as TOML; None is left out."""
    return tomlkit.dumps(_writable(values))


def _writable(value: Any) -> Any:
    """What TOML has a form for: without None, and without half a character."""
    if isinstance(value, Mapping):
        return {key: _writable(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_writable(item) for item in value]
    if isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value):
        raise ConfigError(f"The text {ascii(value)} holds half a character (a lone surrogate). Correct it.")
    return value
