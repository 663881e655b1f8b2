"""HTTP for training jobs: beginning one, what one does with them, their curve, log and previews, graphs made of them.

A job is named by its id. Files and folders go in by the names that ComfyUI's lists give, never as paths.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast, get_args

from aiohttp import web
from pydantic import StrictBool, StrictFloat, StrictInt
from typing_extensions import TypedDict

from ...chroma_core.errors import ConfigError, did_you_mean
from ...chroma_core.settings import Settings
from ...chroma_core.training.config import TrainingConfig
from ...chroma_core.training.config.changes import with_changes
from ...chroma_core.training.jobs.curve import CurveData
from ...chroma_core.training.jobs.job import ACTIVE, JobStatus, JobSummary
from ...chroma_core.training.jobs.manager import IfExists
from .. import host, jobs
from . import choosing, job_graphs
from .common import (
    MOST_DIGITS,
    SIDE,
    Query,
    Route,
    Unknown,
    answer,
    body_of,
    image_answer,
    in_thread,
    job_of,
    json_of,
    refused,
    told,
    whole_number,
)
from .job_bodies import job_from, paths_in

ACTIONS = ("pause", "resume", "stop", "sample", "save")
"""What needs no more than the job's id; also change, extend, use, branch and delete."""


GRAPHS = {"again": job_graphs.again, "use": job_graphs.use}

IF_EXISTS = Query(
    "if_exists",
    "When this very job exists: keep takes it as it is (and picks up one that was interrupted or failed), resume also "
    "goes on with a stopped one, restart trains again from nothing.",
    {"type": "string", "enum": list(get_args(IfExists)), "default": "keep"},
)
BRIEF = Query("brief", "Without what only one who looks into a job needs.", {"type": "boolean", "default": False})
POINTS = Query(
    "points", "Steps of the curve at most.", {"type": "integer", "default": 1500, "minimum": 10, "maximum": 100_000}
)
AFTER = Query(
    "after",
    "Only what is later than this step, for one who has the rest.",
    {"type": "integer", "minimum": 0, "maximum": 10**12},
)
TOKEN = Query("token", "Of the answer that one has the rest from.", {"type": "string"})
LINES = Query("lines", "The last lines.", {"type": "integer", "default": 200, "minimum": 1, "maximum": 5000})


class Change(Settings):
    """The body of `change`: go on under other options."""

    changes: dict[str, Any] = {}
    force: StrictBool = False


class Use(Settings):
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


class JobAnswer(JobStatus):
    """A job's status, and the address of it."""

    status_url: str


async def _create(request: web.Request) -> web.Response:
    """The job with these options, begun if there is none: 202 while it is at work, 200 when it is over."""
    body, if_exists = await json_of(request), request.query.get("if_exists", "keep")
    status = await in_thread(lambda: jobs.manager().ensure(job_from(body), cast(IfExists, if_exists)).status())
    host.log.info("ChromaKit: a job was posted: %s", status["id"])
    made = {**status, "status_url": f"/chromakit/jobs/{status['id']}"}
    return told(made, 202 if status["state"] in ACTIVE else 200)


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
        known = (*ACTIONS, "change", "extend", "use", "branch", "delete")
        meant = did_you_mean(action, known)
        return refused(409, f"A job cannot '{action}'. Use one of: {', '.join(known)}.{meant}")

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
        _no_newpaths_in(job.config, with_changes(job.config, changes))
        return jobs.manager().change(job.id, changes, body.force).status()

    return await answer(change)


def _as_they_are(changes: Any, config: TrainingConfig) -> Any:
    """The changes with the job's own files and folders as it has them, where they are as its status tells them."""
    own = {host.told({"path": path})["path"]: path for paths in paths_in(config).values() for path in paths}

    def real(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: real(each) for name, each in value.items()}
        if isinstance(value, list):
            return [real(each) for each in value]
        return own.get(value, value) if isinstance(value, str) else value

    return real(changes)


async def _use(request: web.Request) -> web.Response:
    """The LoRA of a step is put into the LoRA folder; the job's status, which says under which name."""
    body = await body_of(request, Use)

    def use() -> JobStatus:
        job = job_of(request)
        jobs.manager().use(job.id, body.step)
        return job.status()

    return await answer(use)


async def _branch(request: web.Request) -> web.Response:
    """A new job that goes on from a step of this one; the new one's status."""
    body = await body_of(request, Branch)
    return await answer(lambda: jobs.manager().branch(job_of(request).id, body.step, body.learning_rate).status())


