"""A job file with every option at its default, each explained by its own sentence."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

import tomlkit

from ...data.scan import DatasetConfig
from ...loading.spec import ModelSpec
from ...options import Described, options_of
from .job import FullConfig, LoraConfig, ObjectiveConfig, PreviewConfig, TrainingConfig
from .preserve import PreserveConfig

SECTIONS: dict[str, type] = {
    "": TrainingConfig,
    "model": ModelSpec,
    "dataset": DatasetConfig,
    "lora": LoraConfig,
    "objective": ObjectiveConfig,
    "previews": PreviewConfig,
    "preserve": PreserveConfig,
    "full": FullConfig,
}
"""The tables of a job file and what reads them; the first one is the job itself."""

EXAMPLES = {"name": "my-lora", "dataset.folder": "pictures", "full.target": "double_blocks.0-3"}
"""Values of options that have no default, by their dotted names."""

OPTIONAL = ("full",)
"""Tables that change what a job is by being there: their lines stay comments."""

HEAD = """\
# A training job: python -m chroma_core train job.toml
# Every option stands here with its default. Remove the # before a line to change it.
# [validation_dataset] and [[more_datasets]] take what [dataset] takes.
"""


def job_template(values: Mapping[str, Any] = EXAMPLES) -> str:
    """The text of a job file whose options are comments, but for those that `values` sets, by their dotted names."""
    values = {**EXAMPLES, **values}
    parts = [HEAD]
    for section, owner in SECTIONS.items():
        if section:
            parts.append(f"{'# ' if section in OPTIONAL else ''}[{section}]")
        options = [each for name, each in options_of(owner).items() if section or name not in SECTIONS]
        parts += [_entry(section, each, values) for each in options]
    return "\n".join(parts)


def _entry(section: str, option: Described, values: Mapping[str, Any]) -> str:
    """An option's sentence and range as a comment, and the line that sets it, to what `values` has."""
    path = f"{section}.{option.name}".lstrip(".")
    about = f"{option.sentence} ({option.range})" if option.range else option.sentence
    lines = textwrap.wrap(about, 116, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)
    if path in values:
        lines.append(f"{'# ' if section in OPTIONAL else ''}{option.name} = {as_toml(values[path])}")
    elif option.default is None:
        lines.append(f"# {option.name} = …  (unset)")
    else:
        lines.append(f"# {option.name} = {as_toml(option.default)}")
    return "\n".join(lines) + "\n"


def as_toml(value: Any) -> str:
    """A default as a job file says it."""
    if isinstance(value, dict):
        return tomlkit.inline_table().as_string()  # no option has a table that is not empty for its default
    return tomlkit.item(list(value) if isinstance(value, tuple) else value).as_string()
