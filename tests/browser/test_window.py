"""The example workflows in the host's own page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest

import waiting
from _host import Host
from _workflows import load_api, load_window, window_files
from after_a_run import as_after_a_run, image_to_show
from tools.page import drawn
from tools.workflows.build import READABLE
from tools.workflows.look import WINDOW, lying
from training_page import RENDERER, pause, until

WORKFLOWS = window_files()
FORMS = [name for name in WORKFLOWS if name.startswith(("chroma_1_", "chroma_2_", "chroma_3_", "chroma_4_real_08gb"))]
"""With an app form; the other presets' are the same (tests/core/test_layout.py looks at all)."""


@pytest.fixture(scope="module")
def small(session_window: Any, server: Host) -> Iterator[None]:
    """The window in which every workflow can be read, and an image that nodes may show as theirs."""
    before = session_window.page.viewport_size
    session_window.page.set_viewport_size({"width": WINDOW[0], "height": WINDOW[1]})
    with image_to_show(server):
        yield
    session_window.page.set_viewport_size(before)


def what_is_wrong(window: Any) -> list[str]:
    """Nodes on one another, and names too small to read, in the open workflow."""
    scale = window.page.evaluate("() => window.app.canvas.ds.scale")
    small = [f"opens at {scale:.0%}, where no text is written"] if scale < READABLE else []
    return lying(window.page) + small


def what_is_wrong_after_a_run(window: Any) -> list[str]:
    as_after_a_run(window.page)
    return what_is_wrong(window)


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_loads_and_means_what_its_api_form_says(window: Any, small: None, name: str):
    window.load(load_window(name))
    window.screenshot(name)
    assert window.missing_nodes() == []
    assert window.ours == []
    wanted = {key: (node["class_type"], node["inputs"]) for key, node in load_api(name).items()}
    assert {key: (node["class_type"], node["inputs"]) for key, node in window.prompt().items()} == wanted
    assert what_is_wrong(window) == []
    assert what_is_wrong_after_a_run(window) == []


def test_templates_lists_what_is_there_with_an_image_each(window):
    """The host lists every JSON file of the folder, so an index of our own among them would be a broken template."""
    (listed,) = window.server.get("/workflow_templates").values()
    assert sorted(listed) == sorted(path.stem for path in WORKFLOWS.values())
    for title in listed:
        status, body = window.server.request("GET", f"/api/workflow_templates/chromakit/{quote(title)}.jpg")
        assert status == 200 and body[:2] == b"\xff\xd8"


def test_a_preset_offers_the_download_of_its_models(window):
    """The page's own list of what is missing, with a button for each file."""
    from tools.workflows.presets import FILES

    setting = "on => window.app.extensionManager.setting.set('Comfy.Workflow.ShowMissingModelsWarning', on)"
    window.page.evaluate(setting, True)
    try:
        window.load(load_window("chroma_4_real_08gb"))
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


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_shows_in_the_newer_node_renderer_too(window: Any, small: None, name: str):
    """Nodes as Vue components instead of a canvas; the fixture puts the setting back."""
    window.page.evaluate(RENDERER, True)
    window.load(load_window(name))
    window.page.wait_for_selector("[data-node-id]")
    assert window.missing_nodes() == [] and window.ours == []
    wanted = {key: node["inputs"] for key, node in load_api(name).items()}
    assert {key: node["inputs"] for key, node in window.prompt().items()} == wanted
    assert what_is_wrong(window) == []
    assert what_is_wrong_after_a_run(window) == []
    window.screenshot(f"vue_{name}")


def test_an_app_form_shows_its_fields(window):
    """Each field of each form in its order, by the label that the workflow gives it, and then the run button."""
    page, toggle = window.page, "() => window.app.extensionManager.command.execute('Comfy.ToggleLinear')"
    found, wanted = {}, {}
    for name, graph in ((name, load_window(name)) for name in FORMS):
        slots = {(node["id"], slot["name"]): slot for node in graph["nodes"] for slot in node["inputs"]}
        fields = [slots[tuple(field)] for field in graph["extra"]["linearData"]["inputs"]]
        wanted[name] = [slot.get("label", slot["name"]) for slot in fields]
        window.load(graph)
        page.evaluate(toggle)
        page.get_by_test_id("linear-run-button").wait_for()
        labels = page.get_by_test_id("builder-widget-label")
        found[name] = waiting.settled(labels.all_inner_texts, pause(page), times=3)
        assert page.get_by_test_id("linear-widgets").get_by_test_id("node-widget").count() == len(fields), name
        window.screenshot(f"app_{name}")
        page.evaluate(toggle)
        page.get_by_test_id("linear-run-button").wait_for(state="detached")
    assert found == wanted and len(found) == 5 and window.ours == []


def test_every_node_of_the_pack_is_in_the_page(window):
    from _host import pack_node_ids

    known = window.page.evaluate("() => Object.keys(window.LiteGraph.registered_node_types)")
    assert not set(pack_node_ids()) - set(known)


def test_a_queue_from_the_page_runs_green(window):
    window.load(load_window("chroma_1_first_picture"))
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
    window.load(load_window("chroma_1_first_picture"))
    window.page.evaluate(HALF)
    told = window.page.wait_for_selector("text=A part of this graph does not run")
    notice = told.evaluate("(each) => each.parentElement.innerText")
    assert "Chroma Sampler: " in notice and "min of 1" in notice, notice
    window.screenshot("half")