def _no_newpaths_in(old: TrainingConfig, new: TrainingConfig) -> None:
    """Raise ConfigError when `new` names a file or folder that `old` does not: the nodes confine what they take."""
    before, after = paths_in(old), paths_in(new)
    foreign = [field for field, paths in after.items() if not paths <= before[field]]
    if foreign:
        raise ConfigError(
            f"Files and folders of a job cannot be changed here: {', '.join(foreign)}. Queue Chroma Train LoRA with "
            "them, which makes a new job, or use the command line (train --job)."
        )


async def _extend(request: web.Request) -> web.Response:
    body = await body_of(request, Extension)
    return await answer(lambda: jobs.manager().extend(job_of(request).id, body.steps, body.force).status())


async def _metrics(request: web.Request) -> web.Response:
    return await answer(lambda: job_of(request).metrics())


async def _curve(request: web.Request) -> web.Response:
    """`?points=1500&after=<step>&token=<of the last answer>`; see `Curve.read`."""
    points, after = whole_number(request, POINTS), whole_number(request, AFTER)
    token = request.query.get("token")
    return await answer(lambda: job_of(request).curve.read(points or 0, after, token))


async def _log(request: web.Request) -> web.Response:
    """`?lines=200`: the last lines, oldest first."""
    lines = whole_number(request, LINES)
    return await answer(lambda: job_of(request).log_lines(lines or 0))


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
        kind = request.match_info["kind"]
        return refused(404, f"There is no graph '{kind}'; there are: {', '.join(GRAPHS)}.{did_you_mean(kind, GRAPHS)}")
    return await answer(lambda: make(job_of(request)))


class LeftAlone(TypedDict):
    """A folder of a job that cannot be read, and why."""

    id: str
    error: str


class Deleted(TypedDict):
    """The job that is gone."""

    id: str


ROUTES = (
    Route(
        "post",
        "/chromakit/jobs",
        _create,
        "The training job with these options, begun if there is none. They are those of a job file; folders, model "
        "files and LoRAs are named as ComfyUI's lists name them.",
        JobAnswer,
        TrainingConfig,
        (IF_EXISTS,),
        statuses=(202, 200),
        otherwise=400,
    ),
    Route(
        "get", "/chromakit/jobs", _list, "The jobs, newest first.", list[JobStatus] | list[JobSummary], queries=(BRIEF,)
    ),
    Route("get", "/chromakit/jobs/unreadable", _unreadable, "Folders of jobs that are left alone.", list[LeftAlone]),
    Route("get", "/chromakit/jobs/{id}", _one, "A job's status.", JobStatus),
    Route("post", "/chromakit/jobs/{id}/change", _change, "Goes on with a job under other options.", JobStatus, Change),
    Route("post", "/chromakit/jobs/{id}/extend", _extend, "Gives a job more steps.", JobStatus, Extension),
    Route("post", "/chromakit/jobs/{id}/use", _use, "Puts the LoRA of a step into the LoRA folder.", JobStatus, Use),
    Route("post", "/chromakit/jobs/{id}/branch", _branch, "A new job from a step, at another rate.", JobStatus, Branch),
    Route(
        "post", "/chromakit/jobs/{id}/delete", _delete, "Deletes a job that is not at work; its LoRA stays.", Deleted
    ),
    Route(
        "post",
        "/chromakit/jobs/{id}/{action}",
        _act,
        "Pauses or resumes a job, stops it, makes previews, writes a checkpoint.",
        JobStatus,
        parts={"action": {"type": "string", "enum": list(ACTIONS)}},
    ),
    Route("get", "/chromakit/jobs/{id}/metrics", _metrics, "What was measured at each step.", list[dict[str, Any]]),
    Route(
        "get",
        "/chromakit/jobs/{id}/curve",
        _curve,
        "The same for plotting, thinned to what a screen shows.",
        CurveData,
        queries=(POINTS, AFTER, TOKEN),
    ),
    Route("get", "/chromakit/jobs/{id}/log", _log, "The last lines of a job's log.", list[str], queries=(LINES,)),
    Route(
        "get",
        "/chromakit/jobs/{id}/samples/{number}",
        _sample,
        "A preview.",
        "image/*",
        queries=(SIDE,),
        parts={"number": {"type": "integer", "minimum": 0}},
    ),
    Route(
        "get",
        "/chromakit/jobs/{id}/graph/{kind}",
        _graph,
        "again: a prompt that starts this job; use: one that generates with its result.",
        job_graphs.JobGraph,
        parts={"kind": {"type": "string", "enum": list(GRAPHS)}},
    ),
)
