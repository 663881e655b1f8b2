"""What one training step of the whole 8.9 B model asks of a card: memory, launches, FLOPs, bytes moved, host time.

    python benchmarks/step_cost.py --precision int8 --size 512 --flops --bytes --json

On a real card, or on the simulated one (tests/support/nullgpu), where times mean nothing and everything else counts.
The first step warms the allocator and makes the optimizer's state; the second is measured. Host time depends on what
else the computer does: `--repeat 25` gives the least of as many steps, `--calls` counts Python's calls of functions.
"""

from __future__ import annotations

import argparse
import cProfile
import ctypes
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_iter  # noqa: E402

from benchmarks.real_model import GIB, SIMULATED, WHOLE, condition, job, transformer  # noqa: E402
from chroma_core.model import four_bits  # noqa: E402
from chroma_core.model.eight_bits import Compute  # noqa: E402
from chroma_core.training.step.objective import HELDOUT_SIGMAS, heldout_loss  # noqa: E402

CONTEXT_GIB = 450 / 1024
"""Assumed for the CUDA context on the simulated card."""

VIEWS = frozenset(
    "view _unsafe_view reshape transpose t expand slice select unsqueeze squeeze permute detach alias split "
    "split_with_sizes chunk as_strided unbind empty empty_like unfold lift_fresh new_empty empty_strided "
    "view_as_complex view_as_real".split()
)


class BytesMoved(TorchDispatchMode):
    """Sums what every operation, and our own kernel for 4 bits, reads and writes on the card, each tensor once: an
    upper bound, without any cache."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.by_operation: dict[str, int] = {}
        self.launch = four_bits.launch

    def __enter__(self):
        four_bits.launch = self._launched
        return super().__enter__()

    def __exit__(self, *error):
        four_bits.launch = self.launch
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if name not in VIEWS:
            self._count(name, (args, kwargs, result))
        return result

    def _launched(self, kernels, weight, parts, scheme):
        self.launch(kernels, weight, parts, scheme)
        self._count(f"{scheme} kernel", (weight, parts))

    def _count(self, name: str, named: Any) -> None:
        tensors = {
            (t.data_ptr(), t.numel(), t.dtype): t.numel() * t.element_size()
            for t in tree_iter(named)
            if isinstance(t, torch.Tensor) and t.is_cuda
        }
        moved = sum(tensors.values())
        self.total += moved
        self.by_operation[name] = self.by_operation.get(name, 0) + moved


def count_flops(work: Callable[[], Any]) -> float:
    """TFLOP of the products and attentions of `work`."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 1e12


def count_launches(work: Callable[[], Any]) -> int:
    """Kernels and copies that `work` hands to a real card, as the profiler sees them."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        work()
        torch.cuda.synchronize()
    return sum(event.count for event in seen.key_averages() if event.self_device_time_total > 0)


def count_calls(work: Callable[[], Any]) -> int:
    """Calls of functions by Python in `work`, its backward pass included."""
    profiler = cProfile.Profile()
    with torch.autograd.set_multithreading_enabled(False):  # only its own thread is seen
        profiler.runcall(work)
    return sum(entry.callcount for entry in profiler.getstats())


class SimulatedCard:
    """The counters of the simulated card."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(os.environ["NULL_GPU_LIBRARY"])
        for name in ("null_launches", "null_peak", "null_h2d"):
            getattr(self.library, name).restype = ctypes.c_size_t

    def read(self) -> dict[str, int]:
        """Launches and bytes copied to the card so far, and the driver's peak."""
        return {name: getattr(self.library, f"null_{name}")() for name in ("launches", "h2d", "peak")}


