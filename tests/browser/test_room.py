"""The training room in the host's own page: from files on a desk to a job, by hand and by keyboard, for everybody."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tools import room_walk
from tools.workflows.look import lying
from training_page import AXE, RENDERER, THEME, fast, grave, slow, stop_all, until

FRESH = {"step": "images", "folder": "", "trigger": "", "size": 0, "aim": "", "job": "", "typed": {}}
OPEN = "view => import('/extensions/chromakit/js/room/room.js').then(({ openRoom }) => openRoom(view))"
MOST_ACTIONS = 42
TAB = "() => window.app.extensionManager.sidebarTab.toggleSidebarTab('chromakit')"
MOVING = """() => [...document.querySelectorAll('.ck-room, .ck-room *')].filter(element => {
    const { animationName, transitionDuration } = getComputedStyle(element);
    return animationName !== 'none' || transitionDuration.split(', ').some(each => each !== '0s');
}).map(element => element.className)"""
FOCUS = "() => document.activeElement.closest('[data-action], [role=tab], .ck-card')?.outerHTML ?? 'nothing'"


@pytest.fixture
def page(window) -> Iterator[Any]:
    """The page at 1280 × 720; the room is closed, and nothing trains, afterwards."""
    page = window.page
    size = page.viewport_size
    page.set_viewport_size({"width": 1280, "height": 720})
    page.evaluate(OPEN, FRESH)  # forgets what another test looked at
    page.keyboard.press("Escape")
    yield page
    page.evaluate(THEME, "dark")
    page.set_viewport_size(size)
    if page.locator(".ck-room").count():
        page.get_by_role("button", name="Close the training room").click()
    stop_all(window.server)


@pytest.fixture
def desk(tmp_path: Path) -> list[str]:
    """Files as they lie on a desk: four images of different shapes, a twin, a broken one, captions, two strangers."""
    sizes = {"wide.jpg": (120, 70), "tall.png": (60, 100), "square.webp": (80, 80), "plain.png": (64, 64)}
    for i, (name, size) in enumerate(sizes.items()):
        Image.new("RGB", size, (60 * i, 200 - 40 * i, 90)).save(tmp_path / name)
    (tmp_path / "wide2.jpg").write_bytes((tmp_path / "wide.jpg").read_bytes())
    (tmp_path / "broken.png").write_bytes(b"no image")
    (tmp_path / "clip.mp4").write_bytes(b"no image either")
    texts = {"wide": "a zxq star, red, wide", "tall": "a sks star, green, tall", "square": "a zxq star, blue"}
    for name, text in {**texts, "wide2": "a zxq star", "lost": "of no image"}.items():
        (tmp_path / f"{name}.txt").write_text(text)
    return [str(path) for path in sorted(tmp_path.iterdir())]


def filled(page: Any, name: str, files: list[str], cards: int) -> None:
    """Open the room, make a dataset and upload files into it."""
    page.evaluate(OPEN, {})
    page.locator("[data-choice=folder]").select_option(label="+ New folder…")
    page.get_by_label("Name of the new folder").fill(name)
    page.keyboard.press("Enter")
    page.get_by_label("Trigger word").first.fill("zxq")
    page.get_by_label("Crops at").select_option("64")
    page.set_input_files(".ck-bar input[type=file]", files)
    page.wait_for_function("n => document.querySelectorAll('.ck-card').length === n", arg=cards)
    page.get_by_text("Uploaded to").wait_for()


@pytest.mark.slow
@pytest.mark.parametrize("vue", [False, True], ids=["canvas", "vue"])
def test_the_whole_walk(window, page: Any, tmp_path: Path, vue: bool):
    """Thirty mixed images, dropped; mended, trained, one step of them chosen and kept, and used in ComfyUI's own nodes:
    by a user's hand alone, without the file system or a node."""
    server, name = window.server, f"walked-{'vue' if vue else 'canvas'}"
    page.evaluate(RENDERER, vue)
    seen = set(server.get("/history"))
    hand = room_walk.Hand(page, lambda what: window.screenshot(f"walk_{name}_{what}"))
    room_walk.walk(hand, room_walk.desk(tmp_path / "desk"), name, room_walk.SHORT)

    folder = server.base / "input" / name
    names = {path.name for path in folder.iterdir()}
    assert {"export.png", "scan.png", "export.txt", "04.txt", "09.txt", "h2.txt"} <= names
    assert not {"export.jp2", "scan.tga", "cut off.png", "empty.jpg", "copy of 01.png"} & names
    assert json.loads((folder / "chromakit-crops.json").read_text())["crops"] == {"wide.png": 1}
    (job,) = [each for each in server.get("/chromakit/jobs") if each["name"] == f"{name}-object"]
    config = job["config"]
    assert (config["dataset"]["trigger"], config["model"]["flavour"]) == ("sks", "tiny")
    assert config["steps"] == room_walk.SHORT
    assert config["previews"]["prompts"] == list(room_walk.PROMPTS) and config["preserve"]["class_word"] == "object"
    assert config["previews"]["every"] == config["validate_every"] == 1, "a short job has its previews, too"
    kept = {path.name for path in (server.base / "output" / "loras").glob(f"{name}-object-step-*")}
    assert {Path(file).suffix for file in kept} == {".safetensors", ".png", ".md"}

    def used() -> bool:
        graphs = [each["prompt"][2] for prompt, each in server.get("/history").items() if prompt not in seen]
        return any(node["class_type"] == "KSampler" for graph in graphs for node in graph.values())

    until(page, server, used, "the prompt with ComfyUI's own nodes in the history")
    assert lying(page) == []
    assert len(hand.done) <= MOST_ACTIONS and window.ours == []


