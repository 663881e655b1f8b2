"""The nodes as saved workflows know them, against tests/recorded/nodes.json; see tests/core/test_promises.py."""

from typing import Any

from _host import pack_node_ids
from recorded import hold

SHOWN = ("tooltip", "display_name", "placeholder")
"""Options of an input that are words for the reader."""
FILES = ("lora", "folder")
"""Inputs whose choices are what lies in a folder just then."""


def surface(info: dict[str, Any]) -> dict[str, Any]:
    """Inputs in their order with type, default, range and hints; outputs; no words for the reader."""
    inputs = {}
    for kind in ("required", "optional", "hidden"):
        for name in info["input_order"].get(kind, []):
            declared = info["input"][kind][name]
            if not isinstance(declared, (list, tuple)):
                declared = [declared]
            options = declared[1] if len(declared) > 1 else {}
            kept = {key: value for key, value in options.items() if key not in SHOWN}
            if name in FILES:
                kept = {key: value for key, value in kept.items() if key not in ("options", "default")}
            if kept.get("options", [])[:1] == ["as published"]:
                kept["options"] = kept["options"][:1]  # the others are files
            inputs[name] = {"kind": kind, "type": declared[0], "options": kept}
    outputs = [
        {"name": name, "type": type_, "list": is_list}
        for name, type_, is_list in zip(info["output_name"], info["output"], info["output_is_list"], strict=True)
    ]
    flags = {key: info.get(key) for key in ("output_node", "category", "deprecated", "experimental", "api_node")}
    return {"inputs": inputs, "outputs": outputs, **flags}


def test_nodes_as_saved_workflows_know_them(server):
    info = server.get("/object_info")
    hold("nodes", {node: surface(info[node]) for node in pack_node_ids()})
