"""`torch.compile` by regions: the blocks, which are alike, are compiled once for each class, not the model as a whole.

Compiled code is shared by all blocks of a class, since weights are its inputs. Training makes three graphs: the first
block (its input needs no gradient), double blocks, single blocks; again for a batch of one and for a masked text. They
are made when they are first needed, once a run.
"""

from __future__ import annotations

import torch

from ...errors import ConfigError
from ...lora.layer import adapted_layers
from ...model.transformer import ChromaTransformer
from ...streaming.streamer import streamed


def compile_blocks(transformer: ChromaTransformer, backend: str = "inductor") -> None:
    """Compile every block for any number of tokens; results are those of the uncompiled model within rounding.

    Call it after the adapters were added. Plain and quantised bases and gradient checkpointing work.

    Args:
        backend: torch's name of the compiler; `inductor` needs Triton on a GPU, and a C++ compiler on a CPU.
    Raises:
        ConfigError: the model is streamed, its LoRA has dropout, or the compiler cannot work on the device.
    """
    if streamed(transformer) is not None:
        raise ConfigError(
            "torch.compile and block streaming (offload 'block') exclude each other: moving the weights in and out "
            "breaks every block into pieces that are compiled again and again. Turn one of them off."
        )
    if any(branch.dropout > 0 for _, layer in adapted_layers(transformer) for branch in layer.loras()):
        raise ConfigError(
            "torch.compile cannot be used with LoRA dropout: its masks come from a seed that changes at every step, "
            "which the compiler takes for new code each time. Set dropout = 0, or turn compile off."
        )
    device = transformer.x_embedder.weight.device
    try:
        torch.compile(_trial, backend=backend)(torch.ones(4, device=device))
    except Exception as error:
        raise ConfigError(
            f"torch.compile with the backend '{backend}' cannot work on the device '{device}' ({type(error).__name__}: "
            f"{next(iter(str(error).splitlines()), '')}). On a GPU it needs Triton, on a CPU a C++ compiler. Turn "
            "compile off."
        ) from error
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        block.compile(backend=backend, dynamic=True)


def _trial(x: torch.Tensor) -> torch.Tensor:
    return x * 2 + 1
