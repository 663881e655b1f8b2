"""Measures every precision and writes docs/precision.md: a guide in front, generated tables behind.

    python -m tools.docs.precision_table            # about three minutes on one thread
    python -m tools.docs.precision_table --check    # fails if the page's rows are not today's precisions

The numbers come from `precision_matrix.py`, on the CPU, from fixed seeds; the text stands in this file.
"""

from __future__ import annotations

import argparse
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

from chroma_core.errors import PrecisionError
from chroma_core.memory.anatomy import T5_XXL
from chroma_core.model.precision import PRECISIONS, Precision, quantisable_linears
from chroma_core.model.quantised import outline
from chroma_core.model.text_encoder import T5Encoder
from chroma_core.model.transformer import ChromaTransformer

from ..pages import markdown_table
from .library_layers import library_layer_table
from .precision_matrix import Case, measure, measure_text, random_case, reference, tiny_case

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "precision.md"
LIBRARIES = ("torch", "optimum-quanto", "bitsandbytes", "torchao", "transformers", "diffusers")

GUIDE = """\
# Precision: how the weights are stored

<!-- Written by tools/docs/precision_table.py: change the text there, and run it again. -->

## Which to choose
| GPU memory | transformer | T5 |
|---|---|---|
| 40 GB or more | `bf16` | `bf16` |
| 24 GB | `bf16` with offload `model` | `bf16` |
| 16 or 12 GB | `int8` with offload `model` | `bf16`, or `int8` if RAM is short |
| 8 GB | `int4` with offload `model`, or `int8` with offload `block` | `int8` |
| no bf16 (some older GPUs) | `fp16` | `fp16`, if images stay clean: T5 can overflow in it |

- `int8` is the first choice when memory is short: half the size, and an error near that of bf16 itself. `fp8` is as
  large and less accurate; it is offered because many published files use it.
- `nf4` and `int4` are a quarter of the size, and their error is several times that of `int8`. `int4` needs a little
  more memory for its scales.
- `fp32` is for tests and for `tiny` on a CPU.
- The names with a hyphen quantise with a library, to match another trainer or tool. They are about as small and as
  accurate as our own, which need no package and work on every device.
- The rows follow the predictions of [memory.md](memory.md), which also covers training.
- All quantised precisions compute in bf16. `python -m chroma_core plan --flavour base --precision nf4` shows what a
  choice needs on this machine.

## What is quantised, and what is not
Only the linears inside the blocks: {share} of the transformer's weights, and T5's blocks likewise. The approximator
(`distilled_guidance_layer`), `x_embedder`, `context_embedder`, `norm_out` and the **final** `proj_out` keep 16 bits:
{kept} parameters ({plain} with the blocks' norms and biases, which are not quantised either). They are few, and every
token of every image passes through them or is modulated by them, so rounding them costs much and saves little. They are
recognised by their full names, because `proj_out` is also the name of a linear in every single block, which is
quantised. In T5 the embeddings and norms keep 16 bits.

A layer never keeps a 16-bit copy of its weight: it is dequantised for each product and again for its gradient.

## Products in 8 bits: `compute` = `w8a8`
By default (`weights`) the product is that of the dequantised weight. With `w8a8` an `int8` or `fp8` transformer
quantises the activations as well, one scale for each token, and multiplies codes by codes: y = (A·Qᵀ)·a·s, and for
gradients ∂x = (B·Q)·b with b·B ≈ ∂y·s. Scales stay outside in fp32 and the result is rounded once. It is for GPUs whose
8-bit units are faster than their bf16 ones, in training and sampling, and it is **off by default**: on the one GPU
measured, an H200, it gained nothing, because quantising is not part of another kernel
([performance.md](performance.md)).

- **Error.** Of each activation at most half a step of its row's scale: max |x| / 254 (`int8`), |x| / 16 (`fp8`). Of a
  layer's result about 1 % (`int8`) and 3 % (`fp8`) for normal numbers, as much as quantising the weights costs.
  Tested against fp64.
- **Where.** NVIDIA from Turing (`int8`) and from Ada (`fp8`) on; a CPU multiplies `int8` so and computes `fp8` in
  fp32, with the same codes and slowly. Where a device cannot, or a layer's sizes are no multiples of 16, a warning
  says so and that computes with dequantised weights. Other precisions are refused.
- **Jobs** keep the mode that they began with; another one makes another job. A running job lends its model to prompts
  of the same mode only. T5 always computes with dequantised weights. LoRAs and their gradients stay in 16 bits.

`python -m benchmarks eight-bits` trains the same job on `tiny` in both modes (80 steps of batch 4, rank 16, target
`all+ffs`), and with two other seeds to show what chance does. *Curve* is the mean difference of the smoothed losses,
*image* that of the last preview's 8-bit values:

| base | compute, seed | validation loss, before 0.64 | curve | image |
|---|---|---|---|---|
| `int8` | `weights`, 0 | 0.2934 | | |
| | `w8a8`, 0 | 0.2932 | 0.0004 | 1.2 of 255 |
| | `weights`, 1 and 2 | 0.2891, 0.2774 | 0.045, 0.021 | 18 and 25 |
| `fp8` | `weights`, 0 | 0.2946 | | |
| | `w8a8`, 0 | 0.2941 | 0.0017 | 1.2 of 255 |
| | `weights`, 1 and 2 | 0.2893, 0.2778 | 0.045, 0.021 | 18 and 23 |

## LoRAs on a quantised model
- *live*: the LoRA is computed beside the quantised weight and is not rounded. Its strength changes at once. This is
  also how training works.
- *merged*: the LoRA is added to the 16-bit weight before that is quantised, so it costs nothing afterwards, is rounded
  with the weight, and changing its strength reloads the model. Merging into a weight that is already quantised is an
  error.

## Memory of the real model
Computed from the module tree without weights: codes and scales of the block linears, 16 bits for the rest (fp32: 32).
GiB of weights alone; a forward or training pass comes on top.

{memory}

## What was measured
{ran}

How to read the tables. *Relative* means ‖a − b‖ / ‖b‖ over all values, b being the same weights in fp32.
- *weights*: mean relative error of the block linears' weights.
- *output*: relative error of the velocity that the transformer predicts (of T5: of its states).
- *size*: bytes of the block linears, over those of bf16.
- *LoRA live*, *LoRA merged*: relative error of the change that a LoRA makes to the output. 1 would mean that
  the LoRA was dropped. Merged is larger because quantising anew also moves the weights that the LoRA hardly changed.
- *LoRA gradient*: relative error of the gradient of all of a LoRA's parameters. It flows through every block.
- *saved*: written to a safetensors file **after** it had computed, read again: every bit of the output is the same.
- *moved*: copied and cast to its own dtype, every bit is the same.
- *kept*: MiB that a forward pass with a LoRA in training keeps for its backward pass, without gradient checkpointing,
  besides the model's own weights. The block linears' weights would be {dequantised} MiB in bf16 (random model); none of
  that is there.

A cell never hides a failure: a back end that cannot do something here has the reason in its row. Random weights have
none of the structure of trained ones, so the errors rank the formats; they do not say how an image looks.
"""

