"""The commands about models: fetching one, quantising it to a file, looking into a file, planning its memory."""

from __future__ import annotations

import argparse
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .options import PARTS, Bar, add_device, add_flag, add_json, add_model_options, spec_from


def fetch_options(fetch: argparse.ArgumentParser) -> None:
    """What fetch is asked."""
    from ..model.flavours import FLAVOURS

    fetch.add_argument(
        "--flavour", default="base", choices=[f.name for f in FLAVOURS.values() if f.repository], help="which Chroma"
    )
    fetch.add_argument("--part", action="append", choices=PARTS, help="only this part; repeat for several")
    fetch.add_argument("--revision", default=None, help="a commit or branch (default: the pinned one)")
    fetch.set_defaults(run=_fetch)


def quantise_options(quantise: argparse.ArgumentParser) -> None:
    """What quantise is asked."""
    add_model_options(quantise)
    quantise.add_argument("--part", default="transformer", choices=["transformer", "text_encoder"], help="which part")
    quantise.add_argument("--output", type=Path, required=True, help="the .safetensors file to write")
    add_device(quantise, "where to quantise")
    quantise.set_defaults(run=_quantise)


def inspect_model_options(inspect: argparse.ArgumentParser) -> None:
    """What inspect-model is asked."""
    inspect.add_argument("file", type=Path, help="a model's, text encoder's or VAE's file")
    add_json(inspect)
    inspect.set_defaults(run=_inspect)


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
    with Bar("block", chosen.name) as bar:

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
    from ..weights.opening import open_weights, parts_in

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
            component = describe_part(weights, identity.part)
            report["config"] = component.config
            if component.notes:
                report["notes"] = list(component.notes)
            others = sorted(parts_in(path) - {identity.part}) if path.is_file() else []
            if others:
                report["holds_as_well"] = others
    if options.json:
        print(json.dumps(report, indent=2))
        return
    for name, value in report.items():
        print(f"{name.replace('_', ' ')}: {value}")


def plan_options(plan: argparse.ArgumentParser) -> None:
    """What plan is asked."""
    from ..loading.spec import ModelSpec
    from ..memory import Settings

    for field in ("flavour", "precision", "text_precision", "offload", "resident_blocks", "offload_during_startup"):
        add_flag(plan, ModelSpec, field, **({"metavar": "NAME"} if field.endswith("precision") else {}))
    add_flag(plan, Settings, "size", default=None)
    add_flag(plan, Settings, "batch_size")
    add_flag(plan, Settings, "rank")
    plan.add_argument("--no-checkpointing", action="store_true", help="Training without gradient checkpointing.")
    for field in ("optimizer", "adapter"):
        add_flag(plan, Settings, field, choices=None)
    for field in ("ema", "deterministic", "text_tokens", "trained_parameters"):
        add_flag(plan, Settings, field)
    plan.add_argument("--device-memory", type=float, metavar="GIB", help="Plan for a GPU of that size, not this one.")
    plan.add_argument("--margin", type=float, metavar="GIB", help="GPU memory to leave to others (default: 1 GiB).")
    plan.add_argument("--host-memory", type=float, metavar="GIB", help="Plan for that much RAM.")
    add_json(plan)
    plan.set_defaults(run=_plan)


def _plan(options: argparse.Namespace) -> None:
    from ..memory import Settings, estimate, machine, memory_plan

    on = machine().with_memory(options.device_memory, options.host_memory, options.margin)
    names = {field.name for field in fields(Settings)} & set(vars(options)) - {"size"}
    chosen: dict[str, Any] = {name: getattr(options, name) for name in names}
    settings = Settings(**chosen, size=options.size, gradient_checkpointing=not options.no_checkpointing)
    result = estimate(settings, on)
    if options.json:
        print(json.dumps(result.to_dict()))
    else:
        print(result.table(), memory_plan(settings, on).text, sep="\n\n")
