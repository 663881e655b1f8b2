"""ComfyUI's prompt queue from the inside: queueing a prompt, seeing how it is, cancelling it.

Everything is read from ComfyUI's own queue and history, so nothing here is lost when outputs are evicted.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import comfy.model_management as management
import execution
from aiohttp import web
from comfy_execution.progress import get_progress_state
from server import PromptServer

from ...chroma_core.errors import ConfigError, shortened
from .folders import told

log = logging.getLogger("chromakit")

_nodes: Any = execution.nodes  # ComfyUI's module of that name, which is also that of a folder of ours

BEGIN_SECONDS = 10.0
"""A prompt has begun so soon after ComfyUI's worker took it, or never does."""

PromptStateName = Literal["queued", "running", "done", "failed", "cancelled"]


@dataclass(frozen=True)
class PromptState:
    """A prompt as ComfyUI knows it.

    extra: what it was queued with. position: prompts before it in the queue. outputs: by node id, once it has ended.
    progress: (done, of) by node id, while it runs. error: why it failed.
    """

    state: PromptStateName
    extra: dict[str, Any]
    position: int | None = None
    outputs: dict[str, Any] | None = None
    progress: dict[str, tuple[float, float]] | None = None
    error: str | None = None


async def queue_prompt(prompt: dict[str, Any], extra: dict[str, Any]) -> str:
    """Queue an API-format prompt as ComfyUI's own `POST /prompt` does; returns its id.

    `extra` stays with it in queue and history. Raises ConfigError with ComfyUI's words for a prompt that it refuses,
    e.g. for a model file that is not in its folders. Belongs to the server's event loop.
    """
    server = PromptServer.instance
    prompt_id = str(uuid.uuid4())
    body = server.trigger_on_prompt({"prompt": prompt, "extra_data": extra})
    prompt, extra = body["prompt"], dict(body["extra_data"])
    accepted, error, outputs, node_errors = await execution.validate_prompt(prompt_id, prompt, None)
    if not accepted or node_errors:  # ComfyUI would run what is left of it
        raise ConfigError(_refusal(error, node_errors))
    extra["create_time"] = int(time.time() * 1000)
    number = server.number
    server.number += 1
    server.prompt_queue.put((number, prompt_id, prompt, extra, outputs, {}))
    return prompt_id


def node_types() -> dict[str, Any]:
    """The classes of all nodes that ComfyUI has, by the type that a prompt names them by."""
    return _nodes.NODE_CLASS_MAPPINGS


def node_title(node_type: str) -> str:
    """What ComfyUI's page calls a node."""
    return _nodes.NODE_DISPLAY_NAME_MAPPINGS.get(node_type) or node_type


def refuse_prompts(
    refusal: Callable[[], str | None], details: str, passes: Callable[[dict[str, Any], list[str] | None], bool]
) -> bool:
    """From now on ComfyUI's own `POST /prompt` answers 400 with `refusal()`, if that is a text, but for what passes.

    Args:
        details: what there is to say beyond it; some parts of the window show it, after a colon.
        passes: whether a prompt (API format, ids of the output nodes that it is to run for or None) may run all the
            same.
    Returns:
        False: this version of ComfyUI starts its server before it loads packs, and nothing is ever refused.
    """

    @web.middleware
    async def middleware(request: web.Request, handler: Callable[..., Any]) -> web.StreamResponse:
        if _is_prompt(request) and (reason := refusal()):
            prompt, targets = await _asked(request)
            if prompt is not None and not passes(prompt, targets):
                log.info("ChromaKit: a prompt was refused. %s", reason)
                error = {"type": "chromakit_training", "message": reason, "details": details, "extra_info": {}}
                return web.json_response({"error": error, "node_errors": {}}, status=400)
        return await handler(request)

    return _watch(middleware)


HALF = "chromakit.prompt_half"
"""The event that says what was left out of a prompt: `{prompt_id, problems: [{node, title, error}]}`."""


def tell_of_halves(ours: str) -> None:
    """From now on, what ComfyUI leaves out of a prompt that has a node whose type begins with `ours` is said in the log
    and to the page that queued it. ComfyUI runs the rest, and answers as if all were well but for `node_errors`.
    """

    @web.middleware
    async def middleware(request: web.Request, handler: Callable[..., Any]) -> web.StreamResponse:
        response = await handler(request)
        if _is_prompt(request) and response.status == 200 and isinstance(response, web.Response):
            with suppress(AttributeError, KeyError, TypeError, ValueError):  # what another version answers
                _tell_of_half(json.loads(response.text or "{}"), await request.json(), ours)
        return response

    _watch(middleware)


