"""Configurations read off shapes, against the modules that had them."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors import safe_open
from transformers import T5Config

import chroma_core
import foreign_shapes
import miniature
from chroma_core.errors import ModelFileError
from chroma_core.loading.matching import build_part, describe_part
from chroma_core.model.transformer import ChromaTransformer
from chroma_core.weights import dimensions
from foreign_shapes import shapes_of, weights_file

TINY = Path(chroma_core.__file__).parent / "assets" / "tiny"


def plain(config) -> dict:
    values = vars(config) if isinstance(config, SimpleNamespace) else dict(config)
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if not k.startswith("_")}


def file_shapes(folder: Path) -> foreign_shapes.Shapes:
    (path,) = folder.glob("*.safetensors")
    with safe_open(path, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def test_the_real_transformer():
    real = foreign_shapes.meta(ChromaTransformer)
    assert dimensions.transformer_config(shapes_of(real)) == plain(real.config)
    config = describe_part(weights_file(foreign_shapes.chroma()), "transformer").config
    assert config["num_layers"] == 19 and config["num_single_layers"] == 38
    assert config["num_attention_heads"] == 24 and config["attention_head_dim"] == 128
    assert config["joint_attention_dim"] == 4096 and config["axes_dims_rope"] == (16, 56, 56)
    assert (config["approximator_num_channels"], config["approximator_hidden_dim"]) == (64, 5120)
    assert config["approximator_layers"] == 5 and config["in_channels"] == 64
    rebuilt = build_part("transformer", config)
    assert sum(p.numel() for p in rebuilt.parameters()) == 8_899_983_424 and plain(rebuilt.config) == plain(real.config)


def test_the_miniature_transformer():
    model = miniature.transformer(layers=3, single_layers=1)
    assert dimensions.transformer_config(shapes_of(model)) == plain(model.config)


def test_the_real_text_encoder():
    real = foreign_shapes.t5()
    config = dimensions.text_encoder_config(shapes_of(real))
    assert (config["num_layers"], config["d_model"], config["d_ff"]) == (24, 4096, 10240)
    assert (config["num_heads"], config["d_kv"], config["vocab_size"]) == (64, 64, 32128)
    mine, theirs = T5Config(**config), real.config
    for name in ("relative_attention_num_buckets", "relative_attention_max_distance", "layer_norm_epsilon"):
        assert getattr(mine, name) == getattr(theirs, name)
    assert mine.dense_act_fn == "gelu_new" and mine.is_gated_act
    assert shapes_of(build_part("text_encoder", config)) == shapes_of(real)


def test_the_vae_of_flux():
    real = foreign_shapes.vae(scaling_factor=0.3611, shift_factor=0.1159, sample_size=1024)
    assert dimensions.vae_config(shapes_of(real)) == {
        k: v for k, v in plain(real.config).items() if k not in ("latents_mean", "latents_std")
    }
    with_convolutions = dimensions.vae_config(shapes_of(foreign_shapes.vae(quant_conv=True)))
    assert with_convolutions["use_quant_conv"] and with_convolutions["use_post_quant_conv"]
    small = miniature.vae()
    assert dimensions.vae_config(shapes_of(small))["norm_num_groups"] == small.config.norm_num_groups == 4
    without = dimensions.vae_config(shapes_of(foreign_shapes.vae(mid_block_add_attention=False)))
    assert without["mid_block_add_attention"] is False


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae"])
def test_the_embedded_model_is_understood_without_its_config(part):
    """A user may name the bare file: what shapes do not show must come out as the config says all the same."""
    given = json.loads((TINY / part / "config.json").read_text())
    shapes = file_shapes(TINY / part)
    inferred = describe_part(weights_file(shapes), part).config
    told = describe_part(weights_file(shapes), part, given)
    invisible = {"sample_size", "is_encoder_decoder", "use_cache", "latents_mean", "latents_std"}
    for name, value in inferred.items():
        if name not in invisible:
            assert value == plain(given)[name], name
    names = set(build_part(part, inferred).state_dict())
    assert names == set(told.sources) == set(build_part(part, told.config).state_dict())


def test_heads_are_shared_out_between_the_axes():
    assert dimensions.rope_axes(128) == (16, 56, 56) and dimensions.rope_axes(16) == (4, 6, 6)
    for head_dim in (16, 24, 32, 48, 64, 96, 128):
        axes = dimensions.rope_axes(head_dim)
        assert sum(axes) == head_dim and all(axis % 2 == 0 and axis > 0 for axis in axes)
    with pytest.raises(ModelFileError, match="has 7 dimensions"):
        dimensions.rope_axes(7)


def test_a_dimension_whose_tensor_is_missing_is_the_real_models():
    real = plain(foreign_shapes.meta(ChromaTransformer).config)
    assert dimensions.transformer_config({}) == real
    assert dimensions.text_encoder_config({})["d_ff"] == 10240
    assert dimensions.vae_config({})["block_out_channels"] == (128, 256, 512, 512)


@pytest.mark.parametrize(
    "function, name, shape, message",
    [
        ("transformer_config", "x_embedder.weight", (3072,), r"'x_embedder.weight' has the shape \[3072\]"),
        ("transformer_config", "context_embedder.weight", (3072, 0), "none of them empty"),
        ("transformer_config", "x_embedder.weight", (3000, 64), "3000 wide, but its attention heads have 128"),
        ("transformer_config", "transformer_blocks.4000.ff.net.2.weight", (8, 8), "names block 4000"),
        ("text_encoder_config", "encoder.block.0.layer.0.SelfAttention.q.weight", (100, 4096), "100 wide.*64 heads"),
        ("vae_config", "decoder.conv_in.weight", (512,), r"shape \[512\]"),
    ],
)
def test_impossible_shapes_are_errors(function, name, shape, message):
    with pytest.raises(ModelFileError, match=message):
        getattr(dimensions, function)({name: shape})
