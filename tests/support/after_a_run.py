"""The nodes of the open workflow as they are when a prompt has run, without running it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from PIL import Image

import waiting
from _host import Host
from tools.workflows.look import PLACES
from training_page import pause

SHOWN = {"filename": "as_after_a_run.png", "subfolder": "", "type": "output"}
REPORT = (
    "sks.safetensors (universal, 67 layers) → sks-kohya.safetensors (kohya). q, k, v (and the single blocks' MLP "
    "input) are fused, of rank 48; nothing is lost. 24 modules, rank 16 to 48, float32."
)
OUTPUTS = {
    **dict.fromkeys(("SaveImage", "PreviewImage"), {"images": [SHOWN]}),
    **dict.fromkeys(("PreviewAny", "ChromaConvertLora"), {"text": [REPORT]}),
    **dict.fromkeys(
        ("ChromaInspectLora", "ChromaParity", "ChromaDataset", "ChromaDatasetFromImages"),
        {"images": [SHOWN], "text": [REPORT]},
    ),
    "ChromaTrainingStatus": {"images": [SHOWN, SHOWN], "text": [REPORT]},
}
"""What nodes send when a prompt has run them."""
FINISHED = """outputs => {
    const told = ['ChromaConvertLora', 'ChromaInspectLora'], { api, graph } = window.app;
    for (const { id, type } of graph._nodes.filter(node => node.type in outputs)) {
        const node = String(id), output = outputs[type];
        api.dispatchCustomEvent('executed', { node, display_node: node, prompt_id: 'as after a run', output });
        if (told.includes(type)) api.dispatchCustomEvent('progress_text', { nodeId: node, text: output.text[0] });
    }
}"""
"""The page's own events of a prompt that has run; the two tell on the node what they found."""
CAME = """types => {
    const { canvas, graph } = window.app;
    canvas.setDirty(true, true);  // the classic renderer fetches an image when it draws the node
    return graph._nodes.filter(node => types.includes(node.type) && !node.flags.collapsed).every(node => {
        const element = document.querySelector(`[data-node-id="${node.id}"]`);
        if (element) return [...element.querySelectorAll('img')].some(image => image.naturalWidth);
        return node.imgs?.length || !canvas.visible_nodes.includes(node);
    });
}"""
"""Whether the nodes in sight show their images."""


@contextmanager
def image_to_show(server: Host) -> Iterator[None]:
    """An image that nodes may show as theirs, as long as this lasts."""
    image = server.base / "output" / SHOWN["filename"]
    Image.new("RGB", (512, 512), "teal").save(image)
    try:
        yield
    finally:
        image.unlink()


def as_after_a_run(page: Any) -> None:
    """Bring the open workflow's nodes to the state after a run; returns when their sizes stay."""
    page.evaluate(FINISHED, OUTPUTS)
    page.wait_for_function(CAME, arg=[node for node, output in OUTPUTS.items() if "images" in output])
    waiting.settled(lambda: page.evaluate(PLACES), pause(page), times=3)
