"""How the pack's nodes look when they are new, and after a run, in both renderers."""

from __future__ import annotations

from typing import Any

import pytest

import waiting
from _host import pack_node_ids
from prompts import text_to_image
from training_page import pause

HIGHEST = 680
"""Pixels of the highest new node: at 1280×720 all of it is seen at once."""
NEW = """async types => {
  const graph = window.app.graph;
  graph.clear();
  graph.last_node_id = window.idsOfTests = (window.idsOfTests ?? 1000) + 100;
  const nodes = types.map((type, i) => {
    const node = window.LiteGraph.createNode(type);
    node.pos = [i * 500, 40];
    graph.add(node);
    return node;
  });
  await new Promise(done => setTimeout(done, 800));
  const counts = widget => widget.serialize !== false && widget.name !== 'control_after_generate';
  const own = node => (node.widgets ?? []).filter(counts);
  const shown = node => own(node).filter(widget => node.isWidgetVisible(widget)).length;
  const found = nodes.map(node => [node.type, { shown: shown(node), all: own(node).length, height: node.size[1] }]);
  for (const node of nodes) node.showAdvanced = true;
  nodes.forEach((node, i) => { found[i][1].asked = shown(node); });
  return Object.fromEntries(found);
}"""
COLOURS = """() => ['CHROMA_MODEL', 'CHROMA_JOB', 'CHROMA_TRAINING'].map(type => [
  window.app.canvas.default_connection_color_byType[type], window.LiteGraph.LGraphCanvas.link_type_colors[type],
  getComputedStyle(document.documentElement).getPropertyValue(`--color-datatype-${type}`).trim(),
])"""
STATE = """() => window.app.graph._nodes.filter(node => /^Chroma(?!Sampler)/.test(node.type)).map(node => {
  const texts = (node.widgets ?? []).filter(widget => widget.type === 'progressText');
  return [node.type, Math.round(node.size[1]), texts.map(widget => widget.value)];
})"""
RUN = """async () => {
  const { api } = window.app;
  let told = 0;
  api.addEventListener('progress_text', () => { told++; });
  const end = new Promise(done => api.addEventListener('execution_success', done, { once: true }));
  await window.app.queuePrompt(0, 1);
  await end;
  await new Promise(done => setTimeout(done, 300));
  return told;
}"""


@pytest.fixture(params=["canvas", "vue"])
def rendered(request: pytest.FixtureRequest, window: Any) -> Any:
    window.set("Comfy.VueNodes.Enabled", request.param == "vue")
    return window


def test_a_new_node_is_small_shows_ten_widgets_and_all_when_asked(rendered: Any):
    found = rendered.page.evaluate(NEW, pack_node_ids())
    assert {name: node for name, node in found.items() if node["shown"] > 10} == {}
    assert {name: node for name, node in found.items() if node["height"] > HIGHEST} == {}
    assert {name: node for name, node in found.items() if node["asked"] != node["all"]} == {}
    assert found["ChromaTrainingSettings"]["all"] == 61 and found["ChromaDataset"]["shown"] == 6
    rendered.screenshot("new_nodes")
    assert rendered.ours == []


def test_our_sockets_have_colours_under_every_palette(window: Any):
    before = window.page.evaluate(COLOURS)
    assert len({tuple(each) for each in before}) == 3 and all(len(set(each)) == 1 and each[0] for each in before)
    for palette in ("light", "dark"):
        window.set("Comfy.ColorPalette", palette)
        assert window.page.evaluate(COLOURS) == before


def test_no_text_stays_on_nodes_after_a_run(rendered: Any, request: pytest.FixtureRequest):
    page = rendered.page
    graph = text_to_image(f"a red star, {request.node.callspec.id}", steps=1)
    page.evaluate("graph => window.app.loadApiJson(graph, 'looks')", graph)
    before = waiting.settled(lambda: page.evaluate(STATE), pause(page))
    assert page.evaluate(RUN) > 0
    assert page.evaluate(STATE) == before and not any(texts for _, _, texts in before)
    assert rendered.ours == []
