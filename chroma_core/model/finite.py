"""Numbers that are none: noticed where they first appear, before they become a black image."""

from __future__ import annotations

from torch import Tensor

from ..errors import NotFiniteError


def broken(tensor: Tensor) -> bool:
    """Whether a tensor holds NaN or infinite numbers; waits for its device."""
    return bool((~tensor.isfinite()).any())


def check_finite(tensor: Tensor, what: str, remedy: str) -> Tensor:
    """The tensor. Raises NotFiniteError, which begins with `what` and ends with `remedy`, unless its numbers are."""
    if broken(tensor):
        raise NotFiniteError(f"{what} holds NaN or infinite numbers. {remedy}")
    return tensor
