"""Datasets as the training room has them: shown with the trainer's own crops, changed within their folder alone."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from PIL import Image

from _host import Host
from prompts import dataset
from waiting import until

IMAGES, CAPTIONS, CROPS, REMOVE, RESTORE = (
    f"/chromakit/datasets/{name}" for name in ("images", "captions", "crops", "remove", "restore")
)


@pytest.fixture
def folder(server: Host, request: pytest.FixtureRequest) -> Path:
    """Three images below ComfyUI's input, one of them without a caption; a folder of its own for each test."""
    where = server.base / "input" / "room" / request.node.name
    where.mkdir(parents=True)
    for name, size in {"wide": (200, 100), "tall": (100, 160), "bare": (64, 64)}.items():
        Image.new("RGB", size, (len(name) * 20, 90, 40)).save(where / f"{name}.png")
    (where / "wide.txt").write_text("a wide zxq")
    (where / "tall.txt").write_text("a tall sks")
    return where


def name_of(folder: Path) -> str:
    return f"room/{folder.name}"


def look(server: Host, folder: Path, **more: Any) -> dict[str, Any]:
    code, answer = server.post(IMAGES, {"folder": name_of(folder), "trigger": "zxq", "size": 64, **more})
    assert code == 200, answer
    return answer


def test_a_folder_is_shown_as_the_node_crops_it(server: Host, folder: Path):
    found = look(server, folder)
    images = {image["name"]: image for image in found["images"]}
    assert found["own"] and list(images) == ["bare.png", "tall.png", "wide.png"]
    assert (images["bare.png"]["skipped"], images["wide.png"]["caption"]) == ("no caption in bare.txt", "a wide zxq")
    asked = {"folder": name_of(folder), "trigger": "zxq", "resolution": 64}
    assert found["buckets"] == server.post("/chromakit/datasets/look", asked)[1]["buckets"]
    assert found["check"] == {
        "trigger": "zxq",
        "of": 2,
        "lacking": ["tall.png"],
        "stands_as": [{"word": "sks", "names": ["tall.png"]}],
    }
    names = [each["name"] for each in server.get("/chromakit/datasets")["folders"]]
    assert name_of(folder) in names and "sks_emblem" in names


def test_a_folder_that_is_still_to_be_made_is_empty_and_one_elsewhere_is_refused(server: Host):
    code, answer = server.post(IMAGES, {"folder": "room/new one"})
    assert (code, answer["images"], answer["folder"], answer["own"]) == (200, [], "room/new one", True)
    for name in ("../x", "/etc", "a/../../x", ".hidden", "x/.removed", "a\\b", "a\0", "x ", "."):
        code, answer = server.post(IMAGES, {"folder": name})
        assert code == 400 and "is no dataset that can be changed here" in answer["error"], name


def test_captions_are_written_and_a_stale_page_loses_nothing(server: Host, folder: Path):
    body = {"folder": name_of(folder), "captions": {"bare.png": "a bare zxq"}, "seen": {"bare.png": ""}}
    assert server.post(CAPTIONS, body)[0] == 200
    assert (folder / "bare.txt").read_text() == "a bare zxq\n"
    code, answer = server.post(CAPTIONS, body)
    assert code == 409 and "bare.png" in answer["error"] and (folder / "bare.txt").read_text() == "a bare zxq\n"
    assert "3 images" in server.run({"dataset": dataset(name_of(folder))})["outputs"]["dataset"]["text"][0]


def test_what_is_removed_is_out_of_the_dataset_and_comes_back(server: Host, folder: Path):
    code, answer = server.post(REMOVE, {"folder": name_of(folder), "names": ["wide.png"]})
    assert code == 200
    found = look(server, folder)
    assert [image["name"] for image in found["images"]] == ["bare.png", "tall.png"]
    assert found["removed"] == [{"batch": answer["batch"], "names": ["wide.png"]}]
    code, answer = server.post(RESTORE, {"folder": name_of(folder), "batch": answer["batch"]})
    assert (code, answer) == (200, {"names": ["wide.png"]}) and (folder / "wide.txt").read_text() == "a wide zxq"


