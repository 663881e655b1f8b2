"""Stateless randomness: every draw is a function of what it is for, so a resumed run draws what the first run drew.

The process-wide generator is never touched: host prompts run in the same process, and neither may disturb the other.
"""

from __future__ import annotations

import hashlib

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
