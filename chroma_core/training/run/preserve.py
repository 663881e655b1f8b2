"""What `[preserve]` needs before the first step: the texts of its second passes, and images of its prompts by the base.

The images are sampled once, as latents, and stay in the cache: whoever resumes the job, or makes another with the same
base, recipe and size, trains on the same bits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from ...data.cache import LatentTextCache
from ...data.captions import without_trigger
from ...data.order import generator
from ...data.samples import Progress as OnProgress
from ...lora.adapters import adapters_disabled
from ...model.flavours import flavour
from ...model.latents import snap_size
from ...model.transformer import ChromaTransformer
from ...sampling.sampler import SamplingSettings, sample
from ..config import TrainingConfig
from ..config.preserve import Preserved

NEGATIVE = ""


@dataclass(frozen=True)
class Generated:
    """An image of a preserved prompt: the settings that the base samples it with, and the entry of its latents."""

    prompt: str
    settings: SamplingSettings
    latents: Path


def preserved_captions(kind: Preserved, caption: str, config: TrainingConfig) -> tuple[str, ...]:
    """Those of which a second pass has one on a sample that the step trains with `caption`."""
    if kind == "prompts":
        return config.preserve.prompts
    return ("" if kind == "blank" else without_trigger(caption, config.triggers, config.preserve.class_word),)


def preserved_texts(config: TrainingConfig, captions: Sequence[str]) -> list[str]:
    """Every text of the second passes of a job that trains with `captions`, and what their images are sampled with."""
    kinds = config.preserve.weights
    texts = [text for kind in kinds for caption in captions for text in preserved_captions(kind, caption, config)]
    return list(dict.fromkeys([*texts, *([NEGATIVE] if "prompts" in kinds else [])]))


def generated_size(config: TrainingConfig) -> tuple[int, int]:
    """Width and height of the generated images in pixels: a square of the main set's largest resolution."""
    side = max(config.dataset.sizes(config.resolution))
    return snap_size(side, side, config.recipe_value().size_multiple)


def planned(config: TrainingConfig, cache: LatentTextCache, base_sha256: str) -> list[Generated]:
    """The images of all prompts, generated or not.

    Steps and guidance are what the flavour's author recommends. The previews' would not do: they may be changed while
    the job goes on, and what it trains on may not. The seed follows from the prompt, so that jobs share the images.
    """
    if "prompts" not in config.preserve.weights:
        return []
    of, spec, size = flavour(config.model.flavour), config.model, generated_size(config)
    model = [base_sha256, spec.precision, spec.compute, cache.text_key]
    found = []
    for prompt, number in product(config.preserve.prompts, range(config.preserve.images)):
        seed = generator(0, f"preserve/{prompt}", number).initial_seed()
        settings = SamplingSettings(of.steps, of.guidance, seed)
        about = [model, prompt, size, settings.to_dict(), config.recipe_value().to_dict()]
        found.append(Generated(prompt, settings, cache.generated_path(json.dumps(about, sort_keys=True))))
    return found


def generate(
    images: Sequence[Generated],
    config: TrainingConfig,
    transformer: ChromaTransformer,
    cache: LatentTextCache,
    between: Callable[[], None],
    progress: OnProgress,
    write: bool = True,
) -> None:
    """Sample those that the cache lacks by the model without its adapter.

    Args:
        between: called between sampling steps; may wait or raise. What is finished by then is kept.
        write: False for a process that only helps to sample.
    """
    missing = [image for image in images if cache.about(image.latents) is None]
    width, height = generated_size(config)
    for done, image in enumerate(missing):
        between()
        progress("images of preserved prompts", done, len(missing))
        with adapters_disabled(transformer):
            latents = sample(
                transformer,
                [cache.text(image.prompt)],
                cache.text(NEGATIVE),
                width=width,
                height=height,
                settings=image.settings,
                recipe=config.recipe_value(),
                on_step=lambda _: between(),
            )
        if write:
            cache.add_generated(image.latents, latents[0])
