"""Makes the pictures of the help pages (web/docs/images/<node>.webp) from the real page of a real host.

    python scripts/build_help_pictures.py                          every node; it really trains tiny, a few minutes
    python scripts/build_help_pictures.py --only ChromaTrainLora   some of them

Each node is shown in an example workflow, after or while that runs when it has something to show.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from _environment import ROOT, ensure_environment, say
from _host import Host, pack_node_ids, start_host
from _page import open_page
from _workflows import FOLDER, load_api

IMAGES = ROOT / "web" / "docs" / "images"
LIMIT = 45_000  # bytes a picture
VIEW = 1500, 2600  # CSS pixels; the tallest node fits
SCALE = 2.0  # device pixels for each
MARGIN = 10  # CSS pixels around the node
CORNER = 60  # where the node is put, from the canvas' left and top
LORA = "sks.safetensors"


@dataclass(frozen=True)
class Shot:
    """One picture: the first node of that type in the workflow, and when it is taken."""

    node: str
    workflow: str
    moment: str = "placed"  # placed | running | done
    run: str = ""
    """Title of the output node to run the workflow up to; empty: all of it."""
    needs_lora: bool = False
    width: int = 330
    room: int = 0
    """CSS pixels: the least width, and height beyond the least, for what the node shows."""


MIXED = "How the sets are mixed"
SHOTS = (
    Shot("ChromaWaitForTraining", "chroma_train_and_sample", "running", room=120),
    Shot("ChromaTrainLora", "chroma_train_and_sample", "running"),
    Shot("ChromaDataset", "chroma_train_lora", "done", width=480, room=350),
    Shot("ChromaTrainingSettings", "chroma_train_lora", "done"),
    Shot("ChromaTrainingStatus", "chroma_train_lora", "done", width=420, room=100),
    Shot("ChromaLoadModel", "chroma_your_files", "done", run="What fits this machine"),
    Shot("ChromaTextEncode", "chroma_text_to_image"),
    Shot("ChromaEmptyLatent", "chroma_text_to_image"),
    Shot("ChromaSampler", "chroma_text_to_image", "running", room=120),
    Shot("ChromaTailSigmas", "chroma_tail_sigmas", "done"),
    Shot("ChromaHostModel", "chroma_tail_sigmas", "done"),
    Shot("ChromaApplyLora", "chroma_use_lora", "done", needs_lora=True),
    Shot("ChromaInspectLora", "chroma_convert_lora", "done", needs_lora=True, width=420, room=250),
    Shot("ChromaConvertLora", "chroma_convert_lora", "done", needs_lora=True),
    Shot("ChromaDatasetFromImages", "chroma_train_with_regularisation", "done", MIXED, width=480, room=350),
    Shot("ChromaCombineDatasets", "chroma_train_with_regularisation", "done", MIXED),
    Shot("ChromaParity", "chroma_parity", "done", width=530, room=120),
)

PLACE = """async ([type, corner, width, room]) => {
  const node = app.graph._nodes.find(node => node.type === type);
  if (node.pos[0] < 50000) node.pos = [100000 * (1 + node.id), 0];  // the others would look in at the edges
  app.canvas.deselectAll?.();
  app.canvas.ds.scale = 1;
  app.canvas.ds.offset = [corner - node.pos[0], corner + LiteGraph.NODE_TITLE_HEIGHT - node.pos[1]];
  width = Math.max(width, node.size[0]);
  const vue = app.extensionManager.setting.get('Comfy.VueNodes.Enabled');
  node.setSize([width, vue ? 1 : node.computeSize()[1] + room]);
  app.canvas.setDirty(true, true);
  if (!vue || !room) return;
  await new Promise(done => setTimeout(done, 500));  // the least height is the page's to say
  const element = document.querySelector(`[data-node-id="${node.id}"]`);
  node.setSize([width, element.offsetHeight - LiteGraph.NODE_TITLE_HEIGHT + room]);
}"""
BOX = """type => {
  const node = app.graph._nodes.find(node => node.type === type), area = app.canvas.canvas.getBoundingClientRect();
  const element = document.querySelector(`[data-node-id="${node.id}"]`);
  if (element) { const box = element.getBoundingClientRect(); return [box.x, box.y, box.width, box.height]; }
  const [x, y, width, height] = node.boundingRect ?? node.getBounding(), { offset, scale } = app.canvas.ds;
  return [area.x + (x + offset[0]) * scale, area.y + (y + offset[1]) * scale, width * scale, height * scale];
}"""
QUEUE = """async title => {
  const ids = title ? app.graph._nodes.filter(node => node.title === title).map(node => String(node.id)) : [];
  await app.queuePrompt(0, 1, ids.length ? ids : undefined);
}"""
LIVE_PREVIEW = """type => {
  const node = app.graph._nodes.find(node => node.type === type);
  return Boolean(app.nodePreviewImages[String(node.id)]?.length) && (node.progress ?? 0) > 0.5;
}"""


def wait_until(true: Callable[[], Any], what: str, timeout: float = 1800) -> None:
    """Raises SystemExit, naming what did not come, after `timeout` seconds."""
    start = time.monotonic()
    while not true():
        if time.monotonic() - start > timeout:
            raise SystemExit(f"error: {what}: it has not come within {timeout:.0f} s.")
        time.sleep(0.1)


class Camera:
    """Takes pictures of nodes on a page of the host."""

    def __init__(self, host: Host, page: Any, folder: Path):
        self.host, self.page, self.folder = host, page, folder

    def load(self, workflow: str) -> None:
        graph = json.loads((FOLDER / f"{workflow}.json").read_text(encoding="utf-8"))
        self.page.evaluate("async graph => { await app.loadGraphData(graph); app.extensionManager.focusMode = true }", graph)
        self.page.wait_for_timeout(800)

    def queue(self, up_to: str) -> str:
        """Run the open workflow from the page, so that the page shows what its nodes give; the prompt's id."""
        before = set(self.host.get("/history")) | self._waiting()
        self.page.evaluate(QUEUE, up_to)
        new: set[str] = set()

        def queued() -> bool:
            new.update((set(self.host.get("/history")) | self._waiting()) - before)
            return bool(new)

        wait_until(queued, "the prompt that the page queued", 60)
        return new.pop()

    def _waiting(self) -> set[str]:
        queue = self.host.get("/queue")
        return {entry[1] for entry in (*queue["queue_running"], *queue["queue_pending"])}

    def place(self, shot: Shot) -> None:
        self.page.evaluate(PLACE, [shot.node, CORNER, shot.width, shot.room])
        self.page.wait_for_timeout(600)  # pictures and panels of the node are drawn

    def shoot(self, shot: Shot) -> None:
        """Save the node, framed, as WebP below the limit."""
        from PIL import Image

        x, y, width, height = self.page.evaluate(BOX, shot.node)
        clip = {"x": x - MARGIN, "y": y - MARGIN, "width": width + 2 * MARGIN, "height": height + 2 * MARGIN}
        taken = Image.open(BytesIO(self.page.screenshot(clip=clip))).convert("RGB")
        path = self.folder / f"{shot.node}.webp"
        path.write_bytes(body := small_enough(taken))
        say(f"wrote {path.name}: {taken.width} × {taken.height}, {len(body) / 1000:.0f} kB")


