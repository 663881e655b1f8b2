"""torchao (tested with 0.18): fp8 (e4m3), weights only, one scale a row."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torchao.quantization import Float8Tensor, Float8WeightOnlyConfig, quantize_


def quantise(weight: Tensor, scheme: str) -> dict[str, Tensor]:
    """`weight` [out, in] (bytes of e4m3) and `scale` [out, 1] in fp32."""
    rows, columns = weight.shape
    linear = nn.Linear(columns, rows, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    # Its default would also change the settings of torch's compiler for the whole process.
    quantize_(linear, Float8WeightOnlyConfig(set_inductor_config=False))
    quantised = linear.weight
    assert isinstance(quantised, Float8Tensor)
    return {"weight": quantised.qdata.view(torch.int8), "scale": quantised.scale}


def dequantise(parts: Mapping[str, Tensor], scheme: str, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    """By the library's own tensor."""
    codes = parts["weight"].view(torch.float8_e4m3fn)
    return Float8Tensor(codes, parts["scale"], block_size=[1, shape[1]], dtype=dtype).dequantize(dtype)


def outline(rows: int, columns: int, scheme: str) -> dict[str, Tensor]:
    """Shapes of what `quantise` gives."""
    with torch.device("meta"):
        return {"weight": torch.empty(rows, columns, dtype=torch.int8), "scale": torch.empty(rows, 1)}
