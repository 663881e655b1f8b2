"""HTTP for what nodes show before anything runs (datasets, noise levels, the memory plan) and for this ComfyUI: its
memory, the recipes, and the setting of what prompts do while a job trains, the only state that is changed here.

What a node shows is computed from the values of its widgets by name, with the very functions that the node runs.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any, get_type_hints
from weakref import WeakValueDictionary

from aiohttp import web
from comfy_api.latest import io
from typing_extensions import TypedDict

from ...chroma_core.errors import did_you_mean
from ...chroma_core.memory import Settings, estimate, memory_plan
from ...chroma_core.memory.table import MemoryEstimate
from ...chroma_core.model.flavours import FLAVOURS
from ...chroma_core.model.latents import snap_size
from ...chroma_core.sampling.schedule import SigmaSettings, sigma_density
from ...chroma_core.training.config.recipes import recipes_as_json
from ...chroma_core.training.step.optimizers import Schedule
from .. import host, while_training
from ..dataset import ChromaDataset
from ..dataset_preview import FALLBACK_SIZE, DatasetLook, DatasetPreviews
from ..dataset_widgets import config_from
from ..loaders import ChromaLoadModel
from ..schedule import ChromaTailSigmas, sigmas_of
from ..settings import ChromaTrainingSettings, sigma_fields
from .common import Malformed, Route, answer, in_thread, inputs_of, json_of, read_widgets, refused

PLAN_WIDGETS = ("flavour", "precision", "text_precision", "offload", "resident_blocks", "offload_during_startup")
PLAN = get_type_hints(Settings)
"""What `GET /chromakit/plan` takes in its query, all optional: whole numbers, true or false, and else names."""
TRUTH = {"true": True, "1": True, "false": False, "0": False}
DENSITY = (
    "sigma_draw", "sigma_remap", "sigma_scale", "sigma_shift", "sigma_shift_value", "sigma_minimum", "sigma_maximum",
    "sigma_shift_first", "warmup_steps", "lr_schedule", "lr_cycles", "lr_power",
)  # fmt: skip
READERS = 8
"""Folders that are read at once, by threads of their own: one on a drive that does not answer holds up nobody else."""
BINS = 40
LR_POINTS = 200

_previews = DatasetPreviews()
_readers = ThreadPoolExecutor(READERS, "chromakit-look")
_reading: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
"""A lock for each folder that is being looked at: whoever asks twice for the same finds it remembered."""


class SigmaList(TypedDict):
    """Noise levels from 1 to 0, and the size in pixels that they are for."""

    sigmas: list[float]
    width: int
    height: int


class Curves(TypedDict):
    """The density of the noise levels that training draws, at `centres`, beside the `plain` logit-normal; and the
    learning rate as `[step, share]`."""

    centres: list[float]
    density: list[float]
    plain: list[float]
    size: int
    steps: int
    rates: list[tuple[int, float]]


class PlanRows(TypedDict):
    """The memory plan of this machine: a row for each choice, the device, advice in words and as settings."""

    rows: list[dict[str, Any]]
    size: int
    device_name: str
    shared: bool
    device_bytes: int
    device_budget_bytes: int
    host_bytes: int
    host_budget_bytes: int
    sentences: list[str]
    recommended: list[dict[str, Any]]


async def _dataset(request: web.Request) -> web.Response:
    """Chroma Dataset's widgets, and `flavour`: the model's, whose size counts where `resolution` is 0."""
    body = await json_of(request)
    values = await in_thread(lambda: read_widgets(_dataset_inputs(), body))
    async with _reading.setdefault(values["folder"], asyncio.Lock()):
        return await answer(lambda: _dataset_preview(**values), _readers)


def _dataset_inputs() -> list[Any]:
    own = {**inputs_of(ChromaDataset), "folder": io.String.Input("folder", default="")}
    return [*own.values(), io.Combo.Input("flavour", options=["", *FLAVOURS], default="")]


def _dataset_preview(folder: str, flavour: str, **options: Any) -> DatasetLook:
    size = FLAVOURS[flavour].size if flavour else None
    return _previews.of(config_from(str(host.dataset_folder(folder)), **options), size)


async def _sheet(request: web.Request) -> web.Response:
    found = await in_thread(lambda: _previews.sheet(request.match_info["id"]), _readers)
    if found is None:
        return refused(404, "This contact sheet is no longer kept. Change a value of the node, and it is made again.")
    return web.Response(body=found, content_type="image/jpeg", headers={"Cache-Control": "private, max-age=3600"})


async def _sigmas(request: web.Request) -> web.Response:
    """Chroma Tail Sigmas' widgets → the noise levels, and the size that they are for."""
    body = await json_of(request)
    return await answer(lambda: _sigma_list(body))


