"""The validation loss of a run: measured, written down, and what it says of the job."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...data.samples import caption_count, image_count
from ...errors import counted
from ...model.transformer import ChromaTransformer
from ..config import TrainingConfig
from ..step.objective import heldout_loss
from .metrics import MetricsLog, Progress
from .prepare import Prepared
from .trained import Trained
from .verdict import Record, verdict


def measure(
    transformer: ChromaTransformer,
    trained: Trained,
    data: Prepared,
    progress: Progress,
    metrics: MetricsLog,
    rows: int,
    between: Callable[[], None],
) -> None:
    """Measure the loss on held-out images, the first time that of the base too, and take it into progress and metrics.

    Without such images only what is trained on is written down, at step 0.

    Args:
        rows: noise levels in one pass.
        between: called before every image; may wait or raise.
    """
    looked_at = {"images": image_count(data.samples), "captions": caption_count(data.samples)}
    if not data.heldout:
        if progress.step == 0:
            metrics.append(step=0, **looked_at)
        return
    images = [(data.cache.latents(sample.latents[0]), data.cache.text(sample.captions[0])) for sample in data.heldout]
    base: list[float] | None = None
    without = trained.base(progress.step) if progress.heldout_loss_base is None else None
    if without is not None:
        with without:
            base = heldout_loss(transformer, images, between, rows)
        progress.heldout_loss_base = sum(base) / len(base)
        metrics.append(
            step=0,
            heldout_loss_base=progress.heldout_loss_base,
            heldout_by_sigma_base=base,
            heldout_images=image_count(data.heldout),
            **looked_at,
        )
    by_sigma = base if progress.step == 0 else None  # before the first step nothing was learnt
    if by_sigma is None:
        by_sigma = heldout_loss(transformer, images, between, rows)
    progress.heldout_loss = sum(by_sigma) / len(by_sigma)
    metrics.append(step=progress.step, heldout_loss=progress.heldout_loss, heldout_by_sigma=by_sigma)
    if progress.best_loss is None or progress.heldout_loss < progress.best_loss:
        progress.best_loss, progress.best_at = progress.heldout_loss, progress.step


def told_of(lines: Sequence[Mapping[str, Any]], job_id: str) -> dict[str, Any] | None:
    """The verdict on the lines of `metrics.jsonl` as JSON values."""
    found = verdict(Record.of(lines))
    return found and found.to_dict(job_id)


def ended_by_itself(config: TrainingConfig, ended: Progress, best: Progress, noun: str) -> str:
    """What to tell the user of a job that ended early with its best step; `noun` is what it trained."""
    count = counted(config.stop_when_memorising, "validation")
    return (
        f"Ended by itself at step {ended.step}: the last {count} said that it memorises. The {noun} is that of step "
        f"{best.step}, which measured best. To go on nevertheless, set stop_when_memorising to 0 and extend the job."
    )
