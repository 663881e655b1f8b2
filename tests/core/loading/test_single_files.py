"""Files that users already have: each layout gives the model that was written, each storage one as close as it can."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import native
from chroma_core.errors import ModelFileError
from chroma_core.loading.load import describe, load_text_encoder, load_transformer, load_vae, transformer_outline
from chroma_core.loading.model_files import base_hash
from chroma_core.loading.spec import ModelSpec
from chroma_core.model.latents import image_ids, pack, unpack
from chroma_core.model.transformer import ChromaTransformer
from chroma_core.names import transformer as keys
from chroma_core.names.encoders import to_ldm_key
from lora_cases import inputs, predict
from miniature import WIDTHS, t5, tokenizer, transformer, vae
from real_widths import random_original
from weight_files import to_diffusers, write_gguf, write_scaled_fp8

ROOT = Path(__file__).resolve().parents[3]
TINY = ROOT / "chroma_core" / "assets" / "tiny"


def original(norm_leaf: str = "scale", prefix: str = "", dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    weights = keys.to_original(transformer().state_dict(), norm_leaf)
    return {prefix + name: tensor.to(dtype).contiguous() for name, tensor in weights.items()}


def equal(model: torch.nn.Module, reference: torch.nn.Module) -> bool:
    expected = reference.state_dict()
    found = model.state_dict()
    return found.keys() == expected.keys() and all(torch.equal(found[k].float(), expected[k]) for k in expected)


@pytest.mark.parametrize("norm_leaf", ["scale", "weight"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_transformer_in_the_original_layout(tmp_path, norm_leaf, prefix):
    path = tmp_path / "chroma.safetensors"
    save_file(original(norm_leaf, prefix), path)
    spec = ModelSpec("base", transformer=str(path), precision="fp32")
    model = load_transformer(spec, "cpu")
    assert equal(model, transformer())
    assert transformer_outline(spec).config == model.config
    assert len(base_hash(spec)) == 64


@pytest.mark.parametrize("shards", [1, 3])
def test_a_transformer_in_diffusers_layout_without_its_folder(tmp_path, shards):
    weights = transformer().state_dict()
    names = sorted(weights)
    for i in range(shards):
        part = {name: weights[name].contiguous() for name in names[i::shards]}
        save_file(part, tmp_path / f"chroma-{i}.safetensors")
    index = {"weight_map": {name: f"chroma-{i % shards}.safetensors" for i, name in enumerate(names)}}
    (tmp_path / "chroma.safetensors.index.json").write_text(json.dumps(index))
    where = tmp_path / ("chroma-0.safetensors" if shards == 1 else "chroma.safetensors.index.json")
    assert equal(load_transformer(ModelSpec("base", transformer=str(where), precision="fp32"), "cpu"), transformer())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_half_and_quarter_precision_files(tmp_path, dtype):
    """A stored value is used as it is: the error is that of the file's own rounding and no more."""
    path = tmp_path / "chroma.safetensors"
    save_file(original(dtype=dtype), path)
    model = load_transformer(ModelSpec("base", transformer=str(path), precision="fp32"), "cpu")
    rounded = transformer()
    rounded.load_state_dict({k: v.to(dtype).float() for k, v in rounded.state_dict().items()})
    assert equal(model, rounded)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


@pytest.mark.parametrize("notation", ["scale_weight", "header", "layers", "bare"])
def test_a_transformer_in_scaled_fp8(tmp_path, notation):
    path = tmp_path / "chroma.safetensors"
    meant = write_scaled_fp8(path, original(), notation)
    model = load_transformer(ModelSpec("base", transformer=str(path), precision="fp32"), "cpu")
    expected = to_diffusers(meant)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    # e4m3 has 3 mantissa bits: a weight is off by at most 1/16 of itself (or 2^-10 of 448 scales), 3.6 % in the mean.
    weights = transformer().state_dict()
    assert max(relative(expected[name], weights[name]) for name in weights) < 0.036
    call = inputs(model)
    assert 0.01 < relative(predict(model, call), predict(transformer(), call)) < 0.06


@pytest.mark.parametrize(("kind", "limit"), [("F16", 1e-3), ("Q8_0", 0.01), ("Q5_0", 0.08), ("Q4_0", 0.15)])
def test_a_transformer_in_gguf(tmp_path, kind, limit):
    """Dequantised while loading: the weights are what the gguf package makes of them; the output is that far off."""
    path = tmp_path / "chroma.gguf"
    weights = original(norm_leaf="scale")
    write_gguf(path, weights, {name: kind for name, t in weights.items() if t.ndim == 2 and t.shape[1] % 32 == 0})
    model = load_transformer(ModelSpec("base", transformer=str(path), precision="fp32"), "cpu")
    call = inputs(model)
    error = relative(predict(model, call), predict(transformer(), call))
    assert limit / 30 < error < limit


def text_files(folder: Path) -> Path:
    tokenizer().save_pretrained(folder / "tokenizer")
    return folder / "t5.safetensors"


def test_a_text_encoder_from_one_file(tmp_path):
    path = text_files(tmp_path)
    reference = t5()
    weights = {k: v.contiguous().clone() for k, v in reference.state_dict().items() if "embed_tokens" not in k}
    save_file(weights, path)
    encoder = load_text_encoder(ModelSpec("base", text_encoder=str(path), text_precision="fp32"), "cpu")
    assert equal(encoder.model, reference)
    assert encoder.encode("a red circle").real_tokens == 4


