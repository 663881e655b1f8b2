"""HTTP for this ComfyUI: its memory, the memory plan, what prompts do while a job trains, and the recipes."""

from __future__ import annotations

from typing import Any, get_type_hints

from aiohttp import web

from ...chroma_core.errors import did_you_mean
from ...chroma_core.memory import Settings, estimate
from ...chroma_core.memory.table import MemoryEstimate
from ...chroma_core.training.config.recipes import recipes_as_json
from .. import host, while_training
from .common import Malformed, Route, answer, json_of, refused

PLAN = get_type_hints(Settings)
"""What `GET /chromakit/plan` takes in its query, all optional: whole numbers, true or false, and else names."""
TRUTH = {"true": True, "1": True, "false": False, "0": False}


async def _plan(request: web.Request) -> web.Response:
    """The memory estimate for the query's settings; see `PLAN`."""
    settings = {name: _setting(name, text) for name, text in request.query.items()}
    return await answer(lambda: estimate(Settings(**settings), host.here()).to_dict())


def _setting(name: str, text: str) -> Any:
    if name not in PLAN:
        raise Malformed(f"The plan knows no '{name}'. It takes: {', '.join(PLAN)}.{did_you_mean(name, PLAN)}")
    if PLAN[name] is bool and text.lower() in TRUTH:
        return TRUTH[text.lower()]
    if PLAN[name] is bool:
        raise Malformed(f"The plan's '{name}' is '{text}'; it must be true or false.")
    try:
        return int(text) if PLAN[name] in (int, int | None) else text
    except ValueError:
        raise Malformed(f"The plan's '{name}' is '{text}'; it must be a whole number.") from None


async def _memory(request: web.Request) -> web.Response:
    return await answer(host.memory_report)


async def _recipes(request: web.Request) -> web.Response:
    return await answer(recipes_as_json)


async def _settings(request: web.Request) -> web.Response:
    return await answer(while_training.settings)


async def _change_settings(request: web.Request) -> web.Response:
    values = await json_of(request)
    try:
        return await answer(lambda: while_training.change(values))
    except OSError as error:
        return refused(507, f"The settings could not be written, and stay as they were: {error}.")


ROUTES = (
    Route(
        "get",
        "/chromakit/recipes",
        _recipes,
        "Options to begin with, by what is to be learnt, and where each number comes from.",
        dict[str, Any],
    ),
    Route(
        "get",
        "/chromakit/plan",
        _plan,
        "How much memory settings need on this machine.",
        MemoryEstimate,
        queries=Settings,
        otherwise=400,
    ),
    Route(
        "get", "/chromakit/memory", _memory, "The device, its memory, and what is kept loaded there.", host.MemoryReport
    ),
    Route(
        "get",
        "/chromakit/settings",
        _settings,
        "What prompts do while a job trains, and what can be chosen.",
        while_training.Chosen,
    ),
    Route(
        "post",
        "/chromakit/settings",
        _change_settings,
        "Chooses what prompts do while a job trains.",
        while_training.Chosen,
        while_training.Choice,
        otherwise=400,
    ),
)
