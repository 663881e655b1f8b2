"""What the first-block cache saves in sampling, and what it costs: its error against the blocks that are computed.

    python -m benchmarks first-block-cache --write          # a few minutes; --draw only draws the chart again

Images of `tiny` (64 prompts, 25 steps, fp32), and of one double and one single block of the real widths (random
weights, 128², bf16), each against the same run without the cache. Beside it stands the other way to compute less:
fewer steps. `blocks`: the share of block computations that is left. `latents`: root mean square of the difference of
the latents over that of the exact ones. `pixels`: mean difference of the 8-bit values. `right`: images with the right
shape, colour and background.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.real_model import ROOT, condition, transformer
from benchmarks.turns import keep
from chroma_core.sampling.sampler import SamplingSettings, StepInfo, sample
from tools.charts import INK, Axes, Sheet

STEPS = 25
DATA, CHART = ROOT / "docs" / "data" / "first_block_cache.json", ROOT / "docs" / "images" / "first_block_cache.png"
COLOURS = {"cache": (34, 102, 204), "steps": (214, 106, 36)}

Sampled = Callable[[SamplingSettings, Callable[[StepInfo], object]], Tensor]
Judge = Callable[[Tensor], dict[str, float]]
"""What else is said of latents."""


def rows(
    name: str,
    sampled: Sampled,
    blocks: int,
    guidance: float,
    thresholds: Sequence[float],
    fewer_steps: Sequence[int],
    judge: Judge = lambda _: {},
) -> list[dict[str, Any]]:
    """The exact run, a row for each threshold, and one for each smaller number of steps."""
    exact = torch.empty(0)

    def row(steps: int, threshold: float) -> dict[str, Any]:
        nonlocal exact
        seen: list[float] = []
        settings = SamplingSettings(steps, guidance, 42, first_block_cache=threshold)
        latents = sampled(settings, lambda info: seen.append(info.cut_short))
        if steps == STEPS and not threshold:
            exact = latents
        left = steps / STEPS * (1 - seen[-1] * (blocks - 1) / blocks)
        error = float((latents - exact).square().mean().sqrt() / exact.square().mean().sqrt())
        found = {"model": name, "steps": steps, "threshold": threshold, "cut_short": seen[-1], "blocks": left}
        found |= {"latents": error} | judge(latents)
        print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in found.items()}), flush=True)
        return found

    return [row(STEPS, 0.0), *(row(STEPS, each) for each in thresholds), *(row(each, 0.0) for each in fewer_steps)]


def tiny() -> list[dict[str, Any]]:
    """On the miniature that is trained."""
    from tools.tiny.build import check_prompts, load
    from tools.tiny.vae import decode
    from tools.tiny.world import plain_caption, read_image

    vae, text, model = load()
    triples = check_prompts()
    prompts = [text.encode(plain_caption(*triple)) for triple in triples]
    before = np.empty(0)

    def sampled(settings: SamplingSettings, on_step: Callable[[StepInfo], object]) -> Tensor:
        return sample(model, prompts, text.encode(""), width=64, height=64, settings=settings, on_step=on_step)

    def judge(latents: Tensor) -> dict[str, float]:
        nonlocal before
        images = decode(vae, latents)
        before = before if before.size else images
        read = [read_image(image) for image in images]
        right = [
            (each.shape, each.colour, each.background) == wanted for each, wanted in zip(read, triples, strict=True)
        ]
        return {"pixels": float(np.abs(images.astype(float) - before).mean()), "right": float(np.mean(right))}

    blocks = len(model.transformer_blocks) + len(model.single_transformer_blocks)
    thresholds = (0.02, 0.05, 0.08, 0.1, 0.12, 0.15, 0.2, 0.3)
    return rows("tiny", sampled, blocks, 3.0, thresholds, (22, 20, 17, 15, 12, 10, 8), judge)


def real() -> list[dict[str, Any]]:
    """On the real widths, whose first block changes more from step to step, with random weights."""
    model = transformer("bf16", (1, 1), "cpu")
    prompt, negative = condition(40), condition(2, 1)

    def sampled(settings: SamplingSettings, on_step: Callable[[StepInfo], object]) -> Tensor:
        return sample(model, [prompt], negative, width=128, height=128, settings=settings, on_step=on_step)

    return rows("real widths, 1+1 blocks", sampled, 2, 4.0, (0.2, 0.3, 0.4, 0.6), (20, 15, 10))


def chart(found: Sequence[dict[str, Any]], path: Path) -> None:
    """Error of latents against the blocks that are computed, on `tiny`."""
    sheet = Sheet(560, 380)
    mine = [row for row in found if row["model"] == "tiny"]
    axes = Axes(sheet, (70, 60, 530, 310), (0.3, 1.0), (0, 0.08), "error of the latents, tiny")
    axes.grid((0.4, 0.6, 0.8, 1.0), (0, 0.02, 0.04, 0.06, 0.08), "share of blocks computed")
    for i, (name, colour) in enumerate(COLOURS.items()):
        ours = [row for row in mine if (row["threshold"] > 0 if name == "cache" else row["steps"] < STEPS)]
        points = sorted((row["blocks"], row["latents"]) for row in [mine[0], *ours])
        axes.curve([x for x, _ in points], [y for _, y in points], colour)
        for x, y in points:
            sheet.dot(*axes.at(x, y), colour)
        sheet.line([(250 + 150 * i, 20), (274 + 150 * i, 20)], colour, 2)
        sheet.text(280 + 150 * i, 20, {"cache": "first-block cache", "steps": "fewer steps"}[name], colour=INK)
    sheet.save(path, 64)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("tiny", "real"), help="one of the two models")
    parser.add_argument("--write", action="store_true", help=f"write {DATA.relative_to(ROOT)} and draw the chart")
    parser.add_argument("--draw", action="store_true", help="draw the chart of the numbers that are kept")
    options = parser.parse_args()
    if options.draw:
        chart(json.loads(DATA.read_text(encoding="utf-8")), CHART)
        return 0
    found = [row for make in (tiny, real) if options.only in (None, make.__name__) for row in make()]
    if options.write:
        keep(found, DATA)
        chart(found, CHART)
    return 0


if __name__ == "__main__":
    sys.exit(main())
