"""Latents to images and back, and the cheap preview of an image that is still being sampled."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from safetensors import SafetensorError
from safetensors.torch import load as load_latents
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from ..errors import ConfigError
from ..files import only_names
from .latents import LatentFormat
from .vae import Autoencoder

# Published latent → RGB maps fit the Flux VAE only, and tiny's VAE has a latent space of its own: measure, don't quote.
_PROBE_SIZE = 64

LATENTS_SUFFIX = ".latent"
"""Latents beside an image, in the layout of ComfyUI's Save Latent, so that its Load Latent opens them."""

RECORD_KEY = "chromakit"
"""The PNG text chunk that holds, as JSON, everything needed to sample the image again."""


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image → [1, 3, H, W] in −1..1, fp32."""
    array = np.array(image.convert("RGB"), dtype=np.float32)
    return torch.from_numpy(array).permute(2, 0, 1)[None] / 127.5 - 1


def to_images(pixels_BCHW: Tensor) -> list[Image.Image]:
    """[B, 3, H, W] in −1..1 → images, clipped and rounded down to 8 bits.

    Down, as ComfyUI's VAE Decode and Save Image do it (clamp((x + 1) / 2) · 255, decimals cut off): a preview must
    equal, to the pixel, what the nodes save.
    """
    unit = ((pixels_BCHW.float().cpu() + 1) / 2).clamp(0, 1)
    array = (255 * unit).byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(row) for row in array]


@torch.no_grad()
def decode(vae: Autoencoder, latents_BCHW: Tensor) -> list[Image.Image]:
    """Decode latents of the transformer's space, one at a time (an image must not depend on its neighbours)."""
    format_ = LatentFormat.of(vae)
    images = []
    for row in latents_BCHW:
        z = format_.to_vae(row[None]).to(vae.device, vae.dtype)
        images += to_images(vae.decode(z))
    return images


@torch.no_grad()
def preview_matrix(vae: Autoencoder) -> Tensor:
    """A linear latent → RGB map [C+1, 3] (last row: offset), fitted by least squares on random colour patches."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.rand(16, 3, 4, 4, generator=generator) * 2 - 1
    pixels = torch.nn.functional.interpolate(blocks, size=(_PROBE_SIZE, _PROBE_SIZE), mode="nearest")
    format_ = LatentFormat.of(vae)
    z = vae.encode(pixels.to(vae.device, vae.dtype)).mean.float().cpu()
    latents = format_.to_model(z).permute(0, 2, 3, 1).flatten(0, 2)
    colours = torch.nn.functional.avg_pool2d(pixels, format_.downscale).permute(0, 2, 3, 1).flatten(0, 2)
    inputs = torch.cat([latents, torch.ones(len(latents), 1)], dim=1)
    return torch.linalg.lstsq(inputs, colours).solution


def preview_image(latents_BCHW: Tensor, matrix: Tensor, size: int = 256) -> Image.Image:
    """A small image of the first row of latents (transformer's space), enlarged to at most `size` pixels a side."""
    x = latents_BCHW[0].float().cpu()
    rgb = torch.einsum("chw,cd->dhw", x, matrix[:-1]) + matrix[-1][:, None, None]
    image = to_images(rgb[None])[0]
    factor = max(1, size // max(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.BILINEAR)


def png_bytes(image: Image.Image, record: dict[str, Any]) -> bytes:
    """A PNG that carries `record`: prompt, settings, recipe, model, and what else its maker knows, but no places."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt(RECORD_KEY, json.dumps(only_names(record), ensure_ascii=False))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def latents_bytes(latents_1CHW: Tensor, format_: LatentFormat) -> bytes:
    """A latents file of one row of the transformer's space: fp32, in the VAE's space as LATENT links carry it."""
    z = format_.to_vae(latents_1CHW.float()).cpu().contiguous()
    # The empty tensor says that the numbers are not scaled, as older files of ComfyUI's are.
    return safetensors_bytes({"latent_tensor": z, "latent_format_version_0": torch.zeros(0)}, {"format": "pt"})


def read_latents(file: Path | bytes) -> Tensor:
    """The latents [B, C, H, W] of a latents file, fp32, in the VAE's space. Raises ConfigError."""
    try:
        return load_latents(file.read_bytes() if isinstance(file, Path) else file)["latent_tensor"].float()
    except (OSError, KeyError, SafetensorError) as error:
        name = f"'{file}'" if isinstance(file, Path) else "The answer"
        raise ConfigError(f"{name} is no readable latents file ({type(error).__name__}: {error}).") from error


def read_record(path: Path | str) -> dict[str, Any] | None:
    """The record of an image, None for an image that carries none."""
    with Image.open(path) as image:
        text = image.info.get(RECORD_KEY)
    return json.loads(text) if text else None
