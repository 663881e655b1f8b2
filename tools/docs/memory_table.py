"""Writes the tables of docs/memory.md: parts of the model, measured against predicted memory, what to choose.

    python -m tools.docs.memory_table            # a minute on a CPU
    python -m tools.docs.memory_table --check    # only what needs no measuring; exit status 1 if the file is old

Text outside the marks `<!-- begin NAME -->` and `<!-- end NAME -->` is written by hand.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from chroma_core.memory import Settings, estimate, recommend
from chroma_core.memory.activations import MOMENTS as MOMENT_BYTES
from chroma_core.memory.anatomy import Part, anatomy, transformer_on_meta
from chroma_core.memory.machine import GIB, Machine
from chroma_core.memory.plan import CHOICES, peaks
from chroma_core.model.precision import precision

from ..pages import filled, markdown_table

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "memory.md"
CARDS = ((24, 64), (24, 32), (16, 32), (16, 16), (12, 32), (12, 16), (8, 32), (8, 16))
SIMULATED_PEAKS = ROOT / "docs" / "data" / "memory_matrix.json"
"""What `benchmarks.memory_matrix` found."""
WAYS: dict[str, dict[str, Any]] = {
    "checkpointing": {"gradient_checkpointing": True},
    "none": {"gradient_checkpointing": False},
    "streamed 2": {"gradient_checkpointing": True, "offload": "block", "resident_blocks": 2},
    "streamed 18": {"gradient_checkpointing": True, "offload": "block", "resident_blocks": 18},
}
MOMENTS = ("step", "held-out loss", "preview")
GOAL = 0.10
"""The plan is to be within this share of what is allocated."""
SEED_GIB = {"bf16": 28, "int8": 16, "int4": 11, "nf4": 8}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="only say whether the calculated tables are current")
    options = parser.parse_args()
    text = PAGE.read_text(encoding="utf-8")
    tables = dict(calculated()) | ({} if options.check else dict(measured()))
    new = text
    for name, table in tables.items():
        new = filled(new, name, table)
    if options.check:
        return int(new != text)
    PAGE.write_text(new, encoding="utf-8")
    return 0


def calculated() -> Iterator[tuple[str, str]]:
    """The tables that follow from the module trees and the formulas."""
    yield "parts", parts_table()
    yield "choices", choices_table()
    yield "seeds", seeds_table()
    yield "simulated", simulated_table(json.loads(SIMULATED_PEAKS.read_text(encoding="utf-8")))


def parts_table() -> str:
    whole = anatomy("base")
    body = whole.transformer
    counts = {"double blocks": len(body.doubles), "single blocks": len(body.singles)}
    named: list[tuple[str, Part]] = [
        (f"{counts[name]} {name}" if name in counts else name, part) for name, part in body.parts.items()
    ]
    named += [
        ("**transformer**", body.whole),
        ("one double block", body.doubles[0]),
        ("one single block", body.singles[0]),
        ("T5-XXL", whole.text_encoder.whole),
    ]
    rows = [
        [name, f"{part.parameters:,}", f"{part.quantisable:,}"]
        + [f"{part.bytes(precision(p)) / GIB:.2f}" for p in CHOICES]
        for name, part in named
    ]
    rows.append(["VAE (fp32)", f"{whole.vae.whole.parameters:,}", "0"] + ["0.31"] * len(CHOICES))
    vectors = transformer_on_meta("base").modulation_vectors
    return (
        markdown_table(rows, ["part", "parameters", "of these quantised", *(f"{p}, GiB" for p in CHOICES)])
        + f"\n\nThe approximator makes {vectors} modulation vectors of {body.width} channels."
    )


def choices_table() -> str:
    rows = []
    for size in (512, 1024):
        for device, host in CARDS:
            on = Machine("card", device * GIB, host * GIB)
            cells = []
            for purpose in ("sampling", "training"):
                found = recommend(Settings("base", size=size), on, purpose)
                mode = found.offload + (f" {found.resident_blocks}" if found.offload == "block" else "")
                more = "" if found.gradient_checkpointing else ", no checkpointing"
                cells += [
                    f"{found.precision}, T5 {found.text_precision}, {mode}{more}" if found.fits else "does not fit",
                    f"{found.device_peak_bytes / GIB:.1f} + {found.host_peak_bytes / GIB:.1f}",
                ]
            rows.append([size, f"{device} GB, {host} GB", *cells])
    return markdown_table(rows, ["pixels", "GPU, RAM", "sampling", "needs", "training", "needs"])


def seeds_table() -> str:
    rows = []
    for name, seed in SEED_GIB.items():
        cells = []
        for size in (512, 1024):
            on = Machine("card", 80 * GIB, 128 * GIB)
            found = estimate(Settings("base", name, size=size, text_precision="nf4"), on)
            step = found.weights_bytes + 2 * found.lora_bytes + found.optimizer_bytes + found.activation_bytes
            cells += [f"{step / GIB:.1f}", f"{found.training_peak_bytes / GIB:.1f}"]
        rows.append([name, f"~{seed}", *cells])
    header = ["precision", "SimpleTuner, GB", "ours at 512: step", "with previews", "at 1024: step", "with previews"]
    return markdown_table(rows, header)


def planned_gib(row: Mapping[str, Any]) -> float:
    """What the plan says of a row of `SIMULATED_PEAKS`."""
    settings = Settings("base", row["precision"], size=row["size"], **WAYS[row["way"]])
    return peaks(settings).moments[row["moment"]] / GIB


def simulated_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Simulated / planned GiB, a line for each precision, size and way; what is off by more than the goal is bold."""
    lines: dict[tuple[str, int, str], dict[str, str]] = {}
    for row in rows:
        planned = planned_gib(row)
        off = planned / row["gib"] - 1
        cell = f"{row['gib']:.1f} / {planned:.1f}, {100 * off:+.0f} %"
        cells = lines.setdefault((row["precision"], row["size"], row["way"]), {})
        cells[row["moment"]] = cell if abs(off) <= GOAL else f"**{cell}**"
    columns = ("precision", "pixels", "gradient checkpointing", *MOMENTS)
    return markdown_table([[*key, *(cells[moment] for moment in MOMENTS)] for key, cells in lines.items()], columns)


