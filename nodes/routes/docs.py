"""HTTP for the pack's documents: docs/*.md and the nodes' help pages as HTML, with their images, without a network.

Only files that are found in those two folders are given; the address names one of them and never a path.
"""

from __future__ import annotations

import re
from html import escape
from itertools import pairwise
from pathlib import Path

from aiohttp import web
from markdown_it import MarkdownIt
from markdown_it.token import Token

from .. import host
from .common import Route, Unknown, in_thread

FOLDERS = (host.PACK / "docs", host.PACK / "web" / "docs")
KINDS = {".webp": "image/webp", ".png": "image/png", ".jpg": "image/jpeg"}
STYLE = """
:root { color-scheme: light dark; font: 16px/1.6 system-ui, sans-serif }
body { max-width: 60rem; margin: 0 auto; padding: 1rem 1.5rem 4rem }
img { max-width: 100%; height: auto }
table { border-collapse: collapse; display: block; overflow-x: auto }
th, td { border: 1px solid #8886; padding: .25em .6em; text-align: left; vertical-align: top }
code { font-size: .9em; background: #8882; padding: .1em .3em; border-radius: .25em }
pre { overflow-x: auto; background: #8882; padding: .8em; border-radius: .4em }
pre code { background: none; padding: 0 }
nav ul { columns: 3 14rem }
"""


def found(folder: str, *endings: str) -> dict[str, Path]:
    """The files with these endings by their names, those of the help pages last."""
    return {path.name: path for root in FOLDERS for path in sorted((root / folder).glob("*")) if path.suffix in endings}


def _named(request: web.Request, files: dict[str, Path]) -> Path:
    """The file that the address names. Raises Unknown."""
    name = request.match_info["name"]
    if name not in files:
        raise Unknown(f"There is no page or image '{name}' among ChromaKit's documents. Begin at guide.md.")
    return files[name]


async def _page(request: web.Request) -> web.Response:
    def work() -> str:
        pages = found("", ".md")
        return page(_named(request, pages).read_text(encoding="utf-8"), pages)

    return web.Response(text=await in_thread(work), content_type="text/html")


async def _image(request: web.Request) -> web.StreamResponse:
    path = await in_thread(lambda: _named(request, found("images", *KINDS)))
    return web.FileResponse(path, headers={"Content-Type": KINDS[path.suffix]})


def page(text: str, pages: dict[str, Path]) -> str:
    """A whole HTML page of a Markdown text, with a list of all `pages`, which its links may lead to."""
    links = "".join(f'<li><a href="{name}">{_title(_first_line(path))}</a></li>' for name, path in pages.items())
    title = _title(text.split("\n", 1)[0])
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
        f"<nav><details><summary>All pages</summary><ul>{links}</ul></details></nav>"
        f"<main>{html_of(text, pages)}</main></html>"
    )


def _first_line(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        return file.readline().rstrip()


def _title(line: str) -> str:
    return escape(line.strip("# ").replace("`", ""))


def html_of(text: str, pages: dict[str, Path]) -> str:
    """Markdown as HTML: headings can be led to, links lead to the web or to other pages; one that would lead elsewhere
    in the repository is its words alone."""
    markdown = MarkdownIt("commonmark").enable("table")
    tokens = markdown.parse(text)
    for opening, inner in pairwise(tokens):
        if opening.type == "heading_open":
            opening.attrSet("id", anchor(inner.content))
    for inner in filter(lambda token: token.type == "inline", tokens):
        inner.children = _links(inner.children or [], pages)
    return markdown.renderer.render(tokens, markdown.options, {})


def _links(tokens: list[Token], pages: dict[str, Path]) -> list[Token]:
    kept: list[Token] = []
    leads = False
    for token in tokens:
        if token.type == "link_open":
            path, mark, section = str(token.attrGet("href")).partition("#")
            name = path.rsplit("/", 1)[-1]
            abroad = path.startswith("http")
            leads = abroad or name in pages or not name
            token.attrs |= {"target": "_blank", "rel": "noopener"} if abroad else {"href": f"{name}{mark}{section}"}
        if leads or token.type not in ("link_open", "link_close"):
            kept.append(token)
    return kept


def anchor(heading: str) -> str:
    """What a link to a heading ends with."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


ROUTES = (
    Route("get", "/chromakit/docs/{name}", _page, "A page of the documents: guide.md, room.md, ….", "text/html"),
    Route("get", "/chromakit/docs/images/{name}", _image, "An image of such a page.", "image/*"),
)
