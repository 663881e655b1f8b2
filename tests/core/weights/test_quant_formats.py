"""Weights in ComfyUI's quantised formats, against comfy-kitchen, the package that quantises and dequantises them there.

Files are what comfy-kitchen's layouts give for saving, with the declaration that ComfyUI's savers put beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from chroma_core.errors import ModelFileError
from chroma_core.weights.opening import open_weights
from quantised_weights import CASES, Quantised, quantise
from weight_files import json_tensor, write_safetensors

ROWS, COLUMNS = 192, 512


def matrix(seed: int = 0, rows: int = ROWS, columns: int = COLUMNS) -> Tensor:
    """With rows of very different size, one of zeros, and an outlier, as weights have them."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-3, 1, rows)[:, None]
    weight = torch.randn(rows, columns, generator=generator) * sizes
    weight[3] = 0
    weight[5, 7] = 40.0
    return weight


def written(path: Path, made: Quantised, more: Mapping[str, Tensor] | None = None, **entry: Any) -> Path:
    held = {f"a.{suffix}": tensor for suffix, tensor in made.tensors.items()}
    return write_safetensors(path, {**held, "a.comfy_quant": json_tensor({**made.entry, **entry}), **(more or {})})


@pytest.mark.parametrize("case", CASES)
def test_the_numbers_are_comfy_kitchens(tmp_path: Path, case: str):
    made = quantise(matrix(), case)
    weights = open_weights(written(tmp_path / "x.safetensors", made))
    assert weights.shapes == {"a.weight": (ROWS, COLUMNS)}
    read = weights.read("a.weight", torch.float32)
    if made.rotated:  # a product, whose sums the number of rows may order otherwise
        assert (read - made.meant).norm() <= 1e-6 * made.meant.norm()
    else:
        assert torch.equal(read, made.meant)
    assert torch.equal(weights.read("a.weight", torch.bfloat16), read.bfloat16())
    assert torch.equal(weights.read("a.weight", torch.float32, (37, 130)), read[37:130])
    # The format's own error: far from 1, which a scale of another row or a lost rotation would give.
    assert 0 < (read - matrix()).norm() / matrix().norm() < made.error


@pytest.mark.parametrize("case", CASES)
def test_in_bf16_they_are_within_its_rounding(tmp_path: Path, case: str):
    """comfy-kitchen computes some formats in bf16, and rounds up to three times; we round once."""
    made = quantise(matrix(), case)
    read = open_weights(written(tmp_path / "x.safetensors", made)).read("a.weight", torch.bfloat16)
    theirs = made.meant_in_bf16
    if made.rounds_once:
        assert (read != theirs).float().mean() <= (1e-3 if made.rotated else 0)
    assert (read.float() - theirs.float()).norm() <= 2**-8 * theirs.float().norm()


@pytest.mark.parametrize("case", ["int8_tensorwise", "int8_tensorwise by row", "float8_e4m3fn"])
def test_what_our_layers_hold_as_well_is_had_as_it_is(tmp_path: Path, case: str):
    made = quantise(matrix(), case)
    weights = open_weights(written(tmp_path / "x.safetensors", made))
    scheme = "fp8" if "float8" in case else "int8"
    assert weights.schemes == {"a.weight": scheme}
    codes, scale = weights.codes("a.weight", (20, 50))
    assert torch.equal(codes, made.tensors["weight"][20:50]) and scale.shape == (30, 1)
    assert torch.equal(codes.float() * scale, made.meant[20:50])


@pytest.mark.parametrize("case", sorted(set(CASES) - {"int8_tensorwise", "int8_tensorwise by row", "float8_e4m3fn"}))
def test_what_our_layers_do_not_hold_is_not_offered(tmp_path: Path, case: str):
    assert not open_weights(written(tmp_path / "x.safetensors", quantise(matrix(), case))).schemes


def test_plain_fp8_is_had_as_it_is_with_scales_of_one(tmp_path: Path):
    weight = matrix().to(torch.float8_e4m3fn)
    weights = open_weights(write_safetensors(tmp_path / "x.safetensors", {"a.weight": weight}))
    codes, scale = weights.codes("a.weight")
    assert weights.schemes == {"a.weight": "fp8"} and torch.equal(scale, torch.ones(ROWS, 1))
    assert torch.equal(codes.view(torch.uint8), weight.view(torch.uint8))


def test_smoothed_inputs_are_multiplied_into_the_weight(tmp_path: Path):
    """x·s times W is x times (W·s): ComfyUI multiplies the inputs of nvfp4 layers, and of no other."""
    made, smooth = quantise(matrix(), "nvfp4"), torch.rand(COLUMNS) + 0.5
    weights = open_weights(written(tmp_path / "x.safetensors", made, {"a.pre_quant_scale": smooth}))
    assert torch.equal(weights.read("a.weight", torch.float32), made.meant * smooth)
    other = open_weights(
        written(tmp_path / "y.safetensors", quantise(matrix(), "mxfp8"), {"a.pre_quant_scale": smooth})
    )
    assert set(other.shapes) == {"a.weight", "a.pre_quant_scale"}  # of no meaning to us: a surplus tensor


