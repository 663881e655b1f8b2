"""The panel on Chroma Train LoRA, in the host's own page, under both node renderers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from _host import Host
from training_page import ENDLESS, RENDERER, build, stop_all, until

PANEL = ".chromakit-train"


def wait_for(window, text: str) -> str:
    """The panel's text as soon as it contains `text`."""
    panel = window.page.locator(PANEL).first
    return until(
        window.page, window.server, lambda: text in (shown := panel.inner_text()) and shown, f"{text!r} in the panel"
    )


def press(window, label: str) -> None:
    window.page.locator(PANEL).first.get_by_role("button", name=label, exact=True).dispatch_event("click")


@contextmanager
def late_answers(window, action: str) -> Iterator[None]:
    """The host's answers to that action reach the page after the broadcasts that followed them."""

    def hold(route) -> None:
        answer = route.fetch()
        window.page.wait_for_timeout(1500)
        route.fulfill(response=answer)

    pattern = f"**/chromakit/jobs/*/{action}"
    window.page.route(pattern, hold)
    try:
        yield
    finally:
        window.page.unroute(pattern)


@pytest.fixture(autouse=True)
def nothing_left_training(server: Host):
    yield
    stop_all(server)


@pytest.mark.parametrize("renderer", ["canvas", "vue"])
def test_a_job_is_watched_paused_and_stopped_from_the_node(window, renderer: str):
    page = window.page
    page.evaluate(RENDERER, renderer == "vue")
    graph = build(page, f"from the page, {renderer}")
    wait_for(window, "no job yet")
    page.evaluate("() => window.app.queuePrompt(0, 1)")
    wait_for(window, "running")
    again = page.evaluate("async () => (await window.app.graphToPrompt()).output")
    (seed,) = [node["inputs"]["seed"] for node in again.values() if node["class_type"] == "ChromaTrainLora"]
    assert seed == 42, "a queue does not change the job that the next queue asks for"
    assert f"/ {ENDLESS}" in wait_for(window, "loss")
    window.screenshot(f"train_widget_{renderer}")
    with late_answers(window, "pause"), window.page.expect_response("**/pause"):
        press(window, "Pause")
    wait_for(window, "paused")
    press(window, "Resume")
    wait_for(window, "running")

    saved = page.evaluate("() => window.app.graph.serialize()")
    window.load(graph)
    wait_for(window, "no job yet")
    window.load(saved)  # as after a reload of the page: the node remembers its job and asks for it
    wait_for(window, "running")
    press(window, "Stop")
    assert ".safetensors" in wait_for(window, "stopped")
    assert window.ours == []
