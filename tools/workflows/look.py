"""Looks at the example workflows in the page of a real ComfyUI, in both node renderers, as they open and after a run.

python -m tools.workflows.look                        all of them, as they open
python -m tools.workflows.look NAME ... --run         these, also after a run (training: a few steps); what uses
                                                      the LoRA of chroma_2_first_lora after that one

Says which nodes lie on one another, and whether names can be read in a window of 1280 × 720; exit status 1 if anything
is wrong. Screenshots go to test-output/ (ignored by git): look at them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from itertools import combinations
from pathlib import Path
from typing import Any

from _environment import ROOT, ensure_environment, say
from _host import start_host
from _workflows import load_window, window_files

from ..page import open_page
from .build import READABLE

WINDOW = 1280, 720
LOAD = """async graph => {
  await app.loadGraphData(graph);
  await new Promise(done => setTimeout(done, 2500));  // panels are drawn, and what they show has come
}"""
RUN = """async () => {
  const set = (type, values) => app.graph._nodes.filter(node => node.type === type).forEach(node =>
    Object.entries(values).forEach(([name, value]) => {
      const widget = node.widgets.find(each => each.name === name);
      widget.value = value;
      widget.callback?.(value);
    }));
  set('ChromaTrainLora', { steps: 12, preview_every: 6 });
  const ends = ['execution_success', 'execution_error', 'execution_interrupted'];
  const end = new Promise(done => {
    ends.forEach(each => app.api.addEventListener(each, () => done(each), { once: true }));
  });
  await app.queuePrompt(0, 1);
  const how = await end;
  await new Promise(done => setTimeout(done, 3000));  // images have come
  return how;
}"""
PLACES = """() => app.graph._nodes.map(node => {
  const element = document.querySelector(`[data-node-id="${node.id}"]`);
  if (!element) return [node.title, ...node.boundingRect];
  const [left, top] = node.pos;
  return [node.title, left, top - LiteGraph.NODE_TITLE_HEIGHT, element.offsetWidth, element.offsetHeight];
})"""

Place = tuple[str, float, float, float, float]
"""A node's title, and its left, top, width and height in pixels of the canvas, title included."""


def overlaps(places: list[Place]) -> list[str]:
    """Pairs of nodes that lie on one another."""
    found = []
    for (one, x, y, w, h), (other, left, top, width, height) in combinations(places, 2):
        if x < left + width and left < x + w and y < top + height and top < y + h:
            found.append(f"{one} lies on {other}")
    return found


def lying(page: Any) -> list[str]:
    """Pairs of nodes of the open workflow that lie on one another."""
    return overlaps([tuple(place) for place in page.evaluate(PLACES)])


def look(page: Any, name: str, moment: str, shot: Path) -> list[str]:
    """What is wrong with the open workflow now."""
    wrong = lying(page)
    scale = page.evaluate("() => app.canvas.ds.scale")
    if scale < READABLE:
        wrong.append(f"opens at {scale:.0%}, where no text is written")
    page.screenshot(path=shot)
    say(f"{name}, {moment}: {'; '.join(wrong) or f'right, at {scale:.0%}'}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = list(window_files())
    parser.add_argument("names", nargs="*", choices=[[], *known], metavar="NAME", help="workflows; none: all")
    parser.add_argument("--run", action="store_true", help="also after a run")
    arguments = parser.parse_args()
    ensure_environment()
    output = ROOT / "test-output"
    output.mkdir(exist_ok=True)
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as base, start_host(Path(base)) as host:
        for renderer in ("canvas", "vue"):
            with open_page(host, *WINDOW, **{"Comfy.VueNodes.Enabled": renderer == "vue"}) as page:
                for name in arguments.names or known:
                    page.evaluate(LOAD, load_window(name))
                    wrong += look(page, name, f"{renderer}, new", output / f"{name}_{renderer}.png")
                    if arguments.run:
                        how = page.evaluate(RUN)
                        wrong += [] if how == "execution_success" else [how]
                        wrong += look(page, name, f"{renderer}, after a run", output / f"{name}_{renderer}_run.png")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
