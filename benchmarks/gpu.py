"""What a real card says about ChromaKit, in one run of under ten minutes.

    python benchmarks/gpu.py --budget 540 --out FOLDER [--only truth streaming …]

Needs a CUDA card, Python 3.10+, torch and the pack's requirements; no ComfyUI, no network, no model file: weights are
random and made on the card. One process, cases in order of value, each under its own guard: a case that fails is a line
that says so. `FOLDER/gpu.json` gets one JSON line a case; the tables come last, as Markdown. What the budget leaves out
is named. Without a card it says so and ends with 2; on the simulated one it runs to its end, and times mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

from benchmarks import step_cost  # noqa: E402
from benchmarks.real_model import (  # noqa: E402
    GIB,
    SIMULATED,
    Job,
    condition,
    generator,
    job,
    recompute,
    transformer,
)
from chroma_core.loading.moving import release_memory, to_device, to_host  # noqa: E402
from chroma_core.memory.anatomy import FLUX_VAE, T5_XXL  # noqa: E402
from chroma_core.memory.plan import Settings, peaks  # noqa: E402
from chroma_core.model import quantised  # noqa: E402
from chroma_core.model.precision import precision, quantisable_linears  # noqa: E402
from chroma_core.sampling.sampler import SamplingSettings, sample  # noqa: E402
from chroma_core.streaming import stream_blocks, streamed  # noqa: E402
from chroma_core.training.run.stepper import Stepper  # noqa: E402
from chroma_core.training.step.objective import heldout_loss  # noqa: E402

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


def _differing(some: list[torch.Tensor], others: list[torch.Tensor]) -> int | None:
    """Elements that are not equal, None on the simulated card, which computes nothing."""
    return None if SIMULATED else sum(int((a != b).sum()) for a, b in zip(some, others, strict=True))


def _furthest(some: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    """The largest |a − b| over the largest |a|."""
    gap = max(float((a - b).abs().max()) for a, b in zip(some, others, strict=True))
    return gap / max(1e-30, max(float(a.abs().max()) for a in some))


def relative(found: torch.Tensor, reference: torch.Tensor) -> float:
    """‖found − reference‖ / ‖reference‖ in fp64 on the CPU."""
    found, reference = found.detach().double().cpu(), reference.detach().double().cpu()
    return float((found - reference).norm() / reference.norm().clamp_min(1e-30))


# --- 0: the card and its ceilings -------------------------------------------------------------------------------------


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


# --- 1: truth ---------------------------------------------------------------------------------------------------------


def truth(bench: Bench) -> Iterator[Row]:
    """Quantising on the card = on the CPU; products against fp64; a model's forward and gradient against the CPU."""
    for scheme in OWN:
        weight = torch.randn(1024, 3072, generator=generator("cpu", 1)).to(torch.bfloat16) * 0.05
        if SIMULATED:
            yield {"what": f"quantise {scheme}", "left_out": "the simulated card computes nothing"}
            continue
        here, there = quantised.quantise_weight(weight, scheme), quantised.quantise_weight(weight.cuda(), scheme)
        differing = {key: int((there[key].cpu() != here[key]).sum()) for key in here}
        on_card = {key: tensor.cuda() for key, tensor in here.items()}
        for dtype in (torch.float32, torch.bfloat16):
            ours = quantised.dequantise_weight(here, scheme, dtype, weight.shape)
            theirs = quantised.dequantise_weight(on_card, scheme, dtype, weight.shape).cpu()
            differing[f"dequantised {dtype}".replace("torch.", "")] = int((ours != theirs).sum())
        x = torch.randn(256, 3072, generator=generator("cpu", 2)).to(torch.bfloat16).cuda().requires_grad_()
        layer = quantised.QuantisedLinear(3072, 1024, scheme, on_card, None)
        y = layer(x)
        upstream = torch.randn(256, 1024, generator=generator("cpu", 3)).to(torch.bfloat16).cuda()
        y.backward(upstream)
        exact = layer.dequantise(torch.float32).double()
        assert x.grad is not None
        yield {
            "what": f"quantise {scheme}",
            "elements_that_differ_from_the_cpu": differing,
            "forward_error": relative(y, x.double() @ exact.T),
            "gradient_error": relative(x.grad, upstream.double() @ exact),
        }
    if SIMULATED:
        return
    rows: dict[str, tuple[torch.Tensor, list[torch.Tensor]]] = {}
    inputs = torch.randn(1, 16, 32, 32, generator=generator("cpu", 5)), condition(40)
    weights: dict[str, torch.Tensor] = {}
    for name, device in (("fp32 cpu", "cpu"), ("bf16 cpu", "cpu"), ("fp32", "cuda"), ("bf16", "cuda")):
        model = transformer(name.split()[0], (1, 1), device)
        if not weights:
            weights = {k: v.detach().to(torch.bfloat16).cpu() for k, v in model.state_dict().items()}
        model.load_state_dict({k: v.to(model.state_dict()[k].dtype) for k, v in weights.items()})
        rows[name] = _forward_and_gradients(model, *inputs)
    velocity, gradients = rows["fp32 cpu"]
    for name in ("bf16 cpu", "fp32", "bf16"):
        found, theirs = rows[name]
        yield {
            "what": f"1+1 blocks, {name if 'cpu' in name else name + ' on the card'} against fp32 on the CPU",
            "forward_error": relative(found, velocity),
            "gradient_error": relative(
                torch.cat([g.flatten() for g in theirs]), torch.cat([g.flatten() for g in gradients])
            ),
            "goal": {"fp32": 1e-4, "bf16": 1e-2}.get(name),
        }


