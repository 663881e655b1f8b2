"""Trains the VAE of the embedded `tiny` Chroma: 16 latent channels, 8× down, unit variance after Flux's scale.

The images are wider than the captions (polygons, stripes, checks, gradients, many shapes at once), so that a LoRA can
teach the transformer a concept that only the VAE is ready for.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from chroma_core.model.vae import Autoencoder

from .world import SIZE, draw, sample_scene, wide_image

SCALE, SHIFT = 0.3611, 0.1159  # Flux's: x = (z − shift) · scale is what the transformer sees


def new_vae() -> Autoencoder:
    """The architecture: Flux's VAE in miniature, with the mid-block attention that ComfyUI's VAE class expects."""
    architecture: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (16, 32, 64, 64),
        "layers_per_block": 1,
        "latent_channels": 16,
        "norm_num_groups": 8,
        "sample_size": SIZE,
        "scaling_factor": SCALE,
        "shift_factor": SHIFT,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    return Autoencoder(**architecture)


def _decoded(vae: Autoencoder, latents: Tensor) -> Tensor:
    """Images [B, 3, H, W] of latents in the transformer's space."""
    return vae.decode(latents / SCALE + SHIFT)


def to_tensor(images: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] → float [B, 3, H, W] in −1..1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_images(images: Tensor) -> np.ndarray:
    """float [B, 3, H, W] in −1..1 → uint8 [B, H, W, 3]."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1).to(torch.uint8).numpy()


def image_pool(count: int, captioned: float, rng: np.random.Generator) -> np.ndarray:
    """`count` images uint8 [count, 64, 64, 3], a fraction `captioned` of them from the captioned world."""
    return np.stack(
        [
            draw(sample_scene(rng)) if i < count * captioned else wide_image(rng)
            for i in tqdm(range(count), desc="drawing", mininterval=5)
        ]
    )


def crops(pool: np.ndarray, batch: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """A batch of random square windows, uint8 [batch, size, size, 3], randomly mirrored."""
    index = rng.integers(len(pool), size=batch)
    corner = rng.integers(SIZE - size + 1, size=(batch, 2))
    windows = [pool[i, y : y + size, x : x + size] for i, (y, x) in zip(index, corner, strict=True)]
    return np.ascontiguousarray(np.stack([w[:, ::-1] if rng.random() < 0.5 else w for w in windows]))


def vae_loss(vae: Autoencoder, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(loss, mean absolute error) of one batch, images [B, 3, H, W] in −1..1.

    Besides L1 + MSE: a penalty that holds each latent channel at zero mean and unit variance in the transformer's
    space, a weak KL in that same space, and noise of random strength on the latents, so that the decoder forgives small
    errors of the transformer.
    """
    with torch.autocast("cpu", torch.bfloat16):
        posterior = vae.encode(images)
        mean = (posterior.mean.float() - SHIFT) * SCALE
        log_variance = 2 * (posterior.std.float().log() + math.log(SCALE))
        strength = 0.15 * torch.rand(len(images), 1, 1, 1, generator=generator)
        std = (log_variance.exp() + strength**2).sqrt()
        latents = mean + std * torch.randn(mean.shape, generator=generator)
        decoded = _decoded(vae, latents)
    error = decoded.float() - images
    absolute = error.abs().mean()
    variance = mean.var(dim=(0, 2, 3))
    moments = mean.mean(dim=(0, 2, 3)).square().mean() + (variance + 1e-6).log().square().mean()
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return absolute + error.square().mean() + 0.03 * moments + 1e-3 * kl, absolute.detach()


