"""Everything a job needs before its first step: latents and text states on disk, T5 and VAE gone, blocks compiled."""

from __future__ import annotations

import logging
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import nn

from ...data.cache import LatentTextCache, component_key
from ...data.remembered import Remembered
from ...data.samples import Progress as OnProgress
from ...data.samples import Sample, SampleSet, cache_samples, cache_texts, caption_texts, combine
from ...data.scan import DatasetConfig, DatasetScan, describe_skipped, hold_out, scan
from ...data.warnings import ENOUGH_TO_JUDGE
from ...errors import ConfigError, counted, first_line
from ...loading.load import COMPUTING_BYTES, Device, device_size, load_text_encoder, load_vae
from ...loading.model_files import base_hash, locate
from ...loading.spec import ModelSpec
from ...lora.adapters import adapted_layers
from ...model.device import is_out_of_memory, release_memory
from ...model.transformer import ChromaTransformer
from ...model.vae import Autoencoder
from ...sampling.text import TextEncoder
from ...streaming.streamer import NOT_COMPILED, streamed
from ..config import TrainingConfig
from ..control import DeviceSlot
from .preserve import preserved_texts
from .preview import preview_texts

log = logging.getLogger("chromakit")

Part = TypeVar("Part", Autoencoder, TextEncoder)

COMPILE_STEPS = 1000
"""The fewest steps with which `compile_auto` compiles. Assumed: two minutes of compiling, a fifth less time a step, and
the .6 s of an H200 at 512²."""


@dataclass(frozen=True)
class Prepared:
    """What training reads: cached samples, held-out samples, and what to tell the user.

    `training_cache` holds the captions' text states as training conditions on them, `cache` as sampling does.
    `held_out` names the images that were taken out of the dataset to measure on.
    """

    cache: LatentTextCache
    training_cache: LatentTextCache
    samples: list[Sample]
    heldout: list[Sample]
    base_sha256: str
    warnings: list[str]
    held_out: list[str]


def prepare(
    config: TrainingConfig, cache_folder: Path, slot: DeviceSlot, between: Callable[..., None], progress: OnProgress
) -> Prepared:
    """Scan and cache. Interrupted at any point, the next call continues where this one was.

    Args:
        slot: the job's slot on the device, which VAE and T5 take one after the other.
        between: called between entries, and with `needed` before a component comes to the device (see `Control.gate`);
            may wait or raise.
    Raises:
        DataError, PromptError, ModelFileError: each with what to do.
    """
    prompts = preview_texts(config)
    training = [config.dataset, *config.more_datasets]
    known = Remembered(cache_folder)
    scans = [scan(dataset, config.resolution, known) for dataset in [*training, *_heldout(config)]]
    known.save()
    model = config.model
    cache = LatentTextCache(
        cache_folder,
        component_key(locate(model, "vae")),
        f"{component_key(locate(model, 'text_encoder'))} {component_key(locate(model, 'tokenizer'))} "
        f"{model.text_precision}",
        config.recipe_value(),
    )
    warnings, held_out = _hold_out(config, scans)
    sets: list[list[Sample]] = []
    for found in scans:
        samples, unreadable = cache_samples(
            found,
            cache,
            config.resolution,
            lambda: _borrowed(load_vae, "vae", config, slot, between),
            between,
            progress,
        )
        warnings += found.warnings
        if unreadable:
            warnings.append(f"Skipped while caching: {describe_skipped(unreadable)}.")
        sets.append(samples)
    heldout = sets[len(training)][: config.validation_pictures] if len(sets) > len(training) else []
    if held_out:  # they are few: each is measured with several noises
        heldout = [heldout[i % len(heldout)] for i in range(config.validation_pictures)]
    samples = combine(
        [SampleSet(Path(d.folder).name, found, d.weight) for d, found in zip(training, sets, strict=False)]
    )
    captions = caption_texts(samples)
    captions += preserved_texts(config, captions)
    texts = [*captions, *(sample.captions[0] for sample in heldout), *prompts]
    truncated = cache_texts(
        texts, cache, lambda: _borrowed(load_text_encoder, "text_encoder", config, slot, between), between, progress
    )
    training_cache = cache
    if config.objective.text_padding == "unmodified":
        # Only training sees the padding: previews and the held-out loss condition as sampling does.
        training_cache = LatentTextCache(cache_folder, cache.vae_key, f"{cache.text_key} unmodified", cache.recipe)
        cache_texts(captions, training_cache, lambda: _with_padding(config, slot, between), between, progress)
    if truncated:
        warnings.append(
            f"{len(truncated)} captions are longer than 512 tokens and were cut, e.g. “{truncated[0][:60]}…”."
        )
    progress("base model", 0, 1)
    between()
    return Prepared(cache, training_cache, samples, heldout, base_hash(config.model), warnings, held_out)