def _sigma_inputs() -> list[Any]:
    return [*inputs_of(ChromaTailSigmas).values()]


def _sigma_list(body: object) -> SigmaList:
    values = read_widgets(_sigma_inputs(), body)
    width, height = snap_size(values["width"], values["height"])
    return {"sigmas": sigmas_of(**values).tolist(), "width": width, "height": height}


async def _density(request: web.Request) -> web.Response:
    """Chroma Training Settings' widgets about noise levels and the learning rate, and `steps` → both as curves."""
    body = await json_of(request)
    return await answer(lambda: _curves(body))


def _density_inputs() -> list[Any]:
    own = inputs_of(ChromaTrainingSettings)
    return [*(own[name] for name in DENSITY), io.Int.Input("steps", default=1000, min=1, max=1_000_000)]


def _curves(body: object) -> Curves:
    values = read_widgets(_density_inputs(), body)
    tokens = FALLBACK_SIZE**2 // 256
    plain = SigmaSettings(remap="none")
    rate = Schedule(
        values["lr_schedule"], 1.0, values["steps"], values["warmup_steps"], values["lr_cycles"], values["lr_power"]
    )
    stride = max(1, values["steps"] // LR_POINTS)
    seen = sorted({*range(0, values["steps"], stride), values["steps"] - 1})
    return {
        "centres": [(i + 0.5) / BINS for i in range(BINS)],
        "density": sigma_density(SigmaSettings(**sigma_fields(values)), tokens, BINS),
        "plain": sigma_density(plain, tokens, BINS),
        "size": FALLBACK_SIZE,
        "steps": values["steps"],
        "rates": [(step, rate.at(step)) for step in seen],
    }


async def _plan_rows(request: web.Request) -> web.Response:
    """Chroma Load Model's widgets about memory, and `size` → the rows of the memory plan for this machine."""
    body = await json_of(request)
    return await answer(lambda: _rows(body))


def _plan_inputs() -> list[Any]:
    own = inputs_of(ChromaLoadModel)
    return [*(own[name] for name in PLAN_WIDGETS), io.Int.Input("size", default=0, min=0, max=4096)]


def _rows(body: object) -> PlanRows:
    values = read_widgets(_plan_inputs(), body)
    values["size"] = values["size"] or None
    plan = memory_plan(Settings(**values), host.here())
    return {
        "rows": [row.to_dict() for row in plan.rows],
        "size": plan.chosen.pixels,
        "device_name": plan.on.name,
        "shared": plan.on.shared,
        "device_bytes": plan.on.device_bytes,
        "device_budget_bytes": plan.on.device_budget,
        "host_bytes": plan.on.host_bytes,
        "host_budget_bytes": plan.on.host_budget,
        "sentences": [plan.sampling.sentence, plan.training.sentence],
        "recommended": [plan.sampling.to_dict(), plan.training.to_dict()],
    }


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
        "post",
        "/chromakit/datasets/look",
        _dataset,
        "What a dataset holds: counts, sizes, warnings, small images; widgets of Chroma Dataset.",
        DatasetLook,
        _dataset_inputs,
        otherwise=400,
    ),
    Route("get", "/chromakit/datasets/sheets/{id}", _sheet, "A dataset's contact sheet.", "image/jpeg"),
    Route(
        "post",
        "/chromakit/sigmas",
        _sigmas,
        "A schedule of noise levels; widgets of Chroma Tail Sigmas.",
        SigmaList,
        _sigma_inputs,
        otherwise=400,
    ),
    Route(
        "post",
        "/chromakit/density",
        _density,
        "Which noise levels training draws, and its learning rate; widgets of Chroma Training Settings.",
        Curves,
        _density_inputs,
        otherwise=400,
    ),
    Route(
        "post",
        "/chromakit/plan/rows",
        _plan_rows,
        "The memory plan of this machine; widgets of Chroma Load Model.",
        PlanRows,
        _plan_inputs,
        otherwise=400,
    ),
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
