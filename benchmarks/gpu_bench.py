"""What every case of the GPU benchmark uses: the clock and the guard, times on the GPU, and the tables of results."""

from __future__ import annotations

import contextlib
import gc
import json
import statistics
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.real_model import GIB, SIMULATED, Job

ROOT = Path(__file__).resolve().parents[1]
OWN = ("int8", "fp8", "int4", "nf4")
WARM, TIMED = (1, 1) if SIMULATED else (2, 5)
SMALL = (2, 4)
"""Blocks of the real widths where the whole model would only take longer."""

Row = dict[str, Any]
Case = Callable[["Bench"], Iterator[Row]]


class Bench:
    """The clock, the card's ceilings, and where results go."""

    def __init__(self, budget: float, folder: Path):
        self.started, self.budget, self.folder = time.monotonic(), budget, folder
        self.rows: list[Row] = []
        self.ceilings: Row = {}
        self.flop: dict[tuple[int, int], float] = {}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "gpu.json").write_text("", encoding="utf-8")

    @property
    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.budget - (time.monotonic() - self.started)

    def add(self, row: Row) -> None:
        """Write one case down, at once."""
        row = {key: _rounded(value) for key, value in row.items()}
        self.rows.append(row)
        with (self.folder / "gpu.json").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(f"[{self.budget - self.left:5.0f} s] {json.dumps(row)}"[:1500], flush=True)

    def run(self, name: str, case: Case, seconds: float) -> None:
        """One case under its guard; left out, by name, when less than `seconds` are left."""
        if self.left < seconds:
            self.add({"case": name, "left_out": f"{self.left:.0f} s were left, it takes about {seconds:.0f}"})
            return
        started = time.monotonic()
        try:
            for row in case(self):
                self.add({"case": name} | row)
                if self.left < 5:
                    self.add({"case": name, "left_out": "the budget ended in the middle"})
                    return
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
            self.add({"case": name, "error": text, "at": f"{Path(where.filename).name}:{where.lineno}"})
        finally:
            clear()
            print(f"        {name}: {time.monotonic() - started:.1f} s", flush=True)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def clear() -> None:
    """Give the card everything back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def seconds_of(work: Callable[[], Any], repeats: int = 10, warm: int = 3) -> float:
    """Median seconds of `work` on the card's own clock."""
    for _ in range(warm):
        work()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(max(start.elapsed_time(end) / 1000, 1e-9))
    return statistics.median(times)


def steps_timed(made: Job, warm: int = WARM, timed: int = TIMED) -> list[float]:
    """Wall seconds of every timed step; a step ends with the card idle, since it reads the loss and the norm."""
    for _ in range(warm):
        made.step()
    found = []
    for _ in range(timed):
        torch.cuda.synchronize()
        started = time.perf_counter()
        made.step()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - started)
    return found


def differing(some: list[torch.Tensor], others: list[torch.Tensor]) -> int | None:
    """Elements that are not equal, None on the simulated card, which computes nothing."""
    return None if SIMULATED else sum(int((a != b).sum()) for a, b in zip(some, others, strict=True))


def furthest(some: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    """The largest |a − b| over the largest |a|."""
    gap = max(float((a - b).abs().max()) for a, b in zip(some, others, strict=True))
    return gap / max(1e-30, max(float(a.abs().max()) for a in some))


def relative(found: torch.Tensor, reference: torch.Tensor) -> float:
    """‖found − reference‖ / ‖reference‖ in fp64 on the CPU."""
    found, reference = found.detach().double().cpu(), reference.detach().double().cpu()
    return float((found - reference).norm() / reference.norm().clamp_min(1e-30))


def card(bench: Bench) -> Iterator[Row]:
    """Name, versions, and what copies and products reach."""
    properties = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info()
    driver = ""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, timeout=10).stdout.strip()
    row: Row = {
        "name": "simulated" if SIMULATED else properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": total / GIB,
        "context_gib": (total - free - torch.cuda.memory_reserved()) / GIB,
        "driver": driver,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    n = 8192
    source = torch.empty(2 * GIB, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    row["copy_gb_s"] = 2 * source.numel() / seconds_of(lambda: target.copy_(source), 5, 1) / 1e9
    for kind, pinned in (("pinned", True), ("pageable", False)):
        host = torch.empty(GIB // 2, dtype=torch.uint8, pin_memory=pinned)
        piece = source[: GIB // 2]
        row[f"to_card_{kind}_gb_s"] = len(host) / seconds_of(lambda h=host, p=piece: p.copy_(h), 3, 1) / 1e9
        row[f"from_card_{kind}_gb_s"] = len(host) / seconds_of(lambda h=host, p=piece: h.copy_(p), 3, 1) / 1e9
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    row["bf16_tflop_s"] = 2 * n**3 / seconds_of(lambda: a @ b) / 1e12
    row["fp32_tflop_s"] = 2 * 4096**3 / seconds_of(lambda: a[:4096, :4096].float() @ b[:4096, :4096].float(), 3) / 1e12
    with contextlib.suppress(RuntimeError):
        x, y = (torch.randint(-127, 127, (n, n), device="cuda", dtype=torch.int8) for _ in range(2))
        row["int8_tflop_s"] = 2 * n**3 / seconds_of(lambda: torch._int_mm(x, y.t())) / 1e12
    with contextlib.suppress(RuntimeError):
        x, y = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
        ones = torch.ones(n, 1, device="cuda")
        row["fp8_tflop_s"] = (
            2 * n**3 / seconds_of(lambda: torch._scaled_mm(x, y.t(), ones, ones.t(), out_dtype=torch.bfloat16)) / 1e12
        )
    bench.ceilings = row
    yield row


def tables(rows: list[Row]) -> str:
    """What was found, as Markdown, one table a case."""
    lines: list[str] = []
    for name in dict.fromkeys(row["case"] for row in rows):
        mine = [row for row in rows if row["case"] == name]
        columns = list(dict.fromkeys(key for row in mine for key in row if key not in ("case", "longest")))
        lines += ["", f"### {name}", "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        lines += ["| " + " | ".join(str(row.get(key, "")) for key in columns) + " |" for row in mine]
    return "\n".join(lines)
