"""How fast does the Chroma tab open with many jobs, and does the page stay responsive with a long curve?

    python benchmarks/window.py            # prints a table
    python benchmarks/window.py --write    # and writes it into docs/window.md
    python benchmarks/window.py --wall     # only the training room's wall; with --write into docs/choosing.md
    python benchmarks/window.py --images   # only 500 large images beside 51 jobs; with --write into docs/room.md

It trains one short job on tiny, copies its folder into 50 finished jobs and one with 20 000 steps (the numbers in its
metrics are made up, everything else is real), starts the host and Chromium, and opens things in the page. Times are
medians, each beside that of a peer in the same page: for a tab the host's own library of nodes, for a long curve the
whole metrics file, drawn with every point.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from _environment import ensure_environment  # noqa: E402
from _host import Host, start_host  # noqa: E402
from _workflows import change, load_api  # noqa: E402
from tools.page import open_page  # noqa: E402
from tools.pages import fill, markdown_table  # noqa: E402

JOBS, STEPS, ROUNDS = 50, 20_000, 5
PAGE = ROOT / "docs" / "window.md"
WALL_PAGE = ROOT / "docs" / "choosing.md"
ROOM_PAGE = ROOT / "docs" / "room.md"
PACE = 60
"""Pixels a frame, five screens a second, that a wall or a dataset is scrolled by."""
WALL = (40, 6)
"""Steps and prompts of the wall."""
IMAGES, LARGE = 500, (4000, 3000)
"""A large dataset, and the width and height of its images in pixels."""

OPEN_TAB = """async ([id, selector, count]) => {
    const tabs = window.app.extensionManager.sidebarTab;
    if (tabs.activeSidebarTab) tabs.toggleSidebarTab(tabs.activeSidebarTab.id);
    await new Promise(done => setTimeout(done, 300));
    const start = performance.now();
    tabs.toggleSidebarTab(id);
    while (document.querySelectorAll(selector).length < count) await new Promise(requestAnimationFrame);
    await new Promise(requestAnimationFrame);
    return performance.now() - start;
}"""

OPEN_LONG_JOB = """async job => {
    const gaps = [];
    let last = performance.now(), going = true;
    const frame = now => { gaps.push(now - last); last = now; if (going) requestAnimationFrame(frame); };
    requestAnimationFrame(frame);
    const start = performance.now();
    document.querySelector(`li[data-job="${job}"] .ck-open`).click();
    while (!document.querySelector('.ck-curves .uplot canvas')) await new Promise(requestAnimationFrame);
    await new Promise(requestAnimationFrame);
    const taken = performance.now() - start;
    await new Promise(done => setTimeout(done, 1500));
    going = false;
    document.querySelector('.ck-back').click();
    return [taken, Math.max(...gaps)];
}"""

EVERY_POINT = """async ([job, module]) => {
    const { default: uPlot } = await import(module);
    const holder = document.body.appendChild(document.createElement('div'));
    let longest = 0, last = performance.now(), going = true;
    const frame = now => {
        longest = Math.max(longest, now - last);
        last = now;
        if (going) requestAnimationFrame(frame);
    };
    requestAnimationFrame(frame);
    const start = performance.now();
    const answer = await fetch(`/chromakit/jobs/${job}/metrics`);
    const text = await answer.text();
    const lines = JSON.parse(text).filter(line => line.loss !== undefined);
    const data = ['step', 'loss', 'loss_smooth'].map(name => lines.map(line => line[name]));
    const series = [{}, { stroke: 'blue' }, { stroke: 'red' }];
    new uPlot({ width: 300, height: 220, series, scales: { x: { time: false } } }, data, holder);
    await new Promise(requestAnimationFrame);
    const taken = performance.now() - start;
    await new Promise(done => setTimeout(done, 500));
    going = false;
    holder.remove();
    return [taken, longest, text.length];
}"""


FRAMES = """
    const { openRoom } = await import('/extensions/chromakit/js/room/room.js');
    const gaps = [];
    let last = performance.now(), going = true;
    const frame = now => { gaps.push(now - last); last = now; if (going) requestAnimationFrame(frame); };
    requestAnimationFrame(frame);
    const start = performance.now();"""
"""How the opening of something in the room is timed: its `start`, and the `gaps` between frames while it is `going`."""

OPEN_WALL = (
    "async ([job, first]) => {"
    + FRAMES
    + """
    await openRoom({ job: first });
    await openRoom({ job, step: 'watch' });
    const wall = () => document.querySelector(`.ck-watched[data-job="${job}"] .ck-wall`);
    const shown = () => [...wall().querySelectorAll('img')].filter(image => {
        const [one, whole] = [image.getBoundingClientRect(), wall().getBoundingClientRect()];
        return one.bottom > whole.top && one.top < whole.bottom && image.checkVisibility();
    });
    while (!wall() || !shown().length) await new Promise(requestAnimationFrame);
    const built = performance.now() - start;
    while (!shown().every(image => image.naturalWidth)) await new Promise(requestAnimationFrame);
    await new Promise(requestAnimationFrame);
    const found = { built, taken: performance.now() - start, images: shown().length };
    going = false;
    return { ...found, opening: Math.max(...gaps) };
}"""
)

SCROLL = """async ([selector, pixels]) => {
    const element = document.querySelector(selector), gaps = [], tasks = [];
    const watch = new PerformanceObserver(list => tasks.push(...list.getEntries().map(task => task.duration)));
    watch.observe({ type: 'longtask' });
    element.scrollTop = 0;
    await new Promise(requestAnimationFrame);
    let last = performance.now();
    while (element.scrollTop + element.clientHeight < element.scrollHeight - 1) {
        element.scrollTop += pixels;
        const now = await new Promise(requestAnimationFrame);
        gaps.push(now - last);
        last = now;
    }
    await new Promise(done => setTimeout(done, 100));
    watch.disconnect();
    return { gaps, tasks };
}"""
"""The times between frames while it scrolls so many pixels a frame, and the page's own tasks of 50 ms and more."""

