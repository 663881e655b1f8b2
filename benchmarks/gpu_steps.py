"""What a training step, an image and everything else take on the GPU: seconds, memory, kernels."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import step_cost
from benchmarks.gpu_bench import OWN, SMALL, Bench, Row, clear, seconds_of, steps_timed
from benchmarks.real_model import GIB, SIMULATED, Job, condition, generator, job, recompute, transformer
from chroma_core.memory.anatomy import FLUX_VAE, T5_XXL
from chroma_core.memory.plan import Settings, peaks
from chroma_core.model import quantised
from chroma_core.model.precision import precision, quantisable_linears
from chroma_core.model.text_encoder import T5Encoder
from chroma_core.model.vae import Autoencoder
from chroma_core.sampling.sampler import SamplingSettings, sample
from chroma_core.streaming import stream_blocks, streamed
from chroma_core.training.step.objective import heldout_loss


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
            yield step_row(bench, made, name, size, interval)
        if name in ("bf16", "int8", "nf4") and made is not None and not SIMULATED:
            made.batches.shape = (1, 16, 64, 64)
            recompute(model, 1)
            yield {"what": f"kernels of a {name} step at 512", **kernels(made.step)}
        del model, made
        clear()


def step_row(bench: Bench, made: Job, name: str, size: int, interval: int, resident: int = 0) -> Row:
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
        yield step_row(bench, made, "int8", size, 1, resident)


def other_peaks(bench: Bench) -> Iterator[Row]:
    """Held-out loss, VAE and T5: bytes above what stood there before, and seconds."""
    yield from _heldout_peaks()
    clear()
    yield from _vae_peaks()
    clear()
    for name in ("bf16", "int8", "nf4"):
        chosen = precision(name)
        with torch.device("meta"):
            t5 = T5Encoder(**T5_XXL)
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
        yield {"what": f"T5-XXL {name}, 512 tokens", **_peak(lambda t=tokens, m=t5: m(t, torch.ones_like(t)))}
        del t5
        clear()


def _heldout_peaks() -> Iterator[Row]:
    model = transformer("int8")
    for size in (512, 1024):
        images = [(torch.randn(16, size // 8, size // 8), condition(128))]
        yield {"what": f"held-out loss, int8 {size}", **_peak(lambda p=images: heldout_loss(model, p))}


def _vae_peaks() -> Iterator[Row]:
    vae = Autoencoder(**FLUX_VAE)
    vae.to("cuda").eval()
    image, latents = torch.rand(1, 3, 1024, 1024, device="cuda"), torch.randn(1, 16, 128, 128, device="cuda")
    yield {"what": "VAE encode 1024", **_peak(lambda: vae.encode(image))}
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


def sampling(bench: Bench) -> Iterator[Row]:
    """25 steps at 1024² with guidance: seconds an image."""
    for name in ("bf16", "int8", "nf4"):
        model = transformer(name)
        sample_image(model, 1, 1024)
        torch.cuda.synchronize()
        started = time.perf_counter()
        sample_image(model, 1 if SIMULATED else 25, 1024)
        torch.cuda.synchronize()
        yield {
            "what": f"{name} 1024, 25 steps, guidance 4",
            "seconds": time.perf_counter() - started,
            "allocated_gib": torch.cuda.max_memory_allocated() / GIB,
        }
        del model
        clear()


def sample_image(model: Any, steps: int, size: int = 512, guidance: float = 4.0) -> torch.Tensor:
    settings = SamplingSettings(steps=steps, guidance=guidance)
    text = [condition(64, 1)]
    return sample(
        model, text, condition(2, 2) if guidance > 1 else None, width=size, height=size, settings=settings
    ).cpu()


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
            yield {**step_row(bench, made, name, size, 1), "what": f"{name} {size}, compiled", "first_s": first}
        del model, made
        clear()
