"""The words of the page: the node search box finds our nodes, and the page speaks the language that is set."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import waiting
from tools.locales.texts import FOLDER, escape, load, part
from tools.page import drawn
from training_page import pause

SHOWN = 20  # results that fit in the search box without scrolling far
NASTY = "50 % of {a} or {'b'} @:c | $d [e] <f>"
"""Without escapes it would be shown as something else: {a} as nothing, {'b'} as b, @:c as the text c, | as a choice."""

# What people type, and the nodes that must then be among the first results.
QUERIES = {
    "lora train": "ChromaTrainLora",
    "train lora": "ChromaTrainLora",
    "lora trainer": "ChromaTrainLora",
    "lora training": "ChromaTrainLora",
    "finetune": "ChromaTrainLora",
    "dreambooth": "ChromaTrainLora",
    "learning rate": "ChromaTrainLora",
    "resume training": "ChromaTrainLora",
    "load chroma": "ChromaLoadModel",
    "chroma loader": "ChromaLoadModel",
    "load checkpoint": "ChromaLoadModel",
    "load diffusion model": "ChromaLoadModel",
    "gguf": "ChromaLoadModel",
    "low vram": "ChromaLoadModel",
    "sigmas": "ChromaTailSigmas",
    "scheduler": "ChromaTailSigmas",
    "noise schedule": "ChromaTailSigmas",
    "apply lora": "ChromaApplyLora",
    "lora loader": "ChromaApplyLora",
    "dataset": "ChromaDataset",
    "captions": "ChromaDataset",
    "folder of images": "ChromaDataset",
    "train on images": "ChromaDatasetFromImages",
    "merge datasets": "ChromaCombineDatasets",
    "regularization": "ChromaCombineDatasets",
    "loss": "ChromaTrainingStatus",
    "loss graph": "ChromaTrainingStatus",
    "training progress": "ChromaTrainingStatus",
    "wait": "ChromaWaitForTraining",
    "best step": "ChromaUseStep",
    "empty latent": "ChromaEmptyLatent",
    "resolution": "ChromaEmptyLatent",
    "negative prompt": "ChromaTextEncode",
    "trigger word": "ChromaTextEncode",
    "ksampler": "ChromaSampler",
    "img2img": "ChromaSampler",
    "inpaint": "ChromaSampler",
    "text to image": "ChromaSampler",
    "optimizer": "ChromaTrainingSettings",
    "dora": "ChromaTrainingSettings",
    "convert lora": "ChromaConvertLora",
    "merge lora": "ChromaMergeLora",
    "bake lora": "ChromaMergeLora",
    "extract lora": "ChromaExtractLora",
    "kohya": "ChromaConvertLora",
    "lora info": "ChromaInspectLora",
    "compare": "ChromaParity",
    "guider": "ChromaHostModel",
    "load clip": "ChromaFromHost",
    "loss mask": "ChromaDatasetOptions",
    "sampler name": "ChromaSamplerOptions",
    "prodigy": "ChromaOptimizerSettings",
    "huber loss": "ChromaNoiseSettings",
    "preview size": "ChromaPreviewSettings",
    "overfitting": "ChromaSavingSettings",
    "lokr": "ChromaAdapterSettings",
    "less memory": "ChromaSpeedSettings",
}
ROOM = """() => import('/extensions/chromakit/js/room/room.js')
    .then(({ openRoom }) => openRoom({ step: 'images', folder: 'sks_emblem', size: 1024 }))"""
TITLES = {"lora 训练": "ChromaTrainLora", "加载模型": "ChromaLoadModel", "采样器": "ChromaSampler"}


def setting(window, name: str, value: Any = None) -> Any:
    """The value of one of the host's settings; sets it first if a value is given."""
    if value is not None:
        window.page.evaluate("([n, v]) => window.app.extensionManager.setting.set(n, v)", [name, value])
    return window.page.evaluate("n => window.app.extensionManager.setting.get(n)", name)


def one_node(window, node_id: str) -> None:
    """A graph of one new node, in sight."""
    window.page.evaluate(
        """id => {
            window.app.graph.clear()
            const node = window.LiteGraph.createNode(id)
            node.pos = [700, 150]
            window.app.graph.add(node)
            window.app.canvas.ds.scale = 1
            window.app.canvas.ds.offset = [0, 0]
            window.app.canvas.setDirty(true, true)
        }""",
        node_id,
    )
    window.page.mouse.move(20, 500)
    drawn(window.page)


def shown(window) -> dict[str, Any]:
    """The node's title, and the names that its slots and widgets show."""
    return window.page.evaluate(
        """() => {
            const node = window.app.graph._nodes[0]
            const slot = s => [s.name, s.label ?? s.localized_name ?? s.name]
            return {
                title: node.title,
                inputs: Object.fromEntries(node.inputs.map(slot)),
                widgets: Object.fromEntries(
                    node.widgets.filter(w => w.serialize !== false).map(w => [w.name, w.label ?? w.name])),
                outputs: node.outputs.map(o => slot(o)[1]),
            }
        }"""
    )


def hover(window, widget: str, label: str) -> str:
    """The tooltip that appears over a widget, in either renderer."""
    page = window.page
    if page.locator("[data-node-id]").count():
        page.locator("[data-node-id]").get_by_text(label, exact=True).first.hover()
        return page.wait_for_selector(".p-tooltip-text").inner_text()
    x, y = page.evaluate(
        """name => {
            const node = window.app.graph._nodes[0]
            const widget = node.widgets.find(w => w.name === name)
            const box = window.app.canvas.canvas.getBoundingClientRect()
            return [box.left + node.pos[0] + 60, box.top + node.pos[1] + widget.last_y + 10]
        }""",
        widget,
    )
    page.mouse.move(x - 5, y)
    page.mouse.move(x, y)
    tip = page.locator(".node-tooltip")
    tip.wait_for(state="visible")
    return tip.inner_text()


