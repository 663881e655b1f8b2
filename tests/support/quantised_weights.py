"""Weights as ComfyUI saves them in each of its quantised formats, made by comfy-kitchen's own layouts."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor


@dataclass(frozen=True)
class Quantised:
    """tensors: `weight`, `weight_scale` …; entry: the declaration ({"format": …}). meant: what comfy-kitchen makes of
    them in fp32; meant_in_bf16: in bf16, in which ComfyUI computes. error: what the format may cost, relative."""

    tensors: dict[str, Tensor]
    entry: dict[str, Any]
    meant: Tensor = field(default_factory=lambda: torch.empty(0))
    meant_in_bf16: Tensor = field(default_factory=lambda: torch.empty(0))
    error: float = 1.0

    @property
    def rotated(self) -> bool:
        return "convrot_groupsize" in self.entry

    @property
    def rounds_once(self) -> bool:
        """Whether comfy-kitchen computes the format in fp32, whatever the result's dtype."""
        return self.entry["format"] in ("int8_tensorwise", "convrot_w4a4", "mxfp8")

    def header(self, *modules: str) -> dict[str, str]:
        """The header's entry that declares modules to be of this format."""
        return {"_quantization_metadata": json.dumps({"layers": dict.fromkeys(modules, self.entry)})}


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], float]] = {
    "float8_e4m3fn": ("TensorCoreFP8Layout", {"dtype": torch.float8_e4m3fn}, {}, 0.06),
    "float8_e5m2": ("TensorCoreFP8Layout", {"dtype": torch.float8_e5m2}, {}, 0.09),
    "int8_tensorwise": ("TensorWiseINT8Layout", {}, {}, 0.06),
    "int8_tensorwise by row": ("TensorWiseINT8Layout", {"per_channel": True}, {}, 0.02),
    "int8_tensorwise ConvRot 256": (
        "TensorWiseINT8Layout",
        {"per_channel": True, "convrot": True},
        {"convrot": True, "convrot_groupsize": 256},
        0.02,
    ),
    "int8_tensorwise ConvRot 64": (
        "TensorWiseINT8Layout",
        {"per_channel": True, "convrot": True, "convrot_groupsize": 64},
        {"convrot": True, "convrot_groupsize": 64},
        0.02,
    ),
    "nvfp4": ("TensorCoreNVFP4Layout", {}, {}, 0.15),
    "mxfp8": ("TensorCoreMXFP8Layout", {}, {}, 0.06),
    "convrot_w4a4": ("TensorCoreConvRotW4A4Layout", {}, {"convrot_groupsize": 256}, 0.2),
    "convrot_w4a4 16": (
        "TensorCoreConvRotW4A4Layout",
        {"convrot_groupsize": 16},
        {"convrot_groupsize": 16},
        0.2,
    ),
}
"""Name → comfy-kitchen's layout, its options, what a file declares beside the format, and the error it may have."""


def _can_write(dtype: torch.dtype) -> bool:
    try:
        return bool(save({"a": torch.empty(1, dtype=dtype)}))
    except KeyError:
        return False


WRITTEN = [case for case in CASES if case != "mxfp8" or _can_write(torch.float8_e8m0fnu)]
"""Those whose files the installed safetensors can write: before 0.6 not the scales of mxfp8, which we read with any."""


def quantise(weight: Tensor, case: str) -> Quantised:
    """A weight in one of the CASES. Skips the test without comfy-kitchen."""
    tensor = pytest.importorskip("comfy_kitchen.tensor")
    layout, options, declared, error = CASES[case]
    made = tensor.QuantizedTensor.from_float(weight, layout, **options)
    # As ComfyUI holds it: what it dequantises to is the dtype in which it computes.
    params = type(made._params)(**{**vars(made._params), "orig_dtype": torch.bfloat16})
    in_bf16 = tensor.QuantizedTensor(made._qdata, layout, params).dequantize()
    declared = {"format": case.partition(" ")[0], **declared}
    return Quantised(dict(made.state_dict("weight")), declared, made.dequantize(), in_bf16, error)
