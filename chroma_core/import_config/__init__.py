"""Turn the configuration of another trainer into a job file: `import_config` reads it, `write_job` writes it."""

from __future__ import annotations

from pathlib import Path

from ..errors import ConfigError
from . import trainers
from .job import Imported, as_json, as_text, job_toml, write_job
from .read import Unreadable, read_config
from .table import Line, shown

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
    try:
        return _imported(file, None if dataloader is None else Path(dataloader))
    except Unreadable as error:  # a value that is looked at before its table is walked
        what = f"the option {error.option}" if error.option else "one of its values"
        raise ConfigError(f"'{file.name}': {what} cannot be read; it must be {error}.") from error


def _imported(file: Path, beside: Path | None) -> Imported:
    """Recognise the trainer and read its file."""
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
        return trainers.ai_toolkit(file, content, beside)
    options = [trainers.SIMPLETUNER.plain_name(key) for key in content]
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
            return trainers.onetrainer(file, content, beside)
        if KOHYA & set(trainers.flattened(content)):
            return trainers.kohya(file, content, beside)
    known = {*trainers.SIMPLETUNER.sections[""], *trainers.SIMPLETUNER.for_all_sets}
    if not known.intersection(options):
        job = "; a job.toml of ChromaKit needs no import: `python -m chroma_core train job.toml`"
        raise ConfigError(
            f"'{file.name}' is no configuration of another trainer: none of its options is known "
            f"({', '.join(list(content)[:5])}). import-config reads {READS}{job if file.suffix == '.toml' else ''}."
        )
    return trainers.simpletuner(file, content, beside)
