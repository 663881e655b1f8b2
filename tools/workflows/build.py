"""Writes example_workflows/: each workflow once for the window (LiteGraph JSON) and once for the API, and the index.

Both forms come from the one list in `workflows` and from what the running host says about its nodes, so they
cannot drift apart; a host test checks that the files are current. The index is a README: the host takes every `*.json`
of the folder for a template, and reads an index of its own templates only. Usage:

    python -m tools.workflows.build            write the files
    python -m tools.workflows.build --check    say which would change; exit status 1 if any
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

from _environment import ensure_environment
from _host import start_host
from _workflows import FOLDER
from chroma_core.comfy.window import about, document, stored_node

from .parts import Link, Node, Workflow
from .presets import presets
from .training import FIRST_LORA, TRAINING_WORKFLOWS
from .using import FIRST_IMAGE, USE_LORA, USING_WORKFLOWS

SEED_NAMES = ("seed", "noise_seed")  # the page gives these a second widget unless the node says otherwise
WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COLOR"}
# The page opens a graph at three quarters of the window and writes no text below 57 % of full size: a workflow more
# than 1680 pixels wide or 945 high opens as empty boxes in a window of 1280 × 720.
READABLE = 0.57
"""Of full size: below it the page writes no text."""
COLUMN_GAP, ROW_GAP, FOLDED_GAP, NODE_WIDTH, NOTE_WIDTH = 30, 40, 20, 232, 340
WIDEST = 1650  # pixels of the whole, note included
NOTE_LINE, NOTE_LETTER = 17, 6.5  # pixels of a line of text in a note, and of a letter in it
TITLE = 30
APP_MODE = (
    "*App mode*, the switch before *Graph* at the top left, shows the few fields that one changes, and the result."
)
HIGHEST = 900
"""Pixels that a column may take: more, and a window of 1280 × 720 opens the workflow too small to read."""
AFTER_RUN = {
    "ChromaConvertLora": 470,
    "ChromaLoadModel": 330,
    "ChromaDataset": 780,
    "ChromaDatasetFromImages": 720,
    "ChromaInspectLora": 520,
    "ChromaSampler": 590,
    "ChromaWaitForTraining": 400,
    "ChromaTrainLora": 660,
    "ChromaTrainingStatus": 420,
    "SaveImage": 380,
    "SamplerCustomAdvanced": 420,
}
"""Pixels of height, with the title, that a node takes in either renderer once panels and images are on it."""
INDEX = """# Example workflows

ComfyUI shows these under *Templates → chromakit*, by their file names; start with the numbered ones.
Each is here in the format of the window and, in `api/`, of `POST /prompt`. All but *Chroma on … GB* run at
once on `tiny`, which ships with the pack; their notes say what to change for the real Chroma. The numbered ones and
those for the real Chroma have an app form too, with the few fields that one changes: *App mode*, the switch
before *Graph* at the top left.

| | |
|---|---|
"""


def workflows() -> tuple[Workflow, ...]:
    """All of them, in the order of the index: a newcomer's first, then what else there is.

    ComfyUI lists templates by file name and knows no index of a pack's own, so the first ones carry their place in
    their names. A function, because the presets ask the pack itself, which needs torch.
    """
    return (FIRST_IMAGE, FIRST_LORA, USE_LORA, *presets(), *TRAINING_WORKFLOWS, *USING_WORKFLOWS)


def ordered_inputs(info: dict[str, Any]) -> dict[str, list]:
    """A node's inputs by name in the order in which the page lays them out: required, then optional."""
    return {
        name: info["input"][kind][name]
        for kind in ("required", "optional")
        for name in info["input_order"].get(kind, [])
    }


def is_widget(spec: list) -> bool:
    kind, options = spec[0], spec[1] if len(spec) > 1 else {}
    return (isinstance(kind, list) or kind in WIDGET_TYPES) and not options.get("forceInput")


