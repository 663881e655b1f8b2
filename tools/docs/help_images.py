"""Makes the images of the help pages (web/docs/images/<node>.webp) from the real page of a real host.

python -m tools.docs.help_images                          every node; it really trains tiny, a few minutes
python -m tools.docs.help_images --only ChromaTrainLora   some of them
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import Any

from _environment import ROOT, ensure_environment, say
from _host import Host, pack_node_ids, start_host

from ..page import open_page

LORA = "sks.safetensors"
"""What the graph `train` makes and the graph `lora` names."""


@dataclass(frozen=True)
class Shot:
    """One image: the first node of that type in the graph, and when it is taken."""

    node: str
    graph: str
    moment: str = "placed"  # placed: before anything ran | running: half way | done
    width: int = 330
    room: int = 0
    """CSS pixels: the least width, and height beyond the least, for what the node shows."""
    needs_lora: bool = False


SHOTS = (
    Shot("ChromaTailSigmas", "sigmas"),
    Shot("ChromaHostModel", "sigmas"),
    Shot("ChromaFromHost", "sigmas"),
    Shot("ChromaTrainingSettings", "train"),
    Shot("ChromaUseStep", "train"),
    Shot("ChromaWaitForTraining", "train", "running", room=120),
    Shot("ChromaTrainLora", "train", "running"),
    Shot("ChromaDataset", "train", "done", width=480, room=350),
    Shot("ChromaTrainingStatus", "train", "done", width=420, room=40),
    Shot("ChromaApplyLora", "lora", "done", needs_lora=True),
    Shot("ChromaInspectLora", "lora", "done", width=360, room=60, needs_lora=True),
    Shot("ChromaConvertLora", "lora", "done", needs_lora=True),
    Shot("ChromaMergeLora", "lora", "done", needs_lora=True),
    Shot("ChromaExtractLora", "lora", "done", needs_lora=True),
    Shot("ChromaDatasetFromImages", "sets", "done", width=480, room=250),
    Shot("ChromaCombineDatasets", "sets", "done"),
    Shot("ChromaLoadModel", "generate"),
    Shot("ChromaTextEncode", "generate"),
    Shot("ChromaEmptyLatent", "generate"),
    Shot("ChromaSampler", "generate", "running", room=120),
    Shot("ChromaDatasetOptions", "options"),
    Shot("ChromaSamplerOptions", "options"),
    Shot("ChromaOptimizerSettings", "options"),
    Shot("ChromaNoiseSettings", "options"),
    Shot("ChromaPreviewSettings", "options"),
    Shot("ChromaSavingSettings", "options"),
    Shot("ChromaAdapterSettings", "options", width=400),
    Shot("ChromaSpeedSettings", "options"),
    Shot("ChromaParity", "parity", "done", width=530, room=60),
)


def _node(kind: str, title: str = "", **inputs: Any) -> tuple[str, str, dict[str, Any]]:
    return kind, title, inputs


_ids = count(1)
"""No two nodes of all graphs share an id: the page would show what one gave on the other."""


def _graph(**nodes: tuple[str, str, dict[str, Any]]) -> dict[str, Any]:
    """An API prompt in which links name their node: ("load", 1) is its second output."""
    number = {name: str(next(_ids)) for name in nodes}
    return {
        number[name]: {
            "class_type": kind,
            "inputs": {k: [number[v[0]], v[1]] if isinstance(v, tuple) else v for k, v in inputs.items()},
            **({"_meta": {"title": title}} if title else {}),
        }
        for name, (kind, title, inputs) in nodes.items()
    }


# bf16 is slow on many CPUs, where tiny is mostly run.
_LOAD = _node("ChromaLoadModel", precision="fp32", text_precision="fp32")
_NEGATIVE = _node("ChromaTextEncode", "Negative prompt", text_encoder=("load", 1))
_SET = {"folder": "sks_emblem", "trigger": "sks"}
_CONCEPT = "a sks emblem on a red background"


def _prompt(text: str) -> tuple[str, str, dict[str, Any]]:
    return _node("ChromaTextEncode", text_encoder=("load", 1), text=text)


def _latent(batch: int = 1) -> tuple[str, str, dict[str, Any]]:
    return _node("ChromaEmptyLatent", width=64, height=64, batch_size=batch)


_SAMPLER = _node(
    "ChromaSampler",
    model=("load", 0),
    positive=("prompt", 0),
    negative=("negative", 0),
    latent=("latent", 0),
    control_after_generate="fixed",
)
_DECODE = _node("VAEDecode", samples=("sample", 0), vae=("load", 2))

GRAPHS = {
    "generate": _graph(
        load=_LOAD,
        prompt=_prompt("a red star on a blue background"),
        negative=_NEGATIVE,
        latent=_latent(),
        sample=_SAMPLER,
        decode=_DECODE,
        show=_node("PreviewImage", images=("decode", 0)),
    ),
    "sigmas": _graph(
        load=_LOAD,
        bridge=_node("ChromaHostModel", model=("load", 0)),
        sigmas=_node("ChromaTailSigmas"),
        stock=_node("ChromaFromHost"),
    ),
    "options": _graph(
        dataset=_node("ChromaDatasetOptions"),
        sampler=_node("ChromaSamplerOptions"),
        optimizer=_node("ChromaOptimizerSettings"),
        noise=_node("ChromaNoiseSettings"),
        preview=_node("ChromaPreviewSettings"),
        saving=_node("ChromaSavingSettings"),
        adapter=_node("ChromaAdapterSettings"),
        speed=_node("ChromaSpeedSettings"),
    ),
    "train": _graph(
        load=_LOAD,
        dataset=_node("ChromaDataset", **_SET),
        heldout=_node("ChromaDataset", "Held-out images", **_SET | {"folder": "sks_emblem_heldout"}),
        settings=_node("ChromaTrainingSettings", lr_schedule="cosine", validate_every=100),
        train=_node(
            "ChromaTrainLora",
            model=("load", 0),
            text_encoder=("load", 1),
            dataset=("dataset", 0),
            validation_dataset=("heldout", 0),
            settings=("settings", 0),
            name=LORA.removesuffix(".safetensors"),
            steps=500,
            learning_rate=2e-3,
            target="all+ffs",
            batch_size=4,
            preview_prompt=_CONCEPT,
            preview_every=100,
        ),
        status=_node("ChromaTrainingStatus", job=("train", 0)),
        wait=_node("ChromaWaitForTraining", job=("train", 0)),
        name=_node("PreviewAny", source=("wait", 1)),
        use=_node("ChromaUseStep", job=("train", 0)),
    ),
    "lora": _graph(
        load=_LOAD,
        apply=_node("ChromaApplyLora", model=("load", 0), lora=LORA),
        report=_node("PreviewAny", source=("apply", 1)),
        inspect=_node("ChromaInspectLora", lora=LORA, model=("load", 0)),
        convert=_node("ChromaConvertLora", lora=LORA, dialect="kohya"),
        merge=_node("ChromaMergeLora", model=("apply", 0)),
        extract=_node("ChromaExtractLora", base=("load", 0), tuned=("merge", 0)),
    ),
    "sets": _graph(
        load=_LOAD,
        prompt=_prompt("a red star on a blue background"),
        negative=_NEGATIVE,
        latent=_latent(4),
        sample=_SAMPLER,
        decode=_DECODE,
        main=_node("ChromaDataset", **_SET),
        ordinary=_node(
            "ChromaDatasetFromImages",
            images=("decode", 0),
            captions="a red star on a blue background",
            regularisation=True,
        ),
        combine=_node(
            "ChromaCombineDatasets", dataset_1=("main", 0), dataset_2=("ordinary", 0), weight_1=1.0, weight_2=0.5
        ),
        summary=_node("PreviewAny", source=("combine", 1)),
    ),
    "parity": _graph(
        load=_LOAD,
        parity=_node(
            "ChromaParity",
            model=("load", 0),
            text_encoder=("load", 1),
            prompt="a red star on a blue background",
            width=64,
            height=64,
            factors="recipe",
            control_after_generate="fixed",
        ),
    ),
}


IMAGES = ROOT / "web" / "docs" / "images"
LIMIT = 45_000  # bytes an image
VIEW = 1500, 2600  # CSS pixels; the tallest node fits
SCALE = 2.0  # device pixels for each
MARGIN = 10  # CSS pixels around the node
CORNER = 60  # where the node is put, from the canvas' left and top
HALF = 0.55  # of a job or a run, where an image of one at work is taken

LOAD = """graph => {
  app.loadApiJson(graph, 'help');
  app.extensionManager.focusMode = true;  // no menus over the nodes
}"""
PLACE = """async ([type, corner, width, room]) => {
  const node = app.graph._nodes.find(node => node.type === type);
  if (node.pos[0] < 50000) node.pos = [100000 * (1 + node.id), 0];  // the others would look in at the edges
  app.canvas.deselectAll?.();
  app.canvas.ds.scale = 1;
  app.canvas.ds.offset = [corner - node.pos[0], corner + LiteGraph.NODE_TITLE_HEIGHT - node.pos[1]];
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
PREVIEWED = """([type, half]) => {
  const node = app.graph._nodes.find(node => node.type === type);
  return Boolean(app.nodePreviewImages[String(node.id)]?.length) && (node.progress ?? 0) > half;
}"""


def wait_until(true: Callable[[], Any], what: str, timeout: float = 1800) -> None:
    """Raises SystemExit, naming what did not come, after `timeout` seconds."""
    start = time.monotonic()
    while not true():
        if time.monotonic() - start > timeout:
            raise SystemExit(f"error: {what}: it has not come within {timeout:.0f} s.")
        time.sleep(0.1)


class Camera:
    """Takes images of nodes on a page of the host."""

    def __init__(self, host: Host, page: Any, folder: Path):
        self.host, self.page, self.folder = host, page, folder

    def load(self, graph: str) -> None:
        self.page.evaluate(LOAD, GRAPHS[graph])
        self.page.wait_for_timeout(800)

    def queue(self) -> str:
        """Run the open graph from the page, so that the page shows what its nodes give; the prompt's id."""
        before = self._prompts()
        self.page.evaluate("async () => { await app.queuePrompt(0, 1) }")
        wait_until(lambda: self._prompts() - before, "the prompt that the page queued", 60)
        return (self._prompts() - before).pop()

    def _prompts(self) -> set[str]:
        queue = self.host.get("/queue")
        waiting = {entry[1] for entry in (*queue["queue_running"], *queue["queue_pending"])}
        return waiting | set(self.host.get("/history"))

    def place(self, shot: Shot) -> None:
        self.page.evaluate(PLACE, [shot.node, CORNER, shot.width, shot.room])
        self.page.wait_for_timeout(1000)  # images and panels of the node are drawn

    def shoot(self, shot: Shot) -> None:
        """Save the node, framed, as WebP below the limit."""
        from PIL import Image

        x, y, width, height = self.page.evaluate(BOX, shot.node)
        clip = {"x": x - MARGIN, "y": y - MARGIN, "width": width + 2 * MARGIN, "height": height + 2 * MARGIN}
        taken = Image.open(BytesIO(self.page.screenshot(clip=clip))).convert("RGB")
        path = self.folder / f"{shot.node}.webp"
        path.write_bytes(small_enough(taken))
        with Image.open(path) as image:
            say(f"wrote {path.name}: {image.width} × {image.height}, {path.stat().st_size / 1000:.0f} kB")


def small_enough(image: Any) -> bytes:
    """The image as WebP, as good as the limit allows; only then smaller in pixels."""
    from PIL import Image

    for scale in (1.0, 0.85, 0.7, 0.55):
        size = round(image.width * scale), round(image.height * scale)
        smaller = image if scale == 1 else image.resize(size, Image.Resampling.LANCZOS)
        for quality in (90, 80, 70, 60, 50):
            smaller.save(body := BytesIO(), "WEBP", quality=quality, method=6)
            if body.tell() <= LIMIT:
                return body.getvalue()
    raise SystemExit(f"error: an image of {image.size} does not go into {LIMIT} bytes.")


def half_trained(host: Host) -> bool:
    jobs = host.get("/chromakit/jobs")
    return bool(jobs) and (jobs[0]["step"] >= jobs[0]["steps"] * HALF or jobs[0]["state"] == "completed")


def train_first(camera: Camera) -> None:
    """The LoRA that the graph `lora` names, unless an image of its training has made it already."""
    if (camera.host.base / "output" / "loras" / LORA).exists():
        return
    say(f"training {LORA}")
    camera.load("train")
    camera.host.wait(camera.queue(), timeout=3600)
    camera.page.evaluate("async () => { await app.refreshComboInNodes(); }")  # else the page takes the file for missing


def take(camera: Camera, shots: Sequence[Shot]) -> None:
    """All shots of one graph."""
    if any(shot.needs_lora for shot in shots):
        train_first(camera)
    camera.load(shots[0].graph)
    of = {moment: [shot for shot in shots if shot.moment == moment] for moment in ("placed", "running", "done")}
    for shot in of["placed"]:
        camera.place(shot)
        camera.shoot(shot)
    if not of["running"] and not of["done"]:
        return
    for shot in of["running"]:
        camera.place(shot)
    prompt = camera.queue()
    for shot in of["running"]:
        if shot.node == "ChromaSampler":
            camera.page.wait_for_function(PREVIEWED, arg=[shot.node, HALF], timeout=120_000, polling=30)
        else:
            wait_until(lambda: half_trained(camera.host), f"{shot.node}: a job half way")
            camera.place(shot)
        camera.shoot(shot)
    camera.host.wait(prompt, timeout=3600)
    if any(shot.node == "ChromaTrainingStatus" for shot in shots):  # it has shown the job's first moment
        camera.host.wait(camera.queue())
    camera.page.wait_for_timeout(1500)
    for shot in of["done"]:
        camera.place(shot)
        camera.shoot(shot)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NODE", help="ids of the nodes to take images of")
    parser.add_argument("--classic", action="store_true", help="in the older node renderer, which shows every input")
    parser.add_argument("--output", type=Path, default=IMAGES, help="folder to write to")
    arguments = parser.parse_args()
    ensure_environment()
    if missing := set(arguments.only or pack_node_ids()) - {shot.node for shot in SHOTS}:
        raise SystemExit(f"error: there is no image planned of {', '.join(sorted(missing))}. Add a Shot to SHOTS.")
    groups: dict[str, list[Shot]] = {}
    for shot in SHOTS:
        if not arguments.only or shot.node in arguments.only:
            groups.setdefault(shot.graph, []).append(shot)
    arguments.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as base, start_host(Path(base)) as host:
        with open_page(host, *VIEW, SCALE, **{"Comfy.VueNodes.Enabled": not arguments.classic}) as page:
            camera = Camera(host, page, arguments.output.resolve())
            for shots in groups.values():
                take(camera, shots)
    return 0


if __name__ == "__main__":
    sys.exit(main())
