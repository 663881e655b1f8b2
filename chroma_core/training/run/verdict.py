"""How a training job stands, in one sentence, from its metrics alone: go on, which step to use, or what to change.

The same lines of `metrics.jsonl` give the same verdict, so it does not matter whether the job was resumed, extended or
killed. The numbers below were chosen by jobs of `tiny` (`tools.verdict_study`); docs/verdict.md tells for how many of
them the sentence is right.
"""

from __future__ import annotations

import shlex
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import exp, log, sqrt
from statistics import mean, median
from typing import Any, Literal

import numpy as np

Measuring = Literal["early", "learning", "settled", "memorises", "hot", "captions", "worse"]
"""What is said by a validation loss."""

Training = Literal["diverged", "unsteady", "captions", "falling", "fallen", "unclear"]
"""What is said by training loss and gradient norm alone."""

Kind = Measuring | Training

LEAST_MEASURED = 4
"""Measurements after the first step from which on there is a verdict."""

LEAST_GAIN = 0.01
"""Of the base's loss; what the best step gained over it counts as no less in what follows."""


LEAST_STEPS = 24
"""Steps from which on training loss and gradient norm alone say something."""

FIRST_STEPS = 8
"""Steps at least that count as the first; of long jobs it is a tenth."""

LEVELS = 10
"""Parts of the noise levels 0..1: training losses are compared within one."""

ERRORS = 2.0
"""Standard errors by which the training loss must have changed."""

SPIKES = 0.02
"""Share of the steps, two of them at least, that must have a large gradient norm."""


@dataclass(frozen=True)
class Limits:
    """From which numbers on something is said.

    Shares of what the best step gained over the base: rise, what must be lost again, and more than the scatter, to
    say: memorises, were one image held out; with n images a √n-th of it, as their mean is the more certain. still: what
    the last third may have added at most, its scatter included, to say: settled. swing: how far the loss goes up and
    down from one measurement to the next, on average, with a rate that is too high.

    Without held-out images, training loss and gradient norm of the last third, or of the largest, over those of the
    first steps: above `grown` it diverged, above `jump` it is unsteady, below `sunk` the images may be known by heart.
    """

    rise: float = 0.3
    still: float = 0.02
    swing: float = 0.07
    grown: float = 1.1
    jump: float = 6.0
    sunk: float = 0.55


LIMITS = Limits()

UNTOLD = 14
"""Held-out images of a job whose metrics, older, do not tell: its limit stays what it was then."""

ALIKE = 0.5
"""Different captions for each image from which on there are enough of them."""

MOST_LEVELS = 0.6
"""Share of the noise levels at which the loss must have risen since the best step before it is said to memorise."""

FEW = 4
"""Images below which the number of captions is not judged."""


@dataclass(frozen=True)
class Measured:
    """The validation loss at a step, as a whole and at each noise level, and how many steps were taken until then."""

    step: int
    loss: float
    by_sigma: Sequence[float]
    taken: int


@dataclass
class Record:
    """What a verdict reads. loss, grad_norm, lr, sigma: of every step that was taken, the last of which was `step`.
    broken: steps that were skipped because a number was not finite. images, captions: how many are trained on, and how
    many of the captions differ. heldout_images: how many a validation measures."""

    loss: array[float] = field(default_factory=lambda: array("d"))
    grad_norm: array[float] = field(default_factory=lambda: array("d"))
    lr: array[float] = field(default_factory=lambda: array("d"))
    sigma: array[float] = field(default_factory=lambda: array("d"))
    step: int = 0
    heldout: list[Measured] = field(default_factory=list)
    base: Measured | None = None
    images: int | None = None
    captions: int | None = None
    heldout_images: int = UNTOLD
    broken: int = 0

    @classmethod
    def of(cls, lines: Iterable[Mapping[str, Any]]) -> Record:
        """From the lines of `metrics.jsonl`."""
        found = cls()
        for line in lines:
            found.take(line)
        return found

    def take(self, line: Mapping[str, Any]) -> None:
        """The next line. What a step does not tell counts as 0."""
        if "loss" in line:
            for name in ("loss", "grad_norm", "lr", "sigma"):
                getattr(self, name).append(float(line.get(name) or 0.0))
            self.step = line["step"]
        elif "heldout_loss_base" in line:
            self.base = Measured(0, line["heldout_loss_base"], line.get("heldout_by_sigma_base") or (), 0)
            self.images, self.captions = line.get("images"), line.get("captions")
            self.heldout_images = line.get("heldout_images") or UNTOLD
        elif "heldout_loss" in line and line["step"] > 0:
            levels = line.get("heldout_by_sigma") or ()
            self.heldout.append(Measured(line["step"], line["heldout_loss"], levels, len(self.loss)))
        elif line.get("skipped") == "broken":
            self.broken += 1
        elif "images" in line:
            self.images, self.captions = line["images"], line["captions"]


