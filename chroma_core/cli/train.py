"""The commands about job files: training one, making one for a folder or from another trainer's configuration."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .options import Bar, add_device, add_flag, add_json

if TYPE_CHECKING:
    from ..training.config import TrainingConfig
    from ..training.distributed.world import World

INTERRUPTED = 130
"""The exit status after Ctrl-C or SIGTERM, as shells have it."""


def train_options(train: argparse.ArgumentParser) -> None:
    """What train is asked."""
    train.add_argument("job", type=Path, nargs="?", help="the job file (see docs/training.md)")
    train.add_argument("--job", dest="job_id", metavar="JOB_ID", help="go on with this job under the file's options")
    train.add_argument("--resume", metavar="JOB_ID", help="go on with this job as it is; needs no file")
    _add_extend(train, "with either: ")
    train.add_argument(
        "--branch", metavar="JOB_ID", help="a new job like this one at --learning-rate, from its LoRA of --step on"
    )
    train.add_argument("--step", type=int, default=0, metavar="N", help="with --branch: 0, the default, from nothing")
    train.add_argument("--learning-rate", type=float, metavar="RATE", help="with --branch")
    _add_places(train)
    train.add_argument(
        "--sharding",
        choices=["ddp", "fsdp"],
        default=None,
        help="on several GPUs: the whole model on each (ddp, the default), or its blocks divided among them (fsdp)",
    )
    train.add_argument("--restart", action="store_true", help="forget an earlier run of the same job")
    train.set_defaults(run=_train)


def resume_options(resume: argparse.ArgumentParser) -> None:
    """What resume is asked: `train --resume` by a name of its own."""
    resume.add_argument("resume", metavar="JOB_ID", help="the job's id, the name of its folder")
    _add_extend(resume)
    _add_places(resume)
    resume.set_defaults(run=_train, job=None, job_id=None, branch=None, step=0, learning_rate=None)
    resume.set_defaults(sharding=None, restart=False)


def _add_extend(command: argparse.ArgumentParser, when: str = "") -> None:
    command.add_argument("--extend", type=int, default=0, metavar="N", help=f"{when}N steps more")
    command.add_argument("--force", action="store_true", help=f"{when}also change options that move the weights")


def _add_places(command: argparse.ArgumentParser) -> None:
    output = Path("output")
    command.add_argument("--output", type=Path, default=output, help="folder for job and LoRA (default: output)")
    add_device(command)


def _train(options: argparse.Namespace) -> int:
    from ..training.distributed.world import ALONE, MainFailed, Processes, launched

    try:
        world = Processes(options.device, options.sharding) if launched() else ALONE
        return _trained(options, world.main_first(lambda: _asked(options, world)), world)
    except MainFailed:
        return 1  # what is to be said, rank 0 says


def _asked(options: argparse.Namespace, world: World) -> TrainingConfig | None:
    """The job of the file, if one is given. Raises ConfigError, also for options that do not go together."""
    from ..training.config import TrainingConfig

    several = world.size > 1
    branch, rate = options.branch, options.learning_rate
    if bool(branch) != (rate is not None) or (options.step and not branch):
        raise ConfigError("--branch JOB_ID goes with --learning-rate RATE, and --step N with both.")
    earlier = [each for each in (options.job_id, options.resume, branch) if each]
    job_id = earlier[0] if earlier else None
    if (options.job is None) != bool(options.resume or branch) or len(earlier) > 1:
        raise ConfigError(
            "Give a job file, a job file with --job JOB_ID, or --resume JOB_ID or --branch JOB_ID without a file."
        )
    if options.restart and job_id or (options.extend or options.force) and (branch or not job_id):
        raise ConfigError("--extend and --force go with --job or --resume, --restart with neither.")
    if options.extend < 0:
        raise ConfigError(f"--extend is {options.extend}; it must be the number of steps to add.")
    if several and job_id:
        raise ConfigError(
            "--job, --resume and --branch change a job, which one process does. Start it with a job file on several; a "
            "job that was changed is found by the options that it has now."
        )
    if options.sharding == "fsdp" and not several:
        raise ConfigError(
            "--sharding fsdp divides the model among several processes, but this is one. Start it with torchrun or "
            "accelerate launch (see docs/training.md), or leave --sharding out."
        )
    return TrainingConfig.from_toml(options.job) if options.job else None


def _trained(options: argparse.Namespace, config: TrainingConfig | None, world: World) -> int:
    from ..model.device import best_device
    from ..training.distributed.world import Processes
    from ..training.jobs.blocking import branch_job, continue_job, run_distributed, run_job

    main, job_id = world.main, options.job_id or options.resume
    with Bar("step", "preparing", disable=not main) as bar:

        def show(status: dict) -> None:
            bar.set_description(status["state"])
            bar.n, bar.total = status["step"], status["steps"]
            if status.get("loss_smooth") is not None:
                bar.set_postfix(loss=f"{status['loss_smooth']:.4f}")
            bar.refresh()

        places: dict[str, Any] = {
            "root": options.output / "jobs",
            "loras_folder": options.output / "loras",
            "device": world.device if isinstance(world, Processes) else best_device(options.device),
            "on_status": show,
        }
        if_exists = "restart" if options.restart else "resume"
        if options.branch:
            status = branch_job(options.branch, options.step, options.learning_rate, **places)
        elif job_id:
            status = continue_job(job_id, **places, config=config, extend=options.extend, force=options.force)
        else:
            assert config is not None  # see `_asked`
            if isinstance(world, Processes):
                status = run_distributed(config, **places, if_exists=if_exists, world=world)
            else:
                status = run_job(config, **places, if_exists=if_exists)
    if isinstance(world, Processes) and status["state"] == "completed":
        world.close()
    if main:
        shown = ["id", "state", "step", "heldout_loss_base", "heldout_loss", "best_step", "verdict"]
        shown += ["model_path", "model_folder"] if status.get("config", {}).get("full") else ["lora_path"]
        print(json.dumps({k: status.get(k) for k in shown}))
        if told := status.get("verdict"):
            print("verdict:", told["sentence"], told["command"], file=sys.stderr)
    if status["state"] == "interrupted":
        if main:
            job, saved = status.get("id"), status.get("checkpoint") or 0
            place = f" --output {shlex.quote(str(options.output))}" if options.output != Path("output") else ""
            command = f"python -m chroma_core resume {job}{place}"
            print(f"interrupted: job {job}, saved at step {saved}. Go on with: {command}", file=sys.stderr)
        return INTERRUPTED
    if status["state"] != "completed" and (main or status["message"]):
        print(f"error: the job {status['state']}: {status.get('message') or 'no reason given'}", file=sys.stderr)
    return 0 if status["state"] == "completed" else 1


def import_options(command: argparse.ArgumentParser) -> None:
    """What import-config is asked."""
    command.add_argument("file", type=Path, help="a configuration of SimpleTuner, ai-toolkit, OneTrainer or sd-scripts")
    command.add_argument(
        "--dataloader", type=Path, default=None, metavar="FILE", help="its dataset file, or OneTrainer's concepts"
    )
    command.add_argument(
        "--output", type=Path, default=Path("job.toml"), help="the job file to write (default: job.toml)"
    )
    add_json(command, "print the report as JSON")
    command.set_defaults(run=_import)


def template_options(template: argparse.ArgumentParser) -> None:
    """What job-template is asked."""
    template.add_argument("--output", type=Path, default=None, metavar="FILE", help="write it there instead")
    template.set_defaults(run=_template)


def init_options(init: argparse.ArgumentParser) -> None:
    """What init is asked."""
    from ..loading.spec import ModelSpec
    from ..training.config.recipes import RECIPE_TABLE

    init.add_argument("images", type=Path, help="the folder with the images and their captions")
    init.add_argument("--output", type=Path, default=Path("job.toml"), help="the file to write (default: job.toml)")
    init.add_argument("--name", default=None, help="the LoRA's (default: the folder's)")
    init.add_argument("--trigger", default="", help="the word that will call the concept")
    recipes = list(RECIPE_TABLE)
    init.add_argument("--recipe", choices=recipes, help="options for what is to be learnt (see docs/recipes.md)")
    for field in ("flavour", "transformer", "text_encoder", "vae"):
        add_flag(init, ModelSpec, field, default=None)
    init.set_defaults(run=_init)


def _init(options: argparse.Namespace) -> None:
    """Look at the images, choose what fits this machine, write the file: what is wrong is said before."""
    from ..data.contact_sheet import summary
    from ..data.scan import DatasetConfig, scan
    from ..memory.plan import Settings, recommend
    from ..model.flavours import flavour
    from ..training.config import TrainingConfig
    from ..training.config.job import HELD_OUT
    from ..training.config.recipes import RECIPE_TABLE
    from ..training.config.template import job_template

    place = options.output.resolve().parent
    recipe = RECIPE_TABLE[options.recipe].options if options.recipe else {}
    begun = {path: value for path, (value, _) in recipe.items()}
    chosen = options.flavour or begun.get("model.flavour", "base")
    size = flavour(chosen).size
    found = scan(DatasetConfig(folder=str(options.images), trigger=options.trigger), size)
    own = {name: begun[path] for name, path in (("rank", "lora.rank"), ("batch_size", "batch_size")) if path in begun}
    advised = recommend(Settings(flavour=chosen, **own), purpose="training")
    parts = ("transformer", "text_encoder", "vae")
    files = {f"model.{part}": _from(place, Path(path)) for part in parts if (path := getattr(options, part))}
    placed = ("precision", "text_precision", "offload", "resident_blocks", "offload_during_startup")
    values: dict[str, Any] = {
        "hold_out": HELD_OUT,
        **begun,
        "name": options.name or options.images.resolve().name,
        "model.flavour": chosen,
        **files,
        **{f"model.{name}": getattr(advised, name) for name in placed},
        "gradient_checkpointing": advised.gradient_checkpointing,
        "dataset.folder": _from(place, options.images),
        "dataset.trigger": options.trigger,
    }
    text = job_template(values)
    TrainingConfig.from_text(text, options.output).preview_list()
    _write_new(options.output, text)
    print(options.output, summary(found, size), advised.sentence, sep="\n")


def _from(place: Path, path: Path) -> str:
    """A path as a job file in the folder `place` says it: relative where it lies below."""
    real = path.resolve()
    return (real.relative_to(place) if real.is_relative_to(place) else real).as_posix()


def _write_new(path: Path, text: str) -> None:
    """Raises ConfigError for a file that is there already, or cannot be written."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(f"'{path}' exists already. Choose another name, or remove it first.") from None
    except OSError as error:
        raise ConfigError(f"'{path}' cannot be written: {error.strerror or error}.") from error


def _import(options: argparse.Namespace) -> None:
    from ..import_config import as_json, as_text, import_config, write_job

    imported = import_config(options.file, options.dataloader)
    path = write_job(imported, options.output)
    print(json.dumps(as_json(imported, path), ensure_ascii=False) if options.json else as_text(imported, path))


def _template(options: argparse.Namespace) -> None:
    from ..training.config.template import job_template

    if options.output is None:
        print(job_template(), end="")
    else:
        _write_new(options.output, job_template())
