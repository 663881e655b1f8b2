"""Help pages against what the running host says about the nodes."""

from __future__ import annotations

import re

import pytest

from _environment import ROOT
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


def test_every_page_names_every_input_and_output(server, object_info):
    wrong = {}
    for node in pack_node_ids():
        text, info = page_of(server, node), object_info[node]
        inputs = text.split("## Inputs")[1].split("## Outputs")[0]
        outputs = text.split("## Outputs")[1].split("## Example")[0]
        wanted = sorted(name for kind in ("required", "optional") for name in info["input_order"].get(kind, []))
        if (sorted(named(inputs)), named(outputs)) != (wanted, list(info["output_name"])):
            wrong[node] = (named(inputs), wanted, named(outputs), info["output_name"])
    assert wrong == {}


def test_advanced_inputs_stand_apart(server, object_info):
    """As on the node, where the newer renderer folds them away."""
    wrong = {}
    for node in pack_node_ids():
        _, _, apart = page_of(server, node).split("## Outputs")[0].partition("### Advanced inputs")
        inputs = [item for kind in object_info[node]["input"].values() for item in kind.items()]
        advanced = {name for name, spec in inputs if len(spec) > 1 and spec[1].get("advanced")}
        if set(named(apart)) != advanced:
            wrong[node] = (named(apart), advanced)
    assert wrong == {}


def test_the_host_serves_every_image(server):
    """By the address that its page makes of the one in the help page."""
    for node in pack_node_ids():
        (source,) = re.findall(r'<img src="([^"]+)"', page_of(server, node))
        status, body = server.request("GET", f"{FOLDER}/{source}")
        assert status == 200 and body[:4] == b"RIFF" and body[8:12] == b"WEBP", node


def test_every_document_is_a_page_whose_links_and_images_lead_somewhere(server):
    """Those of docs/ and the help pages, as HTML without a network; what is no document is refused."""
    root = "/chromakit/docs"
    pages = {"guide.md": ""}
    for name in iter(lambda: next((name for name, text in pages.items() if not text), None), None):
        status, body = server.request("GET", f"{root}/{name}")
        assert status == 200, name
        pages[name] = body.decode("utf-8")
        for link in re.findall(r'<a href="([^"#]+)', pages[name]):
            if not link.startswith("http"):
                pages.setdefault(link, "")
    assert set(pages) == {path.name for folder in ("docs", "web/docs") for path in (ROOT / folder).glob("*.md")}
    sources = set()
    for name, text in pages.items():
        assert "<h1" in text and not re.search(
            r"\]\(|\*\*|\0", re.sub(r"<(pre|code)>.*?</\1>", "", text, flags=re.S)
        ), name
        for link, section in re.findall(r'<a href="([^"#]*)#([^"]+)"', text):
            assert link.startswith("http") or f' id="{section}"' in pages[link or name], (name, link, section)
        sources |= set(re.findall(r'<img src="([^"]+)"', text))
    assert len(sources) > 30 and {server.request("GET", f"{root}/{each}")[0] for each in sources} == {200}
    for odd in ("none.md", "..%2FREADME.md", "%2Fetc%2Fpasswd", "images/..%2Froom.md", "images/guide.md", "data"):
        assert server.request("GET", f"{root}/{odd}")[0] == 404, odd
