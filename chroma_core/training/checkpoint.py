"""Checkpoints: folders that appear whole or not at all, with everything that a bit-exact resume needs.

Noise, order and dropout are functions of the step, and so is the learning rate: the adapter, the optimizer's state and
a few numbers are all there is to keep.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch.nn import Parameter

from ..errors import LoraError
from ..files import atomic_folder, remove_leftovers, write_json
from ..lora.adapters import load_trained, trained_lora
from ..lora.formats import read_lora, write_lora
from ..transformer import ChromaTransformer

_DAMAGE = (OSError, ValueError, RuntimeError, EOFError, AttributeError, pickle.UnpicklingError, LoraError)

LORA, OPTIMIZER, STATE = "lora.safetensors", "optimizer.pt", "state.json"


@dataclass
class Progress:
    """Where a run stands. Steps are counted as done; −1 means never."""

    step: int = 0
    validated_at: int = -1
    previewed_at: int = -1
    saved_at: int = -1
    loss_smooth: float | None = None
    loss_weight: float = 0.0
    heldout_loss_base: float | None = None
    heldout_loss: float | None = None
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    train_seconds: float = 0.0
    metrics_bytes: int = 0
    data: str = ""


def save_checkpoint(
    folder: Path, progress: Progress, transformer: ChromaTransformer, optimizer: torch.optim.Optimizer, keep: int
) -> Path:
    """Write `folder`/step-000100 and remove the oldest ones, so that `keep` are left."""
    path = folder / f"step-{progress.step:06d}"
    if path.exists():  # saved again at the same step, e.g. after a pause: the state is the same
        return path
    with atomic_folder(path) as temporary:
        write_lora(temporary / LORA, trained_lora(transformer))
        torch.save(optimizer.state_dict(), temporary / OPTIMIZER)
        write_json(temporary / STATE, asdict(progress))
    for old in checkpoints(folder)[:-keep]:
        discard(old)
    return path


def checkpoints(folder: Path) -> list[Path]:
    """All checkpoints of a job, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def discard(path: Path) -> None:
    """Remove a checkpoint: renamed first, so that a half-removed one is never taken for a whole one."""
    rubbish = path.with_name(f".{path.name}.discarded.tmp")
    shutil.rmtree(rubbish, ignore_errors=True)
    path.rename(rubbish)
    shutil.rmtree(rubbish, ignore_errors=True)


def restore_latest(
    folder: Path, transformer: ChromaTransformer, parameters: Sequence[Parameter], optimizer: torch.optim.Optimizer
) -> tuple[Progress | None, list[str]]:
    """Load the newest readable checkpoint into the adapter and the optimizer.

    Returns:
        its progress (None when there is none) and the names of damaged ones, which are removed.
    """
    if folder.is_dir():
        remove_leftovers(folder)
    damaged = []
    fresh_lora, fresh_state = trained_lora(transformer), optimizer.state_dict()
    for path in reversed(checkpoints(folder)):
        try:
            values = json.loads((path / STATE).read_text(encoding="utf-8"))
            known = {f.name for f in fields(Progress)}
            progress = Progress(**{k: v for k, v in values.items() if k in known})
            state = torch.load(path / OPTIMIZER, map_location=parameters[0].device, weights_only=True)
            load_trained(transformer, read_lora(path / LORA))
            optimizer.load_state_dict(state)
            return progress, damaged
        except _DAMAGE as error:
            damaged.append(f"{path.name} ({type(error).__name__})")
            discard(path)
            load_trained(transformer, fresh_lora)
            optimizer.load_state_dict(fresh_state)
    return None, damaged
