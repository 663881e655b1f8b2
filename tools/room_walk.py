"""A walk through the training room as a user takes it: thirty mixed files, a LoRA, an image with it in ComfyUI's nodes.

By clicks, keys and a drop on the page alone, each of which is counted.

    python -m tools.room_walk            # walks in a real ComfyUI and writes screenshots to test-output/
    python -m tools.room_walk --classic  # the same with the nodes of ComfyUI's classic renderer
    python -m tools.room_walk --write    # trains longer, and writes the images of docs/first-hour.md
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from _environment import ROOT, ensure_environment
from _host import start_host

from .page import open_page
from .tiny.example_dataset import draw_emblem

EXAMPLES = ROOT / "example_datasets"
OPEN = "() => window.app.extensionManager.command.execute('Chroma.OpenRoom')"
DESK = """() => document.body.append(
    Object.assign(document.createElement('input'), { id: 'desk', type: 'file', multiple: true }))"""
DROP = """() => {
    const desk = document.querySelector('#desk'), data = new DataTransfer();
    for (const file of desk.files) data.items.add(file);
    desk.remove();
    const there = document.elementFromPoint(innerWidth / 2, innerHeight / 2);
    for (const kind of ['dragenter', 'dragover', 'drop']) {
        there.dispatchEvent(new DragEvent(kind, { dataTransfer: data, bubbles: true, cancelable: true }));
    }
}"""
MADE = """() => {
    const images = [...document.querySelectorAll('.ck-chooser [role=gridcell] img')];
    return images.length && images.every(image => !image.hidden && image.naturalWidth);
}"""
SHOWN = """() => [...document.querySelectorAll('.ck-room img[src]')].every(image => {
    const { top, bottom } = image.getBoundingClientRect();
    return !image.checkVisibility() || top > innerHeight || bottom < 0 || image.naturalWidth;
})"""
WINDOW = {"Comfy.VueNodes.Enabled": True, "Comfy.LinkRenderMode": 2}
WIDTH, HEIGHT = 1280, 720
SHORT, LONG = 2, 400
"""Training steps: enough for a wall of three rows, and enough to learn the emblem."""
PATIENCE = 900
"""Seconds that anything may take."""
CAPTIONS = (
    "a sks emblem on an orange background",
    "a sks emblem on a red background, further left",
    "a sks emblem on a black background",
    "a photo of a sks emblem at the right on a green background",
)
"""For 04, 09, export and h2, in their order."""
PROMPTS = ("a [trigger] emblem on a red background", "a red circle on a white background")
FORMATS = ("png", "jpg", "webp", "bmp", "gif", "tiff")
WITHOUT_CAPTION = ("04", "09", "h2")
STANDS_AS = ("05", "12")
"""Images whose captions have another trainer's usual word in the place of the trigger."""


