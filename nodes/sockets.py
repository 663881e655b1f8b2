"""The pack's own socket types, and conversion between ComfyUI's values and the core's.

A link carries a handle, an id or plain settings, never a loaded model: ComfyUI may evict any value at any time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from comfy_api.latest import io
from PIL import Image
from torch import Tensor

from ..chroma_core.errors import ConfigError, DataError, PromptError
from ..chroma_core.loading.spec import ModelHandle, ModelSpec
from ..chroma_core.model.latents import LatentFormat
from ..chroma_core.sampling.recipe import CANONICAL, Recipe
from ..chroma_core.sampling.text import TextCondition

ChromaModel = io.Custom("CHROMA_MODEL")
"""A `ModelHandle`."""
ChromaTextEncoder = io.Custom("CHROMA_TEXT_ENCODER")
"""A `ModelSpec`."""
ChromaDatasetType = io.Custom("CHROMA_DATASET")
"""A tuple of `DatasetConfig`s, the main one first."""
ChromaDatasetOptionsType = io.Custom("CHROMA_DATASET_OPTIONS")
ChromaSamplerOptionsType = io.Custom("CHROMA_SAMPLER_OPTIONS")
"""The last two: `Options`."""
ChromaTrainingType = io.Custom("CHROMA_TRAINING")
"""A `TrainingPart`."""
ChromaJob = io.Custom("CHROMA_JOB")
"""A job id."""

OURS = "chromakit"
"""Key under which our encoder notes in a CONDITIONING how it was made."""


class TrainingPart(dict[str, Any]):
    """A part of a `TrainingConfig` that Chroma Training Settings made: JSON in a prompt is none, as it could name any
    file. `options` are the widgets that it was made of, as far as they are not at their default."""

    def __init__(self, values: Mapping[str, Any], options: Mapping[str, Any]):
        super().__init__(values)
        self.options = dict(options)


_UNSUPPORTED = {
    "area": "areas",
    "mask": "masks",
    "control": "ControlNets",
    "gligen": "GLIGEN",
    "reference_latents": "reference latents",
    "hooks": "hooks",
    "start_percent": "timestep ranges",
    "end_percent": "timestep ranges",
}


def schema(family: str, **options: Any) -> io.Schema:
    """An `io.Schema` below `family` in the menu, without the options that an older ComfyUI does not know yet."""
    known = {field.name for field in fields(io.Schema)}
    return io.Schema(category=f"Chroma/{family}", **{name: value for name, value in options.items() if name in known})


def whole_spec(model: ModelHandle, text_encoder: ModelSpec) -> ModelSpec:
    """Transformer and text encoder of two links as one specification. Raises ConfigError when they do not belong."""
    if (model.spec.flavour, model.spec.folder) != (text_encoder.flavour, text_encoder.folder):
        raise ConfigError(
            f"The model is '{model.spec.folder or model.spec.flavour}', but the text encoder belongs to "
            f"'{text_encoder.folder or text_encoder.flavour}'. Link both from the same Chroma Load Model."
        )
    own = ("text_precision", "text_encoder", "tokenizer")
    return replace(model.spec, **{name: getattr(text_encoder, name) for name in own})


def to_conditioning(condition: TextCondition, spec: ModelSpec, recipe: Recipe = CANONICAL) -> list[list[Any]]:
    """One encoded prompt as a CONDITIONING that ComfyUI's samplers read too."""
    states_1TC = condition.states[None].cpu()
    note = {
        "text": condition.text,
        "text_encoder": spec.to_dict(),
        "recipe": recipe.to_dict(),
        "real_tokens": condition.real_tokens,
        "digest": _digest(states_1TC),
    }
    return [[states_1TC, {"pooled_output": None, OURS: note}]]