def _forward_and_gradients(model: Any, latents: torch.Tensor, text: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    from chroma_core.training.step.objective import predict_velocity

    made = job(model, "bf16")
    with torch.no_grad():
        for i, parameter in enumerate(made.parameters):  # `up` starts at zero, and hides `down` from the gradient
            parameter.copy_(torch.randn(parameter.shape, generator=generator("cpu", 100 + i)) * 0.02)
    velocity = predict_velocity(model, latents, torch.tensor([0.6]), [text])
    upstream = torch.randn(velocity.shape, generator=generator("cpu", 7)).to(velocity.device)
    (velocity * upstream).sum().backward()
    return velocity.detach().cpu(), [p.grad.cpu() for p in made.parameters if p.grad is not None]


# --- 2: streaming -----------------------------------------------------------------------------------------------------


def streaming(bench: Bench) -> Iterator[Row]:
    """Gradients of a streamed model = those of the same model in one piece, also when copies or blocks are slow."""
    for interval, label in ((1, "checkpointing"), (0, "no checkpointing")):
        model = transformer("bf16", SMALL)
        made = job(model, "bf16", checkpointing=bool(interval))
        expected = _gradients(made)
        again = _gradients(made)
        yield {
            "what": f"{label}, in one piece, a second time",
            "gradients_that_differ": _differing(expected, again),
            "largest_difference": _furthest(expected, again),
            "of": sum(g.numel() for g in again),
        }
        to_host(model)
        stream_blocks(model, "cuda", 2)
        cases: list[tuple[str, bool, bool]] = [("as it is", False, False)]
        if not SIMULATED:
            cases += [("copies 200 µs late", True, False), ("blocks 200 µs late", False, True)]
        for name, late_copies, late_blocks in cases:
            with _delays(model, late_copies, late_blocks):
                found = _gradients(made)
            yield {
                "what": f"{label}, {name}",
                "gradients_that_differ": _differing(expected, found),
                "largest_difference": _furthest(expected, found),
                "of": sum(g.numel() for g in found),
            }
        del model, made
        clear()
    if not SIMULATED and "backend:cudaMallocAsync" not in os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""):
        options = ["--only", "streaming", "--out", str(bench.folder / "async"), "--budget", "60"]
        command = [sys.executable, __file__, *options]
        env = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"}
        subprocess.run(command, env=env, timeout=90, stdout=subprocess.DEVNULL)
        for line in (bench.folder / "async" / "gpu.json").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if row["case"] == "streaming":
                yield {**row, "what": f"{row.get('what', '')}, cudaMallocAsync"}


