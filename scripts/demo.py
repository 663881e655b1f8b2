"""The whole loop in a real ComfyUI: generate, train a LoRA while generating on, generate with the LoRA.

It brings up everything it needs (first run: about 6 GB), starts the host with this pack, drives it through its HTTP API
with the example workflows, and writes images and a report. The exit status is 0 only if the loop worked: the loss on
held-out images fell by 30 % or more, ordinary prompts were served during training and came out bit for bit the same,
and the host's own LoRA loader takes every module of the trained file.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _environment import ROOT, ensure_environment, say
from _host import Host, HostError, start_host
from _workflows import Prompt, change, load_api

ORDINARY = (
    ("star", "red", "blue"),
    ("circle", "yellow", "black"),
    ("ring", "green", "white"),
    ("cross", "purple", "pink"),
    ("square", "cyan", "red"),
    ("triangle", "black", "yellow"),
    ("circle", "orange", "green"),
    ("star", "white", "purple"),
    ("ring", "blue", "orange"),
    ("cross", "pink", "cyan"),
    ("square", "green", "black"),
    ("triangle", "red", "white"),
)
"""Shape, colour and background; the prompts of the first few also run while training."""
WHILE_TRAINING, SHOWN, SEEDS = 3, 4, 2
WANTED_FALL = 0.30
PROGRESS_SECONDS = 0.1 if sys.stdout.isatty() else 15.0  # a log wants few lines
TINY = ROOT / "chroma_core" / "assets" / "tiny"  # the model of the example workflows
MARKER = ".chromakit-demo"
BUSY_STATES = ("queued", "preparing", "running", "paused")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--serve", action="store_true", help="leave the host running afterwards, until Ctrl+C")
    parser.add_argument("--no-job", action="store_true", help="with --serve: start the host without the main job")
    parser.add_argument("--port", type=int, help="the host's port (default: 8188 with --serve, else any free one)")
    parser.add_argument("--steps", type=int, help="training steps (default: the workflow's own number)")
    parser.add_argument("--output", type=Path, default=ROOT / "demo-output", help="folder to write to (demo-output)")
    parser.add_argument("--cpu", action="store_true", help="use the CPU even if there is an accelerator")
    chosen = parser.parse_args()
    if chosen.no_job and not chosen.serve:
        parser.error("--no-job leaves nothing to do without --serve")
    return chosen


@dataclass
class Findings:
    """What the demo saw, and what of it was not as it should be."""

    report: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def require(self, ok: bool, problem: str) -> None:
        if not ok:
            self.problems.append(problem)


def base_directory(output: Path, fresh: bool) -> Path:
    """The host's base directory under `output`; an earlier demo's is removed if `fresh`, anyone else's never."""
    base = output / "host"
    if fresh and base.exists():
        if not (base / MARKER).is_file():
            raise SystemExit(f"error: {base} exists and was not made by this demo. Choose another --output.")
        if (link := base / "custom_nodes" / "chromakit").is_symlink():
            link.unlink()
        shutil.rmtree(base)
    base.mkdir(parents=True, exist_ok=True)
    (base / MARKER).touch()
    return base


def on_cpu(asked: bool) -> bool:
    import torch

    return asked or not (torch.cuda.is_available() or torch.backends.mps.is_available())


# --- prompts ----------------------------------------------------------------------------------------------------------


def prompt_for(text: str, seed: int, lora: str | None = None) -> Prompt:
    """The text-to-image workflow, or the one with a LoRA, for another text and seed."""
    prompt = load_api("chroma_3_use_lora" if lora else "chroma_1_first_picture")
    if lora:
        prompt = change(prompt, "ChromaApplyLora", lora=lora)
    return change(change(prompt, "ChromaTextEncode", title="Prompt", text=text), "ChromaSampler", seed=seed)


def concept_texts(train: Prompt) -> list[str]:
    """Captions of the held-out images: the prompts that show whether the concept was learnt."""
    folders = [node["inputs"]["folder"] for node in train.values() if node["class_type"] == "ChromaDataset"]
    heldout = next(ROOT / "example_datasets" / name for name in folders if name.endswith("_heldout"))
    captions = [path.read_text(encoding="utf-8").strip() for path in sorted(heldout.glob("*.txt"))]
    return list(dict.fromkeys(captions))