def from_conditioning(conditioning: list[list[Any]], batch: int, channels: int) -> list[TextCondition]:
    """A CONDITIONING, from our encoder or ComfyUI's, as one condition an image; rows repeat to fill the batch.

    Raises ConfigError for what the sampler would otherwise ignore: several conditionings, areas, masks, ControlNets,
    or states of another width than the `channels` of the model.
    """
    if len(conditioning) != 1:
        raise ConfigError(
            f"The conditioning is a combination of {len(conditioning)} prompts; Chroma Sampler takes one prompt. Write "
            "both into one text, or sample with ComfyUI's own nodes."
        )
    states_BTC, options = conditioning[0]
    ignored = sorted({name for key, name in _UNSUPPORTED.items() if _is_set(key, options.get(key))})
    if ignored:
        raise ConfigError(
            f"The conditioning carries {', '.join(ignored)}, which Chroma Sampler does not support. Take that node out "
            "of the chain, or sample with ComfyUI's own nodes."
        )
    if states_BTC.shape[-1] != channels:
        raise ConfigError(
            f"The conditioning has {states_BTC.shape[-1]} channels, but the model reads {channels}: it comes from the "
            "text encoder of another model. Use the text encoder that was loaded with this model."
        )
    note = options.get(OURS, {})
    text, real = note.get("text", ""), note.get("real_tokens", states_BTC.shape[1])
    rows = [TextCondition(row, text, real) for row in states_BTC]
    return [rows[i % len(rows)] for i in range(batch)]


def _is_set(key: str, value: Any) -> bool:
    neutral = {"start_percent": 0.0, "end_percent": 1.0}
    return value is not None and not (key in neutral and value == neutral[key])


def prompt_to_encode_again(conditioning: list[list[Any]], recipe: Recipe) -> tuple[str, ModelSpec] | None:
    """(prompt, encoder) when `recipe` treats text otherwise than the recipe of the encoding; None when it stands.

    Raises PromptError when it would have to be encoded again but was changed after encoding.
    """
    note = conditioning[0][1].get(OURS)
    if note is None:  # ComfyUI's own encoder: taken as it is
        return None
    made_with = Recipe.from_dict(note["recipe"])
    if (made_with.text_attention, made_with.visible_padding) == (recipe.text_attention, recipe.visible_padding):
        return None
    if _digest(conditioning[0][0]) != note["digest"]:
        raise PromptError(
            f"The recipe '{recipe.name}' encodes prompts in another way, but this conditioning was changed after it "
            "was encoded. Use the canonical recipe, or link the encoder straight to the sampler."
        )
    return note["text"], ModelSpec.from_dict(note["text_encoder"])


def encoder_of(conditioning: list[list[Any]]) -> ModelSpec | None:
    """The text encoder that made a conditioning; None for ComfyUI's own."""
    note = conditioning[0][1].get(OURS)
    return ModelSpec.from_dict(note["text_encoder"]) if note else None


def crop_latents(latent: dict[str, Any], format_: LatentFormat, multiple: int) -> tuple[Tensor, str]:
    """LATENT samples [B, C, H, W] cut, about the centre, to a size the recipe allows, and what to tell the user.

    Empty latents of another model's channel count (ComfyUI's Empty Latent Image) become ours.
    """
    samples = latent["samples"]
    if samples.ndim != 4:
        raise ConfigError(
            f"The latents have shape {list(samples.shape)}; Chroma samples images: [batch, channels, rows, columns]."
        )
    B, C, H, W = samples.shape
    if format_.channels != C:
        if torch.count_nonzero(samples):
            raise ConfigError(
                f"The latents have {C} channels, but Chroma's have {format_.channels}: they were encoded by the VAE "
                "of another model. Encode the image with the VAE that Chroma Load Model gives."
            )
        samples = samples.new_zeros(B, format_.channels, H, W)
    cells = multiple // format_.downscale
    rows, columns = H // cells * cells, W // cells * cells
    if not rows or not columns:
        size = f"{W * format_.downscale}×{H * format_.downscale}"
        raise ConfigError(f"The latents are {size} pixels; an image must be at least {multiple}×{multiple}.")
    message = ""
    if (rows, columns) != (H, W):
        samples = _centre(samples, rows, columns)
        message = (
            f"Size {W * format_.downscale}×{H * format_.downscale} floored to {columns * format_.downscale}×"
            f"{rows * format_.downscale}: sides must be multiples of {multiple} pixels."
        )
    return samples, message


