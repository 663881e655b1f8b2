"""Which layers of the blocks are trained in full rank, and the layers that take their places meanwhile.

A target names blocks or layers, in diffusers' names or in those of the original files:

| target | on Chroma 1 |
|---|---|
| `double_blocks.0-3`, `transformer_blocks.[0-3]` | the 48 linear layers (16 norms) of four double blocks |
| `single_blocks.30-37` | the 40 linear layers (16 norms) of eight single blocks |
| `single_transformer_blocks.*` | the 190 linear layers (76 norms) of all single blocks |
| `double_blocks.*.img_attn.qkv`, `transformer_blocks.*.attn.to_[qkv]` | layers of all double blocks: 57 |
| `all` | every linear layer of every block: 418 (152 norms) |

Never anything outside the blocks: the approximator sets the modulation of all blocks at once, and the embedders and
the last layer are what every token passes through.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError
from ..lora.adapters import compute_device, features, linear_modules
from ..names.transformer import APPROXIMATOR, matches, names_of, without_ranges

BLOCKS = ("transformer_blocks.", "single_transformer_blocks.")


def layer_names(transformer: nn.Module, target: str | Sequence[str], norms: bool = False) -> list[str]:
    """Full names of the layers that `target` selects, in the order of the module tree, each once.

    Args:
        transformer: a `ChromaTransformer` on any device (also meta), plain or quantised.
        target: `all`, or names of blocks or layers in either layout, as a list or separated by commas. A range of
            blocks is `double_blocks.0-3`, both ends included; `*`, `?` and `[…]` match as in a shell. A name selects
            everything below it.
        norms: also the blocks' query and key norms.
    Raises:
        ConfigError for an empty target, one that matches nothing, or one outside the blocks.
    """
    wanted = [part.strip() for part in (target.split(",") if isinstance(target, str) else target)]
    wanted = [part for part in wanted if part]
    if not wanted:
        raise ConfigError("No blocks are chosen for full-rank training. Name some, e.g. double_blocks.0-3, or 'all'.")
    linears = linear_modules(transformer)
    names = [
        name
        for name, module in transformer.named_modules()
        if name.startswith(BLOCKS) and (name in linears or (norms and isinstance(module, nn.RMSNorm)))
    ]
    aliases = {name: names_of(name) for name in names}
    chosen: set[str] = set()
    for part in wanted:
        for pattern in _patterns(part):
            found = {name for name, known in aliases.items() if matches(pattern, known)}
            if not found:
                raise ConfigError(_nothing_matches(part, pattern, transformer))
            chosen |= found
    return [name for name in names if name in chosen]


def count_trained(transformer: nn.Module, target: str | Sequence[str], norms: bool = False) -> int:
    """How many numbers `target` trains; the transformer may be on the meta device, unquantised."""
    names = set(layer_names(transformer, target, norms))
    return sum(p.numel() for name, p in transformer.named_parameters() if name.rpartition(".")[0] in names)


def _patterns(part: str) -> list[str]:
    """`double_blocks.0-3.img_attn` → one pattern a block."""
    return [f"{root}*" for root in BLOCKS] if part == "all" else without_ranges(part)


def _nothing_matches(part: str, pattern: str, transformer: nn.Module) -> str:
    doubles, singles = (len(transformer.get_submodule(root[:-1])) for root in BLOCKS)  # type: ignore[arg-type]
    there = f"This model has double_blocks.0-{doubles - 1} and single_blocks.0-{singles - 1}."
    if part.startswith(APPROXIMATOR):
        why = "lies in the approximator, which is never trained: it sets the modulation of all blocks at once"
    elif any(matches(pattern, (name,)) for name in ("x_embedder", "context_embedder", "proj_out", "norm_out")):
        why = "lies outside the blocks, where every token passes; only layers of blocks are trained in full rank"
    elif "norm" in part:
        why = "matches no layer that is trained; query and key norms are only with norms = true"
    else:
        why = f"matches no layer of this model{'' if pattern == part else f' (there is no {pattern})'}"
    return f"The full-rank target '{part}' {why}. {there} Choose of these, or patterns such as double_blocks.*.img_mlp."


class MasterLinear(nn.Module):
    """A linear layer in training: weight and bias are fp32, and it computes in the dtype of x.

    Steps of a bf16 weight smaller than 1/256 of it would be lost; in fp32 they add up (Micikevicius et al. 2018).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out], in the dtype of x; bit for bit what a linear layer rounded to it gives."""
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class MasterNorm(nn.Module):
    """The same for a root-mean-square norm over the last dimension."""

    def __init__(self, weight: Tensor, eps: float | None):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., n] → the same shape and dtype."""
        return F.rms_norm(x, tuple(self.weight.shape), self.weight.to(x.dtype), self.eps)


def put_masters(transformer: nn.Module, names: Sequence[str], read: Callable[[str], Tensor]) -> dict[str, nn.Parameter]:
    """Freeze the transformer and put trainable fp32 layers in the places of `names`; returns parameters by full name.

    Quantised layers are replaced too: what is trained is never quantised. One layer is held twice at a time.

    Args:
        read: the base's tensor of a full parameter name, in fp32 on the CPU, as a new tensor.
    """
    transformer.requires_grad_(False)
    parameters: dict[str, nn.Parameter] = {}
    with torch.inference_mode(False):
        for name in names:
            layer = transformer.get_submodule(name)
            device = compute_device(transformer, layer)
            weight = read(f"{name}.weight").to(device)
            if isinstance(layer, nn.RMSNorm):
                master: nn.Module = MasterNorm(weight, layer.eps)
            else:
                assert tuple(weight.shape) == features(layer)
                bias = None if layer.bias is None else read(f"{name}.bias").to(device)
                master = MasterLinear(weight, bias)
            transformer.set_submodule(name, master.train(layer.training))
            parameters |= {f"{name}.{leaf}": parameter for leaf, parameter in master.named_parameters()}
    return parameters
