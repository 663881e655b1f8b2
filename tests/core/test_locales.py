"""The words of the window: every language says the same things as English, where the page looks for them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.locales import texts as _locales
from tools.locales.texts import (
    ENGLISH,
    FILES,
    FOLDER,
    escape,
    is_compiled,
    mark,
    own_problems,
    problems,
    record,
    texts,
    translation_problems,
    translations,
)

SEED = "nodeDefs.ChromaSampler.inputs.seed"


def recorded(english: dict[str, str], words: dict[str, str]) -> dict[str, str]:
    return record(english, words, {})


def test_every_language_is_complete_and_current():
    """What is missing, left over, empty, untranslated, stale, or spelled so that the page would misread it."""
    assert problems() == []


def test_there_are_two_languages():
    assert (FOLDER / ENGLISH).is_dir() and "zh" in translations()


def test_a_file_is_there_in_every_language_or_in_none():
    languages = {ENGLISH, *translations()}
    present = {name: {at for at in languages if (FOLDER / at / f"{name}.json").is_file()} for name in FILES}
    assert {name: found for name, found in present.items() if found not in (set(), languages)} == {}


def test_chinese_is_chinese():
    """Every description and tooltip has Chinese in it, and none has a full sentence of English left."""
    sentences = {key: text for key, text in texts("zh").items() if key.endswith((".tooltip", ".description"))}
    assert len(sentences) > 200
    assert [key for key, text in sentences.items() if not any("\u4e00" <= letter <= "\u9fff" for letter in text)] == []
    assert [key for key, text in sentences.items() if text.isascii() or " the " in text] == []


def test_what_a_tooltip_calls_a_node_or_a_widget_is_what_the_page_calls_it():
    """「…」 in Chinese names a node or an input of ours, or begins with a name that the host itself uses."""
    words = {key: text for key, text in texts("zh").items() if key.startswith("nodeDefs.")}
    names = {text.split(" (")[0] for key, text in words.items() if key.endswith((".display_name", ".name"))}
    hosts = {"VAE编码", "VAE解码", "预览任意", "加载 LoRA 模型", "保存 LoRA", "绘制损失图", "自定义采样器（高级）"}
    hosts |= {"UNet加载器", "加载CLIP", "加载VAE", "Checkpoint加载器（简易）", "训练 LoRA"}
    quoted = {quote.split("」")[0] for text in words.values() for quote in text.split("「")[1:]}
    assert quoted - names - hosts == set()


def test_english_names_are_the_widgets_own():
    """Whoever uses the page in English sees the names that the API and the docs use, or, where the meaning is the same,
    those of ComfyUI's KSampler."""
    tree = json.loads((FOLDER / ENGLISH / "nodeDefs.json").read_text(encoding="utf-8"))
    slots = [slot for node in tree.values() for slot in node["inputs"].items()]
    others = {name: slot["name"] for name, slot in slots if slot["name"] != name}
    assert others == {"guidance": "cfg", "method": "sampler_name", "spacing": "scheduler"}


def test_a_new_english_text_is_named():
    english = {f"{SEED}.name": "seed", f"{SEED}.tooltip": "The noise."}
    words = {f"{SEED}.name": "种子"}
    found = list(translation_problems(english, words, recorded(english, words)))
    assert found == [f"{SEED}.tooltip: missing; in English: The noise."]


def test_a_text_that_english_no_longer_has_is_named():
    words = {f"{SEED}.name": "种子"}
    assert list(translation_problems({}, words, {})) == [f"{SEED}.name: there is no such text in English (any more)"]


def test_a_text_left_in_english_is_named_but_a_proper_name_is_not():
    english = {f"{SEED}.name": "seed", "nodeDefs.ChromaX.display_name": "LoRA"}
    english["main.chromakit.step"] = "{step} / {steps}"  # nothing to translate
    (found,) = translation_problems(english, english, recorded(english, english))
    assert found == f"{SEED}.name: not translated: seed"


def test_placeholders_must_be_the_same():
    english = {"main.chromakit.left": "{minutes} min of {total}"}
    words = {"main.chromakit.left": "{total} 中的 {minute} 分钟"}
    (found,) = translation_problems(english, words, recorded(english, words))
    assert "other placeholders" in found
    words = {"main.chromakit.left": "{total} 中的 {minutes} 分钟"}
    assert list(translation_problems(english, words, recorded(english, words))) == []


def test_english_that_changed_makes_its_translation_stale_until_that_changes_too():
    key = f"{SEED}.tooltip"
    words = {key: "噪声。"}
    sources = recorded({key: "The noise."}, words)
    changed = {key: "The noise to start from."}
    sources = record(changed, words, sources)  # the script runs again; nobody has looked at the translation
    assert list(translation_problems(changed, words, sources)) == [
        f"{key}: the English has changed; it is now: The noise to start from."
    ]
    anew = {key: "初始噪声。"}
    (found,) = translation_problems(changed, anew, sources)
    assert "not recorded" in found
    assert list(translation_problems(changed, anew, record(changed, anew, sources))) == []
    assert list(translation_problems(changed, words, record(changed, words, sources, still_right=[key]))) == []


def test_a_record_names_both_texts_and_drops_what_is_gone():
    key = f"{SEED}.name"
    sources = {key: "old old", "nodeDefs.Gone.display_name": "old old"}
    assert record({key: "seed"}, {key: "种子", "nodeDefs.Gone.display_name": "旧"}, sources) == {
        key: f"{mark('seed')} {mark('种子')}"
    }


def test_which_texts_the_page_compiles():
    wanted = {
        "nodeDefs.ChromaSampler.display_name": True,
        "nodeDefs.ChromaSampler.description": True,
        f"{SEED}.name": True,
        f"{SEED}.tooltip": False,
        "nodeDefs.ChromaSampler.outputs.0.tooltip": False,
        "settings.Chroma_WhileTraining.tooltip": True,
        "commands.Chroma_Open.label": True,
        "main.settingsCategories.Chroma": True,
        "main.chromakit.paused": False,
    }
    assert {key: is_compiled(key) for key in wanted} == wanted


def test_special_characters_are_escaped_where_the_page_compiles_and_only_there():
    assert escape("50 % of {a|b} @ 1") == "50 {'%'} of {'{'}a{'|'}b{'}'} {'@'} 1"
    name, tooltip = f"{SEED}.name", f"{SEED}.tooltip"
    assert list(own_problems({name: escape("a @ b"), tooltip: "a @ b | {c}"})) == []
    assert list(own_problems({"main.chromakit.step": "step {step}"})) == []
    assert list(own_problems({name: "step {step}"})) == [f"{name}: the page takes {{ for syntax; write {{'{{'}}"]
    assert list(own_problems({name: "a @ b"})) == [f"{name}: the page takes @ for syntax; write {{'@'}}"]
    (found,) = own_problems({tooltip: escape("a @ b")})
    assert "write the bare character" in found


def test_what_is_no_text_is_named():
    found = list(own_problems({f"{SEED}.name": " ", f"{SEED}.tooltip": None}))
    assert found == [f"{SEED}.name: empty", f"{SEED}.tooltip: a text is wanted, null was found"]


def test_a_file_that_is_not_json_is_named(monkeypatch, tmp_path: Path):
    """The host only logs it and goes on without the language."""
    monkeypatch.setattr(_locales, "ROOT", tmp_path)
    (tmp_path / "main.json").write_text('{"a": ', encoding="utf-8")
    with pytest.raises(ValueError, match=r"main\.json is not JSON"):
        _locales.load(tmp_path / "main.json")
