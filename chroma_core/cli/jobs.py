"""The command about jobs that are there: what they say of themselves, the LoRA of one of their steps, going on."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ChromaKitError, ConfigError, JobError, did_you_mean
from .options import add_json
from .train import resume_options

if TYPE_CHECKING:
    from ..training.jobs.job import Job


def jobs_options(command: argparse.ArgumentParser) -> None:
    """What jobs is asked."""
    actions = command.add_subparsers(required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="the jobs, newest first, each with its verdict")
    show = actions.add_parser("show", help="a job's verdict with its evidence, what to do, and the LoRAs that are kept")
    use = actions.add_parser("use", help="put the LoRA of a step into the LoRA folder")
    for each in (show, use):
        each.add_argument("job", help="the job's id, the name of its folder")
    use.add_argument("step", help="a step whose LoRA is kept, or best: that with the lowest validation loss")
    for each, run in ((listing, _list), (show, _show), (use, _use)):
        each.add_argument("--output", type=Path, default=Path("output"), help="as for train (default: output)")
        add_json(each)
        each.set_defaults(run=run)
    resume_options(actions.add_parser("resume", help="go on with a job, the same as the command resume"))


def _job(options: argparse.Namespace) -> Job:
    from ..training.jobs.job import Job

    folder = options.output / "jobs" / options.job
    if not (folder / "job.json").is_file():
        meant = did_you_mean(options.job, (path.parent.name for path in folder.parent.glob("*/job.json")))
        raise JobError(
            f"There is no job '{options.job}' in '{folder.parent}'. See: python -m chroma_core jobs list.{meant}"
        )
    return Job.read(folder)


def _told(job: Job) -> dict[str, Any]:
    """A job in short, as JSON values."""
    status, found = job.status(), job.verdict()
    shown = ("id", "state", "step", "steps", "heldout_loss_base", "heldout_loss", "best_step", "held_out", "kept")
    return {**{name: status[name] for name in shown}, "verdict": found and found.to_dict(job.id)}


def _jobs(folder: Path) -> Iterator[Job]:
    from ..training.jobs.job import Job

    for path in folder.glob("*/job.json"):
        try:
            yield Job.read(path.parent)
        except (ChromaKitError, KeyError) as error:
            print(f"warning: the job in '{path.parent.name}' cannot be read: {error}", file=sys.stderr)


def _list(options: argparse.Namespace) -> None:
    found = sorted(_jobs(options.output / "jobs"), key=lambda job: job.status()["created"], reverse=True)
    told = [_told(job) for job in found]
    if options.json:
        print(json.dumps(told))
        return
    for each in told:
        sentence = each["verdict"]["sentence"] if each["verdict"] else "too few steps for a verdict"
        print(f"{each['id']}  {each['state']}, step {each['step']} of {each['steps']}. {sentence}")


def _show(options: argparse.Namespace) -> None:
    told = _told(_job(options))
    if options.json:
        print(json.dumps(told))
        return
    print(f"{told['id']}: {told['state']}, step {told['step']} of {told['steps']}")
    found = told["verdict"]
    if found is not None:
        print(found["sentence"])
        print("evidence: " + ", ".join(f"{name} {value:.4g}" for name, value in found["evidence"].items()))
        print(*filter(None, [found["command"]]))
    if found is None or "base" not in found["evidence"]:
        print("Nothing was measured on held-out images. Set hold_out, or a validation dataset.")
    for one in told["kept"]:
        marks = ["best"] * (one["step"] == told["best_step"]) + [f"used as {one['used']}"] * bool(one["used"])
        print(f"LoRA of step {one['step']}" + (f" ({', '.join(marks)})" if marks else ""))


def _use(options: argparse.Namespace) -> None:
    from ..training.run.kept import use_step
    from ..training.run.metrics import JobPaths

    job = _job(options)
    if options.step != "best" and not options.step.isdecimal():
        raise ConfigError(f"The step is '{options.step}'; give its number, or best.")
    step = job.best_step() if options.step == "best" else int(options.step)
    paths = JobPaths.of(options.output / "jobs", job.id, options.output / "loras")
    path = use_step(paths, job.config, step)
    print(json.dumps({"job": job.id, "step": step, "lora_path": str(path)}) if options.json else path)
