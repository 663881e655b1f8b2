"""Is what the GPU computes right? Against the CPU, in one piece against streamed, and resumed against uninterrupted."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu_bench import OWN, SMALL, Bench, Row, clear, differing, furthest, relative
from benchmarks.real_model import SIMULATED, Job, condition, generator, job, transformer
from chroma_core.model import quantised
from chroma_core.streaming import stream_blocks, streamed, to_host
from chroma_core.training.run.stepper import Stepper


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


def streaming(bench: Bench) -> Iterator[Row]:
    """Gradients of a streamed model = those of the same model in one piece, also when copies or blocks are slow."""
    for interval, label in ((1, "checkpointing"), (0, "no checkpointing")):
        model = transformer("bf16", SMALL)
        made = job(model, "bf16", checkpointing=bool(interval))
        expected = _gradients(made)
        again = _gradients(made)
        yield {
            "what": f"{label}, in one piece, a second time",
            "gradients_that_differ": differing(expected, again),
            "largest_difference": furthest(expected, again),
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
                "gradients_that_differ": differing(expected, found),
                "largest_difference": furthest(expected, found),
                "of": sum(g.numel() for g in found),
            }
        del model, made
        clear()
    if not SIMULATED and "backend:cudaMallocAsync" not in os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""):
        options = ["--only", "streaming", "--out", str(bench.folder / "async"), "--budget", "60"]
        command = [sys.executable, str(Path(__file__).with_name("gpu.py")), *options]
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
            begin(made, start)
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
        again, after = (differing(runs[0], runs[i]) for i in (1, 2))
        yield {
            "what": name,
            "elements_that_differ_when_repeated": again,
            "elements_that_differ_when_resumed": after,
            "of": sum(t.numel() for t in runs[0]),
            "ms_before_a_resume": 1000 * statistics.median(seconds[21:25]),
            "ms_after_a_resume": 1000 * statistics.median(seconds[26:30]),
        }


def begin(made: Job, start: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(made.parameters, start, strict=True):
            parameter.copy_(value)
    made.stepper = Stepper(made.parameters, made.config.optimizer_settings())


def _save_and_load(made: Job) -> None:
    """As a checkpoint does it."""
    weights = list(made.trained())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimizer.pt"
        torch.save(made.stepper.state_dict(), path)
        state = torch.load(path, map_location=made.stepper.parameters[0].device, weights_only=True)
    begin(made, weights)
    made.stepper.load_state_dict(state)