def default_of(spec: list) -> Any:
    """The value that a fresh widget shows."""
    kind, options = spec[0], spec[1] if len(spec) > 1 else {}
    if "default" in options:
        return options["default"]
    choices = kind if isinstance(kind, list) else options.get("options")
    if choices:
        return choices[0]
    return {"INT": 0, "FLOAT": 0.0, "BOOLEAN": False}.get(str(kind), "")


def api_form(workflow: Workflow, object_info: dict[str, Any]) -> dict[str, Any]:
    """The prompt as `POST /prompt` takes it: every widget with its value, every link as [node id, slot]."""
    prompt = {}
    for number, (key, node) in enumerate(workflow.nodes.items(), start=1):
        info = object_info[node.type]
        specs = ordered_inputs(info)
        if unknown := set(node.inputs) - set(specs):
            raise KeyError(f"{workflow.name}: {node.type} has no input {sorted(unknown)}; it has {sorted(specs)}")
        inputs: dict[str, Any] = {}
        for name, spec in specs.items():
            value = node.inputs.get(name)
            if isinstance(value, Link):
                inputs[name] = [str(workflow.number(value.node)), value.slot]
            elif value is not None:
                inputs[name] = value
            elif is_widget(spec):
                inputs[name] = default_of(spec)
            elif name in info["input"].get("required", {}):
                raise KeyError(f"{workflow.name}: {node.type} ({key}) needs a link into {name}")
        title = node.title or info["display_name"]
        prompt[str(number)] = {"class_type": node.type, "inputs": inputs, "_meta": {"title": title}}
    return prompt


def window_form(workflow: Workflow, object_info: dict[str, Any]) -> dict[str, Any]:
    """The graph as the page loads it, with the nodes laid out in columns."""
    prompt = api_form(workflow, object_info)
    links: list[list] = []
    nodes = [_window_node(workflow, key, node, object_info, prompt, links) for key, node in workflow.nodes.items()]
    _lay_out(workflow, nodes)
    width = max(node["pos"][0] + node["size"][0] for node in nodes)
    nodes.append(_note(workflow, len(nodes) + 1, max(NOTE_WIDTH, WIDEST - COLUMN_GAP - width)))
    outgoing: dict[tuple[int, int], list[int]] = {}
    for link_id, source, slot, *_ in links:
        outgoing.setdefault((source, slot), []).append(link_id)
    for node in nodes:
        for slot, output in enumerate(node["outputs"]):
            output["links"] = outgoing.get((node["id"], slot))
    extra = {"linearData": workflow.linear_data()} if workflow.form else {}
    return document(nodes, links) | {"extra": extra}


def _window_node(workflow: Workflow, key: str, node: Node, object_info: dict, prompt: dict, links: list[list]) -> dict:
    info, number = object_info[node.type], workflow.number(key)
    inputs, widget_values = [], []
    for name, spec in ordered_inputs(info).items():
        options = spec[1] if len(spec) > 1 else {}
        kind = "COMBO" if isinstance(spec[0], list) else spec[0]
        entry: dict[str, Any] = {"name": name, "type": kind, "link": None}
        value = node.inputs.get(name)
        if is_widget(spec):
            entry["widget"] = {"name": name}
            entry |= {"label": node.labels[name]} if name in node.labels else {}
            # A linked widget keeps a place in the list of values; the link decides what the prompt gets.
            widget_values.append(default_of(spec) if isinstance(value, Link) else prompt[str(number)]["inputs"][name])
            if options.get("control_after_generate", name in SEED_NAMES):
                widget_values.append("fixed")
        if isinstance(value, Link):
            entry["link"] = len(links) + 1
            source = workflow.nodes[value.node]
            kind_out = object_info[source.type]["output"][value.slot]
            kind_out = kind_out if isinstance(kind_out, str) else "COMBO"
            links.append([entry["link"], workflow.number(value.node), value.slot, number, len(inputs), kind_out])
        inputs.append(entry)
    outputs = [
        {"name": name, "type": kind if isinstance(kind, str) else "COMBO", "links": None}
        for name, kind in zip(info["output_name"], info["output"], strict=True)
    ]
    options = [spec[1] if len(spec) > 1 else {} for spec in ordered_inputs(info).values()]
    folded = sum(1 for each in options if each.get("advanced"))
    long_texts = sum(1 for each in options if each.get("multiline") and not each.get("advanced"))
    rows = max(sum("widget" not in entry for entry in inputs), len(outputs)) + len(widget_values) - folded
    properties: dict[str, Any] = {"Node name for S&R": node.type}
    if node.models:
        properties["models"] = [asdict(model) for model in node.models]
    size = [NODE_WIDTH + node.extra_width, 36 + 24 * rows + 50 * long_texts + node.extra_height]
    made = stored_node(number, node.type, [0, 0], size, node.title or info["display_name"], widget_values)
    flags = {"collapsed": True} if node.collapsed else {}
    return made | {"flags": flags, "inputs": inputs, "outputs": outputs, "properties": properties}


