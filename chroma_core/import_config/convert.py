"""Recognise a foreign configuration and hand it to its tool's tables."""

from __future__ import annotations

from pathlib import Path

from ..errors import ConfigError
from .apply import Imported, shown
from .from_ai_toolkit import from_ai_toolkit
from .from_simpletuner import from_simpletuner, is_option
from .read import read_config

SIGNS = {
    "class_type": "a ComfyUI prompt or node",
    "nodes": "a ComfyUI workflow",
    "_class_name": "a model's own config.json, as diffusers writes it",
    "architectures": "a model's own config.json, as transformers writes it",
    "network_module": "a configuration of kohya's sd-scripts",
    "training_method": "a configuration of OneTrainer",
    "base_model": "a configuration of axolotl or another language-model trainer",
}
"""An option that gives another kind of file away."""


def import_config(file: Path | str, dataloader: Path | str | None = None) -> Imported:
    """Read a SimpleTuner config.json or an ai-toolkit YAML for a Chroma LoRA; writes nothing.

    Args:
        dataloader: SimpleTuner's data set file, where `data_backend_config` does not lead to it.
    Raises:
        ConfigError: the file cannot be read, is for another program or model, or has a value that cannot work.
    """
    file = Path(file)
    content = read_config(file)
    if isinstance(content, list):
        raise ConfigError(
            f"'{file.name}' is a list, as SimpleTuner's dataloader files are. Give its config.json first, and "
            f"this file "
            "with --dataloader."
        )
    if not isinstance(content, dict) or not content:
        raise ConfigError(f"'{file.name}' holds no options: it is {shown(content)}.")
    content = {str(key): value for key, value in content.items()}
    if "config" in content or "process" in content:
        if dataloader is not None:
            raise ConfigError(
                f"'{file.name}' is an ai-toolkit file, which has its data sets inside: leave --dataloader out."
            )
        return from_ai_toolkit(file, content)
    has_family = any(key.lstrip("-") == "model_family" for key in content)
    for sign, what in SIGNS.items():
        if sign in content and not has_family:
            raise ConfigError(
                f"'{file.name}' is {what}. import-config reads SimpleTuner's config.json and ai-toolkit's YAML."
            )
    if not any(map(is_option, content)):
        raise ConfigError(
            f"'{file.name}' is neither a SimpleTuner config.json nor an ai-toolkit YAML: none of its options is known "
            f"({', '.join(list(content)[:5])})."
        )
    return from_simpletuner(file, content, None if dataloader is None else Path(dataloader))
