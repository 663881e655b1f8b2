"""Files of every adapter kind in ComfyUI's own loader: rsLoRA and LoKr exactly, DoRA as far as the host goes."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import native
from chroma_core.lora.adapters import attach, detach
from chroma_core.lora.files import write_lora
from chroma_core.lora.modules import LoraFile, LoraModule
from chroma_core.lora.settings import LoraSettings
from chroma_core.lora.trainable import add_trainable, trained_lora
from chroma_core.model.latents import unpack
from chroma_core.model.precision import dequantised_weight
from chroma_core.model.transformer import ChromaTransformer
from chroma_core.names.transformer import to_original
from lora_cases import distance, inputs, predict
from miniature import REAL_DEPTH, real_depth

KINDS = {
    "rslora": LoraSettings(rank=4, alpha=6, kind="rslora", target="all+ffs"),
    "lokr": LoraSettings(rank=2, alpha=3, kind="lokr", target="all+ffs"),
    "lokr-whole": LoraSettings(rank=64, kind="lokr", target="all+ffs", lokr_factor=4),
    "dora": LoraSettings(rank=4, alpha=6, kind="dora", target="all+ffs"),
}
STRENGTHS = {"rslora": 0.7, "lokr": 0.7, "lokr-whole": 0.7, "dora": 1.0}


@pytest.fixture(scope="module")
def model() -> ChromaTransformer:
    """19 + 38 blocks of width 32, with weights large enough that every block matters."""
    return real_depth()


@pytest.fixture(scope="module")
def loras(model) -> dict[str, LoraFile]:
    """What training on all 419 layers could give: fresh adapters, every number moved."""
    found = {}
    for kind, settings in KINDS.items():
        add_trainable(model, settings, seed=3)
        generator = torch.Generator().manual_seed(5)
        for parameter in [p for p in model.parameters() if p.requires_grad]:
            spread = 0.1 * parameter.detach().abs().mean() if parameter.ndim == 1 else 0.1
            if kind == "dora" and not parameter.any():
                spread = 0.025  # `up`: the update is then about a third as long as the weight
            parameter.data += torch.randn(parameter.shape, generator=generator) * spread
        found[kind] = trained_lora(model)
        detach(model, "trained")
    model.requires_grad_(False)
    return found


@pytest.fixture(scope="module")
def changes(model, loras, tmp_path_factory) -> dict[str, tuple[Tensor, Tensor]]:
    """Kind → what the file changes in our velocity, and in the host's; and `hosts-dora`, see below."""
    call = inputs(model)
    folder = tmp_path_factory.mktemp("kinds")
    weights = {name: dequantised_weight(model.get_submodule(name)) for name in loras["dora"].modules}
    hosts = {}
    for name, module in loras["dora"].modules.items():
        assert isinstance(module, LoraModule) and module.magnitude is not None
        changed = weights[name] + module.up @ module.down * module.scale
        factor = module.magnitude * weights[name].norm(dim=1) / changed.norm(dim=1)
        hosts[name] = LoraModule(module.down, module.up, module.alpha, factor)
    ours = {}
    base = predict(model, call)
    for kind, lora in loras.items():
        write_lora(folder / f"{kind}.safetensors", lora)
        attach(model, lora, STRENGTHS[kind])
        ours[kind] = unpack(predict(model, call) - base, 8, 8)
        detach(model, "lora")
    write_lora(folder / "hosts-dora.safetensors", LoraFile(hosts))
    ours["hosts-dora"] = ours["dora"]
    result = {}
    for strength in (0.7, 1.0):
        kinds = [kind for kind in ours if STRENGTHS.get(kind, 1.0) == strength]
        first, *others = native.forward(
            folder / str(strength),
            REAL_DEPTH,
            to_original(model.state_dict(), norm_leaf="weight"),
            unpack(call["latents_BLD"], 8, 8),
            call["text_BTC"],
            call["sigma_B"],
            tuple(Path(folder / f"{kind}.safetensors") for kind in kinds),
            strength,
        )
        result |= {kind: (ours[kind], other - first) for kind, other in zip(kinds, others, strict=True)}
    return result


@pytest.mark.parametrize("kind", ["rslora", "lokr", "lokr-whole"])
def test_the_host_changes_the_output_as_we_do(changes, kind):
    ours, theirs = changes[kind]
    print(f"{kind}: relative difference of the change {distance(theirs, ours):.2e}, change {ours.abs().max():.3f}")
    assert ours.abs().max() > 0.01
    assert distance(theirs, ours) <= 1e-4


def test_the_host_divides_a_dora_by_the_norm_without_the_update(changes):
    """Its effect is near ours and not ours; with magnitudes adapted to its formula, it is ours exactly.

    The host computes magnitude / ‖W‖ · (W + ΔV), the paper and PEFT magnitude / ‖W + ΔV‖ · (W + ΔV).
    """
    ours, theirs = changes["dora"]
    print(f"dora: the host's change is {distance(theirs, ours):.2e} off")
    assert 1e-3 < distance(theirs, ours) < 2
    assert distance(changes["hosts-dora"][1], ours) <= 1e-4


def test_the_hosts_dora_error_per_layer(model, loras):
    """How far its rows are off: by the share that the update adds to their length."""
    worst = []
    for name, module in loras["dora"].modules.items():
        weight = dequantised_weight(model.get_submodule(name))
        longer = (weight + module.up @ module.down * module.scale).norm(dim=1) / weight.norm(dim=1)
        worst.append((longer - 1).abs().max().item())
    print(f"dora: rows of the host's weights are up to {max(worst):.1%} off, {sum(worst) / len(worst):.1%} on average")
    assert 0.02 < sum(worst) / len(worst) < 0.1


def test_the_host_patches_every_layer(model, loras, tmp_path):
    for kind in ("rslora", "dora"):
        write_lora(tmp_path / f"{kind}.safetensors", loras[kind])
        assert native.match(tmp_path / f"{kind}.safetensors", tmp_path, REAL_DEPTH) == (419, 419)
