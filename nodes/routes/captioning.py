"""HTTP for captions that other nodes write: any node that makes a text of an image, or a graph that does, is run by
ComfyUI's own queue for each image of a dataset that has no caption.
"""

from __future__ import annotations

import asyncio
import copy
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Annotated, Any

from aiohttp import web
from pydantic import Field, StrictStr
from typing_extensions import TypedDict

from ...chroma_core.comfy.graph import Prompt, node
from ...chroma_core.data import history
from ...chroma_core.data.editing import Changed
from ...chroma_core.errors import ChromaKitError, ConfigError, did_you_mean, first_few
from .. import host, while_training
from .common import Query, Route, answer, body_of, in_thread, told
from .datasets import Look, OneFolder, contents, lock_of, readers

LOADER, SHOWN = "LoadImage", "PreviewAny"
"""ComfyUI's own nodes: the one that an image comes from, and the one whose output is a text in the history."""
TEXT = "chromakit_text"
NOTE = "chromakit_caption"
"""Under which a queued prompt carries which image it is for."""
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
SECONDS = 0.5
"""Between two looks at the queue."""
FOLDER = Query("folder", "The dataset.", {"type": "string"})


class Wanted(OneFolder):
    """The body of `caption`: a node that `captioners` lists, or a prompt in API form with one Load Image."""

    node: Annotated[StrictStr, Field(max_length=1000)] = ""
    graph: dict[str, Any] = {}
    label: Annotated[StrictStr, Field(max_length=200)] = ""


class Captioner(TypedDict):
    """A node that makes a text of an image, and what ComfyUI's page calls it."""

    node: str
    title: str


class Captioners(TypedDict):
    """Nodes that can be asked for captions without anything else."""

    nodes: list[Captioner]


class Failure(TypedDict):
    """An image that got no caption, and why."""

    name: str
    error: str


class CaptionProgress(TypedDict):
    """How many images still wait for a caption, how many got one, and which got none."""

    waiting: int
    written: int
    failed: list[Failure]


@dataclass
class _Run:
    """Images by the prompts that are queued for them."""

    waiting: dict[str, str] = field(default_factory=dict)
    written: int = 0
    failed: list[Failure] = field(default_factory=list)

    def told(self) -> CaptionProgress:
        return {"waiting": len(self.waiting), "written": self.written, "failed": self.failed}


_runs: dict[str, _Run] = {}
"""The last one of each dataset. The queue, too, lasts no longer than the process."""
_tasks: set[asyncio.Task[None]] = set()


# --- which nodes ------------------------------------------------------------------------------------------------------


async def _captioners(request: web.Request) -> web.Response:
    return await answer(lambda: Captioners(nodes=[_told(name) for name in sorted(_offered())]))


def _told(name: str) -> Captioner:
    return {"node": name, "title": host.node_title(name)}


def _text_slot(name: str) -> int | None:
    """Which output of a node is a text; None: none."""
    kinds: list[Any] = list(getattr(host.node_types().get(name), "RETURN_TYPES", None) or ())
    return kinds.index("STRING") if "STRING" in kinds else None


def _alone(name: str) -> Prompt | None:
    """A prompt of a node that makes a text of an image and needs nothing but widgets beside; None for any other."""
    if _text_slot(name) is None:
        return None
    values: dict[str, Any] = {}
    try:
        inputs = host.node_types()[name].INPUT_TYPES().get("required", {})
    except Exception:  # a node of another pack may raise anything, and is then simply not offered
        return None
    for key, (kind, *more) in inputs.items():
        options = more[0] if more and isinstance(more[0], Mapping) else {}
        listed = list(kind) if isinstance(kind, list | tuple) else options.get("options")
        if kind == "IMAGE" and "image" not in values.values():
            values[key] = ["image", 0]
        elif listed or (kind in WIDGETS and "default" in options and not options.get("forceInput")):
            values[key] = options.get("default", listed[0] if listed else None)
        else:
            return None
    if ["image", 0] not in values.values():
        return None
    return {"image": node(LOADER, "Load Image", image=""), "text": node(name, host.node_title(name), **values)}


def _template(body: Wanted) -> tuple[Prompt, str]:
    """The prompt that makes a caption, as far as it is needed for that, and the key of its Load Image."""
    if bool(body.node) == bool(body.graph):
        raise ConfigError("Say either which node makes the captions, or a graph that does.")
    if body.node:
        prompt = _alone(body.node)
        if prompt is None:
            raise ConfigError(
                f"'{body.node[:200]}' is no node that makes a text of an image by itself. {_offer()}"
                f"{did_you_mean(body.node, _offered())}"
            )
    else:
        prompt = _checked(body.graph)
    loaders = [key for key, each in prompt.items() if each["class_type"] == LOADER]
    if len(loaders) != 1:
        raise ConfigError(
            f"The graph has {len(loaders)} nodes Load Image. It needs one, for the image to be captioned."
        )
    seen = _after(prompt, loaders[0])
    texts = [key for key in seen if _text_slot(prompt[key]["class_type"]) is not None]
    last = [key for key in texts if not any(other in texts for other in _after(prompt, key))]
    if len(last) != 1:
        titles = [host.node_title(prompt[key]["class_type"]) for key in last]
        found = f"has several: {first_few(titles)}" if last else "has none"
        raise ConfigError(f"One node of the graph must make a text of the image that is loaded; it {found}. {_offer()}")
    needed = {last[0], *_before(prompt, last[0])}
    made = {key: each for key, each in prompt.items() if key in needed}
    made[TEXT] = node(SHOWN, "Preview as Text", source=[last[0], _text_slot(prompt[last[0]]["class_type"])])
    return made, loaders[0]


