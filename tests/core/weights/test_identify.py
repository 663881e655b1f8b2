"""Every part of Chroma in every layout: found, measured, and every tensor of it put to use."""

import pytest
import torch
import transformers

import foreign_shapes as foreign
import miniature
from chroma_core.errors import ModelFileError
from chroma_core.loading.matching import Component, Source, describe_part
from chroma_core.names import encoders as t5_keys
from chroma_core.names import transformer as keys
from chroma_core.weights.identify import PARTS, identify
from foreign_shapes import prefixed, shapes_of, weights_file

CHROMA = {
    "original": foreign.chroma(1, 2),
    "original, norms as in ComfyUI": foreign.chroma(1, 2, norm_leaf="weight"),
    "diffusers": foreign.chroma_diffusers(1, 2),
}


def assert_covers(component: Component, shapes: foreign.Shapes, prefix: str = "") -> None:
    """Every tensor of the part is used, row for row exactly once, and every parameter is of its model's shape."""
    rows: dict[str, list[tuple[int, int]]] = {}
    for source in set(component.sources.values()):
        shape = shapes[source.name]
        span = source.rows.span(shape[0]) if source.rows else (0, shape[0])
        rows.setdefault(source.name, []).append(span)
        assert torch.Size(source.shape).numel() * shape[0] == torch.Size(shape).numel() * (span[1] - span[0])
    assert set(rows) == {name for name in shapes if name.startswith(prefix)}
    for name, spans in rows.items():
        edges = [edge for span in sorted(spans) for edge in span]
        assert edges[0] == 0 and edges[-1] == shapes[name][0] and edges[1:-1:2] == edges[2::2], name


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model.", "module."])
@pytest.mark.parametrize("kind", CHROMA)
def test_a_transformer_in_every_layout(kind, prefix):
    shapes = prefixed(CHROMA[kind], prefix)
    identity = identify(shapes)
    assert (identity.part, identity.layout) == ("transformer", kind.partition(",")[0])
    assert identity.prefix == prefix and identity.title == "a Chroma transformer"
    component = describe_part(weights_file(shapes), "transformer")
    assert {name: source.shape for name, source in component.sources.items()} == CHROMA["diffusers"]
    assert_covers(component, shapes, prefix)


def test_the_real_transformer_has_a_source_for_every_parameter():
    shapes = foreign.chroma()
    component = describe_part(weights_file(shapes), "transformer")
    assert len(shapes) == 643
    assert_covers(component, shapes)
    assert component.sources["single_transformer_blocks.37.proj_mlp.weight"] == Source(
        "single_blocks.37.linear1.weight",
        keys.Rows("single_transformer_blocks.37.proj_mlp.weight", 3, 7, 7),
        (4 * 3072, 3072),
    )
    assert component.sources["transformer_blocks.0.attn.norm_q.weight"] == Source(
        "double_blocks.0.img_attn.norm.query_norm.scale", None, (128,)
    )


def test_sources_read_the_weights_that_keys_converts():
    """Numbers, not only names: a random model taken apart by its sources equals the model."""
    model = miniature.transformer()
    file = {f"model.diffusion_model.{k}": v for k, v in keys.to_original(model.state_dict()).items()}
    component = describe_part(weights_file(shapes_of(file)), "transformer")
    for name, tensor in model.state_dict().items():
        source = component.sources[name]
        read = file[source.name] if source.rows is None else source.rows.take(file[source.name])
        assert torch.equal(read.reshape(source.shape), tensor)


@pytest.mark.parametrize("prefix", ["", "text_encoders.t5xxl.transformer."])
@pytest.mark.parametrize("embeddings", [t5_keys.EMBEDDINGS, t5_keys.EMBEDDINGS[:1], t5_keys.EMBEDDINGS[1:]])
def test_t5_with_either_or_both_names_of_its_embeddings(embeddings, prefix):
    shapes = {
        prefix + name: shape
        for name, shape in shapes_of(foreign.t5(2)).items()
        if name not in t5_keys.EMBEDDINGS or name in embeddings
    }
    component = describe_part(weights_file(shapes), "text_encoder")
    assert component.identity.layout == "huggingface" and component.identity.prefix == prefix
    assert component.config["num_layers"] == 2 and component.config["d_model"] == 4096
    # Both parameters, one source: the loader reads the table once.
    first, second = (component.sources[name] for name in t5_keys.EMBEDDINGS)
    assert first == second == Source(prefix + embeddings[0], None, (32128, 4096))
    assert len(component.sources) == len(shapes_of(foreign.t5(2)))


