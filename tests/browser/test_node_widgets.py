"""The live panels of the nodes in the host's own page, under both node renderers and both themes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import waiting
from _host import Host
from _workflows import load_window
from tools.page import drawn
from training_page import pause

BUILD = """async () => {
    const graph = window.app.graph;
    graph.clear();
    // The page remembers the values of widgets by the ids of their nodes: these have never been used.
    graph.last_node_id = window.idsOfTests = (window.idsOfTests ?? 1000) + 100;
    await new Promise(done => setTimeout(done, 100));
    const add = (type, x, y = 40) => {
        const node = window.LiteGraph.createNode(type);
        node.pos = [x, y];
        graph.add(node);
        return node;
    };
    add('ChromaLoadModel', 20);
    add('ChromaDataset', 400);
    add('ChromaTailSigmas', 780);
    add('ChromaTrainingSettings', 1160);
    add('ChromaTrainLora', 1540);
    Object.assign(window.app.canvas.ds, { scale: 0.66, offset: [90, 60] });
    window.app.canvas.setDirty(true, true);
}"""
FIND = "const of = type => window.app.graph._nodes.find(node => node.comfyClass === type);"
SET = f"""([type, values]) => {{
    {FIND}
    for (const [name, value] of Object.entries(values)) {{
        const widget = of(type).widgets.find(each => each.name === name);
        widget.value = value;
        widget.callback?.(value);
    }}
}}"""
LINK = f"""([from, output, to, input]) => {{
    {FIND}
    const node = of(to);
    of(from).connect(output, node, node.inputs.findIndex(each => each.name === input));
}}"""
CHANGED = "() => { window.app.extensionManager.workflow.activeWorkflow?.changeTracker?.captureCanvasState?.() }"


class Panels:
    """The page with one node of each kind that has a panel."""

    def __init__(self, window: Any, renderer: str):
        self.window, self.page, self.renderer = window, window.page, renderer

    def set(self, node: str, **values: Any) -> None:
        self.page.evaluate(SET, [node, values])

    def link(self, source: str, output: int, target: str, name: str) -> None:
        self.page.evaluate(LINK, [source, output, target, name])

    def of(self, name: str):
        return self.page.locator(f'.ck-live[data-panel="{name}"]')

    def shows(self, name: str, wanted: str | Callable[[str], bool]) -> str:
        """The panel's text as soon as it matches."""
        matches = wanted if callable(wanted) else lambda text: re.search(wanted, text) is not None
        shown = self.of(name)
        return waiting.until(
            lambda: matches(text := shown.inner_text()) and text,
            f"{wanted!r} in {name}",
            pause=pause(self.page),
            report=lambda: f"it shows {shown.inner_text()!r}\n{self.window.errors[-3:]}",
        )

    def until(self, condition: Callable[[], Any], what: str) -> None:
        waiting.until(condition, what, pause=pause(self.page))

    def settled(self, script: str) -> Any:
        return waiting.settled(lambda: self.page.evaluate(script), pause(self.page))

    def drawn(self, name: str) -> str:
        """The points of the panel's first curve."""
        return self.of(name).locator(".ck-line").first.get_attribute("points") or ""


@pytest.fixture(params=["canvas", "vue"])
def panels(request: pytest.FixtureRequest, window: Any) -> Iterator[Panels]:
    window.set("Comfy.VueNodes.Enabled", request.param == "vue")
    window.page.evaluate(BUILD)
    found = Panels(window, request.param)
    found.set("ChromaDataset", folder="sks_emblem")
    found.set("ChromaLoadModel", flavour="base", precision="nf4")
    yield found
    assert window.ours == []


def test_every_panel_shows_its_node_in_both_themes(panels: Panels):
    panels.shows("plan", r"Needs [\d.]+ of [\d.]+ GiB: fits|fit")
    assert "1024 px (assumed)" in panels.shows("dataset", "16 images, 16 captions")
    panels.shows("sigmas", "25 steps at 1024×1024")
    panels.shows("density", "(?s)Trained noise levels.*Learning rate, if it were 1000 steps")
    tiles = panels.of("dataset").locator("img")
    assert tiles.count() == 12 and tiles.first.evaluate("image => image.complete && image.naturalWidth === 112")
    sheet = panels.of("dataset").locator("a.ck-tiles").get_attribute("href")
    assert panels.window.server.request("GET", sheet)[0] == 200
    for name in ("sigmas", "density"):
        box, plot = panels.of(name).bounding_box(), panels.of(name).locator("svg").first.bounding_box()
        assert box and plot and plot["height"] > 40 and plot["y"] + plot["height"] <= box["y"] + box["height"]
    for theme in ("dark", "light"):
        panels.window.set("Comfy.ColorPalette", theme)
        panels.window.screenshot(f"node_widgets_{panels.renderer}_{theme}")
    panels.window.set("Comfy.ColorPalette", "dark")


