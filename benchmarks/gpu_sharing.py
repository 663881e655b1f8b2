"""A training job and prompts on one GPU, and a whole job by the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_bench import ROOT, SMALL, Bench, Row, clear, differing
from benchmarks.gpu_steps import sample_image
from benchmarks.gpu_truth import begin
from benchmarks.real_model import GIB, SIMULATED, Job, job, transformer
from chroma_core.model.device import release_memory
from chroma_core.streaming import to_device, to_host


def sharing(bench: Bench) -> Iterator[Row]:
    """A job steps while another thread samples; yields; a card that is filled during a step."""
    yield _side_by_side()
    clear()
    for name in ("int8",) if SIMULATED else ("int8", "bf16"):
        yield from _leaving(name)
        clear()


def _side_by_side() -> Row:
    model, other = transformer("int8", SMALL), transformer("bf16", SMALL, seed=3)
    made = job(model, "int8", 512)
    start = list(made.trained())
    alone = sample_image(other, 4)
    for number in range(6):
        made.step(number)
    expected = list(made.trained())
    begin(made, start)
    images: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: images.extend(sample_image(other, 4) for _ in range(3)))
    thread.start()
    for number in range(6):
        made.step(number)
    thread.join()
    found = list(made.trained())
    return {
        "what": "steps while another thread samples",
        "trained_elements_that_differ": differing(expected, found),
        "pictures_equal": [bool(torch.equal(image, alone)) for image in images],
    }


def _leaving(name: str) -> Iterator[Row]:
    model = transformer(name)
    made = job(model, name, 512)
    made.step()
    held = torch.cuda.memory_allocated() / GIB
    away, back, left = [], [], []
    for _ in range(2):
        begun = time.perf_counter()
        to_host(model)
        release_memory()
        torch.cuda.synchronize()
        away.append(time.perf_counter() - begun)
        free, total = torch.cuda.mem_get_info()
        left.append((total - free) / GIB)
        begun = time.perf_counter()
        to_device(model, torch.device("cuda"))
        torch.cuda.synchronize()
        back.append(time.perf_counter() - begun)
        made.step()
    yield {
        "what": f"{name}: leaving the card and coming back",
        "held_gib": held,
        "seconds_to_leave": away,
        "seconds_to_come_back": back,
        "used_gib_while_away": left,
    }
    if name == "int8":
        yield {"what": "a card filled to 100 MB during a step", **_filled(made)}


def _filled(made: Job) -> Row:
    clear()
    free, _ = torch.cuda.mem_get_info()
    filler = torch.empty(max(1, free - (100 << 20)), dtype=torch.uint8, device="cuda")
    try:
        made.step()
        found = "the step ended"
    except Exception as error:
        found = f"{type(error).__name__}: {str(error).splitlines()[0]}"[:160]
    del filler
    made.stepper.forget()
    clear()
    result = made.step()
    return {"step": found, "the_next_step": f"loss {result.loss:.4f}, skipped '{result.skipped}'"}


def whole_job(bench: Bench) -> Iterator[Row]:
    """`tiny` on the card by the command line, killed once and resumed."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "job.toml").write_text(
            'name = "card"\nsteps = 60\nbatch_size = 4\ncheckpoint_every = 10\nvalidate_every = 30\n'
            '[model]\nflavour = "tiny"\n[dataset]\n'
            f'folder = "{ROOT / "example_datasets" / "sks_emblem"}"\ntrigger = "sks"\n'
            f'[validation_dataset]\nfolder = "{ROOT / "example_datasets" / "sks_emblem_heldout"}"\ntrigger = "sks"\n'
            '[previews]\nprompts = ["a [trigger] emblem"]\nevery = 30\n',
            encoding="utf-8",
        )
        command = [sys.executable, "-m", "chroma_core", "train", str(folder / "job.toml")]
        command += ["--output", str(folder / "o")]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        started = time.perf_counter()
        process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=ROOT)
        killed = _kill_after_a_checkpoint(process, folder / "o")
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, cwd=ROOT)
        status = next((folder / "o").rglob("job.json"), None)
        values = json.loads(status.read_text(encoding="utf-8")) if status else {}
        yield {
            "what": "tiny by the command line",
            "killed_after_a_checkpoint": killed,
            "exit_status": done.returncode,
            "seconds": time.perf_counter() - started,
            "loras": len(list((folder / "o").rglob("*.safetensors"))),
            "status": {k: v for k, v in values.items() if isinstance(v, (int, float, str)) and len(str(v)) < 80},
            "last_words": (done.stdout + done.stderr).strip().splitlines()[-1:] if done.returncode else [],
        }


def _kill_after_a_checkpoint(process: Any, folder: Path) -> bool:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        if any(path.is_dir() for path in folder.rglob("step-0000[123]0")):
            process.kill()
            process.wait()
            return True
        time.sleep(0.05)
    process.kill()
    process.wait()
    return False