@dataclass(frozen=True)
class Verdict:
    """What is said of a job. at: the step of the last measurement; step: that which measured best, 0 for the base, and
    where nothing was measured.

    evidence: the numbers behind it, by name, as JSON values; see `_evidence` and `_evidence_of_training`.
    """

    kind: Kind
    at: int
    step: int
    evidence: dict[str, float]

    @property
    def sentence(self) -> str:
        """In English, with its numbers; the page has its own words for the kinds."""
        return SENTENCES[self.kind].format(step=self.step, at=self.at, **self.evidence)

    @property
    def measured(self) -> bool:
        """Whether it follows from held-out images; otherwise from training loss and gradient norm."""
        return "base" in self.evidence

    def command(self, job_id: str) -> str:
        """What follows from it, as a command; empty where a command cannot help."""
        job, rate = shlex.quote(job_id), f"{self.evidence['learning_rate'] / 2:g}"
        if self.kind in ("learning", "falling"):
            return f"python -m chroma_core train --resume {job} --extend {max(1, self.at // 2)}"
        if self.kind in ("settled", "memorises"):
            return f"python -m chroma_core jobs use {job} {self.step}"
        if self.kind in ("hot", "worse", "diverged", "unsteady"):
            start = f" --step {self.step}" if self.step else ""
            return f"python -m chroma_core train --branch {job}{start} --learning-rate {rate}"
        return ""

    def to_dict(self, job_id: str) -> dict[str, Any]:
        """As JSON values, for a job of that id."""
        return {
            "kind": self.kind,
            "at": self.at,
            "step": self.step,
            "sentence": self.sentence,
            "evidence": self.evidence,
            "command": self.command(job_id),
        }


SENTENCES: dict[Kind, str] = {
    "early": "Too early to say: {measured:.0f} of at least 4 validations are made.",
    "learning": "Still learning: the last third added {trend:.0%} to the gain, give or take {scatter:.0%}.",
    "settled": "Best at step {step}; no better since: more steps gain nothing.",
    "memorises": "Best at step {step}; since then it memorises: {lost:.0%} of what was gained is lost again.",
    "hot": "Too hot: halve the learning rate ({learning_rate:g}) and go on from step {step}.",
    "captions": "Too few different captions: {captions:.0f} for {images:.0f} images, so the prompt decides too little.",
    "worse": "Worse than the base: the validation loss is {now:.3g}, the base's {base:.3g}.",
    "diverged": "Diverged: the training loss is {ratio:.0%} of that of the first steps. Halve the learning rate "
    "({learning_rate:g}).",
    "unsteady": "Too hot: gradient norm up to {jump:.1f} times that of the first steps, broken steps: {broken:.0f}. "
    "Halve the learning rate ({learning_rate:g}).",
    "falling": "Still learning, by its training loss alone: {ratio:.0%} of that of the first steps.",
    "fallen": "It may know its images by heart: the training loss is {ratio:.0%} of that of the first steps. Compare "
    "its earlier steps.",
    "unclear": "The training loss alone tells nothing: it is neither lower nor higher than its scatter explains.",
}


def verdict(record: Record) -> Verdict | None:
    """What is to be said of a job: by its validation loss, and before there is one, or without one, by its training
    loss and gradient norm; None while there are few steps, too."""
    if record.base is None or not record.heldout:
        return _verdict_on_training(record)
    evidence = _evidence(record)
    best = min(record.heldout, key=lambda each: each.loss)
    step = best.step if best.loss < record.base.loss else 0
    kind = kind_of(evidence)
    return Verdict(kind, record.heldout[-1].step, step, evidence)


def _verdict_on_training(record: Record) -> Verdict | None:
    if len(record.loss) < LEAST_STEPS:
        return None
    evidence = _evidence_of_training(record)
    return Verdict(kind_of_training(evidence), record.step, 0, evidence)


def memorising_for(lines: Sequence[Mapping[str, Any]]) -> int:
    """At how many validations in a row, up to the last, the verdict on the metrics so far was that it memorises."""
    count = 0
    for i in reversed(range(len(lines))):
        if "heldout_loss" in lines[i]:
            found = verdict(Record.of(lines[: i + 1]))
            if found is None or found.kind != "memorises":
                break
            count += 1
    return count


def kind_of(found: Mapping[str, float], limits: Limits = LIMITS) -> Measuring:
    """What the evidence says."""
    if found["now"] > found["base"] or found["broken"]:
        return "worse" if found["best"] >= found["base"] else "hot"
    if found["measured"] < LEAST_MEASURED:
        return "early"
    if _alike(found):
        return "captions"
    if found["swing"] > limits.swing:
        return "hot"
    rise = limits.rise / sqrt(found["heldout_images"])
    if found["lost"] > max(rise, found["scatter"]) and found["risen"] >= MOST_LEVELS:
        return "memorises"
    return "learning" if found["trend"] + found["scatter"] > limits.still else "settled"


