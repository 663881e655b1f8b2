"""The quantising libraries' own linear layers, measured: why `model.backends` uses the libraries without them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from optimum.quanto import QLinear, qfloat8_e4m3fn, qint4, qint8
from torch import Tensor, nn
from torchao.quantization import Float8WeightOnlyConfig, quantize_

WIDTH, TOKENS = 1024, 64


def library_layer(name: str, linear: nn.Linear) -> nn.Module:
    """The library's own layer for a precision, made the way its documentation says."""
    linear = copy.deepcopy(linear)
    if name == "nf4-bnb":
        layer = Linear4bit(WIDTH, WIDTH, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
        parameter: Any = Params4bit  # a checker sees torch's Parameter, which takes none of this
        layer.weight = parameter(linear.weight.data, requires_grad=False, quant_type="nf4", module=layer)
        return layer.to("cpu").eval()
    if name == "fp8-torchao":
        # Its default would also change the settings of torch's compiler for the whole process.
        quantize_(linear, Float8WeightOnlyConfig(set_inductor_config=False))
        return linear
    kind = {"int8-quanto": qint8, "int4-quanto": qint4, "fp8-quanto": qfloat8_e4m3fn}[name]
    layer = QLinear.from_module(linear, weights=kind)
    assert layer is not None
    layer.freeze()
    return layer.requires_grad_(False).eval()


def kept_copies(layer: nn.Module, x: Tensor) -> float:
    """Bytes saved for the backward pass besides the input and the layer's own tensors, in 16-bit weights."""
    own = {id(p) for p in layer.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if type(tensor) is Tensor and id(tensor) not in own and tensor.numel() == WIDTH * WIDTH:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = layer(x.requires_grad_())
    del y
    return sum(kept.values()) / (2 * WIDTH * WIDTH)


def stored(layer: nn.Module) -> dict[str, Tensor]:
    """What the layer would save, as plain bytes."""
    flat: dict[str, Tensor] = {}
    for name, tensor in layer.state_dict().items():
        inner = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else []
        plain = {f"{name}.{part}": getattr(tensor, part) for part in inner} or {name: tensor}
        flat |= {
            key: value.detach().clone().contiguous().view(torch.uint8) for key, value in plain.items() if value.dim()
        }
    return flat


def before_computing(name: str, linear: nn.Linear) -> dict[str, Tensor]:
    """What the library chose, before its layer has arranged it for a kernel."""
    if name != "int4-quanto":
        return stored(library_layer(name, linear))
    from optimum.quanto import quantize_weight

    plan = QLinear(WIDTH, WIDTH, bias=False, dtype=torch.bfloat16, device=torch.device("meta"), weights=qint4)
    scale, shift = plan.optimizer(linear.weight, qtype=qint4, axis=0, group_size=plan.weight_group_size)  # type: ignore[call-arg]
    weight = quantize_weight(linear.weight, qint4, 0, scale, shift, plan.weight_group_size, optimized=False)
    parts = {"weight._data._data": weight._data._data, "weight._scale": scale, "weight._shift": shift}  # type: ignore[attr-defined]
    return {key: value.detach().contiguous().view(torch.uint8) for key, value in parts.items()}


def changed_parts(name: str, linear: nn.Linear, x: Tensor) -> list[str]:
    """Names of the saved tensors that are not, after computing, what the library chose."""
    before = before_computing(name, linear)
    layer = library_layer(name, linear)
    with torch.no_grad():
        layer(x)
    after = stored(layer)
    shared = before.keys() & after.keys()
    assert shared, (before.keys(), after.keys())
    return sorted(key for key in shared if not torch.equal(before[key], after[key]))


def library_layer_table() -> str:
    """Markdown: one row a library precision."""
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(WIDTH, WIDTH, bias=False, device="meta")
    weight = torch.randn(WIDTH, WIDTH, generator=generator) * 0.02
    linear.weight = nn.Parameter(weight.bfloat16(), requires_grad=False)
    x = torch.randn(TOKENS, WIDTH, generator=generator).bfloat16()
    lines = ["| precision | layer | copies | unchanged |", "|---|---|---|---|"]
    for name in ("int8-quanto", "int4-quanto", "fp8-quanto", "nf4-bnb", "fp8-torchao"):
        layer = library_layer(name, linear)
        changed = changed_parts(name, linear, x)
        kind = (
            f"{type(layer).__name__} of {type(layer.weight.data).__name__}"
            if name == "fp8-torchao"
            else type(layer).__name__
        )
        told = f"no: {', '.join(f'`{part}`' for part in changed)}" if changed else "yes"
        lines.append(f"| `{name}` | {kind} | {kept_copies(layer, x.clone()):.0f} | {told} |")
    return "\n".join(lines)