def test_files_come_in_and_are_mended(window, page: Any, desk: list[str]):
    server, folder = window.server, window.server.base / "input" / "stars"

    def saw(condition: Callable[[], Any], what: str) -> None:
        until(page, server, condition, what)

    filled(page, "stars", desk, 6)
    window.screenshot("room_1_uploaded")
    told = page.locator(".ck-uploads").inner_text()
    assert "clip.mp4: not an image" in told and "lost.txt: no image of that name" in told
    assert "6 images: 4 trained, 2 skipped" in page.locator(".ck-summary").inner_text()
    assert "no caption in plain.txt" in page.locator("[data-name='plain.png']").inner_text()
    checks = page.locator(".ck-checks")
    saw(lambda: "1 of 4 lack zxq." in checks.inner_text(), "the look at the trigger word")
    assert "“zxq” once stands as “sks”." in checks.inner_text()

    page.get_by_role("button", name="Replace sks by zxq").click()
    saw(lambda: "All 4 captions have zxq." in checks.inner_text(), "the trigger in all captions")
    assert (folder / "tall.txt").read_text() == "a zxq star, green, tall\n"
    page.get_by_role("button", name="Undo").click()
    saw(lambda: (folder / "tall.txt").read_text() == "a sks star, green, tall\n", "the old caption")
    page.get_by_role("button", name="Redo").click()
    saw(lambda: "All 4 captions have zxq." in checks.inner_text(), "the trigger again")

    slow(page, "datasets/captions", 1000, 1000)
    page.get_by_role("button", name="Write a caption").click()
    page.keyboard.type("a zxq star, grey, plain")
    page.keyboard.press("Tab")
    saw(lambda: (folder / "plain.txt").is_file(), "the caption of the fourth image")
    for _ in range(2):
        page.keyboard.press("Shift+ArrowRight")  # the first tag, on which Tab has landed, to the end
    saw(lambda: (folder / "plain.txt").read_text() == "grey, plain, a zxq star\n", "the tags in another order")
    assert page.evaluate("() => document.activeElement.textContent") == "a zxq star", "no key was lost, nor their place"
    fast(page)
    page.get_by_role("button", name="Take the copy out").click()
    page.get_by_role("button", name="Take it out").click()
    saw(lambda: "4 images: 4 trained, 0 skipped" in page.locator(".ck-summary").inner_text(), "four images")
    assert not (folder / "wide2.jpg").exists() and len(list((folder / ".removed").rglob("wide2.*"))) == 2

    frame = page.locator("[data-name='wide.jpg'] .ck-crop")
    frame.focus()
    page.keyboard.press("End")
    crops = folder / "chromakit-crops.json"
    saw(lambda: crops.is_file() and json.loads(crops.read_text())["crops"] == {"wide.jpg": 1}, "the moved crop")
    page.locator(".ck-replace summary").click()
    page.get_by_label("Find", exact=True).fill("star")
    page.get_by_label("Replace by").fill("comet")
    assert "4 times in 4 captions" in page.locator(".ck-replace").inner_text()
    page.get_by_role("button", name="Replace all").click()
    saw(lambda: (folder / "wide.txt").read_text() == "a zxq comet, red, wide\n", "the replaced word")
    window.screenshot("room_2_mended")

    mask = page.get_by_role("button", name="Paint a mask on wide.jpg")
    mask.click()
    canvas = page.locator(".ck-mask").bounding_box()
    page.mouse.move(canvas["x"] + 5, canvas["y"] + 5)
    page.mouse.down()
    page.mouse.move(canvas["x"] + 60, canvas["y"] + 40)
    page.mouse.up()
    page.locator(".ck-mask").focus()
    for key in [*"]" * 6, *["ArrowLeft"] * 10, *["ArrowDown"] * 10, "Space"]:
        page.keyboard.press(key)
    window.screenshot("room_mask")
    page.get_by_role("button", name="Keep the mask").click()
    saw(lambda: (folder / "wide-masklabel.png").is_file(), "the mask")
    assert "wide.jpg" in page.evaluate("() => document.activeElement.ariaLabel"), "the focus is back"
    with Image.open(folder / "wide-masklabel.png") as drawn:
        assert drawn.mode == "L" and drawn.getextrema() == (0, 255) and drawn.getpixel((119, 69)) == 255
        assert drawn.getpixel((1, drawn.height - 2)) == 0, "painted by keys"

    page.get_by_role("button", name="Next: Aim").click()
    needs = page.locator(".ck-needs")
    saw(lambda: "4 images are few" in needs.inner_text(), "what the first aim needs")
    slow(page, "datasets/images", 0, 1000)
    page.locator("[data-aim=object]").click()
    assert "4 images are few; 8 or more are advised." in needs.inner_text(), "of this aim, before anybody answers"
    fast(page)
    page.locator("[data-field=flavour]").select_option("tiny")
    page.locator("[data-field=steps]").fill("2")
    page.locator("[data-field=prompts]").fill("a [trigger] comet")
    page.locator(".ck-room").get_by_text("Best for training").wait_for()
    assert "4 images are few; 8 or more are advised." in needs.inner_text()
    window.screenshot("room_3_aim")
    kept = "/settings/Chroma.Room"
    saw(lambda: server.get(kept)["typed"].get("steps") == "2", "what was typed, on the server")
    page.keyboard.press("Escape")
    page.evaluate(OPEN, {})
    prompts = page.locator("[data-field=prompts]")
    saw(lambda: prompts.input_value() == "a [trigger] comet", "the same when one comes back")
    page.keyboard.press("Alt+1")
    page.get_by_role("button", name="Undo").click()
    saw(lambda: not (folder / "wide-masklabel.png").exists(), "the last change taken back after the room was closed")

    (folder / "plain.txt").unlink()
    page.locator(".ck-room").get_by_role("button", name="Refresh").click()
    page.locator("summary", has_text="Caption all").click()
    page.get_by_label("Made by").select_option("TestTagger")
    page.get_by_role("button", name="Caption 1", exact=True).click()
    saw(lambda: (folder / "plain.txt").is_file() and (folder / "plain.txt").read_text(), "a caption by a node")
    page.get_by_text("1 captions written").wait_for()
    assert (folder / "plain.txt").read_text() == "dark, 64 by 64\n" and window.ours == []


