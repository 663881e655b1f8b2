"""The workflow in API format: the host's own nodes, wired so that each number is the preview's.

Facts about the host that it rests on (ComfyUI 0.30.0; tests/host/test_stock_workflow.py runs the nodes):

- Text: with the CLIP type `chroma` the host adds no pad token, and with T5 Tokenizer Options' *min_padding* T5 attends
  to it. Type `mochi` is the same T5-XXL with its padding masked, as the model was trained; its own minimum length is
  lifted by *min_length* 0. The mask that it also hands on is read by no part of the host's Chroma.
- Schedule: Model Sampling Flux computes its shift from width and height by the very line of `schedule.dynamic_mu`, so
  `simple` gives our dynamic sigmas at every size, if the number of steps divides its table of 10,000. Every other
  schedule goes into Manual Sigmas, number for number.
- Prompts: the host reads brackets as weights; they are escaped.
"""

from __future__ import annotations

import math
from typing import Any

from .source import METHODS, StockPreview

Prompt = dict[str, dict[str, Any]]

TABLE = 10_000
"""Sigmas in the table of the host's ModelSamplingFlux."""

TRANSFORMERS = {
    "base": "Chroma1-Base.safetensors",
    "hd": "Chroma1-HD.safetensors",
    "flash": "Chroma1-Flash.safetensors",
}
TEXT_ENCODER, VAE = "t5xxl_fp16.safetensors", "ae.safetensors"


def stock_prompt(
    preview: StockPreview,
    *,
    lora: str | None = None,
    transformer: str | None = None,
    text_encoder: str | None = None,
    vae: str | None = None,
) -> Prompt:
    """The prompt. File names are those in the host's folders; defaults are the published names."""
    settings, recipe = preview.settings, preview.recipe
    padded = recipe.text_attention == "masked" and recipe.visible_padding > 0
    model, clip = ["lora", 0], ["clip", 0]
    prompt: Prompt = {
        "model": _node("UNETLoader", unet_name=transformer or TRANSFORMERS[preview.flavour], weight_dtype="default"),
        "clip": _node(
            "CLIPLoader",
            clip_name=text_encoder or TEXT_ENCODER,
            type="mochi" if padded else "chroma",
            device="default",
        ),
        "vae": _node("VAELoader", vae_name=vae or VAE),
        "lora": _node(
            "LoraLoaderModelOnly",
            model=["model", 0],
            lora_name=lora or preview.lora.name,
            strength_model=preview.strength,
        ),
    }
    if padded:
        prompt["padding"] = _node("T5TokenizerOptions", clip=clip, min_padding=recipe.visible_padding, min_length=0)
        clip = ["padding", 0]
    prompt["positive"] = _node("CLIPTextEncode", text=literal(preview.prompt), clip=clip)
    prompt["negative"] = _node("CLIPTextEncode", text=literal(preview.negative), clip=clip)
    prompt["latent"] = _node("EmptySD3LatentImage", width=preview.width, height=preview.height, batch_size=1)
    prompt["noise"] = _node("RandomNoise", noise_seed=settings.seed)
    prompt["method"] = _node("KSamplerSelect", sampler_name=METHODS[settings.method])
    if has_simple_schedule(preview):
        prompt["shift"] = _node(
            "ModelSamplingFlux",
            model=model,
            max_shift=1.15,
            base_shift=0.5,
            width=preview.width,
            height=preview.height,
        )
        model = ["shift", 0]
        prompt["sigmas"] = _node("BasicScheduler", model=model, scheduler="simple", steps=settings.steps, denoise=1.0)
    else:
        prompt["sigmas"] = _node("ManualSigmas", sigmas=_written(preview))
    prompt["guider"] = _node(
        "CFGGuider",
        model=model,
        positive=["positive", 0],
        negative=["negative", 0],
        cfg=max(1.0, settings.guidance),  # at 1 the host leaves the negative pass out, as ours does below 1 too
    )
    prompt["sample"] = _node(
        "SamplerCustomAdvanced",
        noise=["noise", 0],
        guider=["guider", 0],
        sampler=["method", 0],
        sigmas=["sigmas", 0],
        latent_image=["latent", 0],
    )
    prompt["decode"] = _node("VAEDecode", samples=["sample", 0], vae=["vae", 0])
    prompt["save"] = _node("SaveImage", images=["decode", 0], filename_prefix=f"chroma/{preview.lora.stem}_stock")
    return prompt


def has_simple_schedule(preview: StockPreview) -> bool:
    """Whether the host's `simple` scheduler gives the very sigmas; it rounds down to an entry of its table."""
    settings = preview.settings
    shift = preview.recipe.flow_shift if settings.flow_shift is None else settings.flow_shift
    even = settings.spacing == "linear" and settings.tail_bias == 0
    return shift == "dynamic" and even and TABLE % settings.steps == 0


def _written(preview: StockPreview) -> str:
    """The sigmas as Manual Sigmas reads them: it knows no exponents. Ten digits tell every fp32 number apart."""
    sigmas = preview.settings.sigmas(preview.width * preview.height // 256, preview.recipe)
    values = [float(sigma) for sigma in sigmas]
    return ", ".join(f"{v:.{10 if not v else max(10, 10 - math.floor(math.log10(v)))}f}" for v in values)


def literal(text: str) -> str:
    """A prompt whose brackets the host's CLIP Text Encode takes as they stand, not as weights."""
    return text.replace("(", "\\(").replace(")", "\\)")


def _node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs, "_meta": {"title": class_type}}