LIBRARY_GUIDE = """\
## Why the libraries' own layers are not used
A library quantises the weights; the layer is ours (`chroma_core/model/quantised.py`). Measured on their own layers, one
linear of 1024 → 1024 and 64 tokens in bf16, on the machine above:

{layers}

- *copies*: copies of the 16-bit weight that a forward pass keeps for its backward pass. For the real model one copy
  is 16 GiB.
- *unchanged*: whether saving the layer after it has computed gives the codes and scales that it had before.

Not measured, but read in their code: optimum-quanto's 4-bit layer compiles C++ (CPU) or CUDA code when it is first
unpacked, reloaded or differentiated, its fp8 layer compiles CUDA code on NVIDIA GPUs, and its 4-bit weights are
dequantised, in every backward pass, by multiplying with an identity matrix; bitsandbytes fetches compiled code from the
Hub if the package `kernels` is installed. On a CPU bitsandbytes 0.50 also dequantises a weight wrongly when its rows
are not a multiple of 64 long; that is avoided here, and the real model has no such rows.

Errors that name the reason, instead of a fallback: a library that is missing or cannot be imported; `nf4-bnb` on
Apple's GPU (its code is fetched while it runs); and whatever fails in a trial with a small matrix on the very device,
before anything is loaded. Own `int8`, `fp8`, `int4` and `nf4` are plain torch. These tables are from
a CPU; on an NVIDIA H200 quantising and dequantising gave the same bits ([measured.md](measured.md)). ROCm and MPS have
not been tested.
"""


def build() -> str:
    """The whole page."""
    with torch.device("meta"):
        real = ChromaTransformer()
        t5 = T5Encoder(**T5_XXL)
    total = sum(p.numel() for p in real.parameters())
    inside = sum(linear.weight.numel() for _, linear in quantisable_linears(real))
    excluded = sum(p.numel() for n, p in real.named_parameters() if not n.startswith(("transformer_b", "single_t")))
    tiny, random = tiny_case(), random_case()
    shown = random.build()
    weights = 2 * sum(linear.weight.numel() for _, linear in quantisable_linears(shown))
    guide = GUIDE.format(
        share=f"{100 * inside / total:.1f} %",
        kept=f"{excluded / 1e6:.0f} M",
        plain=f"{(total - inside) / 1e6:.0f} M",
        memory=memory_table(real, t5),
        ran=what_ran(shown),
        dequantised=f"{weights / 2**20:.0f}",
    )
    parts = [
        guide,
        f"## A random Chroma of {sum(p.numel() for p in shown.parameters()) / 1e6:.0f} M parameters\n",
        matrix(random),
        "\n## `tiny`\nThe trained transformer that ships with the pack.\n",
        matrix(tiny),
        "\n## T5\nThe text encoder of `tiny`, 24 tokens.\n",
        text_matrix(),
        "",
        LIBRARY_GUIDE.format(layers=library_layer_table()),
    ]
    return "\n".join(parts)


