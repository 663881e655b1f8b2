"""Checkpoints: folders that appear whole or not at all, with everything that a bit-exact resume needs.

Noise, order and dropout are functions of the step, and so is the learning rate: what is trained, the optimizer's state
and a few numbers are all there is to keep.
"""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
import shutil
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from ...errors import JobError, LoraError, ModelFileError, first_line
from ...files import atomic_folder, check_format, remove, remove_leftovers, replace, sha256_file, write_json
from ...model.device import is_out_of_memory
from ..step.ema import Ema
from .metrics import Progress
from .stepper import Stepper
from .trained import Trained

_DAMAGE = (
    OSError, ValueError, RuntimeError, EOFError, AttributeError, pickle.UnpicklingError, LoraError, ModelFileError
)  # fmt: skip

log = logging.getLogger(__name__)

FORMAT = 1
"""Of a checkpoint. Raised whenever an older version would misread it; without a number it is the first."""

OPTIMIZER, EMA, STATE = "optimizer.pt", "ema.pt", "state.json"


def save_checkpoint(
    folder: Path,
    progress: Progress,
    trained: Trained,
    stepper: Stepper,
    ema: Ema | None,
    keep: int,
    keep_best: bool = False,
) -> Path:
    """Write `folder`/step-000100 and remove the oldest ones, so that `keep` are left, and with `keep_best` the best."""
    path = folder / step_name(progress.step)
    if path.exists():  # saved again at the same step, e.g. after a pause: the state is the same
        return path
    with atomic_folder(path) as temporary, stepper.as_trained():
        trained.save(temporary / trained.weights_file)
        for name, part in _stateful(stepper, ema).items():
            torch.save(part.state_dict(), temporary / name)
        digests = {file.name: sha256_file(file) for file in sorted(temporary.iterdir()) if file.is_file()}
        content = {"format": FORMAT, **asdict(progress), "saved_at": progress.step, "files": digests}
        write_json(temporary / STATE, content | {"sha256": _digest(content)})
    discard_old(folder, progress, keep, keep_best)
    return path


def discard_old(folder: Path, progress: Progress, keep: int, keep_best: bool) -> None:
    """Remove the oldest checkpoints, so that `keep` are left, and with `keep_best` the best."""
    for old in checkpoints(folder)[:-keep]:
        if not (keep_best and old.name == step_name(progress.best_at)):
            try:
                discard(old)
            except PermissionError as error:  # the new one is there; the next save tries again
                log.warning("ChromaKit: the old checkpoint '%s' stays for now: %s", old.name, error)


def step_name(step: int) -> str:
    """The name of a step's checkpoint."""
    return f"step-{step:06d}"


def checkpoint_bytes(folder: Path) -> int:
    """Bytes of the newest checkpoint, 0 when there is none: about what the next one will take."""
    newest = checkpoints(folder)[-1:]
    return sum(path.stat().st_size for path in newest[0].iterdir()) if newest else 0


def checkpoints(folder: Path) -> list[Path]:
    """All checkpoints of a job, oldest first."""
    found = (path for path in folder.glob("step-*") if path.is_dir() and path.name[5:].isdigit())
    return sorted(found, key=lambda path: int(path.name[5:]))  # by number: a million has a digit more


def discard(path: Path) -> None:
    """Remove a checkpoint: renamed first, so that a half-removed one is never taken for a whole one."""
    rubbish = path.with_name(f".{path.name}.discarded.tmp")
    remove(rubbish)
    replace(path, rubbish)
    shutil.rmtree(rubbish, ignore_errors=True)


def set_aside(path: Path) -> None:
    """Rename a checkpoint that cannot be read, to damaged-step-000100: a disk that is back may still have it whole."""
    aside = path.with_name(f"damaged-{path.name}")
    remove(aside)
    replace(path, aside)


def restore_latest(
    folder: Path, trained: Trained, stepper: Stepper, ema: Ema | None = None
) -> tuple[Progress | None, list[str]]:
    """Load the newest readable checkpoint into what is trained, the optimizer and the average.

    Returns:
        its progress (None when there is none) and the names of damaged ones, which are set aside.
    Raises JobError for a checkpoint of a later version, and what says that memory ran out, or that a file may not be
    read now: nothing is set aside then.
    """
    if folder.is_dir():
        remove_leftovers(folder)
    damaged = []
    if not checkpoints(folder):
        return None, damaged
    parts = _stateful(stepper, ema)
    start_anew, fresh = trained.remember(), {name: part.state_dict() for name, part in parts.items()}
    for path in reversed(checkpoints(folder)):
        try:
            return restore(path, trained, stepper, ema), damaged
        except _DAMAGE as error:
            if is_out_of_memory(error) or isinstance(error, PermissionError):  # the checkpoint is whole
                raise
            damaged.append(f"{path.name} ({first_line(error, 100) or type(error).__name__})")
            set_aside(path)
            start_anew()
            for name, part in parts.items():
                part.load_state_dict(fresh[name])
    return None, damaged


def restore(path: Path, trained: Trained, stepper: Stepper, ema: Ema | None = None) -> Progress:
    """Load one checkpoint into what is trained, the optimizer and the average; returns its progress.

    Raises what a damaged one gives rise to; some of it may be loaded then.
    """
    progress, parts = _checked(path), _stateful(stepper, ema)
    saved = {name: torch.load(path / name, map_location="cpu", weights_only=True) for name in parts}
    trained.load(path / trained.weights_file)
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    return progress


def is_whole(path: Path) -> bool:
    """Whether every file of a checkpoint is as it was written."""
    try:
        _checked(path)
    except _DAMAGE:
        return False
    return True


def _checked(path: Path) -> Progress:
    """The progress of a checkpoint whose every file is as it was written.

    Raises JobError for a later version's, ValueError for a bit that changed, another step's content, and values of
    another type. Checkpoints of earlier versions have no digests.
    """
    values = json.loads((path / STATE).read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"{STATE} is no object")
    check_format(f"The checkpoint '{path.name}'", values.get("format"), FORMAT, JobError)
    stated = values.pop("sha256", None)
    files = values.get("files", {})
    if (stated is None) != ("files" not in values) or (stated is not None and stated != _digest(values)):
        raise ValueError(f"{STATE} is not as it was written")
    for name, digest in files.items():
        if sha256_file(path / name) != digest:
            raise ValueError(f"{name} is not as it was written")
    known = {f.name for f in fields(Progress)}
    kept = {"rounding": 1, **{name: value for name, value in values.items() if name in known}}
    progress = _PROGRESS.validate_json(json.dumps(kept), strict=True)
    if path.name != step_name(progress.step):
        raise ValueError(f"{STATE} is that of step {progress.step}")
    return progress


_PROGRESS = TypeAdapter(Progress)


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _stateful(stepper: Stepper, ema: Ema | None) -> dict[str, Stepper | Ema]:
    """What has a state, by the name of its file; the optimizer is loaded first."""
    return {OPTIMIZER: stepper} if ema is None else {OPTIMIZER: stepper, EMA: ema}
