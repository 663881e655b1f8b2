"""What a real card says about ChromaKit, in one run of under ten minutes.

    python benchmarks/gpu.py --budget 540 --out FOLDER [--only truth streaming …]

Needs a CUDA card, Python 3.10+, torch and the pack's requirements; no ComfyUI, no network, no model file: weights are
random and made on the card. One process, cases in order of value, each under its own guard: a case that fails is a line
that says so. `FOLDER/gpu.json` gets one JSON line a case; the tables come last, as Markdown. What the budget leaves out
is named. Without a card it says so and ends with 2; on the simulated one it runs to its end, and times mean nothing.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

from benchmarks.gpu_bench import Bench, Case, card, tables  # noqa: E402
from benchmarks.gpu_sharing import sharing, whole_job  # noqa: E402
from benchmarks.gpu_steps import (  # noqa: E402
    compiled_steps,
    other_peaks,
    products,
    sampling,
    step_table,
    streamed_steps,
    text_lengths,
)
from benchmarks.gpu_truth import resume, streaming, truth  # noqa: E402
from benchmarks.real_model import SIMULATED  # noqa: E402

CASES: dict[str, tuple[Case, float]] = {
    "card": (card, 5),
    "truth": (truth, 10),
    "streaming": (streaming, 20),
    "products": (products, 40),
    "steps": (step_table, 40),
    "resume": (resume, 15),
    "sharing": (sharing, 25),
    "other peaks": (other_peaks, 20),
    "text lengths": (text_lengths, 20),
    "streamed steps": (streamed_steps, 40),
    "sampling": (sampling, 25),
    "whole job": (whole_job, 40),
    "compiled": (compiled_steps, 70),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=540, help="seconds for everything")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where gpu.json and gpu.md go")
    parser.add_argument("--only", nargs="*", choices=list(CASES), default=None, metavar="CASE", help=", ".join(CASES))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            "There is no CUDA card here, so nothing was measured. On a machine with one, run this again; the "
            "simulated card (tests/support/nullgpu) shows that the script runs.",
            file=sys.stderr,
        )
        return 2
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    bench = Bench(options.budget, options.out)
    for name, (case, seconds) in CASES.items():
        if options.only is None or name in options.only or name == "card":
            bench.run(name, case, 0 if SIMULATED else seconds)
    text = tables(bench.rows)
    (options.out / "gpu.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
