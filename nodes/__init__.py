"""The nodes: thin wrappers around `chroma_core`. Each file ends in the list of the nodes it brings."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import bridge, combined, dataset, dataset_images, host, loaders, lora, routes, sampling, settings, text, training


class ChromaKitExtension(ComfyExtension):
    """What the host loads: the routes, then the nodes."""

    async def on_load(self) -> None:
        routes.register(host.server_routes())

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        data = (dataset, dataset_images, combined)
        return [
            node for room in (loaders, text, sampling, bridge, lora, *data, settings, training) for node in room.NODES
        ]