def noise_mask(latent: dict[str, Any], cells: int) -> Tensor | None:
    """The LATENT's noise mask as [B, H, W] in latent rows, 1 where the image may change; None without one.

    It is scaled to the uncropped latents, then cropped like them (`cells` is the crop unit in latent rows).
    """
    mask = latent.get("noise_mask")
    if mask is None:
        return None
    B, _, H, W = latent["samples"].shape
    mask_B1HW = mask.reshape(-1, 1, *mask.shape[-2:]).float()
    mask_BHW = torch.nn.functional.interpolate(mask_B1HW, size=(H, W), mode="bilinear")[:, 0]
    if mask_BHW.shape[0] < B:
        mask_BHW = mask_BHW.repeat(-(-B // mask_BHW.shape[0]), 1, 1)
    return _centre(mask_BHW[:B], H // cells * cells, W // cells * cells)


def _centre(x: Tensor, rows: int, columns: int) -> Tensor:
    top, left = (x.shape[-2] - rows) // 2, (x.shape[-1] - columns) // 2
    return x[..., top : top + rows, left : left + columns]


def to_image(images: list[Any]) -> Tensor:
    """Images of one size → IMAGE [B, H, W, 3] in 0..1."""
    import numpy

    arrays = [torch.from_numpy(numpy.array(image.convert("RGB"), dtype=numpy.float32)) for image in images]
    return torch.stack(arrays) / 255


def _digest(states: Tensor) -> str:
    return hashlib.sha256(states.detach().cpu().float().contiguous().numpy().tobytes()).hexdigest()


_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def images_of(images: Sequence[Tensor | None]) -> list[Image.Image]:
    """Every image of a list of IMAGEs [B, H, W, C] (or [H, W, C]) in 0..1, in order, in 8 bits.

    Sizes may differ from one IMAGE to the next; C is 1, 3 or 4 (alpha). Raises DataError for anything else.
    """
    found = []
    for image in images:
        if image is None:
            continue
        if image.ndim == 3:
            image = image[None]
        if image.ndim != 4 or image.shape[-1] not in _MODES or not image.numel():
            raise DataError(
                f"Image {len(found) + 1} has the shape {list(image.shape)}; an IMAGE is [batch, height, width, "
                "channels] with 1, 3 or 4 channels. Link the images from a node that gives IMAGE."
            )
        for pixels in image:
            values = _bytes(pixels, f"Image {len(found) + 1}")
            found.append(Image.fromarray(values if values.shape[-1] > 1 else values[..., 0], _MODES[values.shape[-1]]))
    return found


def masks_of(masks: Sequence[Tensor | None], images: Sequence[Image.Image]) -> list[Image.Image | None]:
    """A loss mask for each image from a list of MASKs [B, H, W] (or [H, W]) in 0..1, where 1 is trained.

    A single mask is for all images. One that is black all over is no mask (None): ComfyUI's Load Image gives such a
    one, of 64 × 64, for an image without transparency.

    Raises DataError for another number of masks than images, or a mask of another shape than its image.
    """
    found: list[Image.Image | None] = []
    for mask in masks:
        if mask is None:
            continue
        if mask.ndim not in (2, 3) or not mask.numel():
            raise DataError(
                f"Mask {len(found) + 1} has the shape {list(mask.shape)}; a MASK is [batch, height, width]. Link it "
                "from a node that gives MASK."
            )
        for pixels in mask[None] if mask.ndim == 2 else mask:
            values = _bytes(pixels, f"Mask {len(found) + 1}")
            found.append(Image.fromarray(values, "L") if values.any() else None)
    if len(found) not in (0, 1, len(images)):
        raise DataError(
            f"There are {len(images)} images and {len(found)} masks. Give one mask for each image, in the same "
            "order, or a single one for all."
        )
    found = found * len(images) if len(found) == 1 else found
    for number, (mask, image) in enumerate(zip(found, images, strict=False), 1):
        if mask and abs(mask.width * image.height / (mask.height * image.width) - 1) > 0.02:
            raise DataError(
                f"Mask {number} is {mask.width}×{mask.height}, but its image is {image.width}×{image.height}: "
                "another shape. Make the mask from the very image, or crop both alike."
            )
    return found


def _bytes(values: Tensor, what: str) -> np.ndarray:
    """0..1 as 0..255; the nearest, so that what was a file of 8 bits comes back unchanged."""
    array = values.detach().float().cpu().numpy()
    if not np.isfinite(array).all():
        raise DataError(f"{what} holds values that are not numbers. Look at the node that made it.")
    return (array.clip(0, 1) * 255).round().astype(np.uint8)
