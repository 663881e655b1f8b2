"""Writes locales/en/nodeDefs.json from what the running host says about the pack's nodes, and into main.json what the
core says of datasets; checks the translations.

Usage:

    python -m tools.locales.build            write the English file; record which English each translation is of
    python -m tools.locales.build --check    write nothing; exit status 1 if anything is not current or not complete
    python -m tools.locales.build --still-right KEY ...    as the first, after an English text changed in such a way
                                               that these translations of it need no change

Each also says, for every other language, what is missing, left over or stale. See docs/translating.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from _environment import ROOT, ensure_environment
from _host import pack_node_ids, start_host
from chroma_core.data.remarks import REMARKS

from .texts import ENGLISH, FOLDER, SOURCES, escape, flatten, load, part, problems, record, texts, translations

NODES, MAIN = (FOLDER / ENGLISH / name for name in ("nodeDefs.json", "main.json"))


def node_words(info: dict[str, Any]) -> dict[str, Any]:
    """One node's texts from its entry in `/object_info`, where the page looks for them.

    An output that is named like its type has no name here: the page then shows the type's.
    """
    words: dict[str, Any] = {"display_name": escape(info["display_name"])}
    if info.get("description"):
        words["description"] = escape(info["description"])
    inputs = {}
    for kind in ("required", "optional"):
        for name in info["input_order"].get(kind, []):
            options = (info["input"][kind][name][1:] or [{}])[0]
            inputs[part(name)] = _slot(options.get("display_name") or name, options.get("tooltip"))
    tooltips = info.get("output_tooltips") or [None] * len(info["output"])
    outputs = {}
    for index, (name, kind, tooltip) in enumerate(zip(info["output_name"], info["output"], tooltips, strict=True)):
        outputs[str(index)] = _slot(None if name == kind else name, tooltip)
    for key, slots in (("inputs", inputs), ("outputs", outputs)):
        if slots := {name: slot for name, slot in slots.items() if slot}:
            words[key] = slots
    return words


def _slot(name: str | None, tooltip: str | None) -> dict[str, str]:
    """Tooltips are not escaped: the page shows them as they stand."""
    return ({"name": escape(name)} if name else {}) | ({"tooltip": tooltip} if tooltip else {})


def as_json(tree: Any) -> str:
    return json.dumps(tree, indent=2, ensure_ascii=False) + "\n"


def render(object_info: dict[str, Any]) -> str:
    """The text of locales/en/nodeDefs.json."""
    return as_json({part(node): node_words(object_info[node]) for node in pack_node_ids()})


def english_words(object_info: dict[str, Any]) -> dict[str, Any]:
    """Every English text by its key, those of the nodes as the host has them now and remarks as the core has them."""
    nodes = dict(flatten(json.loads(render(object_info)), "nodeDefs"))
    own = {key: text for key, text in texts(ENGLISH).items() if not key.startswith("nodeDefs.")}
    return nodes | own | dict(flatten(REMARKS, "main.chromakit.remark"))


def outdated(object_info: dict[str, Any]) -> list[str]:
    """The keys whose English text is not what the pack says, one line each; empty if the files are current."""
    wanted, present = english_words(object_info), texts(ENGLISH)
    differing = [key for key in wanted | present if wanted.get(key) != present.get(key)]
    if not differing and NODES.read_text(encoding="utf-8") != render(object_info):
        differing = ["nodeDefs.json, its layout"]
    return [f"{ENGLISH}: {key}: not as the pack has it; run python -m tools.locales.build" for key in differing]


def recorded(still_right: list[str]) -> str:
    """The text of locales/sources.json as it should be now; `still_right` as `texts.record` has it."""
    english, sources = texts(ENGLISH), load(SOURCES)
    return as_json(
        {
            language: record(english, texts(language), sources.get(language, {}), still_right)
            for language in translations()
        }
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="change nothing; exit status 1 if anything is to be done")
    what.add_argument("--still-right", nargs="+", default=[], metavar="KEY", help="translations that stand as they are")
    arguments = parser.parse_args()
    translated = {key for language in translations() for key in texts(language)}
    if unknown := [key for key in arguments.still_right if key not in translated]:
        parser.error(f"no translation has {', '.join(unknown)}; copy the key from what this script says is stale")
    ensure_environment()
    with tempfile.TemporaryDirectory() as base, start_host(Path(base)) as host:
        object_info = host.get("/object_info")
    if arguments.check:
        found = [*outdated(object_info), *problems(english_words(object_info))]
        print("\n".join(found) or "every text is there and current")
        return 1 if found else 0
    NODES.parent.mkdir(parents=True, exist_ok=True)
    NODES.write_text(render(object_info), encoding="utf-8")
    main = load(MAIN)
    main["chromakit"]["remark"] = REMARKS
    MAIN.write_text(as_json(main), encoding="utf-8")
    SOURCES.write_text(recorded(arguments.still_right), encoding="utf-8")
    print("wrote", ", ".join(str(path.relative_to(ROOT)) for path in (NODES, MAIN, SOURCES)))
    if found := problems():
        print("\n".join(["to be done:", *found]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
