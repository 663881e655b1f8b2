"""ChromaKit for ComfyUI. The host imports this file; everything else is imported when it asks for the nodes."""

import logging

from .chroma_core.comfy import old_host

try:
    from comfyui_version import __version__ as _version
except ImportError:  # a ComfyUI of before it said so
    _version = None

if _complaint := old_host.complaint(_version):
    logging.getLogger("chromakit").error("%s", _complaint)
    NODE_CLASS_MAPPINGS = {old_host.NODE_ID: old_host.placeholder(_complaint)}
    NODE_DISPLAY_NAME_MAPPINGS = {old_host.NODE_ID: _complaint}
    __all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
else:
    WEB_DIRECTORY = "./web"

    async def comfy_entrypoint():
        """The extension that brings the nodes and routes."""
        from .nodes import ChromaKitExtension

        return ChromaKitExtension()

    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
