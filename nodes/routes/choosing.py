"""HTTP for choosing the LoRA that a job is to give: a grid of images, their ratings, and what is kept of it.

ComfyUI's own queue makes the images, each from the graph that the page opens for it, so that a job yields to them as to
any prompt.
"""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from aiohttp import web
from pydantic import StrictInt, StrictStr
from typing_extensions import NotRequired, TypedDict

from ...chroma_core.comfy.graph import Prompt
from ...chroma_core.errors import JobError
from ...chroma_core.files import sha256_file
from ...chroma_core.settings import Settings
from ...chroma_core.training.jobs.manager import Job
from ...chroma_core.training.run import publish
from ...chroma_core.training.run.grid import (
    Average,
    Cell,
    Grid,
    GridChoice,
    UsedLora,
    averages,
    best,
    cells,
    check_grid,
    image_of,
    images_folder,
    previews,
    put_grid,
    rated,
    read_grid,
    write_grid,
)
from ...chroma_core.training.run.kept import kept_path
from .. import host, jobs, while_training
from .common import SIDE, Route, Unknown, answer, body_of, image_answer, in_thread, job_of
from .job_graphs import JobGraph, image_graph, stock_graph

NOTE = "chromakit_grid"
"""Under which a queued prompt carries which image it makes."""

_KEY = re.compile(r"[0-9a-f]{16}")

_queued: dict[tuple[str, str], str] = {}
"""The prompts of images that are not there yet, by job and key. The queue, too, lasts no longer than the process."""


State = Literal["none", "queued", "running", "done", "failed", "cancelled"]


class Progress(TypedDict):
    """How far an image is; none: neither there nor asked for."""

    state: State
    error: NotRequired[str]


class Column(TypedDict):
    """A prompt of the grid as it is sampled; sides in pixels."""

    prompt: str
    width: int
    height: int
    seed: int


class Entry(Progress):
    """An image of the grid. prompt: the number of its column. rating: 1 to 5; 0: none."""

    key: str
    step: int
    strength: float
    prompt: int
    rating: int


class GridState(TypedDict):
    """The grid of a job, row by row. choice: what was asked for; None: nothing yet. own_prompts: the previews'."""

    choice: GridChoice | None
    own_prompts: list[str]
    columns: list[Column]
    cells: list[Entry]
    rows: list[Average]
    best: Average | None


class KeptFiles(TypedDict):
    """What was kept: the LoRA's name and place, the strength to use it at, and files beside it that are the user's."""

    lora: str
    path: str
    strength: float
    stayed: list[str]


class Published(TypedDict):
    """A folder that is ready, and how many images are in it."""

    folder: str
    images: int


class Pick(Settings):
    """The body of `keep` and `publish`: an image of the grid, and so a LoRA and a strength."""

    key: StrictStr


class Rating(Pick):
    """The body of `rate`: 1 to 5; 0: none."""

    rating: StrictInt


async def _grid(request: web.Request) -> web.Response:
    return await answer(lambda: _state(job_of(request)))


async def _make(request: web.Request) -> web.Response:
    """Queue what is missing of the grid; its state. Images that are there stay, whatever else the grid was before."""
    choice = await body_of(request, GridChoice)
    while_training.check_accepted()
    job, prompts = await in_thread(lambda: _missing(job_of(request), choice))
    for key, prompt in prompts.items():
        _queued[job.id, key] = await host.queue_prompt(prompt, {NOTE: {"job": job.id, "image": key}})
    return await answer(lambda: _state(job))


def _missing(job: Job, choice: GridChoice) -> tuple[Job, dict[str, Prompt]]:
    """What makes each image that is neither there nor queued, by its key."""
    grid = _choose(job, choice)
    names = {step: _lora_name(grid, step) for step in grid.steps}
    folder = host.output_name(images_folder(job.folder))
    found = {}
    for cell in cells(job.config, grid):
        if _progress(job, cell.key)["state"] in ("none", "failed", "cancelled"):
            prompt = image_graph(job.config, names[cell.step], cell.strength, cell.preview)
            prompt["save"]["inputs"]["filename_prefix"] = f"{folder}/{cell.key}"
            found[cell.key] = prompt
    return job, found


