"""Sampling a case with diffusers and transformers: the independent reference. Importing this takes their time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from transformers import T5Config, T5EncoderModel

from ..loading.load import Device, load_text_encoder, load_transformer, load_vae
from ..model.images import decode
from ..model.latents import FLUX_LATENTS, LatentFormat, pack, unpack
from ..model.precision import precision
from ..model.text_encoder import T5Encoder
from ..model.transformer import ChromaTransformer
from ..model.vae import Autoencoder
from ..sampling.sampler import initial_noise
from .case import Case, NotRun, Sampled

TextMask = Literal["boolean", "float"]


class _BooleanMask(FluxAttnProcessor):
    """diffusers' attention with the mask that its pipeline meant: hidden keys are hidden.

    The pipeline hands over ones and zeros as floats, which attention adds to the scores: every padding token takes part
    (huggingface/diffusers #12116). A row of a hidden query hides every key; it sees all instead, since nobody reads it.
    """

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        if attention_mask is not None:
            attention_mask = attention_mask.bool()
            attention_mask = attention_mask | ~attention_mask.any(-1, keepdim=True)
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)


def through_diffusers(case: Case, device: Device, text_mask: TextMask = "boolean") -> Sampled:
    """Sample by diffusers' `ChromaPipeline`: its text encoding, its transformer, its LoRA loader, its guidance.

    Given from here are the weights, the noise, and the noise levels of the case's recipe. All else that the recipe says
    is diffusers' own.

    Args:
        text_mask: `float` as diffusers has it, `boolean` as it was meant.
    Raises:
        NotRun: for a quantised model, another sampler than Euler's, a first-block cache, or a LoRA that diffusers does
            not read.
    """
    chosen, settings = precision(case.spec.precision), case.settings
    for name in (case.spec.precision, case.spec.text_precision):
        if precision(name).quantised:
            raise NotRun(f"diffusers has no counterpart of the precision {name}.")
    only = "diffusers' pipeline has Euler's sampler from pure noise only, and no first-block cache."
    if settings.method != "euler" or settings.first_block_cache:
        raise NotRun(only)
    case.check_whole(only)
    width, height = case.effective_size
    rows, columns = height // FLUX_LATENTS.downscale, width // FLUX_LATENTS.downscale
    tokens = width * height // 256
    sigmas = settings.sigmas(tokens, case.recipe)
    noise = initial_noise([settings.seed], (FLUX_LATENTS.channels, rows, columns))

    text, vae = load_text_encoder(case.spec, device), load_vae(case.spec, device)
    pipeline = ChromaPipeline(
        # The noise levels are finished: nothing of theirs is shifted again.
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False),
        vae=theirs(AutoencoderKL, vae),
        text_encoder=theirs(text_encoder_of, text.model),
        tokenizer=text.tokenizer,  # type: ignore[arg-type]
        transformer=_transformer(case, device, text_mask),
    )
    pipeline.set_progress_bar_config(disable=True)
    with torch.random.fork_rng(devices=[]):  # loading draws weights and then overwrites them
        _load_loras(pipeline, case)
        packed: Any = pipeline(
            **_texts(pipeline, case, device, chosen.dtype),
            width=width,
            height=height,
            num_inference_steps=settings.steps,
            sigmas=sigmas[:-1].tolist(),
            guidance_scale=settings.guidance,
            latents=pack(noise).to(device, chosen.dtype),
            output_type="latent",
        )
    latents = unpack(packed.images.float(), rows, columns)
    return Sampled(LatentFormat.of(vae).to_vae(latents).cpu(), decode(vae, latents)[0])


@torch.no_grad()
def _texts(pipeline: ChromaPipeline, case: Case, device: Device, dtype: torch.dtype) -> dict[str, Any]:
    """What the pipeline takes of the prompts, by its own encoding, in the dtype of the transformer: that of the text
    encoder, in which it leaves them, may be another, and then its own layers do not multiply."""
    names = ("prompt_embeds", "", "prompt_attention_mask")
    names = (*names, *(name and f"negative_{name}" for name in names))
    encode: Any = pipeline.encode_prompt
    found = encode(case.prompt, case.negative, device, do_classifier_free_guidance=case.settings.guidance > 1)
    return {name: value.to(dtype) for name, value in zip(names, found, strict=True) if name and value is not None}


def _transformer(case: Case, device: Device, text_mask: TextMask) -> ChromaTransformer2DModel:
    ours = load_transformer(case.spec, device)
    found = theirs(ChromaTransformer2DModel, ours)
    if text_mask == "boolean":
        found.set_attn_processor(_BooleanMask())
    return found


def text_encoder_of(**config: Any) -> T5EncoderModel:
    """transformers' T5 encoder with the arguments of ours."""
    return T5EncoderModel(T5Config(**config))


def theirs(build: Callable[..., Any], ours: ChromaTransformer | T5Encoder | Autoencoder) -> Any:
    """Their class, frozen, over our weights (shared, not copied). Raises NotRun when it has others."""
    with init_empty_weights(include_buffers=False):
        found = build(**vars(ours.config))
    missing, unexpected = found.load_state_dict(ours.state_dict(), strict=False, assign=True)
    if missing or unexpected:
        raise NotRun(f"{type(found).__name__} has other weights: {[*missing, *unexpected][:3]}.")
    return found.to(next(ours.parameters()).device).requires_grad_(False).eval()


def _load_loras(pipeline: ChromaPipeline, case: Case) -> None:
    names = [f"lora_{i}" for i in range(len(case.loras))]
    if any(use.blocks or use.schedule for use in case.loras):
        raise NotRun("diffusers is given one strength for a whole LoRA, and this case has others by block or step.")
    try:
        for name, use in zip(names, case.loras, strict=True):
            path = Path(use.path)
            pipeline.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=name)
        if names:
            pipeline.set_adapters(names, [use.strength for use in case.loras])
    except Exception as error:  # whatever PEFT makes of a file that it does not know
        raise NotRun(f"diffusers does not load the LoRA ({type(error).__name__}: {error}).") from error
