"""Pictures made during training, by the one sampler with the job's recipe: what they show is what the LoRA gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..data.cache import LatentTextCache
from ..files import write_atomic
from ..latents import LatentFormat
from ..loading.components import load_vae
from ..pictures import decode, png_bytes
from ..sampling import sample
from ..text import apply_trigger
from ..transformer import ChromaTransformer
from .config import TrainingConfig


def preview_prompts(config: TrainingConfig) -> list[str]:
    """The prompts with `[trigger]` replaced. Raises PromptError when it is used without a trigger word."""
    return [apply_trigger(prompt, config.dataset.trigger) for prompt in config.previews.prompts]


def preview_texts(config: TrainingConfig) -> list[str]:
    """Everything that previews need encoded: prompts and, where guidance is used, the negative."""
    if not config.previews.prompts:
        return []
    negative = [apply_trigger(config.previews.negative, config.dataset.trigger)] if config.previews.guidance > 1 else []
    return [*preview_prompts(config), *negative]


def render_previews(
    config: TrainingConfig,
    step: int,
    folder: Path,
    transformer: ChromaTransformer,
    cache: LatentTextCache,
    metadata: dict[str, Any],
    between: Callable[[], None] = lambda: None,
) -> list[str]:
    """Sample every preview prompt into `folder` as step-000100-0.png; returns the file names.

    Args:
        metadata: what else to record in the files (job, model, LoRA settings).
        between: called between sampling steps; may wait or raise.
    """
    width, height = config.preview_size()
    recipe = config.recipe_value()
    negative = cache.text(preview_texts(config)[-1]) if config.previews.guidance > 1 else None
    vae = load_vae(config.model, transformer.x_embedder.weight.device)
    names = []
    for index, prompt in enumerate(preview_prompts(config)):
        between()
        settings = config.previews.sampling(index)
        latents = sample(
            transformer,
            [cache.text(prompt)],
            negative,
            width=width,
            height=height,
            settings=settings,
            recipe=recipe,
            latent_format=LatentFormat.of(vae),
            on_step=lambda _: between(),
        )
        record = {
            "prompt": prompt,
            "negative": config.previews.negative,
            "width": width,
            "height": height,
            "settings": settings.to_dict(),
            "recipe": recipe.to_dict(),
            "model": config.model.to_dict(),
            "step": step,
            **metadata,
        }
        names.append(f"step-{step:06d}-{index}.png")
        write_atomic(folder / names[-1], png_bytes(decode(vae, latents)[0], record))
    del vae
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return names
