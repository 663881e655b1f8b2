"""The architecture rules of the house, read from the files themselves."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from urllib.parse import unquote

from _host import pack_node_ids
from _workflows import load_api, load_window, window_files

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


@cache
def tree(path: Path) -> ast.Module:
    """A file's syntax tree, which several rules look through."""
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(level of relativeness, module) of every import in a file, wherever it stands."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or ""


FLOORS = (
    "cli",
    "parity",
    "comfy",
    "import_config",
    "training/jobs",
    "training/run",
    "training/distributed",
    "training/control.py",
    "training/config",
    "training/step",
    "requests",
    "memory",
    "checkpoints",
    "fullrank",
    "loading",
    "data",
    "streaming",
    "lora",
    "sampling",
    "model",
    "weights",
    "names",
    "settings.py",
    "options.py",
    "files.py",
    "errors.py",
)
"""The rooms of `chroma_core` from the top: a file may import from its own room and from those below it."""

TO_COME: dict[str, str] = {}
"""Upward imports that are there for now, as "file → file", each with its reason. A circle is never allowed."""


def floor(path: Path) -> int | None:
    """The number of a core file's room in FLOORS; None for what is in none."""
    place = path.relative_to(ROOT / "chroma_core").as_posix()
    return next((i for i, room in enumerate(FLOORS) if f"{place}/".startswith(f"{room}/")), None)


def arrows(path: Path) -> set[Path]:
    """The core files that a core file imports, wherever the import stands; also those for the type checker alone."""
    found = set()
    for node in ast.walk(tree(path)):
        if not (isinstance(node, ast.ImportFrom) and node.level):
            continue
        base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
        for place in (base / alias.name for alias in node.names):
            files = (place.with_suffix(".py"), place / "__init__.py", base.with_suffix(".py"), base / "__init__.py")
            found |= set([file for file in files if file.is_file()][:1])
    return found - {path}


def circles(arrows_of: dict[Path, set[Path]]) -> list[list[str]]:
    """Groups of files that import each other in a circle: those that reach each other."""

    def reach(start: Path) -> set[Path]:
        seen: set[Path] = set()
        todo = [start]
        while todo:
            for target in arrows_of.get(todo.pop(), set()) - seen:
                seen.add(target)
                todo.append(target)
        return seen

    reached = {path: reach(path) for path in arrows_of}
    groups = {frozenset(o for o in reached[path] if path in reached.get(o, ())) for path in arrows_of}
    return sorted(sorted(map(name, group)) for group in groups if group)


def test_arrows_point_down_and_never_in_a_circle():
    homeless = [name(path) for path in CORE if floor(path) is None]
    assert homeless == ["chroma_core/__init__.py", "chroma_core/__main__.py", "chroma_core/training/__init__.py"]
    arrows_of = {path: arrows(path) for path in CORE}
    assert sum(map(len, arrows_of.values())) > 400, "the imports were read"
    upward = {
        f"{name(path)} → {name(target)}"
        for path, targets in arrows_of.items()
        for target in targets
        if (here := floor(path)) is not None and (there := floor(target)) is not None and there < here
    }
    assert (sorted(upward - set(TO_COME)), circles(arrows_of)) == ([], [])
    assert upward == set(TO_COME), "an exception that is no longer needed"


def test_the_ground_floor_stands_without_libraries():
    """What everything imports costs nothing to import."""
    for file in ("errors.py", "files.py", "options.py"):
        top = {module.split(".")[0] for level, module in imports(ROOT / "chroma_core" / file) if level == 0}
        assert top <= sys.stdlib_module_names, file


def test_a_circle_is_seen():
    a, b, c, d = (ROOT / file for file in "abcd")
    assert circles({a: {b}, b: {c}, c: {b, d}, d: set()}) == [["b", "c"]]


def test_who_may_import_whom():
    """The core runs without ComfyUI, under any folder name; of the nodes only nodes/host/ touches ComfyUI's modules."""
    wrong = []
    for path in (*CORE, *NODES):
        in_core, in_door = path in CORE, DOOR in path.parents
        depth = len(path.relative_to(ROOT).parts) - 1
        for level, module in imports(path):
            top = module.split(".")[0]
            if level == 0 and top == "chroma_core":
                wrong.append(f"{name(path)}: imports inside the pack are relative, its folder may have any name")
            if level == 0 and not in_door and top in HOST_MODULES | ({"comfy_api"} if in_core else set()):
                wrong.append(f"{name(path)}: {module} is ComfyUI's; only nodes/host/ may touch it")
            if in_core and level > depth:
                wrong.append(f"{name(path)}: an import leaves chroma_core")
            if not in_core and not in_door and level and module.startswith("host."):
                wrong.append(f"{name(path)}: nodes write `host.x`; what the door offers is in its __init__")
    assert wrong == []


