"""The command line's part about models: choosing one, fetching it, quantising it to a file, looking into a file."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from ..errors import ConfigError
from .options import add_flag

if TYPE_CHECKING:
    from ..loading.spec import ModelSpec, Offload

PARTS = ("transformer", "text_encoder", "tokenizer", "vae")


def add_model_options(parser: argparse.ArgumentParser, offload: Offload = "model") -> None:
    """The options that `spec_from` reads."""
    from ..loading.spec import ModelSpec

    add_flag(parser, ModelSpec, "flavour")
    add_flag(parser, ModelSpec, "folder")
    for part in PARTS:
        add_flag(parser, ModelSpec, part, metavar="FILE")
    add_flag(parser, ModelSpec, "revision")
    for field in ("precision", "text_precision"):
        add_flag(parser, ModelSpec, field, choices=None, metavar="NAME")
    add_flag(parser, ModelSpec, "offload", default=offload)
    add_flag(parser, ModelSpec, "resident_blocks")
    add_flag(parser, ModelSpec, "offload_during_startup")
    add_flag(parser, ModelSpec, "quantised_folder", "--keep-quantised", metavar="FOLDER")


def spec_from(options: argparse.Namespace) -> ModelSpec:
    """The model that the options of `add_model_options` choose."""
    from ..loading.spec import ModelSpec

    return ModelSpec(
        options.flavour,
        options.folder,
        options.precision,
        options.text_precision,
        options.offload,
        **{part: getattr(options, part) for part in PARTS},
        revision=options.revision,
        resident_blocks=options.resident_blocks,
        offload_during_startup=options.offload_during_startup,
        quantised_folder=options.keep_quantised,
    )


def add_model_commands(commands) -> None:
    """The sub-commands fetch, quantise and inspect-model."""
    commands.add_parser(
        "fetch", help="download a flavour from the Hub, or what is missing of it", options=_fetch_options
    )
    commands.add_parser("quantise", help="write a quantised model file, which loads faster", options=_quantise_options)
    inspect = commands.add_parser("inspect-model", help="what a model file is, and whether ChromaKit reads it")
    inspect.add_argument("file", type=Path)
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.set_defaults(run=_inspect)


def _fetch_options(fetch: argparse.ArgumentParser) -> None:
    from ..model.flavours import FLAVOURS

    fetch.add_argument("--flavour", default="base", choices=[f.name for f in FLAVOURS.values() if f.repository])
    fetch.add_argument("--part", action="append", choices=PARTS, help="only this part; repeat for several")
    fetch.add_argument("--revision", default=None, help="a commit or branch (default: the pinned one)")
    fetch.set_defaults(run=_fetch)


def _quantise_options(quantise: argparse.ArgumentParser) -> None:
    add_model_options(quantise)
    quantise.add_argument("--part", default="transformer", choices=["transformer", "text_encoder"])
    quantise.add_argument("--output", type=Path, required=True, help="the .safetensors file to write")
    quantise.add_argument("--device", default=None, help="where to quantise: cuda, mps or cpu (default: the best)")
    quantise.set_defaults(run=_quantise)


def _fetch(options: argparse.Namespace) -> None:
    from ..loading.hub import fetch
    from ..model.flavours import flavour

    print(fetch(flavour(options.flavour), options.part or PARTS, options.revision))


def _quantise(options: argparse.Namespace) -> None:
    from ..loading.load import write_quantised
    from ..model.device import best_device
    from ..model.precision import precision

    chosen = precision(options.precision if options.part == "transformer" else options.text_precision)
    if not chosen.quantised:
        raise ConfigError(f"The precision {chosen.name} is not a quantised one. Choose e.g. int8 or nf4.")
    if options.output.exists():
        raise ConfigError(f"'{options.output}' exists already. Choose another name, or remove it first.")
    with tqdm(unit="block", desc=f"{chosen.name}") as bar:

        def show(done: int, total: int, what: str) -> None:
            bar.total, bar.n = total, done
            bar.set_postfix_str(what)
            bar.refresh()

        write_quantised(options.output, spec_from(options), options.part, best_device(options.device), show)
    print(options.output)


def _inspect(options: argparse.Namespace) -> None:
    from ..loading.matching import describe_part
    from ..loading.quantised_files import is_quantised_file, quantised_header
    from ..weights.identify import identify
    from ..weights.opening import open_weights

    path: Path = options.file
    if is_quantised_file(path):
        report = {"file": str(path), "what": "a quantised part, written by ChromaKit", **(quantised_header(path) or {})}
    else:
        weights = open_weights(path)
        identity = identify(weights.shapes, weights.metadata)
        storage = sorted(set(weights.storage.values()))
        report = {
            "file": str(path),
            "what": identity.title,
            "part": identity.part,
            "layout": identity.layout,
            "stored_as": storage,
            "tensors": len(weights.shapes),
        }
        if identity.part is not None:
            report["config"] = describe_part(weights, identity.part).config
    if options.json:
        print(json.dumps(report, indent=2))
        return
    for name, value in report.items():
        print(f"{name.replace('_', ' ')}: {value}")