def test_a_moved_crop_is_what_the_node_shows(server: Host, folder: Path):
    """The frame is 64 of 400 pixels wide: blue at the left end, red at the right one."""
    halves = Image.new("RGB", (400, 64), (0, 0, 255))
    halves.paste((255, 0, 0), (200, 0, 400, 64))
    halves.save(folder / "wide.png")
    for at, frame, channel in ((0.0, [0, 0, 0.16, 1], 2), (1.0, [0.84, 0, 1, 1], 0)):
        assert server.post(CROPS, {"folder": name_of(folder), "crops": {"wide.png": at}})[0] == 200
        image = next(each for each in look(server, folder)["images"] if each["name"] == "wide.png")
        assert image["crop"] == at and image["frame"] == pytest.approx(frame)
        asked = {"folder": name_of(folder), "trigger": "zxq", "resolution": 64}
        shown = server.post("/chromakit/datasets/look", asked)[1]["thumbnails"]
        data = next(each["image"] for each in shown if each["name"] == "wide.png").partition(",")[2]
        small = Image.open(io.BytesIO(base64.b64decode(data)))
        pixel = small.getpixel((small.width // 2, small.height // 2))
        assert isinstance(pixel, tuple) and pixel[channel] > 200 and pixel[2 - channel] < 60
    code, answer = server.post(CROPS, {"folder": name_of(folder), "crops": {"wide.png": 1.5}})
    assert code == 400 and "crops.wide.png is 1.5" in answer["error"]


def test_thumbnails_are_whole_small_and_confined(server: Host, folder: Path):
    def thumbnail(**query: Any) -> tuple[int, bytes]:
        return server.request("GET", f"/chromakit/datasets/thumbnail?{urlencode(query)}")

    code, body = thumbnail(folder=name_of(folder), name="wide.png", side=100)
    assert code == 200 and Image.open(io.BytesIO(body)).size == (100, 50)
    (folder / "secret.png").symlink_to(server.base / "host.log")
    (folder / "linked.png").symlink_to(Path(__file__).resolve())
    for name in ("../wide.png", "wide.txt", "gone.png", "", "linked.png"):
        code, body = thumbnail(folder=name_of(folder), name=name)
        assert code == 404 and b"error" in body, name


def test_the_examples_can_be_looked_at_and_not_changed(server: Host):
    code, answer = server.post(IMAGES, {"folder": "sks_emblem", "size": 64})
    assert code == 200 and not answer["own"] and len(answer["images"]) == 16
    for route, body in {
        CAPTIONS: {"captions": {"01.png": "x"}},
        REMOVE: {"names": ["01.png"]},
        CROPS: {"crops": {"01.png": 0.1}},
        RESTORE: {"batch": "1"},
    }.items():
        code, answer = server.post(route, {"folder": "sks_emblem", **body})
        assert code == 400 and "in ComfyUI's input folder" in answer["error"], route


def test_changes_are_undone_by_whoever_asks(server: Host, folder: Path):
    """The server holds what was done: captions, a converted image, a mask, and takes each back in turn."""
    name = name_of(folder)
    Image.new("RGB", (64, 64), (9, 9, 9)).save(folder / "old.tga")
    stream = io.BytesIO()
    Image.new("L", (200, 100), 255).save(stream, "PNG")
    mask = base64.b64encode(stream.getvalue()).decode()
    for route, body in {
        "captions": {"captions": {"bare.png": "a bare zxq"}, "label": "one"},
        "convert": {"names": ["old.tga"], "label": "two"},
        "mask": {"name": "wide.png", "mask": mask, "label": "three"},
    }.items():
        code, answer = server.post(f"/chromakit/datasets/{route}", {"folder": name, **body})
        assert code == 200, answer
    found = look(server, folder)
    images = {image["name"]: image for image in found["images"]}
    assert (found["done"], found["undone"], found["unread"]) == (["one", "two", "three"], [], 0)
    assert images["wide.png"]["mask"] and images["old.png"]["size"] == [64, 64] and "old.tga" not in images
    for _ in range(3):
        assert server.post("/chromakit/datasets/undo", {"folder": name})[0] == 200
    images = {image["name"]: image for image in look(server, folder)["images"]}
    assert not images["wide.png"]["mask"] and images["old.tga"]["convertible"] and images["bare.png"]["caption"] == ""
    assert server.post("/chromakit/datasets/redo", {"folder": name})[0] == 200
    assert look(server, folder)["undone"] == ["three", "two"] and (folder / "bare.txt").read_text() == "a bare zxq\n"
    code, answer = server.post("/chromakit/datasets/mask", {"folder": name, "name": "wide.png", "mask": "?"})
    assert code == 400 and "base 64" in answer["error"]


def captioned(server: Host, folder: Path, **body: Any) -> dict[str, Any]:
    """Have captions made, and wait for them."""
    code, answer = server.post("/chromakit/datasets/caption", {"folder": name_of(folder), **body})
    assert code == 200, answer
    query = urlencode({"folder": name_of(folder)})

    def over() -> dict[str, Any] | None:
        found = server.get(f"/chromakit/datasets/caption?{query}")
        return found if not found["waiting"] else None

    return until(over, "the captions", report=server.log_tail)


def test_any_node_that_makes_a_text_captions_what_has_none(server: Host, folder: Path):
    Image.new("RGB", (13, 64)).save(folder / "thin.png")
    assert {"node": "TestTagger", "title": "Tagger of the tests"} in server.get("/chromakit/datasets/captioners")[
        "nodes"
    ]
    found = captioned(server, folder, node="TestTagger", label="by a node")
    assert (found["written"], [each["name"] for each in found["failed"]]) == (1, ["thin.png"])
    assert "thirteen pixels are too few" in found["failed"][0]["error"]
    assert (folder / "bare.txt").read_text() == "dark, 64 by 64\n" and (folder / "wide.txt").read_text() == "a wide zxq"
    assert look(server, folder)["done"] == ["by a node"]
    assert server.post("/chromakit/datasets/undo", {"folder": name_of(folder)})[0] == 200

    (folder / "thin.png").unlink()
    graph = {
        "7": {"class_type": "LoadImage", "inputs": {"image": "whatever.png"}},
        "8": {"class_type": "TestTagger", "inputs": {"image": ["7", 0], "threshold": 0.1, "kind": "b"}},
        "9": {"class_type": "TestShorter", "inputs": {"text": ["8", 0]}},
        "10": {"class_type": "PreviewImage", "inputs": {"images": ["7", 0]}},
    }
    assert captioned(server, folder, graph=graph)["written"] == 1
    assert (folder / "bare.txt").read_text() == "bright\n", "the last node's text, with the graph's own threshold"
    for body, why in (
        ({"node": "TestShorter"}, "is no node that makes a text of an image by itself"),
        ({"graph": {"7": graph["7"], "10": graph["10"]}}, "it has none"),
        ({"graph": {"8": graph["8"]}}, "has 0 nodes Load Image"),
        ({"graph": {"8": "x"}}, "no prompt in API form"),
        ({}, "Say either"),
        ({"node": "TestTagger"}, "Every image"),
    ):
        code, answer = server.post("/chromakit/datasets/caption", {"folder": name_of(folder), **body})
        assert code == 400 and why in answer["error"], (body, answer)


def test_undo_steps_of_a_later_version_are_left_alone_and_the_room_works_without(server: Host, folder: Path):
    kept, later = folder / ".removed/history.json", '{"format": 2, "done": [], "undone": [], "more": 1}'
    kept.parent.mkdir()
    kept.write_text(later)
    shown = look(server, folder)
    assert "has the format 2, which a later version" in shown["warnings"][0] and len(shown["images"]) == 3
    assert "no change of this dataset can be undone" in shown["warnings"][0] and shown["done"] == shown["undone"] == []
    asked = {"folder": name_of(folder), "captions": {"bare.png": "a bare zxq"}, "seen": {"bare.png": ""}}
    assert server.post(CAPTIONS, asked)[0] == 200 and (folder / "bare.txt").read_text() == "a bare zxq\n"
    code, answer = server.post(REMOVE, {"folder": name_of(folder), "names": ["tall.png"]})
    assert code == 200 and not (folder / "tall.png").exists()
    assert server.post(RESTORE, {"folder": name_of(folder), "batch": answer["batch"]})[0] == 200
    code, answer = server.post("/chromakit/datasets/undo", {"folder": name_of(folder)})
    assert code >= 400 and "which a later version" in answer["error"]
    assert kept.read_text() == later and (folder / "tall.png").is_file()
