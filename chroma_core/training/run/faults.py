"""What goes wrong in training, noticed and said in words: divergence, a full disk, memory that does not suffice."""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch

from ...errors import ChromaKitError, JobError, first_line
from ...files import DISK_MARGIN
from ...fullrank.layers import count_trained
from ...loading.load import transformer_outline
from ...memory import Settings, estimate, in_gib, machine, recommend, recomputing_least
from ...memory.activations import T5_TOKENS, TEXT_TOKENS
from ...model.device import is_out_of_memory
from ..config import TrainingConfig
from .metrics import ROUNDING, Progress

WATCH_FROM, BAND_FROM = 100, 20
"""Steps before divergence is judged by the band, and before the band begins: the first losses say little about one."""

EXPLODED, LEAST_BAND = 10.0, 0.25
"""From the first step on, a fast mean this many times above the lowest so far (a quarter at least, since single
losses near the end of the noise scale are small) is divergence; predicting nothing at all costs about 2."""

WORSE = 1.1
"""A held-out loss so many times the base's is worse than the base; less is its own scatter."""

DIVERGED = 3.0
"""A fast mean of the loss this many times above the lowest smoothed loss so far is divergence. In flow matching single
losses scatter by a factor of about three with the noise level, means of five hardly."""

FAST = 0.8
"""Weight of the past in the fast mean: about the last five steps."""

ADVICE = (
    "Turn gradient checkpointing on, lower the learning rate (1e-4 is cautious), and look whether the captions differ "
    "from one another"
)
"""What SimpleTuner's guide for Chroma advises when training diverges early."""

MAX_SKIPPED_IN_A_ROW = 10

PACE_STEPS, SLOWER = 16, 4.0
"""A median of so many steps, so many times above the lowest one so far, is slow: more than a mixture of sizes does."""

MEMORY_TRIES = 3
"""How often work that ran out of memory is done anew before the job is paused."""

MEMORY_REST = 1.0
"""Seconds off the device after the first of these tries, four times as many after the next."""


NO_STEP = (
    "No step could be taken: from the first on, the loss or its gradient was not a finite number. The learning rate "
    "has moved nothing yet: the model itself gives NaN or infinite numbers here. Choose bf16 rather than fp16; if that "
    "is no cure, the file of the transformer is damaged: fetch it again. There is no result."
)


class Diverged(ChromaKitError):
    """Loss or gradients stayed infinite or undefined."""


def give_up_if_broken(progress: Progress, learning_rate: float, noun: str) -> None:
    """Raise Diverged after `MAX_SKIPPED_IN_A_ROW` skipped steps in a row; `noun` is what is trained."""
    if progress.skipped_in_a_row < MAX_SKIPPED_IN_A_ROW:
        return
    if not progress.taken:
        raise Diverged(NO_STEP)
    raise Diverged(
        f"Training stopped at step {progress.step}: the loss or its gradient was not a finite number in "
        f"{progress.skipped_in_a_row} steps in a row. The {noun} is that of the newest checkpoint. Lower the learning "
        f"rate (now {learning_rate:g}; 1e-4 is cautious), choose bf16 rather than fp16, and look for damaged images."
    )


def watch_skips(progress: Progress) -> str | None:
    """A warning for the user when a broken step was skipped: the first, then whenever they have doubled."""
    skipped = progress.skipped_steps
    if progress.skipped_in_a_row != 1 or skipped & (skipped - 1):
        return None
    return (
        f"Step {progress.step} was skipped: its loss or gradient is not a finite number ({skipped} so far). The "
        "weights are as they were before it."
    )


