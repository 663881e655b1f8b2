"""The one sampler: previews, the sampler node, the command line and the parity check all run `sample`.

Shapes: B images, C latent channels, H/W latent rows and columns, L image tokens, D packed channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated, Any, get_args

import torch
from torch import Tensor

from ..errors import ConfigError, check_choice
from ..model.device import check_finite
from ..model.first_block_cache import FirstBlockCache
from ..model.latents import FLUX_LATENTS, PATCH, LatentFormat, image_ids, pack, snap_size, unpack
from ..model.transformer import ChromaTransformer
from ..options import MAX_SEED, Option, identity
from .recipe import CANONICAL, Recipe, StateDtype
from .schedule import FlowShift, Spacing, sampling_sigmas
from .solvers import SOLVERS, Method, Velocity
from .text import TextCondition, batch_conditions


@dataclass(frozen=True)
class SamplingSettings:
    """What a user sets for one run. `flow_shift` None takes the recipe's; row i of a batch uses `seed` + i.

    `start_step` and `end_step` (None: the last) run a part of the schedule, and without `add_noise` the latents to
    start from have their noise in them already: a run in two parts is the whole run (see `sample`).
    """

    steps: Annotated[int, Option("20 for a preview, 25 to 32 for quality.", least=1, most=150)] = 25
    guidance: Annotated[
        float,
        Option(
            "How strongly to follow the prompt. 1 or less: one pass a step, twice as fast (flash).",
            least=0,
            most=20,
            step=0.1,
        ),
    ] = 4.0
    seed: Annotated[
        int, Option("The noise to start from. Image i of a batch uses seed + i.", least=0, most=MAX_SEED)
    ] = 42
    tail_bias: Annotated[
        float,
        Option(
            "0: even steps. Towards 1, steps crowd at both ends: composition and fine detail get more, the middle "
            "fewer.",
            least=0,
            most=1,
            step=0.05,
        ),
    ] = 0.0
    flow_shift: Annotated[
        FlowShift | None, Option("dynamic: by resolution. A number: by that. none: no shift. Unset: the recipe's.")
    ] = None
    method: Annotated[
        Method,
        Option(
            "euler is what previews use by default. heun is more exact and takes twice as long. dpmpp_2m and unipc are "
            "more exact at euler's cost: for few steps.",
            advanced=True,
        ),
    ] = "euler"
    denoise: Annotated[
        float,
        Option(
            "Below 1, start from the latent with that much noise on it instead of from pure noise.",
            least=0.01,
            most=1,
            step=0.01,
        ),
    ] = 1.0
    spacing: Annotated[
        Spacing,
        Option(
            "linear: even steps. beta: more of them at both ends, as ComfyUI's beta scheduler has it.", advanced=True
        ),
    ] = "linear"
    start_step: Annotated[
        int,
        Option(
            "Begin at this step of the schedule. The latent gets as much noise as belongs there.",
            least=0,
            most=149,
            advanced=True,
        ),
    ] = 0
    end_step: Annotated[
        int | None,
        Option(
            "Stop at this step and leave the noise in the latent, for a sampler that goes on. Unset: to the end.",
            least=0,
            most=150,
            advanced=True,
        ),
    ] = None
    add_noise: Annotated[
        bool,
        Option("Off: the latent has noise in it already, left by a sampler that stopped at end_step.", advanced=True),
    ] = True
    first_block_cache: Annotated[
        float,
        Option(
            "Above 0: approximate and faster. Passes end after the first block while what it adds changes by less than "
            "this share; 0.1 is usual. On tiny, fewer steps saved as much with a smaller error. 0: exact, as previews.",
            least=0,
            most=1,
            step=0.01,
            advanced=True,
            since="0.1",
        ),
    ] = 0.0

    def __post_init__(self) -> None:
        check_choice("The sampling method", self.method, get_args(Method))
        if not 0 <= self.guidance <= 100:
            raise ConfigError(f"The guidance is {self.guidance}; it must be between 0 and 100 (1 or less: one pass).")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"The seed is {self.seed}; it must be a whole number from 0 to 2^63 − 1.")
        if not 0 <= self.first_block_cache <= 1:
            raise ConfigError(
                f"The threshold of the first-block cache is {self.first_block_cache}; it must be between 0 (off) and 1."
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as recorded beside every image; without options that came later and are at their default."""
        return identity(self, asdict(self))

    def sigmas(self, image_tokens: int, recipe: Recipe = CANONICAL) -> Tensor:
        """The noise levels of the run, as `schedule.sampling_sigmas` gives them. Raises ConfigError."""
        return sampling_sigmas(
            self.steps,
            image_tokens,
            tail_bias=self.tail_bias,
            flow_shift=recipe.flow_shift if self.flow_shift is None else self.flow_shift,
            denoise=self.denoise,
            spacing=self.spacing,
            start_step=self.start_step,
            end_step=self.end_step,
        )

    @property
    def run_steps(self) -> int:
        """How many steps the run takes."""
        end = self.steps if self.end_step is None else min(self.end_step, self.steps)
        return max(0, end - self.start_step)


