"""The nodes: thin wrappers around `chroma_core`. Each file ends in the list of the nodes it brings."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import (
    bridge,
    checkpoints,
    dataset,
    host,
    jobs,
    loaders,
    lora,
    parity,
    routes,
    sampling,
    schedule,
    settings,
    training,
    while_training,
)
from .inputs import checked

ROOMS = (
    loaders,
    sampling,
    schedule,
    bridge,
    lora,
    checkpoints,
    dataset,
    settings,
    training,
    parity,
)
"""Files with nodes, in the order in which a user meets them."""


class ChromaKitExtension(ComfyExtension):
    """What ComfyUI loads: the routes, then the nodes."""

    async def on_load(self) -> None:
        routes.register(host.server_routes())
        host.tell_of_halves("Chroma")
        while_training.start()
        jobs.end_as_ctrl_c_does()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [checked(node) for room in ROOMS for node in room.NODES]
