"""Going on with a job under other options: which of them are free, which end exactness, which cannot be changed.

A job is exact: the same options give the same weights. An option is `free` when it does not move the weights (watching,
keeping, where weights rest), `exact` when it does, and `fixed` when the checkpoint does not fit it. What is in neither
table is exact, so that a new option is guarded until someone decides otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...errors import ConfigError, JobError, did_you_mean
from ...loading.spec import PLACEMENT
from .job import TrainingConfig

Class = Literal["free", "exact", "fixed"]

FREE = (
    "name",
    "previews",
    "validate_every",
    "checkpoint_every",
    "checkpoint_minutes",
    "keep_checkpoints",
    "keep_best",
    "keep_loras",
    "stop_when_memorising",
    "tensorboard",
    "lora.save_dtype",
    *(f"model.{name}" for name in PLACEMENT),
)
"""Options, or whole sections of them, that never move the weights."""

FIXED = (
    "lora.kind",
    "lora.rank",
    "lora.alpha",
    "lora.target",
    "lora.rank_pattern",
    "lora.alpha_pattern",
    "lora.lokr_factor",
    "lora.start_from",
    "lora.ema_decay",
    "optimizer",
    "lr_pattern",
    "model.flavour",
    "full",
)
"""Options that decide what a checkpoint holds."""

WHOLE = ("lora.rank_pattern", "lora.alpha_pattern", "lr_pattern")
"""Tables that are replaced as one value: their keys are patterns, not options."""


@dataclass(frozen=True)
class Change:
    """One option that is to be another; `field` is its dotted name."""

    field: str
    old: Any
    new: Any
    kind: Class
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.field} {_short(self.old)} → {_short(self.new)}"


def with_changes(config: TrainingConfig, changes: Mapping[str, Any]) -> TrainingConfig:
    """`config` with some options replaced: nested as in JSON, or by dotted names (`{"previews.every": 50}`).

    Raises ConfigError for an unknown option or a value that cannot work.
    """
    values = config.model_dump(mode="json")
    for name, value in changes.items():
        _put(values, str(name).split("."), value, str(name))
    return TrainingConfig.parse(values)


def differences(old: TrainingConfig, new: TrainingConfig, step: int = 0) -> list[Change]:
    """What differs, in the order of the options, each with its class for a job that has made `step` steps."""
    before, after = (_flat(config.model_dump(mode="json")) for config in (old, new))
    pairs = ((name, before.get(name), after.get(name)) for name in {**before, **after})
    return [Change(name, was, will, *_class(name, will, new, old, step)) for name, was, will in pairs if was != will]


def check_changes(job_id: str, changes: Sequence[Change], force: bool) -> None:
    """Raises JobError, listing every option as `field old → new`, when the job cannot go on under `changes`."""
    fixed = [change for change in changes if change.kind == "fixed"]
    if fixed:
        raise JobError(
            f"The job '{job_id}' cannot go on with {_listed(fixed)}: its checkpoints do not fit that. Start a new job "
            "with these options; `start_from` in its [lora] section takes over a finished LoRA of the same shape."
        )
    exact = [change for change in changes if change.kind == "exact"]
    if exact and not force:
        raise JobError(
            f"The job '{job_id}' would no longer be exact with {_listed(exact)}: the steps made so far followed the "
            "old values, so that no uninterrupted run gives the same weights. Force it to go on nevertheless from the "
            "newest checkpoint (--force, or force: true); the change is then recorded in the job and in the LoRA. Or "
            "start a new job."
        )


def entry(step: int, changes: Sequence[Change]) -> dict[str, Any]:
    """One change of a job as JSON: from which step, what, and the note for exact ones that were forced."""
    forced = [change for change in changes if change.kind == "exact"]
    return {
        "step": step,
        "changes": {change.field: [change.old, change.new] for change in changes},
        "warning": f"From step {step} on, by force: {', '.join(map(str, forced))}." if forced else None,
    }


def recorded(job_folder: Path) -> list[dict[str, Any]]:
    """The changes that a job's folder knows of, oldest first; empty where there is no job."""
    try:
        return json.loads((job_folder / "job.json").read_text(encoding="utf-8")).get("changes") or []
    except (OSError, ValueError, AttributeError):
        return []


def _class(field: str, after: Any, new: TrainingConfig, old: TrainingConfig, step: int) -> tuple[Class, str]:
    if field == "steps":
        if after < step:
            return "fixed", f"{step} steps are made already"
        if old.lr_schedule == new.lr_schedule == "constant":
            return "free", ""
        return "exact", f"the {old.lr_schedule} schedule depends on it"
    if any(field == name or field.startswith(f"{name}.") for name in FREE):
        return "free", ""
    if any(field == name or field.startswith(f"{name}.") for name in FIXED):
        return "fixed", ""
    return "exact", ""


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted names."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and name not in WHOLE:
            found |= _flat(value, f"{name}.")
        else:
            found[name] = value
    return found


def _put(values: dict[str, Any], path: Sequence[str], value: Any, name: str, done: str = "") -> None:
    key, rest = path[0], path[1:]
    here = f"{done}{key}"
    if not rest and not (isinstance(value, Mapping) and isinstance(values.get(key), dict) and here not in WHOLE):
        values[key] = value
        return
    inner = values.get(key)
    if not isinstance(inner, dict):
        raise ConfigError(f"There is no option '{name}' to change.{did_you_mean(key, values)}")
    if rest:
        _put(inner, rest, value, name, f"{here}.")
        return
    for k, v in value.items():
        _put(inner, [str(k)], v, f"{name}.{k}", f"{here}.")


def _listed(changes: Sequence[Change]) -> str:
    return "; ".join(f"{change}" + (f" ({change.reason})" if change.reason else "") for change in changes)


def _short(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "…"
