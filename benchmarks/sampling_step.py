"""A step of sampling beside diffusers' pipeline and ComfyUI's native Chroma, in turn.

    python -m benchmarks sampling-step --model real --size 512 --text 40 --steps 2 --rounds 3 --json

All run Euler with guidance in two passes over the same schedule, from the states of the prompt and of an empty negative
prompt, in bf16, without T5 and VAE: ours by `sample`, diffusers by `ChromaPipeline` with the text as long as ours
(`diffusers_trimmed`) and as the pipeline itself encodes it, 512 tokens with a mask (`diffusers_padded`); ComfyUI by
SamplerCustomAdvanced with CFGGuider in a process of its own (`comfyui`). Weights are random.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.comfyui_peer import ComfyUI
from benchmarks.real_model import ROOT, condition, transformer
from benchmarks.training_step import MODELS, PADDED
from benchmarks.turns import Turn, add_options, ratios, show, take_turns
from chroma_core.model.latents import FLUX_LATENTS, pack
from chroma_core.model.transformer import ChromaTransformer
from chroma_core.sampling.sampler import SamplingSettings, initial_noise, sample
from chroma_core.sampling.text import TextCondition

sys.path.append(str(ROOT / "scripts"))

from _environment import host_folder, is_host  # noqa: E402

NEGATIVE_TOKENS = 2
"""Of an empty prompt: its end, and one padding token."""


def pipelines(
    model: ChromaTransformer, texts: list[TextCondition], size: int, settings: SamplingSettings
) -> dict[str, Turn]:
    """Runs of diffusers' pipeline on the same weights, by how long their text is."""
    from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

    from chroma_core.parity.with_diffusers import theirs

    nothing: Any = None
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False)
    pipeline = ChromaPipeline(scheduler, nothing, nothing, nothing, theirs(ChromaTransformer2DModel, model))
    pipeline.set_progress_bar_config(disable=True)
    sigmas = settings.sigmas(size * size // 256)[:-1].tolist()
    noise = pack(initial_noise([settings.seed], (FLUX_LATENTS.channels, size // 8, size // 8))).bfloat16()

    def run(length: int | None) -> Turn:
        given: dict[str, Any] = {}
        for prefix, text in zip(("", "negative_"), texts, strict=True):
            tokens = len(text.states)
            states = F.pad(text.states, (0, 0, 0, (length or tokens) - tokens))[None].bfloat16()
            given[f"{prefix}prompt_embeds"] = states
            given[f"{prefix}prompt_attention_mask"] = (torch.arange(states.shape[1]) < tokens)[None].bfloat16()
        settled = {"num_inference_steps": settings.steps, "sigmas": sigmas, "guidance_scale": settings.guidance}
        call: Any = pipeline

        def sampled() -> None:
            call(**given, **settled, width=size, height=size, latents=noise, output_type="latent")

        return sampled

    return {"trimmed": run(None), "padded": run(PADDED)}


def measure(name: str, size: int, text: int, steps: int, rounds: int, clock: str) -> dict[str, Any]:
    """Medians in seconds a step and the peers' ratios to ours."""
    blocks, heads = MODELS[name]
    model = transformer("bf16", blocks, "cpu", heads=heads)
    settings = SamplingSettings(steps=steps)
    texts = [condition(text), condition(NEGATIVE_TOKENS, 1)]

    def ours() -> None:
        sample(model, texts[:1], texts[1], width=size, height=size, settings=settings)

    ways: dict[str, Turn] = {"ours": ours}
    ways |= {f"diffusers_{way}": run for way, run in pipelines(model, texts, size, settings).items()}
    with ExitStack() as opened:
        if is_host(host_folder()):
            sampling = {"size": size, "texts": [text, NEGATIVE_TOKENS], "guidance": settings.guidance}
            sampling["sigmas"] = settings.sigmas(size * size // 256).tolist()
            native = ComfyUI("sample", vars(model.config), torch.get_num_threads(), clock, **sampling)
            ways["comfyui"] = opened.enter_context(native).turn
        row = take_turns(ways, rounds, clock, steps)
    row |= ratios(row, [name for name in ways if name != "ours"], "ours")
    return {"model": name, "size": size, "text": text, "steps": steps, "rounds": rounds} | row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="real", help="real widths 1+1, or 4+8 blocks of width 768")
    parser.add_argument("--size", type=int, default=512, help="pixels a side")
    parser.add_argument("--text", type=int, default=40, help="text tokens")
    parser.add_argument("--steps", type=int, default=2, help="of each run")
    add_options(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    show(measure(options.model, options.size, options.text, options.steps, options.rounds, options.clock), options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
