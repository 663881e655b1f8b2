"""The command line: train a job file, sample pictures, look into a LoRA file, plan memory. No host needed."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from tqdm import tqdm

from ..errors import ChromaKitError, ConfigError
from ..loading.spec import Offload
from ..model.device import best_device
from ..model.flavours import FLAVOURS, flavour
from ..model.precision import PRECISIONS
from .export import add_export_command
from .imports import add_import_command
from .lora import add_lora_commands, warn_of_other_bases
from .models import add_model_commands, add_model_options, spec_from
from .parity import add_parity_command
from .requests import add_request_commands
from .sample import add_sampling_options, recipe_from, settings_from, start_from


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

    train = commands.add_parser("train", help="train a LoRA or the model's blocks from a job.toml; resumes what exists")
    train.add_argument("job", type=Path, nargs="?", help="the job file (see docs/training.md)")
    train.add_argument("--job", dest="job_id", metavar="JOB_ID", help="go on with this job under the file's options")
    train.add_argument("--resume", metavar="JOB_ID", help="go on with this job as it is; needs no file")
    train.add_argument("--extend", type=int, default=0, metavar="N", help="with either: N steps more")
    train.add_argument("--force", action="store_true", help="with either: also change options that move the weights")
    train.add_argument("--output", type=Path, default=Path("output"), help="folder for job and LoRA (default: output)")
    train.add_argument("--device", default=None, help="cuda, mps or cpu (default: the best there is)")
    train.add_argument(
        "--sharding",
        choices=["ddp", "fsdp"],
        default=None,
        help="on several GPUs: the whole model on each (ddp, the default), or its blocks divided among them (fsdp)",
    )
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
    add_sampling_options(sample)
    sample.add_argument("--device", default=None)
    sample.add_argument("--output", type=Path, default=Path("output"), help="folder for the PNG files")
    sample.add_argument("--save-latents", action="store_true", help="also write the latents, beside each picture")
    sample.set_defaults(run=_sample)

    add_model_commands(commands)
    add_import_command(commands)
    add_parity_command(commands)
    add_request_commands(commands)
    add_export_command(commands)

    add_lora_commands(commands)

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
    plan.add_argument("--optimizer", default="adamw", help="see docs/optimizers.md")
    plan.add_argument("--adapter", default="lora", help="lora, rslora, dora or lokr")
    plan.add_argument("--ema", action="store_true", help="a running mean of the weights is kept")
    plan.add_argument("--text-tokens", type=int, default=128, help="of a caption; 512 when it is padded")
    plan.add_argument("--trained-parameters", type=int, default=0, help="full-rank training of so many, without LoRA")
    plan.add_argument("--device-memory", type=float, metavar="GIB", help="plan for a card of that size, not this one")
    plan.add_argument("--host-memory", type=float, metavar="GIB", help="plan for a computer with that much memory")
    plan.add_argument("--json", action="store_true", help="print JSON")
    plan.set_defaults(run=_plan)
    return parser


def _train(options: argparse.Namespace) -> int:
    from ..training.config.config import TrainingConfig
    from ..training.distributed.world import launched
    from ..training.jobs.blocking import continue_job, run_job

    job_id = options.job_id or options.resume
    if (options.job is None) != bool(options.resume) or (options.job_id and options.resume):
        raise ConfigError("Give a job file, a job file with --job JOB_ID, or --resume JOB_ID without a file.")
    if options.restart and job_id or (options.extend or options.force) and not job_id:
        raise ConfigError("--extend and --force go with --job or --resume, --restart with neither.")
    if options.extend < 0:
        raise ConfigError(f"--extend is {options.extend}; it must be the number of steps to add.")
    config = TrainingConfig.from_toml(options.job) if options.job else None
    world, main = None, True
    if launched():
        from ..training.distributed.processes import Processes
        from ..training.jobs.distributed import run_together

        if config is None or job_id:
            raise ConfigError(
                "--job and --resume change a job, which one process does. Start it with a job file on several; a job "
                "that was changed is found by the options that it has now."
            )
        world = Processes(options.device, options.sharding)
        main = world.main
    elif options.sharding == "fsdp":
        raise ConfigError(
            "--sharding fsdp divides the model among several processes, but this is one. Start it with torchrun or "
            "accelerate launch (see docs/training.md), or leave --sharding out."
        )
    with tqdm(unit="step", desc="preparing", disable=not main) as bar:

        def show(status: dict) -> None:
            bar.set_description(status["state"])
            bar.n, bar.total = status["step"], status["steps"]
            if status.get("loss_smooth") is not None:
                bar.set_postfix(loss=f"{status['loss_smooth']:.4f}")
            bar.refresh()

        places: dict[str, Any] = {
            "root": options.output / "jobs",
            "loras_folder": options.output / "loras",
            "device": best_device(options.device) if world is None else world.device,
            "on_status": show,
        }
        if_exists = "restart" if options.restart else "resume"
        if job_id:
            status = continue_job(job_id, **places, config=config, extend=options.extend, force=options.force)
        elif world is not None and config is not None:
            status = run_together(config, **places, if_exists=if_exists, world=world)
        else:
            assert config is not None
            status = run_job(config, **places, if_exists=if_exists)
    if world is not None and status["state"] == "completed":
        world.close()
    if main:
        shown = ["id", "state", "step", "heldout_loss_base", "heldout_loss"]
        shown += ["model_path", "model_folder"] if status["config"].get("full") else ["lora_path"]
        print(json.dumps({k: status.get(k) for k in shown}))
    if status["state"] != "completed":
        print(f"error: the job {status['state']}: {status.get('message') or 'no reason given'}", file=sys.stderr)
    return 0 if status["state"] == "completed" else 1


def _sample(options: argparse.Namespace) -> None:
    from ..files import free_path, write_atomic
    from ..loading.cache import ComponentCache
    from ..loading.spec import ModelHandle
    from ..model.images import LATENTS_SUFFIX, decode, latents_bytes, png_bytes
    from ..model.latents import LatentFormat
    from ..requests.run import use_record
    from ..sampling.sampler import sample
    from ..sampling.text import apply_trigger

    chosen, rules, device = flavour(options.flavour), recipe_from(options), best_device(options.device)
    spec = spec_from(options)
    settings = settings_from(options, chosen)
    handle = ModelHandle(spec, tuple(lora_use(text, options.lora_mode) for text in options.lora))
    prompts = [apply_trigger(prompt, options.trigger) for prompt in options.prompt]
    cache = ComponentCache()
    warn_of_other_bases(handle)
    encoder = cache.text_encoder(spec, device)
    positive = [encoder.encode(prompt, rules) for prompt in prompts]
    avoided = apply_trigger(options.negative, options.trigger)
    negative = encoder.encode(avoided, rules)
    start, started = start_from(options, lambda: cache.vae(spec, device), rules, len(prompts))
    print(f"recipe {rules.describe()}", file=sys.stderr)
    with (
        cache.transformer(handle, device) as transformer,
        tqdm(total=settings.run_steps, unit="step", desc="sampling") as bar,
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
            start_BCHW=start.get("start_BCHW"),
            noise_mask_BHW=start.get("noise_mask_BHW"),
        )
    vae = cache.vae(spec, device)
    for i, picture in enumerate(decode(vae, latents)):
        record = {
            "prompt": prompts[i],
            "negative": avoided,
            "width": picture.width,
            "height": picture.height,
            "model": spec.to_dict(),
            "settings": settings.to_dict() | {"seed": settings.seed + i},
            "recipe": rules.to_dict(),
            "loras": [use_record(use) for use in handle.loras],
            **started,
        }
        path = free_path(options.output, f"chroma-{settings.seed + i}.png")
        if options.save_latents:
            file = latents_bytes(latents[i : i + 1], LatentFormat.of(vae))
            write_atomic(path.with_suffix(LATENTS_SUFFIX), file)
        write_atomic(path, png_bytes(picture, record))
        print(path)


def lora_use(text: str, mode: str):
    """FILE[@STRENGTH] as a `LoraUse`. Raises ConfigError."""
    from ..loading.spec import LoraUse

    path, separator, strength = text.rpartition("@")
    if not separator:
        return LoraUse(text, mode=mode)  # type: ignore[arg-type]
    try:
        return LoraUse(path, float(strength), mode)  # type: ignore[arg-type]
    except ValueError:
        raise ConfigError(f"--lora {text}: what stands after the last @ must be a number, the strength.") from None


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
