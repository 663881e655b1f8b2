"""HTTP for inference requests: one POST becomes a prompt in ComfyUI's own queue; its state is asked for by its id."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlencode

from aiohttp import web
from typing_extensions import TypedDict

from ...chroma_core.comfy.graph import to_prompt
from ...chroma_core.requests.request import InferenceRequest
from ...chroma_core.requests.run import check_loras, lora_uses, model_spec
from ...chroma_core.weights.identify import Part
from .. import host, while_training
from .common import Route, Unknown, bytes_of, lora_name, refused, told

NOTE = "chromakit_request"
"""Under which a queued prompt, and each of its PNG files, carries what was asked for and what was made of it."""

KEPT = 1000

_never_ran: OrderedDict[str, dict[str, Any]] = OrderedDict()
"""Notes of the last requests that were cancelled while they waited: ComfyUI forgets such prompts."""


class RequestImage(TypedDict):
    """One prompt of a request with everything decided; images: addresses of what is made of it."""

    prompt: str
    neg: str
    width: int
    height: int
    seed: int
    sample_steps: int
    guidance_scale: float
    steps_done: int
    images: list[str]


class RequestAnswer(TypedDict):
    """A request as it is. position: prompts before it in the queue. remarks: what was asked for and has no effect."""

    id: str
    state: host.PromptStateName
    position: int | None
    error: str | None
    prompts: list[RequestImage]
    recipe: str
    model: str
    loras: list[dict[str, Any]]
    remarks: list[str]
    status_url: str
    cancel_url: str


async def _post(request: web.Request) -> web.Response:
    """Validate, queue, answer with the id. Nothing is queued for a request that is refused."""
    asked = InferenceRequest.read(await bytes_of(request))
    while_training.check_accepted()
    names = await asyncio.to_thread(_checked, asked)
    images = asked.images()
    note = {"request": asked.model_dump(mode="json"), "pictures": [image.to_dict() for image in images]}
    note["remarks"] = list(asked.remarks)
    extra = {NOTE: note, "extra_pnginfo": {NOTE: note}}
    prompt_id = await host.queue_prompt(to_prompt(asked, images, names), extra)
    return told(_answer(prompt_id, await asyncio.to_thread(host.prompt_state, prompt_id), note))


async def _one(request: web.Request) -> web.Response:
    prompt_id = request.match_info["id"]
    found, note = await _found(prompt_id)
    return told(_answer(prompt_id, found, note))


async def _cancel(request: web.Request) -> web.Response:
    prompt_id = request.match_info["id"]
    found, note = await _found(prompt_id)
    if found is not None and found.state in ("done", "failed"):
        return refused(409, f"The request '{prompt_id}' cannot be cancelled: it is {found.state} already.")
    if found is not None and await asyncio.to_thread(host.cancel_prompt, prompt_id) and found.state == "queued":
        _never_ran[prompt_id] = note
        while len(_never_ran) > KEPT:
            _never_ran.popitem(last=False)
    return told(_answer(prompt_id, await asyncio.to_thread(host.prompt_state, prompt_id), note))


async def _found(prompt_id: str) -> tuple[host.PromptState | None, dict[str, Any]]:
    """A request's prompt, None for one that was cancelled while it waited, and its note. Raises Unknown."""
    found = await asyncio.to_thread(host.prompt_state, prompt_id)
    note = _never_ran.get(prompt_id) if found is None else found.extra.get(NOTE)
    if note is None:
        raise Unknown(
            f"There is no request '{prompt_id}'. It was never queued here, ComfyUI was restarted, or its history was "
            "cleared. Send it again."
        )
    return found, note


def _checked(asked: InferenceRequest) -> list[str]:
    """The request's LoRAs under their names in ComfyUI's folders; raises for any file that is not there or no fit."""
    spec = model_spec(asked, _part)
    found: list[str] = []

    def path_of(path: str) -> Path:
        found.append(lora_name(path))
        return host.lora_path(found[-1])

    check_loras(spec, lora_uses(asked, path_of))
    return found


def _part(part: str, name: str) -> str:
    return host.model_folder(name) if part == "folder" else host.model_file(cast(Part, part), name)


def _answer(prompt_id: str, found: host.PromptState | None, note: dict[str, Any]) -> RequestAnswer:
    """What every route answers: the state, and for each prompt the effective values and its images."""
    outputs = (found.outputs if found else None) or {}
    progress = (found.progress if found else None) or {}
    prompts: list[RequestImage] = []
    for i, planned in enumerate(note["pictures"]):
        images = outputs.get(f"save_{i}", {}).get("images", [])
        done, total = progress.get(f"sample_{i}", (0, 0))
        steps_done = planned["sample_steps"] if images else int(done) if total == planned["sample_steps"] else 0
        shown = {**planned, "steps_done": steps_done, "images": [_view(image) for image in images]}
        prompts.append(cast(RequestImage, shown))
    return {
        "id": prompt_id,
        "state": found.state if found else "cancelled",
        "position": found.position if found else None,
        "error": found.error if found else None,
        "prompts": prompts,
        "recipe": note["request"]["recipe"],
        "model": note["request"]["model"],
        "loras": note["request"]["loras"],
        "remarks": note.get("remarks", []),
        "status_url": f"/chromakit/requests/{prompt_id}",
        "cancel_url": f"/chromakit/requests/{prompt_id}/cancel",
    }


def _view(image: dict[str, Any]) -> str:
    return f"/view?{urlencode({key: image[key] for key in ('filename', 'subfolder', 'type')})}"


ROUTES = (
    Route(
        "post",
        "/chromakit/requests",
        _post,
        "Queues an inference request.",
        RequestAnswer,
        InferenceRequest,
        otherwise=400,
    ),
    Route("get", "/chromakit/requests/{id}", _one, "A request's state and images.", RequestAnswer),
    Route("post", "/chromakit/requests/{id}/cancel", _cancel, "Cancels a request.", RequestAnswer),
)
