"""The name map, on the real module tree (on the meta device: names and shapes without weights)."""

import pytest
import torch

from chroma_core.errors import ModelFileError
from chroma_core.model.transformer import ChromaTransformer
from chroma_core.names import transformer as keys
from miniature import transformer
from weight_files import to_diffusers


@pytest.fixture(scope="module")
def real() -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return ChromaTransformer().state_dict()


def test_round_trip_of_the_real_model(real):
    original = keys.to_original(real)
    assert len(original) == 643
    assert original["double_blocks.18.txt_attn.qkv.weight"].shape == (3 * 3072, 3072)
    assert original["single_blocks.37.linear1.weight"].shape == (7 * 3072, 3072)
    assert original["distilled_guidance_layer.norms.4.scale"].shape == (5120,)
    again = to_diffusers(original)
    assert {k: v.shape for k, v in again.items()} == {k: v.shape for k, v in real.items()}


def test_round_trip_keeps_every_number():
    weights = transformer().state_dict()
    again = to_diffusers(keys.to_original(weights))
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[k], weights[k]) for k in weights)


def test_fused_rows_are_query_key_value_then_mlp():
    weights = transformer().state_dict()
    fused = keys.to_original(weights)["single_blocks.1.linear1.weight"]
    block = "single_transformer_blocks.1"
    parts = [f"{block}.attn.to_q", f"{block}.attn.to_k", f"{block}.attn.to_v", f"{block}.proj_mlp"]
    assert torch.equal(fused, torch.cat([weights[f"{p}.weight"] for p in parts]))


def test_checkpoint_prefixes_and_both_norm_names():
    for key in (
        "double_blocks.3.img_attn.norm.query_norm.scale",
        "model.diffusion_model.double_blocks.3.img_attn.norm.query_norm.weight",
        "diffusion_model.double_blocks.3.img_attn.norm.query_norm.scale",
    ):
        (part,) = keys.to_diffusers_keys(key) or ()
        assert part.name == "transformer_blocks.3.attn.norm_q.weight"
    found = keys.to_original_key("transformer_blocks.3.attn.norm_q.weight", norm_leaf="weight")
    assert found == keys.Rows("double_blocks.3.img_attn.norm.query_norm.weight")


def test_every_module_name_survives_underscores(real):
    modules = {key.rpartition(".")[0] for key in real}
    originals = {keys.to_original_module(m).name for m in modules}  # type: ignore[union-attr]
    for name in modules | originals:
        assert keys.unflatten(name.replace(".", "_")) == name


def test_a_part_knows_its_rows():
    found = keys.to_original_module("single_transformer_blocks.2.proj_mlp")
    assert found == keys.Rows("single_blocks.2.linear1", 3, 7, 7)
    assert found.span(7 * 32) == (3 * 32, 7 * 32)
    with pytest.raises(ModelFileError, match="225 rows, which do not divide into 7"):
        found.span(7 * 32 + 1)


def test_foreign_and_incomplete_models_are_errors():
    assert keys.to_diffusers_keys("double_blocks.0.img_mod.lin.weight") is None, "Flux has it, Chroma has not"
    with pytest.raises(ModelFileError, match="layers.0.weight"):
        keys.to_original({"layers.0.weight": torch.zeros(1)})
    weights = transformer().state_dict()
    del weights["transformer_blocks.0.attn.to_k.weight"]
    with pytest.raises(ModelFileError, match=r"double_blocks.0.img_attn.qkv.weight.*2 of its parts"):
        keys.to_original(weights)
    for name in ("double_blocks.img_attn.qkv", "transformer_blocks.x.attn.to_q", "nothing", ""):
        assert keys.to_diffusers_modules(name) is None and keys.to_original_module(name) is None