def test_panels_follow_the_widgets_and_say_what_is_wrong(panels: Panels):
    panels.shows("sigmas", "25 steps at")
    before = panels.drawn("sigmas")
    panels.set("ChromaTailSigmas", steps=8, width=512)
    panels.shows("sigmas", "8 steps at 512×1024")
    assert panels.drawn("sigmas") != before and panels.drawn("sigmas").count(",") == 9
    panels.set("ChromaTailSigmas", start_step=8)
    panels.shows("sigmas", "Steps 8 to 8 of 8 are none to run")
    panels.set("ChromaTailSigmas", start_step=0)
    panels.shows("sigmas", "8 steps at 512×1024")

    panels.shows("density", "Trained noise levels")
    before = panels.drawn("density")
    panels.set("ChromaTrainingSettings", sigma_shift="dynamic", lr_schedule="cosine")
    panels.shows("density", "Trained noise levels at 1024²")
    assert panels.drawn("density") != before
    panels.set("ChromaTrainingSettings", sigma_minimum=0.9, sigma_maximum=0.5)
    panels.shows("density", "Sigmas from 0.9 to 0.5: need")
    panels.window.screenshot(f"node_widgets_{panels.renderer}_errors")

    panels.set("ChromaDataset", folder="../x")
    panels.shows("dataset", "There is no dataset folder '../x'")
    panels.set("ChromaDataset", folder="sks_emblem", resolution=512)
    panels.shows("dataset", "(?s)at 512 px.*2 warnings: 16 smaller than the training resolution")
    panels.of("dataset").locator("summary").dispatch_event("click")
    panels.shows("dataset", "16 tiny")
    panels.window.screenshot(f"node_widgets_{panels.renderer}_warnings")

    panels.set("ChromaLoadModel", flavour="tiny")
    panels.shows("plan", r"Needs 0\.\d+ of [\d.]+ GiB: fits")
    panels.set("ChromaLoadModel", transformer="mine.safetensors")
    panels.shows("plan", "choose the flavour of your files")


def test_a_value_that_the_user_changes_on_the_node_is_followed(panels: Panels):
    panels.shows("sigmas", "25 steps at")
    if panels.renderer == "vue":
        row = panels.page.locator('[data-testid="node-widget"]', has_text=re.compile("^steps"))
        row.first.locator("button").last.click()
    else:  # the arrow on the right of the canvas's first widget
        x, y = panels.page.evaluate(
            f"""() => {{
                {FIND}
                const node = of('ChromaTailSigmas'), widget = node.widgets[0];
                const {{ scale, offset }} = window.app.canvas.ds;
                const box = window.app.canvas.canvas.getBoundingClientRect();
                const [x, y] = [node.pos[0] + node.size[0] - 22, node.pos[1] + widget.y + 10];
                return [box.left + (x + offset[0]) * scale, box.top + (y + offset[1]) * scale];
            }}"""
        )
        panels.page.mouse.click(x, y)
    panels.shows("sigmas", "26 steps at")


def test_the_data_set_is_looked_at_for_the_model_that_it_will_train(panels: Panels):
    panels.shows("dataset", "assumed")
    panels.set("ChromaLoadModel", flavour="tiny")
    panels.link("ChromaLoadModel", 0, "ChromaTrainLora", "model")
    panels.link("ChromaDataset", 0, "ChromaTrainLora", "dataset")
    panels.shows("dataset", "(?s)at 64 px.*64×64")
    panels.link("ChromaTrainingSettings", 0, "ChromaTrainLora", "settings")
    panels.set("ChromaTrainLora", steps=77)
    panels.page.evaluate(CHANGED)
    panels.shows("density", "Learning rate over 77 steps")


def test_a_size_that_is_linked_is_the_other_nodes(panels: Panels):
    page = panels.page
    page.evaluate(
        f"""() => {{
            {FIND}
            const node = window.LiteGraph.createNode('ChromaEmptyLatent');
            node.pos = [780, 700];
            window.app.graph.add(node);
            const tail = of('ChromaTailSigmas');
            for (const [i, side] of ['width', 'height'].entries())
                node.connect(i + 1, tail, tail.inputs.findIndex(each => each.name === side));
            for (const name of ['width', 'height']) node.widgets.find(each => each.name === name).value = 256;
        }}"""
    )
    page.evaluate(CHANGED)
    panels.shows("sigmas", "25 steps at 256×256")


def test_the_plan_opens_is_remembered_and_used(panels: Panels):
    page, plan = panels.page, panels.of("plan")
    panels.shows("plan", "Needs|fit")
    height = f"() => {{ {FIND} return of('ChromaLoadModel').size[1] }}"
    closed = page.evaluate(height)
    plan.locator("summary").dispatch_event("click")
    panels.shows("plan", "(?s)weights.*RAM.*best for")
    panels.until(lambda: page.evaluate(height) > closed + 100, "the node to grow")
    opened = panels.settled(height)
    panels.window.screenshot(f"node_widgets_{panels.renderer}_plan")
    chosen = plan.locator("tr[aria-current=true]")
    assert "nf4" in chosen.inner_text()
    plan.get_by_role("button", name="use").first.dispatch_event("click")
    panels.shows("plan", lambda _: chosen.count() == 1 and "nf4" not in chosen.inner_text())
    values = page.evaluate(f"() => {{ {FIND} return of('ChromaLoadModel').widgets.map(w => [w.name, w.value]) }}")
    precision, text_precision = dict(values)["precision"], dict(values)["text_precision"]
    assert chosen.inner_text().split()[:2] == [precision, text_precision]
    saved = page.evaluate("() => window.app.graph.serialize()")
    panels.window.load(saved)
    panels.shows("plan", "(?s)weights.*RAM.*best for")
    assert abs(panels.settled(height) - opened) <= 12, "a saved size has the open panel in it already"
    plan.locator("summary").dispatch_event("click")
    panels.until(lambda: page.evaluate(height) < opened - 100, "the node to shrink")
    assert "chromakit_plan" not in str(saved["nodes"]) and page.evaluate("() => window.app.graph.serialize()")


