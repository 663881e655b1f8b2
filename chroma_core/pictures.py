"""Latents to pictures and back, and the cheap preview of a picture that is still being sampled."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image, PngImagePlugin
from torch import Tensor

from .latents import LatentFormat

# Published latent → RGB maps fit the Flux VAE only, and tiny's VAE has a latent space of its own: measure, don't quote.
_PROBE_SIZE = 64

RECORD_KEY = "chromakit"
"""The PNG text chunk that holds, as JSON, everything needed to sample the picture again."""


def to_tensor(picture: Image.Image) -> Tensor:
    """An RGB picture → [1, 3, H, W] in −1..1, fp32."""
    array = np.array(picture.convert("RGB"), dtype=np.float32)
    return torch.from_numpy(array).permute(2, 0, 1)[None] / 127.5 - 1


def to_pictures(pixels_BCHW: Tensor) -> list[Image.Image]:
    """[B, 3, H, W] in −1..1 → pictures, clipped and rounded to 8 bits."""
    array = ((pixels_BCHW.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(row) for row in array]


def to_saved_pictures(pixels_BCHW: Tensor) -> list[Image.Image]:
    """[B, 3, H, W] in −1..1 → pictures in the 8 bits that ComfyUI's Save Image writes, which cuts off, not rounds."""
    array = (255.0 * ((pixels_BCHW.float() + 1) / 2).clamp(0, 1)).byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(row) for row in array]


@torch.no_grad()
def decode(vae: AutoencoderKL, latents_BCHW: Tensor) -> list[Image.Image]:
    """Decode latents of the transformer's space, one at a time (a picture must not depend on its neighbours)."""
    format_ = LatentFormat.of(vae)
    pictures = []
    for row in latents_BCHW:
        z = format_.to_vae(row[None]).to(vae.device, vae.dtype)
        pictures += to_saved_pictures(vae.decode(z).sample)  # type: ignore[union-attr]
    return pictures


@torch.no_grad()
def preview_matrix(vae: AutoencoderKL) -> Tensor:
    """A linear latent → RGB map [C+1, 3] (last row: offset), fitted by least squares on random colour patches."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.rand(16, 3, 4, 4, generator=generator) * 2 - 1
    pixels = torch.nn.functional.interpolate(blocks, size=(_PROBE_SIZE, _PROBE_SIZE), mode="nearest")
    format_ = LatentFormat.of(vae)
    z = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mean.float().cpu()  # type: ignore[union-attr]
    latents = format_.to_model(z).permute(0, 2, 3, 1).flatten(0, 2)
    colours = torch.nn.functional.avg_pool2d(pixels, format_.downscale).permute(0, 2, 3, 1).flatten(0, 2)
    inputs = torch.cat([latents, torch.ones(len(latents), 1)], dim=1)
    return torch.linalg.lstsq(inputs, colours).solution


def preview_image(latents_BCHW: Tensor, matrix: Tensor, size: int = 256) -> Image.Image:
    """A small picture of the first row of latents (transformer's space), enlarged to at most `size` pixels a side."""
    x = latents_BCHW[0].float().cpu()
    rgb = torch.einsum("chw,cd->dhw", x, matrix[:-1]) + matrix[-1][:, None, None]
    picture = to_pictures(rgb[None])[0]
    factor = max(1, size // max(picture.size))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.BILINEAR)


def png_bytes(picture: Image.Image, record: dict[str, Any]) -> bytes:
    """A PNG that carries `record`: prompt, settings, recipe, model, and whatever else its maker knows."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt(RECORD_KEY, json.dumps(record, ensure_ascii=False))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def read_record(path: Path | str) -> dict[str, Any] | None:
    """The record of a picture, None for a picture that carries none."""
    with Image.open(path) as picture:
        text = picture.info.get(RECORD_KEY)
    return json.loads(text) if text else None
