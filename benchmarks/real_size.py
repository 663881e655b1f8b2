"""Chroma at its real widths with random weights: what loading and one forward pass take, at every precision.

    python benchmarks/real_size.py                         # 1+1 blocks (0.62 billion parameters) on the CPU
    python benchmarks/real_size.py --blocks 19 38 --device cuda --write    # the whole model; writes docs/measured.md

Every measurement runs in a process of its own. Peers, in the same run: diffusers' `from_single_file` for loading, our
bf16 for the forward pass, the same precision without streaming for block streaming, and quantising anew for a kept
quantised file. The weights are random, so nothing here says anything about images.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.pages import fill, markdown_table  # noqa: E402

PEER = "diffusers"


def write_random(path: Path, layers: int, single_layers: int) -> None:
    """A transformer of the real widths in the original layout, bf16, written tensor by tensor."""
    import torch

    from chroma_core.model.transformer import ChromaTransformer
    from chroma_core.names import transformer as keys
    from chroma_core.weights.safetensors_files import write_safetensors

    with torch.device("meta"):
        model = ChromaTransformer(num_layers=layers, num_single_layers=single_layers).to(torch.bfloat16)
    layout = keys.to_original(model.state_dict())

    def tensors():
        generator = torch.Generator().manual_seed(0)
        for name, tensor in layout.items():
            yield name, torch.empty(tensor.shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)

    write_safetensors(path, layout.items(), tensors())


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One load and one forward pass in this process."""
    import resource
    import time

    import torch

    from chroma_core.loading.load import load_transformer
    from chroma_core.loading.spec import ModelSpec
    from chroma_core.model.latents import image_ids

    device = torch.device(options.device)
    load_transformer(ModelSpec("tiny", precision=options.precision if options.precision != PEER else "bf16"), device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    pages = Path("/proc/self/statm")
    before = int(pages.read_text().split()[1]) * resource.getpagesize() if pages.exists() else 0
    started = time.perf_counter()
    if options.precision == PEER:
        model = as_the_peer_does(Path(options.file), device)
    else:
        spec = ModelSpec(
            "base",
            transformer=options.file,
            precision=options.precision,
            offload=options.offload,
            quantised_folder=options.kept,
        )
        model = load_transformer(spec, device)
    _wait(device)
    loaded = time.perf_counter() - started
    rows = options.size // 16
    dtype = model.x_embedder.weight.dtype
    call = (
        torch.zeros(1, rows * rows, 64, device=device, dtype=dtype),
        torch.zeros(1, 64, 4096, device=device, dtype=dtype),
        torch.tensor([0.5], device=device),
        image_ids(2 * rows, 2 * rows, device),
    )
    if options.precision == PEER:  # only its loading is compared; its forward pass takes other arguments
        return _result(loaded, None, before, device)
    with torch.no_grad():
        model(*call)
        _wait(device)
        started = time.perf_counter()
        for _ in range(options.repeats):
            model(*call)
        _wait(device)
        forward = (time.perf_counter() - started) / options.repeats
    return _result(loaded, forward, before, device)


def _result(loaded: float, forward: float | None, before: int, device) -> dict[str, Any]:
    import resource

    import torch

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "load_s": loaded,
        "forward_s": forward,
        "host_peak_bytes": peak - before,
        "device_peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
    }


def as_the_peer_does(path: Path, device):
    """diffusers' own reader of single files, with a local configuration so that it needs no network."""
    import torch
    from diffusers import ChromaTransformer2DModel

    from chroma_core.loading.load import transformer_outline
    from chroma_core.loading.spec import ModelSpec

    config = path.parent / "config"
    outline = transformer_outline(ModelSpec("base", transformer=str(path)))
    (config / "transformer").mkdir(parents=True, exist_ok=True)
    (config / "transformer" / "config.json").write_text(json.dumps(vars(outline.config)))
    model: Any = ChromaTransformer2DModel.from_single_file(
        str(path), config=str(config), subfolder="transformer", torch_dtype=torch.bfloat16, local_files_only=True
    ).to(device)
    if device.type == "cpu":
        # It leaves views of the mapped file; what is compared is a model in memory.
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    return model


