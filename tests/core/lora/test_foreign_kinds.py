"""Files of kinds that are not trained here: read, applied live on any base, merged, written, by their own formulas."""

import dataclasses

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import save_file
from torch import Tensor

from chroma_core.errors import LoraError
from chroma_core.lora.adapters import attach, attached, detach, merge, set_strength
from chroma_core.lora.convert import convert_lora
from chroma_core.lora.files import lora_of, read_lora, write_lora
from chroma_core.lora.lowrank import Truncation
from chroma_core.lora.modules import FullModule, LoraFile
from chroma_core.lora.report import heat_map, lora_report, report_text, update_norm, update_norms
from chroma_core.lora.resize import resize
from chroma_core.lora.settings import LoraSettings
from chroma_core.lora.trainable import add_trainable, start_from
from chroma_core.model.precision import precision, quantise
from chroma_core.streaming import stream_blocks
from foreign_loras import KIND_FILES, foreign_kind, shapes_of
from lora_cases import distance, equal, inputs, predict, random_kind
from miniature import transformer

QUERY = "transformer_blocks.0.attn.to_q"


def kind_file(kind: str, size: float = 0.5) -> LoraFile:
    return lora_of(foreign_kind(kind, shapes_of(transformer()), 2, 2, size))


@pytest.mark.parametrize("strength", [1.0, -0.5])
@pytest.mark.parametrize("kind", KIND_FILES)
def test_live_is_merged_and_comes_off(kind, strength):
    live, merged = transformer(), transformer()
    call, lora = inputs(live), kind_file(kind)
    base = predict(live, call)
    attach(live, lora, strength)
    merge(merged, lora, strength)
    assert distance(predict(live, call), base) > 0.01
    assert distance(predict(live, call), predict(merged, call)) <= 1e-5
    set_strength(live, "lora", 0.0)
    assert torch.equal(predict(live, call), base)
    detach(live, "lora")
    assert torch.equal(predict(live, call), base) and attached(live) == []
    assert not any("branches" in name for name, _ in live.named_modules())


@pytest.mark.parametrize("kind", KIND_FILES)
@pytest.mark.parametrize("name", ["int8", "fp8", "int4", "nf4"])
def test_live_on_a_quantised_base(kind, name):
    model, plain = transformer().bfloat16(), transformer().bfloat16()
    call, lora = inputs(model), kind_file(kind, 0.25)
    quantise(model, precision(name))
    base = predict(model, call, torch.bfloat16)
    attach(plain, lora)
    wanted = predict(plain, call, torch.bfloat16)
    attach(model, lora)
    assert distance(predict(model, call, torch.bfloat16), base) > 0.01
    assert distance(predict(model, call, torch.bfloat16), wanted) < (
        0.06 if name == "int8" else 0.1 if name == "fp8" else 0.25
    )


@pytest.mark.parametrize("kind", ["train-lora", "dora-columns", "oft"])
def test_live_on_streamed_blocks(kind):
    call, lora, results = inputs(transformer()), kind_file(kind), []
    for streamed in (False, True):
        model = transformer()
        if streamed:
            stream_blocks(model, "cpu", 2)
        attach(model, lora)
        results.append(predict(model, call))
    assert torch.equal(*results)


@pytest.mark.parametrize("kind", KIND_FILES)
def test_one_beside_another_in_training_is_kept_out_of_it(kind):
    """A frozen one of any kind under a LoRA in training: it has its effect, and no gradient of its own."""
    model = transformer().train()
    attach(model, kind_file(kind), name="style")
    parameters = add_trainable(model, LoraSettings(rank=2), seed=3)
    call = inputs(model)
    for parameter in parameters:
        parameter.data += 0.01
    out = model(call["latents_BLD"], call["text_BTC"], call["sigma_B"], call["img_ids_L3"])
    gradients = torch.autograd.grad(out.square().mean(), parameters)
    assert all(bool(gradient.isfinite().all()) and bool(gradient.any()) for gradient in gradients)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in parameters}


def lycoris(weight: Tensor, update: Tensor, magnitude: Tensor) -> Tensor:
    """LyCORIS' weight decomposition (functional.general, wd_on_output by the shape): the changed weight."""
    merged = weight + update
    norm = merged.norm(dim=1, keepdim=True) if magnitude.shape[0] == len(weight) else merged.norm(dim=0, keepdim=True)
    return merged * magnitude / norm