def _lay_out(workflow: Workflow, nodes: list[dict]) -> None:
    """One column for each step of the way from the first node to the last, top to bottom in the table's order.

    Collapsed nodes come first: the newer renderer counts their whole height when it fits a workflow into the window.
    """
    widths: dict[int, int] = {}
    for node, spec in zip(nodes, workflow.nodes.values(), strict=True):
        widths[spec.column] = max(widths.get(spec.column, 0), node["size"][0])
    left = {column: sum(widths[c] + COLUMN_GAP for c in widths if c < column) for column in widths}
    bottom: dict[int, int] = {}
    for node, spec in sorted(zip(nodes, workflow.nodes.values(), strict=True), key=lambda pair: not pair[1].collapsed):
        top = bottom.get(spec.column, 0)
        node["pos"] = [left[spec.column], top]
        full = max(node["size"][1] + TITLE, AFTER_RUN.get(spec.type, 0))
        bottom[spec.column] = top + (TITLE + FOLDED_GAP if spec.collapsed else full + ROW_GAP)


def _note(workflow: Workflow, number: int, width: int) -> dict:
    """What stands left of the nodes: as wide as there is room, as the newer renderer makes it as high as its text.

    Code style is turned into italics: on a note's colour the page's code cannot be read.
    """
    note = f"{workflow.note.strip()}\n\n{APP_MODE if workflow.form else ''}".strip().replace("`", "*")
    lines = sum(1 + int(len(line) * NOTE_LETTER / width) for line in note.splitlines())
    return about(number, [-width - COLUMN_GAP, 0], [width, min(HIGHEST - TITLE, 80 + NOTE_LINE * lines)], note)


def render(object_info: dict[str, Any]) -> dict[Path, str]:
    """The text of every file, by its path."""
    files, index = {}, INDEX
    for workflow in workflows():
        files[FOLDER / f"{workflow.title}.json"] = json.dumps(window_form(workflow, object_info), indent=1) + "\n"
        files[FOLDER / "api" / f"{workflow.name}.json"] = json.dumps(api_form(workflow, object_info), indent=2) + "\n"
        image, api = quote(f"{workflow.title}.jpg"), f"api/{workflow.name}.json"
        index += f"| ![]({image}) | **{workflow.title}**<br>{workflow.summary} [{api}]({api}) |\n"
    return files | {FOLDER / "README.md": index}


def stale(object_info: dict[str, Any]) -> list[Path]:
    """The files that differ from what `render` gives, or that it does not give at all."""
    wanted = render(object_info)
    paths = [*FOLDER.glob("*.json"), *FOLDER.glob("*.md"), *FOLDER.glob("api/*.json")]
    present = {path: path.read_text(encoding="utf-8") for path in paths}
    return [path for path in wanted | present if wanted.get(path) != present.get(path)]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 if a file is not current")
    arguments = parser.parse_args()
    ensure_environment()
    with tempfile.TemporaryDirectory() as base, start_host(Path(base)) as host:
        object_info = host.get("/object_info")
    if arguments.check:
        for path in (old := stale(object_info)):
            print(f"not current: {path.relative_to(FOLDER.parent)}")
        return 1 if old else 0
    for path, text in render(object_info).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path.relative_to(FOLDER.parent)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