def _choose(job: Job, choice: GridChoice) -> Grid:
    """Put the LoRAs of the steps to use, and write down what the grid is to be. Raises ConfigError, JobError."""
    check_grid(job.config, choice)
    kept, loras = job.folder / "loras", {}
    # Steps that are not kept come first: nothing is written for a choice that cannot be. One by one: nobody waits for
    # more than one file to be copied.
    for step in sorted(choice.steps, key=lambda step: kept_path(kept, step).is_file()):
        path = jobs.manager().use(job.id, step)
        loras[step] = UsedLora(name=path.name, sha256=sha256_file(path))
    with jobs.manager().held(job.id):
        return put_grid(job.folder, choice, loras)


def _lora_name(grid: Grid, step: int) -> str:
    """The name under which ComfyUI finds the very file that the grid was made with. Raises LoraError, JobError."""
    used = grid.loras[step]
    if sha256_file(host.lora_path(used.name)) != used.sha256:
        raise JobError(
            f"The LoRA '{used.name}' is another than when the grid was made: it was trained anew, replaced, or one of "
            "this name lies in a folder that ComfyUI searches first. Make the grid again, or move the other one away."
        )
    return used.name


async def _stop(request: web.Request) -> web.Response:
    """Take what is not made yet out of the queue."""

    def stop() -> GridState:
        job = job_of(request)
        forget(job.id)
        return _state(job)

    return await answer(stop)


def forget(job_id: str) -> None:
    """Cancel the prompts of a job's grid."""
    for asked, prompt in list(_queued.items()):
        if asked[0] == job_id and _queued.pop(asked, None):
            host.cancel_prompt(prompt)


async def _image(request: web.Request) -> web.StreamResponse:
    return await image_answer(request, lambda: _image_of(job_of(request), request.match_info["key"]))


def _image_of(job: Job, key: str) -> Path:
    found = image_of(job.folder, key) if _KEY.fullmatch(key) else None
    if found is None:
        raise Unknown(f"The grid of the job '{job.id}' has no image '{key[:40]}' yet. Make the grid, or wait for it.")
    return found


async def _graph(request: web.Request) -> web.Response:
    """What repeats an image, as `graph/use` has it."""

    def make() -> JobGraph:
        job = job_of(request)
        grid, cell = _cell(job, request.match_info["key"])
        prompt = image_graph(job.config, _lora_name(grid, cell.step), cell.strength, cell.preview)
        return {"prompt": prompt, "missing": [], "folded": []}

    return await answer(make)


async def _stock(request: web.Request) -> web.Response:
    def make() -> JobGraph:
        job = job_of(request)
        grid, cell = _cell(job, request.match_info["key"])
        lora = _lora_name(grid, cell.step)
        return {"prompt": stock_graph(job.config, lora, cell.strength, cell.preview), "missing": [], "folded": []}

    return await answer(make)


async def _rate(request: web.Request) -> web.Response:
    body = await body_of(request, Rating)

    def rate() -> GridState:
        job = job_of(request)
        _cell(job, body.key)
        with jobs.manager().held(job.id):
            write_grid(job.folder, rated(_made(job), body.key, body.rating))
        return _state(job)

    return await answer(rate)


async def _keep(request: web.Request) -> web.Response:
    """Cover image and model card beside the LoRA; `stayed` are files there that are the user's own."""
    body = await body_of(request, Pick)

    def keep() -> KeptFiles:
        job = job_of(request)
        grid, cell = _cell(job, body.key)
        lora, image = host.lora_path(_lora_name(grid, cell.step)), _image_of(job, cell.key)
        with jobs.manager().held(job.id):
            written, stayed = publish.keep(grid := _made(job), lora, cell, image)
            write_grid(job.folder, grid.model_copy(update={"written": written}))
        return {"lora": lora.name, "path": str(lora), "strength": cell.strength, "stayed": stayed}

    return await answer(keep)


