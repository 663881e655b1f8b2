"""The nodes: thin wrappers around `chroma_core`. Each file ends in the list of the nodes it brings."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import bridge, dataset, host, loaders, lora, request_routes, routes, sampling, settings, text, training


class ChromaKitExtension(ComfyExtension):
    """What the host loads: the routes, then the nodes."""

    async def on_load(self) -> None:
        routes.register(host.server_routes())
        request_routes.register(host.server_routes())

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            node for room in (loaders, text, sampling, bridge, lora, dataset, settings, training) for node in room.NODES
        ]
