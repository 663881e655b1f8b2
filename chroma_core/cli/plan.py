"""The command line's `plan`."""

from __future__ import annotations

import argparse
import json
from typing import Any, get_args


def add_plan_command(commands) -> None:
    """The sub-command plan."""
    commands.add_parser(
        "plan", help="how much memory a flavour needs, and what to choose on this machine", options=_options
    )


def _options(plan: argparse.ArgumentParser) -> None:
    from ..loading.spec import Offload
    from ..model.flavours import FLAVOURS
    from ..model.precision import PRECISIONS

    plan.add_argument("--flavour", default="base", choices=list(FLAVOURS))
    plan.add_argument("--precision", default="bf16", choices=list(PRECISIONS), metavar="NAME")
    plan.add_argument("--text-precision", default="bf16", choices=list(PRECISIONS), metavar="NAME", help="of T5")
    plan.add_argument("--offload", default="none", choices=get_args(Offload))
    plan.add_argument("--resident-blocks", type=int, default=2, help="with --offload block: blocks on the device")
    plan.add_argument("--offload-during-startup", action="store_true", help="quantise in the computer's memory")
    plan.add_argument("--size", type=int, default=None, help="pixels a side (default: the flavour's)")
    plan.add_argument("--batch-size", type=int, default=1)
    plan.add_argument("--rank", type=int, default=16, help="of the LoRA in training")
    plan.add_argument("--no-checkpointing", action="store_true", help="training without gradient checkpointing")
    plan.add_argument("--optimizer", default="adamw", help="see docs/optimizers.md")
    plan.add_argument("--adapter", default="lora", help="lora, rslora, dora or lokr")
    plan.add_argument("--ema", action="store_true", help="a running mean of the weights is kept")
    plan.add_argument("--text-tokens", type=int, default=128, help="of a caption; 512 when it is padded")
    plan.add_argument("--trained-parameters", type=int, default=0, help="full-rank training of so many, without LoRA")
    plan.add_argument("--device-memory", type=float, metavar="GIB", help="plan for a card of that size, not this one")
    plan.add_argument("--host-memory", type=float, metavar="GIB", help="plan for a computer with that much memory")
    plan.add_argument("--json", action="store_true", help="print JSON")
    plan.set_defaults(run=_plan)


def _plan(options: argparse.Namespace) -> None:
    from ..memory import estimate, machine, plan_table

    on = machine().with_memory(options.device_memory, options.host_memory)
    chosen: dict[str, Any] = {
        "size": options.size,
        "batch_size": options.batch_size,
        "rank": options.rank,
        "gradient_checkpointing": not options.no_checkpointing,
        "text_precision": options.text_precision,
        "offload": options.offload,
        "resident_blocks": options.resident_blocks,
        "offload_during_startup": options.offload_during_startup,
        "on": on,
    }
    trained = ("optimizer", "adapter", "ema", "text_tokens", "trained_parameters")
    more = {name: getattr(options, name) for name in trained}
    result = estimate(options.flavour, options.precision, **chosen, **more)
    if options.json:
        print(json.dumps(result.to_dict()))
    else:
        print(result.table(), plan_table(options.flavour, options.precision, **chosen), sep="\n\n")
