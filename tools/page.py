"""The host's own page in a Chromium, without what would lie over the nodes, and ready when its nodes are known."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from _host import Host

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--no-first-run",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # no network, without a look at each request
]
READY = """() => Object.keys(window.LiteGraph?.registered_node_types ?? {}).length > 100
    && window.app?.extensionManager?.workflow?.activeWorkflow"""
"""Every node is known, and the graph that the page begins with is open."""
FRAMES = "async () => { for (let i = 0; i < 3; i++) await new Promise(done => requestAnimationFrame(done)) }"
BARE = {
    "Comfy.TutorialCompleted": True,  # the newcomer's tour would lie over the page
    "Comfy.Workflow.ShowMissingModelsWarning": False,
    "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasMenu": False,
    "Comfy.Graph.CanvasInfo": False,
    "Comfy.LinkRenderMode": -1,  # hidden
    "Comfy.NodeBadge.NodeSourceBadgeMode": "None",
    "Comfy.Execution.PreviewMethod": "latent2rgb",
}
"""The host's settings for images of single nodes."""


@contextmanager
def open_page(host: Host, width: int, height: int, scale: float = 1.0, **settings: Any) -> Iterator[Any]:
    """A Playwright page of the host, `width` × `height` CSS pixels of `scale` device pixels; nothing else is loaded.

    Raises SystemExit when there is no Chromium.
    """
    from playwright.sync_api import sync_playwright

    binary = os.environ.get("CHROMIUM_PATH") or "/usr/bin/chromium"
    if not Path(binary).exists():
        raise SystemExit("error: there is no Chromium. Install it, or name it in the variable CHROMIUM_PATH.")
    host.post("/api/settings", BARE | settings)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=binary, args=FLAGS)
        context = browser.new_context(viewport={"width": width, "height": height}, device_scale_factor=scale)
        page = context.new_page()
        page.set_default_timeout(120_000)
        page.goto(host.url)
        ready(page)
        yield page
        browser.close()


def ready(page: Any) -> None:
    """Wait until the host's page, opened or loaded anew, is as a user meets it."""
    page.wait_for_function(READY)
    drawn(page)


def drawn(page: Any) -> None:
    """Wait until what has changed is on the page."""
    page.evaluate(FRAMES)