def train_vae(work: Path, seed: int, steps: int, batch: int = 32) -> Autoencoder:
    """Trains on 32×32 windows, and for the last eighth of the steps on whole 64×64 images; resumes from `work`.

    Batches are drawn from (seed, step), so a resumed run sees what the uninterrupted one would have seen.
    """
    torch.manual_seed(seed)
    vae = new_vae().train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=1e-3, betas=(0.9, 0.99))
    state_file, start = work / "vae.pt", 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    pool = image_pool(16_000, 0.4, np.random.default_rng(seed)) if start < steps else np.empty(0)
    bar = tqdm(range(start, steps), initial=start, total=steps, desc="VAE", mininterval=5)
    for step in bar:
        rng = np.random.default_rng([seed, 1, step])
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        whole = step >= steps * 7 // 8
        images = to_tensor(crops(pool, batch // 2 if whole else batch, SIZE if whole else 32, rng))
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 100) * (0.01 + 0.99 * math.cos(math.pi / 2 * step / steps) ** 2)
        loss, error = vae_loss(vae, images, generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}", error=f"{error.item():.4f}")
        if (step + 1) % 250 == 0 or step + 1 == steps:
            save_state(state_file, {"model": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1})
    return vae.eval()


@torch.no_grad()
def calibrate(vae: Autoencoder, seed: int, count: int = 1024) -> None:
    """Brings each latent channel of captioned images to mean 0 and variance 1 in the transformer's space.

    The affine map is folded into the encoder's last and the decoder's first convolution, so images decode as before
    (but for the decoder's zero padding, which `polish_decoder` then learns).
    """
    rng = np.random.default_rng([seed, 4])
    latents = encode(vae, np.stack([draw(sample_scene(rng)) for _ in range(count)]))
    mean, gain = latents.mean(dim=(0, 2, 3)), 1 / latents.std(dim=(0, 2, 3))
    offset = SHIFT * (1 - gain) - gain * mean / SCALE  # z' = gain · z + offset
    channels = len(gain)
    last, first = vae.encoder.conv_out, vae.decoder.conv_in
    assert last.bias is not None and first.bias is not None
    last.weight[:channels] *= gain[:, None, None, None]
    last.bias[:channels] = last.bias[:channels] * gain + offset
    last.bias[channels:] += 2 * gain.log()
    first.weight /= gain[None, :, None, None]
    first.bias -= (first.weight * offset[None, :, None, None]).sum(dim=(1, 2, 3))


def polish_decoder(vae: Autoencoder, work: Path, seed: int, steps: int, batch: int = 16) -> None:
    """Trains the decoder alone, in place, on whole images: sharper shapes, while all latents stay as they are."""
    state_file, start = work / "decoder.pt", 0
    optimizer = torch.optim.AdamW(vae.decoder.parameters(), lr=1e-3, weight_decay=1e-3, betas=(0.9, 0.99))
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        vae.decoder.load_state_dict(state["decoder"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    if start >= steps:
        return
    pool = image_pool(6_000, 0.6, np.random.default_rng([seed, 5]))
    for step in (bar := tqdm(range(start, steps), initial=start, total=steps, desc="decoder", mininterval=5)):
        rng = np.random.default_rng([seed, 6, step])
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        pixels = crops(pool, batch, SIZE, rng)
        images, latents = to_tensor(pixels), encode(vae, pixels).clone()
        latents += (
            0.15 * torch.rand(batch, 1, 1, 1, generator=generator) * torch.randn(latents.shape, generator=generator)
        )
        with torch.autocast("cpu", torch.bfloat16):
            decoded = _decoded(vae, latents)
        error = decoded.float() - images
        loss = error.abs().mean() + error.square().mean()
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, (step + 1) / 50) * (0.01 + 0.99 * math.cos(math.pi / 2 * step / steps) ** 2)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.decoder.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
        if (step + 1) % 250 == 0 or step + 1 == steps:
            save_state(
                state_file,
                {"decoder": vae.decoder.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1},
            )


def save_state(file: Path, state: dict) -> None:
    """Writes a checkpoint so that a kill in between leaves the previous one."""
    torch.save(state, file.with_suffix(".new"))
    file.with_suffix(".new").replace(file)


@torch.inference_mode()
def encode(vae: Autoencoder, images: np.ndarray, batch: int = 64) -> Tensor:
    """Posterior means in the transformer's space: uint8 [N, H, W, 3] → float [N, 16, H/8, W/8]."""
    parts = [vae.encode(to_tensor(images[i : i + batch])).mean for i in range(0, len(images), batch)]
    return (torch.cat(parts) - SHIFT) * SCALE


@torch.inference_mode()
def decode(vae: Autoencoder, latents: Tensor, batch: int = 64) -> np.ndarray:
    """The inverse of `encode`: float [N, 16, h, w] → uint8 [N, 8h, 8w, 3]."""
    parts = [_decoded(vae, x) for x in latents.split(batch)]
    return to_images(torch.cat(parts))
