"""The architecture rules of the house, read from the files themselves."""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from _host import pack_node_ids

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
CORE = sorted((ROOT / "chroma_core").rglob("*.py"))
NODES = sorted((ROOT / "nodes").rglob("*.py"))
DOOR = ROOT / "nodes" / "host"
HOST_MODULES = {
    "api_server", "app", "comfy", "comfy_execution", "comfy_extras", "execution", "folder_paths", "latent_preview",
    "main", "node_helpers", "nodes", "server",
}  # fmt: skip
LINES = 600
WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))
PRESETS = "chroma_4_real_"
"""How the workflows for the real Chroma begin: they are what one leaves `tiny` for; see test_workflow_presets.py."""


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(level of relativeness, module) of every import in a file, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or ""


@pytest.mark.parametrize("path", CORE, ids=name)
def test_core_knows_nothing_of_the_host(path: Path):
    absolute = {module.split(".")[0] for level, module in imports(path) if level == 0}
    assert not absolute & (HOST_MODULES | {"comfy_api"}), "chroma_core runs without ComfyUI"
    assert "chroma_core" not in absolute, "imports inside the core are relative: the pack's folder may have any name"


@pytest.mark.parametrize("path", CORE, ids=name)
def test_core_imports_only_downwards(path: Path):
    """No relative import leaves `chroma_core` for the nodes or the scripts."""
    depth = len(path.relative_to(ROOT / "chroma_core").parts)
    assert all(level <= depth for level, _ in imports(path))


@pytest.mark.parametrize("path", NODES, ids=name)
def test_only_one_package_opens_the_door_to_the_host(path: Path):
    absolute = {module.split(".")[0] for level, module in imports(path) if level == 0}
    assert "chroma_core" not in absolute, "nodes import the core as ..chroma_core"
    if DOOR not in path.parents:
        assert not absolute & HOST_MODULES, "only nodes/host/ touches the host's own modules"


@pytest.mark.parametrize("path", [path for path in NODES if DOOR not in path.parents], ids=name)
def test_the_door_is_entered_by_its_name(path: Path):
    """Nodes write `host.x`: what the package offers is what its `__init__` lists."""
    assert not [module for level, module in imports(path) if level and module.startswith("host.")]


def test_the_door_offers_what_it_lists():
    tree = ast.parse((DOOR / "__init__.py").read_text(encoding="utf-8"))
    imported = {alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    (listed,) = (ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign))
    assert set(listed) == imported - {"annotations"}
    used = {
        node.attr
        for path in NODES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "host"
    }
    assert used <= set(listed)


@pytest.mark.parametrize("path", [*CORE, *NODES, *sorted((ROOT / "scripts").glob("*.py"))], ids=name)
def test_a_file_fits_in_a_head(path: Path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LINES


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_requirements_equal_the_project_file():
    listed = [line.strip() for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()]
    assert [line for line in listed if line and not line.startswith("#")] == project()["project"]["dependencies"]


def test_requirements_leave_torch_to_the_host():
    listed = project()["project"]["dependencies"]
    names = {re.split(r"[<>=!~\[; ]", item, maxsplit=1)[0].lower() for item in listed}
    assert not names & {"torch", "torchvision", "torchaudio", "numpy"}
    assert not [item for item in listed if "==" in item.split(";")[0]], "loose ranges only"


def test_every_node_has_a_help_page():
    ids = pack_node_ids()
    assert len(ids) >= 11
    pages = {path.stem for path in (ROOT / "web" / "docs").glob("*.md")}
    pages |= {path.parent.name for path in (ROOT / "web" / "docs").glob("*/en.md")}
    assert not set(ids) - pages, "nodes without web/docs/<id>.md"
    assert not pages - set(ids), "help pages without a node"


def test_every_workflow_has_both_forms_and_a_picture():
    assert len(WORKFLOWS) >= 5
    stems = {path.stem for path in WORKFLOWS}
    assert {path.stem for path in (ROOT / "example_workflows" / "api").glob("*.json")} == stems
    assert {path.stem for path in (ROOT / "example_workflows").glob("*.jpg")} == stems


def test_the_index_shows_every_workflow():
    index = (ROOT / "example_workflows" / "README.md").read_text(encoding="utf-8")
    shown = re.findall(r"!\[\]\((\w+)\.jpg\) \| \*\*(\w+)\*\*", index)
    assert sorted(shown) == [(path.stem, path.stem) for path in WORKFLOWS]
    # The host takes every JSON file of the folder for a template and the page lists it by its name: no index.json.
    assert all(path.stem.startswith("chroma_") for path in WORKFLOWS)


@pytest.mark.parametrize("path", WORKFLOWS, ids=name)
def test_every_workflow_opens_large_enough_to_be_read(path: Path):
    """The page fits a graph into three quarters of the window, and writes no text when that makes it too small."""
    nodes = json.loads(path.read_text(encoding="utf-8"))["nodes"]
    sizes = [[1, 1] if node["flags"].get("collapsed") else node["size"] for node in nodes]
    width, height = (
        max(node["pos"][i] + size[i] for node, size in zip(nodes, sizes, strict=True))
        - min(node["pos"][i] for node in nodes)
        for i in (0, 1)
    )
    assert width <= 2020 and height <= 1240


@pytest.mark.parametrize("path", [path for path in WORKFLOWS if not path.stem.startswith(PRESETS)], ids=name)
def test_every_workflow_runs_tiny_and_says_how_to_leave_it(path: Path):
    prompt = json.loads((path.parent / "api" / path.name).read_text(encoding="utf-8"))
    loaders = [node for node in prompt.values() if node["class_type"] == "ChromaLoadModel"]
    assert loaders and all(node["inputs"]["flavour"] == "tiny" for node in loaders)
    graph = json.loads(path.read_text(encoding="utf-8"))
    notes = [node["widgets_values"][0] for node in graph["nodes"] if node["type"] in ("Note", "MarkdownNote")]
    assert any("flavour" in note for note in notes)


def test_our_settings_of_the_linters_are_the_agreed_ones():
    ruff = project()["tool"]["ruff"]
    assert ruff["line-length"] == 120
    assert {"I", "S102", "S307", "E702"} <= set(ruff["lint"]["select"])
