"""Chroma at its real widths with random weights, made where they are needed: no file, no network.

What depends on the card alone (memory, time, launches) does not depend on the values of weights; what depends on values
(is a product right, are two runs equal) is asked of random ones, which hide nothing. On the simulated card, which
computes nothing, weights are allocated and left unfilled.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from chroma_core.lora.trainable import CastFactors, LoraSettings, add_trainable
from chroma_core.model import device, four_bits, quantised
from chroma_core.model import precision as precisions
from chroma_core.model.eight_bits import Compute
from chroma_core.model.transformer import ChromaTransformer
from chroma_core.sampling.text import TextCondition
from chroma_core.streaming import stream_blocks
from chroma_core.streaming.streamer import BLOCK_LISTS
from chroma_core.training.config import TrainingConfig
from chroma_core.training.run.loop import Batch, Batches, StepResult, train_step
from chroma_core.training.run.stepper import Stepper

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30
SIMULATED = "NULL_GPU_LIBRARY" in os.environ
WHOLE = (19, 38)
"""Double and single blocks of Chroma 1."""
TEXT_CHANNELS = 4096

if SIMULATED:  # it has no cuDNN
    torch.backends.cudnn.enabled = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    device.broken = lambda _: False  # and no numbers
    four_bits.wrong_numbers = lambda *_: ""


def run_python(arguments: Sequence[str], card_gib: float | None) -> subprocess.CompletedProcess[str]:
    """`python *arguments` in the repository, its output kept: on a simulated card of that size, or (None) as we are."""
    simulated = [] if card_gib is None else [str(ROOT / "tests" / "support" / "nullgpu" / "run.py")]
    environment = {**os.environ, "NULL_GPU_GIB": str(card_gib), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *simulated, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)


def generator(device: torch.device | str, seed: int) -> torch.Generator:
    """A stream of random numbers on a device."""
    return torch.Generator(device).manual_seed(seed)


def transformer(
    precision: str,
    blocks: tuple[int, int] = WHOLE,
    device: torch.device | str = "cuda",
    resident: int = 0,
    seed: int = 0,
    heads: int = 24,
    compute: Compute = "weights",
) -> ChromaTransformer:
    """A frozen transformer of the real widths in a precision, filled and quantised on the device, one linear at a time.

    resident: above 0, its blocks rest in host memory and so many are on the device at a time. heads: fewer than 24 are
    a smaller width, of the approximator too. Raises SystemExit where the device cannot compute so.
    """
    chosen = precisions.precision(precision)
    device, draws = torch.device(device), generator(device, seed)
    with torch.device("meta"):
        model: Any = ChromaTransformer(
            num_layers=blocks[0],
            num_single_layers=blocks[1],
            num_attention_heads=heads,
            approximator_hidden_dim=5120 * heads // 24,
        )
        model.to(chosen.dtype)
    linears = dict(precisions.quantisable_linears(model)) if chosen.quantised else {}
    homes = {
        name: torch.device("cpu") if resident and name.split(".")[0] in BLOCK_LISTS else device
        for name, _ in model.named_modules()
    }
    for name, linear in linears.items():
        shape, home = (linear.out_features, linear.in_features), homes[name]
        if SIMULATED:
            outline = quantised.outline(*shape, chosen.scheme or "")
            parts = {key: torch.empty(t.shape, dtype=t.dtype, device=home) for key, t in outline.items()}
        else:
            weight = torch.empty(shape, dtype=chosen.dtype, device=device).normal_(0, 0.02, generator=draws)
            parts = {k: t.to(home) for k, t in quantised.quantise_weight(weight, chosen.scheme or "").items()}
        bias = None if linear.bias is None else torch.zeros(linear.bias.shape, dtype=chosen.dtype, device=home)
        parent, _, leaf = name.rpartition(".")
        layer = quantised.QuantisedLinear(linear.in_features, linear.out_features, chosen.scheme or "", parts, bias)
        setattr(model.get_submodule(parent), leaf, layer)
    for name, module in model.named_modules():
        for key, parameter in list(module._parameters.items()):
            if parameter is None or not parameter.is_meta:
                continue
            value = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            if not SIMULATED:
                ones = key == "weight" and parameter.dim() == 1
                value.fill_(1.0 if ones else 0.0) if parameter.dim() == 1 else value.normal_(0, 0.02, generator=draws)
            module._parameters[key] = nn.Parameter(value.to(homes[name]), requires_grad=False)
    model.requires_grad_(False).eval()
    if refused := quantised.compute_by(model, compute, device):
        raise SystemExit(refused)
    if resident:
        stream_blocks(model, device, resident)
    return model


def condition(tokens: int, seed: int = 0) -> TextCondition:
    """A prompt of so many visible tokens with random states, on the CPU."""
    return TextCondition(torch.randn(tokens, TEXT_CHANNELS, generator=generator("cpu", seed)), "x", tokens - 1)


class RandomBatches(Batches):
    """Batches of random latents at one size; step i always gives the same ones."""

    def __init__(self, config: TrainingConfig, size: int, text: int):
        self.config, self.objective = config, config.objective
        self.shape = (config.effective_batch, 16, size // 8, size // 8)
        self.texts = [condition(text, i) for i in range(config.effective_batch)]

    def __getitem__(self, step: int) -> Batch:
        draws = generator("cpu", step)
        latents, noise = (torch.randn(self.shape, generator=draws) for _ in range(2))
        return Batch(latents, self.texts, noise, torch.rand(self.shape[0], generator=draws))


@dataclass
class Job:
    """A model with a LoRA in training, its optimizer and its batches: what one step needs."""

    model: ChromaTransformer
    config: TrainingConfig
    stepper: Stepper
    batches: RandomBatches
    parameters: list[nn.Parameter]
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.cast_factors = CastFactors(self.model)

    def step(self, number: int | None = None) -> StepResult:
        """One optimizer step, the next one or a certain one."""
        number = len(self.losses) if number is None else number
        result = train_step(number, self.model, self.stepper, self.batches, self.config, casting=self.cast_factors.to)
        self.losses.append(result.loss)
        return result

    def trained(self) -> Iterator[Tensor]:
        """Copies of what is trained, on the CPU."""
        return (parameter.detach().cpu().clone() for parameter in self.parameters)


def job(
    model: ChromaTransformer,
    precision: str,
    size: int = 512,
    text: int = 128,
    batch: int = 1,
    checkpointing: bool = True,
    interval: int = 1,
    target: str = "all",
    rank: int = 16,
) -> Job:
    """A job on a model that has no adapter yet; `checkpointing` every `interval`-th block."""
    config = TrainingConfig.parse(
        {
            "name": "step",
            "dataset": {"folder": os.getcwd()},
            "model": {"flavour": "base", "precision": precision},
            "batch_size": batch,
            "gradient_checkpointing": checkpointing,
            "checkpointing_interval": interval,
        }
    )
    parameters = add_trainable(model, LoraSettings(rank=rank, target=target), 1)
    recompute(model, interval if checkpointing else 0)
    stepper = Stepper(parameters, config.optimizer_settings())
    return Job(model, config, stepper, RandomBatches(config, size, text), parameters)


def recompute(model: ChromaTransformer, interval: int) -> None:
    """Gradient checkpointing of every `interval`-th block; 0 switches it off."""
    model.checkpointing_interval = interval