def image_record(
    prompt: str, negative: str, size: tuple[int, int], settings: SamplingSettings, recipe: Recipe, model: dict[str, Any]
) -> dict[str, Any]:
    """What an image says of itself, as JSON values: everything needed to sample it again (`parity` does).

    Args:
        size: width and height in pixels.
        model: `ModelSpec.to_dict()`.
    """
    return {
        "prompt": prompt,
        "negative": negative,
        "width": size[0],
        "height": size[1],
        "settings": settings.to_dict(),
        "recipe": recipe.to_dict(),
        "model": model,
    }


@dataclass(frozen=True)
class StepInfo:
    """What a progress callback gets after each step (counted from 1): σ left, the image as predicted now, and the share
    of the passes so far that the first-block cache has cut short."""

    step: int
    steps: int
    sigma: float
    denoised_BCHW: Tensor
    cut_short: float = 0.0


OnStep = Callable[[StepInfo], object]


def initial_noise(seeds: Sequence[int], shape_CHW: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Noise [B, C, H, W] in fp32, one generator a row, drawn on the CPU in `dtype`, so that every device agrees."""
    rows = [
        torch.randn((1, *shape_CHW), generator=torch.Generator("cpu").manual_seed(seed), dtype=dtype) for seed in seeds
    ]
    return torch.cat(rows).float()


_REMEDY = (
    "Take LoRAs off, or lower their strengths; choose bf16 instead of fp16. If it stays so, the transformer's file is "
    "damaged: fetch it again."
)


@torch.no_grad()
def sample(
    transformer: ChromaTransformer,
    positive: Sequence[TextCondition],
    negative: Sequence[TextCondition] | TextCondition | None,
    *,
    width: int,
    height: int,
    settings: SamplingSettings,
    recipe: Recipe = CANONICAL,
    latent_format: LatentFormat = FLUX_LATENTS,
    start_BCHW: Tensor | None = None,
    noise_mask_BHW: Tensor | None = None,
    sigmas: Tensor | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Sample latents [B, C, H, W] in the transformer's space, fp32, on the transformer's device.

    A run that ends at a σ above 0 returns x/(1−σ), as ComfyUI hands on latents with noise left in them; a run that
    starts there from such latents, without adding noise, goes on where it stopped.

    Args:
        positive, negative: one condition an image (a single negative serves all). Without a negative, or with
            guidance ≤ 1, each step is one pass; otherwise v = u + g(c − u).
        width, height: pixels; floored to the recipe's multiple.
        start_BCHW: latents to start from (image-to-image, inpainting), in the transformer's space.
        noise_mask_BHW: 1 where the image may change, 0 where `start_BCHW` is kept; latent resolution. In between, the
            prediction is mixed with `start_BCHW` at every step, so that the steps' number does not change the mixture.
        sigmas: a ready schedule (descending) instead of the settings' own.
        on_step: called after every step; an exception from it ends the run.
    Raises:
        ConfigError: sizes, steps or shapes that cannot work, named.
        NotFiniteError: the transformer gives NaN or infinite numbers, looked for after the first and the last step.
    """
    device = next(transformer.parameters()).device
    model_dtype = transformer.x_embedder.weight.dtype
    dtypes: dict[StateDtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "model": model_dtype}
    width, height = snap_size(width, height, recipe.size_multiple)
    rows, columns = height // latent_format.downscale, width // latent_format.downscale
    tokens = (rows // PATCH) * (columns // PATCH)
    B = len(positive)
    if B == 0:
        raise ConfigError("There is nothing to sample: the batch holds no prompt.")
    if start_BCHW is not None and start_BCHW.shape != (B, latent_format.channels, rows, columns):
        raise ConfigError(
            f"The latents to start from have shape {tuple(start_BCHW.shape)}; for {B} image(s) of {width}×{height} "
            f"it must be {(B, latent_format.channels, rows, columns)}."
        )
    begin, last = settings.start_step, settings.steps - 1
    if sigmas is None:
        sigmas = settings.sigmas(tokens, recipe)
    else:
        begin, last = 0, len(sigmas) - 2
    levels = [float(sigma) for sigma in sigmas]
    _check_part(levels, settings, start_BCHW, noise_mask_BHW)
    caches = _caches(transformer, settings.first_block_cache)
    predict = _guided(
        transformer, positive, negative, settings.guidance, rows, columns, dtypes[recipe.time_dtype], caches
    )

    shape = (latent_format.channels, rows, columns)
    noise = initial_noise([settings.seed + i for i in range(B)], shape, dtypes[recipe.noise_dtype]).to(device)
    if not settings.add_noise:
        noise = torch.zeros_like(noise)
    start = torch.zeros_like(noise) if start_BCHW is None else start_BCHW.to(device, torch.float32)
    if start_BCHW is not None:
        check_finite(start, "The image or latents to start from", "Look at the node or file that made them.")
    mask = None if noise_mask_BHW is None else noise_mask_BHW.to(device, torch.float32)[:, None]
    if mask is not None:
        predict = _masked(predict, mask, start, noise)
    solver = SOLVERS[settings.method](levels, predict, recipe.multistep_time)
    steps = len(levels) - 1
    x = _noised(start, noise, levels[0])
    for i in range(steps):
        x = x.to(dtypes[recipe.latents_dtype]).float()
        if transformer.at_step((begin + i) / max(1, last)):
            for each in caches:
                each.forget()
        velocity = predict(x, levels[i])
        denoised = x - levels[i] * velocity
        x = solver.step(i, x, velocity)
        if i in (0, steps - 1):
            what = f"What the transformer gives at step {i + 1} of {steps} (noise level {levels[i]:.3g})"
            check_finite(x, what, _REMEDY)
        if on_step is not None:
            cut_short = sum(each.left_out for each in caches) / max(1, sum(each.passes for each in caches))
            on_step(StepInfo(i + 1, steps, levels[i + 1], denoised, cut_short))
    if levels[-1] > 0:
        return x / (1 - levels[-1])
    return x if mask is None else torch.where(mask == 0, start, x)


def _check_part(levels: list[float], settings: SamplingSettings, start: Tensor | None, mask: Tensor | None) -> None:
    """Raises ConfigError for a run that could not mean anything."""
    if not levels[-1] < 1:
        raise ConfigError("The run would end at a noise level of 1, pure noise. Raise end_step.")
    if settings.add_noise:
        return
    if start is None or not levels[0] < 1:
        raise ConfigError(
            "Without add_noise a run goes on from latents that have noise in them: link the latents of the first part, "
            "and set start_step to the first part's end_step."
        )
    if mask is not None:
        raise ConfigError(
            "A noise mask keeps parts of a clean image, but without add_noise the latents to start from are noisy. "
            "Sample masked images in one run, or take the mask off."
        )


def _caches(transformer: ChromaTransformer, threshold: float) -> tuple[FirstBlockCache, ...]:
    """A first-block cache for each pass of a step, none at a threshold of 0. They live as long as the run.

    Raises ConfigError for a model without a second block.
    """
    if threshold == 0:
        return ()
    blocks = len(transformer.transformer_blocks) + len(transformer.single_transformer_blocks)
    if blocks < 2:
        raise ConfigError(
            f"The first-block cache leaves out all blocks but the first, and this model has {blocks}. Set "
            "first_block_cache to 0."
        )
    return FirstBlockCache(threshold), FirstBlockCache(threshold)


def _noised(x0: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """The flow's point at σ: (1−σ)·x₀ + σ·ε."""
    return (1 - sigma) * x0 + sigma * noise


def _masked(velocity: Velocity, mask_B1HW: Tensor, start: Tensor, noise: Tensor) -> Velocity:
    """The velocity towards a prediction that is `start` where the mask is 0 (the rule of ComfyUI's inpainting).

    The transformer sees the mixture, by the mask, of x and of `start` at the same noise level; its prediction is mixed
    with `start` in the same way.
    """
    kept = 1 - mask_B1HW

    def masked(x: Tensor, sigma: float) -> Tensor:
        seen = mask_B1HW * x + kept * _noised(start, noise, sigma)
        denoised = mask_B1HW * (seen - sigma * velocity(seen, sigma)) + kept * start
        return (x - denoised) / sigma

    return masked


def _guided(
    transformer: ChromaTransformer,
    positive: Sequence[TextCondition],
    negative: Sequence[TextCondition] | TextCondition | None,
    guidance: float,
    rows: int,
    columns: int,
    time_dtype: torch.dtype,
    caches: Sequence[FirstBlockCache],
) -> Velocity:
    """The guided velocity, fp32 in and out; `caches`: of the pass with the prompt, and of that with the negative."""
    weight = transformer.x_embedder.weight
    prompts = [positive]
    if negative is not None and guidance > 1:
        if isinstance(negative, TextCondition):
            negative = [negative] * len(positive)
        if len(negative) != len(positive):
            raise ConfigError(
                f"There are {len(positive)} prompts but {len(negative)} negative prompts; give one or as many."
            )
        prompts.append(negative)
    passes = [
        (states.to(weight.device, weight.dtype), None if mask is None else mask.to(weight.device))
        for states, mask in map(batch_conditions, prompts)
    ]
    ids = image_ids(rows, columns, weight.device)
    through_passes = [partial(transformer, cache=cache) for cache in caches] or [transformer] * 2

    def guided(x_BCHW: Tensor, sigma: float) -> Tensor:
        B = x_BCHW.shape[0]
        latents = pack(x_BCHW).to(weight.dtype)
        time = torch.tensor([sigma], dtype=time_dtype, device=x_BCHW.device).float()
        modulation = transformer.modulation(time).expand(B, -1, -1)
        predictions = [
            through(latents, text, time.expand(B), ids, mask, modulation).float()
            for through, (text, mask) in zip(through_passes, passes, strict=False)
        ]
        velocity = predictions[0]
        if len(predictions) == 2:
            velocity = predictions[1] + guidance * (predictions[0] - predictions[1])
        return unpack(velocity, rows, columns)

    return guided
