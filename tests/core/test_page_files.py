"""What the page gets: light, plain, and without traces outside of its own elements."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WEB = ROOT / "web"
SCRIPTS = sorted(path for path in (WEB / "js").rglob("*.js") if "vendor" not in path.parts)
SHEETS = sorted((WEB / "css").glob("*.css"))
LIMITS = 236_000, 188_500
"""Bytes of our own script as it is sent, and without comments and the types in them."""
COMMENTS = re.compile(r"/\*\*.*?\*/\s*|^[ \t]*//[^\n]*\n", re.S | re.M)
ENTRIES = {"chromakit.js", "register.js"}
"""Files that register something; all others are imported by the page too and must do nothing then."""


def name(path: Path) -> str:
    return path.relative_to(WEB).as_posix()


def test_our_script_is_light():
    texts = [path.read_text(encoding="utf-8") for path in SCRIPTS]
    sizes = [sum(len(text.encode()) for text in given) for given in (texts, [COMMENTS.sub("", text) for text in texts])]
    assert sizes[0] < LIMITS[0] and sizes[1] < LIMITS[1], sizes


def test_every_script_is_checked_for_types():
    """`tsc` reads them all (scripts/test.py --lint); what would silence it is not written."""
    options = json.loads((ROOT / "tsconfig.json").read_text(encoding="utf-8"))
    assert (
        options["compilerOptions"]["checkJs"]
        and options["compilerOptions"]["strict"]
        and options["include"] == ["web/js"]
    )
    silencers = r"@ts-(?:ignore|expect-error|nocheck)|\{(?:any|\*)\}|\bany\[\]"
    assert [name(path) for path in SCRIPTS if re.search(silencers, path.read_text(encoding="utf-8"))] == []


def test_the_lock_of_the_type_checker_names_no_registry():
    lock = (ROOT / "package-lock.json").read_text(encoding="utf-8")
    assert '"integrity"' in lock and '"resolved"' not in lock, "npm config set omit-lockfile-registry-resolved true"


def test_imports_lead_to_the_host_or_to_files_that_are_there():
    imports = re.compile(r"""^\s*(?:import|export)\b[^;]*?from\s+["']([^"']+)["']""", re.M)
    wrong = []
    for path in SCRIPTS:
        for target in imports.findall(path.read_text(encoding="utf-8")):
            found = (path.parent / target).resolve()
            ours = found.is_relative_to(WEB) and found.is_file()
            hosts = found.name in ("app.js", "api.js") and found.parent.name == "scripts"
            if not target.startswith("."):
                wrong.append(f"{name(path)}: {target}: plain modules have no bundler to find that")
            elif not (ours or hosts and not found.is_relative_to(WEB)):
                wrong.append(f"{name(path)}: {target} is not there")
    assert wrong == []


FORBIDDEN = re.compile(
    r"\.prototype\b|Object\.(?:assign|defineProperty)\((?:window|app|api|LiteGraph)\b"
    r"|\binnerHTML\b|\beval\(|new Function\b|document\.write\b"
)


def test_nothing_of_the_hosts_is_patched():
    texts = {path: path.read_text(encoding="utf-8") for path in SCRIPTS}
    forbidden = [f"{name(path)}: {words}" for path, text in texts.items() for words in FORBIDDEN.findall(text)]
    assert forbidden == []
    registering = {path.name for path, text in texts.items() if "registerExtension(" in text}
    assert registering <= ENTRIES, "the page imports every file, which must do nothing then"


def test_every_rule_is_about_our_own_elements():
    foreign = []
    for path in SHEETS:
        text = re.sub(r"/\*.*?\*/", "", path.read_text(encoding="utf-8"), flags=re.S)
        selectors = [selector for rule in re.findall(r"([^{}]+)\{", text) for selector in top_level(rule)]
        assert selectors, name(path)
        foreign += [
            f"{name(path)}: {selector}" for selector in selectors if not selector.startswith((".chromakit", "@media "))
        ]
    assert foreign == []


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