def _wait(device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def run_all(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a precision and mode, each measured in a process of its own."""
    from chroma_core.model.precision import PRECISIONS

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        file = Path(scratch) / "chroma.safetensors"
        write_random(file, *options.blocks)
        cases = [(PEER, "none", None), *((name, "none", None) for name in options.precisions or PRECISIONS)]
        cases += [("bf16", "block", None), ("int8", "block", None)]
        cases += [("nf4", "none", scratch), ("nf4", "none", scratch)]  # the second one finds the file of the first
        for precision, offload, kept in cases:
            mode = {"none": "", "block": "streamed"}[offload]
            if kept:
                mode = (
                    "kept, second start"
                    if any(row["mode"] == "kept, first start" for row in rows)
                    else "kept, first start"
                )
            command = [sys.executable, __file__, "--one", str(file), "--precision", precision, "--offload", offload]
            command += ["--device", options.device, "--size", str(options.size), "--repeats", str(options.repeats)]
            command += ["--kept", kept] if kept else []
            done = subprocess.run(command, capture_output=True, text=True)
            row: dict[str, Any] = {"precision": precision, "mode": mode}
            if done.returncode == 0:
                row |= json.loads(done.stdout.splitlines()[-1])
            else:
                row["error"] = done.stderr.strip().splitlines()[-1][:200]
            rows.append(row)
            print(json.dumps(row), flush=True)
        rows.append({"file_bytes": file.stat().st_size})
    return rows


def table(rows: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """The rows as Markdown, times as ratios to their peers."""
    size = rows[-1]["file_bytes"]
    found = {(row["precision"], row["mode"]): row for row in rows[:-1]}
    peer = found[PEER, ""]
    columns = "precision, mode, load time ÷ peer's, extra host peak ÷ file, device peak, forward ÷ bf16's".split(", ")
    lines: list[tuple[str, ...]] = []
    for (precision, mode), row in found.items():
        if "error" in row:
            lines.append((precision, mode, row["error"]))
            continue
        device = row["device_peak_bytes"]
        forward = row["forward_s"]
        lines.append(
            (
                precision,
                mode,
                f"{row['load_s'] / peer['load_s']:.2f}",
                f"{row['host_peak_bytes'] / size:.2f}",
                "—" if device is None else f"{device / 2**30:.2f} GiB",
                "—" if forward is None else f"{forward / found['bf16', '']['forward_s']:.2f}",
            )
        )
    return markdown_table(lines, columns)


def device_name(name: str) -> str:
    """What the device calls itself."""
    import torch

    return torch.cuda.get_device_name() if name.startswith("cuda") else f"a CPU ({platform.machine()}, one thread)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--blocks", type=int, nargs=2, default=(1, 1), metavar=("DOUBLE", "SINGLE"), help="how many blocks of each kind"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--size", type=int, default=256, help="pixels a side of the image in the forward pass")
    parser.add_argument("--repeats", type=int, default=2, help="how often each is timed; the fastest counts")
    parser.add_argument("--precisions", nargs="*", default=None, help="those of the transformer (default: all)")
    parser.add_argument("--scratch", default=None, help="a folder for the random model (default: the system's)")
    parser.add_argument("--write", action="store_true", help="write docs/measured.md")
    parser.add_argument("--one", dest="file", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--precision", default="bf16", help=argparse.SUPPRESS)
    parser.add_argument("--offload", default="none", help=argparse.SUPPRESS)
    parser.add_argument("--kept", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.file is not None:
        print(json.dumps(measure(options)))
        return
    rows = run_all(options)
    text = table(rows, options)
    print(text)
    if options.write:
        heading = (
            f"On {device_name(options.device)}: {options.blocks[0]}+{options.blocks[1]} blocks of the real widths, a "
            f"file of {rows[-1]['file_bytes'] / 2**30:.2f} GiB, random weights, a forward pass at {options.size}²; the "
            f"peer loads in {rows[0]['load_s']:.1f} s.\n\n"
        )
        fill(ROOT / "docs" / "measured.md", "real_size", heading + text)


if __name__ == "__main__":
    main()
