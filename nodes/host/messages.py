"""What the user sees while a node runs: progress, previews, lines of text, events for open pages."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from ipaddress import ip_address
from typing import Any

import comfy.model_management as management
import comfy.utils
from comfy.cli_args import args
from comfy_execution.utils import get_executing_context
from PIL import Image
from server import PromptServer

from .folders import told

Interrupted = management.InterruptProcessingException

log = logging.getLogger("chromakit")


class Progress:
    """The running node's progress bar. `step` also honours Cancel: it raises `Interrupted` (prompt thread)."""

    def __init__(self, total: int):
        self._bar = comfy.utils.ProgressBar(total)

    def step(self, done: int, total: int, preview: Image.Image | None = None) -> None:
        """Show `done` of `total`, with a preview image if there is one."""
        management.throw_exception_if_processing_interrupted()
        image = ("JPEG", preview, args.preview_size) if preview is not None else None
        self._bar.update_absolute(done, total, image)


def wants_previews() -> bool:
    """Whether the running prompt's owner has not switched live previews off.

    ComfyUI's default is "none" for its own samplers because a preview costs it an extra decoder; ours is a matrix
    product, so only an explicit "none" switches it off.
    """
    running, _ = PromptServer.instance.prompt_queue.get_current_queue_volatile()
    return all(item[3].get("preview_method") != "none" for item in running)


def say(message: str) -> None:
    """Show a line of text on the running node, and in the log."""
    context = get_executing_context()
    log.info("ChromaKit: %s", message)
    if message and context is not None:
        PromptServer.instance.send_progress_text(message, context.node_id)


def warn(message: str) -> None:
    """`say`, as a warning in the log."""
    context = get_executing_context()
    log.warning("ChromaKit: %s", message)
    if context is not None:
        PromptServer.instance.send_progress_text(f"Warning: {message}", context.node_id)


def show_loading(done: int, total: int, what: str) -> None:
    """How far the loading of a component is, as text on the running node; honours Cancel (prompt thread)."""
    management.throw_exception_if_processing_interrupted()
    context = get_executing_context()
    if context is not None:
        text = f"Loading {what} ({done} of {total})" if done < total else "Loaded."
        PromptServer.instance.send_progress_text(text, context.node_id)


class Downloads:
    """The running node's progress bar while files are fetched; an `OnDownload` of `loading.hub` (prompt thread).

    Honours Cancel. What has arrived is kept, so that the next attempt goes on from there.
    """

    def __init__(self) -> None:
        self._progress, self._name = Progress(1), ""

    def __call__(self, done: int, total: int, name: str) -> None:
        """`done` of `total` bytes are here (total 0: unknown); `name` is the file that is coming."""
        if name != self._name:
            self._name = name
            say(f"Downloading {name}")
        self._progress.step(done, max(total, done, 1))


def broadcast(event: str, data: Mapping[str, Any]) -> None:
    """Send a message to every open page, without this machine's places; safe from any thread."""
    PromptServer.instance.send_sync(event, told(data))


def server_routes() -> Any:
    """ComfyUI's route table."""
    return PromptServer.instance.routes


def port_of_this_machine_alone() -> int | None:
    """ComfyUI's port, where it listens on this machine's own addresses alone (see `--listen`); None where others reach
    it."""

    def own(address: str) -> bool:
        try:
            return ip_address(address).is_loopback
        except ValueError:
            return address == "localhost"

    return args.port if all(own(address.strip()) for address in args.listen.split(",")) else None