OPEN_IMAGES = (
    "async ([folder, count]) => {"
    + FRAMES
    + """
    await openRoom({ step: 'images', folder, size: 1024, trigger: 'zxq' });
    while (document.querySelectorAll('.ck-card').length < count) await new Promise(requestAnimationFrame);
    await new Promise(requestAnimationFrame);
    const built = performance.now() - start;
    const shown = () => [...document.querySelectorAll('.ck-card')].slice(0, 5).map(card => card.querySelector('img'));
    while (!shown().every(image => image.naturalWidth)) await new Promise(requestAnimationFrame);
    going = false;
    return { built, taken: performance.now() - start, images: 5, opening: Math.max(...gaps) };
}"""
)

OPEN_JOBS = (
    "async count => {"
    + FRAMES
    + """
    await openRoom({ step: 'watch', job: '' });
    while (document.querySelectorAll('.ck-room .ck-list li').length < count) await new Promise(requestAnimationFrame);
    await new Promise(requestAnimationFrame);
    going = false;
    return performance.now() - start;
}"""
)
"""The list of jobs in the room that is open."""

CLOSE_WALL = "() => document.querySelector('.ck-room [aria-label^=Close]')?.click()"


def first_job(host: Host) -> Path:
    """A short real job with previews; its folder."""
    host.run(change(load_api("chroma_train_lora"), "ChromaTrainLora", steps=4, preview_every=2, name="one of many"))
    job = host.get("/chromakit/jobs")[0]["id"]
    while host.get(f"/chromakit/jobs/{job}")["state"] != "completed":
        time.sleep(0.2)
    return host.base / "output" / "chromakit" / "jobs" / job


