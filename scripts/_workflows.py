"""Reads the example workflows, and changes widget values in their API form, for the demo, the tools and the tests."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from _environment import ROOT

FOLDER = ROOT / "example_workflows"
Prompt = dict[str, dict[str, Any]]


def load_api(name: str) -> Prompt:
    """The API form of an example workflow, by the name of its file without `.json`."""
    return json.loads((FOLDER / "api" / f"{name}.json").read_text(encoding="utf-8"))


def window_files() -> dict[str, Path]:
    """The files for the window, called by their titles, by the names of those in `api/`: what the index says."""
    index = (FOLDER / "README.md").read_text(encoding="utf-8")
    pairs = re.findall(r"\*\*(.+?)\*\*.*\(api/(\w+)\.json\)", index)
    return {name: FOLDER / f"{title}.json" for title, name in pairs}


def load_window(name: str) -> dict[str, Any]:
    """The graph as the window opens it, by the same name as `load_api`."""
    return json.loads(window_files()[name].read_text(encoding="utf-8"))


def change(prompt: Prompt, class_type: str, title: str | None = None, **inputs: Any) -> Prompt:
    """A copy of the prompt with the given inputs in every node of one type (and title); there must be at least one.

    Names must be inputs that the node has already, so a renamed widget fails here and not silently in the host.
    """
    changed = json.loads(json.dumps(prompt))
    nodes = [node for node in changed.values() if node["class_type"] == class_type]
    nodes = [node for node in nodes if title in (None, node["_meta"]["title"])]
    if not nodes:
        raise KeyError(f"the workflow has no {class_type} {title or ''}")
    for node in nodes:
        if unknown := set(inputs) - set(node["inputs"]):
            raise KeyError(f"{class_type} has no input {sorted(unknown)}; it has {sorted(node['inputs'])}")
        node["inputs"].update(inputs)
    return changed
