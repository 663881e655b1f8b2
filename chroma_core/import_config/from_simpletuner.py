"""SimpleTuner's config.json and dataloader file, by their tables."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..files import slug
from .apply import Imported, Line, Values, record, resolve, shown, translate
from .fields import set_missing
from .finish import finish, start_folders
from .read import read_config
from .rules import Given, is_off
from .shared import ForeignPath
from .simpletuner import OPTIONS, built_in
from .simpletuner_convert import aliases
from .simpletuner_sets import FOR_ALL_SETS, SET_OPTIONS, STORES


def is_option(name: str) -> bool:
    """Whether SimpleTuner has an option of that name, dashes or not."""
    return aliases(name) in OPTIONS or aliases(name) in FOR_ALL_SETS


def _named(file: Path, content: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The options without dashes and under one name each, and how the file spells them."""
    options: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    for key, value in content.items():
        name = aliases(key)
        if name in options and value is not None and options[name] is not None and options[name] != value:
            raise ConfigError(
                f"'{file.name}': {spelled[name]} and {key} are the same option with two values, "
                f"{shown(options[name])} and "
                f"{shown(value)}. Remove one of the two."
            )
        if options.get(name) is None:
            options[name], spelled[name] = value, key
    return options, spelled


def from_simpletuner(file: Path, content: Mapping[str, Any], dataloader: Path | None) -> Imported:
    """The job that a config.json describes. Raises ConfigError."""
    options, spelled = _named(file, content)
    family = options.get("model_family")
    if family != "chroma":
        found = f"is for the model family {family!r}" if family else "does not say its model_family"
        raise ConfigError(
            f"'{file.name}' {found}. ChromaKit trains Chroma alone: import a config with model_family chroma."
        )
    if options.get("model_type", "lora") != "lora":
        raise ConfigError(
            f"'{file.name}' has model_type {shown(options['model_type'])}. Only LoRA jobs are imported: set it to lora."
        )
    values = Values(file.name)
    given = {name: value for name, value in options.items() if value is not None}
    lines = translate(
        OPTIONS,
        {name: value for name, value in options.items() if name not in FOR_ALL_SETS},
        values,
        file=file.name,
        context=given,
        spelled=spelled,
    )
    lines += [record(name, "built in", outcome, values) for name, outcome in built_in(given)]
    folders = start_folders(file)
    todo: list[str] = []
    place = _dataloader(file, given, dataloader, folders, todo)
    backends = [] if place is None else _backends(place)
    used = _used(place, backends, lines) or [("", "image", {})]
    shared = {name: options[name] for name in FOR_ALL_SETS if name in options}
    sets = []
    for name, kind, backend in used:
        part = Values(file.name if place is None else place.name)
        lines += translate(
            SET_OPTIONS,
            shared | {key: value for key, value in backend.items() if value is not None},
            part,
            file=part.file,
            prefix=f"{name}: " if name else "",
            known=set_missing,
            spelled=spelled,
        )
        sets.append((kind, part))
    if "name" not in values.found:
        values.put("name", slug(file.resolve().parent.name or "imported"), "the file's folder")
    sources = (file.name,) if place is None else (file.name, place.name)
    return finish("SimpleTuner", sources, values, sets, lines, folders, todo)


def _used(
    place: Path | None, backends: list[dict[str, Any]], lines: list[Line]
) -> list[tuple[str, str, dict[str, Any]]]:
    """The data sets that become ours, as name, kind and options; a line for each of the others."""
    used = []
    for i, backend in enumerate(backends):
        name, kind = str(backend.get("id", i)), str(backend.get("dataset_type", "image"))
        if kind in STORES:
            lines.append(Line(name, kind, "ignored", {}, "only says where a cache lies"))
        elif not is_off(backend.get("disabled", backend.get("disable"))):
            lines.append(Line(name, "disabled", "ignored", {}, "a disabled set is left out"))
        elif kind not in ("image", "eval"):
            lines.append(Line(name, kind, "no counterpart", {}, "only pictures are trained"))
        elif backend.get("instance_data_dir") is None:
            reason = "only folders of this computer are read, and instance_data_dir names none"
            lines.append(Line(name, str(backend.get("type", "local")), "no counterpart", {}, reason))
        else:
            used.append((name, kind, backend))
    return used


def _dataloader(file: Path, given: Given, named: Path | None, folders: list[Path], todo: list[str]) -> Path | None:
    """The data set file: as named on the command line, else where `data_backend_config` leads."""
    if named is not None:
        return named
    foreign = given.get("data_backend_config")
    if not isinstance(foreign, str):
        return None
    place = Path(resolve(ForeignPath(foreign), folders))
    if place.is_file():
        return place
    todo.append(
        f"'{file.name}' takes its data sets from '{foreign}', which is not here: import again with --dataloader."
    )
    return None


def _backends(place: Path) -> list[dict[str, Any]]:
    content = read_config(place)
    if not isinstance(content, list) or not all(isinstance(item, dict) for item in content):
        raise ConfigError(
            f"'{place.name}' is no dataloader file: it must be a list of data sets, each with its options."
        )
    return [{str(key).lstrip("-"): value for key, value in item.items()} for item in content]
