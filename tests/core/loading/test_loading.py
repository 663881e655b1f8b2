"""Loading a diffusers folder: exact weights, dtypes, threads, LoRAs merged or live, and damaged folders."""

import json
import threading
from pathlib import Path

import pytest
import torch

from chroma_core.errors import ChromaKitError, ConfigError, LoraError, ModelFileError
from chroma_core.loading.component_cache import ComponentCache
from chroma_core.loading.load import load_text_encoder, load_transformer, load_vae
from chroma_core.loading.model_files import base_hash
from chroma_core.loading.spec import LoraUse, ModelHandle, ModelSpec
from chroma_core.lora.adapters import linear_modules
from chroma_core.lora.files import write_lora
from chroma_core.lora.modules import FullModule, LoraFile, LoraModule
from chroma_core.lora.settings import LoraSettings
from chroma_core.lora.trainable import add_trainable, trained_lora
from chroma_core.model.latents import image_ids
from chroma_core.model.precision import quantisable_linears
from miniature import t5, transformer, vae, write_model_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def spec(folder) -> ModelSpec:
    return ModelSpec("base", str(folder), "fp32", "fp32")


@pytest.fixture(scope="module")
def lora_path(tmp_path_factory) -> str:
    model = transformer()
    for parameter in add_trainable(model, LoraSettings(rank=4, alpha=8.0, target="all+ffs"), seed=1):
        with torch.no_grad():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.05)
    path = tmp_path_factory.mktemp("lora") / "random.safetensors"
    write_lora(path, trained_lora(model))
    return str(path)


def velocity(model) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    dtype = model.x_embedder.weight.dtype
    latents, text = (torch.randn(1, n, c, generator=generator).to(dtype) for n, c in ((16, 64), (5, 32)))
    with torch.no_grad():
        return model(latents, text, torch.tensor([0.6]), image_ids(8, 8)).float()


def test_weights_arrive_exactly(spec):
    for loaded, original in (
        (load_transformer(spec, "cpu"), transformer()),
        (load_text_encoder(spec, "cpu").model, t5()),
        (load_vae(spec, "cpu"), vae()),
    ):
        expected = original.state_dict()
        assert set(loaded.state_dict()) == set(expected)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
        assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def test_tied_embedding_stays_tied(spec):
    model = load_text_encoder(spec, "cpu").model
    assert model.encoder.embed_tokens.weight.data_ptr() == model.shared.weight.data_ptr()


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_dtypes(folder, name, dtype):
    spec = ModelSpec("base", str(folder), name, name)
    model = load_transformer(spec, "cpu")
    assert {p.dtype for p in model.parameters()} == {dtype}
    reference = velocity(load_transformer(ModelSpec("base", str(folder), "fp32"), "cpu"))
    assert (velocity(model) - reference).abs().max() < 0.05 * reference.abs().max()
    assert load_vae(spec, "cpu").dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "limit"), [("int8", 0.1), ("fp8", 0.2), ("int4", 0.5), ("nf4", 0.5), ("int8-quanto", 0.1)]
)
def test_only_block_linears_are_quantised(folder, name, limit):
    model = load_transformer(ModelSpec("base", str(folder), name), "cpu")
    quantised = {path for path, module in linear_modules(model).items() if type(module) is not torch.nn.Linear}
    assert quantised == {path for path, _ in quantisable_linears(transformer())} and quantised
    assert "proj_out" not in quantised and "single_transformer_blocks.0.proj_out" in quantised
    assert not any(
        path.startswith(("distilled_guidance_layer", "x_embedder", "context_embedder")) for path in quantised
    )
    reference = velocity(load_transformer(ModelSpec("base", str(folder), "bf16"), "cpu"))
    assert 0 < (velocity(model) - reference).abs().max() < limit * reference.abs().max()


