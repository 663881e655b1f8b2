"""What training minimises, and the held-out loss that tells whether it helps.

Rectified flow (Lipman et al. 2023; Liu et al. 2023): x_t = (1−σ)·x₀ + σ·ε, and the model predicts the velocity ε − x₀.
The error is fp32 whatever the model computes in. Shapes: B samples, C latent channels, H/W latent rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ...data.order import generator
from ...lora.adapters import adapters_disabled
from ...model.latents import image_ids, pack, unpack
from ...model.transformer import ChromaTransformer
from ...sampling.text import TextCondition, batch_conditions

LossKind = Literal["mse", "huber"]
GuidanceMode = Literal["none", "constant", "random-range"]

HELDOUT_SIGMAS = tuple(round(0.05 + 0.1 * i, 2) for i in range(10))
"""The fixed noise levels of the held-out loss: .05, .15 … .95, so that every band of σ weighs the same."""

HELDOUT_SEED = 20_240_817
"""Noise of the held-out loss; the same in every job, so that jobs can be compared."""


def draw_noise(shape: Sequence[int], seed: int, step: int, row: int, offset: float = 0.0) -> Tensor:
    """Standard normal noise [C, H, W] of row `row` of a step; with `offset` o, plus o·N(0,1), constant in each channel.

    The offset (Guttenberg 2023, "Diffusion with Offset Noise") lets training change the mean brightness and colour of a
    image, which plain noise hardly touches. It is a draw of its own: the rest of the noise does not depend on it.
    """
    noise = torch.randn(tuple(shape), generator=generator(seed, "noise", step, row))
    if offset:
        noise += offset * torch.randn(shape[0], 1, 1, generator=generator(seed, "noise offset", step, row))
    return noise


def pair_noise(latents_BCHW: Tensor, noise_BCHW: Tensor) -> Tensor:
    """The same noises in the order in which Σ ‖x₀ − ε‖² over the batch is smallest.

    Minibatch optimal transport (Pooladian et al. 2023, "Multisample Flow Matching"; Tong et al. 2023, "Improving and
    generalizing flow-based generative models with minibatch optimal transport"): straighter paths, less variance in the
    target. Each noise is still used once, so that over a batch it stays what was drawn. A batch of one is unchanged;
    the gain grows with the batch.
    """
    from scipy.optimize import linear_sum_assignment

    x0, noise = latents_BCHW.flatten(1).double(), noise_BCHW.flatten(1).double()
    # ‖x₀ − ε‖² = ‖x₀‖² + ‖ε‖² − 2x₀·ε, and the squares are in every assignment.
    return noise_BCHW[linear_sum_assignment((-x0 @ noise.T).numpy())[1]]


def add_noise(x0_BCHW: Tensor, noise_BCHW: Tensor, sigma_B: Tensor) -> Tensor:
    """The flow's point at σ: (1−σ)·x₀ + σ·ε."""
    sigma = sigma_B.view(-1, 1, 1, 1)
    return (1 - sigma) * x0_BCHW + sigma * noise_BCHW


def training_target(x0_BCHW: Tensor, noise_BCHW: Tensor) -> Tensor:
    """The velocity that the model should predict: ε − x₀."""
    return noise_BCHW - x0_BCHW


def squared_errors(prediction: Tensor, target: Tensor, kind: LossKind = "mse", delta: float = 0.1) -> Tensor:
    """The error of every element in fp32: a² for `mse`; for `huber`, with δ = `delta`, 2δ²·(√(1 + (a/δ)²) − 1).

    The latter is the pseudo-Huber loss (Charbonnier et al. 1997; Song & Dhariwal 2023 for training generative models)
    times 2, so that it equals a² for |a| ≪ δ (less a⁴/4δ² at first) and grows like 2δ|a| for |a| ≫ δ: outliers pull
    less.
    """
    if kind == "mse":
        return F.mse_loss(prediction.float(), target.float(), reduction="none")
    squares = (prediction.float() - target.float()).square()
    # The same number without the difference of two almost equal ones: √(1+u²) − 1 = u² / (√(1+u²) + 1).
    return 2 * squares / (1 + (1 + squares / delta**2).sqrt())


def loss(
    prediction: Tensor,
    target: Tensor,
    kind: LossKind = "mse",
    delta: float = 0.1,
    mask_B1HW: Tensor | None = None,
    weight_B: Tensor | None = None,
) -> Tensor:
    """The mean of `squared_errors` over everything, in fp32; a scalar.

    Args:
        mask_B1HW: weights 0..1 at latent resolution, divided by their mean over the sample, so that a sample with a
            small mask counts like any other. A mask that is 1 everywhere gives the loss without a mask, bit for bit; a
            sample whose mask is 0 everywhere adds nothing.
        weight_B: weight of each sample. The mean is over B all the same: halving all weights halves the loss.
    """
    if mask_B1HW is not None and bool((mask_B1HW == 1).all()):
        mask_B1HW = None
    if kind == "mse" and mask_B1HW is None and weight_B is None:
        return F.mse_loss(prediction.float(), target.float())
    errors = squared_errors(prediction, target, kind, delta)
    if mask_B1HW is not None:
        mask = mask_B1HW.float()
        mean = mask.mean(dim=(2, 3), keepdim=True)
        errors = errors * mask / torch.where(mean > 0, mean, 1.0)
    if weight_B is not None:
        errors = errors * weight_B.view(-1, 1, 1, 1)
    return errors.mean()


def predict_velocity(
    transformer: ChromaTransformer,
    x_BCHW: Tensor,
    sigma_B: Tensor,
    conditions: Sequence[TextCondition],
    guidance_B: Tensor | None = None,
) -> Tensor:
    """The model's velocity [B, C, H, W] in fp32; inputs are cast to the model's dtype, σ and guidance stay fp32."""
    weight = transformer.x_embedder.weight
    states, mask = batch_conditions(conditions)
    rows, columns = x_BCHW.shape[-2:]
    velocity = transformer(
        pack(x_BCHW).to(weight.device, weight.dtype),
        states.to(weight.device, weight.dtype),
        sigma_B.to(weight.device),
        image_ids(rows, columns, weight.device),
        None if mask is None else mask.to(weight.device),
        guidance_B=guidance_B,
    )
    return unpack(velocity.float(), rows, columns)


@torch.no_grad()
def base_velocity(
    transformer: ChromaTransformer,
    x_BCHW: Tensor,
    sigma_B: Tensor,
    conditions: Sequence[TextCondition],
    guidance_B: Tensor | None = None,
) -> Tensor:
    """What the model without its adapter predicts: the target of what is to stay as it is.

    The loss then measures how far the adapter has moved the model there, and is 0 before the first step. DreamBooth
    (Ruiz et al. 2023, eq. 2) trains on images that the frozen model made; this asks the frozen model itself, for one
    more forward pass. Knowledge distillation into the same model, as in Li & Hoiem 2016, "Learning without Forgetting".
    """
    with adapters_disabled(transformer):
        return predict_velocity(transformer, x_BCHW, sigma_B, conditions, guidance_B)


def with_prior_targets(
    target_BCHW: Tensor,
    regularisation_B: Tensor,
    transformer: ChromaTransformer,
    x_BCHW: Tensor,
    sigma_B: Tensor,
    conditions: Sequence[TextCondition],
    guidance_B: Tensor | None = None,
    everywhere: bool = False,
) -> Tensor:
    """The targets with those of the rows flagged in `regularisation_B` replaced by `base_velocity`: prior preservation.

    everywhere: pass forward even without such rows: other processes do, and a divided model needs them all.
    """
    rows = regularisation_B.nonzero().flatten().tolist()
    if not rows:
        if everywhere:
            base_velocity(transformer, x_BCHW, sigma_B, conditions, guidance_B)
        return target_BCHW
    target = target_BCHW.clone()
    target[rows] = base_velocity(
        transformer,
        x_BCHW[rows],
        sigma_B[rows],
        [conditions[row] for row in rows],
        None if guidance_B is None else guidance_B[rows],
    )
    return target


@torch.no_grad()
def heldout_loss(
    transformer: ChromaTransformer,
    images: Sequence[tuple[Tensor, TextCondition]],
    between: Callable[[], None] = lambda: None,
    rows: int = len(HELDOUT_SIGMAS),
) -> list[float]:
    """The loss at each of `HELDOUT_SIGMAS`, averaged over (latents [C, H, W], condition) pairs.

    Image i always meets the same noise, at all noise levels: two calls differ only by the weights. `between` is
    called before every image and may raise. rows: noise levels in one pass; fewer take less memory, and change the
    result by rounding alone.
    """
    device = transformer.x_embedder.weight.device
    sigmas_B = torch.tensor(HELDOUT_SIGMAS, device=device)
    total = torch.zeros(len(HELDOUT_SIGMAS), dtype=torch.float64)
    for i, (x0_CHW, condition) in enumerate(images):
        between()
        noise = torch.randn(x0_CHW.shape, generator=generator(HELDOUT_SEED, "heldout", i)).to(device)[None]
        x0, errors = x0_CHW.to(device)[None], []
        target = training_target(x0, noise)
        for sigma_B in sigmas_B.split(rows):
            x = add_noise(x0, noise, sigma_B)
            velocity = predict_velocity(transformer, x, sigma_B, [condition] * len(sigma_B))
            errors.append((velocity - target).square().mean(dim=(1, 2, 3)))
        total += torch.cat(errors).cpu().double()
    return (total / len(images)).tolist()
