"""A training step beside diffusers' Chroma with PEFT and beside ComfyUI's *Train LoRA*, in turn.

    python -m benchmarks.training_step --model real --size 512 --text 40 --dtype bf16 --rounds 3 --json

Peers: diffusers' own transformer with a PEFT LoRA of the same layers, rank and start, autocast as in diffusers'
training scripts, AdamW, gradients clipped; with the text as long as ours (`trimmed`) and padded to 512 tokens with a
mask, as it is commonly used (`padded`). And ComfyUI's own node on its own Chroma in a process of its own (`comfyui`),
with the node's defaults and our rank; it adapts every layer of the model, the approximator, norms and biases too.
Everybody makes the same step: a batch of one, its loss, the backward pass, AdamW. Weights are random; what is timed
does not depend on them. All have gradient checkpointing on; `ours_auto` is our own step with as much of it as this
machine's memory asks for. Needs PEFT and diffusers, which the development environment brings, and a ComfyUI.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.comfyui_peer import ComfyUI
from benchmarks.real_model import ROOT, job, recompute, transformer
from benchmarks.turns import Turn, add_options, ratios, show, take_turns
from chroma_core.lora.settings import target_modules
from chroma_core.model.eight_bits import Compute
from chroma_core.model.transformer import ChromaTransformer

sys.path.append(str(ROOT / "scripts"))

from _environment import host_folder, is_host  # noqa: E402

MODELS = {"real": ((1, 1), 24), "w768": ((4, 8), 6)}
"""Double and single blocks, and heads of 128: the real widths with few blocks, and a small model with more."""
PADDED = 512
RANK = 16


def peft_steps(model: ChromaTransformer, size: int, text: int, target: str, rank: int = RANK) -> dict[str, Turn]:
    """The steps of diffusers with PEFT, by how long their text is."""
    made = peer(model, target, rank)
    optimizer = torch.optim.AdamW([parameter for parameter in made.parameters() if parameter.requires_grad], lr=2e-4)
    return {way: peer_step(made, optimizer, size, text, way == "padded") for way in ("trimmed", "padded")}


def peer(model: ChromaTransformer, target: str, rank: int) -> Any:
    """diffusers' transformer with the same weights' shapes and a PEFT LoRA."""
    from diffusers import ChromaTransformer2DModel
    from peft import LoraConfig

    made: Any = ChromaTransformer2DModel(**vars(model.config))
    made.to(model.x_embedder.weight.dtype).requires_grad_(False)
    made.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=target_modules(model, target)))
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    made.enable_gradient_checkpointing()
    return made.train()


def peer_step(made: Any, optimizer: torch.optim.Optimizer, size: int, text: int, padded: bool) -> Turn:
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

    def step() -> None:
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

    return step


def measure(
    name: str, size: int, text: int, dtype: str, rounds: int, target: str, clock: str, compute: Compute
) -> dict[str, Any]:
    """Medians in seconds and the peers' ratios to ours; a quantised `dtype` has our own bf16 step as its only peer."""
    blocks, heads = MODELS[name]
    model = transformer(dtype, blocks, "cpu", heads=heads, compute=compute)
    made = job(model, dtype, size, text, target=target, rank=RANK)

    def ours(interval: int) -> Turn:
        def step() -> None:
            recompute(model, interval)
            made.step()

        return step

    steps: dict[str, Turn] = {"ours": ours(1), "ours_auto": ours(0)}
    asked = {"model": name, "size": size, "text": text, "dtype": dtype, "target": target, "rounds": rounds}
    asked["compute"] = compute
    if dtype not in ("bf16", "fp32"):
        plain = job(transformer("bf16", blocks, "cpu", heads=heads), "bf16", size, text, target=target, rank=RANK)
        steps["bf16"] = lambda: (plain.step(), None)[1]
        row = asked | take_turns(steps, rounds, clock)
        least = row["ours_least_s"] / row["bf16_least_s"]
        return row | {"ratio_to_bf16": row["ours_s"] / row["bf16_s"], "least_ratio_to_bf16": least}
    steps |= {f"peft_{way}": step for way, step in peft_steps(model, size, text, target).items()}
    with ExitStack() as opened:
        if dtype == "bf16" and is_host(host_folder()):
            settings = {"size": size, "text": text, "rank": RANK, "checkpointing": True}
            node = ComfyUI("train", vars(model.config), torch.get_num_threads(), clock, **settings)
            steps["comfyui"] = opened.enter_context(node).turn
        row = asked | take_turns(steps, rounds, clock)
    peers = [name for name in steps if not name.startswith("ours")]
    return row | ratios(row, peers, "ours") | ratios(row, peers, "ours_auto", "_auto")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="real", help="real widths 1+1, or 4+8 blocks of width 768")
    parser.add_argument("--size", type=int, default=512, help="pixels a side")
    parser.add_argument("--text", type=int, default=40, help="text tokens")
    parser.add_argument("--dtype", default="bf16", help="a precision; a quantised one is measured beside bf16 instead")
    parser.add_argument("--compute", choices=get_args(Compute), default="weights", help="of a quantised one")
    parser.add_argument("--target", default="all", help="what our LoRA and PEFT's are added to")
    add_options(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    model, dtype, target = options.model, options.dtype, options.target
    how = (options.rounds, target, options.clock, options.compute)
    show(measure(model, options.size, options.text, dtype, *how), options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
