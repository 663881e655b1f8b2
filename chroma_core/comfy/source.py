"""What a stock workflow repeats: a preview, as the LoRA's header records it, or as options say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError, LoraError
from ..lora.files import read_lora
from ..lora.modules import LoraFile
from ..model.flavours import flavour
from ..model.latents import snap_size
from ..sampling.recipe import CANONICAL, Recipe
from ..sampling.sampler import SamplingSettings
from ..sampling.text import apply_trigger

PREVIEW_KEY = "chromakit.preview"
"""The header's field with the first preview: prompt, negative, width, height, settings."""

METHODS = {"euler": "euler", "heun": "heun"}
"""Our methods that the host has too, step for step."""

HONOURED = {"steps", "guidance", "seed", "tail_bias", "flow_shift", "method", "spacing"}
"""Settings that a stock workflow repeats, whatever they are; any other must have its default."""


@dataclass(frozen=True)
class StockPreview:
    """One picture with everything decided. `remarks`: where the host's numbers differ from the preview's."""

    lora: Path
    flavour: str
    prompt: str
    negative: str
    width: int
    height: int
    settings: SamplingSettings
    recipe: Recipe
    strength: float = 1.0
    remarks: tuple[str, ...] = ()


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
            f"'{path.name}' was trained on {chosen.name}, which the host's own Load Diffusion Model does not know: it "
            "reads Chroma in its published size only. Use Chroma Apply LoRA and Chroma Sampler for it."
        )
    recorded = _json(path, header, PREVIEW_KEY)
    if "prompt" not in given and "prompt" not in recorded:
        raise ConfigError(
            f"'{path.name}' records no preview (it was trained without preview prompts, or by another program). Say "
            "what to paint with --prompt."
        )
    recipe = Recipe.from_dict(_json(path, header, "chromakit.recipe") or CANONICAL.to_dict())
    settings = SamplingSettings(steps=chosen.steps, guidance=chosen.guidance)
    settings = _changed(settings, recorded.get("settings", {}))
    settings = _changed(settings, {name: given[name] for name in ("steps", "guidance", "seed") if name in given})
    width = given.get("width", recorded.get("width", chosen.size))
    height = given.get("height", recorded.get("height", chosen.size))
    trigger = given.get("trigger", header.get("chromakit.trigger"))
    prompt, negative = (apply_trigger(given.get(n, recorded.get(n, "")), trigger) for n in ("prompt", "negative"))
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
        tuple(_remarks(lora, recorded)),
    )
    check(found)
    return found


def check(preview: StockPreview) -> None:
    """Raise ConfigError for what the host's nodes cannot repeat, naming it."""
    recipe, settings = preview.recipe, preview.settings
    cannot = []
    if settings.method not in METHODS:
        cannot.append(f"method {settings.method} (known to both: {', '.join(METHODS)})")
    default = SamplingSettings().to_dict()
    other = {k: v for k, v in settings.to_dict().items() if k not in HONOURED and v != default[k]}
    cannot += [f"{name} {value}" for name, value in other.items()]
    if recipe.text_attention == "full":
        cannot.append("T5 that attends to padding of which the transformer sees one token")
    if recipe.text_attention == "unpadded" and recipe.visible_padding:
        cannot.append(f"visible_padding {recipe.visible_padding} that T5 attends to")
    rounded = [n for n in ("noise_dtype", "time_dtype", "latents_dtype") if getattr(recipe, n) != "fp32"]
    cannot += [f"{name} {getattr(recipe, name)} (the host's is fp32)" for name in rounded]
    if cannot:
        raise ConfigError(
            f"The host's own nodes cannot repeat this preview (recipe {recipe.name}): they have no "
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


def _remarks(lora: LoraFile, recorded: Mapping[str, Any]) -> list[str]:
    found = []
    kinds = {module.kind for module in lora.modules.values()}
    if "dora" in kinds:
        found.append("This is a DoRA: the host normalises it otherwise, so its pictures differ a little.")
    precision = recorded.get("precision", "fp32")
    if precision != "fp32":
        found.append(
            f"The preview was painted with the base in {precision}; the host computes in the precision that it chooses "
            "for its file, so pictures agree as far as these two do."
        )
    return found
