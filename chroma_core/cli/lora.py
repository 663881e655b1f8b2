"""The commands about LoRA files: looking into one, writing it in another program's names, or as ComfyUI's workflow."""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError
from .options import add_conversion, add_device, add_flag, add_json, add_lora_file, add_size

if TYPE_CHECKING:
    from ..loading.spec import ModelHandle, ModelSpec


TEXTS = ("prompt", "negative", "trigger")
NUMBERS = ("width", "height", "steps", "guidance", "seed", "strength")


def inspect_lora_options(inspect: argparse.ArgumentParser) -> None:
    """What inspect-lora is asked."""
    add_lora_file(inspect)
    add_json(inspect)
    inspect.add_argument(
        "--base",
        metavar="MODEL",
        help="compare with the base that it was trained on: a flavour, a transformer's file, or a diffusers folder. "
        "Reads the whole file the first time",
    )
    inspect.add_argument("--heat-map", type=Path, metavar="PNG", help="write an image of how much it changes where")
    inspect.add_argument(
        "--effects",
        type=Path,
        metavar="PNG",
        help="with --base and --prompt: write what each group of blocks does to an image, which is sampled without one "
        "of them at a time",
    )
    inspect.add_argument("--prompt", default=None, help="of that image, as for sample")
    inspect.add_argument("--negative", default="", help="of that image")
    inspect.add_argument("--groups", type=int, default=8, help="about how many groups of blocks (default: 8)")
    _add_numbers(inspect, "of that image")
    add_device(inspect)
    inspect.set_defaults(run=_inspect)


def convert_options(convert: argparse.ArgumentParser) -> None:
    """What convert-lora is asked."""
    add_conversion(convert, required=True)
    convert.set_defaults(run=_convert)


def warn_of_other_bases(handle: ModelHandle) -> None:
    """A line on stderr for every LoRA that was trained on another base than the one of `handle`."""
    from ..loading.model_files import base_warning
    from ..lora.files import read_metadata

    for use in handle.loras:
        remark = base_warning(read_metadata(use.path), handle.spec)
        if remark:
            print(f"warning: {use.path}: {remark}", file=sys.stderr)


def _inspect(options: argparse.Namespace) -> None:
    from ..lora.files import read_lora
    from ..lora.report import lora_report, report_text, update_norms

    lora = read_lora(options.file)
    remark, norms = None, update_norms(lora)
    if options.base:
        from ..checkpoints.merge import norms_on
        from ..loading.model_files import base_warning

        spec = model_spec(options.base)
        remark, norms = base_warning(lora.metadata, spec, read_everything=True), norms_on(lora, spec)
    report = lora_report(lora, str(options.file), options.file, [remark] if remark else [], norms)
    if options.heat_map:
        from ..files import write_atomic
        from ..lora.report import heat_map
        from ..model.images import png_bytes

        write_atomic(options.heat_map, png_bytes(heat_map(norms), {"lora": Path(options.file).name}))
    if options.effects:
        report["effects"] = _effects(options)
    for warning in report["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    print(json.dumps(report, indent=2, ensure_ascii=False) if options.json else report_text(report))


def _effects(options: argparse.Namespace) -> dict[str, float]:
    """Write the sheet that --effects names; the mean difference of each of its images, of 255 levels."""
    from ..files import write_atomic
    from ..loading.component_cache import ComponentCache, live_name
    from ..loading.spec import LoraUse, ModelHandle
    from ..lora.effects import Effects, effects_of
    from ..model.device import best_device
    from ..model.flavours import flavour
    from ..model.images import decode, png_bytes
    from ..sampling.recipe import CANONICAL
    from ..sampling.sampler import SamplingSettings, sample

    if not (options.base and options.prompt):
        raise ConfigError("--effects samples images: name the model with --base, and what to generate with --prompt.")
    spec, device, cache = model_spec(options.base), best_device(options.device), ComponentCache()
    chosen = flavour(spec.flavour)
    given = {name: value for name in ("seed", "steps", "guidance") if (value := getattr(options, name)) is not None}
    settings = SamplingSettings(**{"steps": chosen.steps, "guidance": chosen.guidance, **given})
    encoder = cache.text_encoder(spec, device)
    texts = [encoder.encode(text, CANONICAL) for text in (options.prompt, options.negative)]
    width, height = (getattr(options, name) or chosen.size for name in ("width", "height"))
    use = LoraUse(str(options.file), 1.0 if options.strength is None else options.strength)
    with cache.transformer(ModelHandle(spec, (use,)), device) as transformer:
        generate = partial(sample, transformer, texts[:1], texts[1], width=width, height=height, settings=settings)
        latents = effects_of(transformer, live_name(0), options.groups, generate)
    vae = cache.vae(spec, device)
    found = Effects({label: decode(vae, each)[0] for label, each in latents.items()})
    record = {"lora": str(options.file), "prompt": options.prompt, "settings": settings.to_dict()}
    write_atomic(options.effects, png_bytes(found.sheet(), record | {"differences": found.differences}))
    print(found.report(), file=sys.stderr)
    return found.differences


def model_spec(base: str) -> ModelSpec:
    """The model that one word names: a flavour, a transformer's file, or a diffusers folder."""
    from ..loading.spec import ModelSpec
    from ..model.flavours import FLAVOURS

    if base in FLAVOURS:
        return ModelSpec(base)
    whole = (Path(base) / "model_index.json").is_file()
    return ModelSpec(folder=base) if whole else ModelSpec(transformer=base)


def _convert(options: argparse.Namespace) -> None:
    from ..lora.convert import convert_lora

    made = convert_lora(options.file, options.to, options.output, options.dtype)
    print(made.path)
    print(made.report(), file=sys.stderr)


def export_options(command: argparse.ArgumentParser) -> None:
    """What export-workflow is asked."""
    command.add_argument("lora", type=Path, help="a LoRA file; its header says what to repeat")
    command.add_argument("--output", type=Path, default=None, help="the workflow to write (default: NAME_stock.json)")
    for part, folder in (("transformer", "diffusion_models"), ("text_encoder", "text_encoders"), ("vae", "vae")):
        option = f"--{part.replace('_', '-')}"
        command.add_argument(option, default=None, metavar="NAME", help=f"file in ComfyUI's models/{folder}")
    command.add_argument("--lora-name", default=None, metavar="NAME", help="the LoRA's name in ComfyUI's models/loras")
    for name in TEXTS:
        command.add_argument(f"--{name}", default=None, help="instead of the preview's")
    _add_numbers(command, "instead of the preview's")
    add_json(command, "print what was written as JSON")
    command.set_defaults(run=_export)


def _add_numbers(command: argparse.ArgumentParser, help: str) -> None:
    """The `NUMBERS` of one image, each None unless it is given."""
    from ..loading.spec import LoraUse
    from ..sampling.sampler import SamplingSettings

    add_size(command, help)
    for name in ("steps", "guidance", "seed"):
        add_flag(command, SamplingSettings, name, default=None, help=help)
    add_flag(command, LoraUse, "strength", default=None, help=help)


def _export(options: argparse.Namespace) -> None:
    from ..comfy.stock import export_workflow

    window, api, preview = export_workflow(
        options.lora,
        options.output,
        {name: getattr(options, name) for name in (*TEXTS, *NUMBERS)},
        lora=options.lora_name,
        transformer=options.transformer,
        text_encoder=options.text_encoder,
        vae=options.vae,
    )
    if options.json:
        print(json.dumps({"workflow": str(window), "api": str(api), "remarks": list(preview.warnings)}))
        return
    print(window, api, *(f"note: {warning}" for warning in preview.warnings), sep="\n")
