"""Random Chroma weights of the published widths, few blocks deep."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from chroma_core.model.transformer import ChromaTransformer
from chroma_core.names import transformer as keys


def random_original(layers: int, single_layers: int):
    """(outline, names and shapes, tensors) of a Chroma of the real widths in the original layout, bf16, norms `.scale`.

    Tensors are made one by one, from pieces of one random block: drawing 0.6 billion numbers takes longer than a test.
    """
    with torch.device("meta"):
        outline = ChromaTransformer(num_layers=layers, num_single_layers=single_layers)
    layout = {name: t.to(torch.bfloat16) for name, t in keys.to_original(outline.state_dict()).items()}
    generator = torch.Generator().manual_seed(0)
    block = torch.empty(3 << 20, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for i, (name, tensor) in enumerate(layout.items()):
            shifted = block.roll(7919 * i)
            yield name, shifted.repeat(-(-tensor.numel() // len(block)))[: tensor.numel()].view(tensor.shape)

    return outline, layout, tensors
