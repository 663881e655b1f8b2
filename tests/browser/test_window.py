"""The example workflows in the host's own page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from _workflows import FOLDER, load_api
from tools.page import drawn
from training_page import RENDERER, until

WORKFLOWS = sorted(FOLDER.glob("*.json"))
OVERLAPS = """() => {
    const boxes = window.app.graph._nodes.map(node => ({ title: node.title, box: [...node.getBounding()] }));
    const meet = ([x, y, w, h], [u, v, s, t]) => x < u + s && u < x + w && y < v + t && v < y + h;
    return boxes.flatMap((a, i) => boxes.slice(i + 1).filter(b => meet(a.box, b.box)).map(b => [a.title, b.title]));
}"""


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_loads_and_means_what_its_api_form_says(window, path: Path):
    window.load(json.loads(path.read_text(encoding="utf-8")))
    screenshot = window.screenshot(path.stem)
    assert window.missing_nodes() == []
    assert window.ours == []
    wanted = {key: (node["class_type"], node["inputs"]) for key, node in load_api(path.stem).items()}
    assert {key: (node["class_type"], node["inputs"]) for key, node in window.prompt().items()} == wanted
    assert window.page.evaluate(OVERLAPS) == []
    with Image.open(screenshot) as image:
        assert image.size == (1600, 1000)


def test_templates_lists_what_is_there_with_an_image_each(window):
    """The host lists every JSON file of the folder, so an index of our own among them would be a broken template."""
    (listed,) = window.server.get("/workflow_templates").values()
    assert sorted(listed) == [path.stem for path in WORKFLOWS]
    for name in listed:
        status, body = window.server.request("GET", f"/api/workflow_templates/chromakit/{name}.jpg")
        assert status == 200 and body[:2] == b"\xff\xd8"


def test_a_preset_offers_the_download_of_its_models(window):
    """The page's own list of what is missing, with a button for each file."""
    from tools.workflows.presets import FILES

    setting = "on => window.app.extensionManager.setting.set('Comfy.Workflow.ShowMissingModelsWarning', on)"
    window.page.evaluate(setting, True)
    try:
        window.load(json.loads((FOLDER / "chroma_4_real_08gb.json").read_text(encoding="utf-8")))
        window.page.get_by_text("View details").click()
        window.page.get_by_test_id("missing-model-download-all").wait_for()
        window.screenshot("missing_models")
        shown = window.page.locator("body").inner_text()
        for file in FILES.values():
            assert file.name in shown and file.directory in shown
        assert window.page.get_by_role("button", name="Download", exact=False).count() >= len(FILES) + 1
        assert window.missing_nodes() == [] and window.ours == []
    finally:
        window.page.evaluate(setting, False)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_shows_in_the_newer_node_renderer_too(window, path: Path):
    """Nodes as Vue components instead of a canvas; the fixture puts the setting back."""
    window.page.evaluate(RENDERER, True)
    window.load(json.loads(path.read_text(encoding="utf-8")))
    window.page.wait_for_selector("[data-node-id]")
    window.screenshot(f"vue_{path.stem}")
    assert window.missing_nodes() == [] and window.ours == []
    wanted = {key: node["inputs"] for key, node in load_api(path.stem).items()}
    assert {key: node["inputs"] for key, node in window.prompt().items()} == wanted


def test_every_node_of_the_pack_is_in_the_page(window):
    from _host import pack_node_ids

    known = window.page.evaluate("() => Object.keys(window.LiteGraph.registered_node_types)")
    assert not set(pack_node_ids()) - set(known)


def test_a_queue_from_the_page_runs_green(window):
    window.load(json.loads((FOLDER / "chroma_1_first_picture.json").read_text(encoding="utf-8")))
    before = set(window.server.get("/history"))
    window.page.evaluate("async () => { await window.app.queuePrompt(0, 1) }")
    (prompt_id,) = until(
        window.page, window.server, lambda: set(window.server.get("/history")) - before, "the prompt in the history"
    )
    entry = window.server.wait(prompt_id)
    assert len(window.server.images(entry)) == 1
    drawn(window.page)
    window.screenshot("queued")
    assert window.ours == []


HALF = """async () => {
  const graph = window.app.graph, of = (type) => graph.nodes.find((node) => node.comfyClass === type);
  of("ChromaSampler").widgets.find((widget) => widget.name === "steps").value = 0;
  const show = window.LiteGraph.createNode("PreviewAny");
  graph.add(show);
  of("ChromaLoadModel").connect(3, show, 0);
  await window.app.queuePrompt(0, 1);
}"""
"""The sampler's branch is invalid, and a new one, which shows the memory plan, is not."""


def test_a_graph_that_runs_by_half_is_told(window):
    window.load(json.loads((FOLDER / "chroma_1_first_picture.json").read_text(encoding="utf-8")))
    window.page.evaluate(HALF)
    told = window.page.wait_for_selector("text=A part of this graph does not run")
    notice = told.evaluate("(each) => each.parentElement.innerText")
    assert "Chroma Sampler: " in notice and "min of 1" in notice, notice
    window.screenshot("half")
