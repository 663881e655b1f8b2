"""A request as a host prompt in API format, made of our own nodes: what the window would send for the same pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..requests.request import InferenceRequest, PlannedPicture
from ..requests.run import PARTS

Prompt = dict[str, dict[str, Any]]

PUBLISHED = "as published"
"""The choice of the load node that leaves a part to the flavour."""


def to_prompt(
    request: InferenceRequest,
    pictures: Sequence[PlannedPicture],
    lora_names: Sequence[str],
    filename_prefix: str = "chroma/request",
) -> Prompt:
    """The prompt; picture i comes from the node `save_<i>`.

    Args:
        pictures: from `request.pictures()`: a prompt has no random seeds.
        lora_names: the request's LoRAs under their names in the host's LoRA folders.
    """
    prompt: Prompt = {
        "load": node(
            "ChromaLoadModel",
            "Model",
            flavour=request.flavour.name,
            precision=request.precision,
            text_precision=request.text_precision,
            offload=request.offload,
            **{part: getattr(request, part) or PUBLISHED for part in PARTS},
        )
    }
    model: list[Any] = ["load", 0]
    for i, (lora, name) in enumerate(zip(request.loras, lora_names, strict=True)):
        prompt[f"lora_{i}"] = node(
            "ChromaApplyLora",
            f"LoRA {i + 1}",
            model=model,
            lora=name,
            strength=lora.network_multiplier,
            mode=request.lora_mode,
            allow_partial=False,
        )
        model = [f"lora_{i}", 0]
    for i, picture in enumerate(pictures):
        for name, text in (("positive", picture.prompt), ("negative", picture.neg)):
            prompt[f"{name}_{i}"] = node(
                "ChromaTextEncode", f"{name.capitalize()} {i + 1}", text_encoder=["load", 1], text=text, trigger=""
            )
        prompt[f"latent_{i}"] = node(
            "ChromaEmptyLatent", f"Size {i + 1}", width=picture.width, height=picture.height, batch_size=1
        )
        prompt[f"sample_{i}"] = node(
            "ChromaSampler",
            f"Picture {i + 1}",
            model=model,
            positive=[f"positive_{i}", 0],
            negative=[f"negative_{i}", 0],
            latent=[f"latent_{i}", 0],
            seed=picture.seed,
            steps=picture.sample_steps,
            guidance=picture.guidance_scale,
            tail_bias=0.0,
            denoise=1.0,
            recipe=request.recipe,
        )
        prompt[f"decode_{i}"] = node("VAEDecode", f"Decode {i + 1}", samples=[f"sample_{i}", 0], vae=["load", 2])
        prompt[f"save_{i}"] = node(
            "SaveImage", f"Save {i + 1}", images=[f"decode_{i}", 0], filename_prefix=filename_prefix
        )
    return prompt


def node(class_type: str, title: str, **inputs: Any) -> dict[str, Any]:
    """A node in API form; a link is [id of a node, number of its output]."""
    return {"class_type": class_type, "inputs": inputs, "_meta": {"title": title}}
