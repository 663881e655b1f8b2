"""A real Chromium on the page of the real host."""

from __future__ import annotations

import os
import re
from collections.abc import Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Error, Page, sync_playwright

from _host import Host
from tools.page import FLAGS, drawn, ready
from training_page import SIZE
from waiting import PATIENCE

ROOT = Path(__file__).resolve().parents[2]
OURS = "/extensions/chromakit/"
SETTINGS = {
    "Comfy.TutorialCompleted": True,  # the newcomer's tour would lie over the page
    "Comfy.Workflow.ShowMissingModelsWarning": False,
}
SELDOM = """(() => {
    const { requestAnimationFrame: ask, cancelAnimationFrame: cancel } = window, calls = new Map(), asked = new Map();
    let last = 0;
    const pass = () => {
        for (const [id, call] of calls) asked.set(id, ask(now => { asked.delete(id); call(now) }));
        calls.clear();
    };
    window.requestAnimationFrame = call => {
        if (!calls.size) setTimeout(pass, 60);
        calls.set(++last, call);
        return last;
    };
    window.cancelAnimationFrame = id => { calls.delete(id); cancel(asked.get(id)) };
    const still = new CSSStyleSheet();
    still.replaceSync(`[class*="animate-"], .p-skeleton::after { animation: none !important }
        [class*="transition-"], [class*="p-toast"] { transition: none !important }`);
    document.adoptedStyleSheets.push(still);
})()"""
"""Twelve frames a second, as on a busy machine, and nothing of ComfyUI's own pulses or slides: sixty a second take a
tenth of a core when nothing happens, and a third of one for a dot that pulses while a prompt runs."""


@dataclass
class Window:
    """The host's page in Chromium, and what went wrong on it; `ours` are the errors that name one of our files.

    stale: the page shows what is no longer so, and is loaded anew before the next test.
    """

    page: Page
    server: Host
    errors: list[str] = field(default_factory=list)
    stale: bool = False

    @property
    def ours(self) -> list[str]:
        return [error for error in self.errors if OURS in error]

    def load(self, graph: dict[str, Any]) -> None:
        """Open a workflow, as dropping its file on the page does."""
        self.page.evaluate("async graph => { await window.app.loadGraphData(graph) }", graph)
        drawn(self.page)

    def reload(self) -> None:
        """As a user does; the page asks for the languages and for the nodes when it starts."""
        self.page.reload()
        ready(self.page)
        self.stale = False

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
        path = ROOT / "test-output" / f"{name}.jpg"
        path.parent.mkdir(exist_ok=True)
        self.page.screenshot(path=path, quality=80)
        return path


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Of a test that fails, how the page was then."""
    report = yield
    window = getattr(item, "funcargs", {}).get("window")
    if report.failed and window is not None:
        report.sections.append(("Errors of the page", "\n".join(window.errors)))
        with suppress(Error):
            window.screenshot(re.sub(r"\W+", "_", f"failed_{item.name}"))
    return report


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
    context = chromium.new_context(viewport=SIZE)
    context.set_default_timeout(1000 * PATIENCE)
    context.add_init_script(SELDOM)
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
    if session_window.stale:
        session_window.reload()
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
