"""A linear layer with adapters beside it: y = base(x) + Σ strength · ΔW x, one branch (see `branches`) per adapter.

Why not PEFT's layer (0.21): building one draws from the process-wide random stream even with its own initialisation
off, or else patches `nn.Module` for the whole process, and a training thread may do neither while the host computes
pictures; it takes the base's dtype, lifts the activations to the adapter's, and chooses its class by the base's type.
This one never touches global state, keeps its weights as given and the computation in the dtype of x, and works beside
any module that has `in_features` and `out_features`, quantised or not.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .branches import LoraBranch


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
        """Put one more branch beside the base, in its mode. It has to be where the layer computes: `compute_device`."""
        branch.train(self.training)
        self.branches.append(branch)

    def remove(self, name: str) -> None:
        """Take the branch of that adapter away, if there is one."""
        self.branches = nn.ModuleList(b for b in self.loras() if b.name != name)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out], in the dtype that the base gives."""
        base = self.base_layer(x)
        y = base
        if self.enabled:
            for branch in self.loras():
                if branch.strength != 0:
                    y = y + branch(x, base, self.base_layer).to(y.dtype)
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


def compute_device(model: nn.Module, layer: nn.Module) -> torch.device:
    """Where a layer of a transformer computes: its weight's device, or, when that rests in host memory between visits
    to the device (see `streaming`), the device of the model's embedder, which is never streamed."""
    embedder = getattr(model, "x_embedder", layer)
    return embedder.weight.device  # type: ignore[return-value]


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
