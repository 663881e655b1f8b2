"""The command line: train a job file, sample pictures, look into a LoRA file, plan memory. No host needed."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from .errors import ChromaKitError, ConfigError
from .flavours import FLAVOURS, flavour
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
    sample.add_argument("--flavour", default="base", choices=list(FLAVOURS))
    sample.add_argument("--folder", default=None, help="a diffusers folder to load instead of the flavour's")
    sample.add_argument("--precision", default="bf16")
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

    inspect = commands.add_parser("inspect-lora", help="what a LoRA file holds")
    inspect.add_argument("file", type=Path)
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.set_defaults(run=_inspect_lora)

    plan = commands.add_parser("plan", help="how much memory a flavour needs (an estimate)")
    plan.add_argument("--flavour", default="base", choices=list(FLAVOURS))
    plan.add_argument("--precision", default="bf16")
    plan.add_argument("--size", type=int, default=None, help="pixels a side")
    plan.add_argument("--batch-size", type=int, default=1)
    plan.add_argument("--rank", type=int, default=16)
    plan.add_argument("--no-checkpointing", action="store_true")
    plan.add_argument("--json", action="store_true")
    plan.set_defaults(run=_plan)
    return parser


def best_device(name: str | None = None) -> torch.device:
    """The named device, or the best there is: CUDA/ROCm, then MPS, then the CPU."""
    if name is not None:
        try:
            return torch.device(name)
        except RuntimeError as error:
            raise ConfigError(f"'{name}' is not a device: use cuda, cuda:1, mps or cpu.") from error
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


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
    from .loading.spec import ModelHandle, ModelSpec
    from .pictures import decode, png_bytes
    from .recipe import recipe
    from .sampling import SamplingSettings, sample
    from .schedule import parse_flow_shift
    from .text import apply_trigger

    chosen, rules, device = flavour(options.flavour), recipe(options.recipe), best_device(options.device)
    spec = ModelSpec(options.flavour, options.folder, options.precision, offload="model")
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
    path, count = folder / f"{stem}.png", 1
    while path.exists():
        count += 1
        path = folder / f"{stem}-{count}.png"
    return path


def _inspect_lora(options: argparse.Namespace) -> None:
    from .lora.formats import read_lora

    lora = read_lora(options.file)
    ranks = sorted({module.down.shape[0] for module in lora.modules.values()})
    alphas = sorted({float(module.alpha) for module in lora.modules.values()})
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
    from .memory import estimate

    result = estimate(
        options.flavour,
        options.precision,
        size=options.size,
        batch_size=options.batch_size,
        rank=options.rank,
        gradient_checkpointing=not options.no_checkpointing,
    )
    print(json.dumps(result.to_dict()) if options.json else result.table())
