"""A workflow of ComfyUI's own nodes that repeats a LoRA's preview, wired so that each number is the preview's.

What it repeats is read from the LoRA's header, or said by options. Facts about ComfyUI that it rests on (0.30.0;
tests/host/test_stock_workflow.py runs the nodes):

- Text: with the CLIP type `chroma` ComfyUI adds no pad token, and with T5 Tokenizer Options' *min_padding* T5 attends
  to it. Type `mochi` is the same T5-XXL with its padding masked, as the model was trained; its own minimum length is
  lifted by *min_length* 0. The mask that it also hands on is read by no part of ComfyUI's Chroma.
- Schedule: Model Sampling Flux computes its shift from width and height by the very line of `schedule.dynamic_mu`, so
  `simple` gives our dynamic sigmas at every size, if the number of steps divides its table of 10,000. Every other
  schedule goes into Manual Sigmas, number for number.
- Prompts: ComfyUI reads brackets as weights; they are escaped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError, LoraError
from ..files import free_path, write_json
from ..lora.files import read_lora
from ..lora.modules import LoraFile
from ..model.flavours import flavour
from ..model.latents import snap_size
from ..sampling.recipe import CANONICAL, Recipe
from ..sampling.sampler import SamplingSettings
from ..sampling.text import apply_trigger
from .graph import Graph, Prompt
from .window import window_form

PREVIEW_KEY = "chromakit.preview"
"""The header's field with the first preview: prompt, negative, width, height, settings."""

METHODS = {"euler": "euler", "heun": "heun"}
"""Our samplers that ComfyUI has, too, step for step."""

HONOURED = {"steps", "guidance", "seed", "tail_bias", "flow_shift", "method", "spacing"}
"""Settings that a stock workflow repeats, whatever they are; any other must have its default."""

TABLE = 10_000
"""Sigmas in the table of ComfyUI's ModelSamplingFlux."""

TRANSFORMERS = {
    "base": "Chroma1-Base.safetensors",
    "hd": "Chroma1-HD.safetensors",
    "flash": "Chroma1-Flash.safetensors",
}
TEXT_ENCODER, VAE = "t5xxl_fp16.safetensors", "ae.safetensors"


@dataclass(frozen=True)
class StockPreview:
    """One image with everything decided. `warnings`: where ComfyUI's numbers differ from the preview's."""

    lora: Path
    flavour: str
    prompt: str
    negative: str
    width: int
    height: int
    settings: SamplingSettings
    recipe: Recipe
    strength: float = 1.0
    warnings: tuple[str, ...] = ()


def stock_preview(path: Path, changes: Mapping[str, Any] | None = None) -> StockPreview:
    """The preview of a LoRA file; `changes` go before its header.

    Args:
        changes: any of prompt, negative, trigger, width, height, strength, and steps, guidance, seed.
    Raises:
        LoraError: no LoRA, or one in a key format that ComfyUI does not apply in full.
        ConfigError: there is no prompt to repeat, or something that stock nodes cannot do; it says what.
    """
    given = {name: value for name, value in (changes or {}).items() if value is not None}
    lora = read_lora(path)
    if lora.key_format != "universal":
        raise LoraError(
            f"'{path.name}' is in the {lora.key_format} key format, of which ComfyUI's Load LoRA may leave out parts "
            "without an error. Convert it to the universal key format first."
        )
    header = lora.metadata
    chosen = flavour(header.get("chromakit.flavour", "base"))
    if chosen.folder is not None:
        raise ConfigError(
            f"'{path.name}' was trained on {chosen.name}, which ComfyUI's own Load Diffusion Model does not know: it "
            "reads Chroma in its published size only. Use Chroma Apply LoRA and Chroma Sampler for it."
        )
    recorded = _json(path, header, PREVIEW_KEY)
    if "prompt" not in given and "prompt" not in recorded:
        raise ConfigError(
            f"'{path.name}' records no preview (it was trained without preview prompts, or by another program). Say "
            "what to generate with --prompt."
        )
    recipe = Recipe.from_dict(_json(path, header, "chromakit.recipe") or CANONICAL.to_dict())
    settings = SamplingSettings(steps=chosen.steps, guidance=chosen.guidance)
    settings = _changed(settings, recorded.get("settings", {}))
    settings = _changed(settings, {name: given[name] for name in ("steps", "guidance", "seed") if name in given})
    trigger = given.get("trigger", header.get("chromakit.trigger"))
    prompt, negative = (apply_trigger(given.get(n, recorded.get(n, "")), trigger) for n in ("prompt", "negative"))
    width, height = (given.get(n, recorded.get(n, chosen.size)) for n in ("width", "height"))
    width, height = snap_size(width, height, recipe.size_multiple)
    found = StockPreview(
        path,
        chosen.name,
        prompt,
        negative,
        width,
        height,
        settings,
        recipe,
        float(given.get("strength", 1.0)),
        tuple(_warnings(lora, recorded)),
    )
    check(found)
    return found


