"""The commands that make images: `sample` with prompts, schedule, recipe, an image to start from; and `request`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .lora import warn_of_other_bases
from .options import Bar, add_device, add_flag, add_json, add_lora_flags, add_model_options, add_size, spec_from

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..model.flavours import Flavour
    from ..sampling.recipe import Recipe
    from ..sampling.sampler import SamplingSettings, StepInfo


def sample_options(sample: argparse.ArgumentParser) -> None:
    """What sample is asked."""
    from ..loading.spec import LoraUse
    from ..sampling.sampler import SamplingSettings
    from ..training.config import TrainingConfig

    add_model_options(sample)
    sample.add_argument("--prompt", action="append", required=True, help="repeat for several images")
    sample.add_argument("--negative", default="", help="what to steer away from (default: the empty prompt)")
    sample.add_argument("--trigger", default="", help="the word that replaces [trigger]")
    add_lora_flags(sample)
    add_flag(sample, LoraUse, "mode", "--lora-mode")
    add_flag(sample, LoraUse, "allow_partial")
    add_size(sample)
    add_flag(sample, SamplingSettings, "steps", default=None)
    add_flag(sample, SamplingSettings, "guidance", default=None)
    for field in ("seed", "tail_bias", "flow_shift", "method", "spacing"):
        add_flag(sample, SamplingSettings, field)
    sample.add_argument("--image", type=Path, default=None, help="An image to start from; sets the size.")
    sample.add_argument("--mask", type=Path, default=None, help="With --image: white where the image may change.")
    add_flag(sample, SamplingSettings, "denoise", help="With --image: how much of it is generated anew.")
    add_flag(sample, SamplingSettings, "start_step")
    add_flag(sample, SamplingSettings, "end_step")
    add_flag(sample, SamplingSettings, "first_block_cache")
    add_flag(sample, TrainingConfig, "recipe", help="How texts are encoded and numbers rounded.")
    sample.add_argument(
        "--recipe-set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="change a field of the recipe, e.g. noise_dtype=bf16; repeat for several",
    )
    add_device(sample)
    sample.add_argument("--output", type=Path, default=Path("output"), help="folder for the PNG files")
    sample.add_argument("--save-latents", action="store_true", help="also write the latents, beside each image")
    sample.set_defaults(run=_sample)


def _sample(options: argparse.Namespace) -> None:
    from ..files import free_path, write_atomic
    from ..loading.component_cache import ComponentCache
    from ..loading.spec import ModelHandle
    from ..model.device import best_device
    from ..model.flavours import flavour
    from ..model.images import LATENTS_SUFFIX, decode, latents_bytes, png_bytes
    from ..model.latents import LatentFormat
    from ..requests.run import use_record
    from ..sampling.recipe import parse_overrides, recipe
    from ..sampling.sampler import image_record, sample
    from ..sampling.text import apply_trigger

    chosen, device = flavour(options.flavour), best_device(options.device)
    rules = recipe(options.recipe, parse_overrides(",".join(options.recipe_set)))
    spec = spec_from(options)
    settings = settings_from(options, chosen)
    how = {"mode": options.lora_mode, "allow_partial": options.allow_partial}
    handle = ModelHandle(spec, tuple(dataclasses.replace(use, **how) for use in options.lora))
    prompts = [apply_trigger(prompt, options.trigger) for prompt in options.prompt]
    cache = ComponentCache()
    warn_of_other_bases(handle)
    encoder = cache.text_encoder(spec, device)
    positive = [encoder.encode(prompt, rules) for prompt in prompts]
    avoided = apply_trigger(options.negative, options.trigger)
    negative = encoder.encode(avoided, rules)
    for condition in (*positive, negative):
        if condition.truncated:
            said = f"“{condition.text[:60]}…” is too long: its last {condition.truncated} tokens are cut off."
            print(said, file=sys.stderr)
    start, started = start_from(options, lambda: cache.vae(spec, device), rules, len(prompts))
    print(f"recipe {rules.describe()}", file=sys.stderr)
    with (
        cache.transformer(handle, device) as transformer,
        Bar("step", "sampling", settings.run_steps) as bar,
    ):

        def show(info: StepInfo) -> None:
            if settings.first_block_cache:
                bar.set_postfix_str(f"approximate, {info.cut_short:.0%} of the passes cut short")
            bar.update()

        latents = sample(
            transformer,
            positive,
            negative,
            width=options.width if options.width is not None else chosen.size,
            height=options.height if options.height is not None else chosen.size,
            settings=settings,
            recipe=rules,
            on_step=show,
            **start,
        )
    vae = cache.vae(spec, device)
    for i, image in enumerate(decode(vae, latents)):
        record = image_record(prompts[i], avoided, image.size, settings, rules, spec.to_dict())
        record["settings"]["seed"] += i
        record |= {"loras": [use_record(use) for use in handle.loras], **started}
        path = free_path(options.output, f"chroma-{settings.seed + i}.png")
        if options.save_latents:
            file = latents_bytes(latents[i : i + 1], LatentFormat.of(vae))
            write_atomic(path.with_suffix(LATENTS_SUFFIX), file)
        write_atomic(path, png_bytes(image, record))
        print(path)


def settings_from(options: argparse.Namespace, chosen: Flavour) -> SamplingSettings:
    """The settings, with the flavour's steps and guidance where none were given.

    Raises ConfigError, also for options that only make sense with an image to start from.
    """
    from ..sampling.sampler import SamplingSettings
    from ..sampling.schedule import parse_flow_shift

    if options.image is None and (options.mask is not None or options.denoise < 1 or options.start_step):
        raise ConfigError("--mask, --denoise below 1 and --start-step change an image: name it with --image.")
    same = ("seed", "tail_bias", "method", "denoise", "spacing", "start_step", "end_step", "first_block_cache")
    return SamplingSettings(
        steps=options.steps if options.steps is not None else chosen.steps,
        guidance=options.guidance if options.guidance is not None else chosen.guidance,
        flow_shift=None if options.flow_shift is None else parse_flow_shift(options.flow_shift),
        **{name: getattr(options, name) for name in same},
    )


def start_from(
    options: argparse.Namespace, load_vae: Callable[[], Any], rules: Recipe, batch: int
) -> tuple[dict[str, Any], dict[str, str]]:
    """What `sample` needs to start from --image with --mask, and what the record says of it; both empty without.

    An image is cropped about its centre to the recipe's multiple; with --width and --height it is scaled to those.
    Raises ConfigError for images that cannot be read.
    """
    if options.image is None:
        return {}, {}
    import torch
    from PIL.Image import Resampling

    from ..model.images import to_tensor
    from ..model.latents import LatentFormat, snap_size

    vae = load_vae()
    image = _open(options.image).convert("RGB")
    width, height = options.width or image.width, options.height or image.height
    options.width, options.height = snap_size(width, height, rules.size_multiple)
    box = ((width - options.width) // 2, (height - options.height) // 2)
    area = (*box, box[0] + options.width, box[1] + options.height)
    image = image.resize((width, height), Resampling.LANCZOS).crop(area)
    format_ = LatentFormat.of(vae)
    with torch.no_grad():
        z = vae.encode(to_tensor(image).to(vae.device, vae.dtype)).mean.float()
    found = {"start_BCHW": format_.to_model(z).expand(batch, -1, -1, -1)}
    record = {"image": options.image.name}
    if options.mask is not None:
        mask = _open(options.mask).convert("RGB").resize((width, height), Resampling.BILINEAR).crop(area)
        grey = (to_tensor(mask).mean(1, keepdim=True) + 1) / 2
        size = (options.height // format_.downscale, options.width // format_.downscale)
        found["noise_mask_BHW"] = torch.nn.functional.interpolate(grey, size=size, mode="bilinear")[:, 0]
        record["mask"] = options.mask.name
    return found, record


def _open(path: Path) -> Image:
    from PIL import Image, ImageOps

    try:
        image = Image.open(path)
        image.load()
        return ImageOps.exif_transpose(image)  # as it is shown, and as the host's Load Image reads it
    except (OSError, Image.DecompressionBombError) as error:
        raise ConfigError(f"The image '{path}' cannot be read: {error}. Give a PNG, JPEG or WebP file.") from error


def request_options(command: argparse.ArgumentParser) -> None:
    """What request is asked."""
    command.add_argument("file", type=Path, nargs="+", help="a request; several keep the model loaded between them")
    command.add_argument("--output", type=Path, default=Path("output"), help="folder for the PNG files")
    add_device(command)
    add_json(command, "print what was made as JSON, one line a request")
    command.add_argument(
        "--api-prompt",
        action="store_true",
        help="print the request as a ComfyUI prompt in API format, and generate nothing",
    )
    command.set_defaults(run=_request)


def _request(options: argparse.Namespace) -> None:
    from ..comfy.graph import to_prompt
    from ..loading.component_cache import ComponentCache
    from ..model.device import best_device
    from ..requests.request import InferenceRequest
    from ..requests.run import check_loras, lora_file, lora_uses, model_spec, part_file, run_request

    requests = []
    for file in options.file:
        try:
            requests.append((file, InferenceRequest.read(file.read_bytes())))
        except OSError as error:
            raise ConfigError(f"The request '{file}' cannot be read: {error.strerror or error}.") from error
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from error
    for file, request in requests:
        for remark in request.remarks:
            print(f"{file}: {remark}", file=sys.stderr)
    if options.api_prompt:
        for _, request in requests:
            print(json.dumps(to_prompt(request, request.images(), [lora.path for lora in request.loras])))
        return
    device = best_device(options.device)
    planned = []
    for file, request in requests:  # all of them before the first is generated
        folder = file.resolve().parent
        spec = model_spec(request, lambda field, name, folder=folder: part_file(folder, field, name))
        loras = lora_uses(request, lambda name, folder=folder: lora_file(folder, name))
        check_loras(spec, loras)
        planned.append((request, spec, loras))
    cache = ComponentCache()
    for request, spec, loras in planned:
        total = sum(image.sample_steps for image in request.images())
        with Bar("step", "sampling", total) as bar:

            def show(image: int, done: int, steps: int, bar=bar, of=request) -> None:
                bar.set_postfix_str(f"image {image + 1} of {len(of.prompts)}")
                bar.update()

            result = run_request(request, spec, loras, cache, device, options.output, show)
        if options.json:
            print(json.dumps(result, ensure_ascii=False))
            continue
        for made in result["prompts"]:
            cut = f", the last {made['truncated_tokens']} tokens cut off" if made["truncated_tokens"] else ""
            print(
                f"{made['file']}: {made['width']}×{made['height']}, seed {made['seed']}, {made['sample_steps']} steps, "
                f"guidance {made['guidance_scale']:g}{cut}"
            )