def test_the_options_may_stand_in_a_table_of_their_own(tmp_path: Path):
    made = quantise(matrix(), "int8_tensorwise ConvRot 64")
    moved = Quantised(made.tensors, {"format": "int8_tensorwise", "params": {"convrot": True, "convrot_groupsize": 64}})
    direct = open_weights(written(tmp_path / "a.safetensors", made)).read("a.weight", torch.float32)
    nested = open_weights(written(tmp_path / "b.safetensors", moved)).read("a.weight", torch.float32)
    assert torch.equal(direct, nested)
    lost = open_weights(written(tmp_path / "c.safetensors", made, convrot=False)).read("a.weight", torch.float32)
    assert (lost - direct).norm() > 0.5 * direct.norm()


def test_block_scales_as_plain_bytes(tmp_path: Path):
    """Older files, and writers without the dtypes, store the scales of blocks as uint8."""
    for case in ("nvfp4", "mxfp8"):
        made = quantise(matrix(), case)
        tensors = {**made.tensors, "weight_scale": made.tensors["weight_scale"].view(torch.uint8)}
        weights = open_weights(written(tmp_path / f"{case}.safetensors", Quantised(tensors, made.entry)))
        assert torch.equal(weights.read("a.weight", torch.float32), made.meant)


def test_a_header_without_the_prefix_of_its_file(tmp_path: Path):
    """As ComfyUI does, which asks for the names before and after it takes the prefix off."""
    made = quantise(matrix(), "int8_tensorwise by row")
    held = {f"model.diffusion_model.a.{suffix}": tensor for suffix, tensor in made.tensors.items()}
    path = write_safetensors(tmp_path / "x.safetensors", held, made.header("a"))
    weights = open_weights(path)
    assert torch.equal(weights.read("model.diffusion_model.a.weight", torch.float32), made.meant)


BROKEN: dict[str, tuple[str, dict[str, Any], str]] = {
    "another type": (
        "int8_tensorwise",
        {"weight": torch.zeros(ROWS, COLUMNS)},
        "declared as int8_tensorwise but stored",
    ),
    "not a matrix": ("int8_tensorwise", {"weight": torch.zeros(8, dtype=torch.int8)}, r"has the shape \[8\]"),
    "no scale": ("int8_tensorwise", {"weight_scale": None}, "lacks its scale"),
    "no block scales": ("nvfp4", {"weight_scale": None}, "lacks its scale"),
    "no second scale": ("nvfp4", {"weight_scale_2": None}, "lacks its scale .'weight_scale_2'"),
    "block scales of another matrix": (
        "mxfp8",
        {"weight_scale": torch.zeros(128, 16, dtype=torch.uint8)},
        r"block scales of shape \[128, 16\]; its own shape asks for \[256, 16\]",
    ),
    "block scales in bf16": (
        "nvfp4",
        {"weight_scale": torch.zeros(256, 32, dtype=torch.bfloat16)},
        "block scales that are stored as bf16",
    ),
    "a scale that is not finite": ("convrot_w4a4", {"weight_scale": torch.full((ROWS,), torch.inf)}, "not finite"),
    "a second scale that is not finite": ("nvfp4", {"weight_scale_2": torch.tensor(torch.nan)}, "not finite"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_contradicts_the_format_is_refused_on_opening(tmp_path: Path, case: str):
    kind, changes, message = BROKEN[case]
    made = quantise(matrix(), kind)
    tensors = {name: tensor for name, tensor in {**made.tensors, **changes}.items() if tensor is not None}
    path = written(tmp_path / "x.safetensors", Quantised(tensors, made.entry))
    with pytest.raises(ModelFileError, match=message) as caught:
        open_weights(path)
    assert str(path) in str(caught.value) and "'a.weight'" in str(caught.value)


@pytest.mark.parametrize("group", [32, 2, 1024, 0, "256", 256.0])
def test_a_rotation_that_cannot_be_is_refused(tmp_path: Path, group: object):
    path = written(tmp_path / "x.safetensors", quantise(matrix(), "convrot_w4a4"), convrot_groupsize=group)
    with pytest.raises(ModelFileError, match="rotated in groups"):
        open_weights(path)


@pytest.mark.parametrize("case, byte", [("mxfp8", 255), ("nvfp4", 127)])
def test_block_scales_that_are_not_finite_are_refused_when_they_are_read(tmp_path: Path, case: str, byte: int):
    made = quantise(matrix(), case)
    scale = made.tensors["weight_scale"].view(torch.uint8).clone()
    scale[0, 0] = byte
    weights = open_weights(
        written(tmp_path / "x.safetensors", Quantised({**made.tensors, "weight_scale": scale}, made.entry))
    )
    with pytest.raises(ModelFileError, match="not finite"):
        weights.read("a.weight", torch.float32)