def check(preview: StockPreview) -> None:
    """Raise ConfigError for what ComfyUI's nodes cannot repeat, naming it."""
    recipe, settings = preview.recipe, preview.settings
    cannot = []
    if settings.method not in METHODS:
        cannot.append(f"method {settings.method} (known to both: {', '.join(METHODS)})")
    default = SamplingSettings().to_dict()
    other = {k: v for k, v in settings.to_dict().items() if k not in HONOURED and v != default.get(k)}
    cannot += [f"{name} {value}" for name, value in other.items()]
    if recipe.text_attention == "full":
        cannot.append("T5 that attends to padding of which the transformer sees one token")
    if recipe.text_attention == "unpadded" and recipe.visible_padding:
        cannot.append(f"visible_padding {recipe.visible_padding} that T5 attends to")
    rounded = [n for n in ("noise_dtype", "time_dtype", "latents_dtype") if getattr(recipe, n) != "fp32"]
    cannot += [f"{name} {getattr(recipe, name)} (ComfyUI's is fp32)" for name in rounded]
    if cannot:
        raise ConfigError(
            f"ComfyUI's own nodes cannot repeat this preview (recipe {recipe.name}): they have no "
            f"{'; no '.join(cannot)}. Use Chroma Sampler with the same recipe instead."
        )


def _changed(settings: SamplingSettings, values: Mapping[str, Any]) -> SamplingSettings:
    try:
        return replace(settings, **values)
    except TypeError as error:
        raise ConfigError(f"The header's preview has settings that this version does not know: {error}.") from error


def _json(path: Path, header: Mapping[str, str], key: str) -> dict[str, Any]:
    try:
        value = json.loads(header.get(key, "{}"))
    except ValueError as error:
        raise LoraError(f"'{path.name}' has a damaged header: {key} is not JSON ({error}).") from error
    return value if isinstance(value, dict) else {}


def _warnings(lora: LoraFile, recorded: Mapping[str, Any]) -> list[str]:
    found = []
    if "dora" in lora.kinds:
        found.append("This is a DoRA: ComfyUI normalises it otherwise, so its images differ a little.")
    precision = recorded.get("precision", "fp32")
    if precision != "fp32":
        found.append(
            f"The preview was sampled with the base in {precision}; ComfyUI computes in the precision that it chooses "
            "for its file, so images agree as far as these two do."
        )
    return found