def test_the_door_offers_what_it_lists():
    door = tree(DOOR / "__init__.py")
    imported = {alias.name for node in door.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    (listed,) = (ast.literal_eval(node.value) for node in door.body if isinstance(node, ast.Assign))
    assert set(listed) == imported - {"annotations"}
    used = {
        node.attr
        for path in NODES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "host"
    }
    assert used <= set(listed)


def test_a_file_fits_in_a_head():
    ours = [
        *CORE,
        *NODES,
        *(path for room in ("scripts", "tools", "benchmarks") for path in (ROOT / room).rglob("*.py")),
    ]
    lengths = {name(path): len(path.read_text(encoding="utf-8").splitlines()) for path in ours}
    assert {path: lines for path, lines in lengths.items() if lines > LINES} == {}


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


def test_the_lock_file_has_every_package_that_is_asked_for():
    """constraints.txt is made from constraints.in: what is chosen there by hand is in it, and nothing is left open."""

    def lines(path: str) -> list[str]:
        found = (ROOT / path).read_text(encoding="utf-8").splitlines()
        return [line.split(";")[0].strip().lower().replace("_", "-") for line in found if line and line[0] != "#"]

    locked = lines("scripts/constraints.txt")
    assert [line for line in locked if not re.fullmatch(r"[a-z0-9.-]+==[\w.+!]+", line)] == []
    assert sorted(set(lines("scripts/constraints.in")) - set(locked)) == []
    names = {line.split("==")[0] for line in locked}
    asked = [*lines("requirements.txt"), *lines("scripts/requirements-dev.txt")]
    assert sorted({re.split(r"[<>=!~\[]", line, maxsplit=1)[0] for line in asked} - names) == []


def test_the_command_is_there():
    module, name = project()["project"]["scripts"]["chromakit"].split(":")
    assert callable(getattr(importlib.import_module(module), name))


def test_every_node_has_a_help_page():
    ids = pack_node_ids()
    assert len(ids) >= 11
    pages = {path.stem for path in (ROOT / "web" / "docs").glob("*.md")}
    pages |= {path.parent.name for path in (ROOT / "web" / "docs").glob("*/en.md")}
    assert not set(ids) - pages, "nodes without web/docs/<id>.md"
    assert not pages - set(ids), "help pages without a node"


def test_every_workflow_has_both_forms_and_an_image():
    assert len(WORKFLOWS) >= 5
    assert sorted(window_files().values()) == WORKFLOWS
    assert sorted(window_files()) == sorted(path.stem for path in (ROOT / "example_workflows" / "api").glob("*.json"))
    assert {path.stem for path in (ROOT / "example_workflows").glob("*.jpg")} == {path.stem for path in WORKFLOWS}


def test_the_index_shows_every_workflow():
    index = (ROOT / "example_workflows" / "README.md").read_text(encoding="utf-8")
    shown = re.findall(r"!\[\]\((\S+)\.jpg\) \| \*\*(.+?)\*\*", index)
    assert sorted((unquote(image), title) for image, title in shown) == [(path.stem, path.stem) for path in WORKFLOWS]
    # The host takes every JSON file of the folder for a template and the page lists it by its name: no index.json, and
    # names in words, which may stand in an address and on any file system.
    assert all(re.fullmatch(r"Chroma [a-zA-Z0-9, ]{5,30}", path.stem) for path in WORKFLOWS)


def test_an_app_form_shows_widgets_that_are_there():
    forms = {name: graph for name in window_files() if (graph := load_window(name))["extra"]}
    assert set(forms) == {name for name in window_files() if re.match(r"chroma_\d_", name)}
    for graph in forms.values():
        widgets = [[node["id"], slot["name"]] for node in graph["nodes"] for slot in node["inputs"] if "widget" in slot]
        data = graph["extra"]["linearData"]
        assert all(field in widgets for field in data["inputs"]) and len(data["inputs"]) >= 5
        assert data["outputs"] and set(data["outputs"]) <= {node["id"] for node in graph["nodes"]}


def test_the_page_opens_templates_that_are_there():
    script = (ROOT / "web" / "js" / "jobs" / "list.js").read_text(encoding="utf-8")
    (table,) = re.findall(r"const TEMPLATES = \{(.+)\}", script)
    assert set(re.findall(r'"(.+?)"', table)) <= {path.stem for path in WORKFLOWS}


def test_every_workflow_runs_tiny_and_says_how_to_leave_it():
    wrong = []
    for name in window_files():
        if name.startswith(PRESETS):
            continue
        loaders = [node for node in load_api(name).values() if node["class_type"] == "ChromaLoadModel"]
        if not loaders or any(node["inputs"]["flavour"] != "tiny" for node in loaders):
            wrong.append(f"{name} does not load tiny")
        nodes = load_window(name)["nodes"]
        notes = [node["widgets_values"][0] for node in nodes if node["type"] in ("Note", "MarkdownNote")]
        if not any("flavour" in note for note in notes):
            wrong.append(f"{name} does not say which widget to change")
    assert wrong == []


def test_our_settings_of_the_linters_are_the_agreed_ones():
    ruff = project()["tool"]["ruff"]
    assert ruff["line-length"] == 120
    assert {"I", "S102", "S307", "E702"} <= set(ruff["lint"]["select"])


SLEEPERS = {
    "tests/support/nullgpu/in_comfyui/sitecustomize.py": "it waits for a module, in a process of its own",
    "tests/support/waiting.py": "it is the helper",
    "tests/host/test_holding.py": "threads that race at random",
}


def test_tests_wait_for_what_they_need():
    """`waiting.until` instead of a sleep, which is too long on one machine and too short on another."""
    tests = {name(path): path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py")}
    assert {path for path, text in tests.items() if re.search(r"\btime\.sleep\b", text)} == set(SLEEPERS)


def test_every_tool_answers_help():
    """Each script that can be run has a parser, and every flag of one says what it is."""
    silent = []
    for path in sorted(path for folder in ("tools", "benchmarks", "scripts") for path in (ROOT / folder).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        runs = '__name__ == "__main__"' in text and path.stem not in ("__main__", "comfyui_peer")
        if runs and not any(word in text for word in ("ArgumentParser(", "keep_current(")):
            silent.append(name(path))
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
                if not any(keyword.arg == "help" for keyword in node.keywords):
                    silent.append(f"{name(path)}:{node.lineno}")
    assert silent == []