@pytest.mark.parametrize("algorithm", ["lokr", "hada", "lora"])
@pytest.mark.parametrize("rows", [True, False])
def test_weight_decomposition_as_lycoris_and_ai_toolkit_have_it(tmp_path, algorithm, rows):
    g = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    name = "single_transformer_blocks.1.proj_mlp"
    model = transformer()
    layer = model.get_submodule(name)
    weight = layer.weight.clone()
    magnitude = 0.5 + torch.rand((128, 1) if rows else (1, 32), generator=g)
    if algorithm == "lokr":
        w1, a, b = normal(4, 4), normal(32, 2), normal(2, 8)
        update, tensors = torch.kron(w1, a @ b) * 0.05 / 2, {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b}
        key, alpha, leaf = f"lycoris_{name.replace('.', '_')}", 0.05, "dora_scale"
    elif algorithm == "hada":
        a, b, c, d = normal(128, 2), normal(2, 32), normal(128, 2), normal(2, 32)
        tensors = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d}
        update, key, alpha, leaf = (a @ b) * (c @ d) * 0.05 / 2, f"lycoris_{name.replace('.', '_')}", 0.05, "dora_scale"
    else:
        up, down = normal(128, 2), normal(2, 32)
        update, tensors, key, alpha = up @ down * 0.05 / 2, {"lora_A.weight": down, "lora_B.weight": up}, name, 0.05
        key, leaf = f"transformer.{name}", "magnitude"
    tensors = {f"{key}.{part}": tensor for part, tensor in tensors.items()}
    tensors |= {
        f"{key}.alpha": torch.tensor(alpha),
        f"{key}.{leaf}": magnitude.flatten() if leaf != "dora_scale" and rows else magnitude,
    }
    save_file(tensors, tmp_path / "a.safetensors")
    lora = read_lora(tmp_path / "a.safetensors")
    wanted = lycoris(weight, update, magnitude)
    x = normal(3, 32)
    attach(model, lora)
    assert distance(model.get_submodule(name)(x), x @ wanted.T + layer.bias) <= 1e-6
    detach(model, "lora")
    merge(model, lora)
    assert distance(layer.weight - weight, wanted - weight) <= 1e-5
    write_lora(tmp_path / "b.safetensors", lora)
    assert equal(read_lora(tmp_path / "b.safetensors"), lora)


@pytest.mark.parametrize("rescaled", [False, True])
def test_a_rotation_is_lycoris_own(rescaled):
    """W' = rescale · einsum(k n m, k n i → k m i; R, W), R = (I + Q)(I − Q)⁻¹: DiagOFTModule.make_weight."""
    g = torch.Generator().manual_seed(1)
    blocks = torch.randn(4, 8, 8, generator=g) / 4
    rescale = 0.5 + torch.rand(32, 1, generator=g)
    tensors = {f"transformer.{QUERY}.oft_blocks": blocks} | (
        {f"transformer.{QUERY}.rescale": rescale} if rescaled else {}
    )
    module = lora_of(tensors).modules[QUERY]
    weight = torch.randn(32, 32, generator=g)
    skew = blocks - blocks.transpose(1, 2)
    r = (torch.eye(8) + skew) @ torch.inverse(torch.eye(8) - skew)
    wanted = torch.einsum("knm,kni->kmi", r, weight.view(4, 8, 32)).reshape(32, 32)
    wanted = wanted * rescale if rescaled else wanted
    assert distance(weight + module.delta(weight), wanted) <= 1e-6
    if not rescaled:
        assert distance((weight + module.delta(weight)).norm(dim=0), weight.norm(dim=0)) <= 1e-6
    with pytest.raises(LoraError, match="depends on the weight"):
        module.delta()


def test_pefts_bias_is_scaled_as_peft_does(tmp_path):
    """`lora_bias`: the bias of lora_B lies under alpha / rank."""
    model = transformer()
    plain = transformer()
    config = LoraConfig(r=4, lora_alpha=6, lora_bias=True, target_modules=r".*\.attn\.to_[qv]")
    inject_adapter_in_model(config, model)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    state = {name.replace(".default", ""): tensor for name, tensor in model.state_dict().items() if "lora_" in name}
    for prefix in ("base_model.model.", "transformer.base_model.model.", "transformer."):
        folder = tmp_path / prefix
        folder.mkdir()
        tensors = {prefix + key: tensor for key, tensor in state.items()}
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 6, "lora_bias": true}')
        lora = read_lora(folder)
        assert lora.unmatched == () and len(lora.modules) == 8
        attach(plain, lora)
        call = inputs(plain)
        assert distance(predict(plain, call), predict(model, call)) <= 1e-5
        detach(plain, "lora")