def test_what_is_dropped_before_the_folders_are_known_arrives(window, page: Any, desk: list[str]):
    """So does what is dropped before the folder has a name, or while others are uploaded."""
    server, hand = window.server, room_walk.Hand(page, window.screenshot)
    slow(page, "chromakit/datasets", 0, 1500)
    page.evaluate(OPEN, FRESH)
    for part in (desk[:4], desk[4:]):
        hand.drop([Path(path) for path in part])
    hand.until(f"the {len(desk)} files go into it")
    hand.type("early")
    hand.key("Alt+2")
    hand.key("Alt+1")
    fast(page)
    until(page, server, lambda: page.locator("[data-choice=folder] option").count() > 3, "the folders")
    slow(page, "/upload/image", 1000, 0)
    page.get_by_label("Name of the new folder").press("Enter")
    hand.until("Uploading to early: 0 of 6")
    fast(page)
    hand.until("Uploaded to early")
    told = page.locator(".ck-uploads [role=alert] li").all_inner_texts()
    assert [text.split(":")[0] for text in told] == ["clip.mp4", "lost.txt"]
    assert page.locator(".ck-card").count() == 6

    slow(page, "/upload/image", 1000, 0)
    for stem in ("gone", "later", "last"):
        image, text = (Path(desk[0]).with_name(f"{stem}.{ending}") for ending in ("png", "txt"))
        Image.new("RGB", (70, 70), (len(stem), 9, 99)).save(image)
        text.write_text(f"a zxq star, {stem}")
        hand.drop([image, text])
        if stem == "gone":
            hand.press("Cancel")
    hand.until("Uploading to early")
    fast(page)
    hand.until("Uploaded to early: 3 of 3")
    told = page.locator(".ck-uploads [role=alert] li").all_inner_texts()
    assert [text.split(":")[0] for text in told] == ["gone.png"]
    saw = page.locator("[data-name='last.png'] textarea").input_value
    until(page, server, lambda: saw() == "a zxq star, last", "the caption of what was dropped last")
    assert page.locator(".ck-card").count() == 8 and window.ours == []