def measure(
    work: Callable[[], Any], flops: bool = False, moved: bool = False, repeat: int = 1, calls: bool = False
) -> dict[str, Any]:
    """Costs of `work`, which has run once before; host time is the least of `repeat` times."""
    card = SimulatedCard() if SIMULATED else None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = card.read() if card else {}
    wall, busy = time.perf_counter(), time.process_time()
    work()
    torch.cuda.synchronize()
    row: dict[str, Any] = {
        "allocated_gib": torch.cuda.max_memory_allocated() / GIB,
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB,
        "host_cpu_s": time.process_time() - busy,
        "host_wall_s": time.perf_counter() - wall,
    }
    if card is not None:
        after = card.read()
        row["driver_gib"] = after["peak"] / GIB + CONTEXT_GIB
        row["launches"] = after["launches"] - before["launches"]
        row["host_to_device_gib"] = (after["h2d"] - before["h2d"]) / GIB
    else:
        free, total = torch.cuda.mem_get_info()
        row["used_gib"] = (total - free) / GIB
        row["launches"] = count_launches(work)
    for _ in range(repeat - 1):
        busy = time.process_time()
        work()
        torch.cuda.synchronize()
        row["host_cpu_s"] = min(row["host_cpu_s"], time.process_time() - busy)
    if calls:
        row["python_calls"] = count_calls(work)
    if flops:
        row["tflop"] = count_flops(work)
    if moved:
        with BytesMoved() as counted:
            work()
        top = sorted(counted.by_operation.items(), key=lambda item: -item[1])[:8]
        row |= {"gb_moved": counted.total / 1e9, "gb_by_operation": {name: round(n / 1e9, 1) for name, n in top}}
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", default="bf16", help="of the transformer")
    parser.add_argument("--size", type=int, default=512, help="pixels a side")
    parser.add_argument("--text", type=int, default=128, help="text tokens")
    parser.add_argument("--batch", type=int, default=1, help="images in a step")
    parser.add_argument(
        "--blocks", type=int, nargs=2, default=WHOLE, metavar=("DOUBLE", "SINGLE"), help="how many blocks of each kind"
    )
    parser.add_argument("--no-checkpointing", action="store_true", help="keep all activations")
    parser.add_argument("--interval", type=int, default=1, help="gradient checkpointing of every n-th block")
    parser.add_argument("--deterministic", action="store_true", help="attention without its fused kernel")
    parser.add_argument("--resident", type=int, default=0, help="stream the blocks, with so many on the card")
    parser.add_argument("--compute", default="weights", choices=get_args(Compute), help="of int8 and fp8")
    parser.add_argument("--target", default="all", help="what the LoRA is added to")
    parser.add_argument("--heldout", action="store_true", help="the held-out loss instead of a step")
    parser.add_argument("--heldout-rows", type=int, default=len(HELDOUT_SIGMAS), help="… in parts of so many levels")
    parser.add_argument("--repeat", type=int, default=1, help="steps of which the least host time is told")
    parser.add_argument("--calls", action="store_true", help="also count the calls of functions by Python")
    parser.add_argument("--flops", action="store_true", help="also count the operations")
    parser.add_argument("--bytes", action="store_true", help="also count the bytes that are moved")
    parser.add_argument("--json", action="store_true", help="one JSON object in one line")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("There is no CUDA card here. Use the simulated one: tests/support/nullgpu.", file=sys.stderr)
        return 2
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)

    model = transformer(options.precision, tuple(options.blocks), "cuda", options.resident, compute=options.compute)
    weights = torch.cuda.memory_allocated() / GIB
    made = job(
        model,
        options.precision,
        options.size,
        options.text,
        options.batch,
        not options.no_checkpointing,
        options.interval,
        options.target,
    )
    model.set_deterministic(options.deterministic)
    if options.heldout:
        image = (torch.randn(made.batches.shape[1:]), condition(options.text))

        def work() -> object:
            return heldout_loss(model, [image], rows=options.heldout_rows)
    else:
        work = made.step
    work()
    row = vars(options) | {"simulated": SIMULATED, "weights_gib": weights}
    row |= measure(work, options.flops, options.bytes, options.repeat, options.calls)
    row = {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}
    if options.json:
        print(json.dumps(row))
    else:
        print("\n".join(f"{key:<20} {value}" for key, value in row.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
