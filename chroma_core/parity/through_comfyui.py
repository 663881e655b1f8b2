"""A case painted by the pack's nodes in a real ComfyUI, over HTTP."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ..comfy.server import Host, HostError
from ..model.images import read_latents
from .case import Case, NotRun
from .painted import Painted


def through_comfyui(case: Case, host: Host) -> Painted:
    """Paint with Chroma Load Model, Text Encode, Apply LoRA and Sampler, and the host's Save Latent.

    The LoRAs are copied into the host's folder (it is one of our own). Raises NotRun for a case that the nodes cannot
    be given, or that fails there.
    """
    names = []
    for i, use in enumerate(case.loras):
        target = host.base / "models" / "loras" / f"parity-{i}-{Path(use.path).name}"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(use.path, target)
        names.append(target.name)
    try:
        history = host.run(api_prompt(case, names), timeout=24 * 3600)
    except HostError as error:  # refused, failed, or the server went away
        raise NotRun(f"ComfyUI did not paint it: {getattr(error, 'exception_message', '') or error}") from error
    (saved,) = history["outputs"]["latents"]["latents"]
    return Painted(read_latents(host.view(saved)), host.images(history)[0])


def api_prompt(case: Case, loras: list[str]) -> dict[str, Any]:
    """The case as an API-format prompt; `loras` are the names that the host knows its LoRAs by."""
    spec, settings = case.spec, case.settings
    local = [part for part in (spec.folder, spec.transformer, spec.text_encoder, spec.tokenizer, spec.vae) if part]
    if local:
        raise NotRun(f"The model is '{local[0]}', which lies outside the folders of the ComfyUI that is started here.")
    if case.in_parts:
        raise NotRun("The comparison starts from pure noise and runs the whole schedule.")
    recipe, overrides = case.recipe_words
    width, height = case.effective_size
    shift = settings.flow_shift
    constant = isinstance(shift, float)
    prompt: dict[str, Any] = {
        "model": {
            "class_type": "ChromaLoadModel",
            "inputs": {
                "flavour": spec.flavour,
                "precision": spec.precision,
                "text_precision": spec.text_precision,
                "offload": spec.offload,
                "resident_blocks": spec.resident_blocks,
            },
        },
        "positive": _text(case.prompt),
        "negative": _text(case.negative),
        "size": {"class_type": "ChromaEmptyLatent", "inputs": {"width": width, "height": height, "batch_size": 1}},
    }
    model: list[Any] = ["model", 0]
    for i, (use, name) in enumerate(zip(case.loras, loras, strict=True)):
        inputs = {"model": model, "lora": name, "strength": use.strength, "mode": use.mode}
        prompt[f"lora_{i}"] = {"class_type": "ChromaApplyLora", "inputs": inputs}
        model = [f"lora_{i}", 0]
    prompt["sampler"] = {
        "class_type": "ChromaSampler",
        "inputs": {
            "model": model,
            "positive": ["positive", 0],
            "negative": ["negative", 0],
            "latent": ["size", 0],
            "seed": settings.seed,
            "steps": settings.steps,
            "guidance": settings.guidance,
            "tail_bias": settings.tail_bias,
            "flow_shift": "recipe" if shift is None else "constant" if constant else shift,
            "flow_shift_value": shift if constant else 1.0,
            "method": settings.method,
            "denoise": 1.0,
            "spacing": settings.spacing,
            "recipe": recipe,
            "recipe_overrides": ", ".join(f"{field}={value}" for field, value in overrides.items()),
        },
    }
    decoded = {"class_type": "VAEDecode", "inputs": {"samples": ["sampler", 0], "vae": ["model", 2]}}
    image = {"class_type": "SaveImage", "inputs": {"images": ["decoded", 0], "filename_prefix": "parity"}}
    latents = {"class_type": "SaveLatent", "inputs": {"samples": ["sampler", 0], "filename_prefix": "parity"}}
    return {**prompt, "decoded": decoded, "image": image, "latents": latents}


def _text(text: str) -> dict[str, Any]:
    return {"class_type": "ChromaTextEncode", "inputs": {"text_encoder": ["model", 1], "text": text, "trigger": ""}}