def test_a_host_that_does_not_answer_is_said_and_asked_again(window, page: Any, desk: list[str]):
    filled(page, "away", desk, 6)
    page.keyboard.press("Escape")
    page.context.set_offline(True)
    try:
        page.evaluate(OPEN, {"step": "aim", "aim": "object"})
        page.locator(".ck-needs").get_by_text("away could not be looked into: ComfyUI does not answer.").wait_for()
        assert "ComfyUI does not answer" in page.locator(".ck-notice").inner_text()
        assert page.locator("[data-aim]").count() == 0 and page.locator("[data-action=start]").is_disabled()
        window.screenshot("room_away")
    finally:
        page.context.set_offline(False)
    page.locator(".ck-needs").get_by_role("button", name="Refresh").click()
    page.locator("[data-aim=object][aria-checked=true]").wait_for()
    page.locator(".ck-needs").get_by_text("4 images are few; 8 or more are advised.").wait_for()
    page.locator(".ck-costs").get_by_text("Best for training").wait_for()
    window.errors.clear()  # the browser names each request that failed


def test_keys_and_focus(window, page: Any):
    """All by keyboard: the focus stays in the room, which no shortcut of the page's reaches, and returns."""
    page.evaluate(OPEN, FRESH)
    page.keyboard.press("Escape")
    page.evaluate(TAB)
    opener = page.locator(".ck-tab [data-action=room]")
    opener.focus()
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.querySelectorAll('[data-choice=folder] option').length > 1")
    assert 'id="ck-room-tab-images"' in page.evaluate(FOCUS)
    page.keyboard.press("ArrowRight")
    assert 'id="ck-room-tab-aim"' in page.evaluate(FOCUS)
    page.keyboard.press("Alt+1")
    assert 'id="ck-room-tab-images"' in page.evaluate(FOCUS)
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Tab")
    assert 'id="ck-room-tab-images"' in page.evaluate(FOCUS), "Tab goes round"
    page.evaluate("() => document.activeElement.blur()")
    page.keyboard.press("w")  # opens a panel of the page's, if it gets there
    assert page.locator(".ck-room").is_visible()
    page.keyboard.press("Escape")
    assert page.locator(".ck-room").count() == 0 and 'data-action="room"' in page.evaluate(FOCUS)
    page.evaluate(TAB)
    assert window.ours == []


@pytest.mark.skipif(not AXE.is_file(), reason="axe-core is not there: python scripts/test.py --browser fetches it")
def test_nothing_grave_is_found_by_axe(window, page: Any, desk: list[str]):
    filled(page, "seen by all", desk, 6)
    page.locator(".ck-replace summary").click()
    page.locator("[data-name='tall.png'] textarea").focus()
    found = {}
    for theme in ("dark", "light"):
        page.evaluate(THEME, theme)
        for step, there in enumerate((".ck-card", "[data-aim]", ".ck-watch", ".ck-choose"), 1):
            page.keyboard.press(f"Alt+{step}")
            page.locator(there).first.wait_for()
            window.screenshot(f"room_{theme}_{step}")
            found[theme, step] = grave(page)
    assert not any(found.values()), found


def test_a_narrow_window_a_zoom_and_stillness(window, page: Any, desk: list[str]):
    """640 × 360 is 1280 × 720 at 200 %: nothing sticks out to the right; and nothing moves for who asked for that."""
    filled(page, "narrow", desk, 6)
    page.emulate_media(reduced_motion="reduce")
    for width, height in ((700, 720), (640, 360)):
        page.set_viewport_size({"width": width, "height": height})
        for step, there in enumerate((".ck-card", "[data-aim]", ".ck-watch", ".ck-choose"), 1):
            page.keyboard.press(f"Alt+{step}")
            page.locator(there).first.wait_for()
            window.screenshot(f"room_narrow_{width}_{step}")
            wide = "() => document.querySelector('.ck-panel:not([hidden])').scrollWidth"
            assert page.evaluate(wide) <= width, (width, step)
            assert page.evaluate(MOVING) == [], step
    page.emulate_media(reduced_motion="no-preference")
