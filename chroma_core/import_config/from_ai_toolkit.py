"""ai-toolkit's YAML, by its tables."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..files import slug
from .ai_toolkit import SECTIONS, built_in
from .ai_toolkit_sets import SET_OPTIONS
from .apply import Imported, Line, Values, record, shown, translate
from .fields import set_missing
from .finish import finish, start_folders
from .rules import Outcome, is_off


def from_ai_toolkit(file: Path, content: Mapping[str, Any]) -> Imported:
    """The job that a file with one `sd_trainer` process describes. Raises ConfigError."""
    config = content.get("config", content)
    processes = config.get("process") if isinstance(config, dict) else None
    if not isinstance(processes, list) or not processes or not all(isinstance(p, dict) for p in processes):
        raise ConfigError(f"'{file.name}' has no list `config.process`, where ai-toolkit expects what to do.")
    if len(processes) > 1:
        raise ConfigError(
            f"'{file.name}' has {len(processes)} processes; a job is one. Import a file with one of them."
        )
    process = {str(key): value for key, value in processes[0].items()}
    if process.get("type", "sd_trainer") not in ("sd_trainer", "ui_trainer", "diffusion_trainer"):
        raise ConfigError(
            f"'{file.name}' has a process of type {shown(process['type'])}; only sd_trainer, which trains, can be "
            f"imported."
        )
    sections = {name: _section(file, process, name) for name in SECTIONS if name}
    _check_arch(file, sections["model"])
    if not sections["network"]:
        raise ConfigError(f"'{file.name}' has no `network`: it trains the whole model. Only LoRA jobs are imported.")
    top = {key: value for key, value in process.items() if key not in sections and key != "datasets"}
    context = {
        f"{s}.{key}": value for s, options in sections.items() for key, value in options.items() if value is not None
    }
    values = Values(file.name)
    lines = [
        Line(key, shown(value), "ignored", {}, "the file's frame")
        for key, value in content.items()
        if key in ("job", "meta", "process")
    ]
    lines += [Line(k, shown(v), "unknown", {}, "not an option") for k, v in content.items() if k not in
              ("job", "meta", "process", "config", "name")]  # fmt: skip
    name = config.get("name")
    if isinstance(name, str) and name.strip():
        lines.append(record("config.name", shown(name), Outcome("maps", {"name": name[:80]}), values))
    else:
        values.put("name", slug(file.stem), "the file's name")
    for section, options in {"": top, **sections}.items():
        prefix = f"{section}." if section else ""
        lines += translate(SECTIONS[section], options, values, file=file.name, prefix=prefix, context=context)
    for option, outcome in built_in(context):
        lines.append(record(option, "built in", outcome, values))
    sets = []
    for i, given in enumerate(_datasets(file, process)):
        trigger = {} if process.get("trigger_word") is None else {"trigger_word": process["trigger_word"]}
        part = Values(file.name)
        stated = {key: value for key, value in given.items() if value is not None}
        lines += translate(
            SET_OPTIONS,
            trigger | stated,
            part,
            file=file.name,
            prefix=f"datasets.{i}.",
            known=set_missing,
        )
        sets.append(("image", part))
    return finish("ai-toolkit", (file.name,), values, sets, lines, start_folders(file), [])


def _section(file: Path, process: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = process.get(name) or {}
    if not isinstance(section, dict):
        raise ConfigError(f"'{file.name}': {name} is {shown(section)}; it must be a section with options.")
    return {str(key): value for key, value in section.items()}


def _datasets(file: Path, process: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = process.get("datasets") or []
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise ConfigError(f"'{file.name}': datasets is {shown(found)}; it must be a list of data sets.")
    return [{str(key): value for key, value in item.items()} for item in found]


def _check_arch(file: Path, model: Mapping[str, Any]) -> None:
    arch = model.get("arch")
    other = next((key for key in model if key.startswith("is_") and not is_off(model[key])), None)
    found = str(arch).partition(":")[0] if arch is not None else (other or "").removeprefix("is_")
    if found != "chroma":
        what = f"is for the architecture {found!r}" if found else "does not say its model.arch"
        raise ConfigError(f"'{file.name}' {what}. ChromaKit trains Chroma alone: import a file with arch: \"chroma\".")
