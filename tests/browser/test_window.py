"""The example workflows in the host's own page."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from PIL import Image

from _workflows import FOLDER, load_api

WORKFLOWS = sorted(FOLDER.glob("*.json"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_loads_and_means_what_its_api_form_says(window, path: Path):
    window.load(json.loads(path.read_text(encoding="utf-8")))
    picture = window.screenshot(path.stem)
    assert window.missing_nodes() == []
    assert window.ours == []
    wanted = {key: (node["class_type"], node["inputs"]) for key, node in load_api(path.stem).items()}
    assert {key: (node["class_type"], node["inputs"]) for key, node in window.prompt().items()} == wanted
    with Image.open(picture) as image:
        assert image.size == (1600, 1000)


def test_a_workflow_shows_in_the_newer_node_renderer_too(window):
    """Nodes as Vue components instead of a canvas; the setting is put back."""
    switch = "on => window.app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)"
    before = window.page.evaluate("() => window.app.extensionManager.setting.get('Comfy.VueNodes.Enabled')")
    window.page.evaluate(switch, True)
    try:
        path = FOLDER / "chroma_2_first_lora.json"
        window.load(json.loads(path.read_text(encoding="utf-8")))
        window.page.wait_for_selector("[data-node-id]", timeout=30_000)
        window.screenshot("vue_nodes")
        assert window.missing_nodes() == [] and window.ours == []
        wanted = {key: node["inputs"] for key, node in load_api(path.stem).items()}
        assert {key: node["inputs"] for key, node in window.prompt().items()} == wanted
    finally:
        window.page.evaluate(switch, before)


def test_every_node_of_the_pack_is_in_the_page(window):
    from _host import pack_node_ids

    known = window.page.evaluate("() => Object.keys(window.LiteGraph.registered_node_types)")
    assert not set(pack_node_ids()) - set(known)


def test_a_queue_from_the_page_runs_green(window):
    window.load(json.loads((FOLDER / "chroma_1_first_picture.json").read_text(encoding="utf-8")))
    before = set(window.server.get("/history"))
    window.page.evaluate("async () => { await window.app.queuePrompt(0, 1) }")
    deadline = time.monotonic() + 120
    while not (new := set(window.server.get("/history")) - before):
        assert time.monotonic() < deadline, window.server.log_tail()
        window.page.wait_for_timeout(200)
    (prompt_id,) = new
    entry = window.server.wait(prompt_id)
    assert len(window.server.images(entry)) == 1
    window.page.wait_for_timeout(1000)
    window.screenshot("queued")
    assert window.ours == []
