"""Several data sets in one training: how often each is used in an epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .samples import Sample

_LONGEST = 20
_CLOSE = 0.01


@dataclass(frozen=True)
class SampleSet:
    """The cached samples of one data set, repeats included, its name, and its weight (see `DatasetConfig.weight`)."""

    name: str
    samples: list[Sample]
    weight: float = 1.0


def combine(sets: Sequence[SampleSet]) -> list[Sample]:
    """The samples of an epoch over all sets; a set on its own is left as it is.

    Every set appears a whole number of times, so that no picture is left out of an epoch: with weights 1 and 0.5 the
    first set twice and the second once. See `multiples`.
    """
    if len(sets) == 1:
        return sets[0].samples
    names = _different([one.name for one in sets])
    samples: list[Sample] = []
    for name, one, times in zip(names, sets, multiples([one.weight for one in sets]), strict=True):
        samples += [replace(sample, name=f"{name}/{sample.name}") for sample in one.samples] * times
    return samples


def multiples(weights: Sequence[float]) -> list[int]:
    """Whole numbers in (nearly) the proportion of the weights, at least 1 each.

    The smallest numbers that are all right to 1 %, or the best with the smallest number up to 20.
    """
    relative = [weight / min(weights) for weight in weights]

    def error(factor: int) -> float:
        return max(abs(round(factor * one) / (factor * one) - 1) for one in relative)

    factors = range(1, _LONGEST + 1)
    factor = next((factor for factor in factors if error(factor) < _CLOSE), min(factors, key=error))
    return [round(factor * one) for one in relative]


def shares(sets: Sequence[SampleSet]) -> str:
    """What part of an epoch each set has, in words: `dog 67 %, dogs in general 33 %`."""
    counts = [len(one.samples) * n for one, n in zip(sets, multiples([one.weight for one in sets]), strict=True)]
    return ", ".join(f"{one.name} {count / sum(counts):.0%}" for one, count in zip(sets, counts, strict=True))


def _different(names: Sequence[str]) -> list[str]:
    """The names, numbered where one comes twice."""
    return [name if names.count(name) == 1 else f"{name} {names[:i].count(name) + 1}" for i, name in enumerate(names)]
