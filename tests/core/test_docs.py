"""What the documents point at is there: links, anchors, files and modules of this repository."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

from tools.docs import lora_table, option_tables, recipe_tables

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(page for room in ("docs", "web/docs", "example_workflows") for page in ROOT.glob(f"{room}/**/*.md")),
    ]
)
FOLDERS = {path.name for path in ROOT.iterdir() if path.is_dir()} - {".git", ".host", ".venv", "node_modules"}
CODE = re.compile(r"^```(?:.|\n)*?^```|^(?: {4}.*\n)+|`[^`]+`", re.MULTILINE)
"""Fenced blocks, indented blocks and spans."""


def code(text: str) -> str:
    return "\n".join(CODE.findall(text))


def anchors(page: Path) -> set[str]:
    """The ids that a page's headings get when it is shown."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> Iterator[str]:
    for link in re.findall(r"\]\(([^)\s]+)\)", CODE.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"https?://", link):
            continue
        place, _, anchor = link.partition("#")
        target = page.parent / unquote(place) if place else page
        if place.startswith("chromakit/"):  # a help page's link to the route that gives the documents
            target = ROOT / place.removeprefix("chromakit/")
        if not target.exists() or (anchor and anchor not in anchors(target)):
            yield link


def missing_paths(text: str) -> Iterator[str]:
    """Paths from the root (`docs/x.md`, with `*` for anything) and Python files by name, in a text's code font."""
    for path in re.findall(r"(?<![\w./<>~*-])[\w.*-]+(?:/[\w.*-]+)*/?(?![\w/])", code(text)):
        first, *rest = path.rstrip("/.").split("/")
        if first in FOLDERS and (rest or path.endswith("/")):
            found = any(ROOT.glob(path.rstrip("/")))
        elif path.endswith(".py"):
            found = any(ROOT.glob(path if rest else f"*/**/{path}")) or (ROOT / path).exists()
        else:
            continue
        if not found:
            yield path


def missing_modules(text: str) -> Iterator[str]:
    for module in re.findall(r"python -m ((?:chroma_core|tools|benchmarks)[\w.]*)", code(text)):
        place = ROOT.joinpath(*module.split("."))
        if not (place.with_suffix(".py").is_file() or (place / "__main__.py").is_file()):
            yield module


def test_every_link_leads_somewhere():
    broken = {page.relative_to(ROOT).as_posix(): list(broken_links(page)) for page in PAGES}
    assert {page: links for page, links in broken.items() if links} == {}


def test_every_file_that_is_named_is_there():
    wrong = {}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        wrong[page.relative_to(ROOT).as_posix()] = [*missing_paths(text), *missing_modules(text)]
    assert len(wrong) > 50 and {page: paths for page, paths in wrong.items() if paths} == {}


def test_what_is_not_there_is_found():
    text = "See `docs/gone.md`, `web/docs/*.md`, `gone.py`, `output/loras`.\n\n    python -m tools.gone --all\n"
    assert [*missing_paths(text), *missing_modules(text)] == ["docs/gone.md", "gone.py", "tools.gone"]


def test_the_map_of_the_house_names_every_room():
    house = (ROOT / "DEVELOPERS.md").read_text(encoding="utf-8").split("## Where things are")[1].split("\n## ")[0]
    core = {f"chroma_core/{path.name}/" for path in (ROOT / "chroma_core").iterdir() if path.is_dir()}
    rooms = core - {"chroma_core/__pycache__/"} | {
        f"{name}/" for name in FOLDERS if (ROOT / name / "__init__.py").exists()
    }
    assert len(rooms) > 18 and sorted(room for room in rooms if f" {room} " not in house) == []


def test_the_tables_of_loras_are_current():
    assert lora_table.PAGE.read_text(encoding="utf-8") == lora_table.page(), "python -m tools.docs.lora_table"


def test_the_recipe_tables_are_current():
    assert recipe_tables.PAGE.read_text(encoding="utf-8") == recipe_tables.page(), "python -m tools.docs.recipe_tables"


def test_the_option_tables_are_current():
    assert option_tables.PAGE.read_text(encoding="utf-8") == option_tables.page(), "python -m tools.docs.option_tables"
