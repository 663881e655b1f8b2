"""The help pages' images and shape, read from the files; tests/host/test_help_pages.py asks the host for the rest."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "web" / "docs"
PAGES = sorted(DOCS.glob("*.md"))
SECTIONS = ["When to use it", "Inputs", "Outputs", "Example", "Trouble?"]
SECTIONS_OF = {"zh": ["何时使用", "输入", "输出", "示例", "遇到问题？"]}
"""The languages that have pages, `<node>/<language>.md`, and how each calls the sections."""
ADVANCED_OF = {"zh": "高级输入"}
LARGEST = 45_000
"""Bytes of an image: a page is read while a model loads."""


def test_there_is_an_image_for_every_page_and_no_other():
    images = {path.name for path in (DOCS / "images").iterdir()}
    assert images == {f"{page.stem}.webp" for page in PAGES}


def of_all(check, *cases: tuple) -> None:
    """Run a check on each case, and fail once, with what is wrong of every page."""
    wrong = []
    for case in cases:
        try:
            check(*case)
        except (AssertionError, ValueError, IndexError, KeyError, OSError) as error:
            wrong.append(
                f"{' '.join(str(getattr(part, 'stem', part)) for part in case)}: {type(error).__name__} {error}"
            )
    assert cases and not wrong, "\n".join(wrong)


def test_every_page_has_the_shape_of_all():
    of_all(has_the_shape_of_all, *zip(PAGES))


def has_the_shape_of_all(page: Path):
    text = page.read_text(encoding="utf-8")
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == SECTIONS
    title, what, *_ = text.split("\n\n")
    assert title.startswith("# Chroma")
    assert len(what.split()) > 8 and "|" not in what, "the first paragraph says what the node does"
    trouble = text.split("## Trouble?")[1]
    assert len(re.findall(r"^(?:- |\d\. )", trouble, re.MULTILINE)) >= 4 and "→" in trouble


def test_every_page_has_its_image():
    of_all(has_its_image, *zip(PAGES))


def has_its_image(page: Path):
    ((source, words, width),) = re.findall(
        r'<img src="([^"]+)" alt="([^"]+)" width="(\d+)">', page.read_text(encoding="utf-8")
    )
    assert source == f"images/{page.stem}.webp" and words
    file = page.parent / source
    assert file.stat().st_size <= LARGEST
    from PIL import Image

    with Image.open(file) as image:
        assert image.width >= 1.3 * int(width), "crisp on a screen of more than one pixel to a CSS pixel"


def test_every_page_needs_nothing_outside_of_it():
    of_all(needs_nothing_outside_of_it, *zip(PAGES))


def needs_nothing_outside_of_it(page: Path):
    """In the help panel a link is relative to ComfyUI's page: the host resolves images against the pack alone."""
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"\]\((?!https?://|chromakit/docs/)", text)
    assert "docs/" not in text.replace("images/", "").replace("](chromakit/docs/", "")
    assert "](chromakit/docs/guide.md)" in text.split("## Trouble?")[1]


def translations() -> list[tuple[Path, str]]:
    return [(page, code) for code in sorted(SECTIONS_OF) for page in PAGES]


def both(page: Path, code: str) -> tuple[str, str]:
    """The English text and the translated one."""
    return page.read_text(encoding="utf-8"), (DOCS / page.stem / f"{code}.md").read_text(encoding="utf-8")


def words(code: str) -> dict:
    """What the window calls the nodes and their widgets in a language."""
    return json.loads((ROOT / "locales" / code / "nodeDefs.json").read_text(encoding="utf-8"))


def label(entry: dict, field: str = "name") -> str:
    """A name as the pages quote it: without the English term that the node shows in brackets."""
    return re.sub(r" \([^)]*\)$", "", entry[field])


def parts(text: str, inputs: str, advanced: str, outputs: str) -> list[list[str]]:
    """The names that the lists of inputs, of advanced inputs and of outputs are about, each in its order."""
    before, after = text.split(f"\n## {inputs}\n")[1].split(f"\n## {outputs}\n")
    plain, _, folded = before.partition(f"\n### {advanced}\n")
    return [re.findall(r"^- \*\*([\w ]+)\*\*", part, re.MULTILINE) for part in (plain, folded, after.split("\n## ")[0])]


