"""How large a LoRA's change is against the weights that it changes."""

from __future__ import annotations

import torch

from ..errors import LoraError, ModelFileError
from ..loading.build import OnPart
from ..loading.load import transformer_source
from ..loading.matching import build_part
from ..loading.model_files import file_state
from ..loading.spec import ModelSpec
from ..lora.adapters import check_fits
from ..lora.modules import LoraFile
from ..lora.report import Norms, update_norm, update_norms

ALONE = ("lora", "lokr", "loha", "full")
"""Kinds whose ΔW does not depend on the weight."""

_known: dict[tuple[str, str], float] = {}
"""‖W‖ by the state of the model's file and the layer: a file is read once in a process."""


def norms_on(lora: LoraFile, spec: ModelSpec, on_part: OnPart = lambda done, total, what: None) -> Norms:
    """‖ΔW‖ and ‖W‖ of every layer of a LoRA; only those layers are read, one at a time.

    A DoRA's ΔW is the one for the model's weights. ‖ΔW‖ alone, from the LoRA's file, where the model cannot say: its
    weights are quantised in its file, or the LoRA does not fit it.
    """
    try:
        weights, component = transformer_source(spec)
        check_fits(build_part("transformer", component.config), lora)
    except (ModelFileError, LoraError):
        return update_norms(lora)
    state = file_state(weights.path)
    names = list(lora.modules)
    change: dict[str, float] = {}
    sizes: dict[str, float] = {}
    for i, name in enumerate(names):
        on_part(i, len(names), name)
        module = lora.modules[name]
        alone = module.kind in ALONE
        if alone and (state, name) in _known:
            change[name], sizes[name] = update_norm(module), _known[state, name]
            continue
        weight = component.sources[f"{name}.weight"].read(weights, torch.float32)
        sizes[name] = _known[state, name] = float(weight.double().norm())
        change[name] = update_norm(module) if alone else float(module.delta(weight).double().norm())
    on_part(len(names), len(names), "")
    return Norms(change, sizes)
