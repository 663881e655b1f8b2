"""HTTP for the pack's documents: docs/*.md and the nodes' help pages as HTML, with their images, without a network.

Only files that are found in those two folders are given; the address names one of them and never a path.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape
from pathlib import Path

from aiohttp import web

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
    titles = {name: _title(path.read_text(encoding="utf-8")) for name, path in pages.items()}
    links = _all("li", [f'<a href="{name}">{title}</a>' for name, title in titles.items()])
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{_title(text)}</title><style>{STYLE}</style>'
        f"<nav><details><summary>All pages</summary><ul>{links}</ul></details></nav>"
        f"<main>{html_of(text, pages)}</main></html>"
    )


STARTS = {"heading": r"#{1,4} ", "table": r"\|", "ul": r"[-*] ", "ol": r"\d+\. ", "code": r" {4}", "text": r""}
"""What a line of each kind of block begins with."""


def _title(text: str) -> str:
    return escape(text.split("\n", 1)[0].strip("# ").replace("`", ""))


def html_of(text: str, pages: dict[str, Path]) -> str:
    """Markdown as our pages use it: headings, paragraphs, lists of one level, tables, code; the rest is `_inline`'s."""
    made: list[str] = []
    for i, part in enumerate(re.split(r"^```\w*\n(.*?)^```$", re.sub(r"<!--.*?-->", "", text), flags=re.M | re.S)):
        if i % 2:
            made.append(f"<pre><code>{escape(part)}</code></pre>")
        else:
            made += [_block(kind, lines, pages) for kind, lines in _blocks(part)]
    return "\n".join(made)


def _blocks(text: str) -> list[tuple[str, list[str]]]:
    """The lines in blocks of a kind; a line that goes on with a list's point is joined to it."""
    blocks: list[tuple[str, list[str]]] = []
    before = ""
    for line in text.split("\n"):
        kind = next(kind for kind, start in STARTS.items() if re.match(start, line))
        if not line.strip():
            before = ""
        elif before in ("ul", "ol", "text") and kind in ("code", "text"):
            blocks[-1][1][-1] += " " + line.strip()
        elif before == kind != "heading":
            blocks[-1][1].append(line)
        else:
            blocks.append((kind, [line]))
            before = kind
    return blocks


def _block(kind: str, lines: list[str], pages: dict[str, Path]) -> str:
    if kind == "code":
        return f"<pre><code>{escape(chr(10).join(line[4:] for line in lines))}</code></pre>"
    texts = [_inline(re.sub(STARTS[kind] if kind != "table" else "", "", line, count=1), pages) for line in lines]
    if kind == "heading":
        level = lines[0].index(" ")
        return f'<h{level} id="{anchor(lines[0][level + 1 :])}">{texts[0]}</h{level}>'
    if kind == "table":
        head, *rows = [text.strip().strip("|").split("|") for text in texts if not re.fullmatch(r"[|:\- ]+", text)]
        return f"<table>{_all('tr', [_all('th', head), *(_all('td', row) for row in rows)])}</table>"
    return f"<p>{texts[0]}</p>" if kind == "text" else f"<{kind}>{_all('li', texts)}</{kind}>"


def _all(tag: str, texts: Iterable[str]) -> str:
    return "".join(f"<{tag}>{text}</{tag}>" for text in texts)


def anchor(heading: str) -> str:
    """What a link to a heading ends with."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _inline(text: str, pages: dict[str, Path]) -> str:
    """Code, bold, italic, images, and links to the web and to other pages; what leads elsewhere stays as its words."""
    kept: list[str] = []

    def keep(html: str) -> str:
        kept.append(html)
        return f"\0{len(kept) - 1}\0"

    def link(match: re.Match[str]) -> str:
        words, target = match.groups()
        name, mark, section = target.partition("#")
        name = name.rsplit("/", 1)[-1]
        if target.startswith("http"):
            return keep(f'<a href="{target}" target="_blank" rel="noopener">') + words + keep("</a>")
        if name in pages or not name:
            return keep(f'<a href="{name}{mark}{section}">') + words + keep("</a>")
        return words

    text = re.sub(r"(`+)(.+?)\1", lambda m: keep(f"<code>{escape(m[2].strip()).replace('|', '&#124;')}</code>"), text)
    text = escape(
        re.sub(r'<img src="[^"<>]+" alt="[^"<>]*" width="\d+">|<br>', lambda m: keep(m[0]), text), quote=False
    )
    text = text.replace(r"\|", "&#124;")
    text = re.sub(r"!\[([^\]]*)\]\(([^)]+)\)", lambda m: keep(f'<img src="{m[2]}" alt="{escape(m[1])}">'), text)
    text = re.sub(r"\[([^\]]+)\]\(([^)\s]+)\)", link, text)
    text = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", text)
    text = re.sub(r"(?<![\w*\\])\*([^*\s](?:[^*]*[^*\s])?)\*(?![\w*])", r"<i>\1</i>", text)
    while "\0" in text:
        text = re.sub(r"\0(\d+)\0", lambda m: kept[int(m[1])], text)
    return text


ROUTES = (
    Route("get", "/chromakit/docs/{name}", _page, "A page of the documents: guide.md, room.md, ….", "text/html"),
    Route("get", "/chromakit/docs/images/{name}", _image, "An image of such a page.", "image/*"),
)
