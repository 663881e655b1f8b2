"""HTTP for training jobs: what one does with them, their curve, log and previews, and graphs made of them.

A job is named by its id. Paths never go in as parameters.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aiohttp import web
from pydantic import StrictBool, StrictFloat, StrictInt

from ...chroma_core.errors import ConfigError
from ...chroma_core.settings import Settings
from ...chroma_core.training.config import MODEL_PATHS, TrainingConfig
from ...chroma_core.training.config.changes import with_changes
from ...chroma_core.training.jobs.manager import JobStatus
from .. import host, jobs
from . import choosing, job_graphs
from .common import MOST_DIGITS, Unknown, add, answer, body_of, image_answer, job_of, refused, whole_number

ACTIONS = ("pause", "resume", "stop", "sample", "save")
"""What needs no more than the job's id; also change, extend, use, branch and delete."""


GRAPHS = {"again": job_graphs.again, "use": job_graphs.use}

POINTS = (1500, 10, 100_000)
"""Steps of a curve: when nothing is said, at least, at most."""
LINES = (200, 1, 5000)


class Change(Settings):
    """The body of `change`: go on under other options."""

    changes: dict[str, Any] = {}
    force: StrictBool = False


class Choice(Settings):
    """The body of `use`: the LoRA of this step; 0: of the best."""

    step: StrictInt = 0


class Branch(Settings):
    """The body of `branch`: from the LoRA of this step on (0: from nothing) at another learning rate."""

    step: StrictInt = 0
    learning_rate: StrictFloat


class Extension(Settings):
    """The body of `extend`: so many steps more."""

    steps: StrictInt = 0
    force: StrictBool = False


def register(routes: Any) -> None:
    """Add the routes to ComfyUI's table."""
    add(routes, "get", "/chromakit/jobs", _list)
    add(routes, "get", "/chromakit/jobs/unreadable", _unreadable)
    add(routes, "get", "/chromakit/jobs/{id}", _one)
    add(routes, "post", "/chromakit/jobs/{id}/change", _change)
    add(routes, "post", "/chromakit/jobs/{id}/extend", _extend)
    add(routes, "post", "/chromakit/jobs/{id}/use", _use)
    add(routes, "post", "/chromakit/jobs/{id}/branch", _branch)
    add(routes, "post", "/chromakit/jobs/{id}/delete", _delete)
    add(routes, "post", "/chromakit/jobs/{id}/{action}", _act)
    add(routes, "get", "/chromakit/jobs/{id}/metrics", _metrics)
    add(routes, "get", "/chromakit/jobs/{id}/curve", _curve)
    add(routes, "get", "/chromakit/jobs/{id}/log", _log)
    add(routes, "get", "/chromakit/jobs/{id}/samples/{number}", _sample)
    add(routes, "get", "/chromakit/jobs/{id}/graph/{kind}", _graph)


async def _list(request: web.Request) -> web.Response:
    """Newest first; `?brief=true` without what only one who looks into a job needs."""
    brief = request.query.get("brief") == "true"
    return await answer(lambda: [job.summary() if brief else job.status() for job in jobs.manager().list()])


async def _unreadable(request: web.Request) -> web.Response:
    """Folders of jobs that are left alone, each with the reason."""
    return await answer(lambda: [{"id": name, "error": why} for name, why in jobs.manager().unreadable().items()])


async def _one(request: web.Request) -> web.Response:
    return await answer(lambda: job_of(request).status())


async def _act(request: web.Request) -> web.Response:
    action = request.match_info["action"]
    if action not in ACTIONS:
        return refused(
            409, f"A job cannot '{action}'. Use one of: {', '.join(ACTIONS)}, change, extend, use, branch, delete."
        )

    def act() -> JobStatus:
        job = job_of(request)
        getattr(jobs.manager(), action)(job.id)
        return job.status()

    return await answer(act)


async def _delete(request: web.Request) -> web.Response:
    """The job's folder goes; the LoRA that it wrote stays."""

    def delete() -> dict[str, str]:
        found = jobs.delete(job_of(request).id)
        choosing.forget(found["id"])
        return found

    return await answer(delete)