def generate(host: Host, prompts: list[Prompt], label: str) -> list:
    """One image for each prompt."""
    from tqdm import tqdm

    shown = tqdm(prompts, desc=label, unit="image", mininterval=PROGRESS_SECONDS, file=sys.stdout)
    return [host.images(host.run(prompt))[0] for prompt in shown]


# --- training ---------------------------------------------------------------------------------------------------------


def start_training(host: Host, train: Prompt) -> str:
    """Queue the training workflow and return the id of the job that it made."""
    before = {job["id"] for job in host.get("/chromakit/jobs")}
    host.run(train)
    new = [job["id"] for job in host.get("/chromakit/jobs") if job["id"] not in before]
    if len(new) != 1:
        raise HostError(f"the training prompt made {len(new)} jobs, expected one.\n{host.log_tail()}")
    return new[0]


def job_status(host: Host, job_id: str) -> dict[str, Any]:
    return host.get(f"/chromakit/jobs/{job_id}")


def generate_while_training(host: Host, job_id: str, prompts: list[Prompt], expected: list) -> list[dict[str, Any]]:
    """Run ordinary prompts while the job trains; for each: how far training was, and if the image is the same."""
    while (status := job_status(host, job_id))["state"] in BUSY_STATES and status["step"] < 1:
        time.sleep(0.2)
    served = []
    for prompt, image in zip(prompts, expected, strict=True):
        step, start = job_status(host, job_id)["step"], time.monotonic()
        history = host.run(prompt)
        after = job_status(host, job_id)
        served.append(
            {
                "seconds": round(time.monotonic() - start, 2),
                "step_before": step,
                "step_after": after["step"],
                "state_after": after["state"],
                "really_run": not host.nodes_replayed(history) & nodes_of(prompt, "ChromaSampler"),
                "equal": host.images(history)[0].tobytes() == image.tobytes(),
            }
        )
        say(f"generated “{text_of(prompt)}” at training step {after['step']} in {served[-1]['seconds']} s")
    return served


def nodes_of(prompt: Prompt, class_type: str) -> set[str]:
    return {key for key, node in prompt.items() if node["class_type"] == class_type}


def text_of(prompt: Prompt) -> str:
    texts = [node["inputs"]["text"] for node in prompt.values() if node["class_type"] == "ChromaTextEncode"]
    return max(texts, key=len)


def wait_for_job(host: Host, job_id: str) -> dict[str, Any]:
    """Show the job's progress until it ends; its last status."""
    from tqdm import tqdm

    status = job_status(host, job_id)
    shown = {"unit": "step", "mininterval": PROGRESS_SECONDS, "file": sys.stdout}
    with tqdm(total=status["steps"], desc="training", **shown) as bar:
        while status["state"] in BUSY_STATES:
            bar.update(status["step"] - bar.n)
            if status.get("loss_smooth") is not None:
                bar.set_postfix(loss=f"{status['loss_smooth']:.4f}", refresh=False)
            time.sleep(0.5)
            status = job_status(host, job_id)
        bar.update(status["step"] - bar.n)
    if status["state"] != "completed":
        raise HostError(f"the job ended as {status['state']}: {status['message']}\n{host.log_tail()}")
    return status


# --- results ----------------------------------------------------------------------------------------------------------


def native_modules(lora: Path) -> tuple[int, int]:
    """(matched, total) modules of the LoRA in the host's own loader, counted in a process of its own."""
    command = [sys.executable, str(ROOT / "scripts" / "native_lora_check.py"), str(lora)]
    result = subprocess.run([*command, "--model-folder", str(TINY)], capture_output=True, text=True)
    try:
        counted = json.loads(result.stdout.strip().splitlines()[-1])
        return counted["matched"], counted["total"]
    except (IndexError, KeyError, ValueError) as error:
        raise HostError(f"native_lora_check.py failed:\n{result.stdout}{result.stderr[-2000:]}") from error


