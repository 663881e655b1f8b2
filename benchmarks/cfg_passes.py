"""Are two passes, prompt and negative prompt, faster in one batch? And is the batch exactly equal?

    python benchmarks/cfg_passes.py                     # a small model on the CPU
    python benchmarks/cfg_passes.py --heads 24 --width 128 --blocks 2 4 --device cuda --dtype bf16 --sizes 512 1024
    python benchmarks/cfg_passes.py --write             # writes docs/measured.md

The two have equally many text tokens here, the best case for a batch: with different ones it would need padding and a
mask as well. Every time is the median of several; the ratio is that of one batch of 2 to two passes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from chroma_core.model.latents import image_ids  # noqa: E402
from chroma_core.model.transformer import ChromaTransformer  # noqa: E402
from tools.pages import fill, markdown_table  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TEXT_TOKENS = 32
ROUNDS = 3


def build(options: argparse.Namespace) -> ChromaTransformer:
    """Random weights; widths as asked for."""
    torch.manual_seed(0)
    third = options.width // 16 * 2
    with torch.device(options.device):
        model = ChromaTransformer(
            num_layers=options.blocks[0],
            num_single_layers=options.blocks[1],
            attention_head_dim=options.width,
            num_attention_heads=options.heads,
            joint_attention_dim=256,
            axes_dims_rope=(options.width - 2 * 3 * third, 3 * third, 3 * third),
            approximator_num_channels=64,
            approximator_hidden_dim=64,
            approximator_layers=1,
            in_channels=64,
        )
    return model.to(DTYPES[options.dtype]).requires_grad_(False).eval()


def median_time(run: Callable[[], object], device: str) -> float:
    """Seconds, after one run to warm up."""
    times = []
    for i in range(ROUNDS + 1):
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        if i:
            times.append(time.perf_counter() - start)
    return sorted(times)[ROUNDS // 2]


@torch.no_grad()
def measure(model: ChromaTransformer, size: int, options: argparse.Namespace) -> tuple[str, ...]:
    """One row of the table."""
    cells, dtype, device = size // 8, DTYPES[options.dtype], options.device
    ids = image_ids(cells, cells, device)
    latents = torch.randn(1, len(ids), 64, device=device, dtype=dtype)
    texts = torch.randn(2, TEXT_TOKENS, 256, device=device, dtype=dtype)
    modulation = model.modulation(torch.tensor([0.7], device=device))
    sigma = torch.tensor([0.7], device=device)

    def two_passes() -> torch.Tensor:
        return torch.cat([model(latents, text[None], sigma, ids, None, modulation) for text in texts])

    def one_batch() -> torch.Tensor:
        both = latents.expand(2, -1, -1), texts, sigma.expand(2), ids, None, modulation.expand(2, -1, -1)
        return model(*both)

    apart, together = median_time(two_passes, device), median_time(one_batch, device)
    first, second = two_passes(), one_batch()
    difference = float((first - second).abs().max() / first.abs().max())
    equal = "yes" if torch.equal(first, second) else f"no, {difference:.0e}"
    return f"{size}²", f"{apart * 1000:.0f} ms", f"{together / apart:.2f}", equal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=4, help="attention heads of the random model")
    parser.add_argument("--width", type=int, default=32, help="of a head")
    parser.add_argument(
        "--blocks", type=int, nargs=2, default=(1, 2), metavar=("DOUBLE", "SINGLE"), help="how many blocks of each kind"
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 256], help="pixels a side")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32", help="of the weights")
    parser.add_argument("--write", action="store_true", help="write docs/measured.md")
    options = parser.parse_args()
    model = build(options)
    on = torch.cuda.get_device_name() if options.device == "cuda" else f"a CPU, {torch.get_num_threads()} thread(s)"
    blocks, width = "+".join(map(str, options.blocks)), options.heads * options.width
    columns = ("size", "two passes", "one batch ÷ two passes", "bit for bit equal")
    table = markdown_table([measure(model, size, options) for size in options.sizes], columns)
    text = f"On {on}: {blocks} blocks of width {width}, {options.dtype}, {TEXT_TOKENS} text tokens\n\n{table}"
    print(text)
    if options.write:
        fill(ROOT / "docs" / "measured.md", "cfg_passes", text)


if __name__ == "__main__":
    main()
