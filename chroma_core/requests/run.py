"""Carries out a request without ComfyUI: one load for all its prompts, a PNG for each image."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError, LoraError
from ..files import free_path, write_atomic
from ..loading.component_cache import ComponentCache
from ..loading.load import Device, transformer_outline
from ..loading.matching import build_part
from ..loading.spec import LoraUse, ModelHandle, ModelSpec
from ..lora.adapters import check_fits
from ..lora.files import read_lora
from ..model.flavours import flavour
from ..model.images import decode, png_bytes
from ..sampling.recipe import recipe
from ..sampling.sampler import image_record, sample
from ..sampling.text import TextCondition
from .request import InferenceRequest, unusable

PARTS = ("folder", "transformer", "text_encoder", "vae")

OnStep = Callable[[int, int, int], object]
"""Called with (image, counted from 0; steps done; steps) after every step."""


def model_spec(request: InferenceRequest, path_of: Callable[[str, str], str]) -> ModelSpec:
    """The model that a request names; `path_of(field, name)` finds its files."""
    own = {part: getattr(request, part) for part in PARTS if getattr(request, part) is not None}
    parts: dict[str, Any] = {part: path_of(part, name) for part, name in own.items()}
    return ModelSpec(
        request.flavour.name,
        precision=request.precision,
        text_precision=request.text_precision,
        offload=request.offload,
        **parts,
    )


def lora_uses(request: InferenceRequest, path_of: Callable[[str], Path]) -> tuple[LoraUse, ...]:
    """The LoRAs of a request, in its order; `path_of` finds a file. Raises ConfigError that names the field."""
    found = []
    for i, lora in enumerate(request.loras):
        try:
            path, partial = str(path_of(lora.path)), lora.allow_partial
            where = lora.blocks, lora.schedule
            found.append(LoraUse(path, lora.network_multiplier, request.lora_mode, partial, *where))
        except LoraError as error:
            raise unusable(f"loras[{i}].path: {str(error).rstrip('.')}") from error
        except ConfigError as error:
            raise unusable(f"loras[{i}].schedule: {str(error).rstrip('.')}") from error
    return tuple(found)


def check_loras(spec: ModelSpec, uses: Iterable[LoraUse]) -> None:
    """Raise ConfigError, naming the field, for a LoRA that is no LoRA or does not fit the model. Loads no weights.

    Nothing is downloaded for it: every published model has the same layers.
    """
    outline = None
    for i, use in enumerate(uses):
        if outline is None:
            here = spec.transformer or spec.folder or flavour(spec.flavour).folder
            outline = transformer_outline(spec) if here else build_part("transformer", {})
        try:
            lora = read_lora(use.path)
            check_fits(outline, lora, use.allow_partial)
        except LoraError as error:
            raise unusable(f"loras[{i}].path: {str(error).rstrip('.')}") from error
        try:
            use.strengths(lora.modules)
        except LoraError as error:
            raise unusable(f"loras[{i}].blocks: {str(error).rstrip('.')}") from error


def run_request(
    request: InferenceRequest,
    spec: ModelSpec,
    loras: Sequence[LoraUse],
    cache: ComponentCache,
    device: Device,
    output: Path,
    on_step: OnStep = lambda image, done, steps: None,
) -> dict[str, Any]:
    """Generate a request's images into `output`, and return what was made (fields: `docs/requests.md`).

    The cache decides what is loaded: a second request with the same model loads nothing, whatever its strengths are,
    unless its LoRAs are merged. Images that were finished before an error or an interruption are still written.
    """
    rules, images = recipe(request.recipe), request.images()
    texts: dict[str, TextCondition] = {}
    encoder = cache.text_encoder(spec, device)
    for text in dict.fromkeys(text for planned in images for text in (planned.prompt, planned.neg)):
        texts[text] = encoder.encode(text, rules)
    sampled = []
    made: list[dict[str, Any]] = []
    try:
        with cache.transformer(ModelHandle(spec, tuple(loras)), device) as transformer:
            for i, planned in enumerate(images):
                latents = sample(
                    transformer,
                    [texts[planned.prompt]],
                    texts[planned.neg],
                    width=planned.width,
                    height=planned.height,
                    settings=request.settings(planned),
                    recipe=rules,
                    on_step=lambda info, i=i: on_step(i, info.step, info.steps),
                )
                sampled.append(latents)
    finally:
        for latents, planned in zip(sampled, images, strict=False):
            (image,) = decode(cache.vae(spec, device), latents)
            path = free_path(output, f"chroma-{planned.seed}.png")
            size = (planned.width, planned.height)
            settings = request.settings(planned)
            record = image_record(planned.prompt, planned.neg, size, settings, rules, spec.to_dict())
            record["loras"] = [use_record(use) for use in loras]
            write_atomic(path, png_bytes(image, record))
            cut = texts[planned.prompt].truncated
            made.append({"file": str(path), **planned.to_dict(), "truncated_tokens": cut})
    return {
        "model": spec.to_dict(),
        "recipe": rules.to_dict(),
        "loras": [use_record(use) for use in loras],
        "prompts": made,
        "remarks": list(request.remarks),
    }


def use_record(use: LoraUse) -> dict[str, Any]:
    """A LoRA as results and images record it: by its file's name; what is nowhere else than at 1 is left out."""
    record = {"path": Path(use.path).name, "network_multiplier": use.strength, "mode": use.mode}
    return record | {key: value for key in ("blocks", "schedule") if (value := getattr(use, key))}


def lora_file(folder: Path, name: str) -> Path:
    """A LoRA of a request file: absolute, or relative to the request's folder. Raises LoraError."""
    path = folder / name
    if not path.is_file():
        raise LoraError(
            f"there is no LoRA file '{name}' (looked for '{path}'). Give a path relative to the request's file, or an "
            "absolute one"
        )
    return path


def part_file(folder: Path, field: str, name: str) -> str:
    """A model file or folder of a request file, in the same way. Raises ConfigError."""
    path = folder / name
    if not path.exists():
        raise unusable(f"{field} is '{name}', but there is nothing at '{path}'")
    return str(path)
