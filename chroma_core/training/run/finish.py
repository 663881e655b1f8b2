"""What a finished file says of itself: base, recipe, trigger word, training, versions; and the LoRA as a file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ...errors import ChromaKitError
from ...files import free_name, slug, write_atomic
from ...lora.convert import JOB_KEY
from ...lora.files import write_lora
from ...lora.modules import LoraFile
from ...lora.settings import named_target
from ...lora.trainable import trained_lora
from ...model.transformer import ChromaTransformer
from ...weights.opening import open_weights
from ..config import TrainingConfig
from .metrics import Progress


def adapter_summary(config: TrainingConfig) -> dict[str, Any]:
    """What a header says of the adapter."""
    lora = config.lora
    return {"kind": lora.kind, "rank": lora.rank, "alpha": lora.alpha or lora.rank, "target": lora.target}


def file_metadata(
    config: TrainingConfig,
    progress: Progress,
    base_sha256: str,
    pictures: int,
    architecture: str,
    trained: dict[str, Any],
    job_id: str | None = None,
    changes: Sequence[Mapping[str, Any]] = (),
) -> dict[str, str]:
    """The header of a finished file: the public modelspec fields and our own, all strings.

    Args:
        architecture: modelspec's word for what it is.
        trained: what was trained, as JSON values.
        job_id: the name of the job's folder; None: that of a job with these options from its start.
        changes: options that were changed on the way, see `changes.entry`.
    """
    summary = {
        "steps": progress.step,
        "batch": config.effective_batch,
        "pictures": pictures,
        "learning_rate": config.learning_rate,
        **trained,
        "seed": config.seed,
        "objective": config.objective.model_dump(mode="json"),
        "heldout_loss_base": progress.heldout_loss_base,
        "heldout_loss": progress.heldout_loss,
        "loss_smooth": progress.loss_smooth,
    }
    metadata = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture,
        "modelspec.implementation": "diffusers",
        "modelspec.title": config.name,
        "modelspec.description": f"{_what(config)}, trained with ChromaKit: "
        f"{progress.step} steps of {config.effective_batch} on {pictures} pictures.",
        "modelspec.resolution": "x".join(map(str, config.preview_size())),
        "modelspec.prediction_type": "v",
        "modelspec.trigger_phrase": config.dataset.trigger,
        JOB_KEY: job_id or config.job_id(),
        "chromakit.base_sha256": base_sha256,
        "chromakit.flavour": config.model.flavour,
        "chromakit.base_file": _base_file(config),
        "chromakit.recipe": json.dumps(config.recipe_value().to_dict()),
        "chromakit.trigger": config.dataset.trigger,
        "chromakit.preview": _first_preview(config),
        "chromakit.training": json.dumps(summary),
        "chromakit.changes": json.dumps(list(changes)) if changes else "",
        "chromakit.versions": json.dumps(library_versions()),
    }
    return {key: value for key, value in metadata.items() if value}


def _what(config: TrainingConfig) -> str:
    chroma = f"Chroma 1 ({config.model.flavour})"
    return f"A {config.lora.kind} for {chroma}" if config.full is None else f"{chroma} with some of its layers"


def _first_preview(config: TrainingConfig) -> str:
    """The first preview as JSON, for whoever wants to repeat it (see `comfy.stock`); empty without any."""
    for preview in config.preview_list():
        values = {"prompt": preview.prompt, "negative": preview.negative}
        values |= {"width": preview.width, "height": preview.height, "precision": config.model.precision}
        return json.dumps({**values, "settings": preview.settings.to_dict()})
    return ""


def library_versions() -> dict[str, str]:
    """Versions of the libraries that computed the weights."""
    found = {}
    for name in ("torch", "diffusers", "peft", "transformers", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    project = Path(__file__).resolve().parents[3] / "pyproject.toml"
    with suppress(OSError):
        stated = re.search(r'^version = "([^"]+)"', project.read_text(encoding="utf-8"), re.MULTILINE)
        if stated:
            found["chromakit"] = stated[1]
    return found


def contents(lora: LoraFile) -> dict[str, str]:
    """What the header says of the weights themselves: ranks, alphas, and the layers as a target name or a list."""
    return {
        "chromakit.ranks": json.dumps(lora.ranks),
        "chromakit.alphas": json.dumps(lora.alphas),
        "chromakit.targets": json.dumps(named_target(list(lora.modules)) or list(lora.modules)),
    }


def _base_file(config: TrainingConfig) -> str:
    """The name (not the place) of the file or folder that the base came from; empty for the published one."""
    own = config.model.transformer or config.model.folder
    return Path(own).name if own else ""


def final_path(loras_folder: Path, config: TrainingConfig, suffix: str = "", job_id: str | None = None) -> Path:
    """Where the LoRA goes: the job's name and `suffix`, with -2, -3 … when another job's file has it already."""
    job = job_id or config.job_id()
    name = free_name(slug(config.name) + suffix, lambda found: may_write(loras_folder / f"{found}.safetensors", job))
    return loras_folder / f"{name}.safetensors"


def may_write(path: Path, job_id: str) -> bool:
    """Whether nothing is at `path`, or a LoRA or model (file or folder) that this very job wrote."""
    if not path.exists():
        return True
    try:
        return open_weights(path).metadata.get(JOB_KEY) == job_id
    except ChromaKitError:
        return False


def write_final(
    config: TrainingConfig,
    transformer: ChromaTransformer,
    metadata: dict[str, Any],
    job_folder: Path,
    loras_folder: Path,
    suffix: str = "",
) -> Path:
    """Write the LoRA into the job's folder and `loras_folder`, its name ending in `suffix`; returns the latter path."""
    trained = trained_lora(transformer)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.lora.save_dtype]
    modules = {name: module.to(dtype) for name, module in trained.modules.items()}
    path = final_path(loras_folder, config, suffix, metadata.get(JOB_KEY))
    copy = job_folder / f"{slug(config.name)}{suffix}.safetensors"
    write_lora(copy, LoraFile(modules, {**metadata, **contents(trained)}, trained.key_format))
    write_atomic(path, copy.read_bytes())
    return path