@pytest.mark.parametrize("name", ["int8", "int8-quanto"])  # 4 bits leave little of a random T5
def test_a_quantised_text_encoder_stays_close(folder, name):
    plain = (
        load_text_encoder(ModelSpec("base", str(folder), text_precision="bf16"), "cpu").encode("a red circle").states
    )
    states = load_text_encoder(ModelSpec("base", str(folder), text_precision=name), "cpu").encode("a red circle").states
    assert 0 < (states - plain).norm() < 0.2 * plain.norm()


def test_a_load_in_a_thread_leaves_the_process_alone(folder):
    """A job loads bf16 weights while a prompt computes: the prompt's dtype and device must not move."""
    seen, stop = set(), threading.Event()

    def watch():
        while not stop.is_set():
            seen.add((torch.zeros(1).dtype, torch.nn.Linear(1, 1).weight.device.type, torch.get_default_dtype()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for _ in range(3):
            load_transformer(ModelSpec("base", str(folder), "bf16"), "cpu")
            load_text_encoder(ModelSpec("base", str(folder), "bf16"), "cpu")
            load_vae(ModelSpec("base", str(folder)), "cpu")
    finally:
        stop.set()
        watcher.join()
    assert seen == {(torch.float32, "cpu", torch.float32)}


def test_loading_in_inference_mode_gives_trainable_tensors(spec):
    with torch.inference_mode():
        model = load_transformer(spec, "cpu")
    assert not any(p.is_inference() for p in model.parameters())


def test_live_and_merged_agree_and_live_leaves_no_trace(spec, lora_path):
    cache = ComponentCache()
    with cache.transformer(ModelHandle(spec), "cpu") as model:
        plain = velocity(model)
    with cache.transformer(ModelHandle(spec).with_lora(LoraUse(lora_path, 0.7)), "cpu") as model:
        live = velocity(model)
    with cache.transformer(ModelHandle(spec), "cpu") as model:
        assert torch.equal(velocity(model), plain)
    with cache.transformer(ModelHandle(spec).with_lora(LoraUse(lora_path, 0.7, "merged")), "cpu") as model:
        merged = velocity(model)
    assert (live - plain).abs().max() > 1e-3
    assert (live - merged).abs().max() <= 1e-5


def test_norms_and_biases_are_merged_while_loading(spec, tmp_path):
    """As ComfyUI's *Train LoRA* changes them, the approximator's too: live and merged are the same."""
    layers = (
        "transformer_blocks.0.attn.to_q",
        "distilled_guidance_layer.in_proj",
        "single_transformer_blocks.0.proj_out",
    )
    with ComponentCache().transformer(ModelHandle(spec), "cpu") as model:
        widths = {name: model.get_submodule(name).out_features for name in layers}
        norm = model.get_submodule("transformer_blocks.0.attn.norm_q").weight
    differences = {name: FullModule(bias=torch.linspace(-0.1, 0.1, width)) for name, width in widths.items()}
    differences["transformer_blocks.0.attn.norm_q"] = FullModule(torch.linspace(-0.5, 0.5, len(norm)))
    path = str(write_lora(tmp_path / "a.safetensors", LoraFile(differences)))
    velocities = []
    for uses in ([], [LoraUse(path, 0.5)], [LoraUse(path, 0.5, "merged")]):
        with ComponentCache().transformer(ModelHandle(spec, tuple(uses)), "cpu") as model:
            velocities.append(velocity(model))
    plain, live, merged = velocities
    assert (live - plain).abs().max() > 1e-3 and (live - merged).abs().max() <= 1e-5


@pytest.mark.parametrize("mode", ["live", "merged"])
@pytest.mark.parametrize("name", ["int8", "fp8", "int4", "nf4", "int8-quanto"])
def test_lora_works_on_a_quantised_base(folder, lora_path, mode, name):
    handle = ModelHandle(ModelSpec("base", str(folder), name))
    cache = ComponentCache()
    with cache.transformer(handle, "cpu") as model:
        plain = velocity(model)
    with cache.transformer(handle.with_lora(LoraUse(lora_path, 1.0, mode)), "cpu") as model:
        assert (velocity(model) - plain).abs().max() > 1e-2


@pytest.mark.parametrize("mode", ["live", "merged"])
def test_a_lora_that_fits_in_part_needs_permission(spec, tmp_path, mode):
    lora = LoraFile(
        {
            "transformer_blocks.0.attn.to_q": LoraModule(torch.ones(2, 32), torch.ones(32, 2), 2.0),
            "transformer_blocks.9.attn.to_q": LoraModule(torch.ones(2, 32), torch.ones(32, 2), 2.0),
        }
    )
    path = str(tmp_path / "part.safetensors")
    write_lora(path, lora)
    cache = ComponentCache()
    with pytest.raises(LoraError, match="transformer_blocks.9"):
        with cache.transformer(ModelHandle(spec).with_lora(LoraUse(path, 1.0, mode)), "cpu"):
            pass
    with cache.transformer(ModelHandle(spec), "cpu") as model:
        plain = velocity(model)
    with cache.transformer(ModelHandle(spec).with_lora(LoraUse(path, 1.0, mode, True)), "cpu") as model:
        assert not torch.equal(velocity(model), plain)


def test_fingerprint_follows_the_weights(spec, tmp_path):
    assert len(base_hash(spec)) == 64 and base_hash(spec) == base_hash(spec)
    other = write_model_folder(tmp_path / "other", seed=1)
    assert base_hash(ModelSpec("base", str(other))) != base_hash(spec)


def test_spec_round_trip():
    spec = ModelSpec("tiny", None, "fp32", "bf16", "model")
    assert ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    with pytest.raises(ConfigError, match="unknown fields"):
        ModelSpec.from_dict({"flavor": "tiny"})


def test_a_component_folder_without_its_config_is_read_by_its_shapes(tmp_path):
    folder = write_model_folder(tmp_path / "model")
    (folder / "transformer" / "config.json").unlink()
    model = load_transformer(ModelSpec("base", str(folder), "fp32"), "cpu")
    assert torch.equal(velocity(model), velocity(transformer()))


def damage(folder: Path, name: str):
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    config = folder / "transformer" / "config.json"
    if name == "no index":
        (folder / "model_index.json").unlink()
    elif name == "no weights":
        weights.unlink()
    elif name == "pickle only":
        weights.rename(weights.with_suffix(".bin"))
    elif name == "cut off":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif name == "empty file":
        weights.write_bytes(b"")
    elif name == "absurd header":
        weights.write_bytes(b"\xff" * 64)
    elif name == "broken config":
        config.write_text("{")
    elif name == "foreign config":
        config.write_text('{"sample_size": 64, "cross_attention_dim": 768}')
    elif name == "other widths":
        values = json.loads(config.read_text())
        config.write_text(json.dumps(values | {"num_attention_heads": 4}))
    elif name == "more layers":
        values = json.loads(config.read_text())
        config.write_text(json.dumps(values | {"num_layers": 3, "num_single_layers": 2}))
    elif name == "fewer layers":
        values = json.loads(config.read_text())
        config.write_text(json.dumps(values | {"num_layers": 1}))


@pytest.mark.parametrize(
    "name",
    ["no index", "no weights", "pickle only", "cut off", "empty file", "absurd header", "broken config",
     "foreign config", "other widths", "more layers", "fewer layers"],
)  # fmt: skip
def test_damaged_folders_are_named(tmp_path, name):
    folder = write_model_folder(tmp_path / "model")
    damage(folder, name)
    with pytest.raises(ModelFileError) as caught:
        load_transformer(ModelSpec("base", str(folder), "fp32"), "cpu")
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    "values", [{"flavour": "xl"}, {"precision": "int3"}, {"text_precision": ""}, {"offload": "disk"}]
)
def test_unknown_choices_list_the_known_ones(values):
    with pytest.raises(ChromaKitError, match="hoose one of"):
        ModelSpec(**values)