@pytest.mark.parametrize("notation", ["scale_weight", "header", "layers", "bare"])
def test_a_text_encoder_in_scaled_fp8(tmp_path, notation):
    path = text_files(tmp_path)
    weights = {k: v.contiguous().clone() for k, v in t5().state_dict().items() if "embed_tokens" not in k}
    save_file(weights, tmp_path / "plain.safetensors")
    meant = write_scaled_fp8(path, weights, notation)
    save_file({k: v.contiguous() for k, v in meant.items()}, tmp_path / "meant.safetensors")
    states = [
        load_text_encoder(ModelSpec("base", text_encoder=str(p), text_precision="fp32"), "cpu").encode("a red").states
        for p in (path, tmp_path / "meant.safetensors", tmp_path / "plain.safetensors")
    ]
    assert torch.equal(states[0], states[1])
    assert 0.001 < relative(states[0], states[2]) < 0.08


@pytest.mark.parametrize("kind", ["diffusers", "ldm"])
def test_a_vae_from_one_file(tmp_path, kind):
    reference = vae()
    weights = {name: tensor.contiguous() for name, tensor in reference.state_dict().items()}
    if kind == "ldm":  # attention projections are 1×1 convolutions there
        weights = {
            str(to_ldm_key(k, 4)): v[:, :, None, None] if ".attentions." in k and v.ndim == 2 else v
            for k, v in weights.items()
        }
    save_file(weights, tmp_path / "ae.safetensors")
    model = load_vae(ModelSpec("base", vae=str(tmp_path / "ae.safetensors")), "cpu")
    assert equal(model, reference)
    assert (model.config.scaling_factor, model.config.shift_factor) == (0.3611, 0.1159)


def test_tiny_as_single_files_is_tiny(tmp_path):
    """Rope axes and norm groups are in no tensor; a file of an embedded flavour's shape takes them from there."""
    from safetensors.torch import load_file

    weights = load_file(TINY / "transformer" / "diffusion_pytorch_model.safetensors")
    save_file({k: v.contiguous() for k, v in keys.to_original(weights).items()}, tmp_path / "tiny.safetensors")
    spec = ModelSpec("tiny", transformer=str(tmp_path / "tiny.safetensors"), precision="bf16")
    config = describe(spec, "transformer").config
    assert list(config["axes_dims_rope"]) == [8, 12, 12]
    plain, single = load_transformer(ModelSpec("tiny"), "cpu"), load_transformer(spec, "cpu")
    call = inputs(plain)
    assert torch.equal(predict(plain, call, torch.bfloat16), predict(single, call, torch.bfloat16))
    vae_file = TINY / "vae" / "diffusion_pytorch_model.safetensors"
    loaded = load_vae(ModelSpec("tiny", vae=str(vae_file)), "cpu")
    assert loaded.config.norm_num_groups == load_vae(ModelSpec("tiny"), "cpu").config.norm_num_groups


@pytest.mark.slow
def test_a_file_of_the_real_depth_computes_what_the_hosts_own_chroma_does(tmp_path):
    config = {
        **WIDTHS,
        "approximator_num_channels": 64,
        "num_layers": 19,
        "num_single_layers": 38,
    }  # as the host has it
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ChromaTransformer(**config).eval()
    save_file({k: v.contiguous() for k, v in keys.to_original(model.state_dict()).items()}, tmp_path / "c.safetensors")
    loaded = load_transformer(ModelSpec("base", transformer=str(tmp_path / "c.safetensors"), precision="fp32"), "cpu")
    call = inputs(loaded)
    latents = unpack(call["latents_BLD"], 8, 8)
    (theirs,) = native.forward(
        tmp_path / "native",
        config,
        keys.to_original(model.state_dict(), "weight"),
        latents,
        call["text_BTC"],
        call["sigma_B"],
    )
    ours = unpack(predict(loaded, call), 8, 8)
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max().clamp(min=1)


class AsTheHostCounts(ChromaTransformer):
    """The host always makes 344 modulation vectors and takes the last two for the output norm, at any depth."""

    modulation_vectors = 344  # type: ignore[assignment]


@pytest.mark.slow
def test_real_widths_compute_what_the_hosts_own_chroma_does(tmp_path):
    """1+1 blocks of width 3072 from a bf16 file, both sides in fp32."""
    outline, _, tensors = random_original(1, 1)
    weights = dict(tensors())
    path = tmp_path / "chroma.safetensors"
    save_file(weights, path)
    model = load_transformer(ModelSpec("base", transformer=str(path), precision="fp32"), "cpu")
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 16, 8, 8, generator=generator)
    text = torch.randn(1, 5, 4096, generator=generator)
    sigma = torch.tensor([0.7])
    config = vars(outline.config)
    renamed = {k.removesuffix(".scale") + ".weight" if k.endswith(".scale") else k: v for k, v in weights.items()}
    (theirs,) = native.forward(tmp_path / "native", config, renamed, latents, text, sigma)
    model.__class__ = AsTheHostCounts
    with torch.no_grad():
        table = model.modulation(sigma)
        rows = torch.cat([table[:, :15], table[:, 342:]], dim=1)
        ours = unpack(model(pack(latents), text, sigma, image_ids(8, 8), modulation_BNM=rows), 8, 8)
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_a_part_in_the_wrong_place_is_named(tmp_path):
    save_file({k: v.contiguous() for k, v in vae().state_dict().items()}, tmp_path / "vae.safetensors")
    with pytest.raises(ModelFileError, match="VAE"):
        load_transformer(ModelSpec("base", transformer=str(tmp_path / "vae.safetensors")), "cpu")
    with pytest.raises(ModelFileError, match="nothing is there"):
        load_transformer(ModelSpec("base", transformer=str(tmp_path / "gone.safetensors")), "cpu")
