"""What each precision does to a model: measured here, printed by `precision_table.py`, asserted by the tests.

Every relative number is ‖a − b‖ / ‖b‖ over all values, where b comes from the same weights in fp32.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from chroma_core.lora.adapters import attach, detach, features, linear_modules, merge
from chroma_core.lora.modules import LoraFile, LoraModule
from chroma_core.lora.settings import target_modules
from chroma_core.lora.trainable import LoraSettings, add_trainable, load_trained
from chroma_core.model.latents import image_ids
from chroma_core.model.precision import (
    PRECISIONS,
    Precision,
    dequantised_weight,
    pack_linear,
    quantisable_linears,
    quantise,
    unpack_linear,
)
from chroma_core.model.quantised import QuantisedLinear
from chroma_core.model.text_encoder import T5Encoder
from chroma_core.model.transformer import ChromaTransformer

TINY = Path(__file__).resolve().parents[2] / "chroma_core" / "assets" / "tiny"
RANK = 4


@dataclass(frozen=True)
class Case:
    """A model to measure: its fp32 weights, one forward call, and a LoRA."""

    build: Callable[[], ChromaTransformer]  # a fresh copy in fp32, always with the same weights
    call: dict[str, Tensor]
    lora: LoraFile


@dataclass(frozen=True)
class Reference:
    """What fp32 gives: velocity, the LoRA's change of it, and the gradient of the LoRA's parameters."""

    velocity: Tensor
    change: Tensor
    gradient: Tensor


@dataclass(frozen=True)
class Row:
    """One precision on one model. `live` and `merged`: error of the LoRA's change; 1 would mean that it was dropped."""

    name: str
    weight_error: float
    error: float
    size: float  # bytes of the block linears, over those of bf16
    live: float
    gradient: float
    merged: float
    saved_identical: bool
    moved_identical: bool
    kept_bytes: int  # for the backward pass, besides the model's own tensors


