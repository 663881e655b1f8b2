"""Everything a job needs before its first step: pictures scanned, latents and text states on disk, T5 and VAE gone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from ...data.cache import LatentTextCache, component_key
from ...data.samples import Progress as OnProgress
from ...data.samples import Sample, SampleSet, cache_samples, cache_texts, caption_texts, combine
from ...data.scan import DatasetConfig, describe_skipped, scan
from ...loading.load import load_text_encoder, load_vae
from ...loading.model_files import base_hash, locate
from ...model.device import release_memory
from ...sampling.text import TextEncoder
from ..config.config import TrainingConfig
from ..device_slot import Seat
from .preview import preview_texts


@dataclass(frozen=True)
class Prepared:
    """What training reads: cached samples, held-out samples, and what to tell the user.

    `training_cache` holds the captions' text states as training conditions on them, `cache` as sampling does.
    """

    cache: LatentTextCache
    training_cache: LatentTextCache
    samples: list[Sample]
    heldout: list[Sample]
    base_sha256: str
    warnings: list[str]


def prepare(
    config: TrainingConfig,
    cache_folder: Path,
    seat: Seat,
    between: Callable[[], None],
    progress: OnProgress,
) -> Prepared:
    """Scan and cache. Interrupted at any point, the next call continues where this one was.

    Args:
        seat: the job's place on the device, which VAE and T5 take one after the other.
        between: called between entries; may wait or raise.
    Raises:
        DataError, PromptError, ModelFileError: each with what to do.
    """
    prompts = preview_texts(config)
    training = [config.dataset, *config.more_datasets]
    scans = [scan(dataset, config.resolution) for dataset in [*training, *_heldout(config)]]
    model = config.model
    cache = LatentTextCache(
        cache_folder,
        component_key(locate(model, "vae")),
        f"{component_key(locate(model, 'text_encoder'))} {component_key(locate(model, 'tokenizer'))} "
        f"{model.text_precision}",
        config.recipe_value(),
    )
    warnings: list[str] = []
    sets: list[list[Sample]] = []
    for found in scans:
        samples, unreadable = cache_samples(
            found, cache, config.resolution, lambda: _borrowed_vae(config, seat), between, progress
        )
        warnings += found.warnings
        if unreadable:
            warnings.append(f"Skipped while caching: {describe_skipped(unreadable)}.")
        sets.append(samples)
    heldout = sets[len(training)][: config.validation_pictures] if len(sets) > len(training) else []
    samples = combine(
        [SampleSet(Path(d.folder).name, found, d.weight) for d, found in zip(training, sets, strict=False)]
    )
    captions = caption_texts(samples)
    texts = [*captions, *(sample.captions[0] for sample in heldout), *prompts]
    truncated = cache_texts(texts, cache, lambda: _borrowed_text_encoder(config, seat), between, progress)
    training_cache = cache
    if config.objective.text_padding == "unmodified":
        # Only training sees the padding: previews and the held-out loss condition as sampling does.
        training_cache = LatentTextCache(cache_folder, cache.vae_key, f"{cache.text_key} unmodified", cache.recipe)
        cache_texts(captions, training_cache, lambda: _with_padding(config, seat), between, progress)
    if truncated:
        warnings.append(
            f"{len(truncated)} captions are longer than 512 tokens and were cut, e.g. “{truncated[0][:60]}…”."
        )
    progress("base model", 0, 1)
    between()
    return Prepared(cache, training_cache, samples, heldout, base_hash(config.model), warnings)


def _heldout(config: TrainingConfig) -> list[DatasetConfig]:
    """The held-out set, if there is one: seen once, upright, with the same trigger word."""
    if config.validation_dataset is None:
        return []
    return [config.validation_dataset.held_out(config.dataset.trigger)]


@contextmanager
def _with_padding(config: TrainingConfig, seat: Seat) -> Iterator[TextEncoder]:
    with _borrowed_text_encoder(config, seat) as encoder:
        yield encoder.with_padding()


@contextmanager
def _borrowed_vae(config: TrainingConfig, seat: Seat) -> Iterator[AutoencoderKL]:
    seat.make_room()
    vae = load_vae(config.model, seat.device)
    try:
        with seat.taken_by(vae):
            yield vae
    finally:
        del vae
        release_memory()


@contextmanager
def _borrowed_text_encoder(config: TrainingConfig, seat: Seat) -> Iterator[TextEncoder]:
    seat.make_room()
    encoder = load_text_encoder(config.model, seat.device)
    try:
        with seat.taken_by(encoder.model):
            yield encoder
    finally:
        # The caller's `as` variable still names the model here: what is freed is its place on the accelerator.
        encoder.to("cpu")
        del encoder
        release_memory()
