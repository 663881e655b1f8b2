"""HTTP under /chromakit: jobs by id and what one does with them, memory. Paths never go in as parameters."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from aiohttp import web

from ...chroma_core.errors import ChromaKitError, ConfigError
from ...chroma_core.memory import estimate, machine
from ...chroma_core.training.config import MODEL_PATHS, TrainingConfig
from ...chroma_core.training.config.changes import with_changes
from .. import host, jobs
from .answers import answer, body_of, job_of, refused

ACTIONS = ("pause", "resume", "stop", "sample", "save")
"""What needs no more than the job's id; also change, extend and delete."""


def _truth(text: str) -> bool:
    return {"true": True, "1": True, "false": False, "0": False}[text.lower()]


PLAN: dict[str, Callable[[str], Any]] = {
    "flavour": str, "precision": str, "text_precision": str, "offload": str, "optimizer": str, "target": str,
    "size": int, "batch_size": int, "rank": int, "resident_blocks": int, "gradient_checkpointing": _truth,
    "adapter": str, "lokr_factor": int, "ema": _truth, "text_tokens": int, "trained_parameters": int,
    "offload_during_startup": _truth,
}  # fmt: skip
"""What `GET /chromakit/plan` takes in its query, all optional, and how it is read."""


def register(routes: Any) -> None:
    """Add the routes to the host's table."""
    routes.get("/chromakit/jobs")(_list)
    routes.get("/chromakit/jobs/{id}")(_one)
    routes.post("/chromakit/jobs/{id}/change")(_change)
    routes.post("/chromakit/jobs/{id}/extend")(_extend)
    routes.post("/chromakit/jobs/{id}/delete")(_delete)
    routes.post("/chromakit/jobs/{id}/{action}")(_act)
    routes.get("/chromakit/plan")(_plan)
    routes.get("/chromakit/memory")(_memory)


async def _list(request: web.Request) -> web.Response:
    """Newest first; `?brief=true` without what only one who looks into a job needs."""
    brief = request.query.get("brief") == "true"
    return await answer(lambda: [job.summary() if brief else job.status() for job in jobs.manager().list()])


async def _one(request: web.Request) -> web.Response:
    return await answer(lambda: job_of(request).status())


async def _act(request: web.Request) -> web.Response:
    action = request.match_info["action"]
    if action not in ACTIONS:
        return refused(409, f"A job cannot '{action}'. Use one of: {', '.join(ACTIONS)}, change, extend, delete.")

    def act() -> dict[str, Any]:
        job = job_of(request)
        getattr(jobs.manager(), action)(job.id)
        return job.status()

    return await answer(act)


async def _delete(request: web.Request) -> web.Response:
    """The job's folder goes; the LoRA that it wrote stays."""
    return await answer(lambda: jobs.delete(job_of(request).id))


async def _change(request: web.Request) -> web.Response:
    """JSON {changes: {…}, force: bool}: go on under other options."""
    try:
        values = await body_of(request, {"changes": dict, "force": bool})
    except ConfigError as error:
        return refused(400, error)
    changes, force = values.get("changes", {}), values.get("force", False)

    def change() -> dict[str, Any]:
        job = job_of(request)
        _no_new_paths(job.config, with_changes(job.config, changes))
        return jobs.manager().change(job.id, changes, force).status()

    return await answer(change)


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
    """JSON {steps: n, force: bool}: n steps more."""
    try:
        values = await body_of(request, {"steps": int, "force": bool})
    except ConfigError as error:
        return refused(400, error)
    steps, force = values.get("steps", 0), values.get("force", False)
    return await answer(lambda: jobs.manager().extend(job_of(request).id, steps, force).status())


async def _plan(request: web.Request) -> web.Response:
    """The memory estimate for the query's settings; see `PLAN`."""
    try:
        settings = {name: _setting(name, text) for name, text in request.query.items()}
        found = await asyncio.to_thread(lambda: _estimate(settings))
    except ChromaKitError as error:
        return refused(400, error)
    return web.json_response(found)


def _estimate(settings: dict[str, Any]) -> dict[str, Any]:
    flavour, precision = settings.pop("flavour", "base"), settings.pop("precision", "bf16")
    return estimate(flavour, precision, on=machine(host.device()), **settings).to_dict()


def _setting(name: str, text: str) -> Any:
    if name not in PLAN:
        raise ConfigError(f"The plan knows no '{name}'. It takes: {', '.join(PLAN)}.")
    try:
        return PLAN[name](text)
    except (KeyError, ValueError):
        kind = "true or false" if PLAN[name] is _truth else "a whole number"
        raise ConfigError(f"The plan's '{name}' is '{text}'; it must be {kind}.") from None


async def _memory(request: web.Request) -> web.Response:
    return await answer(host.memory_report)
