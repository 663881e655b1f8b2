"""What the page gets: light, plain, and without traces outside of its own elements."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WEB = ROOT / "web"
SCRIPTS = sorted(path for path in (WEB / "js").rglob("*.js") if "vendor" not in path.parts)
SHEETS = sorted((WEB / "css").glob("*.css"))
LIMIT = 120_000  # bytes of our own script
ENTRIES = {"chromakit.js", "register.js"}
"""Files that register something; all others are imported by the page too and must do nothing then."""


def name(path: Path) -> str:
    return path.relative_to(WEB).as_posix()


def test_our_script_is_light():
    assert sum(path.stat().st_size for path in SCRIPTS) < LIMIT


def test_every_script_is_checked_for_types():
    """`tsc` reads them (scripts/test.py --lint); what would silence it is not written."""
    assert [name(path) for path in SCRIPTS if not path.read_text(encoding="utf-8").startswith("// @ts-check\n")] == []
    silencers = r"@ts-(?:ignore|expect-error|nocheck)|\{(?:any|\*)\}|\bany\[\]"
    assert [name(path) for path in SCRIPTS if re.search(silencers, path.read_text(encoding="utf-8"))] == []


def test_the_lock_of_the_type_checker_names_no_registry():
    lock = (ROOT / "package-lock.json").read_text(encoding="utf-8")
    assert '"integrity"' in lock and '"resolved"' not in lock, "npm config set omit-lockfile-registry-resolved true"


@pytest.mark.parametrize("path", SCRIPTS, ids=name)
def test_imports_lead_to_the_host_or_to_files_that_are_there(path: Path):
    for target in re.findall(r"""^\s*(?:import|export)\b[^;]*?from\s+["']([^"']+)["']""", path.read_text(), re.M):
        assert target.startswith("."), f"{target}: plain modules have no bundler to find that"
        found = (path.parent / target).resolve()
        if found.is_relative_to(WEB):
            assert found.is_file(), target
        else:
            assert found.name in ("app.js", "api.js") and found.parent.name == "scripts", target


@pytest.mark.parametrize("path", SCRIPTS, ids=name)
def test_nothing_of_the_hosts_is_patched(path: Path):
    text = path.read_text()
    assert not re.search(r"\.prototype\b|Object\.(assign|defineProperty)\((window|app|api|LiteGraph)\b", text)
    assert not re.search(r"\binnerHTML\b|\beval\(|new Function\b|document\.write\b", text)
    if path.name not in ENTRIES:
        assert "registerExtension(" not in text


@pytest.mark.parametrize("path", SHEETS, ids=name)
def test_every_rule_is_about_our_own_elements(path: Path):
    text = re.sub(r"/\*.*?\*/", "", path.read_text(), flags=re.S)
    selectors = [selector for rule in re.findall(r"([^{}]+)\{", text) for selector in top_level(rule)]
    assert selectors
    assert [selector for selector in selectors if not selector.startswith(".chromakit")] == []


def top_level(rule: str) -> list[str]:
    """The selectors of a rule; commas within brackets do not part them."""
    parts, depth = [""], 0
    for letter in rule:
        depth += (letter == "(") - (letter == ")")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def test_the_vendored_library_names_its_licence():
    head = (WEB / "js" / "vendor" / "uplot.js").read_text(encoding="utf-8")[:300]
    assert "MIT" in head and (WEB / "js" / "vendor" / "uplot-LICENSE.txt").is_file()
