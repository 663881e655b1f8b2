"""A training graph in the host's page, and waiting for what the page shows."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import ViewportSize

import waiting
from _host import Host
from prompts import ACTIVE
from waiting import PATIENCE

ENDLESS = 1_000_000
SIZE: ViewportSize = {"width": 1280, "height": 800}
"""Of the page, in CSS pixels, where a test needs no other."""

BUILD = """async ([name, steps, prompt]) => {
    const graph = window.app.graph;
    graph.clear();
    window.app.canvas.ds.reset();  // what lies outside of the view is hidden
    // Fresh ids: the page keeps what widgets of a name had on a node of an id, whatever kind of node it was.
    window.idsTaken = (window.idsTaken ?? 1000000) + 1000;
    graph.state.lastNodeId = window.idsTaken;
    await new Promise(done => setTimeout(done, 100));
    const add = (type, x) => {
        const node = window.LiteGraph.createNode(type);
        node.pos = [x, 60];
        graph.add(node);
        return node;
    };
    const load = add('ChromaLoadModel', 40), dataset = add('ChromaDataset', 440), train = add('ChromaTrainLora', 840);
    const slot = key => train.inputs.findIndex(input => input.name === key);
    load.connect(0, train, slot('model'));
    load.connect(1, train, slot('text_encoder'));
    dataset.connect(0, train, slot('dataset'));
    dataset.connect(0, train, slot('validation_dataset'));
    const set = (node, key, value) => { node.widgets.find(widget => widget.name === key).value = value };
    set(load, 'precision', 'fp32');
    set(load, 'text_precision', 'fp32');
    set(dataset, 'folder', 'sks_emblem');
    set(dataset, 'trigger', 'sks');
    set(train, 'name', name);
    set(train, 'steps', steps);
    set(train, 'preview_prompt', prompt);
    return graph.serialize();
}"""

RENDERER = "on => window.app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)"
THEME = "name => window.app.extensionManager.setting.set('Comfy.ColorPalette', name)"


SLOW = """([part, there, back]) => {
    const fetch = window.fastFetch ??= window.fetch;
    window.fetch = async (...asked) => {
        if (!String(asked[0]).includes(part)) return fetch(...asked);
        await new Promise(resolve => setTimeout(resolve, there));
        const answer = await fetch(...asked);
        await new Promise(resolve => setTimeout(resolve, back));
        return answer;
    };
}"""
AXE = Path(__file__).resolve().parents[2] / "node_modules" / "axe-core" / "axe.min.js"
SERIOUS = """async () => {
    const { violations } = await axe.run('.ck-room', { resultTypes: ['violations'] });
    const grave = violations.filter(each => ['serious', 'critical'].includes(each.impact));
    return grave.map(each => `${each.id}: ${each.nodes.map(node => node.html).join(' ')}`);
}"""


def grave(page: Any) -> list[str]:
    """What axe-core finds serious or critical in the training room as it is shown."""
    page.evaluate(f"() => {{ if (!window.axe) {{ {AXE.read_text(encoding='utf-8')} }} }}")
    return page.evaluate(SERIOUS)


def slow(page: Any, part: str, there: int, back: int) -> None:
    """What the page asks for at addresses with this part takes so many milliseconds to reach the host, and back."""
    page.evaluate(SLOW, [part, there, back])


def fast(page: Any) -> None:
    """As it was before `slow`; what is on its way stays late."""
    page.evaluate("() => { window.fetch = window.fastFetch; }")


@contextmanager
def losing_the_first(page: Any, *addresses: str) -> Iterator[None]:
    """The first request to an address that has each of these expressions in it does not arrive."""
    left = list(addresses)

    def lose(route: Any) -> None:
        found = next((each for each in left if re.search(each, route.request.url)), None)
        if found is None:
            return route.continue_()
        left.remove(found)
        route.abort()

    wanted = re.compile("|".join(addresses))
    page.route(wanted, lose)
    try:
        yield
    finally:
        page.unroute(wanted)
    assert left == [], "they were not asked for"


def build(page: Any, name: str, steps: int = ENDLESS, prompt: str = "") -> dict[str, Any]:
    """Put a graph that trains on the bundled images into the page; returns it as it would be saved."""
    return page.evaluate(BUILD, [name, steps, prompt])


def start(page: Any, server: Host, name: str, steps: int = ENDLESS, prompt: str = "") -> str:
    """Build the graph, press Run, and return the job's id as soon as the host has it."""
    build(page, name, steps, prompt)
    page.evaluate("() => window.app.queuePrompt(0, 1)")
    found: list[str] = []

    def there() -> bool:
        found[:] = [job["id"] for job in server.get("/chromakit/jobs?brief=true") if job["name"] == name]
        return bool(found)

    until(page, server, there, "the job")
    return found[0]


def until(page: Any, server: Host, condition: Callable[[], Any], what: str, seconds: float = PATIENCE) -> Any:
    """`waiting.until` with the page alive: its scripts run and its requests are answered meanwhile."""
    return waiting.until(condition, what, seconds, pause(page), 0.1, server.log_tail)


def pause(page: Any) -> Callable[[float], None]:
    """How to let seconds pass with the page alive."""
    return lambda seconds: page.wait_for_timeout(1000 * seconds)


def stop_all(server: Host) -> None:
    """End what still trains, and wait until it has."""
    for job in server.get("/chromakit/jobs?brief=true"):
        if job["state"] in ACTIVE:
            server.post(f"/chromakit/jobs/{job['id']}/stop")

    def over() -> bool:
        return all(job["state"] not in ACTIVE for job in server.get("/chromakit/jobs?brief=true"))

    waiting.until(over, "the end of all jobs", report=server.log_tail)
