"""The command line: train a job file, sample pictures, look into a LoRA file, plan memory. No host needed."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from tqdm import tqdm

from .cli_export import add_export_command
from .cli_import import add_import_command
from .cli_models import add_model_commands, add_model_options, spec_from
from .cli_requests import add_request_commands
from .device import best_device
from .errors import ChromaKitError, ConfigError
from .flavours import FLAVOURS, flavour
from .loading.spec import Offload
from .precision import PRECISIONS
from .recipe import RECIPES


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 1 a ChromaKitError (printed as one paragraph), 2 bad usage."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        return options.run(options) or 0
    except ChromaKitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m chroma_core", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train a LoRA from a job.toml; resumes when the job exists")
    train.add_argument("job", type=Path, help="the job file (see docs/training.md)")
    train.add_argument("--output", type=Path, default=Path("output"), help="folder for job and LoRA (default: output)")
    train.add_argument("--device", default=None, help="cuda, mps or cpu (default: the best there is)")
    train.add_argument("--restart", action="store_true", help="forget an earlier run of the same job")
    train.set_defaults(run=_train)

    sample = commands.add_parser("sample", help="make pictures")
    add_model_options(sample)
    sample.add_argument("--prompt", action="append", required=True, help="repeat for several pictures")
    sample.add_argument("--negative", default="", help="what to steer away from (default: the empty prompt)")
    sample.add_argument("--trigger", default="", help="the word that replaces [trigger]")
    sample.add_argument("--lora", action="append", default=[], metavar="FILE[@STRENGTH]", help="repeat for several")
    sample.add_argument("--lora-mode", choices=["live", "merged"], default="live")
    sample.add_argument("--width", type=int, default=None)
    sample.add_argument("--height", type=int, default=None)
    sample.add_argument("--steps", type=int, default=None)
    sample.add_argument("--guidance", type=float, default=None)
    sample.add_argument("--seed", type=int, default=42, help="picture i uses seed + i")
    sample.add_argument("--tail-bias", type=float, default=0.0)
    sample.add_argument("--flow-shift", default=None, help="dynamic, none or a number (default: the recipe's)")
    sample.add_argument("--method", choices=["euler", "heun"], default="euler")
    sample.add_argument("--recipe", choices=list(RECIPES), default="canonical")
    sample.add_argument("--device", default=None)
    sample.add_argument("--output", type=Path, default=Path("output"), help="folder for the PNG files")
    sample.set_defaults(run=_sample)

    add_model_commands(commands)
    add_import_command(commands)
    add_request_commands(commands)
    add_export_command(commands)

    inspect = commands.add_parser("inspect-lora", help="what a LoRA file holds")
    inspect.add_argument("file", type=Path)
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.set_defaults(run=_inspect_lora)

    plan = commands.add_parser("plan", help="how much memory a flavour needs, and what to choose on this machine")
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
    plan.add_argument("--device-memory", type=float, metavar="GIB", help="plan for a card of that size, not this one")
    plan.add_argument("--host-memory", type=float, metavar="GIB", help="plan for a computer with that much memory")
    plan.add_argument("--json", action="store_true", help="print JSON")
    plan.set_defaults(run=_plan)
    return parser


def _train(options: argparse.Namespace) -> int:
    from .training.config import TrainingConfig
    from .training.jobs import run_job

    config = TrainingConfig.from_toml(options.job)
    with tqdm(total=config.steps, unit="step", desc="preparing") as bar:

        def show(status: dict) -> None:
            bar.set_description(status["state"])
            bar.n = status["step"]
            if status.get("loss_smooth") is not None:
                bar.set_postfix(loss=f"{status['loss_smooth']:.4f}")
            bar.refresh()

        status = run_job(
            config,
            root=options.output / "jobs",
            loras_folder=options.output / "loras",
            device=best_device(options.device),
            on_status=show,
            if_exists="restart" if options.restart else "resume",
        )
    print(
        json.dumps(
            {k: status.get(k) for k in ("id", "state", "step", "heldout_loss_base", "heldout_loss", "lora_path")}
        )
    )
    if status["state"] != "completed":
        print(f"error: the job {status['state']}: {status.get('message') or 'no reason given'}", file=sys.stderr)
    return 0 if status["state"] == "completed" else 1


def _sample(options: argparse.Namespace) -> None:
    from .files import write_atomic
    from .loading.cache import ComponentCache
    from .loading.spec import ModelHandle
    from .pictures import decode, png_bytes
    from .recipe import recipe
    from .sampling import SamplingSettings, sample
    from .schedule import parse_flow_shift
    from .text import apply_trigger

    chosen, rules, device = flavour(options.flavour), recipe(options.recipe), best_device(options.device)
    spec = spec_from(options)
    settings = SamplingSettings(
        steps=options.steps if options.steps is not None else chosen.steps,
        guidance=options.guidance if options.guidance is not None else chosen.guidance,
        seed=options.seed,
        tail_bias=options.tail_bias,
        flow_shift=None if options.flow_shift is None else parse_flow_shift(options.flow_shift),
        method=options.method,
    )
    handle = ModelHandle(spec, tuple(_lora_use(text, options.lora_mode) for text in options.lora))
    prompts = [apply_trigger(prompt, options.trigger) for prompt in options.prompt]
    cache = ComponentCache()
    encoder = cache.text_encoder(spec, device)
    positive = [encoder.encode(prompt, rules) for prompt in prompts]
    negative = encoder.encode(apply_trigger(options.negative, options.trigger), rules)
    with (
        cache.transformer(handle, device) as transformer,
        tqdm(total=settings.steps, unit="step", desc="sampling") as bar,
    ):
        latents = sample(
            transformer,
            positive,
            negative,
            width=options.width if options.width is not None else chosen.size,
            height=options.height if options.height is not None else chosen.size,
            settings=settings,
            recipe=rules,
            on_step=lambda _: bar.update(),
        )
    for i, picture in enumerate(decode(cache.vae(spec, device), latents)):
        record = {
            "prompt": prompts[i],
            "negative": options.negative,
            "model": spec.to_dict(),
            "settings": settings.to_dict() | {"seed": settings.seed + i},
            "recipe": rules.to_dict(),
        }
        path = _free_name(options.output, f"chroma-{settings.seed + i}")
        write_atomic(path, png_bytes(picture, record))
        print(path)


def _lora_use(text: str, mode: str):
    from .loading.spec import LoraUse

    path, separator, strength = text.rpartition("@")
    if not separator:
        return LoraUse(text, mode=mode)  # type: ignore[arg-type]
    try:
        return LoraUse(path, float(strength), mode)  # type: ignore[arg-type]
    except ValueError:
        raise ConfigError(f"--lora {text}: what stands after the last @ must be a number, the strength.") from None


def _free_name(folder: Path, stem: str) -> Path:
    """The first of stem.png, stem-2.png, … that does not exist: earlier pictures are never overwritten."""
    from .files import free_path

    return free_path(folder, f"{stem}.png")


def _inspect_lora(options: argparse.Namespace) -> None:
    from .lora.formats import read_lora

    lora = read_lora(options.file)
    ranks, alphas = lora.ranks, lora.alphas
    report = {
        "file": str(options.file),
        "dialect": lora.dialect,
        "modules": len(lora.modules),
        "ranks": ranks,
        "alphas": alphas,
        "metadata": lora.metadata,
    }
    if options.json:
        print(json.dumps(report, indent=2))
        return
    print(f"{options.file}: {lora.dialect} dialect, {len(lora.modules)} modules, rank {ranks}, alpha {alphas}")
    for name, value in lora.metadata.items():
        print(f"  {name}: {value}")


def _plan(options: argparse.Namespace) -> None:
    from .memory import estimate, machine, plan_table

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
    result = estimate(options.flavour, options.precision, **chosen)
    if options.json:
        print(json.dumps(result.to_dict()))
    else:
        print(result.table(), plan_table(options.flavour, options.precision, **chosen), sep="\n\n")
