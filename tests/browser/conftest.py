"""A real Chromium on the page of the real host."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from _host import Host
from tools.page import FLAGS, drawn, ready
from waiting import PATIENCE

ROOT = Path(__file__).resolve().parents[2]
OURS = "/extensions/chromakit/"
SETTINGS = {
    "Comfy.TutorialCompleted": True,  # the newcomer's tour would lie over the page
    "Comfy.Workflow.ShowMissingModelsWarning": False,
}


@dataclass
class Window:
    """The host's page in Chromium, and what went wrong on it; `ours` are the errors that name one of our files."""

    page: Page
    server: Host
    errors: list[str] = field(default_factory=list)

    @property
    def ours(self) -> list[str]:
        return [error for error in self.errors if OURS in error]

    def load(self, graph: dict[str, Any]) -> None:
        """Open a workflow, as dropping its file on the page does."""
        self.page.evaluate("async graph => { await window.app.loadGraphData(graph) }", graph)
        drawn(self.page)

    def set(self, name: str, value: Any) -> None:
        """Change one of the host's settings."""
        self.page.evaluate("([name, value]) => window.app.extensionManager.setting.set(name, value)", [name, value])
        drawn(self.page)

    def missing_nodes(self) -> list[str]:
        """Types of nodes in the open graph that the page does not know."""
        return self.page.evaluate(
            "() => window.app.graph._nodes.map(n => n.type).filter(t => !window.LiteGraph.registered_node_types[t])"
        )

    def prompt(self) -> dict[str, Any]:
        """The API form that the page makes of the open graph."""
        return self.page.evaluate("async () => (await window.app.graphToPrompt()).output")

    def screenshot(self, name: str) -> Path:
        path = ROOT / "test-output" / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        self.page.screenshot(path=path)
        return path


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    binary = os.environ.get("CHROMIUM_PATH") or "/usr/bin/chromium"
    if not Path(binary).exists():
        pytest.fail("There is no Chromium: install it, or name it in CHROMIUM_PATH.")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=binary, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def session_window(chromium: Browser, server: Host) -> Iterator[Window]:
    server.post("/api/settings", SETTINGS)
    context = chromium.new_context(viewport={"width": 1600, "height": 1000})
    context.set_default_timeout(1000 * PATIENCE)
    context.route(lambda url: not url.startswith((server.url, "data:", "blob:")), lambda route: route.abort())
    page = context.new_page()
    window = Window(page, server)
    page.on("pageerror", lambda error: window.errors.append(f"{error.message}\n{error.stack}"))
    page.on(
        "console",
        lambda message: (
            message.type == "error" and window.errors.append(f"{message.text} ({message.location.get('url', '')})")
        ),
    )
    page.goto(server.url)
    ready(page)
    yield window
    context.close()


@pytest.fixture
def window(session_window: Window) -> Window:
    """The page as a test finds it: nothing lies over it, nodes on the canvas, errors of earlier tests forgotten."""
    session_window.page.keyboard.press("Escape")
    session_window.page.evaluate(
        """async () => {
            window.app.extensionManager.toast.removeAll();
            await window.app.extensionManager.setting.set('Comfy.VueNodes.Enabled', false);
        }"""
    )
    start = getattr(session_window, "start_errors", None)
    if start is None:
        start = list(session_window.errors)
        session_window.start_errors = start  # type: ignore[attr-defined]
    session_window.errors[:] = start
    return session_window