def kind_of_training(found: Mapping[str, float], limits: Limits = LIMITS) -> Training:
    """What the evidence says where there are no held-out images."""
    clear = abs(log(found["ratio"])) > ERRORS * found["error"]
    if found["ratio"] > limits.grown and clear:
        return "diverged"
    if found["jump"] > limits.jump or found["broken"]:
        return "unsteady"
    if _alike(found):
        return "captions"
    if found["ratio"] >= 1 or not clear:
        return "unclear"
    return "fallen" if found["ratio"] < limits.sunk else "falling"


def _alike(found: Mapping[str, float]) -> bool:
    return found["images"] >= FEW and found["captions"] < ALIKE * found["images"]


def _evidence_of_training(record: Record) -> dict[str, float]:
    """The numbers that decide without held-out images.

    ratio: geometric mean of the training loss in the last third over that of the first steps, each loss as a share of
    the mean at its noise level, which decides most of it. error: standard error of its logarithm. jump: the gradient
    norm that `SPIKES` of the steps reach, over the median of the first. broken: skipped steps.
    """
    steps = len(record.loss)
    level = np.minimum(LEVELS - 1, (LEVELS * np.array(record.sigma)).astype(int))
    logs = np.log(np.maximum(record.loss, 1e-12))
    usual = np.bincount(level, logs, LEVELS) / np.maximum(np.bincount(level, minlength=LEVELS), 1)
    left = logs - usual[level]
    first, last = max(FIRST_STEPS, steps // 10), steps // 3
    spikes = max(2, round(SPIKES * steps))
    largest = float(np.partition(record.grad_norm, -spikes)[-spikes])
    start = median(record.grad_norm[:FIRST_STEPS])
    return {
        "ratio": exp(left[-last:].mean() - left[:first].mean()),
        "error": float(left.std()) * sqrt(1 / first + 1 / last),
        "jump": largest / start if start else 1.0,
        "learning_rate": max(record.lr, default=0.0),
        "images": float(record.images or 0),
        "captions": float(record.captions or 0),
        "broken": float(record.broken),
    }


def _evidence(record: Record) -> dict[str, float]:
    """The numbers that decide.

    base, best, now: validation loss of the base, of the best step, of the last measurements (two of them, from four
    on). lost, trend, scatter, swing: in units of base - best: what was lost since the best step, what the last third
    gained, the median distance of a measurement in the second half from the mean of its neighbours, and by how much a
    measurement lies above both neighbours or below both, on average. risen: share of the noise levels whose loss is
    higher now than at the best step. loss_rise, norm_rise: mean training loss, and the gradient norm's 90th percentile,
    of the last third over those of the first. heldout_images: in each validation, or `UNTOLD`. measured: validations;
    broken: skipped steps.
    """
    assert record.base is not None
    measured = record.heldout
    losses = [each.loss for each in measured]
    best = min(measured, key=lambda each: each.loss)
    last = measured[-2:] if len(measured) >= LEAST_MEASURED else measured[-1:]
    now = mean(each.loss for each in last)
    lost = 0.0 if any(each is best for each in last) else max(0.0, now - best.loss)
    gain = max(record.base.loss - best.loss, LEAST_GAIN * record.base.loss)
    middle = losses[len(losses) // 2 - 1 :] if len(losses) >= LEAST_MEASURED else []
    scatter = [abs(b - (a + c) / 2) for a, b, c in zip(middle, middle[1:], middle[2:], strict=False)]
    turns = [
        max(0.0, min(a, c) - b if b > best.loss else 0.0, b - max(a, c))
        for a, b, c in zip(losses, losses[1:], losses[2:], strict=False)
    ]
    third = len(losses) - max(2, round(len(losses) / 3))
    before = losses[max(0, third - 1) : third + 1] or losses[:1]
    levels = [mean(level) - least for *level, least in zip(*(e.by_sigma for e in last), best.by_sigma, strict=True)]
    return {
        "base": record.base.loss,
        "best": best.loss,
        "now": now,
        "lost": lost / gain,
        "trend": (mean(before) - now) / gain,
        "scatter": median(scatter) / gain if scatter else 0.0,
        "swing": mean(turns) / gain if turns else 0.0,
        "risen": mean(float(level > 0) for level in levels) if levels else 0.0,
        "loss_rise": _ratio(record.loss[: measured[-1].taken], np.mean),
        "norm_rise": _ratio(record.grad_norm[: measured[-1].taken], _high),
        "learning_rate": max(record.lr, default=0.0),
        "images": float(record.images or 0),
        "captions": float(record.captions or 0),
        "heldout_images": float(record.heldout_images),
        "measured": float(len(measured)),
        "broken": float(record.broken),
    }


def _ratio(values: array[float], of: Callable[[array[float]], Any]) -> float:
    """`of` the last third of some steps over `of` the first."""
    third = len(values) // 3
    return float(of(values[-third:])) / max(float(of(values[:third])), 1e-12) if third else 1.0


def _high(values: array[float]) -> float:
    """The 90th percentile."""
    place = int(0.9 * (len(values) - 1))
    return float(np.partition(values, place)[place])