def small_enough(picture: Any) -> bytes:
    """The picture as WebP, as good as the limit allows; only then smaller in pixels."""
    from PIL import Image

    for scale in (1.0, 0.85, 0.7, 0.55):
        size = round(picture.width * scale), round(picture.height * scale)
        smaller = picture if scale == 1 else picture.resize(size, Image.Resampling.LANCZOS)
        for quality in (90, 80, 70, 60):
            smaller.save(body := BytesIO(), "WEBP", quality=quality, method=6)
            if body.tell() <= LIMIT:
                return body.getvalue()
    raise SystemExit(f"error: a picture of {picture.size} does not go into {LIMIT} bytes.")


def train_first(host: Host) -> None:
    """The LoRA that two workflows name."""
    if (host.base / "output" / "loras" / LORA).exists():
        return
    say("training the LoRA that the workflows use")
    host.run(load_api("chroma_train_lora"), timeout=600)
    wait_until(lambda: (host.base / "output" / "loras" / LORA).exists(), "the LoRA of chroma_train_lora")


def half_trained(host: Host) -> bool:
    jobs = host.get("/chromakit/jobs")
    return bool(jobs) and (jobs[0]["step"] >= jobs[0]["steps"] * 0.55 or jobs[0]["state"] == "completed")


def take(camera: Camera, shots: Sequence[Shot]) -> None:
    """All shots of one workflow."""
    host, page = camera.host, camera.page
    if any(shot.needs_lora for shot in shots):
        train_first(host)
    camera.load(shots[0].workflow)
    of = {moment: [shot for shot in shots if shot.moment == moment] for moment in ("placed", "running", "done")}
    for shot in of["placed"]:
        camera.place(shot)
        camera.shoot(shot)
    if not of["running"] and not of["done"]:
        return
    for shot in of["running"][:1]:
        camera.place(shot)
    prompt = camera.queue(shots[0].run)
    for shot in of["running"]:
        if shot.node == "ChromaSampler":
            page.wait_for_function(LIVE_PREVIEW, arg=shot.node, timeout=120_000, polling=30)
        else:
            wait_until(lambda: half_trained(host), f"{shot.node}: a job half way")
            camera.place(shot)
        camera.shoot(shot)
    host.wait(prompt, timeout=3600)
    if any(shot.node == "ChromaTrainingStatus" for shot in shots):
        wait_until(lambda: host.get("/chromakit/jobs")[0]["state"] == "completed", "the end of the job")
        host.wait(camera.queue(shots[0].run))
    page.wait_for_timeout(1500)
    for shot in of["done"]:
        camera.place(shot)
        camera.shoot(shot)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NODE", help="ids of the nodes to take pictures of")
    parser.add_argument("--vue", action="store_true", help="in the newer node renderer")
    parser.add_argument("--output", type=Path, default=IMAGES, help="folder to write to")
    arguments = parser.parse_args()
    ensure_environment()
    known = {shot.node for shot in SHOTS}
    if missing := set(arguments.only or pack_node_ids()) - known:
        raise SystemExit(f"error: there is no picture planned of {', '.join(sorted(missing))}. Add a Shot to SHOTS.")
    wanted = [shot for shot in SHOTS if not arguments.only or shot.node in arguments.only]
    groups = {(shot.workflow, shot.run): [] for shot in wanted}
    for shot in wanted:
        groups[shot.workflow, shot.run].append(shot)
    arguments.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as base, start_host(Path(base)) as host:
        settings = {"Comfy.VueNodes.Enabled": arguments.vue}
        with open_page(host, *VIEW, SCALE, **settings) as page:
            camera = Camera(host, page, arguments.output.resolve())
            for shots in groups.values():
                take(camera, shots)
    return 0


if __name__ == "__main__":
    sys.exit(main())
