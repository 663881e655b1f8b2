"""The training room's wall of previews and its grid, by keys, up to the graph that repeats an image."""

from __future__ import annotations

import io
from typing import Any

import pytest
from PIL import Image

from _host import Host
from prompts import ACTIVE, at_defaults, job_of, train, until_not
from training_page import AXE, SIZE, THEME, fast, grave, slow, until

OPEN = "view => import('/extensions/chromakit/js/room/room.js').then(({ openRoom }) => openRoom(view))"
OWN = "a [trigger] star\na red circle"
BRACES = "a {red|blue} star // of two"
"""What the page's own text widgets would draw one of, and cut off."""


@pytest.fixture(scope="module")
def job(server: Host) -> str:
    """A completed job with previews of steps 0, 2 and 4, which kept the LoRAs of the last two."""
    settings = at_defaults(server, "ChromaTrainingSettings", preview_steps=3, preview_guidance=1.0)
    prompt = train("by keys", 4, settings=["settings", 0], preview_prompt=OWN, preview_every=2, rank=4)
    found = job_of(server.run(prompt | {"settings": settings}))
    assert until_not(server, found, ACTIVE) == "completed"
    return found


@pytest.fixture(autouse=True)
def clean(window):
    yield
    window.page.set_viewport_size(SIZE)
    if window.page.locator(".ck-room").count():
        window.page.locator(".ck-room [aria-label^='Close']").click()


def focused(page: Any) -> list[str]:
    """Row and column of the image that has the focus."""
    return page.evaluate(
        """() => { const cell = document.activeElement, row = cell.closest('[data-row]');
            return row ? [row.dataset.row, String([...row.children].indexOf(cell))] : [] }"""
    )


def seen_by_all(page: Any) -> None:
    """axe-core, where it was fetched, finds nothing grave in a dark and in a light theme."""
    for theme in ("light", "dark") if AXE.is_file() else ():
        page.evaluate(THEME, theme)
        assert grave(page) == [], theme


def press(page: Any, *keys: str) -> list[str]:
    for key in keys:
        page.keyboard.press(key)
    return focused(page)


