"""Turn the configuration of another trainer into a job file: `import_config` reads it, `write_job` writes it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..files import slug
from . import ai_toolkit, kohya, onetrainer, simpletuner
from .convert import Draft, Line, overridden, shown
from .job import NAME_LENGTH, Imported, as_json, as_text, finish, job_toml, resolve, start_folders, write_job
from .read import ForeignPath, is_off, is_on, read_config

__all__ = ["Imported", "Line", "as_json", "as_text", "import_config", "job_toml", "write_job"]

SIGNS = {
    "class_type": "a ComfyUI prompt or node",
    "nodes": "a ComfyUI workflow",
    "_class_name": "a model's own config.json, as diffusers writes it",
    "architectures": "a model's own config.json, as transformers writes it",
    "LoRA_type": "a preset of the kohya_ss window: import the TOML that it writes beside its output",
    "base_model": "a configuration of axolotl or another language-model trainer",
}
"""An option that gives another kind of file away."""

READS = "SimpleTuner's config.json, ai-toolkit's YAML, OneTrainer's JSON and the TOML of kohya's sd-scripts"
ONETRAINER = {"training_method", "base_model_name", "concept_file_name", "timestep_distribution"}
KOHYA = {"network_module", "network_dim", "network_args", "dataset_config", "output_name", "unet_lr", "t5xxl"}
"""Options that only one trainer has."""


def import_config(file: Path | str, dataloader: Path | str | None = None) -> Imported:
    """Read another trainer's configuration for a Chroma LoRA (see `READS`); writes nothing.

    Args:
        dataloader: the file of the datasets, where the configuration does not lead to it: SimpleTuner's dataset file,
            OneTrainer's concepts, sd-scripts' dataset file.
    Raises:
        ConfigError: the file cannot be read, is for another program or model, or has a value that cannot work.
    """
    file = Path(file)
    content = read_config(file)
    if isinstance(content, list):
        raise ConfigError(
            f"'{file.name}' is a list, as SimpleTuner's dataloader files and OneTrainer's concepts are. Give the "
            "configuration first, and this file with --dataloader."
        )
    if not isinstance(content, dict) or not content:
        raise ConfigError(f"'{file.name}' holds no options: it is {shown(content)}.")
    content = {str(key): value for key, value in content.items()}
    if "config" in content or "process" in content:
        if dataloader is not None:
            raise ConfigError(
                f"'{file.name}' is an ai-toolkit file, which has its datasets inside: leave --dataloader out."
            )
        return _from_ai_toolkit(file, content)
    options = [simpletuner.plain_name(key) for key in content]
    beside = None if dataloader is None else Path(dataloader)
    if "model_family" not in options:
        for sign, what in SIGNS.items():
            if sign in content:
                raise ConfigError(f"'{file.name}' is {what}. import-config reads {READS}.")
        if isinstance(content.get("datasets"), list):
            raise ConfigError(
                f"'{file.name}' is a dataset file of sd-scripts. Give the configuration first, and this file with "
                "--dataloader."
            )
        if isinstance(content.get("dataset"), dict):
            raise ConfigError(
                f"'{file.name}' is a job of ChromaKit, which needs no import: `python -m chroma_core train "
                f"{file.name}`."
            )
        if ONETRAINER & set(content):
            return onetrainer.read(file, content, beside)
        if KOHYA & set(kohya.flattened(content)):
            return kohya.read(file, content, beside)
    if not any(name in simpletuner.OPTIONS or name in simpletuner.FOR_ALL_SETS for name in options):
        job = "; a job.toml of ChromaKit needs no import: `python -m chroma_core train job.toml`"
        raise ConfigError(
            f"'{file.name}' is no configuration of another trainer: none of its options is known "
            f"({', '.join(list(content)[:5])}). import-config reads {READS}{job if file.suffix == '.toml' else ''}."
        )
    return _from_simpletuner(file, content, beside)


def _from_simpletuner(file: Path, content: Mapping[str, Any], dataloader: Path | None) -> Imported:
    options, spelled = _under_one_name(file, content)
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
    for_all_sets = {name: options.pop(name) for name in simpletuner.FOR_ALL_SETS if name in options}
    unstated = dict(simpletuner.UNSTATED)
    given = _stated(options) | _stated(for_all_sets)
    job, folders, todo = Draft(file.name, []), start_folders(file), []
    if given.get("lora_type") == "lycoris":
        _read_lycoris(job, options, given, folders, todo)
        unstated = {key: value for key, value in unstated.items() if key not in simpletuner.NOT_OF_LYCORIS}
    job.walk(simpletuner.OPTIONS, options, context=given, spelled=spelled, unstated=unstated)
    for option, answer in simpletuner.built_in(given).items():
        job.record(option, "built in", answer)
    foreign = given.get("data_backend_config")
    if dataloader is None and isinstance(foreign, str):
        dataloader = Path(resolve(ForeignPath(foreign), folders))
        if not dataloader.is_file():
            dataloader = None
            todo.append(
                f"'{file.name}' takes its datasets from '{foreign}', which is not here: import again with --dataloader."
            )
    sources = (file.name,) if dataloader is None else (file.name, dataloader.name)
    sets = []
    masks: dict[str, str] = {}
    found = _usable(dataloader, job.lines, masks) or [("", "image", {})]
    overridden(job.lines, "", for_all_sets, [backend for _, _, backend in found], spelled)
    for name, kind, backend in found:
        part = Draft(sources[-1], job.lines)
        unstated = dict(simpletuner.UNSTATED_SETS)
        if not name:  # what the set's captions are is not known
            del unstated["caption_strategy"]
        prefix, options = f"{name}: " if name else "", _together(for_all_sets, backend)
        context = {"mask_sets": masks}
        shared = {key: spelled[key] for key in for_all_sets if backend.get(key) is None}
        part.walk(simpletuner.SET_OPTIONS, options, prefix=prefix, context=context, spelled=shared, unstated=unstated)
        part.record(f"{prefix}images", "built in", {"upscale": True, "repeat_folders": False})
        if part.values.get("masks") == "files":
            todo.append(
                f"Copy each mask of the set '{name}' beside its image, as name-masklabel.png, from "
                f"{' and '.join(repr(folder) for folder in masks.values())}."
            )
        sets.append((kind, part))
    if "name" not in job.values:
        job.put("name", slug(file.resolve().parent.name or "imported"), "the file's folder")
    return finish("SimpleTuner", sources, job, sets, folders, todo)


def _read_lycoris(
    job: Draft, options: dict[str, Any], given: dict[str, Any], folders: list[Path], todo: list[str]
) -> None:
    """What `lycoris_config` says, as `lycoris`; SimpleTuner's own rank and alpha then mean nothing."""
    named = given.get("lycoris_config", "config/lycoris_config.json")
    place = Path(resolve(ForeignPath(named), folders)) if isinstance(named, str) else Path()
    if not place.is_file():
        todo.append(f"What is trained is in '{named}', which is not here: set kind, rank and alpha in [lora].")
        return
    given["lycoris"] = read_config(place)
    for name in simpletuner.NOT_OF_LYCORIS:
        if name in options:
            reason = "lycoris_config says it"
            job.lines.append(Line(name, shown(options.pop(name)), "ignored", {}, reason))


