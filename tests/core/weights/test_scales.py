"""Which scales belong to which weights, in every notation, and what a reader must refuse in them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from chroma_core.errors import ModelFileError
from chroma_core.weights.opening import open_weights
from weight_files import FP8_NAMES, NOTATIONS, json_tensor, write_safetensors, write_scaled_fp8

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def layers() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "encoder.block.0.q.weight": torch.randn(24, 16, generator=generator) * 0.05,
        "encoder.block.0.q.bias": torch.randn(24, generator=generator),
        "encoder.block.0.k.weight": torch.randn(16, 16, generator=generator) * 3,
        "encoder.norm.weight": torch.randn(16, generator=generator),
        "shared.weight": torch.randn(10, 16, generator=generator),
    }


@pytest.mark.parametrize("fp8", [E4M3, E5M2])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("notation", NOTATIONS)
def test_every_notation_gives_weight_times_scale(tmp_path: Path, notation, per_row: bool, fp8: torch.dtype):
    held = layers()
    path = tmp_path / "x.safetensors"
    expected = write_scaled_fp8(path, held, notation, per_row=per_row, fp8=fp8, keep={"shared.weight"})
    weights = open_weights(path)
    assert weights.shapes == {name: tuple(tensor.shape) for name, tensor in held.items()}
    for name, tensor in expected.items():
        assert torch.equal(weights.read(name, torch.float32), tensor), name
        assert torch.equal(weights.read(name, torch.bfloat16), tensor.bfloat16()), name
    assert torch.equal(
        weights.read("encoder.block.0.q.weight", torch.float32, (5, 19)), expected["encoder.block.0.q.weight"][5:19]
    )
    assert weights.storage["encoder.block.0.q.weight"] == "scaled fp8" and weights.storage["shared.weight"] == "fp32"
    error = (expected["encoder.block.0.q.weight"] - held["encoder.block.0.q.weight"]).norm()
    assert error / held["encoder.block.0.q.weight"].norm() < (0.04 if fp8 is E4M3 else 0.07)


def test_a_marker_below_a_prefix_and_flat_row_scales(tmp_path: Path):
    """A whole checkpoint: scaled T5, plain fp8 transformer; scales of shape [rows] and scales in bf16 are read too."""
    weight = torch.randn(6, 4).to(E4M3)
    scale = torch.rand(6).bfloat16()
    held = {
        "text_encoders.t5xxl.transformer.scaled_fp8": torch.empty(0, dtype=E4M3),
        "text_encoders.t5xxl.transformer.encoder.q.weight": weight,
        "text_encoders.t5xxl.transformer.encoder.q.scale_weight": scale,
        "text_encoders.t5xxl.transformer.shared.weight": weight,
        "model.diffusion_model.img_in.weight": weight,
    }
    weights = open_weights(write_safetensors(tmp_path / "x.safetensors", held))
    assert list(weights.shapes) == sorted(name for name in held if not name.endswith(("scaled_fp8", "scale_weight")))
    read = weights.read("text_encoders.t5xxl.transformer.encoder.q.weight", torch.float32)
    assert torch.equal(read, weight.float() * scale.float()[:, None])
    for name in ("text_encoders.t5xxl.transformer.shared.weight", "model.diffusion_model.img_in.weight"):
        assert weights.storage[name] == "fp8" and torch.equal(weights.read(name, torch.float32), weight.float())


def test_a_bias_with_its_own_scale(tmp_path: Path):
    bias = torch.randn(6).to(E4M3)
    held = {"a.bias": bias, "a.bias_scale": torch.tensor(0.25), "b.bias": bias, "b.scale_bias": torch.tensor([4.0])}
    weights = open_weights(write_safetensors(tmp_path / "x.safetensors", held))
    assert set(weights.shapes) == {"a.bias", "b.bias"}
    assert torch.equal(weights.read("a.bias", torch.float32), bias.float() * 0.25)
    assert torch.equal(weights.read("b.bias", torch.float32), bias.float() * 4)


def test_plain_fp8_and_names_that_look_like_scales(tmp_path: Path):
    held = {
        "a.weight": torch.randn(4, 4).to(E4M3),
        "double_blocks.0.img_attn.norm.query_norm.scale": torch.randn(4),
        "b.weight_scale": torch.tensor(2.0),  # of no weight in the file: an ordinary tensor
        "b.scale_input": torch.tensor(2.0),
    }
    weights = open_weights(write_safetensors(tmp_path / "x.safetensors", held))
    assert weights.shapes.keys() == held.keys()
    assert torch.equal(weights.read("a.weight", torch.bfloat16), held["a.weight"].bfloat16())


def weight() -> Tensor:
    return torch.ones(4, 8).to(E4M3)


def header(layers: object) -> dict[str, str]:
    return {"_quantization_metadata": json.dumps({"layers": layers})}


FP8_LAYER = {"format": FP8_NAMES[E4M3]}
REFUSED = {
    "missing by marker": ({"scaled_fp8": torch.zeros(2), "a.weight": weight()}, None, "'a.weight' lacks its scale"),
    "missing by header": ({"a.weight": weight()}, header({"a": FP8_LAYER}), "'a.weight' lacks its scale"),
    "missing by layer": (
        {"a.weight": weight(), "a.comfy_quant": json_tensor(FP8_LAYER)},
        None,
        "'a.weight' lacks its scale",
    ),
    "missing among scaled neighbours": (
        {"b.0.weight": weight(), "b.0.weight_scale": torch.ones(()), "b.1.weight": weight()},
        None,
        "'b.1.weight' lacks its scale",
    ),
    "not finite": (
        {"a.weight": weight(), "a.weight_scale": torch.tensor(float("nan"))},
        None,
        "'a.weight_scale'. that is not finite",
    ),
    "one row not finite": (
        {"a.weight": weight(), "a.scale_weight": torch.tensor([1.0, 2.0, float("inf"), 1.0])},
        None,
        "that is not finite",
    ),
    "wrong length": (
        {"a.weight": weight(), "a.weight_scale": torch.ones(3)},
        None,
        r"scale of shape \[3\]; expected one number, or 4",
    ),
    "scales of blocks": ({"a.weight": weight(), "a.weight_scale": torch.ones(4, 2)}, None, r"shape \[4, 2\]"),
    "scale in integers": (
        {"a.weight": weight(), "a.weight_scale": torch.ones(4, dtype=torch.uint8)},
        None,
        "scale that is stored as uint8",
    ),
    "two scales": (
        {"a.weight": weight(), "a.weight_scale": torch.ones(()), "a.scale_weight": torch.ones(())},
        None,
        "has two scales",
    ),
    "int8": (
        {"a.weight": torch.ones(4, 8, dtype=torch.int8), "a.weight_scale": torch.ones(())},
        None,
        "is stored as int8 with a scale, and nothing declares its format",
    ),
    "format by header": (
        {"a.weight": weight()},
        header({"a": {"format": "svdquant_w4a4"}}),
        "'a' in the format 'svdquant_w4a4', which is not read; float8_e4m3fn, .*convrot_w4a4, nvfp4, mxfp8 are",
    ),
    "format by layer": (
        {"a.weight": weight(), "a.comfy_quant": json_tensor({"format": "fp2_of_2028"})},
        None,
        "'a' in the format 'fp2_of_2028'",
    ),
    "no format": ({"a.weight": weight(), "a.comfy_quant": json_tensor([1])}, None, "instead of a table"),
    "format without a name": ({"a.weight": weight()}, header({"a": 3}), "in the format None"),
    "other type than declared": (
        {"a.weight": torch.ones(4, 8), "a.weight_scale": torch.ones(())},
        header({"a": FP8_LAYER}),
        "declared as float8_e4m3fn but stored as fp32",
    ),
    "header that is no JSON": ({"a.weight": weight()}, {"_quantization_metadata": "{"}, "_quantization_metadata is no"),
    "header without layers": ({"a.weight": weight()}, {"_quantization_metadata": "{}"}, "list no layers"),
    "declaration that is no text": ({"a.weight": weight(), "a.comfy_quant": torch.ones(3)}, None, "is no JSON"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_right_is_refused_on_opening(tmp_path: Path, case: str):
    held, metadata, message = REFUSED[case]
    path = write_safetensors(tmp_path / "x.safetensors", held, metadata)
    with pytest.raises(ModelFileError, match=message) as caught:
        open_weights(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_declaration_of_absent_layers_is_ignored(tmp_path: Path):
    """A transformer cut out of a checkpoint whose header still lists the layers of the other parts."""
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a.weight": torch.ones(2, 2)}, header({"other": {"format": "nvfp4"}}))
    assert set(open_weights(path).shapes) == {"a.weight"}