@pytest.mark.slow
def test_a_lora_is_chosen_by_keys(window, server: Host, job: str):
    page = window.page
    page.set_viewport_size({"width": 1280, "height": 720})
    samples = f"**/{job}/samples/**"
    page.route(samples, lambda route: route.abort())
    page.evaluate(OPEN, {"job": job, "step": "watch"})
    wall = page.get_by_role("grid")
    lost = "e => [...e.querySelectorAll('img')].filter(i => i.complete && !i.naturalWidth).length"
    until(page, server, lambda: wall.evaluate(lost), "an image that does not come")
    page.unroute(samples)
    page.evaluate("() => window.app.api.dispatchCustomEvent('reconnected')")
    assert wall.get_by_role("rowheader").all_inner_texts() == ["base", "step 2", "step 4"]
    heads = wall.get_by_role("columnheader").all_inner_texts()
    assert heads == ["step", "a sks star", "a red circle"]
    assert wall.locator("[tabindex='0']").count() == 1, "one stop for the Tab key"
    until(
        page, server, lambda: wall.evaluate("e => [...e.querySelectorAll('img')].every(i => i.naturalWidth)"), "images"
    )
    wall.locator("[tabindex='0']").focus()
    assert focused(page) == ["0", "1"]
    assert press(page, "ArrowRight") == ["0", "2"]
    assert press(page, "ArrowDown", "ArrowDown", "ArrowDown") == ["4", "2"]
    assert press(page, "Control+Home", "End", "PageDown") == ["4", "2"]
    window.screenshot("room_watch_1280")
    seen_by_all(page)
    wall.locator("[tabindex='0']").focus()

    page.keyboard.press("Enter")
    large = page.get_by_role("dialog", name="step 4, a red circle")
    assert large.locator(".ck-tag").all_inner_texts() == ["step 2", "step 4"], "over the step before"
    page.keyboard.press("Home")
    assert large.locator(".ck-frame").evaluate("e => e.style.getPropertyValue('--ck-share')") == "0%"
    large.get_by_role("combobox").select_option("step-000000-1.png")
    assert large.locator(".ck-tag").all_inner_texts() == ["base", "step 4"]
    window.screenshot("room_enlarged")
    seen_by_all(page)
    page.keyboard.press("PageUp")
    page.keyboard.press("Escape")
    assert focused(page) == ["2", "2"], "the focus is back, at the image that was shown last"
    assert page.locator(".ck-room").count() == 1
    wall.locator("[tabindex='0']").evaluate("e => (e.dataset.same = 'yes')")
    code, _ = server.post(f"/chromakit/jobs/{job}/extend", {"steps": 2})
    until(page, server, lambda: wall.locator("[data-row='6'] img").count() == 2, "previews of the job that goes on")
    assert code == 200 and focused(page) == ["2", "2"] and page.evaluate("document.activeElement.dataset.same") == "yes"
    assert until_not(server, job, ACTIVE) == "completed"
    page.locator("summary", has_text="Curves").click()
    until(page, server, lambda: page.locator(".ck-watched .u-legend").count(), "the curve")
    page.locator("summary", has_text="Curves").click()

    page.locator("[data-action='choose']").click()
    choose = page.locator(".ck-chooser")
    until(page, server, lambda: choose.get_by_role("textbox").last.input_value(), "the job's own prompts")
    for step in (2, 4, 6):
        choose.get_by_role("checkbox", name=f"step {step}").set_checked(step != 6)
    strengths, prompts = choose.get_by_role("textbox").all()
    strengths.fill("0.5, x")
    prompts.fill(f"a [trigger] star\n{BRACES}")
    window.screenshot("room_choose_form")
    seen_by_all(page)
    page.locator("[data-action='make']").click()
    until(page, server, lambda: page.get_by_text("“x” is not a number").count(), "the refusal")
    strengths.fill("0.5, 1.5")
    assert page.locator("[data-action='make']").inner_text() == "Make the grid: 8 images"
    page.locator("[data-action='make']").click()
    grid = page.get_by_role("grid", name="Steps and strengths")
    until(page, server, lambda: grid.locator("img:not([hidden])").count() == 8, "the images")
    grid.locator("[tabindex='0']").focus()
    assert press(page, "Control+End") == ["4 1.5", "2"]
    page.keyboard.press("4")
    assert press(page, "ArrowLeft", "5") == ["4 1.5", "1"]
    until(page, server, lambda: "4.5" in grid.locator("[data-row='4 1.5'] [role=rowheader]").inner_text(), "the mean")
    assert "Best so far: step 4 at strength 1.5" in choose.inner_text()
    assert press(page, "ArrowRight") == ["4 1.5", "2"], "rating keeps the focus"
    slow(page, f"{job}/grid", 0, 1000)
    with page.expect_response(lambda answer: answer.url.endswith(f"{job}/grid")):
        page.keyboard.press("Alt+3")
        page.keyboard.press("Alt+4")
    fast(page)
    mean = grid.locator("[data-row='4 1.5'] [role=rowheader]")
    grid.locator("[tabindex='0']").press("2")
    until(page, server, lambda: "3.5" in mean.inner_text(), "the mean of 2 and 5")
    page.wait_for_timeout(1500)
    assert "3.5" in mean.inner_text(), "what was asked for before, and came later, is older"
    assert press(page, "4") == ["4 1.5", "2"]
    window.screenshot("room_choose_1280")
    seen_by_all(page)

    choose.locator("[data-action='keep']").click()
    until(page, server, lambda: page.get_by_text("is in ComfyUI's LoRA list").count(), "the LoRA to be kept")
    loras = server.base / "output" / "loras"
    assert {f"by-keys-step-000004.{end}" for end in ("safetensors", "png", "md")} <= {p.name for p in loras.iterdir()}
    choose.locator("[data-action='publish']").click()
    until(page, server, lambda: page.get_by_text("publish/by-keys-step-000004 is ready").count(), "the folder")
    page.set_viewport_size({"width": 700, "height": 900})
    window.screenshot("room_choose_700")
    assert choose.evaluate("e => e.scrollWidth <= e.clientWidth + 1"), "nothing is cut off at the right"
    page.locator("#ck-room-tab-watch").click()
    window.screenshot("room_watch_700")
    page.locator("#ck-room-tab-choose").click()
    page.set_viewport_size(SIZE)

    key = grid.locator("[tabindex='0']").get_attribute("data-key")
    shown = server.request("GET", f"/chromakit/jobs/{job}/grid/{key}")[1]
    choose.locator("[data-action='open']").click()
    page.wait_for_selector(".ck-room", state="detached")
    seen = set(server.get("/history"))
    page.evaluate("() => window.app.queuePrompt(0, 1)")
    until(page, server, lambda: set(server.get("/history")) - seen, "the image")
    (prompt,) = set(server.get("/history")) - seen
    (again,) = server.images(server.wait(prompt))
    with Image.open(io.BytesIO(shown)) as image:
        assert again.tobytes() == image.convert("RGB").tobytes(), "the graph gives what the grid shows"
    assert window.ours == []
