"""Reading a transformer of the real widths into memory, beside diffusers and ComfyUI.

    python -m benchmarks loading --blocks 1 1 --rounds 3 --json

A file in the original layout with random bf16 weights is written once; then each contestant loads it in a process of
its own, in turn: ours in bf16, int8 and int8 from the kept quantised file; diffusers' `from_single_file` with a local
configuration; ComfyUI's `load_diffusion_model`. What is timed begins after the imports and ends when every weight lies
in memory of its own: peers that leave views of the file copy them. `peak` is the highest resident memory above that of
the process before, over the file's size.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.comfyui_peer import CLOCKS
from benchmarks.real_model import ROOT
from benchmarks.real_size import as_the_peer_does, write_random
from benchmarks.turns import add_options, load, show

CONTESTANTS = ("ours", "ours_int8", "ours_int8_kept", "diffusers", "comfyui")


def ours(file: Path, precision: str, kept: str | None) -> Callable[[], object]:
    """Our loader; `tiny` warms its imports."""
    from chroma_core.loading.load import load_transformer
    from chroma_core.loading.spec import ModelSpec

    load_transformer(ModelSpec("tiny", precision=precision), "cpu")
    spec = ModelSpec("base", transformer=str(file), precision=precision, quantised_folder=kept)
    return lambda: load_transformer(spec, "cpu")


def diffusers(file: Path) -> Callable[[], object]:
    """diffusers' reader of single files."""
    import torch
    from diffusers import ChromaTransformer2DModel  # noqa: F401

    return lambda: as_the_peer_does(file, torch.device("cpu"))


def comfyui(file: Path) -> Callable[[], object]:
    """What ComfyUI's *Load Diffusion Model* calls."""
    sys.path.insert(0, str(ROOT / "scripts"))
    import native_lora_check

    native_lora_check.import_host("--bf16-unet")
    import comfy.sd

    def load_it() -> object:
        patcher: Any = comfy.sd.load_diffusion_model(str(file))
        for parameter in patcher.model.parameters():
            parameter.data = parameter.data.clone()
        return patcher

    return load_it


def one(contestant: str, file: Path, kept: str, clock: str) -> dict[str, float]:
    """One load in this process."""
    import resource

    ways: dict[str, Callable[[], Callable[[], object]]] = {
        "ours": lambda: ours(file, "bf16", None),
        "ours_int8": lambda: ours(file, "int8", None),
        "ours_int8_kept": lambda: ours(file, "int8", kept),
        "diffusers": lambda: diffusers(file),
        "comfyui": lambda: comfyui(file),
    }
    work, now = ways[contestant](), CLOCKS[clock]
    pages = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    started = now()
    model = work()
    took = now() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - pages
    assert model is not None
    return {"s": took, "peak": peak / file.stat().st_size}


def measure(blocks: tuple[int, int], rounds: int, threads: int, clock: str, scratch: str | None) -> dict[str, Any]:
    """Medians by contestant, and the peers' ratios to ours."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTESTANTS}
    before = load()
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        file = Path(folder) / "chroma.safetensors"
        write_random(file, *blocks)
        for number in range(rounds + 1):  # the first one reads the file into the system's cache and writes the kept one
            for name in CONTESTANTS:
                command = [sys.executable, "-m", "benchmarks.loading", "--one", name, "--file", str(file)]
                command += ["--kept", folder, "--threads", str(threads), "--clock", clock]
                said = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
                if number:
                    found[name].append(json.loads(said.splitlines()[-1]))
        row: dict[str, Any] = {"blocks": "+".join(map(str, blocks)), "file_gib": file.stat().st_size / 2**30}
    for name, loads in found.items():
        seconds = [each["s"] for each in loads]
        row |= {f"{name}_s": statistics.median(seconds), f"{name}_spread": max(seconds) / min(seconds)}
        row[f"{name}_peak"] = statistics.median(each["peak"] for each in loads)
    row |= {f"ratio_{name}": row[f"{name}_s"] / row["ours_s"] for name in ("diffusers", "comfyui")}
    return row | {"rounds": rounds, "clock": clock, "load_before": before, "load_after": load()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--blocks", type=int, nargs=2, default=(1, 1), metavar=("DOUBLE", "SINGLE"), help="how many blocks of each kind"
    )
    add_options(parser, threads=1)
    parser.add_argument("--scratch", default=None, help="a folder for the random model (default: the system's)")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--one", choices=CONTESTANTS, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--file", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--kept", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        import torch

        torch.set_num_threads(options.threads)
        said = one(options.one, Path(options.file), options.kept, options.clock)
        print(json.dumps(said))
        return 0
    row = measure(tuple(options.blocks), options.rounds, options.threads, options.clock, options.scratch)
    show(row, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
