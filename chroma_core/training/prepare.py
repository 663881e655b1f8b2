"""Everything a job needs before its first step: pictures scanned, latents and text states on disk, T5 and VAE gone."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from ..data.cache import LatentTextCache, component_key
from ..data.samples import Progress as OnProgress
from ..data.samples import Sample, cache_samples, cache_texts, caption_texts
from ..data.scan import DatasetConfig, describe_skipped, scan
from ..loading.components import base_hash, load_text_encoder, load_vae
from ..loading.hub import model_folder
from ..text import TextEncoder
from .config import TrainingConfig
from .preview import preview_texts

Device = torch.device | str


@dataclass(frozen=True)
class Prepared:
    """What training reads: cached samples, held-out samples, and what to tell the user."""

    cache: LatentTextCache
    samples: list[Sample]
    heldout: list[Sample]
    base_sha256: str
    warnings: list[str]


def prepare(
    config: TrainingConfig,
    cache_folder: Path,
    device: Device,
    between: Callable[[], None],
    progress: OnProgress,
    before_load: Callable[[], None] = lambda: None,
) -> Prepared:
    """Scan and cache. Interrupted at any point, the next call continues where this one was.

    Args:
        between: called between entries; may wait or raise.
        before_load: called before a model component is loaded, e.g. to make room in memory.
    Raises:
        DataError, PromptError, ModelFileError: each with what to do.
    """
    prompts = preview_texts(config)
    scans = [scan(dataset) for dataset in _datasets(config)]
    folder = model_folder(config.model)
    cache = LatentTextCache(
        cache_folder,
        component_key(folder / "vae"),
        f"{component_key(folder / 'text_encoder')} {component_key(folder / 'tokenizer')} {config.model.text_precision}",
        config.recipe_value(),
    )
    warnings: list[str] = []
    sets: list[list[Sample]] = []
    for found in scans:
        samples, unreadable = cache_samples(
            found, cache, config.resolution, lambda: _borrowed_vae(config, device, before_load), between, progress
        )
        warnings += found.warnings
        if unreadable:
            warnings.append(f"Skipped while caching: {describe_skipped(unreadable)}.")
        sets.append(samples)
    heldout = sets[1][: config.validation_pictures] if len(sets) > 1 else []
    texts = [*caption_texts(sets[0]), *(sample.captions[0] for sample in heldout), *prompts]
    truncated = cache_texts(
        texts, cache, lambda: _borrowed_text_encoder(config, device, before_load), between, progress
    )
    if truncated:
        warnings.append(
            f"{len(truncated)} captions are longer than 512 tokens and were cut, e.g. “{truncated[0][:60]}…”."
        )
    progress("base model", 0, 1)
    between()
    return Prepared(cache, sets[0], heldout, base_hash(config.model), warnings)


def _datasets(config: TrainingConfig) -> list[DatasetConfig]:
    """The training set and, if there is one, the held-out set: seen once, upright, with the same trigger word."""
    if config.validation_dataset is None:
        return [config.dataset]
    heldout = config.validation_dataset
    trigger = heldout.trigger or config.dataset.trigger
    return [config.dataset, heldout.model_copy(update={"trigger": trigger, "repeats": 1, "flip": False})]


@contextmanager
def _borrowed_vae(config: TrainingConfig, device: Device, before_load: Callable[[], None]) -> Iterator[AutoencoderKL]:
    before_load()
    vae = load_vae(config.model, device)
    try:
        yield vae
    finally:
        del vae
        release_memory()


@contextmanager
def _borrowed_text_encoder(
    config: TrainingConfig, device: Device, before_load: Callable[[], None]
) -> Iterator[TextEncoder]:
    before_load()
    encoder = load_text_encoder(config.model, device)
    try:
        yield encoder
    finally:
        # The caller's `as` variable still names the model here: what is freed is its place on the accelerator.
        encoder.to("cpu")
        del encoder
        release_memory()


def release_memory() -> None:
    """Return what is no longer referenced to the accelerator."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