def watch_loss(progress: Progress, loss: float, config: TrainingConfig) -> str | None:
    """Take a finite loss into account; a warning for the user when training has just begun to diverge, else None.

    It may say so again after the loss came back into its band.
    """
    progress.loss_fast = loss if progress.loss_fast is None else FAST * progress.loss_fast + (1 - FAST) * loss
    if progress.loss_smooth is None:
        return None
    now = progress.loss_smooth if progress.step >= BAND_FROM else progress.loss_fast
    band_begins = progress.step == BAND_FROM and progress.diverged_at < 0
    if progress.loss_lowest is None or now < progress.loss_lowest or band_begins:
        progress.loss_lowest = now
    judged = progress.step >= WATCH_FROM
    allowed = DIVERGED * progress.loss_lowest if judged else EXPLODED * max(progress.loss_lowest, LEAST_BAND)
    if progress.loss_fast <= allowed:
        progress.diverged_at = -1
        return None
    if progress.diverged_at >= 0:
        return None
    progress.diverged_at = progress.step
    return (
        f"Training seems to diverge: at step {progress.step} the loss is {progress.loss_fast:.3g}, it has been as low "
        f"as {progress.loss_lowest:.3g}. {ADVICE} (the learning rate is {config.learning_rate:g}). Checkpoints from "
        "before are kept."
    )


def watch_heldout(progress: Progress, checkpoint: str | None) -> str | None:
    """A warning when the held-out loss has just become worse than the base's, and again only after it was better.

    checkpoint: the name of the one that measured best, if it is kept.
    """
    base, now = progress.heldout_loss_base, progress.heldout_loss
    if base is None or now is None or now <= WORSE * base:
        progress.worse_at = -1
        return None
    if progress.worse_at >= 0:
        return None
    progress.worse_at = progress.step
    return f"At step {progress.step} the result is {worse_than_the_base(progress, checkpoint)}"


def worse_than_the_base(progress: Progress, checkpoint: str | None) -> str | None:
    """What to tell the user of a held-out loss above the base's; None when it is not."""
    base, now = progress.heldout_loss_base, progress.heldout_loss
    if base is None or now is None or now <= WORSE * base:
        return None
    kept = "with keep_best, the checkpoint that measures best stays"
    if checkpoint:
        kept = f"the one that measured best, of step {progress.best_at}, is in checkpoints/{checkpoint}"
    return (
        f"worse than the base: the held-out loss is {now:.3g}, the base's {base:.3g}. Lower the learning rate or train "
        f"fewer steps; {kept}."
    )


def resume_warnings(progress: Progress | None, damaged: list[str], data: str, compiled: bool = False) -> list[str]:
    """What to tell the user of a resume: from which checkpoint, and what is no longer as it was.

    damaged: names of checkpoints that cannot be read. data: the fingerprint of the dataset now. compiled: whether the
    blocks are compiled now.
    """
    found: list[str] = []
    if damaged:
        found.append(
            f"Checkpoints that cannot be read were set aside, as damaged-…: {', '.join(damaged)}. Training goes on "
            f"from {'the beginning' if progress is None else f'step {progress.step}'}."
        )
    if progress is not None and progress.data != data:
        found.append(
            f"The dataset changed since step {progress.step}: training goes on with what is there now, so the "
            "result differs from an uninterrupted run's."
        )
    if progress is not None and progress.rounding != ROUNDING:
        found.append(
            f"Until step {progress.step} this job was trained by an earlier version, which rounded sums otherwise: "
            "what follows is as good, but not bit for bit what that version would have given."
        )
    if progress is not None and progress.compiled not in (None, compiled):
        found.append(
            f"The blocks are {'compiled' if compiled else 'no longer compiled'} from step {progress.step} on, which "
            "rounds otherwise: what follows is as good, but not bit for bit what an uninterrupted run would have given."
        )
    return found


class Pace:
    """Notices when the steps of this run become several times slower, as they do when a driver moves the GPU's memory
    into RAM instead of saying that it is full."""

    def __init__(self) -> None:
        self._usual: float | None = None
        self._last: deque[float] = deque(maxlen=PACE_STEPS)
        self._warned = False

    def watch(self, step: int, seconds: float) -> str | None:
        """Take a step into account; a warning when it has just become slow, again only after it was fast again."""
        self._last.append(seconds)
        if len(self._last) < PACE_STEPS:
            return None
        now = median(self._last)
        if self._usual is None or now < self._usual:
            self._usual = now
        slow = now > SLOWER * self._usual
        if slow == self._warned:
            return None
        self._warned = slow
        if not slow:
            return None
        return (
            f"Steps have become {now / self._usual:.1f} times slower: {now:.2f} s at step {step}, {self._usual:.2f} s "
            "before. If the GPU's memory is full, its driver may be using RAM in its place, as NVIDIA's does on "
            "Windows (Sysmem Fallback Policy). Close what else uses the GPU; or stop the job and go on with offload "
            "'block' or a lower resolution."
        )