def relative(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / ‖b‖."""
    return float((a.float() - b.float()).norm() / b.float().norm())


def tiny_case() -> Case:
    """The transformer that ships with the pack, with the text width and sizes that it was trained for."""
    config = json.loads((TINY / "transformer" / "config.json").read_text())
    weights = load_file(TINY / "transformer" / "diffusion_pytorch_model.safetensors")

    def build() -> ChromaTransformer:
        with torch.device("meta"):
            model = ChromaTransformer(**{k: v for k, v in config.items() if not k.startswith("_")})
        model.load_state_dict({k: v.float() for k, v in weights.items()}, assign=True)
        return model.requires_grad_(False).eval()

    return case(build, 8, 8, 12)


def random_case(width: int = 1024, double: int = 2, single: int = 4, rows: int = 24, columns: int = 16) -> Case:
    """A random Chroma of `width` (heads of 128) whose weights have the spread of real ones: normal, 0.02.

    The approximator's output is scaled to spread 1, or the gates would shut the blocks out of the result.
    """

    def build() -> ChromaTransformer:
        with torch.device("meta"):
            model = ChromaTransformer(
                num_layers=double,
                num_single_layers=single,
                attention_head_dim=128,
                num_attention_heads=width // 128,
                joint_attention_dim=512,
                approximator_hidden_dim=512,
                approximator_layers=2,
            )
        generator = torch.Generator().manual_seed(1)
        weights = {
            name: torch.randn(t.shape, generator=generator) * 0.02
            if t.dim() == 2
            else torch.full(t.shape, float("norm" in name))
            for name, t in model.state_dict().items()
        }
        model.load_state_dict(weights, assign=True)
        with torch.no_grad():
            out = model.distilled_guidance_layer.out_proj
            out.weight.div_(model.modulation(torch.tensor([0.7])).std())
        return model.requires_grad_(False).eval()

    return case(build, rows, columns, 32)


def case(build: Callable[[], ChromaTransformer], rows: int, columns: int, tokens: int) -> Case:
    """A random call of `rows` × `columns` latents and `tokens` text tokens, and a LoRA as strong as the weights."""
    model = build()
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    linears = linear_modules(model)
    modules = {}
    for name in target_modules(model, "all+ffs"):
        out_features, in_features = features(linears[name])
        spread = float(linears[name].weight.std())  # type: ignore[union-attr]
        up = normal(out_features, RANK) * spread / 2
        modules[name] = LoraModule(normal(RANK, in_features) / RANK**0.5, up, float(RANK))
    call = {
        "latents_BLD": normal(1, rows * columns // 4, model.config.in_channels),
        "text_BTC": normal(1, tokens, model.config.joint_attention_dim),
        "sigma_B": torch.tensor([0.7]),
        "img_ids_L3": image_ids(rows, columns),
    }
    return Case(build, call, LoraFile(modules))


def cast(model: ChromaTransformer, dtype: torch.dtype) -> ChromaTransformer:
    """`model.to(dtype)` without diffusers' warning."""
    return nn.Module.to(model, dtype)  # type: ignore[return-value]


def predict(model: ChromaTransformer, call: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """The velocity, computed in `dtype`, in fp32."""
    return model(call["latents_BLD"].to(dtype), call["text_BTC"].to(dtype), call["sigma_B"], call["img_ids_L3"]).float()


def shortened(call: dict[str, Tensor], tokens: int = 8) -> dict[str, Tensor]:
    """The first `tokens` of image and text: enough where every bit is compared."""
    cut = {"latents_BLD": call["latents_BLD"][:, :tokens], "text_BTC": call["text_BTC"][:, :tokens]}
    return {**call, **cut, "img_ids_L3": call["img_ids_L3"][:tokens]}


def reference(chosen: Case) -> Reference:
    """The fp32 results against which every row is measured."""
    model = chosen.build()
    with torch.no_grad():
        velocity = predict(model, chosen.call, torch.float32)
        attach(model, chosen.lora)
        change = predict(model, chosen.call, torch.float32) - velocity
    detach(model, "lora")
    gradient, _ = lora_gradient(model, chosen, torch.float32)
    return Reference(velocity, change, gradient)


def lora_gradient(model: ChromaTransformer, chosen: Case, dtype: torch.dtype) -> tuple[Tensor, int]:
    """The gradient of a LoRA in training (fp32, as one vector), and the bytes that the forward pass kept for it.

    Counted are the storages that autograd saves, each once, besides those of the model's own parameters and buffers.
    """
    parameters = add_trainable(model, LoraSettings(rank=RANK, target="all+ffs"), seed=0)
    load_trained(model, chosen.lora)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        velocity = predict(model, chosen.call, dtype)
    target = torch.randn(velocity.shape, generator=torch.Generator().manual_seed(3))
    gradients = torch.autograd.grad((velocity - target).square().mean(), parameters)
    return torch.cat([g.flatten() for g in gradients]), sum(kept.values())


def measure(chosen: Case, expected: Reference, name: str) -> Row:
    """One row of the matrix, on this machine's CPU. Raises PrecisionError where the precision cannot be used."""
    precision, call = PRECISIONS[name], chosen.call
    plain = {path: linear.weight for path, linear in quantisable_linears(chosen.build())}
    model = cast(chosen.build(), precision.dtype)
    quantise(model, precision)
    layers = {path: model.get_submodule(path) for path in plain}
    errors = [relative(dequantised_weight(layer), plain[path]) for path, layer in layers.items()]
    with torch.no_grad():
        velocity = predict(model, call, precision.dtype)
        attach(model, chosen.lora)
        live = predict(model, call, precision.dtype) - velocity
        detach(model, "lora")
        # Saved and moved after it has computed: some libraries' own layers change their weights then.
        short = shortened(call)
        before = predict(model, short, precision.dtype)
        saved = predict(saved_and_loaded(model, chosen, precision), short, precision.dtype)
        moved = predict(cast(copy.deepcopy(model), precision.dtype), short, precision.dtype)
        merged = cast(chosen.build(), precision.dtype)
        merge(merged, chosen.lora)
        quantise(merged, precision)
        merged_change = predict(merged, call, precision.dtype) - velocity
    gradient, kept = lora_gradient(model, chosen, precision.dtype)
    return Row(
        name,
        sum(errors) / len(errors),
        relative(velocity, expected.velocity),
        sum(stored_bytes(layer) for layer in layers.values()) / sum(2 * weight.numel() for weight in plain.values()),
        relative(live, expected.change),
        relative(gradient, expected.gradient),
        relative(merged_change, expected.change),
        bool(torch.equal(saved, before)),
        bool(torch.equal(moved, before)),
        kept,
    )


def stored_bytes(layer: nn.Module) -> int:
    """Bytes of a linear's weight: its codes and scales, without the bias."""
    weights = layer.parts().values() if isinstance(layer, QuantisedLinear) else [layer.weight]
    return sum(t.numel() * t.element_size() for t in weights)  # type: ignore[union-attr]


def saved_and_loaded(model: ChromaTransformer, chosen: Case, precision: Precision) -> ChromaTransformer:
    """Another model with the weights of this one, through a safetensors file."""
    again = cast(chosen.build(), precision.dtype)
    paths = [path for path, _ in quantisable_linears(again)] if precision.quantised else []
    tensors = {
        f"{path}.{suffix}": tensor
        for path in paths
        for suffix, tensor in pack_linear(model.get_submodule(path), precision).items()
    }
    tensors |= {k: v for k, v in model.state_dict().items() if k.rpartition(".")[0] not in paths}
    with tempfile.TemporaryDirectory() as folder:
        save_file(tensors, f"{folder}/model.safetensors")
        loaded = load_file(f"{folder}/model.safetensors")
    for path in paths:
        parent, _, leaf = path.rpartition(".")
        parts = {k.rpartition(".")[2]: loaded.pop(k) for k in list(loaded) if k.rpartition(".")[0] == path}
        shell = again.get_submodule(path)
        assert isinstance(shell, nn.Linear)
        setattr(again.get_submodule(parent), leaf, unpack_linear(shell, parts, precision))
    again.load_state_dict(loaded, strict=False, assign=True)
    return again


def tiny_text_encoder(dtype: torch.dtype = torch.float32) -> T5Encoder:
    """The T5 encoder that ships with the pack."""
    config = json.loads((TINY / "text_encoder" / "config.json").read_text())
    weights: dict[str, Any] = load_file(TINY / "text_encoder" / "model.safetensors")
    weights["encoder.embed_tokens.weight"] = weights["shared.weight"]
    with torch.device("meta"):
        model = T5Encoder(**config)
    model.load_state_dict({k: v.to(dtype) for k, v in weights.items()}, assign=True)
    return model.requires_grad_(False).eval()


def measure_text(name: str) -> tuple[float, float]:
    """Relative error of tiny's T5 states against fp32, and the size of its block linears over bf16's."""
    precision = PRECISIONS[name]
    ids = torch.arange(2, 26)[None]
    plain, model = tiny_text_encoder(), tiny_text_encoder(precision.dtype)
    paths = [path for path, _ in quantisable_linears(model)]
    weights = sum(2 * model.get_submodule(path).weight.numel() for path in paths)  # type: ignore[union-attr]
    quantise(model, precision)
    with torch.no_grad():
        error = relative(model(ids, torch.ones_like(ids)), plain(ids, torch.ones_like(ids)))
    return error, sum(stored_bytes(model.get_submodule(path)) for path in paths) / weights
