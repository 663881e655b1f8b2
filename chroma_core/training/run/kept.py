"""LoRAs of earlier steps in a job's folder: which of them stay, and one of them put where the user looks for LoRAs.

`loras/step-000250.safetensors` is the LoRA as the job would have ended with it at that step; `step-000250.used` beside
it holds the name that it was given in ComfyUI's LoRA folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import JobError, LoraError, counted, first_few
from ...files import remove, write_atomic
from ..config import TrainingConfig
from .checkpoint import step_name
from .metrics import JobPaths, Progress
from .trained import final_path

LAST_KEPT = 3
"""The newest LoRAs, which always stay."""

DISK_SHARE = 0.1
"""Of what is free on the disk, what the LoRAs of a job may take."""


@dataclass(frozen=True)
class Kept:
    """The LoRA of one step. used: the file's name in the LoRA folder, where it was put there."""

    step: int
    path: Path
    used: str | None


def kept_loras(folder: Path) -> list[Kept]:
    """Those that there are, in order."""
    found = (path for path in folder.glob("step-*.safetensors") if path.stem[5:].isdigit())
    return sorted((Kept(int(path.stem[5:]), path, _used(path)) for path in found), key=lambda one: one.step)


def _used(path: Path) -> str | None:
    try:
        return path.with_suffix(".used").read_text(encoding="utf-8").strip()
    except OSError:
        return None


def kept_path(folder: Path, step: int) -> Path:
    """The file of one step."""
    return folder / f"{step_name(step)}.safetensors"


def keep_lora(folder: Path, config: TrainingConfig, progress: Progress, write: Callable[[Path], bool]) -> str | None:
    """Keep the LoRA as it is now, to be chosen later by its preview or its validation loss; returns a warning.

    write: see `Trained.keep`.
    """
    if not (progress.taken and config.keep_loras) or progress.skipped_in_a_row:
        return None
    try:
        if write(kept_path(folder, progress.step)):
            thin(folder, config.keep_loras, progress.best_at)
    except LoraError as error:
        return f"The LoRA of step {progress.step} is not kept. {error}"
    return None


def thin(folder: Path, keep: int, best: int) -> None:
    """Remove LoRAs of a job so that about `keep` are left, and fewer where the disk is short; see `superfluous`."""
    there = kept_loras(folder)
    if not there:
        return
    size = there[-1].path.stat().st_size
    room = DISK_SHARE * (shutil.disk_usage(folder).free + size * len(there)) / size
    safe = {one.step for one in there if one.used is not None} | {best}
    for step in superfluous([one.step for one in there], min(keep, int(room)), safe):
        remove(kept_path(folder, step))


def superfluous(steps: Sequence[int], keep: int, safe: Collection[int]) -> list[int]:
    """Which of the kept steps go so that `keep` are left: the earlier, the fewer stay.

    Each time the one goes that leaves the smallest gap in proportion to its age; the last `LAST_KEPT` and those in
    `safe` stay in any case.
    """
    left, gone = sorted(steps), []
    while len(left) > max(keep, 1):
        # Its gap over its age, were it gone.
        costs = {
            i: (left[i + 1] - (left[i - 1] if i else 0)) / (left[-1] - left[i])
            for i in range(len(left) - LAST_KEPT)
            if left[i] not in safe
        }
        if not costs:
            break
        gone.append(left.pop(min(costs, key=costs.__getitem__)))
    return gone


def use_step(paths: JobPaths, config: TrainingConfig, step: int) -> Path:
    """Put the LoRA of a step into the LoRA folder, under the job's name and the step's; it is never thinned away.

    Returns the file there. Raises JobError when that step was not kept.
    """
    source = kept_path(paths.kept, step)
    target = final_path(paths.loras, config, f"-{step_name(step)}", paths.job.name)
    mark = source.with_suffix(".used")
    if source.is_file():
        write_atomic(mark, target.name)  # before it is read: the job may be thinning them out
        try:
            write_atomic(target, source.read_bytes())
            return target
        except FileNotFoundError:
            remove(mark)
    there = [str(one.step) for one in kept_loras(paths.kept)]
    if config.full is not None:
        why = "it trains the model itself, of which only checkpoints are kept"
    elif there:
        why = f"there {'is' if len(there) == 1 else 'are'} {counted(len(there), 'LoRA')}, of {first_few(there, 20)}"
    else:
        why = "it has kept none yet (they come with previews and validations, see keep_loras)"
    raise JobError(f"The job '{paths.job.name}' has no LoRA of step {step}: {why}.")
