"""Which options ChromaKit has at run time, asked of the configuration itself: a table never writes an unknown one."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pydantic import BaseModel

from ..data.scan import DatasetConfig
from ..training.config.config import TrainingConfig

SETS = ("datasets", "more_datasets", "extra_datasets")
"""Names under which a configuration may take further data sets beside `dataset`."""


def missing(path: str, value: Any, root: type = TrainingConfig) -> str:
    """Why `path` = `value` cannot be written: the option or its choice does not exist. Empty if it can."""
    kind: Any = root
    for part in path.split("."):
        known = _fields(kind)
        if part not in known:
            return f"this version of ChromaKit has no option {path}"
        kind = known[part]
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    if choices and value not in choices:
        return f"this version of ChromaKit has no {path} = {value!r} (it has {', '.join(map(repr, choices))})"
    return ""


def _fields(kind: Any) -> dict[str, Any]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return {name: field.annotation for name, field in kind.model_fields.items()}
    if dataclasses.is_dataclass(kind):
        return get_type_hints(kind)
    return {}


def set_list() -> str:
    """The option that takes further data sets, or an empty text where a job has a single one."""
    return next((name for name in SETS if name in TrainingConfig.model_fields), "")


def set_missing(path: str, value: Any) -> str:
    """`missing` for an option of a data set."""
    return missing(path, value, DatasetConfig)