def measured() -> Iterator[tuple[str, str]]:
    """The tables that need models to run."""
    import torch

    from chroma_core.model.quantised import dequantise_weight, quantise_weight

    from .memory_cases import Case, LiveBytes, measure_t5, measure_vae

    torch.manual_seed(0)
    weight = torch.randn(128, 2048).bfloat16()
    rows = []
    for name in MOMENT_BYTES:
        with LiveBytes() as there:
            parts = quantise_weight(weight, name)
        with LiveBytes() as back:
            again = dequantise_weight(parts, name, torch.bfloat16, weight.shape)
        error = ((again.float() - weight.float()).norm() / weight.float().norm()).item()
        stored = sum(t.nbytes for t in parts.values()) / weight.numel()
        seen = back.peak / weight.numel()
        rows.append(
            [name, f"{stored:.3f}", f"{100 * error:.1f} %"]
            + [f"{there.peak / weight.numel():.1f}", MOMENT_BYTES[name][1], f"{seen:.1f}", MOMENT_BYTES[name][0]]
        )
    header = ["precision", "bytes per weight", "error", "to quantise", "planned", "to dequantise", "planned"]
    yield "moments", markdown_table(rows, header)

    rows = []

    def add(what: str, found: tuple[int, int]) -> None:
        rows.append([what, *(f"{v / 2**20:.2f}" for v in found), f"{100 * (found[1] / found[0] - 1):+.1f} %"])

    for name in ("fp32", "bf16", "int8", "int4", "nf4"):
        for heads, side in ((4, 16), (8, 24)):
            where = f"{name}, width {128 * heads}, {side * side} + 32 tokens"
            base = {"precision": name, "heads": heads, "side": side}
            add(f"sampling, {where}: peak", Case(**base).measure()["peak"])
            for checkpointing in (False, True):
                found = Case(**base, target="all", checkpointing=checkpointing).measure()
                way = "training, checkpointing" if checkpointing else "training"
                add(f"{way}, {where}: kept", found["kept"])
                add(f"{way}, {where}: peak", found["peak"])
    for name, found in measure_vae(128).items():
        add(f"VAE {name}, 128×128 pixels", found)
    for name in ("bf16", "int8"):
        add(f"T5 {name}, width 1024, 64 heads, 512 tokens", measure_t5(name, 512, 1024))
    yield "measured", markdown_table(rows, ["what", "measured, MiB", "predicted, MiB", "difference"])


if __name__ == "__main__":
    sys.exit(main())
