"""A training job as a program sends it: the options of a job file, in which folders, model files and LoRAs are named as
ComfyUI's lists name them, or as a job's status tells them. No other file can be named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, get_args

from ...chroma_core.errors import ConfigError, JobError, LoraError, check_text, shortened
from ...chroma_core.loading.hub import is_here
from ...chroma_core.loading.model_files import ModelPart, in_checkpoint
from ...chroma_core.loading.spec import ModelSpec
from ...chroma_core.model.flavours import flavour
from ...chroma_core.training.config import MODEL_PATHS, TrainingConfig
from .. import host, loaders, training
from ..dataset_preview import look
from .common import Malformed, lora_name


def job_from(body: Any) -> TrainingConfig:
    """The job that a body describes, with the checks of the nodes: its files and datasets are looked at. The body
    is then of no more use.

    Raises ConfigError, DataError, ModelFileError and PromptError as the nodes do, for a path too, and JobError for a
    published model that is not on this machine: that is fetched where one sees it come and can cancel.
    """
    if not isinstance(body, dict):
        raise Malformed("The request's body must be a JSON object: a job with its name, dataset and other options.")
    check_text(body, "This job cannot be used: ")
    found: set[str] = set()
    for table, key, real in _places(body):
        if isinstance(table, dict) and isinstance(table.get(key), str):
            table[key] = str(real(table[key]))
            found.add(table[key])
    config = TrainingConfig.parse(body)
    assert set().union(*paths_in(config).values()) <= found, "a path that nobody looked at"
    _check_here(config.model)
    config = training.checked(config.model_copy(update={"model": loaders.checked(config.model)[0]}))
    for dataset in datasets_of(config):
        look(dataset, config.resolution)
    return config


def paths_in(config: TrainingConfig) -> dict[str, set[str]]:
    """The files and folders that a job names, by what they are for."""
    found = {f"model.{name}": {getattr(config.model, name)} for name in MODEL_PATHS}
    found |= {"lora.start_from": {config.lora.start_from}, "dataset folders": {d.folder for d in datasets_of(config)}}
    return {field: {str(path) for path in paths if path} for field, paths in found.items()}


def datasets_of(config: TrainingConfig) -> list[Any]:
    """All sets of a job, that for validation last."""
    held_out = [config.validation_dataset] if config.validation_dataset else []
    return [config.dataset, *config.more_datasets, *held_out]


def _places(body: dict[str, Any]) -> Iterator[tuple[Any, str, Callable[[str], Any]]]:
    """Every place of a body that names a file or folder: (table, key, what finds it)."""
    more = body.get("more_datasets")
    for section in (body.get("dataset"), body.get("validation_dataset"), *(more if isinstance(more, list) else ())):
        yield section, "folder", _dataset
    finders: dict[str, Callable[[str], Any]] = {
        "folder": lambda name: host.model_folder(_name(name, host.model_folders(), host.model_folder)),
        **{part: _part_finder(part) for part in loaders.PARTS},
        "tokenizer": lambda name: _own("tokenizer", name, host.t5_tokenizer()),
        "quantised_folder": lambda name: _own("quantised_folder", name, host.quantised_folder()),
        "revision": lambda name: _own("revision", name, None),
    }
    for key, real in finders.items():
        yield body.get("model"), key, real
    yield body.get("lora"), "start_from", _lora


def _part_finder(part: Any) -> Callable[[str], str]:
    def find(name: str) -> str:
        return host.model_file(part, _name(name, host.model_file_names(part), lambda each: host.model_file(part, each)))

    return find


def _dataset(name: str) -> Any:
    return host.dataset_folder(_name(name, host.dataset_names(), host.dataset_folder))


def _lora(name: str) -> Any:
    try:
        return host.lora_path(lora_name(_name(name, host.lora_names(), host.lora_path)))
    except LoraError as error:
        raise ConfigError(f"lora.start_from: {error}{'' if str(error).endswith('?') else '.'}") from error


def _name(given: str, names: Iterable[str], path_of: Callable[[str], Any]) -> str:
    """The name in a list that is meant: also by the place that a job's status tells of it."""
    return next((name for name in names if given != name and host.told(str(path_of(name))) == given), given)


def _own(field: str, given: str, ours: Any) -> str:
    """What ComfyUI finds itself. Raises ConfigError for anything else."""
    if ours is None or given not in (str(ours), host.told(str(ours))):
        raise ConfigError(
            f"model.{field} is {shortened(repr(given))}, but this ComfyUI has its own. Leave it out, or train on the "
            "command line."
        )
    return str(ours)


def _check_here(spec: ModelSpec) -> None:
    """Raise JobError when a published part would have to be downloaded first."""
    parts: tuple[ModelPart, ...] = get_args(ModelPart)
    own = {part for part in parts if getattr(spec, part) is not None or in_checkpoint(spec, part)}
    own |= {"tokenizer"} if "text_encoder" in own else set()
    needed = [part for part in parts if part not in own]
    if spec.folder is None and needed and not is_here(flavour(spec.flavour), needed):
        raise JobError(
            f"Not all of {', '.join(needed).replace('_', ' ')} of '{spec.flavour}' is on this machine yet. Fetch it "
            f"(python -m chroma_core fetch --flavour {spec.flavour}, or queue Chroma Load Model), then send the job "
            "again. Or name files of your own in its model."
        )
