"""Images made during training, by the one sampler with the job's recipe: what they show is what the LoRA gives."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor

from ...data.cache import LatentTextCache
from ...files import write_atomic
from ...loading.load import load_vae
from ...model.device import release_memory
from ...model.images import LATENTS_SUFFIX, decode, latents_bytes, png_bytes
from ...model.latents import LatentFormat
from ...model.transformer import ChromaTransformer
from ...sampling.sampler import image_record, sample
from ...streaming import away
from ..config import TrainingConfig


def preview_texts(config: TrainingConfig) -> list[str]:
    """Everything that previews need encoded: prompts and, where guidance is used, negatives."""
    previews = config.preview_list()
    negatives = [preview.negative for preview in previews if preview.settings.guidance > 1]
    return list(dict.fromkeys([*(preview.prompt for preview in previews), *negatives]))


def render_previews(
    config: TrainingConfig,
    step: int,
    folder: Path,
    transformer: ChromaTransformer,
    cache: LatentTextCache,
    metadata: dict[str, Any],
    between: Callable[[], None] = lambda: None,
    write: bool = True,
) -> list[str]:
    """Sample every preview prompt into `folder` as step-000100-0.png, its latents beside it; returns the names.

    Args:
        metadata: what else to record in the files (job, model, LoRA settings).
        between: called between sampling steps; may wait or raise.
        write: False for a process that only helps to sample: it writes nothing and returns no names.
    """
    recipe = config.recipe_value()
    device = transformer.x_embedder.weight.device
    sampled: list[tuple[Tensor, dict[str, Any]]] = []
    for preview in config.preview_list():
        between()
        latents = sample(
            transformer,
            [cache.text(preview.prompt)],
            cache.text(preview.negative) if preview.settings.guidance > 1 else None,
            width=preview.width,
            height=preview.height,
            settings=preview.settings,
            recipe=recipe,
            on_step=lambda _: between(),
        )
        size = preview.width, preview.height
        record = image_record(preview.prompt, preview.negative, size, preview.settings, recipe, config.model.to_dict())
        record |= {"step": step, **metadata}
        sampled.append((latents, record))
    if not write:
        return []
    # With offloading they take turns: decoding a large image needs as much memory as the transformer.
    with away(transformer, device) if config.model.offload != "none" else nullcontext():
        vae = load_vae(config.model, device)
        names = [f"step-{step:06d}-{index}.png" for index in range(len(sampled))]
        for name, (latents, record) in zip(names, sampled, strict=True):
            # The latents first: an image that is there can be compared to the last bit (see `parity`).
            write_atomic((folder / name).with_suffix(LATENTS_SUFFIX), latents_bytes(latents, LatentFormat.of(vae)))
            write_atomic(folder / name, png_bytes(decode(vae, latents)[0], record))
        gone = weakref.ref(vae)
        del vae
        release_memory([gone])
    return names