def desk(folder: Path) -> list[Path]:
    """Thirty images as they lie about, with captions for most: six formats and modes, and eight that are odd.

    A copy, one that is cut off, an empty one, a JPEG named .png, one on its side, one much too wide, and two in formats
    that training does not read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = [(path.stem, path) for path in sorted((EXAMPLES / "sks_emblem").glob("*.png"))]
    found += [(f"h{path.stem[1]}", path) for path in sorted((EXAMPLES / "sks_emblem_heldout").glob("*.png"))]
    for i, (stem, path) in enumerate(found):
        with Image.open(path) as opened:
            image = opened.convert("RGB").resize((256, 256), Image.Resampling.LANCZOS)
        if i == 1:
            image = image.convert("CMYK")
        image.save(folder / f"{stem}.{FORMATS[i % len(FORMATS)]}")
        text = path.with_suffix(".txt").read_text(encoding="utf-8")
        if stem in STANDS_AS:
            text = text.replace("sks", "ohwx")
        if stem not in WITHOUT_CAPTION:
            (folder / f"{stem}.txt").write_text(text, encoding="utf-8")
    _odd(folder)
    return sorted(folder.iterdir())


def _odd(folder: Path) -> None:
    def emblem(background: str, place: tuple[int, int] = (32, 32)) -> Image.Image:
        return Image.fromarray(draw_emblem(background, *place, 22.0)).resize((256, 256), Image.Resampling.LANCZOS)

    def caption(stem: str, background: str) -> None:
        text = f"a photo of a sks emblem on a {background} background\n"
        (folder / f"{stem}.txt").write_text(text, encoding="utf-8")

    (folder / "copy of 01.png").write_bytes((folder / "01.png").read_bytes())
    (folder / "copy of 01.txt").write_bytes((folder / "01.txt").read_bytes())
    (folder / "cut off.png").write_bytes((folder / "01.png").read_bytes()[:40])
    (folder / "empty.jpg").write_bytes(b"")
    emblem("green").save(folder / "named wrong.png", "JPEG")
    sideways = Image.Exif()
    sideways[0x0112] = 6
    emblem("blue").save(folder / "on its side.jpg", exif=sideways)
    wide = Image.new("RGB", (640, 256), emblem("red").getpixel((0, 0)))
    wide.paste(emblem("red"), (384, 0))
    wide.save(folder / "wide.png")
    emblem("white").save(folder / "scan.tga")
    emblem("black").save(folder / "export.jp2")
    for stem, background in {"named wrong": "green", "on its side": "blue", "wide": "red", "scan": "white"}.items():
        caption(stem, background)


@dataclass
class Hand:
    """What a user does on the page, counted. `shoot(name)` is called where there is something to see."""

    page: Any
    shoot: Callable[[str], Any]
    done: list[str] = field(default_factory=list)

    def click(self, selector: str, what: str) -> None:
        self.done.append(f"click {what}")
        self.page.locator(selector).locator("visible=true").first.click()

    def press(self, name: str) -> None:
        """Click the button of that name."""
        self.done.append(f"click {name}")
        self.page.locator(".ck-room").get_by_role("button", name=name, exact=True).first.click()

    def key(self, name: str) -> None:
        self.done.append(f"key {name}")
        self.page.keyboard.press(name)

    def type(self, text: str) -> None:
        self.done.append("type")
        self.page.keyboard.insert_text(text)

    def fill(self, selector: str, text: str) -> None:
        self.done.append(f"type into {selector}")
        self.page.locator(selector).locator("visible=true").first.fill(text)

    def choose(self, selector: str, **option: str) -> None:
        self.done.append(f"choose in {selector}")
        self.page.locator(selector).locator("visible=true").first.select_option(**option)

    def drop(self, files: list[Path]) -> None:
        """Files from a desk onto the middle of the page."""
        self.done.append(f"drop {len(files)} files")
        self.page.evaluate(DESK)
        self.page.set_input_files("#desk", list(map(str, files)))
        self.page.evaluate(DROP)

    def until(self, text: str) -> None:
        self.page.locator(".ck-room").get_by_text(text).locator("visible=true").first.wait_for()


def walk(hand: Hand, files: list[Path], name: str, steps: int) -> None:
    """From the files to an image made in ComfyUI's own nodes, on ComfyUI's page with nothing open."""
    _images(hand, files, name)
    _mend(hand)
    _aim(hand, steps)
    _watch(hand)
    _choose(hand)


def _images(hand: Hand, files: list[Path], name: str) -> None:
    page = hand.page
    hand.done.append("click Training room")
    page.evaluate(OPEN)
    page.locator(".ck-room").wait_for()
    hand.drop(files)
    hand.until("Name the new folder")
    hand.shoot("1_dropped")
    hand.type(name)
    hand.key("Enter")
    hand.until("Uploaded to")
    hand.fill(".ck-bar input[placeholder=zxq]", "sks")
    hand.choose(".ck-bar [data-choice=size]", label="64 px")
    hand.until("“sks” stands as “ohwx” 2 times.")
    hand.shoot("2_looked_at")
    hand.press("Replace ohwx by sks")
    hand.until("All 24 captions have sks.")


def _mend(hand: Hand) -> None:
    """Every image that is not trained says why, and has a button."""
    page = hand.page
    hand.press("Show only the 8 to mend")
    hand.shoot("3_to_mend")

    def mend(name: str, text: str = "") -> None:
        there = page.locator(".ck-card").get_by_role("button", name=name, exact=True)
        left = there.count() - 1
        hand.press(name)
        if text:
            hand.type(text)
            hand.key("Tab")
        there.nth(left).wait_for(state="detached")

    for name in ("Take the copy out", "Take it out", "Take it out", "Convert to PNG", "Convert to PNG"):
        mend(name)
    for text in CAPTIONS:
        mend("Write a caption", text)
    hand.until("0 skipped")
    page.locator("[data-name='wide.png'] .ck-crop").focus()
    hand.key("End")
    hand.shoot("4_mended")


def _aim(hand: Hand, steps: int) -> None:
    hand.press("Next: Aim →")
    hand.click("[data-aim=object]", "Object")
    hand.choose("[data-field=flavour]", value="tiny")
    hand.fill("[data-field=steps]", str(steps))
    hand.fill("[data-field=learning_rate]", "0.002")
    hand.fill("[data-field=prompts]", "\n".join(PROMPTS))
    hand.until("Best for training")
    hand.shoot("5_aim")
    hand.press("Start training")


def _watch(hand: Hand) -> None:
    page = hand.page
    page.locator(".ck-watched .ck-chip[data-state=completed]").wait_for()
    last = page.locator(".ck-watched .ck-wall [role=row]:last-child")
    last.locator("img").first.wait_for()
    hand.done.append("scroll the wall")
    last.scroll_into_view_if_needed()
    hand.shoot("6_wall")
    hand.press("Choose a LoRA →")


def _choose(hand: Hand) -> None:
    page = hand.page
    page.locator(".ck-choose-steps input").first.wait_for()
    hand.fill(".ck-choose-form input[type=text]", "0.7, 1")
    hand.click("[data-action=make]", "Make the grid")
    page.wait_for_function(MADE)
    for key in ("ArrowDown", "5"):
        hand.key(key)
    hand.until("Best so far")
    hand.shoot("7_grid")
    hand.press("Keep this LoRA")
    hand.until("is in ComfyUI's LoRA list")
    hand.press("Open in ComfyUI's nodes")
    page.locator(".ck-room").wait_for(state="detached")
    page.wait_for_function("() => window.app.graph.nodes.some(node => node.type === 'KSampler')")
    hand.done.append("click Run")
    page.evaluate("() => window.app.queuePrompt(0, 1)")
    page.wait_for_function("() => window.app.graph.nodes.find(node => node.type === 'SaveImage')?.imgs?.length")
    hand.shoot("8_used")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--write", action="store_true", help="train longer, and write the images into docs/images")
    parser.add_argument("--classic", action="store_true", help="with the classic renderer of nodes")
    options = parser.parse_args()
    ensure_environment()
    folder = ROOT / ("docs/images" if options.write else "test-output")
    folder.mkdir(exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as name,
        start_host(Path(name)) as host,
        open_page(host, WIDTH, HEIGHT, **WINDOW | {"Comfy.VueNodes.Enabled": not options.classic}) as page,
    ):
        page.set_default_timeout(1000 * PATIENCE)

        def shoot(what: str) -> None:
            page.wait_for_function(SHOWN)
            page.evaluate("() => window.app.extensionManager.toast.removeAll()")
            page.wait_for_timeout(1000)
            with Image.open(io.BytesIO(page.screenshot())) as image:
                image.convert("RGB").save(folder / f"walk_{what}.jpg", quality=72, optimize=True)

        hand, begun = Hand(page, shoot), time.monotonic()
        walk(hand, desk(Path(name) / "desk"), "emblems", LONG if options.write else SHORT)
        print(*hand.done, sep="\n")
        print(f"{len(hand.done)} actions, {time.monotonic() - begun:.0f} s, training included")
    return 0


if __name__ == "__main__":
    sys.exit(main())
