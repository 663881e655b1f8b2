"""The help pages' pictures and shape, read from the files; tests/host/test_help_pages.py asks the host for the rest."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "web" / "docs").glob("*.md"))
SECTIONS = ["When to use it", "Inputs", "Outputs", "Example", "Trouble?"]
LARGEST = 45_000
"""Bytes of a picture: a page is read while a model loads."""


def test_there_is_a_picture_for_every_page_and_no_other():
    pictures = {path.name for path in (ROOT / "web" / "docs" / "images").iterdir()}
    assert pictures == {f"{page.stem}.webp" for page in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_a_page_has_the_shape_of_all(page: Path):
    text = page.read_text(encoding="utf-8")
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == SECTIONS
    title, what, *_ = text.split("\n\n")
    assert title.startswith("# Chroma")
    assert len(what.split()) > 8 and "|" not in what, "the first paragraph says what the node does"
    trouble = text.split("## Trouble?")[1]
    assert len(re.findall(r"^(?:- |\d\. )", trouble, re.MULTILINE)) >= 4 and "→" in trouble


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_a_page_has_its_picture(page: Path):
    ((source, words, width),) = re.findall(
        r'<img src="([^"]+)" alt="([^"]+)" width="(\d+)">', page.read_text(encoding="utf-8")
    )
    assert source == f"images/{page.stem}.webp" and words
    picture = page.parent / source
    assert picture.stat().st_size <= LARGEST
    from PIL import Image

    with Image.open(picture) as image:
        assert image.width >= 1.3 * int(width), "crisp on a screen of more than one pixel to a CSS pixel"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_a_page_needs_nothing_outside_of_it(page: Path):
    """In the help panel a relative link leads nowhere: the host resolves pictures against the pack, but not links."""
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"\]\((?!https?://)", text)
    assert "docs/" not in text.replace("images/", "")
