"""The words of the window in several languages: where they stand, how the page reads them, what must hold for them.

`locales/<language>/` has up to four files, as the host wants them: `nodeDefs.json` (made by `build.py` for
English, translated by hand for the others), `commands.json`, `settings.json` and `main.json`. A text's key is the path
to it, e.g. `nodeDefs.ChromaSampler.inputs.seed.tooltip`. docs/translating.md says how to work with them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from _environment import ROOT

FOLDER = ROOT / "locales"
ENGLISH = "en"
FILES = ("nodeDefs", "commands", "settings", "main")
SOURCES = FOLDER / "sources.json"

# Texts that are the same in every language: proper names, and terms that nobody translates.
SAME_EVERYWHERE = {"Chroma", "ComfyUI", "LoRA", "T5", "TensorBoard", "VAE"}

# What the page's message compiler (vue-i18n) reads as syntax.
SYNTAX = re.compile(r"[{}@|%]")
LITERAL = re.compile(r"\{'[^']*'\}")
PLACEHOLDER = re.compile(r"\{\w+\}")
WORD = re.compile(r"[^\W\d_]")
TOOLTIP_OF_A_SOCKET = re.compile(r"nodeDefs\.\w+\.(inputs|outputs)\.\w+\.tooltip")
# Of main.json, only these are read by the host's page; the others are our own script's, which compiles nothing.
COMPILED_IN_MAIN = ("main.settingsCategories.", "main.nodeCategories.", "main.dataTypes.")


def escape(text: str) -> str:
    """The text as the page's message compiler has to get it in order to show it literally. Apply it once."""
    return SYNTAX.sub(lambda match: f"{{'{match[0]}'}}", text)


def is_compiled(key: str) -> bool:
    """Whether the page compiles the text before it shows it.

    It shows the tooltips of inputs and outputs as they stand, so that an escape would be seen there; everything else
    that it reads from these files is a message.
    """
    if key.startswith("main."):
        return key.startswith(COMPILED_IN_MAIN)
    return not TOOLTIP_OF_A_SOCKET.fullmatch(key)


def part(name: str) -> str:
    """A node's, an input's, a setting's or a command's id as a part of a key: a dot would begin the next part."""
    return name.replace(".", "_")


def flatten(tree: dict[str, Any], above: str) -> Iterator[tuple[str, Any]]:
    """(key, text) of everything in a file, in the file's order."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{above}.{name}")
        else:
            yield f"{above}.{name}", value


def load(path: Path) -> dict[str, Any]:
    """A JSON file, empty if there is none. Raises ValueError, naming the file, for what is not a JSON object."""
    if not path.is_file():
        return {}
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.relative_to(ROOT)} is not JSON: {error}. The host would ignore the file.") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path.relative_to(ROOT)} holds a {type(tree).__name__}; the host wants an object.")
    return tree


def texts(language: str) -> dict[str, Any]:
    """Every text of a language by its key."""
    return {key: text for name in FILES for key, text in flatten(load(FOLDER / language / f"{name}.json"), name)}


def translations() -> list[str]:
    """The languages besides English that have a folder."""
    return sorted(path.name for path in FOLDER.iterdir() if path.is_dir() and path.name != ENGLISH)


def syntax_problem(key: str, text: str) -> str | None:
    """Why the page would not show this text as it is meant, or None."""
    if key.startswith("nodeDefs.") and not is_compiled(key):
        found = LITERAL.search(text)
        return f"the page shows {found[0]} as it stands here; write the bare character" if found else None
    if not is_compiled(key):
        return None
    found = SYNTAX.search(LITERAL.sub("", text))  # a placeholder too: the host's page has nothing to put in its place
    return f"the page takes {found[0]} for syntax; write {escape(found[0])}" if found else None


def own_problems(words: dict[str, Any]) -> Iterator[str]:
    """What is wrong with the texts of one language, whatever the others say."""
    for key, text in words.items():
        if not isinstance(text, str):
            yield f"{key}: a text is wanted, {json.dumps(text)} was found"
        elif not text.strip():
            yield f"{key}: empty"
        elif problem := syntax_problem(key, text):
            yield f"{key}: {problem}"


def translation_problems(english: dict[str, Any], words: dict[str, Any], sources: dict[str, str]) -> Iterator[str]:
    """What keeps a translation from being complete and current; `sources` are the language's in sources.json."""
    for key in english:
        if key not in words:
            yield f"{key}: missing; in English: {english[key]}"
    for key, text in words.items():
        if key not in english:
            yield f"{key}: there is no such text in English (any more)"
            continue
        source = english[key]
        if not isinstance(text, str) or not isinstance(source, str):
            continue
        if text == source and text not in SAME_EVERYWHERE and WORD.search(PLACEHOLDER.sub("", text)):
            yield f"{key}: not translated: {text}"
        if sorted(PLACEHOLDER.findall(text)) != sorted(PLACEHOLDER.findall(source)):
            yield f"{key}: other placeholders than in English: {text}"
        of_source, _, of_text = sources.get(key, "").partition(" ")
        if of_text != mark(text):
            yield f"{key}: not recorded; run python -m tools.locales.build"
        elif of_source != mark(source):
            yield f"{key}: the English has changed; it is now: {source}"


def mark(text: str) -> str:
    """A short fingerprint of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def record(
    english: dict[str, str], words: dict[str, str], sources: dict[str, str], still_right: Iterable[str] = ()
) -> dict[str, str]:
    """A language's part of sources.json: for each text, the mark of the English that it translates, and its own.

    Only a text that was changed since the last time, or is named in `still_right`, is taken for a translation of the
    English as it is now; so an English text that changes alone leaves its translation stale.
    """
    still_right = set(still_right)
    recorded = {}
    for key, text in words.items():
        if key not in english:
            continue
        untouched = sources.get(key, "").partition(" ")[2] == mark(text) and key not in still_right
        recorded[key] = sources[key] if untouched else f"{mark(english[key])} {mark(text)}"
    return dict(sorted(recorded.items()))


def problems(english: dict[str, Any] | None = None) -> list[str]:
    """Everything that is wrong in `locales/`, one line each, with the language in front.

    `english`: the English texts to hold the translations against, if not those in the folder.
    """
    english, sources = english or texts(ENGLISH), load(SOURCES)
    found = [f"{ENGLISH}: {line}" for line in own_problems(english)]
    for language in (languages := translations()):
        words = texts(language)
        lines = [*own_problems(words), *translation_problems(english, words, sources.get(language, {}))]
        found += [f"{language}: {line}" for line in lines]
    return found + [f"{name}: is in sources.json, but has no folder" for name in sources if name not in languages]