def _offered() -> list[str]:
    """The nodes that can be asked."""
    return [name for name in host.node_types() if _alone(name)]


def _offer() -> str:
    if known := _offered():
        return f"There is {first_few(known)}."
    return "No such node is installed: install a pack of nodes for captions or tags, and restart ComfyUI."


def _checked(graph: Mapping[str, Any]) -> Prompt:
    for each in graph.values():
        if (
            not isinstance(each, dict)
            or not isinstance(each.get("class_type"), str)
            or not isinstance(each.get("inputs"), dict)
        ):
            raise ConfigError("The graph is no prompt in API form: each node needs class_type and inputs.")
    return dict(graph)


def _links(prompt: Prompt, key: str) -> list[str]:
    values = prompt[key]["inputs"].values()
    links = [value[0] for value in values if isinstance(value, list) and value and isinstance(value[0], str)]
    return [key for key in links if key in prompt]


def _before(prompt: Prompt, key: str) -> list[str]:
    """The nodes that one depends on."""
    found: dict[str, None] = {}
    waiting = [key]
    while waiting:
        for each in _links(prompt, waiting.pop()):
            if each not in found:
                found[each] = None
                waiting.append(each)
    return list(found)


def _after(prompt: Prompt, key: str) -> list[str]:
    """The nodes that depend on one."""
    return [each for each in prompt if key in _before(prompt, each)]


# --- a run ------------------------------------------------------------------------------------------------------------


async def _caption(request: web.Request) -> web.Response:
    """One prompt an image, in ComfyUI's queue; a caption that somebody writes meanwhile stays."""
    body = await body_of(request, Wanted)
    while_training.check_accepted()
    folder, names, prompt, loader = await in_thread(lambda: _asked(body), readers)
    run = _runs[folder] = _Run()
    try:
        for name in names:
            made = copy.deepcopy(prompt)
            made[loader]["inputs"]["image"] = f"{folder}/{name}"
            run.waiting[name] = await host.queue_prompt(made, {NOTE: {"folder": folder, "image": name}})
    finally:  # also of those that were queued before one was refused
        task = asyncio.create_task(_follow(folder, run, body.label))
        _tasks.add(task)
        task.add_done_callback(_tasks.discard)
    return told(run.told())


def _asked(body: Wanted) -> tuple[str, list[str], Prompt, str]:
    host.own_dataset_folder(body.folder)
    if SHOWN not in host.node_types():
        raise ConfigError("This ComfyUI has no node Preview as Text, through which captions are read. Update ComfyUI.")
    if body.folder in _runs and _runs[body.folder].waiting:
        raise Changed(f"Captions of '{body.folder}' are being made already. Wait for them, or stop them.")
    prompt, loader = _template(body)
    names = [
        each["name"] for each in contents(Look(folder=body.folder))["images"] if each["size"] and each["caption"] == ""
    ]
    if not names:
        raise ConfigError(f"Every image of '{body.folder}' has a caption. Only those without one are captioned.")
    return body.folder, names, prompt, loader


async def _follow(folder: str, run: _Run, label: str) -> None:
    """Write each caption as its prompt ends."""
    group = uuid.uuid4().hex
    while run.waiting:
        await asyncio.sleep(SECONDS)
        for name, prompt_id in list(run.waiting.items()):
            state = host.prompt_state(prompt_id)
            if state is not None and state.state in ("queued", "running"):
                continue
            why = state.error if state else None
            if state is not None and state.state == "done":
                why = await _write(folder, name, _text(state.outputs or {}), label, group)
                run.written += not why
            run.waiting.pop(name, None)
            if why:
                run.failed.append({"name": name, "error": why})


def _text(outputs: Mapping[str, Any]) -> str:
    """One line: a caption's lines are several captions."""
    found = outputs.get(TEXT, {}).get("text", ())
    return " ".join(" ".join(map(str, found)).split())


async def _write(folder: str, name: str, text: str, label: str, group: str) -> str:
    """Why a caption could not be written; empty when it was."""
    if not text:
        return "The node gave an empty text."
    async with lock_of(folder):
        with suppress(Changed):  # by hand, meanwhile
            try:
                where = host.own_dataset_folder(folder)
                await in_thread(lambda: history.caption(where, {name: text}, {name: ""}, label, group), readers)
            except (ChromaKitError, OSError) as error:
                if isinstance(error, Changed):
                    raise
                return str(error)
    return ""


async def _progress(request: web.Request) -> web.Response:
    return told(_runs.get(request.query.get("folder", ""), _Run()).told())


async def _stop(request: web.Request) -> web.Response:
    """Take out of the queue what has no caption yet."""
    body = await body_of(request, OneFolder)
    run = _runs.get(body.folder, _Run())
    waiting = list(run.waiting.values())
    run.waiting.clear()
    await in_thread(lambda: [host.cancel_prompt(each) for each in waiting])
    return told(run.told())


ROUTES = (
    Route("get", "/chromakit/datasets/captioners", _captioners, "Nodes that make a text of an image.", Captioners),
    Route(
        "post",
        "/chromakit/datasets/caption",
        _caption,
        "Has ComfyUI's queue make captions, by other nodes, for the images of a dataset that have none.",
        CaptionProgress,
        Wanted,
        otherwise=400,
    ),
    Route(
        "get",
        "/chromakit/datasets/caption",
        _progress,
        "How far the captions of a dataset are.",
        CaptionProgress,
        queries=(FOLDER,),
    ),
    Route(
        "post",
        "/chromakit/datasets/caption/stop",
        _stop,
        "Takes captions that are not made yet out of the queue.",
        CaptionProgress,
        OneFolder,
    ),
)