def test_t5_in_llama_cpp_names():
    shapes = {t5_keys.to_llama_cpp_key(name) or "": shape for name, shape in shapes_of(foreign.t5()).items()}
    component = describe_part(weights_file(shapes, "t5.gguf"), "text_encoder")
    assert component.identity.layout == "llama.cpp" and len(component.sources) == 220
    assert component.sources["shared.weight"] == component.sources["encoder.embed_tokens.weight"]
    assert component.sources["encoder.block.9.layer.1.DenseReluDense.wi_0.weight"].name == "enc.blk.9.ffn_gate.weight"
    assert_covers(component, shapes)


def test_a_whole_t5_is_used_for_its_encoder():
    """The decoder and the output layer of a complete T5 do no harm: nothing of the encoder depends on them."""
    shapes = shapes_of(foreign.t5(2, transformers.T5ForConditionalGeneration, num_decoder_layers=1))
    assert "lm_head.weight" in shapes and any(name.startswith("decoder.") for name in shapes)
    component = describe_part(weights_file(shapes), "text_encoder")
    assert set(component.sources) == set(shapes_of(foreign.t5(2)))


@pytest.mark.parametrize("prefix", ["", "vae.", "first_stage_model."])
@pytest.mark.parametrize("layout", ["ldm", "diffusers"])
def test_the_vae_in_both_layouts(layout, prefix):
    shapes = prefixed(foreign.vae_ldm() if layout == "ldm" else shapes_of(foreign.vae()), prefix)
    identity = identify(shapes)
    assert (identity.part, identity.layout, identity.prefix) == ("vae", layout, prefix)
    component = describe_part(weights_file(shapes), "vae")
    assert {name: source.shape for name, source in component.sources.items()} == shapes_of(foreign.vae())
    assert (component.config["scaling_factor"], component.config["shift_factor"]) == (0.3611, 0.1159)
    assert_covers(component, shapes, prefix)


def test_a_full_checkpoint_gives_each_of_its_parts():
    shapes = {
        **prefixed(CHROMA["original"], "model.diffusion_model."),
        **shapes_of(foreign.t5(2), "text_encoders.t5xxl.transformer."),
        **prefixed(foreign.vae_ldm(), "vae."),
    }
    assert identify(shapes).part == "transformer"
    for part, prefix in zip(PARTS, ("model.diffusion_model.", "text_encoders.t5xxl.transformer.", "vae."), strict=True):
        component = describe_part(weights_file(shapes), part)
        assert component.identity.part == part and component.identity.prefix == prefix
        used = {source.name for source in component.sources.values()}
        assert {n for n in shapes if n.startswith(prefix)} - used == (
            {f"{prefix}{t5_keys.EMBEDDINGS[1]}"} if part == "text_encoder" else set()
        )


def test_a_flux_checkpoint_gives_its_t5_and_vae_but_not_its_transformer():
    shapes = foreign.flux_checkpoint()
    assert identify(shapes).title == "a Flux transformer"
    assert describe_part(weights_file(shapes), "text_encoder").config["d_ff"] == 10240
    assert describe_part(weights_file(shapes), "vae").config["latent_channels"] == 16
    with pytest.raises(ModelFileError, match="is a Flux transformer"):
        describe_part(weights_file(shapes), "transformer")


def test_describing_moves_no_random_state_and_no_default():
    state, dtype = torch.get_rng_state(), torch.get_default_dtype()
    shapes = foreign.flux_checkpoint()
    describe_part(weights_file(CHROMA["original"]), "transformer")
    describe_part(weights_file(shapes), "text_encoder")
    describe_part(weights_file(shapes), "vae")
    assert torch.equal(state, torch.get_rng_state()) and torch.get_default_dtype() == dtype
    assert torch.empty(0).device.type == "cpu"
