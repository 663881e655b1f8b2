"""FSDP2: the frozen blocks divided among the processes, each gathered only while it computes.

What is trained stays whole in every process, like the embedders and the approximator: an adapter is about a hundredth
of the model, so dividing it would save little, and every optimizer, the average, checkpoints and the finished file work
on it as they do in one process. Its gradients are summed as without FSDP (see `processes`).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ...model.quantised import QuantisedLinear
from ...model.transformer import ChromaTransformer
from ..config import TrainingConfig


def check_sharding(config: TrainingConfig) -> None:
    """Raise ConfigError when the job's options, or this torch, do not go with FSDP2."""
    try:
        from torch.distributed.fsdp import fully_shard

        known = "ignored_params" in inspect.signature(fully_shard).parameters
    except ImportError:
        known = False
    if not known:
        raise ConfigError(f"FSDP2 needs a newer torch than {torch.__version__} (2.7 or later). Use --sharding ddp.")
    if config.model.offload != "none":
        raise ConfigError(
            f"FSDP2 and offload '{config.model.offload}' exclude each other: both decide where the blocks are. Set "
            "offload = 'none' (it is the same job), or use --sharding ddp."
        )
    if config.full is not None:
        raise ConfigError(
            "FSDP2 divides what is not trained, but this job trains layers of the model itself. Use --sharding ddp for "
            "full-rank training, or train a LoRA."
        )
    if config.compile:
        raise ConfigError("FSDP2 and compile are not supported together. Set compile = false, or use --sharding ddp.")


def shard(transformer: ChromaTransformer, trained: Sequence[nn.Parameter], device: torch.device) -> None:
    """Divide the blocks of a frozen transformer with its adapter among all processes; the rest goes to `device` whole.

    Call it with the transformer in host memory, at the same place in every process: the device then never holds more
    than its share and one block. Codes and scales of a quantised base are divided like weights.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    blocks = (*transformer.transformer_blocks, *transformer.single_transformer_blocks)
    for block in blocks:
        _codes_as_parameters(block)
        fully_shard(block, mesh=mesh, ignored_params=set(trained))
    # The root divides nothing of its own: it lets one block be fetched while another computes.
    fully_shard(transformer, mesh=mesh, ignored_params=set(transformer.parameters()))
    nn.Module.to(transformer, device)


_CARRIER = torch.float8_e4m3fn
"""FSDP2 divides floats only; bytes of codes travel as if they were these."""


class _DividedLinear(QuantisedLinear):
    """A quantised linear whose codes and scales are parameters, so that FSDP2, which leaves buffers whole, divides
    them."""

    kept_as: dict[str, torch.dtype]

    def parts(self) -> dict[str, Tensor]:
        """Codes and scales by name, as they are in an undivided layer."""
        parts = super().parts()
        return {name: t.view(self.kept_as[name]) if t.dtype == _CARRIER else t for name, t in parts.items()}


def _codes_as_parameters(block: nn.Module) -> None:
    for module in block.modules():
        if type(module) is not QuantisedLinear:
            continue
        module.__class__ = _DividedLinear
        module.kept_as = {}  # type: ignore[assignment]
        for name, tensor in list(module.named_buffers(recurse=False)):
            if tensor.ndim == 0 or (tensor.element_size() > 1 and not tensor.is_floating_point()):
                continue  # a library's single numbers: whole in every process
            delattr(module, name)
            module.kept_as[name] = tensor.dtype
            values = tensor.view(_CARRIER) if tensor.element_size() == 1 else tensor
            module.register_parameter(name, nn.Parameter(values, requires_grad=False))