def test_values_are_read_with_the_pointer_and_the_keyboard(panels: Panels):
    panels.shows("sigmas", "25 steps at")
    plot = panels.of("sigmas").locator("svg")
    plot.focus()
    for key, words in (("ArrowRight", "step 0: σ 1.0000"), ("ArrowRight", "step 1: σ 0.99"), ("ArrowLeft", "step 0")):
        panels.page.keyboard.press(key)
        panels.shows("sigmas", words)
    box = plot.bounding_box()
    assert box
    panels.page.mouse.move(box["x"] + box["width"] - 3, box["y"] + box["height"] / 2)
    panels.shows("sigmas", "step 25: σ 0.0000")
    panels.page.mouse.move(5, 500)
    panels.shows("sigmas", "25 steps at")


def test_an_answer_that_was_overtaken_is_not_shown(panels: Panels):
    panels.shows("sigmas", "25 steps at")
    seen: list[str] = []

    def hold(route) -> None:
        answer = route.fetch()
        seen.append(route.request.post_data)
        panels.page.wait_for_timeout(900)
        route.fulfill(response=answer)

    panels.page.route("**/chromakit/sigmas", hold)
    try:
        panels.set("ChromaTailSigmas", steps=7)
        panels.page.wait_for_timeout(600)
        panels.set("ChromaTailSigmas", steps=9)
        text = panels.shows("sigmas", lambda text: "25 steps" not in text)
        assert "9 steps" in text
    finally:
        panels.page.unroute("**/chromakit/sigmas")
    assert len(seen) == 2


def test_a_setting_takes_the_panels_away(panels: Panels):
    panels.shows("sigmas", "25 steps at")
    try:
        panels.window.set("Chroma.Panels", False)
        names = ("plan", "dataset", "sigmas", "density")
        panels.until(lambda: not [name for name in names if panels.of(name).is_visible()], "the panels to go")
        panels.window.screenshot(f"node_widgets_{panels.renderer}_off")
    finally:
        panels.window.set("Chroma.Panels", True)
    panels.shows("sigmas", "25 steps at")
    assert panels.of("sigmas").is_visible()


def test_words_are_those_of_the_pages_language(panels: Panels):
    panels.shows("sigmas", "25 steps at")
    panels.page.evaluate(CHANGED)
    try:
        panels.window.set("Comfy.Locale", "zh")  # the page loads its graph anew
        panels.shows("sigmas", "25 步，1024×1024")
        panels.shows("plan", "GiB：放得下")
    finally:
        panels.window.set("Comfy.Locale", "en")
        panels.shows("sigmas", "25 steps at")


@pytest.mark.parametrize("renderer", ["canvas", "vue"])
def test_the_sampler_shows_what_it_paints_while_it_paints(window: Any, server: Host, renderer: str):
    """The host's own live preview, fed by our sampler."""
    page = window.page
    window.set("Comfy.VueNodes.Enabled", renderer == "vue")
    window.load(load_window("chroma_1_first_picture"))
    page.evaluate(SET, ["ChromaEmptyLatent", {"width": 512, "height": 512}])
    page.evaluate(SET, ["ChromaSampler", {"steps": 150, "seed": 7}])
    node = page.evaluate(f"() => {{ {FIND} return String(of('ChromaSampler').id) }}")
    page.evaluate("() => window.app.queuePrompt(0, 1)")
    try:
        seen = (
            f'() => document.querySelector(\'[data-node-id="{node}"] img[src^="blob:"]\')'
            if renderer == "vue"
            else f"() => {{ {FIND} return of('ChromaSampler').imgs?.[0]?.naturalWidth > 0 }}"
        )
        page.wait_for_function(seen)
        drawn(page)
        window.screenshot(f"sampler_preview_{renderer}")
    finally:
        server.post("/interrupt")
        waiting.until(lambda: not server.get("/prompt")["exec_info"]["queue_remaining"], "the interrupted prompt's end")
    assert window.ours == []


def test_the_setting_stands_under_chroma(window: Any):
    page = window.page
    page.evaluate("() => window.app.extensionManager.command.execute('Comfy.ShowSettingsDialog')")
    try:
        page.get_by_role("dialog").get_by_text("Chroma", exact=True).first.click()
        page.get_by_text("Show live panels on nodes").first.wait_for()
        window.screenshot("node_widgets_setting")
    finally:
        page.keyboard.press("Escape")
    assert window.ours == []