def _under_one_name(file: Path, content: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """SimpleTuner's options without dashes and under one name each, and how the file spells them."""
    options: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    for key, value in content.items():
        name = simpletuner.plain_name(key)
        known = options.get(name)
        if known is None:
            options[name], spelled[name] = value, key
        elif value is not None and value != known:
            raise ConfigError(
                f"'{file.name}': {spelled[name]} and {key} are the same option with two values, {shown(known)} and "
                f"{shown(value)}. Remove one of the two."
            )
    return options, spelled


def _usable(place: Path | None, lines: list[Line], masks: dict[str, str]) -> list[tuple[str, str, dict[str, Any]]]:
    """SimpleTuner's datasets that become ours, as name, kind and options; a line for each of the others.

    `masks` is filled with the sets of loss masks and their folders; a set that is the source of one refers to it.
    """
    content = [] if place is None else read_config(place)
    if place is not None and not (isinstance(content, list) and all(isinstance(item, dict) for item in content)):
        raise ConfigError(
            f"'{place.name}' is no dataloader file: it must be a list of datasets, each with its options."
        )
    used: list[tuple[str, str, dict[str, Any]]] = []
    sources: dict[str, str] = {}
    for i, item in enumerate(content):
        backend = {str(key).lstrip("-"): value for key, value in item.items()}
        name, kind = str(backend.get("id", i)), str(backend.get("dataset_type", "image"))
        if kind in simpletuner.STORES:
            lines.append(Line(name, kind, "ignored", {}, "only says where a cache lies"))
        elif not is_off(backend.get("disabled", backend.get("disable"))):
            lines.append(Line(name, "disabled", "ignored", {}, "a disabled set is left out"))
        elif kind == "conditioning" and backend.get("conditioning_type") in simpletuner.MASKS:
            masks[name] = str(backend.get("instance_data_dir"))
            sources[str(backend.get("source_dataset_id"))] = name
            reason = "masks lie beside the images here, as name-masklabel.png; white counts, and the loss is normalised"
            lines.append(Line(name, kind, "differs", {}, reason))
        elif kind not in ("image", "eval"):
            lines.append(Line(name, kind, "no counterpart", {}, "only images are trained"))
        elif backend.get("instance_data_dir") is None:
            reason = "only folders of this computer are read, and instance_data_dir names none"
            lines.append(Line(name, str(backend.get("type", "local")), "no counterpart", {}, reason))
        else:
            used.append((name, kind, backend))
    return [(n, k, {"conditioning_data": sources[n], **b} if n in sources else b) for n, k, b in used]


def _from_ai_toolkit(file: Path, content: Mapping[str, Any]) -> Imported:
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
            "imported."
        )
    sections: dict[str, dict[str, Any]] = {}
    for name in filter(None, ai_toolkit.SECTIONS):
        section = process.get(name) or {}
        if not isinstance(section, dict):
            raise ConfigError(f"'{file.name}': {name} is {shown(section)}; it must be a section with options.")
        sections[name] = {str(key): value for key, value in section.items()}
    model = sections["model"]
    old_switch = next((key for key in model if key.startswith("is_") and not is_off(model[key])), "")
    arch = model.get("arch")
    found = old_switch.removeprefix("is_") if arch is None else str(arch).partition(":")[0]
    if found != "chroma":
        what = f"is for the architecture {found!r}" if found else "does not say its model.arch"
        raise ConfigError(f"'{file.name}' {what}. ChromaKit trains Chroma alone: import a file with arch: \"chroma\".")
    if not sections["network"]:
        raise ConfigError(f"'{file.name}' has no `network`: it trains the whole model. Only LoRA jobs are imported.")
    frame = ("job", "meta", "process")
    lines = [Line(key, shown(content[key]), "ignored", {}, "the file's frame") for key in content if key in frame]
    lines += [
        Line(key, shown(value), "unknown", {}, "not an option")
        for key, value in content.items()
        if key not in (*frame, "config", "name")
    ]
    job = Draft(file.name, lines)
    name = config.get("name")
    if isinstance(name, str) and name.strip():
        job.record("config.name", shown(name), {"name": name[:NAME_LENGTH]})
    else:
        job.put("name", slug(file.stem), "the file's name")
    context = {f"{name}.{key}": value for name, section in sections.items() for key, value in _stated(section).items()}
    datasets = process.get("datasets") or []
    if not isinstance(datasets, list) or not all(isinstance(item, dict) for item in datasets):
        raise ConfigError(f"'{file.name}': datasets is {shown(datasets)}; it must be a list of datasets.")
    context["sizes"] = ai_toolkit.sizes(datasets)
    sections[""] = {key: value for key, value in process.items() if key not in sections and key != "datasets"}
    for name, table in ai_toolkit.SECTIONS.items():
        unstated = ai_toolkit.UNSTATED.get(name)
        job.walk(table, sections[name], prefix=f"{name}." if name else "", context=context, unstated=unstated)
    ai_toolkit.built_in(job, _stated(sections["network"]))
    trigger = _stated({"trigger_word": process.get("trigger_word")})
    sets = []
    for i, item in enumerate(datasets):
        part = Draft(file.name, lines)
        own = {str(key): value for key, value in item.items()}
        # ai-toolkit says the new word of no set of ordinary images.
        options = own if is_on(_stated(own), "is_reg") else _together(trigger, own)
        part.walk(ai_toolkit.SET_OPTIONS, options, prefix=f"datasets.{i}.", unstated=ai_toolkit.UNSTATED["datasets"])
        part.record(f"datasets.{i}: images and captions", "built in", ai_toolkit.BUILT_IN_SET)
        sets.append(("image", part))
    return finish("ai-toolkit", (file.name,), job, sets, start_folders(file), [])


def _together(shared: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """A set's own options and the shared ones that it does not state; its null is not stated."""
    return {**shared, **{key: value for key, value in own.items() if value is not None or key not in shared}}


def _stated(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are not null."""
    return {key: value for key, value in options.items() if value is not None}