def _gradients(made: Job) -> list[torch.Tensor]:
    from chroma_core.training.step.objective import add_noise, loss, predict_velocity, training_target

    batch = made.batches[0].to(torch.device("cuda"))
    with sdpa_kernel(SDPBackend.MATH), _deterministic():
        x = add_noise(batch.latents, batch.noise, batch.sigmas)
        velocity = predict_velocity(made.model, x, batch.sigmas, batch.conditions)
        loss(velocity, training_target(batch.latents, batch.noise)).backward()
    found = [p.grad.cpu() for p in made.parameters if p.grad is not None]
    for parameter in made.parameters:
        parameter.grad = None
    return found


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def _delays(model: Any, copies: bool, blocks: bool) -> Iterator[None]:
    """Spin kernels of about 200 µs before every block: on the copying stream, or where the model computes."""
    streamer = streamed(model)
    assert streamer is not None
    cycles = 350_000

    def late(*_: Any) -> None:
        if copies:
            with torch.cuda.stream(streamer._mover._stream):  # type: ignore[attr-defined]
                torch.cuda._sleep(cycles)
        if blocks:
            torch.cuda._sleep(cycles)

    hooks = [block.register_forward_pre_hook(late) for block in streamer._blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# --- 3: the table of steps --------------------------------------------------------------------------------------------


def step_table(bench: Bench) -> Iterator[Row]:
    """Every precision and size; without checkpointing where it tells something; beside each what the plan says."""
    for name in ("bf16", *OWN):
        model = transformer(name)
        made: Job | None = None
        cases = [(size, 1) for size in (512, 768, 1024)]
        cases += [(size, 0) for size in (512, 1024)] if name in ("bf16", "int8") else []
        for size, interval in cases:
            if made is None:
                made = job(model, name, size)
            made.batches.shape = (1, 16, size // 8, size // 8)
            recompute(model, interval)
            yield _step_row(bench, made, name, size, interval)
        if name in ("bf16", "int8", "nf4") and made is not None and not SIMULATED:
            made.batches.shape = (1, 16, 64, 64)
            recompute(model, 1)
            yield {"what": f"kernels of a {name} step at 512", **kernels(made.step)}
        del model, made
        clear()


def _step_row(bench: Bench, made: Job, name: str, size: int, interval: int, resident: int = 0) -> Row:
    clear()
    times = steps_timed(made)
    median = statistics.median(times)
    row: Row = {
        "what": f"{name} {size}"
        + ("" if interval else ", no checkpointing")
        + (f", {resident} resident" if resident else ""),
        "precision": name,
        "size": size,
        "checkpointing": bool(interval),
        "resident": resident,
        "ms": 1000 * median,
        "ms_least_most": [1000 * min(times), 1000 * max(times)],
        "tokens_s": (size // 16) ** 2 / median,
    }
    if (size, interval) not in bench.flop:  # the same in every precision
        bench.flop[size, interval] = step_cost.count_flops(made.step)
    flop = bench.flop[size, interval]
    row |= {"tflop": flop, "tflop_s": flop / median}
    if bench.ceilings.get("bf16_tflop_s"):
        row["of_the_product"] = flop / median / bench.ceilings["bf16_tflop_s"]
    clear()
    made.step()
    made.step()
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    planned = peaks(
        Settings(
            precision=name,
            size=size,
            gradient_checkpointing=bool(interval),
            offload="block" if resident else "none",
            resident_blocks=max(2, resident),
        )
    )
    return row | {
        "allocated_gib": torch.cuda.max_memory_allocated() / GIB,
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB,
        "used_gib": (total - free) / GIB,
        "planned_gib": planned.training / GIB,
    }


def kernels(work: Callable[[], Any], most: int = 14) -> Row:
    """Where the card's time goes in `work`: busy share, launches and the kernels that take longest."""
    from torch.profiler import ProfilerActivity, profile

    work()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
        wall = time.perf_counter() - started
    events = [event for event in seen.key_averages() if event.self_device_time_total > 0]
    busy = sum(event.self_device_time_total for event in events) / 1e6
    top = sorted(events, key=lambda event: -event.self_device_time_total)[:most]
    return {
        "wall_ms_profiled": 1000 * wall,
        "busy_ms": 1000 * busy,
        "launches": sum(event.count for event in events),
        "longest": [[event.key[:90], event.count, round(event.self_device_time_total / 1000, 2)] for event in top],
    }


def streamed_steps(bench: Bench) -> Iterator[Row]:
    """int8 with 2 and with 18 resident blocks at 512, and 2 at 1024."""
    model = transformer("int8", resident=2)
    made = job(model, "int8", 512)
    for resident, size in ((2, 512), (2, 1024), (18, 512)):
        streamer = streamed(model)
        assert streamer is not None
        if resident != 2:
            streamer.remove()
            stream_blocks(model, "cuda", resident)
        made.batches.shape = (1, 16, size // 8, size // 8)
        yield _step_row(bench, made, "int8", size, 1, resident)


# --- 4: peaks of everything else --------------------------------------------------------------------------------------


def other_peaks(bench: Bench) -> Iterator[Row]:
    """Held-out loss, VAE and T5: bytes above what stood there before, and seconds."""
    yield from _heldout_peaks()
    clear()
    yield from _vae_peaks()
    clear()
    from transformers import T5Config, T5EncoderModel

    for name in ("bf16", "int8", "nf4"):
        chosen = precision(name)
        with torch.device("meta"):
            t5: Any = T5EncoderModel(T5Config(**T5_XXL))
            t5.to(chosen.dtype)
        t5 = t5.to_empty(device="cuda").eval()
        if not SIMULATED:
            with torch.no_grad():
                for parameter in t5.parameters():
                    parameter.normal_(0, 0.02)
        for full, linear in list(quantisable_linears(t5)) if chosen.quantised and not SIMULATED else []:
            t5.set_submodule(full, quantised.QuantisedLinear.from_linear(linear, chosen.scheme or ""))
        tokens = torch.randint(1, 1000, (1, 512), device="cuda")
        clear()
        yield {"what": f"T5-XXL {name}, 512 tokens", **_peak(lambda t=tokens, m=t5: m(input_ids=t))}
        del t5
        clear()


def _heldout_peaks() -> Iterator[Row]:
    model = transformer("int8")
    for size in (512, 1024):
        pictures = [(torch.randn(16, size // 8, size // 8), condition(128))]
        yield {"what": f"held-out loss, int8 {size}", **_peak(lambda p=pictures: heldout_loss(model, p))}


def _vae_peaks() -> Iterator[Row]:
    from diffusers import AutoencoderKL

    vae: Any = AutoencoderKL(**FLUX_VAE)
    vae.to("cuda").eval()
    picture, latents = torch.rand(1, 3, 1024, 1024, device="cuda"), torch.randn(1, 16, 128, 128, device="cuda")
    yield {"what": "VAE encode 1024", **_peak(lambda: vae.encode(picture))}
    yield {"what": "VAE decode 1024", **_peak(lambda: vae.decode(latents))}


def _peak(work: Callable[[], Any]) -> Row:
    with torch.no_grad():
        work()
        clear()
        before = torch.cuda.memory_allocated()
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
    return {
        "weights_gib": before / GIB,
        "above_gib": (torch.cuda.max_memory_allocated() - before) / GIB,
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB,
        "seconds": time.perf_counter() - started,
    }


# --- 5: attention and the lengths of captions -------------------------------------------------------------------------


def text_lengths(bench: Bench) -> Iterator[Row]:
    """100 steps over 50 text lengths and 5 buckets: does a new shape cost more than its arithmetic?"""
    buckets = ((64, 64), (56, 72), (72, 56), (52, 80), (80, 52))
    draws = generator("cpu", 9)
    lengths = [int(n) for n in torch.randperm(250, generator=draws)[:50] + 6]
    policies: list[tuple[str, list[SDPBackend], dict[str, str]]] = [
        ("torch's default", [], {}),
        ("flash first", [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH], {}),
    ]
    model = transformer("bf16", SMALL)
    made = job(model, "bf16", 512)
    for name, backends, _ in policies:
        texts = [condition(n, n) for n in lengths]
        times = []
        with sdpa_kernel(backends, set_priority=True) if backends else contextlib.nullcontext():
            for i in range(4 if SIMULATED else 100):
                rows, columns = buckets[i % 5]
                made.batches.shape = (1, 16, rows, columns)
                made.batches.texts = [texts[i % 50]]
                torch.cuda.synchronize()
                started = time.perf_counter()
                made.step()
                torch.cuda.synchronize()
                times.append(1000 * (time.perf_counter() - started))
        ordered = sorted(times[1:])
        yield {
            "what": f"{SMALL[0]}+{SMALL[1]} blocks, {name}",
            "median_ms": statistics.median(ordered),
            "p95_ms": ordered[int(0.95 * len(ordered))],
            "mean_ms": statistics.mean(ordered),
            "first_50_mean_ms": statistics.mean(times[1:50]) if len(times) > 50 else None,
            "last_50_mean_ms": statistics.mean(times[50:]) if len(times) > 50 else None,
        }


# --- 6: resume --------------------------------------------------------------------------------------------------------


def resume(bench: Bench) -> Iterator[Row]:
    """Ten steps, and the same with a save and a resume after five: same bytes? And what a step takes afterwards."""
    flash = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    model = transformer("int8", SMALL)
    made = job(model, "int8", 512)
    start = list(made.trained())
    for name, context in (
        ("default", contextlib.nullcontext),
        ("flash first", lambda: sdpa_kernel(flash, set_priority=True)),
        ("deterministic", _deterministic),
    ):
        runs = []
        seconds: list[float] = []
        for resumed in (False, False, True):
            _begin(made, start)
            with context():
                for number in range(10):
                    if resumed and number == 5:
                        _save_and_load(made)
                    torch.cuda.synchronize()
                    begun = time.perf_counter()
                    made.step(number)
                    torch.cuda.synchronize()
                    seconds.append(time.perf_counter() - begun)
            runs.append(list(made.trained()))
        again, after = (_differing(runs[0], runs[i]) for i in (1, 2))
        yield {
            "what": name,
            "elements_that_differ_when_repeated": again,
            "elements_that_differ_when_resumed": after,
            "of": sum(t.numel() for t in runs[0]),
            "ms_before_a_resume": 1000 * statistics.median(seconds[21:25]),
            "ms_after_a_resume": 1000 * statistics.median(seconds[26:30]),
        }


def _begin(made: Job, start: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(made.parameters, start, strict=True):
            parameter.copy_(value)
    made.stepper = Stepper(made.parameters, made.config.optimizer_settings())


def _save_and_load(made: Job) -> None:
    """As a checkpoint does it."""
    from chroma_core.training.run.checkpoint import _load

    weights = list(made.trained())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimizer.pt"
        torch.save(made.stepper.state_dict(), path)
        state = _load(path, made.stepper)
    _begin(made, weights)
    made.stepper.load_state_dict(state)


# --- 7: a job and prompts share the card ------------------------------------------------------------------------------


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
    alone = _picture(other, 4)
    for number in range(6):
        made.step(number)
    expected = list(made.trained())
    _begin(made, start)
    pictures: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: pictures.extend(_picture(other, 4) for _ in range(3)))
    thread.start()
    for number in range(6):
        made.step(number)
    thread.join()
    found = list(made.trained())
    return {
        "what": "steps while another thread samples",
        "trained_elements_that_differ": _differing(expected, found),
        "pictures_equal": [bool(torch.equal(picture, alone)) for picture in pictures],
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


def _picture(model: Any, steps: int, size: int = 512, guidance: float = 4.0) -> torch.Tensor:
    settings = SamplingSettings(steps=steps, guidance=guidance)
    text = [condition(64, 1)]
    return sample(
        model, text, condition(2, 2) if guidance > 1 else None, width=size, height=size, settings=settings
    ).cpu()


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
    made.stepper.optimizer.zero_grad(set_to_none=True)
    made.stepper._loss = None
    clear()
    result = made.step()
    return {"step": found, "the_next_step": f"loss {result.loss:.4f}, skipped '{result.skipped}'"}


# --- 8: sampling ------------------------------------------------------------------------------------------------------


def sampling(bench: Bench) -> Iterator[Row]:
    """25 steps at 1024² with guidance: seconds an image."""
    for name in ("bf16", "int8", "nf4"):
        model = transformer(name)
        _picture(model, 1, 1024)
        torch.cuda.synchronize()
        started = time.perf_counter()
        _picture(model, 1 if SIMULATED else 25, 1024)
        torch.cuda.synchronize()
        yield {
            "what": f"{name} 1024, 25 steps, guidance 4",
            "seconds": time.perf_counter() - started,
            "allocated_gib": torch.cuda.max_memory_allocated() / GIB,
        }
        del model
        clear()


# --- products and compiling: what would be faster ---------------------------------------------------------------------


def products(bench: Bench) -> Iterator[Row]:
    """One quantised product in several ways, forward, in ms: what to build on."""
    shapes = ((1152, 3072, 3072), (4224, 12288, 3072), (1152, 12288, 3072), (4224, 3072, 3072), (4224, 3072, 15360))
    for i, (tokens, rows, columns) in enumerate(shapes):
        yield _products(tokens, rows, columns, compiling=i < 2)


def _products(tokens: int, rows: int, columns: int, compiling: bool) -> Row:
    bf16, fp8_type = torch.bfloat16, torch.float8_e4m3fn
    x = torch.randn(tokens, columns, device="cuda", dtype=bf16)
    weight = torch.randn(rows, columns, device="cuda", dtype=bf16) * 0.02
    row: Row = {"what": f"[{tokens}, {columns}] × [{columns}, {rows}]", "bf16": _ms(lambda: F.linear(x, weight))}
    if SIMULATED:
        return row
    for scheme in OWN:
        layer = quantised.QuantisedLinear(columns, rows, scheme, quantised.quantise_weight(weight, scheme), None)
        row[f"{scheme} as it is"] = _ms(lambda m=layer: m(x))
    int8, fp8 = quantised.quantise_weight(weight, "int8"), quantised.quantise_weight(weight, "fp8")
    codes, scale = int8["weight"], int8["scale"]
    codes8, scale8 = fp8["weight"].view(fp8_type), fp8["scale"]
    buffer, kitchen = torch.empty_like(weight), _kitchen()

    def w8a8_int8() -> torch.Tensor:
        s = x.abs().amax(1, keepdim=True).float() / 127
        return (torch._int_mm((x / s).round().to(torch.int8), codes.t()) * (s * scale.T)).to(bf16)

    def w8a8_fp8() -> torch.Tensor:
        s = x.abs().amax(1, keepdim=True).float() / 448
        return torch._scaled_mm((x / s).to(fp8_type), codes8.t(), s, scale8.T, out_dtype=bf16)

    def dequantise(q: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return (q.to(torch.float32) * s).to(bf16)

    ways: dict[str, Callable[[], Any]] = {
        "int8 one-kernel dequantise": lambda: F.linear(x, torch.mul(codes, scale, out=buffer)),
        "int8 cast, scale on the product": lambda: F.linear(x, codes.to(bf16)) * scale.T,
        "fp8 cast, scale on the product": lambda: F.linear(x, codes8.to(bf16)) * scale8.T,
        "int8 w8a8, torch": w8a8_int8,
        "fp8 w8a8, torch": w8a8_fp8,
    }
    if kitchen is not None:
        ways["int8 w8a8, comfy-kitchen"] = lambda: kitchen.int8_linear(x, codes, scale, None, bf16)
    if compiling:
        fused = torch.compile(dequantise)
        ways["int8 dequantise compiled"] = lambda: F.linear(x, fused(codes, scale))
        ways |= {"int8 w8a8, compiled": torch.compile(w8a8_int8), "fp8 w8a8, compiled": torch.compile(w8a8_fp8)}
    for name, work in ways.items():
        row[name] = _tried(work)
    return row


def _kitchen() -> Any:
    try:
        import comfy_kitchen
    except Exception:
        return None
    return comfy_kitchen


def _ms(work: Callable[[], Any]) -> float:
    return 1000 * seconds_of(work, 10, 3)


def _tried(work: Callable[[], Any]) -> float | str:
    try:
        return _ms(work)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:120]


def compiled_steps(bench: Bench) -> Iterator[Row]:
    """Compiled blocks at 512 and 1024: the first steps, and those afterwards."""
    from chroma_core.training.run.prepare import compile_blocks

    for name in ("bf16", "int8"):
        if name == "int8" and bench.left < 90:
            yield {"what": "int8 compiled", "left_out": f"{bench.left:.0f} s were left"}
            return
        model = transformer(name)
        made = job(model, name, 512)
        compile_blocks(model)
        for size in (512, 1024):
            made.batches.shape = (1, 16, size // 8, size // 8)
            started = time.perf_counter()
            made.step()
            torch.cuda.synchronize()
            first = time.perf_counter() - started
            yield {**_step_row(bench, made, name, size, 1), "what": f"{name} {size}, compiled", "first_s": first}
        del model, made
        clear()


# --- 9: a whole job ---------------------------------------------------------------------------------------------------


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


def tables(rows: list[Row]) -> str:
    """What was found, as Markdown, one table a case."""
    lines: list[str] = []
    for name in dict.fromkeys(row["case"] for row in rows):
        mine = [row for row in rows if row["case"] == name]
        columns = list(dict.fromkeys(key for row in mine for key in row if key not in ("case", "longest")))
        lines += ["", f"### {name}", "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        lines += ["| " + " | ".join(str(row.get(key, "")) for key in columns) + " |" for row in mine]
    return "\n".join(lines)


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
