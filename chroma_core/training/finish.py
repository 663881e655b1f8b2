"""The trained LoRA as a file that says what it is: base, recipe, trigger word, training, versions."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..files import slug, write_atomic
from ..lora.adapters import trained_lora
from ..lora.formats import LoraFile, write_lora
from ..transformer import ChromaTransformer
from .checkpoint import Progress
from .config import TrainingConfig

JOB_KEY = "chromakit.job_id"


def lora_metadata(config: TrainingConfig, progress: Progress, base_sha256: str, pictures: int) -> dict[str, str]:
    """The header of the finished file: the public modelspec fields and our own, all strings."""
    summary = {
        "steps": progress.step,
        "batch": config.effective_batch,
        "pictures": pictures,
        "learning_rate": config.learning_rate,
        "kind": config.lora.kind,
        "rank": config.lora.rank,
        "alpha": config.lora.alpha or config.lora.rank,
        "target": config.lora.target,
        "seed": config.seed,
        "objective": config.objective.model_dump(mode="json"),
        "heldout_loss_base": progress.heldout_loss_base,
        "heldout_loss": progress.heldout_loss,
        "loss_smooth": progress.loss_smooth,
    }
    metadata = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "chroma/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": config.name,
        "modelspec.resolution": "x".join(map(str, config.preview_size())),
        "modelspec.prediction_type": "v",
        "modelspec.trigger_phrase": config.dataset.trigger,
        JOB_KEY: config.job_id(),
        "chromakit.base_sha256": base_sha256,
        "chromakit.flavour": config.model.flavour,
        "chromakit.recipe": json.dumps(config.recipe_value().to_dict()),
        "chromakit.trigger": config.dataset.trigger,
        "chromakit.preview": _first_preview(config),
        "chromakit.training": json.dumps(summary),
        "chromakit.versions": json.dumps(library_versions()),
    }
    return {key: value for key, value in metadata.items() if value}


def _first_preview(config: TrainingConfig) -> str:
    """The first preview as JSON, for whoever wants to repeat it (see `stock_workflow.source`); empty without any."""
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
    return found


def final_path(loras_folder: Path, config: TrainingConfig, suffix: str = "") -> Path:
    """Where the LoRA goes: the job's name and `suffix`, with -2, -3 … when another job's file has it already."""
    stem = slug(config.name) + suffix
    number = 1
    while True:
        path = loras_folder / (f"{stem}.safetensors" if number == 1 else f"{stem}-{number}.safetensors")
        if not path.exists() or job_of(path) == config.job_id():
            return path
        number += 1


def job_of(path: Path) -> str | None:
    """The job that wrote a LoRA file, None for a foreign or unreadable one."""
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get(JOB_KEY)
    except (OSError, SafetensorError):
        return None


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
    path = final_path(loras_folder, config, suffix)
    copy = job_folder / f"{slug(config.name)}{suffix}.safetensors"
    write_lora(copy, LoraFile(modules, metadata, trained.dialect))
    write_atomic(path, copy.read_bytes())
    return path