def memory_table(real: nn.Module, t5: nn.Module) -> str:
    """GiB of weights by precision, of the transformer and of T5-XXL."""
    rows = []
    for name, chosen in PRECISIONS.items():
        sizes = [model_bytes(model, chosen) / 2**30 for model in (real, t5)]
        bits = 8 * linear_bytes(3072, 3072, chosen) / 3072**2
        rows.append((f"`{name}`", *(f"{value:.2f}" for value in (bits, *sizes))))
    return markdown_table(rows, ("precision", "bits a block weight", "transformer", "T5-XXL"))


def linear_bytes(rows: int, columns: int, chosen: Precision) -> int:
    """Bytes of the weight of one block linear, exactly."""
    if chosen.scheme is None:
        return rows * columns * chosen.dtype.itemsize
    return sum(t.numel() * t.element_size() for t in outline(rows, columns, chosen.scheme).values())


def model_bytes(model: nn.Module, chosen: Precision) -> int:
    """Bytes of all weights of a model on the meta device, each counted once."""
    linears = [linear for _, linear in quantisable_linears(model)]
    rest = sum(p.numel() for p in model.parameters()) - sum(linear.weight.numel() for linear in linears)
    inside = sum(linear_bytes(linear.out_features, linear.in_features, chosen) for linear in linears)
    return inside + rest * chosen.dtype.itemsize


def what_ran(random: ChromaTransformer) -> str:
    """The machine's kind, the libraries, and the two models."""
    packages = ", ".join(f"{name} {version(name).partition('+')[0]}" for name in LIBRARIES)
    config = random.config
    width = config.num_attention_heads * config.attention_head_dim
    return (
        f"On a CPU ({platform.machine()}, torch's {torch.backends.cpu.get_cpu_capability()} kernels), one thread, with "
        f"{packages}. The random Chroma has width {width}, {config.num_layers} double and {config.num_single_layers} "
        "single blocks, weights drawn from a normal distribution of spread 0.02, and gets 96 image and 32 text tokens; "
        "`tiny` gets 16 and 12. The LoRA is random, of rank 4 on every block linear, and as strong as the weights."
    )


def matrix(case: Case) -> str:
    """The rows of all precisions on one transformer."""
    expected = reference(case)
    columns = "precision, weights, output, size, LoRA live, LoRA merged, LoRA gradient, saved, moved, kept".split(", ")
    rows = []
    for name in PRECISIONS:
        print(name, flush=True)
        try:
            row = measure(case, expected, name)
        except PrecisionError as error:
            rows.append((f"`{name}`", f"not on this machine: {error}"))
            continue
        errors = (row.weight_error, row.error, row.size, row.live, row.merged, row.gradient)
        cells = [number(value) for value in errors]
        same = ["identical" if value else "**differs**" for value in (row.saved_identical, row.moved_identical)]
        rows.append((f"`{name}`", *cells, *same, f"{row.kept_bytes / 2**20:.1f}"))
    return markdown_table(rows, columns)


def text_matrix() -> str:
    """Error and size of all precisions on T5."""
    rows = []
    for name in PRECISIONS:
        try:
            error, size = measure_text(name)
        except PrecisionError as failure:
            rows.append((f"`{name}`", f"not on this machine: {failure}"))
            continue
        rows.append((f"`{name}`", number(error), number(size)))
    return markdown_table(rows, ("precision", "output", "size"))


def number(value: float) -> str:
    """Two significant digits; 0 for nothing, sizes as they are."""
    return (
        "0" if value == 0 else f"{value:.3f}" if value >= 0.1 else f"{value:.2g}" if value >= 1e-3 else f"{value:.0e}"
    )


def documented_rows(page: str, heading: str) -> list[str]:
    """The precisions that the table below a heading lists, in its order."""
    section = page.partition(f"## {heading}")[2].partition("\n## ")[0]
    return [line.split("`")[1] for line in section.splitlines() if line.startswith("| `")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare the page's rows with today's precisions")
    if parser.parse_args().check:
        page = PAGE.read_text(encoding="utf-8")
        headings = ("Memory of the real model", "A random Chroma", "`tiny`", "T5")
        stale = [heading for heading in headings if documented_rows(page, heading) != list(PRECISIONS)]
        sys.exit(f"{PAGE.name} does not list today's precisions under: {', '.join(stale)}" if stale else 0)
    torch.set_num_threads(1)
    PAGE.write_text(build(), encoding="utf-8")


if __name__ == "__main__":
    main()
