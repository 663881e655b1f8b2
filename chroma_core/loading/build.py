"""Building a module without memory and filling it layer by layer: read, cast, merge, quantise, put in place.

At no moment is more than one layer held in full precision beside the finished ones, so the peak stays near one copy
of what the model takes in its own precision. Never through `from_pretrained`: it switches the process-wide default
dtype and patches `nn.Module` while it works, and a training thread that loads its model must not change what a prompt
computes at that moment. Weights never stay views of the file, which the user may replace while they are in use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import ModelFileError
from ..lora.adapters import check_fits, merge
from ..lora.modules import LoraFile
from ..model.precision import (
    PRECISIONS,
    QUANTISED_PARTS,
    Precision,
    quantisable_linears,
    quantise_linear,
    unpack_linear,
)
from ..model.quantised import CODES
from ..weights.identify import Part
from ..weights.opening import Weights
from .matching import Component, build_part
from .spec import LoraUse

Device = torch.device | str
OnPart = Callable[[int, int, str], None]
"""Called with parts done, parts in all, and what is being done; may raise to cancel."""


@dataclass(frozen=True)
class Placement:
    """Where weights are worked on and where they end.

    staging: where a part is cast, merged and quantised. rest: where parts outside the blocks end. blocks: where blocks
    end (the host's memory when they are streamed).
    """

    staging: torch.device
    rest: torch.device
    blocks: torch.device

    @classmethod
    def on(cls, device: Device, *, in_host_memory: bool = False, streamed: bool = False) -> Placement:
        """Everything on `device`; `in_host_memory`: work done on the CPU; `streamed`: blocks end on the CPU."""
        device, host = torch.device(device), torch.device("cpu")
        return cls(host if in_host_memory else device, device, host if streamed else device)

    def of(self, name: str) -> torch.device:
        """Where the module of that full name ends."""
        return self.blocks if is_block(name) else self.rest


def assemble(
    part: Part,
    weights: Weights,
    component: Component,
    chosen: Precision,
    placement: Placement,
    loras: Sequence[tuple[LoraUse, LoraFile]],
    on_part: OnPart,
) -> nn.Module:
    """A part from files of others, frozen and in eval mode; `loras` are merged before weights are quantised.

    Weights that the files hold in the very scheme of a quantised precision are kept as they are, unless merged into.

    Raises ModelFileError for damaged files, LoraError when a LoRA does not fit, PrecisionError from the back end.
    """
    module = build_part(part, component.config)
    for use, lora in loras:
        check_fits(module, lora, use.allow_partial)
    merged = [(lora, use.strengths(lora.modules)) for use, lora in loras]
    linears = {name for name, _ in quantisable_linears(module)} if chosen.quantised else set()
    shared = "shared.weight" in component.sources
    names = [n for n in component.sources if not (shared and n == "encoder.embed_tokens.weight")]
    groups = grouped(names, lambda name: name.rpartition(".")[0])
    for i, (group, members) in enumerate(groups.items()):
        on_part(i, len(groups), group)
        # What is quantised is read alike for every device: the codes are the same.
        dtype = PRECISIONS[chosen.name].dtype if group in linears else chosen.dtype
        as_it_is = not any(group in lora.modules for lora, _ in merged)
        if group in linears and as_it_is and is_kept(weights, component, f"{group}.weight", chosen):
            module.set_submodule(group, _as_stored(module.get_submodule(group), group, weights, component, chosen))
            module.get_submodule(group).to(placement.of(group))
            continue
        for name in members:
            set_tensor(module, name, component.sources[name].read(weights, dtype).to(placement.staging))
        for lora, strengths in merged:
            if group in lora.modules:
                merge(module, LoraFile({group: lora.modules[group]}), strengths)
        if group in linears:
            module.set_submodule(group, quantise_linear(module.get_submodule(group), chosen))  # type: ignore[arg-type]
        module.get_submodule(group).to(placement.of(group))
    on_part(len(groups), len(groups), "")
    return finished(module)


def is_kept(weights: Weights, component: Component, name: str, chosen: Precision) -> bool:
    """Whether a file holds a parameter as the precision does: its codes need not be made anew."""
    return chosen.quantised and weights.schemes.get(component.sources[name].name) == chosen.scheme


def _as_stored(shell: nn.Module, group: str, weights: Weights, component: Component, chosen: Precision) -> nn.Module:
    """The quantised linear in the place of `shell`, with the codes and scales of the file."""
    codes, scale = component.sources[f"{group}.weight"].codes(weights)
    tensors = {"weight": codes.view(CODES), "scale": scale}
    if (bias := component.sources.get(f"{group}.bias")) is not None:
        tensors["bias"] = bias.read(weights, PRECISIONS[chosen.name].dtype)
    return unpack_linear(shell, tensors, chosen)  # type: ignore[arg-type]


def finished(module: nn.Module) -> nn.Module:
    """The module frozen, in eval mode, and without anything left on the meta device."""
    left = [n for n, t in (*module.named_parameters(), *module.named_buffers()) if t.device.type == "meta"]
    if left:
        raise ModelFileError(
            f"{len(left)} weights were not found, e.g. {', '.join(left[:3])}. The file is incomplete or belongs to "
            "another model."
        )
    return module.requires_grad_(False).eval()


def is_block(name: str) -> bool:
    """Whether a full name lies in a transformer (or T5) block."""
    return name.startswith(tuple(f"{root}." for root in QUANTISED_PARTS))


def grouped(names: Iterable[str], owner: Callable[[str], str]) -> dict[str, list[str]]:
    """Full tensor names by the module that owns them, in the order of first sight."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(owner(name), []).append(name)
    return groups


def set_tensor(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Put `tensor` in the place of the parameter or buffer of that full name."""
    parent_name, _, leaf = name.rpartition(".")
    parent = module.get_submodule(parent_name)
    if leaf in parent._parameters:
        parent._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        parent._buffers[leaf] = tensor
