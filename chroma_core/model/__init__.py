"""The model itself: transformer, text encoder, VAE, latents, images, flavours, precisions and devices."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any


def configuration(values: Mapping[str, Any]) -> SimpleNamespace:
    """The arguments of a constructor, from the `locals()` with which it begins; not what its `**others` catches."""
    return SimpleNamespace(**{n: value for n, value in values.items() if n not in ("self", "others", "__class__")})