def stock_prompt(
    preview: StockPreview,
    *,
    lora: str | None = None,
    transformer: str | None = None,
    text_encoder: str | None = None,
    vae: str | None = None,
) -> Prompt:
    """The prompt. File names are those in ComfyUI's folders; defaults are the published names."""
    settings, recipe = preview.settings, preview.recipe
    padded = recipe.text_attention == "masked" and recipe.visible_padding > 0
    graph = Graph()
    unet, t5 = transformer or TRANSFORMERS[preview.flavour], text_encoder or TEXT_ENCODER
    loaded = graph.add("model", "UNETLoader", unet_name=unet, weight_dtype="default")
    clip = graph.add("clip", "CLIPLoader", clip_name=t5, type="mochi" if padded else "chroma", device="default")
    decoder = graph.add("vae", "VAELoader", vae_name=vae or VAE)
    applied = {"lora_name": lora or preview.lora.name, "strength_model": preview.strength}
    model = graph.add("lora", "LoraLoaderModelOnly", model=loaded[0], **applied)
    if padded:
        clip = graph.add(
            "padding", "T5TokenizerOptions", clip=clip[0], min_padding=recipe.visible_padding, min_length=0
        )
    positive = graph.add("positive", "CLIPTextEncode", text=literal(preview.prompt), clip=clip[0])
    negative = graph.add("negative", "CLIPTextEncode", text=literal(preview.negative), clip=clip[0])
    size = {"width": preview.width, "height": preview.height}
    latent = graph.add("latent", "EmptySD3LatentImage", **size, batch_size=1)
    noise = graph.add("noise", "RandomNoise", noise_seed=settings.seed)
    sampler = graph.add("method", "KSamplerSelect", sampler_name=METHODS[settings.method])
    if has_simple_schedule(preview):
        model = graph.add("shift", "ModelSamplingFlux", model=model[0], max_shift=1.15, base_shift=0.5, **size)
        sigmas = graph.add(
            "sigmas", "BasicScheduler", model=model[0], scheduler="simple", steps=settings.steps, denoise=1.0
        )
    else:
        sigmas = graph.add("sigmas", "ManualSigmas", sigmas=_written(preview))
    scale = max(1.0, settings.guidance)  # at 1 ComfyUI leaves the negative pass out, as ours does below 1 too
    guider = graph.add("guider", "CFGGuider", model=model[0], positive=positive[0], negative=negative[0], cfg=scale)
    parts = {"noise": noise[0], "guider": guider[0], "sampler": sampler[0], "sigmas": sigmas[0]}
    sampled = graph.add("sample", "SamplerCustomAdvanced", **parts, latent_image=latent[0])
    decoded = graph.add("decode", "VAEDecode", samples=sampled[0], vae=decoder[0])
    graph.add("save", "SaveImage", images=decoded[0], filename_prefix=f"chroma/{preview.lora.stem}_stock")
    return graph.prompt


def has_simple_schedule(preview: StockPreview) -> bool:
    """Whether ComfyUI's `simple` scheduler gives the very sigmas; it rounds down to an entry of its table."""
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
    """A prompt whose brackets ComfyUI's CLIP Text Encode takes as they stand, not as weights."""
    return text.replace("(", "\\(").replace(")", "\\)")


def export_workflow(
    path: Path, output: Path | None = None, changes: Mapping[str, Any] | None = None, **names: str | None
) -> tuple[Path, Path, StockPreview]:
    """Write the workflow of a LoRA file; returns (window's file, API file, what it repeats).

    Args:
        output: the window's file; default `<lora>_stock.json` in the current folder, never one that exists already.
        changes: see `stock_preview`.
        names: lora, transformer, text_encoder, vae: file names in ComfyUI's folders.
    Raises what `stock_preview` raises.
    """
    preview = stock_preview(path, changes)
    prompt = stock_prompt(preview, **names)
    window = output or free_path(Path(), f"{path.stem}_stock.json")
    api = window.with_name(f"{window.stem}_api.json")
    write_json(window, window_form(prompt, note(preview, prompt)))
    write_json(api, prompt)
    return window, api, preview


def note(preview: StockPreview, prompt: Prompt) -> str:
    """What the workflow repeats and what must stay as it is, for the note in the window."""
    settings = preview.settings
    schedule = (
        "**Flow shift** and **Schedule** follow the image's size: change *width* and *height* in both places."
        if has_simple_schedule(preview)
        else "**Schedule** holds the sigmas of these steps at this size; another size or number of steps needs others: "
        "export the workflow again."
    )
    lines = [
        f"Repeats the preview of **{preview.lora.name}** with ComfyUI's own nodes: {preview.width}×{preview.height}, "
        f"{settings.steps} steps, guidance {settings.guidance:g}, seed {settings.seed}, {settings.method}, recipe "
        f"{preview.recipe.name}.",
        "Choose your files in the three loaders: Chroma's transformer, T5-XXL, the Flux VAE.",
        schedule,
    ]
    if "padding" in prompt:
        lines.append(
            "T5 is loaded with the type *mochi* on purpose: it is the same T5-XXL with its padding masked. With the "
            "type *chroma* T5 would attend to the visible pad token, and the image would differ."
        )
    lines.append("Brackets in prompts are escaped: \\\\( is a bracket, ( starts a weight.")
    return "\n\n".join([*lines, *preview.warnings])
