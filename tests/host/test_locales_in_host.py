"""The words of the window, held against what the running host says about the nodes, and as it hands them out."""

from __future__ import annotations

import copy
import json

from _host import Host
from tools.locales.build import english_words, node_words, outdated
from tools.locales.texts import ENGLISH, FILES, FOLDER, load, problems, translations


def test_the_english_file_is_current(server: Host):
    assert outdated(server.get("/object_info")) == [], "run: python -m tools.locales.build"


def test_a_new_input_is_named_in_every_language(server: Host):
    """As after a merge: before the script is run again, the check already says what the translators have to do."""
    info = server.get("/object_info")
    info = info | {"ChromaTailSigmas": copy.deepcopy(info["ChromaTailSigmas"])}
    info["ChromaTailSigmas"]["input"]["required"]["new_knob"] = ["FLOAT", {"tooltip": "Turns | it."}]
    info["ChromaTailSigmas"]["input_order"]["required"].append("new_knob")
    key = "nodeDefs.ChromaTailSigmas.inputs.new_knob"
    assert [line.split(": ")[1] for line in outdated(info)] == [f"{key}.name", f"{key}.tooltip"]
    assert problems(english_words(info)) == [
        line
        for language in translations()
        for line in (
            f"{language}: {key}.name: missing; in English: new_knob",
            f"{language}: {key}.tooltip: missing; in English: Turns | it.",
        )
    ]


def test_names_are_escaped_and_tooltips_are_not():
    info = {
        "display_name": "A @ B",
        "description": "{x}",
        "input": {"required": {"model.part": ["INT", {"tooltip": "a | b"}]}},
        "input_order": {"required": ["model.part"]},
        "output": ["MODEL", "INT"],
        "output_name": ["MODEL", "50%"],
        "output_tooltips": ["{y}", None],
    }
    assert node_words(info) == {
        "display_name": "A {'@'} B",
        "description": "{'{'}x{'}'}",
        "inputs": {"model_part": {"name": "model.part", "tooltip": "a | b"}},
        "outputs": {"0": {"tooltip": "{y}"}, "1": {"name": "50{'%'}"}},
    }


def test_the_host_hands_out_both_languages(server: Host):
    given = server.get("/i18n")
    for language in [ENGLISH, *translations()]:
        files = {name: load(FOLDER / language / f"{name}.json") for name in FILES}
        wanted = files.pop("main") | {name: tree for name, tree in files.items() if tree}
        assert json.loads(json.dumps(given[language])) == wanted
