"""The command line's `plan`."""

from __future__ import annotations

import argparse
import json
from dataclasses import fields
from typing import Any

from .options import add_flag


def add_plan_command(commands) -> None:
    """The sub-command plan."""
    commands.add_parser(
        "plan", help="how much memory a flavour needs, and what to choose on this machine", options=_options
    )


def _options(plan: argparse.ArgumentParser) -> None:
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
    for field in ("ema", "text_tokens", "trained_parameters"):
        add_flag(plan, Settings, field)
    plan.add_argument("--device-memory", type=float, metavar="GIB", help="Plan for a GPU of that size, not this one.")
    plan.add_argument("--host-memory", type=float, metavar="GIB", help="Plan for that much RAM.")
    plan.add_argument("--json", action="store_true", help="print JSON")
    plan.set_defaults(run=_plan)


def _plan(options: argparse.Namespace) -> None:
    from ..memory import Settings, estimate, machine, memory_plan

    on = machine().with_memory(options.device_memory, options.host_memory)
    names = {field.name for field in fields(Settings)} & set(vars(options)) - {"size"}
    chosen: dict[str, Any] = {name: getattr(options, name) for name in names}
    settings = Settings(**chosen, size=options.size, gradient_checkpointing=not options.no_checkpointing)
    result = estimate(settings, on)
    if options.json:
        print(json.dumps(result.to_dict()))
    else:
        print(result.table(), memory_plan(settings, on).text, sep="\n\n")