async def _change(request: web.Request) -> web.Response:
    body = await body_of(request, Change)

    def change() -> JobStatus:
        job = job_of(request)
        changes = _as_they_are(body.changes, job.config)
        _no_new_paths(job.config, with_changes(job.config, changes))
        return jobs.manager().change(job.id, changes, body.force).status()

    return await answer(change)


def _as_they_are(changes: Any, config: TrainingConfig) -> Any:
    """The changes with the job's own files and folders as it has them, where they are as its status tells them."""
    own = {host.told({"path": path})["path"]: path for paths in _paths(config).values() for path in paths}

    def real(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: real(each) for name, each in value.items()}
        if isinstance(value, list):
            return [real(each) for each in value]
        return own.get(value, value) if isinstance(value, str) else value

    return real(changes)


async def _use(request: web.Request) -> web.Response:
    """The LoRA of a step is put into the LoRA folder; the job's status, which says under which name."""
    body = await body_of(request, Choice)

    def use() -> JobStatus:
        job = job_of(request)
        jobs.manager().use(job.id, body.step)
        return job.status()

    return await answer(use)


async def _branch(request: web.Request) -> web.Response:
    """A new job that goes on from a step of this one; the new one's status."""
    body = await body_of(request, Branch)
    return await answer(lambda: jobs.manager().branch(job_of(request).id, body.step, body.learning_rate).status())


def _no_new_paths(old: TrainingConfig, new: TrainingConfig) -> None:
    """Raise ConfigError when `new` names a file or folder that `old` does not: the nodes confine what they take."""
    before, after = _paths(old), _paths(new)
    foreign = [field for field, paths in after.items() if not paths <= before[field]]
    if foreign:
        raise ConfigError(
            f"Files and folders of a job cannot be changed here: {', '.join(foreign)}. Queue Chroma Train LoRA with "
            "them, which makes a new job, or use the command line (train --job)."
        )


def _paths(config: TrainingConfig) -> dict[str, set[str]]:
    sets = [config.dataset, *config.more_datasets, *([config.validation_dataset] if config.validation_dataset else ())]
    found = {f"model.{name}": {getattr(config.model, name)} for name in MODEL_PATHS}
    found |= {"lora.start_from": {config.lora.start_from}, "dataset folders": {each.folder for each in sets}}
    return {field: {str(path) for path in paths if path} for field, paths in found.items()}


async def _extend(request: web.Request) -> web.Response:
    body = await body_of(request, Extension)
    return await answer(lambda: jobs.manager().extend(job_of(request).id, body.steps, body.force).status())


async def _metrics(request: web.Request) -> web.Response:
    return await answer(lambda: job_of(request).metrics())


async def _curve(request: web.Request) -> web.Response:
    """`?points=1500&after=<step>&token=<of the last answer>`; see `Curve.read`."""
    points = whole_number(request, "points", *POINTS)
    after = whole_number(request, "after", None, 0, 10**12)
    token = request.query.get("token")
    return await answer(lambda: job_of(request).curve.read(points or POINTS[0], after, token))


async def _log(request: web.Request) -> web.Response:
    """`?lines=200`: the last lines, oldest first."""
    lines = whole_number(request, "lines", *LINES)
    return await answer(lambda: job_of(request).log_lines(lines or LINES[0]))


async def _sample(request: web.Request) -> web.StreamResponse:
    """A preview by its number; see `image_answer`."""
    return await image_answer(request, lambda: _sample_path(request))


def _sample_path(request: web.Request) -> Path:
    job = job_of(request)
    found, number = job.samples(), request.match_info["number"]
    if not (number.isdecimal() and len(number) <= MOST_DIGITS) or int(number) >= len(found):
        raise Unknown(f"The job has {len(found)} samples, numbered from 0; there is no sample '{number}'.")
    return found[int(number)]


async def _graph(request: web.Request) -> web.Response:
    """`again`: what would start this job; `use`: what samples with its result. A prompt in API form."""
    make = GRAPHS.get(request.match_info["kind"])
    if make is None:
        return refused(404, f"There is no graph '{request.match_info['kind']}'; there are: {', '.join(GRAPHS)}.")
    return await answer(lambda: make(job_of(request)))