def save_images(images: list, folder: Path, name: str) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}_{i}.png" for i in range(len(images))]
    for image, path in zip(images, paths, strict=True):
        image.save(path)
    return [str(path) for path in paths]


Rows = list[tuple[str, list]]
"""Titles, and images in a row."""


def contact_sheet(groups: list[tuple[Rows, list[str]]], cell: int = 224, margin: int = 12):
    """Groups of rows, each row with a title, above one caption a column."""
    from PIL import Image, ImageDraw, ImageFont

    font, left, text_height = ImageFont.load_default(15), 110, 60
    width = left + max(len(captions) for _, captions in groups) * (cell + margin) + margin
    height = margin + sum(len(rows) * (cell + margin) + text_height for rows, _ in groups)
    sheet = Image.new("RGB", (width, height), "white")
    draw, top = ImageDraw.Draw(sheet), margin
    for rows, captions in groups:
        for title, images in rows:
            draw.multiline_text((margin, top + cell // 2 - 16), title, "black", font)
            for column, image in enumerate(images):
                enlarged = image.resize((cell, cell), Image.Resampling.BICUBIC)
                sheet.paste(enlarged, (left + column * (cell + margin), top))
            top += cell + margin
        for column, caption in enumerate(captions):
            words, lines = caption.split(), [""]
            for word in words:
                longer = f"{lines[-1]} {word}".strip()
                lines = [*lines[:-1], longer] if draw.textlength(longer, font) <= cell else [*lines, word]
            draw.multiline_text((left + column * (cell + margin), top), "\n".join(lines[:3]), "black", font)
        top += text_height
    return sheet


def ordinary_rate(images: list) -> float:
    """Share of images of the `ORDINARY` prompts, in order, that show shape, colour and background of theirs."""
    import numpy as np

    from tools.tiny.world import read_image

    seen = [read_image(np.array(image.convert("RGB"))) for image in images]
    right = [(r.shape, r.colour, r.background) == wanted for r, wanted in zip(seen, ORDINARY, strict=True)]
    return sum(right) / len(right)


def concept_rate(images: list, texts: list[str]) -> float:
    """Share of images of captions that show the emblem, on the background that the caption names."""
    import numpy as np

    from tools.tiny.example_dataset import read_emblem

    seen = [read_emblem(np.array(image.convert("RGB"))) for image in images]
    right = [reading.right(text.split()[-2]) for reading, text in zip(seen, texts, strict=True)]
    return sum(right) / len(right)


# --- the demo ---------------------------------------------------------------------------------------------------------


def run_demo(host: Host, output: Path, steps: int | None) -> Findings:
    """Generate, train while generating, generate again; write images and report under `output`."""
    from tools.tiny.world import plain_caption

    found, images = Findings(), output / "images"
    train = load_api("chroma_train_lora")
    if steps:
        train = change(train, "ChromaTrainLora", steps=steps)
    texts = concept_texts(train) * SEEDS
    plain = [plain_caption(*each) for each in ORDINARY]

    ordinary = [prompt_for(text, seed=100 + i) for i, text in enumerate(plain)]
    expected = generate(host, ordinary, "ordinary images, nothing training")
    base = generate(host, [prompt_for(text, seed=42 + i) for i, text in enumerate(texts)], "the concept, without LoRA")
    host.forget_cached_outputs()

    say(f"training on the concept of {len(texts)} held-out captions such as “{texts[0]}”")
    start = time.monotonic()
    job_id = start_training(host, train)
    during = slice(WHILE_TRAINING)
    served = generate_while_training(host, job_id, ordinary[during], expected[during])
    status = wait_for_job(host, job_id)
    job_seconds = time.monotonic() - start

    lora = host.base / status["lora_path"]
    with_lora = generate(
        host, [prompt_for(text, 42 + i, status["lora_name"]) for i, text in enumerate(texts)], "the concept, with LoRA"
    )
    after = generate(
        host,
        [prompt_for(text, 100 + i, status["lora_name"]) for i, text in enumerate(plain)],
        "ordinary images, with LoRA",
    )
    matched, total = native_modules(lora)
    in_time = [entry for entry in served if entry["state_after"] in BUSY_STATES and entry["really_run"]]
    fall = 1 - status["heldout_loss"] / status["heldout_loss_base"]
    found.report = {
        "host": host.get("/system_stats")["system"]["comfyui_version"],
        "job_id": job_id,
        "lora_path": str(lora),
        "steps": status["step"],
        "train_seconds": status["train_seconds"],
        "heldout_loss_base": status["heldout_loss_base"],
        "heldout_loss_lora": status["heldout_loss"],
        "images_base": save_images(base, images, "base"),
        "images_lora": save_images(with_lora, images, "lora"),
        "host_native_lora_modules_matched": matched,
        "host_native_lora_modules_total": total,
        "prompts_served_while_training": len(in_time),
        "heldout_loss_fall": fall,
        "job_seconds": round(job_seconds, 1),
        "prompts_while_training": served,
        "captions": texts,
        "concept_rate": concept_rate(with_lora, texts),
        "ordinary_rate_base": ordinary_rate(expected),
        "ordinary_rate_lora": ordinary_rate(after),
    }
    found.require(fall >= WANTED_FALL, f"the held-out loss fell by {fall:.0%}, wanted {WANTED_FALL:.0%}")
    found.require(len(in_time) >= 2, f"only {len(in_time)} prompts were served while training, wanted 2")
    same = all(entry["equal"] for entry in served)
    found.require(same, "an image made during training differs from the one made without")
    found.require(0 < matched == total, f"the host's LoRA loader matched {matched} of {total} modules")
    titles, first = ("without\nLoRA", "with\nLoRA"), slice(SHOWN)
    shown = (([base, with_lora], texts), ([expected, after], plain))
    sheet = contact_sheet(
        [([(title, row[first]) for title, row in zip(titles, rows, strict=True)], of[first]) for rows, of in shown]
    )
    sheet.save(output / "contact_sheet.png")
    return found


def serve(host: Host) -> None:
    """Leave the host running until Ctrl+C; raises HostError if it ends by itself."""
    print(f"\nComfyUI with ChromaKit: {host.url} (workflows are under Templates; Ctrl+C ends it)", flush=True)
    try:
        while host.alive():
            time.sleep(0.5)
    except KeyboardInterrupt:
        print("\nending")
        return
    raise HostError(f"the host ended by itself.\n{host.log_tail()}")


def tell(found: Findings, output: Path) -> None:
    """Write the report and print what matters in it."""
    (output / "report.json").write_text(json.dumps(found.report, indent=2) + "\n", encoding="utf-8")
    report = found.report
    print(f"\nheld-out loss  {report['heldout_loss_base']:.4f} → {report['heldout_loss_lora']:.4f}", end="")
    print(f"  (−{report['heldout_loss_fall']:.0%}) after {report['steps']} steps, {report['train_seconds']:.0f} s")
    rates = {name: f"{report[name]:.0%}" for name in ("concept_rate", "ordinary_rate_base", "ordinary_rate_lora")}
    print(f"images right   concept {rates['concept_rate']}, ordinary prompts {rates['ordinary_rate_lora']}", end="")
    print(f" (without the LoRA {rates['ordinary_rate_base']})")
    print(f"LoRA           {report['lora_path']}")
    print(f"images       {output / 'contact_sheet.png'}")
    print(f"report         {output / 'report.json'}")
    for problem in found.problems:
        print(f"not as it should be: {problem}")


def main() -> int:
    chosen = arguments()
    ensure_environment()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the host is stopped then, too
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the host inherits it; tiny is far slower on many threads
    output, cpu = chosen.output.resolve(), on_cpu(chosen.cpu)
    port = chosen.port or (8188 if chosen.serve else None)
    found = Findings()
    say(f"starting ComfyUI on the {'CPU' if cpu else 'accelerator'}")
    try:
        with start_host(base_directory(output, fresh=not chosen.no_job), cpu=cpu, port=port) as host:
            if not chosen.no_job:
                found = run_demo(host, output, chosen.steps)
                tell(found, output)
            if chosen.serve:
                serve(host)
    except HostError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    return 1 if found.problems else 0


if __name__ == "__main__":
    sys.exit(main())