@pytest.mark.parametrize("kind", KIND_FILES)
def test_written_and_read_again_it_is_the_same(tmp_path, kind):
    lora = kind_file(kind)
    assert lora.unmatched == ()
    write_lora(tmp_path / "a.safetensors", lora)
    again = read_lora(tmp_path / "a.safetensors")
    assert equal(again, lora)
    made = convert_lora(tmp_path / "a.safetensors", "universal", tmp_path / "b.safetensors", "bf16")
    assert made.lora.modules.keys() == lora.modules.keys()
    report = lora_report(lora, "file")
    assert report["modules"] == len(lora.modules) and report["kinds"] == lora.kinds
    assert f"on {len(lora.modules)} layers" in report_text(report)
    assert min(update_norm(module) for module in lora.modules.values()) > 0
    assert heat_map(update_norms(lora)).width > 100


def test_a_smaller_rank_leaves_norms_and_biases_as_they_are():
    lora = kind_file("train-lora")
    small = resize(lora, Truncation(rank=2)).lora
    assert list(small.modules) == list(lora.modules)
    for name, module in lora.modules.items():
        now = small.modules[name]
        assert now.rank == (2 if module.kind == "lora" else None)
        assert (now.bias is None) == (module.bias is None)
        assert module.bias is None or torch.equal(now.bias, module.bias)
    for kind in ("oft", "full"):
        with pytest.raises(LoraError, match="cannot be resized"):
            resize(kind_file(kind), Truncation(rank=2))


@pytest.mark.parametrize("key_format", ["peft", "diffusers", "simpletuner", "ai-toolkit", "kohya", "onetrainer"])
def test_what_a_key_format_cannot_hold_is_refused_by_name(tmp_path, key_format):
    with pytest.raises(LoraError, match="no place for OFT"):
        write_lora(tmp_path / "a.safetensors", kind_file("oft"), key_format)
    if key_format not in ("ai-toolkit", "kohya"):
        with pytest.raises(LoraError, match="no place for (differences of biases|full difference).*kohya"):
            write_lora(tmp_path / "a.safetensors", kind_file("train-lora"), key_format)
    assert not list(tmp_path.iterdir())


def test_parts_of_two_kinds_are_not_fused(tmp_path):
    model = transformer()
    low_rank = random_kind(model, "lora").modules
    mixed = LoraFile({QUERY: low_rank[QUERY], QUERY[:-1] + "k": FullModule(torch.ones(32, 32))})
    with pytest.raises(LoraError, match="its parts are LoRA and full difference"):
        write_lora(tmp_path / "a.safetensors", mixed, "kohya")


def test_what_does_not_fit_changes_nothing():
    model = transformer()
    call = inputs(model)
    base = predict(model, call)
    for module, says in (
        (FullModule(torch.ones(16, 32)), "16×32, the model 32×32"),
        (FullModule(torch.ones(32)), "it has 32, the model 32×32"),
        (FullModule(bias=torch.ones(64)), "it has 64, the model 32×32"),
    ):
        with pytest.raises(LoraError, match=says):
            attach(model, LoraFile({QUERY: module}))
    norm = "transformer_blocks.0.attn.norm_q"
    for module in (
        FullModule(torch.ones(8)),
        FullModule(bias=torch.ones(16)),
        FullModule(torch.ones(16), bias=torch.ones(16)),
    ):
        with pytest.raises(LoraError, match="the model 16"):
            merge(model, LoraFile({norm: module}))
    assert torch.equal(predict(model, call), base)


def test_training_does_not_start_from_what_it_would_lose():
    model = transformer()
    add_trainable(model, LoraSettings(rank=4, target="all+ffs"), seed=3)
    plain = random_kind(transformer(), "lora").modules[QUERY]
    for module, says in (
        (dataclasses.replace(plain, bias=torch.ones(32)), "also changes the bias"),
        (FullModule(torch.ones(32, 32)), "is a full difference, in training is a LoRA.*not trained here"),
        (dataclasses.replace(plain, magnitude=torch.ones(1, 32)), "DoRA .by input columns.*not trained here"),
    ):
        with pytest.raises(LoraError, match=says):
            start_from(model, LoraFile({QUERY: module}))