@pytest.fixture
def search(window) -> Iterator[Any]:
    """Types into the real search box; gives the titles of the first results as soon as the wanted one is among them."""
    page = window.page
    page.evaluate("() => window.app.graph.clear()")

    def titles(query: str, wanted: str) -> list[str]:
        box = page.locator("input[aria-controls=results-list]")
        shown = page.get_by_test_id("result-item")

        def opened() -> int:
            if not box.count():
                page.mouse.dblclick(700, 500)
            return box.count()

        def found() -> list[str] | None:
            titles = [text.split("\n")[0].strip() for text in shown.all_inner_texts()[:SHOWN]]
            return titles if wanted in titles else None

        waiting.until(opened, "the search box", pause=pause(page), interval=2)
        box.fill(query)
        return waiting.until(found, f"{wanted!r} for {query!r}", pause=pause(page), report=shown.all_inner_texts) or []

    yield titles
    page.keyboard.press("Escape")
    drawn(page)


def title(language: str, node_id: str) -> str:
    return load(FOLDER / language / "nodeDefs.json")[part(node_id)]["display_name"]


def test_the_search_box_finds_every_node_by_what_people_type(window, search):
    from _host import pack_node_ids

    assert set(QUERIES.values()) == set(pack_node_ids()), "each node has a query here"
    for query, node in QUERIES.items():
        search(query, title("en", node))
    trainer = title("en", "ChromaTrainLora")
    assert search("lora train", trainer).index(trainer) < 3
    window.screenshot("search_lora_train")


def test_in_english_the_names_are_those_of_the_api(window):
    one_node(window, "ChromaTrainLora")
    seen = shown(window)
    assert seen["title"] == "Chroma Train LoRA"
    assert all(label == name for name, label in [*seen["inputs"].items(), *seen["widgets"].items()])


def both_renderers(window) -> Iterator[str]:
    """Each of the page's two ways of drawing nodes; the setting is put back."""
    name = "Comfy.VueNodes.Enabled"
    before = setting(window, name)
    try:
        for renderer, value in (("canvas", False), ("vue", True)):
            setting(window, name, value)
            yield renderer
    finally:
        setting(window, name, before)


@pytest.fixture
def chinese(session_window) -> Iterator[None]:
    """Before `window`, which loads the page in that language."""
    before = setting(session_window, "Comfy.Locale")
    setting(session_window, "Comfy.Locale", "zh")
    session_window.stale = True
    yield
    setting(session_window, "Comfy.Locale", before)
    session_window.stale = True


def test_in_chinese_titles_names_tooltips_and_search_are_chinese(chinese, window, search):
    words = load(FOLDER / "zh" / "nodeDefs.json")["ChromaTailSigmas"]
    names = {name: slot["name"] for name, slot in words["inputs"].items()}
    name = "flow_shift_value"
    for renderer in both_renderers(window):
        one_node(window, "ChromaTailSigmas")
        seen = shown(window)
        assert seen["title"] == words["display_name"] == "Chroma 尾部偏置 Sigmas"
        assert seen["widgets"] == names and seen["inputs"] == names
        assert seen["outputs"] == [words["outputs"]["0"]["name"]]
        tip = hover(window, name, names[name])
        window.screenshot(f"words_zh_{renderer}")
        assert tip == words["inputs"][name]["tooltip"]
        assert "σ' = sσ / (1 + (s − 1)σ)" in tip
    window.page.evaluate("() => window.app.graph.clear()")  # the box opens where there is no node
    for query, node in {**TITLES, "lora train": "ChromaTrainLora"}.items():
        search(query, title("zh", node))
    window.screenshot("search_zh")
    window.page.keyboard.press("Escape")
    window.page.evaluate(ROOM)
    window.page.locator("[data-name='01.png'] .ck-trouble").get_by_text("很小：64×64").wait_for()
    window.page.locator(".ck-warnings summary").click()
    window.page.locator(".ck-warnings li", has_text="面积不到训练分辨率的四分之一").wait_for()
    window.screenshot("room_zh")
    window.page.keyboard.press("Escape")
    assert window.ours == []


@pytest.fixture
def nasty_texts(session_window) -> Iterator[None]:
    """The page gets texts full of special characters from the host, spelled as tools.locales.build spells them.

    Before `window`, which loads the page with them.
    """
    words = {
        "display_name": escape(NASTY),
        "inputs": {"steps": {"name": escape(f"steps {NASTY}"), "tooltip": NASTY}},
        "outputs": {"0": {"name": escape(NASTY)}},
    }
    answer = {"en": {"nodeDefs": {"ChromaTailSigmas": words}}}
    session_window.page.route("**/i18n", lambda route: route.fulfill(json=answer))
    session_window.stale = True
    yield
    session_window.page.unroute("**/i18n")
    session_window.stale = True


def test_special_characters_show_as_they_are(nasty_texts, window):
    """Names go through the page's message compiler and are escaped; tooltips do not, and are not."""
    for renderer in both_renderers(window):
        one_node(window, "ChromaTailSigmas")
        seen = shown(window)
        assert seen["title"] == NASTY and seen["widgets"]["steps"] == f"steps {NASTY}" and seen["outputs"] == [NASTY]
        assert hover(window, "steps", f"steps {NASTY}") == NASTY
        window.screenshot(f"words_special_{renderer}")
    assert window.ours == []
