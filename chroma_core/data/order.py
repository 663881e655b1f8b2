"""Which samples form the batch of a step: a function of (seed, epoch), so that resuming needs no saved state."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch

from .randomness import generator


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
