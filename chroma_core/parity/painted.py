"""What a runtime painted, and how far two paintings are apart."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import ConfigError
from ..model.images import read_latents


@dataclass(frozen=True)
class Painted:
    """`latents` [1, C, H, W], fp32 on the CPU, in the VAE's space as LATENT links carry them; and their picture."""

    latents: Tensor
    picture: Image.Image

    @classmethod
    def read(cls, picture: Path, latents: Path) -> Painted:
        """From a PNG and the latents file beside it. Raises ConfigError."""
        with Image.open(picture) as file:
            return cls(read_latents(latents), file.convert("RGB"))


@dataclass(frozen=True)
class Difference:
    """Two paintings of one case. `max_abs_diff`, `mean_abs_diff`: of the latents, whose standard deviation is about 3.

    `psnr`: of the 8-bit pictures, in dB; None when no pixel differs (it would be infinite).
    """

    pair: str
    max_abs_diff: float
    mean_abs_diff: float
    psnr: float | None

    @property
    def identical(self) -> bool:
        """Not one bit of the latents and not one pixel differs."""
        return self.max_abs_diff == 0 and self.psnr is None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "identical": self.identical}


def compare(pair: str, a: Painted, b: Painted) -> Difference:
    """How far apart they are. Raises ConfigError when their sizes differ, or a number is not finite."""
    if a.latents.shape != b.latents.shape or a.picture.size != b.picture.size:
        raise ConfigError(
            f"{pair}: the pictures are {a.picture.size} and {b.picture.size} pixels, so they cannot be compared."
        )
    distance = (a.latents.double() - b.latents.double()).abs()
    if not bool(distance.isfinite().all()):
        raise ConfigError(f"{pair}: the latents hold numbers that are not finite.")
    return Difference(pair, float(distance.max()), float(distance.mean()), psnr(a.picture, b.picture))


def psnr(a: Image.Image, b: Image.Image) -> float | None:
    """Peak signal-to-noise ratio of two RGB pictures of one size: 10·log₁₀(255² / mean square), None when equal."""
    pixels = [torch.from_numpy(np.array(picture.convert("RGB"), dtype=np.float64)) for picture in (a, b)]
    square = float((pixels[0] - pixels[1]).square().mean())
    return None if square == 0 else 10 * math.log10(255**2 / square)