def disk_shortage(folder: Path, next_bytes: int) -> str | None:
    """What to tell the user when the disk of `folder` has no room for `next_bytes` and a margin; None if it has."""
    free = shutil.disk_usage(folder).free
    if free >= next_bytes + DISK_MARGIN:
        return None
    return (
        f"The disk is almost full: {free / 2**20:.0f} MB are free, the next checkpoint takes about "
        f"{next_bytes / 2**20:.0f} MB. Training is paused and nothing is lost. Make room, then resume the job."
    )


def disk_full(error: BaseException) -> str:
    """What to tell the user when something could not be written because the disk is full."""
    found = error.strerror or error if isinstance(error, OSError) else first_line(error)
    where = f" ('{error.filename}')" if isinstance(error, OSError) and error.filename else ""
    return f"The disk is full: {found}{where}. Training is paused and nothing is lost. Make room, then resume the job."


def out_of_memory(error: BaseException, config: TrainingConfig, device: torch.device) -> JobError:
    """The same error with what was predicted, what there is, and the settings that should fit."""
    settings, here = plan_settings(config, device), machine(device)
    predicted = estimate(settings, here)
    alike = Settings(settings.flavour, size=settings.size, batch_size=settings.batch_size, rank=settings.rank)
    advice = recommend(alike, here, "training")
    found = first_line(error) or type(error).__name__
    return JobError(
        f"Training ran out of memory ({found}). Predicted were {in_gib(predicted.training_peak_bytes)} at "
        f"its peak; {here.name} has {in_gib(here.device_bytes)}. {_advice(config, advice.sentence)} Other knobs: "
        "gradient checkpointing on, a smaller batch size with more gradient accumulation, a lower resolution or rank. "
        "The newest checkpoint is kept; the job goes on with another offload mode, or by force with other options."
    )


def rest_seconds(tries: int) -> float:
    """How long a job stays off the device at least after its n-th try: what fills it may be somebody else's, and go.

    Not after the last, when it is paused until the user resumes it.
    """
    return MEMORY_REST * 4.0 ** (tries % MEMORY_TRIES - 1) if tries % MEMORY_TRIES else 0.0


def plan_settings(config: TrainingConfig, device: torch.device | str | None = None) -> Settings:
    """What the memory plan counts of a job; for full rank the headers of its model are read.

    Where the job leaves it open, the device's memory says how many blocks are computed again; None: all are.
    """
    full, trained = config.full, 0
    if full is not None:
        trained = count_trained(transformer_outline(config.model), full.target, full.norms)
    settings = Settings.of(
        config.model,
        size=max(config.dataset.sizes(config.resolution)),
        batch_size=config.batch_size,
        rank=config.lora.rank,
        target=config.lora.target,
        optimizer=config.optimizer,
        gradient_checkpointing=config.gradient_checkpointing,
        checkpointing_interval=config.checkpointing_interval or 1,
        deterministic=config.deterministic,
        adapter=config.lora.kind,
        lokr_factor=config.lora.lokr_factor,
        ema=config.ema_decay > 0,
        preserved=config.preserve.share if config.preserve.weights else 0.0,
        text_tokens=TEXT_TOKENS if config.objective.text_padding == "trim" else T5_TOKENS,
        trained_parameters=trained,
    )
    if config.checkpointing_interval or device is None:
        return settings
    return recomputing_least(settings, machine(device))


def _advice(config: TrainingConfig, for_a_lora: str) -> str:
    if config.full is None:
        return f"What should fit here: {for_a_lora}"
    return (
        "Train fewer blocks in [full], or with the optimizer adafactor, which keeps almost no state; choose a "
        f"quantised precision for the blocks that are not trained. For a LoRA, this should fit here: {for_a_lora}"
    )


@contextmanager
def memory_in_words(config: TrainingConfig, device: torch.device | str) -> Iterator[None]:
    """Out of memory, anywhere in a `with` block, as an error that says what was predicted and what to change."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(error, config, torch.device(device)) from error
