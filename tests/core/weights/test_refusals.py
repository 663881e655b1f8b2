"""What is said of a file that is something else, or damaged: on names and shapes that the models' own libraries give,
for more such files than a folder of models usually holds.
"""

import pytest

import foreign_shapes as foreign
from chroma_core.errors import ModelFileError
from chroma_core.loading.matching import describe_part
from chroma_core.weights.identify import PARTS, find_part, identify
from foreign_shapes import prefixed, shapes_of, weights_file

CHROMA = {"original": foreign.chroma(1, 2), "diffusers": foreign.chroma_diffusers(1, 2)}


def refusal(shapes: foreign.Shapes, part="transformer", config=None, metadata=None) -> str:
    with pytest.raises(ModelFileError) as caught:
        describe_part(weights_file(shapes, metadata=metadata), part, config)
    message = str(caught.value)
    assert "'x.safetensors'" in message and message.endswith(".") and "\n" not in message
    return message


FOREIGN = {
    "flux dev": (foreign.flux(), "a Flux transformer", "double_blocks.0."),
    "flux schnell, prefixed": (
        prefixed(foreign.flux(guidance=False), "model.diffusion_model."),
        "a Flux transformer",
        "model.diffusion_model.double_blocks.0.",
    ),
    "flux in diffusers' layout": (foreign.flux_diffusers(), "a Flux transformer", "transformer_blocks.0.norm"),
    "flux 2": (foreign.flux2_diffusers(), "a Flux 2 transformer", "to_qkv_mlp_proj"),
    "radiance": (foreign.radiance(), "Chroma Radiance (pixel space)", "img_in_patch"),
    "sd 1.5": (foreign.stable_diffusion(), "a Stable Diffusion checkpoint", "input_blocks"),
    "sd unet": (foreign.stable_diffusion_unet(), "a Stable Diffusion UNet", "down_blocks.0.attentions.0"),
    "sdxl": (foreign.stable_diffusion_xl(), "a Stable Diffusion XL checkpoint", "conditioner.embedders.0"),
    "sd 3": (foreign.stable_diffusion_3(), "a Stable Diffusion 3 model", "joint_blocks.0"),
    "sd 3 in diffusers' layout": (
        foreign.stable_diffusion_3_diffusers(),
        "a Stable Diffusion 3 transformer",
        "pos_embed.pos_embed",
    ),
    "qwen image": (foreign.qwen_image(), "a Qwen-Image transformer", "transformer_blocks.0.img_mod"),
    "clip": (foreign.clip_l(), "a CLIP text encoder", "text_model."),
    "umt5": (foreign.umt5(), "a UMT5 text encoder", "block.1.layer.0.SelfAttention.relative_attention_bias"),
    "t5 1.0": (shapes_of(foreign.t5(1, feed_forward_proj="relu")), "a T5 encoder of version 1.0", "DenseReluDense.wi."),
    "language model": (foreign.language_model(), "a language model", "layers.0.self_attn.q_proj"),
    "llama.cpp": ({"blk.0.attn_q.weight": (64, 64), "token_embd.weight": (9, 64)}, "a language model", "blk.0.attn_q"),
    "sd vae": (foreign.vae_ldm(4, quant_conv=True), "a Stable Diffusion VAE", "decoder.conv_in.weight"),
    "sd vae, diffusers": (shapes_of(foreign.vae(4, True)), "a Stable Diffusion VAE", "decoder.conv_in.weight"),
    "flux 2 vae": (foreign.vae_ldm(32), "a Flux 2 VAE", "decoder.conv_in.weight"),
    "video vae": (foreign.video_vae(), "a video VAE", "conv"),
    "controlnet": (foreign.controlnet(), "a ControlNet", "controlnet_"),
    "lora, diffusers": (foreign.lora_diffusers(), "a LoRA", "lora_A"),
    "lora, original": (foreign.lora_original(), "a LoRA", "lora_A"),
    "lora, kohya": (foreign.lora_kohya(), "a LoRA", "lora_unet_double_blocks_0"),
    "lokr": (foreign.lokr(), "a LoRA", "lokr_w1"),
    "embedding": ({"emb_params": (4, 768)}, "a textual inversion embedding", "emb_params"),
    "optimizer": ({"0.exp_avg": (4, 4), "0.exp_avg_sq": (4, 4)}, "the optimizer state", "exp_avg"),
    "nobody's": ({"a.weight": (4, 4), "b.weight": (4, 4)}, "an unknown model", "a.weight, b.weight"),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_file_is_called_by_its_name_in_every_field(kind, part):
    shapes, title, evidence = FOREIGN[kind]
    identity = identify(shapes)
    assert identity.part is None and identity.title.startswith(title) and evidence in identity.evidence
    if find_part(shapes, part) is not None:
        assert kind == "sd 3" and part == "text_encoder"  # its T5-XXL is the one that Chroma uses
        return
    message = refusal(shapes, part)
    assert f"is {title}" in message and evidence in message
    expected = {"transformer": "a Chroma transformer", "text_encoder": "a T5 encoder", "vae": "a Flux VAE"}[part]
    assert f"Expected {expected} in the field '{part}'" in message


@pytest.mark.parametrize("kind", [kind for kind in FOREIGN if "lora" in kind or kind == "lokr"])
def test_a_lora_is_sent_to_its_node(kind):
    assert "Chroma Apply LoRA" in refusal(FOREIGN[kind][0])


def test_radiance_is_told_from_chroma():
    assert "pixel space is not supported" in refusal(foreign.radiance())


def test_the_header_speaks_only_where_the_names_do_not():
    unknown = {"a.b": (4, 4)}
    for metadata in ({"ss_network_module": "networks.lora"}, {"modelspec.architecture": "flux-1-dev/lora"}):
        assert identify(unknown, metadata).title.startswith("a LoRA")
    assert identify(CHROMA["original"], {"modelspec.architecture": "flux-1-dev/lora"}).part == "transformer"
    assert identify({}).title == "a file without tensors"
    assert "is a file without tensors" in refusal({})


OWN = {
    "transformer": CHROMA["original"],
    "text_encoder": shapes_of(foreign.t5(1)),
    "vae": foreign.vae_ldm(),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("field", PARTS)
def test_a_part_in_the_wrong_field_is_sent_to_the_right_one(part, field):
    if part == field:
        assert describe_part(weights_file(OWN[part]), field).identity.part == part
        return
    message = refusal(OWN[part], field)
    folder = {"transformer": "diffusion_models", "text_encoder": "text_encoders", "vae": "vae"}[part]
    assert f"Name it in the field '{part}' (folder models/{folder}) instead" in message


def without(shapes: foreign.Shapes, *names: str) -> foreign.Shapes:
    assert all(name in shapes for name in names)
    return {name: shape for name, shape in shapes.items() if name not in names}


def test_missing_tensors_are_counted_and_named():
    shapes = foreign.chroma(2, 2)
    gone = ["double_blocks.0.img_attn.qkv.weight", "double_blocks.1.txt_mlp.2.bias", "img_in.weight", "txt_in.bias"]
    message = refusal(without(shapes, *gone))
    assert f"lacks 4 tensors of {len(shapes)}" in message and "The download may be incomplete" in message
    assert sum(name in message for name in gone) == 3
    # Named as the file names them: norms as `.scale`, with its prefix.
    message = refusal(prefixed(without(shapes, "single_blocks.0.norm.query_norm.scale"), "model.diffusion_model."))
    assert "lacks 1 tensor of" in message
    assert "model.diffusion_model.single_blocks.0.norm.query_norm.scale" in message


@pytest.mark.parametrize(
    "part, shapes",
    [
        ("transformer", {k: v for k, v in CHROMA["original"].items() if k.startswith("double_blocks")}),
        ("transformer", {k: v for k, v in CHROMA["original"].items() if k.startswith("distilled")}),
        ("transformer", {k: v for k, v in CHROMA["diffusers"].items() if k.startswith("single_")}),
        ("transformer", {k: v for k, v in foreign.chroma(3, 1).items() if not k.startswith("double_blocks.1.")}),
        ("text_encoder", {k: v for k, v in shapes_of(foreign.t5(2)).items() if "embed" not in k and "shared" not in k}),
        ("vae", {k: v for k, v in foreign.vae_ldm().items() if k.startswith("encoder")}),
        ("vae", {k: v for k, v in foreign.vae_ldm().items() if k.startswith("decoder.up")}),
    ],
)
def test_one_shard_or_half_a_file_is_incomplete(part, shapes):
    message = refusal(shapes, part)
    assert "lacks" in message and "one of several shards" in message


def test_wrong_widths_are_named_with_both_shapes():
    name = "double_blocks.0.img_attn.qkv.weight"
    message = refusal({**CHROMA["original"], name: (9216, 2048)})
    assert f"'{name}' is [9216, 2048], but its other tensors ask for [9216, 3072]" in message
    # The odd one out is to blame, even where it is the first tensor that tells the width.
    for odd, found, wanted in (("txt_in", "[2048, 4096]", "[3072, 4096]"), ("img_in", "[2048, 64]", "[3072, 64]")):
        message = refusal({**CHROMA["original"], f"{odd}.weight": (2048, CHROMA["original"][f"{odd}.weight"][1])})
        assert (
            f"1 tensor of the wrong shape: '{odd}.weight' is {found}, but its other tensors ask for {wanted}" in message
        )
    message = refusal({**shapes_of(foreign.t5(1)), "encoder.final_layer_norm.weight": (2048,)}, "text_encoder")
    assert "[2048]" in message and "[4096]" in message
    message = refusal({**foreign.vae_ldm(), "decoder.up.3.block.0.conv1.weight": (512, 256, 3, 3)}, "vae")
    assert "[512, 256, 3, 3]" in message and "[512, 512, 3, 3]" in message


def test_a_fused_tensor_must_divide():
    message = refusal({**CHROMA["original"], "single_blocks.0.linear1.weight": (7 * 3072 + 1, 3072)})
    assert "'single_blocks.0.linear1.weight'" in message and "7 equal shares" in message
    assert "3 equal shares" in refusal({**CHROMA["original"], "double_blocks.0.img_attn.qkv.bias": ()})


def test_heads_that_do_not_divide_the_width():
    shapes = {k: (100,) if k.endswith("_norm.scale") else v for k, v in CHROMA["original"].items()}
    assert "3072 wide, but its attention heads have 100 dimensions" in refusal(shapes)


def test_tensors_too_many_are_refused():
    layer = {f"double_blocks.0.new_thing.{i}.{leaf}": (4,) for i in range(3) for leaf in ("weight", "bias")}
    message = refusal({**CHROMA["original"], **layer})
    assert "holds 6 tensors that a Chroma transformer does not have" in message
    assert "double_blocks.0.new_thing.0.weight" in message and "and 3 more" in message
    twice = {**CHROMA["original"], "single_blocks.0.norm.key_norm.weight": (128,)}
    assert "the same weight twice" in refusal(twice)
    damaged = {**CHROMA["original"], "double_blocks.999999.img_mlp.0.bias": (4,)}
    assert "names block 999999" in refusal(damaged)


def test_a_few_surplus_tensors_are_said():
    """What a tool put beside the model must not cost the user the file; a variant's layers are more than four."""
    own = CHROMA["original"]
    component = describe_part(weights_file({**own, "bias_table": (4,), "double_blocks.0.mark": ()}), "transformer")
    assert component.sources == describe_part(weights_file(own), "transformer").sources
    (note,) = component.notes
    assert "holds 2 tensors that a Chroma transformer does not have, and they are ignored: bias_table, double_" in note
    (note,) = describe_part(weights_file({**OWN["vae"], "decoder.up.0.mark": (1,)}), "vae").notes
    assert "1 tensor that a Flux VAE does not have, and it is ignored" in note
    assert not describe_part(weights_file(own), "transformer").notes


CONFIG = {"_class_name": "ChromaTransformer2DModel", "num_layers": 1, "num_single_layers": 2, "guidance": None}


def test_a_config_is_checked_against_the_tensors():
    shapes = CHROMA["diffusers"]
    component = describe_part(weights_file(shapes), "transformer", CONFIG)
    assert component.config == {"num_layers": 1, "num_single_layers": 2}
    message = refusal(shapes, config={**CONFIG, "num_layers": 2})
    assert "lacks" in message and "transformer_blocks.1." in message
    message = refusal(shapes, config={**CONFIG, "num_single_layers": 1})
    assert "that its config.json has no place for: single_transformer_blocks.1." in message
    message = refusal(shapes, config={**CONFIG, "joint_attention_dim": 2048})
    assert "'context_embedder.weight' is [3072, 4096], but its config.json asks for [3072, 2048]" in message


@pytest.mark.parametrize(
    "part, config, words",
    [
        ("transformer", {"_class_name": "FluxTransformer2DModel"}, "describes a FluxTransformer2DModel"),
        (
            "transformer",
            {**CONFIG, "guidance_embeds": True},
            "options that a Chroma transformer does not have: guidance",
        ),
        ("transformer", {**CONFIG, "num_attention_heads": "many"}, "does not describe a Chroma transformer"),
        ("transformer", {**CONFIG, "num_layers": 10**9}, "no model has more than 200"),
        ("transformer", {**CONFIG, "in_channels": -64}, "does not describe a Chroma transformer"),
        ("text_encoder", {"architectures": ["CLIPTextModel"]}, "describes a CLIPTextModel"),
        ("text_encoder", {"num_layers": "x"}, "does not describe a T5 encoder"),
        ("vae", {"_class_name": "AutoencoderKLWan"}, "describes a AutoencoderKLWan"),
        ("vae", {"_class_name": "AutoencoderKL", "scaling_factor": 1.5305}, "Stable Diffusion 3's VAE"),
    ],
)
def test_a_config_that_cannot_be_used(part, config, words):
    own = {**OWN, "transformer": CHROMA["diffusers"]}
    assert words in refusal(own[part], part, config)