def multiply(folder: Path) -> str:
    """Copies of a job's folder, and one with a long curve; returns that one's id."""
    values = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    for number in range(1, JOBS):
        copy(folder, f"{folder.name[:-8]}{number:08x}", values | {"created": values["created"] - 60 * number})
    steps = {
        **values,
        "steps": STEPS,
        "step": STEPS,
        "config": {**values["config"], "steps": STEPS, "name": "a long one"},
    }
    long = copy(folder, "a-long-one-0000beef", steps)
    draws, smooth = random.Random(0), 0.6
    with (long / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for step in range(1, STEPS + 1):
            loss = 0.3 + 0.3 * math.exp(-step / 4000) + draws.gauss(0, 0.08)
            smooth = 0.98 * smooth + 0.02 * loss
            line: dict[str, Any] = {"step": step, "loss": loss, "loss_smooth": smooth, "lr": 2e-4, "grad_norm": 1.0}
            file.write(json.dumps({**line, "sigma": 0.5, "seconds": 0.61}) + "\n")
            if step % 250 == 0:
                by_sigma = [smooth * (1 + i / 10) for i in range(10)]
                file.write(json.dumps({"step": step, "heldout_loss": smooth, "heldout_by_sigma": by_sigma}) + "\n")
    return long.name


def wall_of(folder: Path) -> str:
    """A copy of a job with previews of 1024 pixels for each step and prompt; its id."""
    steps, prompts = WALL
    values = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    texts = [f"a [trigger] emblem in place {i}" for i in range(prompts)]
    config = {**values["config"], "name": "a wall", "steps": 50 * steps}
    config["previews"] = {**config["previews"], "prompts": texts}
    made = copy(folder, "a-wall-0000beef", {**values, "steps": 50 * steps, "step": 50 * steps, "config": config})
    shutil.rmtree(made / "samples")
    (made / "samples").mkdir()
    for prompt in range(prompts):
        # As large as a photograph's PNG: soft shapes with grain.
        soft = Image.effect_noise((24, 24), 120).resize((1024, 1024), Image.Resampling.BICUBIC)
        grain = [Image.blend(soft, Image.effect_noise((1024, 1024), 40), 0.15) for _ in "rgb"]
        first = made / "samples" / f"step-000000-{prompt}.png"
        Image.merge("RGB", grain).save(first)
        for step in range(1, steps):
            (made / "samples" / f"step-{50 * step:06d}-{prompt}.png").hardlink_to(first)
    return made.name


def photographs(folder: Path) -> None:
    """A dataset of large images with captions; each of a few files under many names."""
    folder.mkdir(parents=True)
    soft = Image.effect_noise((40, 30), 120).resize(LARGE, Image.Resampling.BICUBIC)
    for i in range(IMAGES):
        path = folder / f"{i:03d}.jpg"
        if i < 10:
            grain = [Image.blend(soft, Image.effect_noise(LARGE, 30 + i), 0.12) for _ in "rgb"]
            Image.merge("RGB", grain).save(path, quality=90)
        else:
            path.hardlink_to(folder / f"{i % 10:03d}.jpg")
        path.with_suffix(".txt").write_text(f"a zxq thing in place {i}, seen from side {i % 7}\n")


def seconds_of(host: Host) -> float:
    """Seconds of CPU that ComfyUI's process has taken."""
    fields = Path(f"/proc/{host.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure_images(host: Host, folder: str) -> str:
    """A large dataset's numbers for people: the first look, while its files are read afterwards, and later."""
    looks: list[tuple[float, float, int]] = []
    others: list[float] = []
    unread = -1
    while unread or len(looks) < 2:
        begun, start = seconds_of(host), time.perf_counter()
        found = host.post("/chromakit/datasets/images", {"folder": folder, "trigger": "zxq", "size": 1024})[1]
        unread = found["unread"]
        looks.append((time.perf_counter() - start, seconds_of(host) - begun, unread))
        for _ in range(5):
            start = time.perf_counter()
            host.get("/system_stats")
            others.append(time.perf_counter() - start)
            time.sleep(0.1)
    print(*looks, sep="\n")
    beside = {"jobs": (OPEN_JOBS, JOBS + 1), "tab": (OPEN_TAB, ["chromakit", ".ck-tab .ck-list li", JOBS + 1])}
    rounds = opened_and_scrolled(host, OPEN_IMAGES, [folder, IMAGES], ".ck-panel:not([hidden])", (PACE, 200), beside)
    (first, first_cpu, left), (last, last_cpu, _) = looks[0], looks[-1]
    rows = [
        (
            "ComfyUI's answer, and CPU for it",
            f"{1000 * first:.0f} ms, {1000 * first_cpu:.0f} ms",
            f"{1000 * last:.0f} ms, {1000 * last_cpu:.0f} ms",
        ),
        *page_rows(rounds, f"opening until all {IMAGES} images stand"),
        (f"then *Watch* with {JOBS + 1} jobs", *(f"{each['jobs']:.0f} ms" for each in rounds)),
        ("and the tab with them", *(f"{each['tab']:.0f} ms" for each in rounds)),
    ]
    about = (
        f"{IMAGES} JPEGs of {LARGE[0]} × {LARGE[1]} pixels. {left} of them were not yet read with the first answer; "
        f"while they were, ComfyUI answered others within {1000 * max(others):.0f} ms."
    )
    return f"{markdown_table(rows, ('what', 'the first time', 'again'))}\n\n{about}"


def measure_wall(host: Host, job: str, first: str) -> str:
    """The wall's numbers for people: the first time, when ComfyUI makes the small images, and again."""
    rounds = opened_and_scrolled(host, OPEN_WALL, [job, first], ".ck-watched .ck-wall", (PACE,), {})
    steps, prompts = WALL
    rows = page_rows(rounds, "opening until the wall stands")
    about = f"{steps} steps × {prompts} prompts of 1024 × 1024 pixels."
    return f"{markdown_table(rows, ('what', 'the first time', 'again'))}\n\n{about}"


def opened_and_scrolled(
    host: Host,
    opening: str,
    arguments: list[Any],
    selector: str,
    paces: tuple[int, ...],
    beside: Mapping[str, tuple[str, Any]],
) -> list[dict[str, Any]]:
    """What opening something in the room and scrolling through it at each of `paces`, pixels a frame, takes; twice.

    beside: what is opened afterwards, by name: a script and its argument.
    """
    rounds: list[dict[str, Any]] = []
    with open_page(host, 1280, 720) as page:
        page.wait_for_timeout(2000)
        client = page.context.new_cdp_session(page)
        client.send("Performance.enable", {"timeDomain": "threadTicks"})

        def cpu() -> float:
            """Milliseconds of CPU that the page's own thread has taken."""
            metrics = client.send("Performance.getMetrics")["metrics"]
            return 1000 * next(each["value"] for each in metrics if each["name"] == "TaskDuration")

        for _ in range(2):
            begun = cpu()
            found = page.evaluate(opening, arguments)
            opened = cpu()
            scrolled = {}
            for pixels in paces:
                before = cpu()
                passed = page.evaluate(SCROLL, [selector, pixels])
                scrolled[pixels] = passed | {"cpu": (cpu() - before) / len(passed["gaps"])}
            others = {name: page.evaluate(script, argument) for name, (script, argument) in beside.items()}
            page.evaluate(CLOSE_WALL)
            rounds.append({**found, "opening_cpu": opened - begun, "scrolled": scrolled, **others})
    return rounds


def page_rows(rounds: list[dict[str, Any]], opening: str) -> list[tuple[str, ...]]:
    """The page's part of a table."""

    def frames(found: dict[str, Any]) -> str:
        gaps, tasks = found["gaps"], found["tasks"]
        slow = f"{max(gaps):.0f} ms; {sum(gap > 50 for gap in gaps)} of {len(gaps)} above 50 ms"
        return f"{slow}, {len(tasks)} of the page's own tasks; {found['cpu']:.1f} ms of its CPU a frame"

    paces = [
        (
            f"longest frame while all of it scrolls, {pixels} pixels a frame",
            lambda each, at=pixels: frames(each["scrolled"][at]),
        )
        for pixels in rounds[0]["scrolled"]
    ]
    return [
        (label, *(words(each) for each in rounds))
        for label, words in (
            (opening, lambda each: f"{each['built']:.0f} ms"),
            (f"and its {rounds[0]['images']} images in view are there", lambda each: f"{each['taken']:.0f} ms"),
            ("longest frame while it opens", lambda each: f"{each['opening']:.0f} ms"),
            ("CPU of the page to open it", lambda each: f"{each['opening_cpu']:.0f} ms"),
            *paces,
        )
    ]


def copy(folder: Path, name: str, values: dict[str, Any]) -> Path:
    made = folder.parent / name
    shutil.copytree(folder, made)
    (made / "job.json").write_text(json.dumps({**values, "id": name}), encoding="utf-8")
    return made


def measure(host: Host, long: str) -> dict[str, Any]:
    """Milliseconds and bytes, by what they are for."""
    found: dict[str, list[Any]] = {"tab": [], "peer_tab": [], "long": [], "peer_long": []}
    module = "/extensions/chromakit/js/vendor/uplot.js"
    with open_page(host, 1600, 1000) as page:
        page.wait_for_timeout(2000)
        for _ in range(ROUNDS + 1):
            found["peer_tab"].append(page.evaluate(OPEN_TAB, ["node-library", ".p-tree-node, [role=treeitem]", 5]))
            found["tab"].append(page.evaluate(OPEN_TAB, ["chromakit", ".ck-list li", JOBS + 1]))
            found["long"].append(page.evaluate(OPEN_LONG_JOB, long))
            found["peer_long"].append(page.evaluate(EVERY_POINT, [long, module]))
    rounds = {name: values[1:] for name, values in found.items()}  # the first one of each warms up
    started = time.perf_counter()
    brief = len(host.request("GET", "/chromakit/jobs?brief=true")[1])
    listing = 1000 * (time.perf_counter() - started)
    curve = len(host.request("GET", f"/chromakit/jobs/{long}/curve?points=1500")[1])
    return {
        "tab": statistics.median(rounds["tab"]),
        "first_tab": found["tab"][0],
        "peer_tab": statistics.median(rounds["peer_tab"]),
        "long": statistics.median(taken for taken, _ in rounds["long"]),
        "first_long": found["long"][0][0],
        "long_gap": max(gap for _, gap in found["long"]),
        "peer_long": statistics.median(taken for taken, *_ in rounds["peer_long"]),
        "peer_gap": max(gap for _, gap, _ in found["peer_long"]),
        "peer_bytes": rounds["peer_long"][0][2],
        "curve_bytes": curve,
        "list_bytes": brief,
        "list": listing,
    }


def table(found: dict[str, Any]) -> str:
    """The measurements for people."""
    rows = [
        (
            f"opening the tab, {JOBS + 1} jobs in it",
            f"{found['tab']:.0f} ms (the first time {found['first_tab']:.0f})",
            f"ComfyUI's node library: {found['peer_tab']:.0f} ms",
            f"{found['tab'] / found['peer_tab']:.2f}",
        ),
        (
            f"opening a job of {STEPS} steps until its curve is drawn",
            f"{found['long']:.0f} ms (the first time, when ComfyUI reads the file, {found['first_long']:.0f})",
            f"all metrics, every point drawn: {found['peer_long']:.0f} ms",
            f"{found['long'] / found['peer_long']:.2f}",
        ),
        (
            "what is sent for that curve",
            f"{found['curve_bytes'] / 1024:.0f} KiB",
            f"{found['peer_bytes'] / 1024:.0f} KiB",
            f"{found['curve_bytes'] / found['peer_bytes']:.3f}",
        ),
        (
            "longest time without a frame while it opens",
            f"{found['long_gap']:.0f} ms",
            f"{found['peer_gap']:.0f} ms",
            f"{found['long_gap'] / found['peer_gap']:.2f}",
        ),
    ]
    size, taken = found["list_bytes"] / 1024, found["list"]
    about = f"The list of {JOBS + 1} jobs is {size:.0f} KiB, which ComfyUI answers within {taken:.0f} ms."
    return f"{markdown_table(rows, ('what', 'ours', 'peer', 'ours ÷ peer'))}\n\n{about}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"write the table into {PAGE.relative_to(ROOT)}")
    parser.add_argument("--wall", action="store_true", help=f"the wall instead, into {WALL_PAGE.relative_to(ROOT)}")
    parser.add_argument("--images", action="store_true", help=f"a dataset instead, into {ROOM_PAGE.relative_to(ROOT)}")
    options = parser.parse_args()
    ensure_environment()
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        if options.images:
            photographs(base / "input" / "photographs")
        with start_host(base) as host:
            folder = first_job(host)
        made = wall_of(folder) if options.wall else multiply(folder)
        with start_host(base) as host:
            if options.images:
                page, part, text = ROOM_PAGE, "images", measure_images(host, "photographs")
            elif options.wall:
                page, part, text = WALL_PAGE, "wall", measure_wall(host, made, folder.name)
            else:
                page, part, text = PAGE, "window", table(measure(host, made))
    print(text)
    if options.write:
        fill(page, part, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
