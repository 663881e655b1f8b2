"""A training step beside diffusers' Chroma with PEFT, in one process, in turn.

    python -m benchmarks.training_step --model real --size 512 --text 40 --dtype bf16 --rounds 3 --json

Peers: diffusers' own transformer with a PEFT LoRA of the same layers, rank and start, autocast as in diffusers'
training scripts, AdamW, gradients clipped; with the text as long as ours (`trimmed`) and padded to 512 tokens with a
mask, as it is commonly used (`padded`). Everybody makes the same step: a batch of one, its loss, the backward pass,
clipping, AdamW. Weights are random; what is timed does not depend on them. All have gradient checkpointing on;
`ours_auto` is our own step with as much of it as this machine's memory asks for. Needs PEFT and diffusers, which the
development environment brings.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.real_model import job, recompute, transformer
from chroma_core.lora.settings import target_modules
from chroma_core.model.transformer import ChromaTransformer

MODELS = {"real": ((1, 1), 24), "w768": ((4, 8), 6)}
"""Double and single blocks, and heads of 128: the real widths with few blocks, and a small model with more."""
PADDED = 512
RANK = 16


def peer(model: ChromaTransformer, checkpointing: bool) -> Any:
    """diffusers' transformer with the same weights' shapes, a PEFT LoRA, and its optimizer."""
    from diffusers import ChromaTransformer2DModel
    from peft import LoraConfig

    made: Any = ChromaTransformer2DModel(**vars(model.config))
    made.to(model.x_embedder.weight.dtype).requires_grad_(False)
    made.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=target_modules(model, "all")))
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if checkpointing:
        made.enable_gradient_checkpointing()
    return made.train()


def peer_step(made: Any, optimizer: torch.optim.Optimizer, size: int, text: int, padded: bool) -> Callable[[], float]:
    """One step of the peer, as a function."""
    side, dtype = size // 16, made.dtype
    draws = torch.Generator().manual_seed(0)
    latents = torch.randn(1, side * side, 64, generator=draws)
    states = torch.randn(1, text, 4096, generator=draws).to(dtype)
    length = PADDED if padded else text
    states = F.pad(states, (0, 0, 0, length - text))
    mask = None if not padded else torch.arange(length + side * side)[None]
    mask = None if mask is None else (mask < text) | (mask >= length)
    image_ids = torch.zeros(side, side, 3)
    image_ids[..., 1], image_ids[..., 2] = torch.arange(side)[:, None], torch.arange(side)[None]
    trained = [parameter for parameter in made.parameters() if parameter.requires_grad]

    def step() -> float:
        noise, sigma = torch.randn(latents.shape, generator=draws), torch.rand(1, generator=draws)
        noisy: Tensor = (1 - sigma) * latents + sigma * noise
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            found = made(
                hidden_states=noisy.to(dtype),
                encoder_hidden_states=states,
                timestep=sigma.to(dtype),
                img_ids=image_ids.view(-1, 3).to(dtype),
                txt_ids=torch.zeros(length, 3, dtype=dtype),
                attention_mask=mask,
            ).sample
        F.mse_loss(found.float(), noise - latents).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(sigma)

    return step


def measure(name: str, size: int, text: int, dtype: str, rounds: int, peers: bool = True) -> dict[str, Any]:
    """Medians in seconds and their ratios; every contestant takes a step to warm up, then they take turns."""
    blocks, heads = MODELS[name]
    model = transformer(dtype, blocks, "cpu", heads=heads)
    others = peer(model, True) if peers else None
    made = job(model, dtype, size, text, rank=RANK)

    def ours(interval: int) -> Callable[[], object]:
        def step() -> None:
            recompute(model, interval)
            made.step()

        return step

    steps: dict[str, Callable[[], object]] = {"ours": ours(1), "ours_auto": ours(0)}
    if not peers:
        steps["bf16"] = job(transformer("bf16", blocks, "cpu", heads=heads), "bf16", size, text, rank=RANK).step
    if others is not None:
        trained = [parameter for parameter in others.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=2e-4)
        steps |= {
            "peft_trimmed": peer_step(others, optimizer, size, text, False),
            "peft_padded": peer_step(others, optimizer, size, text, True),
        }
    found: dict[str, list[float]] = {key: [] for key in steps}
    for number in range(rounds + 1):
        for key, step in steps.items():
            started = time.perf_counter()
            step()
            if number:
                found[key].append(time.perf_counter() - started)
    row: dict[str, Any] = {"model": name, "size": size, "text": text, "dtype": dtype, "rounds": rounds}
    row |= {f"{key}_s": statistics.median(times) for key, times in found.items()}
    row |= {f"{key}_spread": max(times) / min(times) for key, times in found.items()}
    for key in steps if peers else ():
        if key.startswith("peft"):
            row |= {
                f"ratio_{key}": row[f"{key}_s"] / row["ours_s"],
                f"ratio_{key}_auto": row[f"{key}_s"] / row["ours_auto_s"],
            }
    if not peers:
        row["ratio_to_bf16"] = row["ours_s"] / row["bf16_s"]
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="real", help="real widths 1+1, or 4+8 blocks of width 768")
    parser.add_argument("--size", type=int, default=512, help="pixels a side")
    parser.add_argument("--text", type=int, default=40, help="text tokens")
    parser.add_argument("--dtype", default="bf16", help="a precision; a quantised one is measured beside bf16 instead")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    plain = options.dtype in ("bf16", "fp32")
    row = measure(options.model, options.size, options.text, options.dtype, options.rounds, plain)
    row = {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}
    print(json.dumps(row) if options.json else "\n".join(f"{key:<26} {value}" for key, value in row.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
