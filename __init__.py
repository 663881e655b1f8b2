"""ChromaKit for ComfyUI. The host imports this file; everything else is imported when it asks for the nodes."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """The extension that brings the nodes and routes."""
    from .nodes import ChromaKitExtension

    return ChromaKitExtension()


__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