def _heldout(config: TrainingConfig) -> list[DatasetConfig]:
    """The held-out set, if there is one: seen once, upright, with the same trigger word."""
    if config.validation_dataset is None:
        return []
    return [config.validation_dataset.held_out(config.dataset.trigger)]


def _hold_out(config: TrainingConfig, scans: list[DatasetScan]) -> tuple[list[str], list[str]]:
    """Take images out of the first of the scans to measure on, if the job says so; they become the last of the scans.

    Returns warnings and the names of these images.
    """
    if not config.hold_out or config.validation_dataset is not None:
        return [], []
    scans[0], apart = hold_out(scans[0], config.hold_out, config.validation_pictures)
    if apart is None:
        return [
            f"No image is held out (hold_out): the dataset has {counted(len(scans[0].items), 'image')}, and at least "
            f"{ENOUGH_TO_JUDGE} different ones are needed. So there is no validation loss, and no best step."
        ], []
    scans.append(apart)
    return [], [image.name for image in apart.items]


@contextmanager
def _with_padding(config: TrainingConfig, slot: DeviceSlot, gate: Callable[..., None]) -> Iterator[TextEncoder]:
    with _borrowed(load_text_encoder, "text_encoder", config, slot, gate) as encoder:
        yield encoder.with_padding()


@contextmanager
def _borrowed(
    load: Callable[[ModelSpec, Device], Part],
    name: Literal["vae", "text_encoder"],
    config: TrainingConfig,
    slot: DeviceSlot,
    gate: Callable[..., None],
) -> Iterator[Part]:
    """A component of the model on the job's device, inside a `with` block."""
    on_cpu = slot.device.type == "cpu"  # which has nothing to ask for
    gate(needed=0 if on_cpu else device_size(config.model, name) + COMPUTING_BYTES)
    with slot.coming():
        part = load(config.model, slot.device)
        module: nn.Module = part.model if isinstance(part, TextEncoder) else part
        slot.take(module)
    try:
        yield part
    finally:
        slot.leave()
        # The caller's `as` variable still names it here: what is freed is its place on the accelerator.
        module.to("cpu")  # type: ignore[arg-type]
        release_memory()


def compile_blocks(transformer: ChromaTransformer, backend: str = "inductor") -> None:
    """`torch.compile` by regions: every block, for any number of tokens; results are the uncompiled model's, rounded.

    Compiled code is shared by all blocks of a class, since weights are its inputs. Training makes three graphs: the
    first block (its input needs no gradient), double blocks, single blocks; again for a batch of one and for a masked
    text. They are made when they are first needed, once a run.

    Call it after the adapters were added. Plain and quantised bases and gradient checkpointing work.

    Args:
        backend: torch's name of the compiler; `inductor` needs Triton on a GPU, and a C++ compiler on a CPU.
    Raises:
        ConfigError: the model is streamed, its LoRA has dropout, the compiler cannot work on the device, or it would
            not see what changes later: strengths, adapters on or off, the mode.
    """
    if streamed(transformer) is not None:
        raise ConfigError(NOT_COMPILED)
    if any(branch.dropout > 0 for _, layer in adapted_layers(transformer) for branch in layer.loras()):
        raise ConfigError(
            "torch.compile cannot be used with LoRA dropout: its masks come from a seed that changes at every step, "
            "which the compiler takes for new code each time. Set dropout = 0, or turn compile off."
        )
    check_compiler(backend, transformer.x_embedder.weight.device)
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        block.compile(backend=backend, dynamic=True)


