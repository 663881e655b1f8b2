"""HTTP under /chromakit: jobs by id, their samples by number, memory. Paths never go in or out as parameters."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from aiohttp import web

from ..chroma_core.errors import ChromaKitError, ConfigError, JobError
from ..chroma_core.memory import estimate, machine
from ..chroma_core.training.changes import with_changes
from ..chroma_core.training.config import MODEL_PATHS, TrainingConfig
from . import host, jobs

ACTIONS = ("pause", "resume", "stop", "sample", "save")


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
    routes.get("/chromakit/jobs/{id}/metrics")(_metrics)
    routes.get("/chromakit/jobs/{id}/samples/{number}")(_sample)
    routes.post("/chromakit/jobs/{id}/change")(_change)
    routes.post("/chromakit/jobs/{id}/extend")(_extend)
    routes.post("/chromakit/jobs/{id}/{action}")(_act)
    routes.get("/chromakit/plan")(_plan)
    routes.get("/chromakit/memory")(_memory)


async def _list(request: web.Request) -> web.Response:
    return await _answer(lambda: [job.status() for job in jobs.manager().list()])


async def _one(request: web.Request) -> web.Response:
    return await _answer(lambda: _job(request).status())


async def _metrics(request: web.Request) -> web.Response:
    return await _answer(lambda: _job(request).metrics())


async def _sample(request: web.Request) -> web.StreamResponse:
    try:
        job = await asyncio.to_thread(_job, request)
    except JobError as error:
        return _error(404, error)
    names = job.status()["samples"]
    number = request.match_info["number"]
    if not number.isdecimal() or int(number) >= len(names):
        return _error(404, f"The job has {len(names)} samples, numbered from 0; there is no sample '{number}'.")
    return web.FileResponse(job.folder / "samples" / names[int(number)])


async def _act(request: web.Request) -> web.Response:
    action = request.match_info["action"]
    if action not in ACTIONS:
        return _error(409, f"A job cannot '{action}'. Use one of: {', '.join(ACTIONS)}.")

    def act() -> dict[str, Any]:
        job = _job(request)
        getattr(jobs.manager(), action)(job.id)
        return job.status()

    return await _answer(act)


async def _change(request: web.Request) -> web.Response:
    """JSON {changes: {…}, force: bool}: go on under other options."""
    try:
        values = await _body(request, {"changes": dict, "force": bool})
    except ConfigError as error:
        return _error(400, error)
    changes, force = values.get("changes", {}), values.get("force", False)

    def change() -> dict[str, Any]:
        job = _job(request)
        _no_new_paths(job.config, with_changes(job.config, changes))
        return jobs.manager().change(job.id, changes, force).status()

    return await _answer(change)


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
        values = await _body(request, {"steps": int, "force": bool})
    except ConfigError as error:
        return _error(400, error)
    steps, force = values.get("steps", 0), values.get("force", False)
    return await _answer(lambda: jobs.manager().extend(_job(request).id, steps, force).status())


async def _body(request: web.Request, kinds: dict[str, type]) -> dict[str, Any]:
    """The request's JSON object with no other fields than these. Raises ConfigError."""
    try:
        values = await request.json()
    except ValueError as error:
        raise ConfigError(f"The request's body is not JSON: {error}.") from None
    if not (isinstance(values, dict) and all(type(v) is kinds.get(name) for name, v in values.items())):
        wanted = ", ".join(f"{name} ({kind.__name__})" for name, kind in kinds.items())
        raise ConfigError(f"The request's body must be a JSON object with nothing but: {wanted}.")
    return values


async def _plan(request: web.Request) -> web.Response:
    """The memory estimate for the query's settings; see `PLAN`."""
    try:
        settings = {name: _setting(name, text) for name, text in request.query.items()}
        found = await asyncio.to_thread(lambda: _estimate(settings))
    except ChromaKitError as error:
        return _error(400, error)
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
    return await _answer(host.memory_report)


def _job(request: web.Request) -> Any:
    try:
        return jobs.manager().get(request.match_info["id"])
    except JobError as error:
        raise _Unknown(str(error)) from error


class _Unknown(JobError):
    """No job of that id."""


async def _answer(work: Callable[[], Any]) -> web.Response:
    """The JSON of `work()`, which may read files and so runs in a thread; errors as {error} with 404 or 409."""
    try:
        return web.json_response(await asyncio.to_thread(work))
    except _Unknown as error:
        return _error(404, error)
    except ChromaKitError as error:
        return _error(409, error)


def _error(status: int, message: object) -> web.Response:
    return web.json_response({"error": str(message)}, status=status)