def _tell_of_half(answer: dict[str, Any], asked: dict[str, Any], ours: str) -> None:
    prompt, found = asked["prompt"], answer.get("node_errors")
    if not found or not any(node["class_type"].startswith(ours) for node in prompt.values()):
        return
    problems = [_problem(key, each, prompt[key]) for key, each in found.items()]
    words = "; ".join(f"{each['title']} ({each['node']}): {each['error']}" for each in problems)
    log.warning("ChromaKit: only a part of prompt %s runs. %s", answer["prompt_id"], words)
    if client := asked.get("client_id"):
        half = told({"prompt_id": answer["prompt_id"], "problems": problems})
        PromptServer.instance.send_sync(HALF, half, client)


def _problem(key: str, found: dict[str, Any], node: dict[str, Any]) -> dict[str, str]:
    errors = (f"{each['message']} ({each['details']})" for each in found["errors"])
    title = (node.get("_meta") or {}).get("title") or found["class_type"]
    return {"node": key, "title": str(title), "error": shortened("; ".join(errors), 300)}


def _is_prompt(request: web.Request) -> bool:
    return request.method == "POST" and request.path in ("/prompt", "/api/prompt")


def _watch(middleware: Any) -> bool:
    """Put it around ComfyUI's routes; False where the server has begun already."""
    try:
        PromptServer.instance.app.middlewares.append(middleware)
    except RuntimeError:  # frozen
        return False
    return True


async def _asked(request: web.Request) -> tuple[dict[str, Any] | None, list[str] | None]:
    """Prompt and targets of a `POST /prompt`; None for what ComfyUI itself is going to refuse."""
    try:
        body = await request.json()  # aiohttp keeps the bytes: ComfyUI reads them again
    except (ValueError, LookupError, RecursionError):
        return None, None
    body = body if isinstance(body, dict) else {}
    prompt, targets = body.get("prompt"), body.get("partial_execution_targets")
    return prompt if isinstance(prompt, dict) else None, targets if isinstance(targets, list) else None


def _refusal(error: Any, node_errors: dict[str, Any]) -> str:
    details = [
        f"{found['class_type']}: {problem['message']} ({problem['details']})"
        for found in node_errors.values()
        for problem in found["errors"]
    ]
    return f"ComfyUI refuses the prompt: {'; '.join(details) or error['message']}."


def prompt_state(prompt_id: str) -> PromptState | None:
    """How a prompt is; None for one that neither the queue nor the history knows. Any thread."""
    queue = PromptServer.instance.prompt_queue
    # In this order: a prompt moves from the queue to the running ones to the history, and must not slip through.
    running, pending = queue.get_current_queue_volatile()
    ended = queue.get_history(prompt_id=prompt_id).get(prompt_id)
    if ended is not None:
        state, error = _ending(ended["status"])
        return PromptState(state, ended["prompt"][3], outputs=ended["outputs"], error=error)
    for item in running:
        if item[1] == prompt_id:
            return PromptState("running", item[3], progress=_progress(prompt_id))
    for place, item in enumerate(sorted(pending, key=lambda item: item[0])):
        if item[1] == prompt_id:
            return PromptState("queued", item[3], position=place + len(running))
    return None


def _progress(prompt_id: str) -> dict[str, tuple[float, float]]:
    registry = get_progress_state()
    if registry.prompt_id != prompt_id:
        return {}
    return {node: (state["value"], state["max"]) for node, state in list(registry.nodes.items())}


def _ending(status: dict[str, Any] | None) -> tuple[PromptStateName, str | None]:
    messages = dict(status["messages"]) if status else {}
    if "execution_interrupted" in messages:
        return "cancelled", None
    if status and status["status_str"] != "success":
        error = messages.get("execution_error", {})
        return "failed", str(error.get("exception_message", "")).strip() or "ComfyUI gave no reason; see its log."
    return "done", None


def cancel_prompt(prompt_id: str) -> bool:
    """Take a prompt out of the queue, or interrupt it if it runs; False when it did neither. Any thread.

    ComfyUI forgets an interruption that comes before the prompt has begun, so that is waited for.
    """
    queue = PromptServer.instance.prompt_queue
    if queue.delete_queue_item(lambda item: item[1] == prompt_id):
        return True
    deadline = time.monotonic() + BEGIN_SECONDS
    while _runs(prompt_id) and get_progress_state().prompt_id != prompt_id and time.monotonic() < deadline:
        time.sleep(0.01)
    if hasattr(queue, "interrupt_if_running"):
        return queue.interrupt_if_running(prompt_id)
    with queue.mutex:  # an older host
        if running := _runs(prompt_id):
            management.interrupt_current_processing()
        return running


def _runs(prompt_id: str) -> bool:
    return any(item[1] == prompt_id for item in list(PromptServer.instance.prompt_queue.currently_running.values()))