def check_compiler(backend: str, device: torch.device) -> None:
    """Raise ConfigError when `torch.compile` cannot work on the device, or its code would not see later changes."""
    _without_faulty_shortcut()
    try:
        torch.compile(_trial, backend=backend)(torch.ones(4, device=device))
    except Exception as error:
        if is_out_of_memory(error):  # says nothing of the compiler
            raise
        raise ConfigError(
            f"torch.compile with the backend '{backend}' cannot work on the device '{device}' ({type(error).__name__}: "
            f"{first_line(error)}). On a GPU it needs Triton, on a CPU a C++ compiler. Turn "
            "compile off."
        ) from error
    if not sees_changes():
        raise ConfigError(
            f"torch.compile does not work right with torch {torch.__version__} on Python {platform.python_version()}: "
            "compiled code does not see what is changed later, so a LoRA that is turned off would go on counting. Turn "
            "compile off, or use another version of Python or torch."
        )


def compiles(config: TrainingConfig, device: Device, sharded: bool, warnings: list[str]) -> bool:
    """Whether a job compiles its blocks; where `compile_auto` does not, the reason is added to the warnings."""
    if config.compile or not config.compile_auto:
        return config.compile
    reason = why_not_compiled(config, device, sharded)
    if reason:
        warnings.append(reason)
    else:
        log.info("ChromaKit: compile_auto: the blocks of '%s' are compiled in the first steps", config.name)
    return not reason


def why_not_compiled(
    config: TrainingConfig,
    device: Device,
    sharded: bool = False,
    check: Callable[[str, torch.device], None] = check_compiler,
) -> str:
    """Why a job with `compile_auto` does not compile its blocks, as a sentence; empty where it does.

    The same at every resume on the same machine, since the steps still to make do not count.
    """
    device = torch.device(device)
    if device.type != "cuda":
        reason = f"it is only tried on CUDA, and the job runs on '{device}'"
    elif sharded or config.model.offload == "block":
        reason = f"{'FSDP2' if sharded else 'the offload mode block'} moves the blocks' weights meanwhile"
    elif config.lora.dropout > 0:
        reason = "a LoRA with dropout is another one at every step"
    elif config.steps < COMPILE_STEPS:
        reason = f"{config.steps} steps are too few to make good the time that it takes ({COMPILE_STEPS} are enough)"
    else:
        try:
            check("inductor", device)
            return ""
        except ConfigError as error:
            reason = str(error)
    return f"compile_auto: the blocks are not compiled: {reason.removesuffix('.')}."


def _trial(x: torch.Tensor) -> torch.Tensor:
    return x * 2 + 1


def _without_faulty_shortcut() -> None:
    """On Python 3.13.0 let the compiler look at every attribute in every call.

    That version does not tell of a changed attribute (python/cpython#125608), which torch relies on. For the whole
    process, because torch has no smaller place for it; it costs others a little time and no result.
    """
    shortcut = "use_recursive_dict_tags_for_guards"
    if sys.version_info[:3] == (3, 13, 0) and hasattr(torch._dynamo.config, shortcut):
        setattr(torch._dynamo.config, shortcut, False)


class _Changing(nn.Module):
    """A number and a switch as adapters have them."""

    def __init__(self) -> None:
        super().__init__()
        self.strength, self.enabled = 1.0, True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.strength + self.training if self.enabled else x


def sees_changes() -> bool:
    """Whether compiled code sees what is changed at a module after it was compiled, here and now."""
    changing, x = _Changing(), torch.ones(1)
    model = nn.Sequential(changing)
    compiled = torch.compile(model, backend="eager")
    for _ in range(3):  # shortcuts are taken from the second call on
        compiled(x)
    for change in ({"strength": 2.0}, {"strength": 3.0}, {"training": False}, {"enabled": False}, {"enabled": True}):
        for name, value in change.items():
            setattr(changing, name, value)
        if not torch.equal(compiled(x), model(x)):
            return False
    return True
