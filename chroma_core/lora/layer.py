"""A linear layer with low-rank branches beside it: y = base(x) + Σ strength · (alpha / rank) · up(down(x)).

Why not PEFT's layer (0.21): building one draws from the process-wide random stream even with its own initialisation
off, or else patches `nn.Module` for the whole process, and a training thread may do neither while the host computes
pictures; it takes the base's dtype, lifts the activations to the adapter's, and chooses its class by the base's type.
This one never touches global state, keeps its weights as given and the computation in the dtype of x, and works beside
any module that has `in_features` and `out_features`, quantised or not.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError


class LoraBranch(nn.Module):
    """One adapter of one layer: `down` [r, in] and `up` [out, r], which keep their dtype when the model is cast.

    Dropout (on the branch's input, in training mode only) draws its mask from `dropout_seed` afresh in every forward
    pass instead of from a running stream: gradient checkpointing runs the forward twice and must see the same mask.
    """

    def __init__(
        self,
        name: str,
        down: Tensor,
        up: Tensor,
        alpha: float,
        strength: float = 1.0,
        dropout: float = 0.0,
        trainable: bool = False,
    ):
        super().__init__()
        self.name = name
        self.down = nn.Parameter(down, requires_grad=trainable)
        self.up = nn.Parameter(up, requires_grad=trainable)
        self.alpha = alpha
        self.strength = strength
        self.dropout = dropout
        self.dropout_seed: int | None = None

    @property
    def scale(self) -> float:
        """The factor on up(down(x))."""
        return self.strength * self.alpha / self.down.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """The branch's share of the output, in the dtype of x."""
        if self.dropout > 0 and self.training:
            x = self._drop(x)
        return F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype)) * self.scale

    def _drop(self, x: Tensor) -> Tensor:
        if self.dropout_seed is None:
            raise ConfigError(
                "LoRA dropout has no seed for this step, so it would drop the same places for ever. Call "
                "`seed_dropout(transformer, seed)` with a new seed before every forward pass of training."
            )
        generator = torch.Generator(x.device).manual_seed(self.dropout_seed)
        keep = torch.rand(x.shape, generator=generator, device=x.device, dtype=torch.float32) >= self.dropout
        return x * keep / (1 - self.dropout)

    def _apply(self, fn, recurse=True):
        # `model.to(bf16)` would round the weights that are being trained; follow the device only.
        device = fn(torch.empty(0, dtype=self.down.dtype, device=self.down.device)).device
        return super()._apply(lambda tensor: tensor.to(device), recurse)


class AdaptedLinear(nn.Module):
    """Stands in the place of a linear layer that has at least one branch; the layer itself is `base_layer`."""

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        self.branches = nn.ModuleList()
        self.enabled = True
        self.train(base_layer.training)

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return self.base_layer.in_features  # type: ignore[return-value]

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.base_layer.out_features  # type: ignore[return-value]

    @property
    def weight(self) -> Tensor:
        """The base's own weight, without the branches."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        return self.base_layer.bias  # type: ignore[return-value]

    def branch(self, name: str) -> LoraBranch | None:
        """The branch of that adapter, if this layer has one."""
        return next((b for b in self.loras() if b.name == name), None)

    def loras(self) -> list[LoraBranch]:
        """The branches, in the order in which they came."""
        return list(self.branches)  # type: ignore[arg-type]

    def add(self, branch: LoraBranch) -> None:
        """Put one more branch beside the base, on its device and in its mode."""
        branch.to(self.weight.device)
        branch.train(self.training)
        self.branches.append(branch)

    def remove(self, name: str) -> None:
        """Take the branch of that adapter away, if there is one."""
        self.branches = nn.ModuleList(b for b in self.loras() if b.name != name)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out], in the dtype that the base gives."""
        y = self.base_layer(x)
        if self.enabled:
            for branch in self.loras():
                if branch.strength != 0:
                    y = y + branch(x).to(y.dtype)
        return y


def linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Full name → every linear layer, plain, quantised or adapted, in the order of the module tree.

    An adapted layer appears once, under the name that the layer has without its adapters.
    """
    found: dict[str, nn.Module] = {}

    def visit(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            if isinstance(getattr(child, "in_features", None), int) and isinstance(
                getattr(child, "out_features", None), int
            ):
                found[prefix + name] = child
            else:
                visit(child, f"{prefix}{name}.")

    visit(model, "")
    return found


def features(layer: nn.Module) -> tuple[int, int]:
    """Output and input width of a linear layer: the shape of its weight, also when that is stored packed."""
    return layer.out_features, layer.in_features  # type: ignore[return-value]


def adapted_layers(model: nn.Module) -> list[tuple[str, AdaptedLinear]]:
    """Full name and module of every layer that has a branch."""
    return [(name, layer) for name, layer in linear_modules(model).items() if isinstance(layer, AdaptedLinear)]


def attached(model: nn.Module) -> list[str]:
    """Names of the LoRAs on the model, in the order in which they came."""
    names = (branch.name for _, layer in adapted_layers(model) for branch in layer.loras())
    return list(dict.fromkeys(names))


def wrapped(model: nn.Module, name: str, layer: nn.Module) -> AdaptedLinear:
    """The layer of that name ready to take a branch; a plain one is replaced in the model."""
    if isinstance(layer, AdaptedLinear):
        return layer
    adapted = AdaptedLinear(layer)
    _replace(model, name, adapted)
    return adapted


def put_back(model: nn.Module, name: str, layer: AdaptedLinear) -> None:
    """Give an adapted layer's place back to its base."""
    _replace(model, name, layer.base_layer)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
