"""What docs/security.md promises of the code itself; what it promises of a running ComfyUI is in tests/host."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(path for room in ("chroma_core", "nodes") for path in (ROOT / room).rglob("*.py"))
PAGE = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
FORBIDDEN = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "pickle.load", "pickle.loads", "marshal.loads"),
    *("dill.load", "joblib.load", "shelve.open", "numpy.load", "np.load", "yaml.unsafe_load", "yaml.full_load"),
    "aiohttp.ClientSession",
}
CLIENTS = {"http", "httpx", "huggingface_hub", "requests", "socket", "urllib.request", "websocket"}
"""Modules through which a program reaches others."""


def calls(path: Path) -> Iterator[ast.Call]:
    return (each for each in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(each, ast.Call))


def test_nothing_that_is_read_is_run():
    """No code from texts or pickles, no shell, no code from a model's repository; of torch only weights."""
    found = []
    for path in SOURCES:
        for call in calls(path):
            name = ast.unparse(call.func)
            given = {each.arg: ast.unparse(each.value) for each in call.keywords}
            if name in FORBIDDEN or given.get("shell") == "True" or given.get("trust_remote_code") == "True":
                found.append(f"{path.relative_to(ROOT)}:{call.lineno} {name}")
            if name == "yaml.load":
                loader = re.search(r"class (\w+)\(yaml\.SafeLoader\)", path.read_text(encoding="utf-8"))
                assert loader and ast.unparse(call.args[1]) == loader[1]
            if name == "torch.load" and given.get("weights_only") != "True":
                found.append(f"{path.relative_to(ROOT)}:{call.lineno} torch.load without weights_only")
    assert not found, found


def test_the_page_sets_no_html_and_runs_no_text():
    scripts = [path for path in (ROOT / "web" / "js").rglob("*.js") if "vendor" not in path.parts]
    risky = re.compile(r"\b(innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval|Function)\b\s*[=(]")
    assert scripts and not [path.name for path in scripts if risky.search(path.read_text(encoding="utf-8"))]


def test_who_reaches_others():
    """Downloads of models, and programs that drive a ComfyUI on this machine."""
    found = set()
    for path in SOURCES:
        for each in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in each.names] if isinstance(each, ast.Import) else []
            if isinstance(each, ast.ImportFrom) and not each.level:
                names = [each.module or ""]
            if any(name in CLIENTS or name.partition(".")[0] in CLIENTS for name in names):
                found.add(path.relative_to(ROOT).as_posix())
    named = set(re.findall(r"`((?:chroma_core|nodes)/[\w/]+\.py)`", PAGE.partition("## The network")[2]))
    assert found == named


def test_every_test_that_the_page_names_is_there():
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", PAGE)
    assert len(named) > 15
    for file, test in named:
        assert test == "" or re.search(rf"^def {test}\(", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE), test


def test_every_dependency_has_its_reason():
    wanted = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    asked = [re.split(r"[>=;\s]", line)[0] for line in wanted]
    locked = (ROOT / "scripts" / "constraints.txt").read_text(encoding="utf-8").lower().replace("_", "-")
    rows = dict(re.findall(r"^\| `([\w.-]+)` \| ([\d.]+) \|", PAGE, re.MULTILINE))
    assert sorted(rows, key=str.lower) == sorted(asked, key=str.lower)
    for name, version in rows.items():
        assert f"\n{name.lower().replace('_', '-')}=={version}" in locked, name
