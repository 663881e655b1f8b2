"""Stateless randomness: every draw is a function of what it is for, so a resumed run draws what the first run drew; and
the batches of every step, drawn that way.

The process-wide generator is never touched: prompts run in the same process, and neither may disturb the other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence

import torch


def generator(seed: int, purpose: str, *position: int) -> torch.Generator:
    """A CPU generator seeded from (seed, purpose, position), e.g. `generator(42, "noise", step, row)`."""
    key = "/".join(map(str, (seed, purpose, *position)))
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "big") >> 1)


def uniform(random: torch.Generator) -> float:
    """One number from [0, 1)."""
    return float(torch.rand((), generator=random, dtype=torch.float64))


def integer(below: int, random: torch.Generator) -> int:
    """One integer from 0..below-1."""
    return int(torch.randint(below, (), generator=random))


def by_bucket(buckets: Sequence[Hashable]) -> list[list[int]]:
    """Sample indices grouped by bucket, groups in order of first appearance."""
    groups: dict[Hashable, list[int]] = {}
    for index, bucket in enumerate(buckets):
        groups.setdefault(bucket, []).append(index)
    return list(groups.values())


def batches_per_epoch(buckets: Sequence[Hashable], batch: int) -> int:
    """Optimizer steps in one epoch."""
    return sum(-(-len(group) // batch) for group in by_bucket(buckets))


def epoch_batches(buckets: Sequence[Hashable], batch: int, seed: int, epoch: int) -> list[list[int]]:
    """The batches of one epoch, each of one bucket, each sample exactly once.

    Args:
        buckets: the bucket of every sample.
        batch: samples per optimizer step. A bucket's last batch may be shorter.
    """
    random = generator(seed, "order", epoch)
    batches = []
    for group in by_bucket(buckets):
        shuffled = [group[i] for i in torch.randperm(len(group), generator=random).tolist()]
        batches += [shuffled[i : i + batch] for i in range(0, len(shuffled), batch)]
    return [batches[i] for i in torch.randperm(len(batches), generator=random).tolist()]
