"""What training minimises, and the held-out loss that tells whether it helps.

Rectified flow (Lipman et al. 2023; Liu et al. 2023): x_t = (1−σ)·x₀ + σ·ε, and the model predicts the velocity ε − x₀.
The mean squared error is fp32 whatever the model computes in. Shapes: B samples, C latent channels, H/W latent rows and
columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.randomness import generator
from ..latents import image_ids, pack, unpack
from ..text import TextCondition, batch_conditions
from ..transformer import ChromaTransformer

HELDOUT_SIGMAS = tuple(round(0.05 + 0.1 * i, 2) for i in range(10))
"""The fixed noise levels of the held-out loss: .05, .15 … .95, so that every band of σ weighs the same."""

HELDOUT_SEED = 20_240_817
"""Noise of the held-out loss; the same in every job, so that jobs can be compared."""


def add_noise(x0_BCHW: Tensor, noise_BCHW: Tensor, sigma_B: Tensor) -> Tensor:
    """The flow's point at σ: (1−σ)·x₀ + σ·ε."""
    sigma = sigma_B.view(-1, 1, 1, 1)
    return (1 - sigma) * x0_BCHW + sigma * noise_BCHW


def training_target(x0_BCHW: Tensor, noise_BCHW: Tensor) -> Tensor:
    """The velocity that the model should predict: ε − x₀."""
    return noise_BCHW - x0_BCHW


def loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error in fp32; a scalar."""
    return F.mse_loss(prediction.float(), target.float())


def predict_velocity(
    transformer: ChromaTransformer, x_BCHW: Tensor, sigma_B: Tensor, conditions: Sequence[TextCondition]
) -> Tensor:
    """The model's velocity [B, C, H, W] in fp32; inputs are cast to the model's dtype, σ stays fp32."""
    weight = transformer.x_embedder.weight
    states, mask = batch_conditions(conditions)
    rows, columns = x_BCHW.shape[-2:]
    velocity = transformer(
        pack(x_BCHW).to(weight.device, weight.dtype),
        states.to(weight.device, weight.dtype),
        sigma_B.to(weight.device),
        image_ids(rows, columns, weight.device),
        None if mask is None else mask.to(weight.device),
    )
    return unpack(velocity.float(), rows, columns)


@torch.no_grad()
def heldout_loss(
    transformer: ChromaTransformer,
    pictures: Sequence[tuple[Tensor, TextCondition]],
    between: Callable[[], None] = lambda: None,
) -> list[float]:
    """The loss at each of `HELDOUT_SIGMAS`, averaged over (latents [C, H, W], condition) pairs.

    Picture i always meets the same noise, at all noise levels: two calls differ only by the weights. `between` is
    called before every picture and may raise.
    """
    device = transformer.x_embedder.weight.device
    sigmas_B = torch.tensor(HELDOUT_SIGMAS, device=device)
    total = torch.zeros(len(HELDOUT_SIGMAS), dtype=torch.float64)
    for i, (x0_CHW, condition) in enumerate(pictures):
        between()
        noise = torch.randn(x0_CHW.shape, generator=generator(HELDOUT_SEED, "heldout", i))
        x0 = x0_CHW.to(device).expand(len(sigmas_B), -1, -1, -1)
        noise = noise.to(device).expand_as(x0)
        velocity = predict_velocity(transformer, add_noise(x0, noise, sigmas_B), sigmas_B, [condition] * len(sigmas_B))
        errors = (velocity - training_target(x0, noise)).square().mean(dim=(1, 2, 3))
        total += errors.double().cpu()
    return (total / len(pictures)).tolist()
