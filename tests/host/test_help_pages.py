"""Help pages against what the running host says about the nodes."""

from __future__ import annotations

import re

import pytest

from _host import pack_node_ids

FOLDER = "/extensions/chromakit/docs"


@pytest.fixture(scope="module")
def object_info(server) -> dict:
    return server.get("/object_info")


def page_of(server, node: str) -> str:
    status, body = server.request("GET", f"{FOLDER}/{node}.md")
    assert status == 200
    return body.decode("utf-8")


def named(section: str) -> list[str]:
    """What the points of a section are about."""
    return re.findall(r"^- \*\*([\w ]+)\*\*: ", section, re.MULTILINE)


@pytest.mark.parametrize("node", pack_node_ids())
def test_a_page_names_every_input_and_output(server, object_info, node: str):
    text = page_of(server, node)
    inputs = text.split("## Inputs")[1].split("## Outputs")[0]
    outputs = text.split("## Outputs")[1].split("## Example")[0]
    info = object_info[node]
    wanted = [name for kind in ("required", "optional") for name in info["input_order"].get(kind, [])]
    assert sorted(named(inputs)) == sorted(wanted)
    assert named(outputs) == list(info["output_name"])


@pytest.mark.parametrize("node", pack_node_ids())
def test_advanced_inputs_stand_apart(server, object_info, node: str):
    """As on the node, where the newer renderer folds them away."""
    inputs = page_of(server, node).split("## Inputs")[1].split("## Outputs")[0]
    advanced = {
        name
        for kind in object_info[node]["input"].values()
        for name, spec in kind.items()
        if len(spec) > 1 and spec[1].get("advanced")
    }
    _, _, apart = inputs.partition("### Advanced inputs")
    assert set(named(apart)) == advanced


@pytest.mark.parametrize("node", pack_node_ids())
def test_the_host_serves_the_picture(server, node: str):
    """By the address that its page makes of the one in the help page."""
    (source,) = re.findall(r'<img src="([^"]+)"', page_of(server, node))
    status, body = server.request("GET", f"{FOLDER}/{source}")
    assert status == 200 and body[:4] == b"RIFF" and body[8:12] == b"WEBP"