async def _publish(request: web.Request) -> web.Response:
    """A folder with the LoRA, its card, and the images of its row, the picked one first."""
    body = await body_of(request, Pick)

    def write() -> Published:
        job = job_of(request)
        grid, cell = _cell(job, body.key)
        row = [each for each in cells(job.config, grid) if (each.step, each.strength) == (cell.step, cell.strength)]
        images = [(cell, _image_of(job, cell.key))]
        images += [(each, path) for each in row if each != cell and (path := image_of(job.folder, each.key))]
        folder = publish.publish(host.publish_folder(), host.lora_path(_lora_name(grid, cell.step)), images)
        return {"folder": str(folder), "images": len(images)}

    return await answer(write)


def _made(job: Job) -> Grid:
    grid = read_grid(job.folder)
    if grid is None:
        raise JobError(f"The job '{job.id}' has no grid yet. Choose steps, strengths and prompts, and make it.")
    return grid


def _cell(job: Job, key: str) -> tuple[Grid, Cell]:
    grid = _made(job)
    found = next((cell for cell in cells(job.config, grid) if cell.key == key), None)
    if found is None:
        raise Unknown(f"The grid of the job '{job.id}' has no image '{key[:40]}'.")
    return grid, found


def _state(job: Job) -> GridState:
    """The whole grid as JSON values."""
    grid = read_grid(job.folder)
    own = [preview.prompt for preview in job.config.preview_list()]
    if grid is None:
        return {"choice": None, "own_prompts": own, "columns": [], "cells": [], "rows": [], "best": None}
    found = cells(job.config, grid)
    rows = averages(grid, found)
    top = best(rows)
    state: Any = {
        "choice": grid.model_dump(mode="json", include=set(GridChoice.model_fields)),
        "own_prompts": own,
        "columns": [
            Column(prompt=each.prompt, width=each.width, height=each.height, seed=each.settings.seed)
            for each in previews(job.config, grid.prompts)
        ],
        "cells": [
            {"key": cell.key, "step": cell.step, "strength": cell.strength, "prompt": cell.prompt}
            | {"rating": grid.ratings.get(cell.key, 0), **_progress(job, cell.key)}
            for cell in found
        ],
        "rows": [asdict(row) for row in rows],
        "best": asdict(top) if top else None,
    }
    return state


def _progress(job: Job, key: str) -> Progress:
    asked = job.id, key
    prompt = _queued.get(asked)
    found = host.prompt_state(prompt) if prompt else None
    # In this order: a prompt that has ended has written its image.
    if image_of(job.folder, key):
        _queued.pop(asked, None)
        return {"state": "done"}
    if found is None or found.state == "done":  # done without an image: it was removed since
        return {"state": "none"}
    return {"state": found.state, "error": found.error} if found.error else {"state": found.state}


ROUTES = (
    Route("get", "/chromakit/jobs/{id}/grid", _grid, "The grid that a LoRA is chosen from.", GridState),
    Route(
        "post",
        "/chromakit/jobs/{id}/grid",
        _make,
        "Has ComfyUI's queue make a grid of kept steps, strengths and prompts, as far as it is not there yet.",
        GridState,
        GridChoice,
        otherwise=400,
    ),
    Route("post", "/chromakit/jobs/{id}/grid/stop", _stop, "Takes out of the queue what is not made yet.", GridState),
    Route("get", "/chromakit/jobs/{id}/grid/{key}", _image, "An image of the grid.", "image/*", queries=(SIDE,)),
    Route("get", "/chromakit/jobs/{id}/grid/{key}/graph", _graph, "A prompt that repeats it, bit for bit.", JobGraph),
    Route(
        "get",
        "/chromakit/jobs/{id}/grid/{key}/stock",
        _stock,
        "A prompt that makes it with ComfyUI's own nodes, as far as these know the model.",
        JobGraph,
    ),
    Route("post", "/chromakit/jobs/{id}/rate", _rate, "Rates an image of the grid.", GridState, Rating, otherwise=400),
    Route(
        "post",
        "/chromakit/jobs/{id}/keep",
        _keep,
        "Writes an image and a model card beside the LoRA that made it.",
        KeptFiles,
        Pick,
    ),
    Route(
        "post",
        "/chromakit/jobs/{id}/publish",
        _publish,
        "Writes a folder that can be published: the LoRA, its card, its images.",
        Published,
        Pick,
    ),
)