def code_spans(text: str) -> set[str]:
    return {" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)}


def test_every_translated_page_is_of_a_node_and_of_a_language_of_the_window():
    found = {path.relative_to(DOCS).as_posix() for path in DOCS.glob("*/*.md")}
    assert found == {f"{page.stem}/{code}.md" for page in PAGES for code in SECTIONS_OF}
    assert {path.name for path in (ROOT / "locales").iterdir() if path.is_dir()} == {"en", *SECTIONS_OF}


def test_every_translated_page_has_the_shape_and_the_image_of_the_english_one():
    of_all(has_the_shape_and_the_image_of_the_english_one, *translations())


def has_the_shape_and_the_image_of_the_english_one(page: Path, code: str):
    english, text = both(page, code)
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == SECTIONS_OF[code]
    image = r'<img src="([^"]+)" alt="[^"]+" width="(\d+)">'
    assert re.findall(image, text) == re.findall(image, english), "the host finds it from either page"
    points = r"^(?:- |\d\. |\| )"
    assert len(re.findall(points, text, re.MULTILINE)) == len(re.findall(points, english, re.MULTILINE))
    links = r"\]\(([^)]+)\)"
    assert re.findall(links, text) == re.findall(links, english)
    paragraphs = re.sub(r"(?m)^\|.*\n", "", text).split("\n\n")
    assert not [part for part in paragraphs if "\n" in part.strip() and not re.match(r"- |\d\. ", part)], (
        "a line break inside a paragraph is shown as a gap between two characters"
    )


def test_every_translated_page_lists_the_same_names_with_the_window_s_words():
    of_all(lists_the_same_names_with_the_window_s_words, *translations())


def lists_the_same_names_with_the_window_s_words(page: Path, code: str):
    english, text = both(page, code)
    _, inputs, outputs, *_ = SECTIONS_OF[code]
    listed = parts(text, inputs, ADVANCED_OF[code], outputs)
    assert listed == parts(english, "Inputs", "Advanced inputs", "Outputs")
    node = words(code)[page.stem]
    assert text.startswith(f"# {node['display_name']}\n")
    called = dict(re.findall(r"^- \*\*([\w ]+)\*\* 「([^」]+)」：", text, re.MULTILINE))
    entries = {name: node["inputs"][name] for name in listed[0] + listed[1]}
    for name, entry in entries.items():
        assert called[name] == label(entry), name
    found = re.findall(r"^- \*\*[\w ]+\*\*(?: 「([^」]+)」)?：", text.split(f"\n## {outputs}\n")[1], re.MULTILINE)
    assert found == [label(entry) if "name" in entry else "" for entry in node["outputs"].values()]


def test_every_translated_page_says_the_same_names_options_and_numbers():
    of_all(says_the_same_names_options_and_numbers, *translations())


def says_the_same_names_options_and_numbers(page: Path, code: str):
    """What changes in the English page without a word here shows up as a name or number that is missing."""
    english, text = both(page, code)
    assert code_spans(text) == code_spans(english)
    every = json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))
    known = {name for node in every.values() for name in node["inputs"]}
    said = {name for name in re.findall(r"(?<!\*)\*(\w+)\*(?!\*)", english) if name in known}
    assert not [name for name in said if f"*{name}*" not in text]
    numbers = r"\d+(?:\.\d+)?"
    assert not set(re.findall(numbers, english)) - set(re.findall(numbers, text))


def test_every_translated_page_calls_nodes_and_widgets_as_the_window_does():
    of_all(calls_nodes_and_widgets_as_the_window_does, *translations())


def calls_nodes_and_widgets_as_the_window_does(page: Path, code: str):
    _, text = both(page, code)
    every = words(code)
    nodes = {label(node, "display_name") for node in every.values()}
    assert not set(re.findall(r"\*\*(Chroma [^*]+)\*\*", text)) - nodes
    called: dict[str, set[str]] = {}
    for node in every.values():
        for name, entry in node["inputs"].items():
            called.setdefault(name, set()).add(label(entry))
    outputs = dict(re.findall(r"^- \*\*(\w+)\*\* 「([^」]+)」：", text, re.MULTILINE))
    for name, word in re.findall(r"(?<!\*)\*(\w+)\*「([^」]+)」", text):
        assert word in called.get(name, set()) | {outputs.get(name)}, f"{name}: {word}"
