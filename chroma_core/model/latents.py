"""Latents: sizes, the VAE's scale and shift, and the 2×2 packing that the transformer reads.

Shapes use one letter an axis: B batch, C latent channels (16), H/W latent rows and columns (pixels / 8),
L image tokens (H/2 · W/2), D packed channels (4·C = 64).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError

PATCH = 2
"""Latent rows and columns that one image token covers."""

MIN_SIZE, MAX_SIZE = 32, 4096
"""Pixels a side that an image may have, after flooring."""


@dataclass(frozen=True)
class LatentFormat:
    """How a VAE's latents map to the transformer's: x = (z − shift) · scale. The defaults are Flux's."""

    channels: int = 16
    scale: float = 0.3611
    shift: float = 0.1159
    downscale: int = 8

    @classmethod
    def of(cls, vae) -> LatentFormat:
        """The format that a diffusers `AutoencoderKL` states in its configuration."""
        config = vae.config
        return cls(
            channels=config.latent_channels,
            scale=config.scaling_factor,
            shift=config.shift_factor or 0.0,
            downscale=2 ** (len(config.block_out_channels) - 1),
        )

    def to_model(self, z: Tensor) -> Tensor:
        """VAE space (what LATENT sockets carry) → the transformer's unit-variance space; any shape."""
        return (z - self.shift) * self.scale

    def to_vae(self, x: Tensor) -> Tensor:
        """The inverse of `to_model`."""
        return x / self.scale + self.shift


FLUX_LATENTS = LatentFormat()
"""The format that every Chroma shares, tiny's included."""


def snap_size(width: int, height: int, multiple: int = 32) -> tuple[int, int]:
    """Floor a size in pixels to a multiple, as training buckets and reference pipelines do.

    Raises ConfigError when a side is below one multiple or above 4096 pixels.
    """
    for name, value in (("width", width), ("height", height)):
        if not MIN_SIZE <= value <= MAX_SIZE or value < multiple:
            raise ConfigError(
                f"The image's {name} is {value} pixels; it must be between {max(MIN_SIZE, multiple)} and {MAX_SIZE}. "
                f"Sizes are floored to a multiple of {multiple}, so 1000 becomes {1000 // multiple * multiple}."
            )
    return width // multiple * multiple, height // multiple * multiple


def pack(x_BCHW: Tensor) -> Tensor:
    """Latents [B, C, H, W] → image tokens [B, H/2 · W/2, 4·C]; H and W must be even."""
    B, C, H, W = x_BCHW.shape
    x = x_BCHW.view(B, C, H // PATCH, PATCH, W // PATCH, PATCH)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(B, (H // PATCH) * (W // PATCH), C * PATCH * PATCH)


def unpack(x_BLD: Tensor, height: int, width: int) -> Tensor:
    """Image tokens [B, L, 4·C] → latents [B, C, height, width]; the inverse of `pack`, sizes in latents."""
    B, _, D = x_BLD.shape
    C = D // (PATCH * PATCH)
    x = x_BLD.view(B, height // PATCH, width // PATCH, C, PATCH, PATCH)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(B, C, height, width)


def image_ids(height: int, width: int, device: torch.device | str | None = None) -> Tensor:
    """Position ids [L, 3] (0, row, column) of the image tokens of latents with `height` rows and `width` columns."""
    rows, columns = height // PATCH, width // PATCH
    ids = torch.zeros(rows, columns, 3, device=device)
    ids[..., 1] = torch.arange(rows, device=device)[:, None]
    ids[..., 2] = torch.arange(columns, device=device)[None, :]
    return ids.view(rows * columns, 3)
