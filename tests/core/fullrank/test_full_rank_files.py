"""The models that full-rank training writes, read by others: diffusers, and ComfyUI's own Chroma."""

import json
import weakref

import pytest
import torch
from diffusers import ChromaTransformer2DModel
from safetensors.torch import load_file, save_file

import miniature
import native
from chroma_core.fullrank import export
from chroma_core.fullrank.layers import layer_names
from chroma_core.loading.load import load_transformer, transformer_source
from chroma_core.loading.spec import ModelSpec
from chroma_core.model.latents import image_ids, unpack
from chroma_core.model.transformer import ChromaTransformer
from chroma_core.names.transformer import to_original
from chroma_core.weights.opening import open_weights
from lora_cases import inputs, predict

LAYERS = ("transformer_blocks.1", "single_transformer_blocks.0.attn.to_k")
HOSTS_SIZE = {"approximator_num_channels": 64}  # which ComfyUI cannot do without
SHARD = 60_000


def model_of(path, **changes) -> ModelSpec:
    return ModelSpec("tiny", transformer=str(path), precision="fp32", **changes)


def trained(path, target=LAYERS, dtype=torch.float32, seed=3):
    """The model of a file or folder with random weights in some layers, ready to be written."""
    weights, component = transformer_source(model_of(path))
    outline = load_transformer(model_of(path), "cpu")
    names = layer_names(outline, target, norms=True)
    generator = torch.Generator().manual_seed(seed)
    state = {n: t for n, t in outline.state_dict().items() if n.rpartition(".")[0] in names}
    new = {n: t + 0.05 * torch.randn(t.shape, generator=generator) for n, t in state.items()}
    outline.load_state_dict(new, strict=False)
    return outline, export.TrainedModel(weights, component, new, dtype)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A small model, changed and written in both layouts."""
    folder = tmp_path_factory.mktemp("model")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ChromaTransformer(**{**miniature.WIDTHS, **HOSTS_SIZE}, num_layers=2, num_single_layers=2).eval()
    save_file({k: v.contiguous() for k, v in to_original(model.state_dict()).items()}, folder / "base.safetensors")
    changed, made = trained(folder / "base.safetensors")
    export.write_single_file(folder / "single.safetensors", made, {"a": "b"})
    export.write_folder(folder / "folder", made, {"a": "b"}, shard_bytes=SHARD)
    return folder, changed, made


def test_diffusers_reads_the_folder_as_the_model_that_was_trained(written):
    folder, changed, _ = written
    theirs = ChromaTransformer2DModel.from_pretrained(folder / "folder").eval()
    assert all(torch.equal(t, changed.state_dict()[n]) for n, t in theirs.named_parameters())
    # Text and image without padding, where both forward passes are defined alike.
    call = inputs(changed)
    with torch.no_grad():
        (velocity,) = theirs(
            hidden_states=call["latents_BLD"], encoder_hidden_states=call["text_BTC"], timestep=call["sigma_B"],
            img_ids=image_ids(8, 8), txt_ids=torch.zeros(call["text_BTC"].shape[1], 3), return_dict=False,
        )  # fmt: skip
    ours = predict(changed, call)
    assert (velocity - ours).abs().max() <= 1e-6 * ours.abs().max().clamp(min=1)


def test_the_hosts_own_chroma_computes_the_same_from_the_single_file(written, tmp_path, monkeypatch):
    folder, changed, _ = written
    config = vars(changed.config)
    tensors = load_file(folder / "single.safetensors")
    # As the host's `Chroma.process_unet_state_dict` renames them on loading.
    renamed = {k.removesuffix(".scale") + ".weight" if k.endswith(".scale") else k: v for k, v in tensors.items()}
    call = inputs(changed)
    latents = unpack(call["latents_BLD"], 8, 8)
    (theirs,) = native.forward(tmp_path, config, renamed, latents, call["text_BTC"], call["sigma_B"])
    # The host computes 344 modulation vectors whatever the depth: the blocks take theirs from the front.
    monkeypatch.setattr(ChromaTransformer, "modulation_vectors", 344)
    with torch.no_grad():
        table = changed.modulation(call["sigma_B"])
        velocity = changed(**call, modulation_BNM=torch.cat([table[:, :30], table[:, 342:]], dim=1))
    ours = unpack(velocity, 8, 8)
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max().clamp(min=1)


def test_our_loader_reads_the_shards(written):
    folder, changed, _ = written
    read = load_transformer(model_of(folder / "folder"), "cpu")
    assert all(torch.equal(t, changed.state_dict()[n]) for n, t in read.state_dict().items())


def test_shards_are_as_diffusers_names_them(written, tmp_path):
    folder, changed, made = written
    theirs = ChromaTransformer2DModel.from_config(ChromaTransformer2DModel.load_config(folder / "folder"))
    theirs.save_pretrained(tmp_path, max_shard_size=SHARD)

    def names(where):
        index = json.loads((where / "diffusion_pytorch_model.safetensors.index.json").read_text())
        return set(index["weight_map"]), index["metadata"].keys(), {p.name[:23] for p in where.glob("*.safetensors")}

    assert names(folder / "folder") == names(tmp_path)
    index = json.loads((folder / "folder" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == made.bytes() == sum(p.numel() * 4 for p in changed.parameters())
    sizes = [path.stat().st_size for path in (folder / "folder").glob("*.safetensors")]
    assert len(sizes) > 3 and max(sizes) <= SHARD + 5_000  # and a header


# --- what happens to stored types


@pytest.fixture
def base(tmp_path):
    """The miniature as a single file in the original layout, in bf16."""
    path = tmp_path / "base.safetensors"
    tensors = to_original(miniature.transformer().to(torch.bfloat16).state_dict())
    save_file({k: v.contiguous() for k, v in tensors.items()}, path)
    return path


def test_what_was_not_trained_is_copied_bit_for_bit_in_its_type(base, tmp_path):
    _, made = trained(base, dtype=torch.float32)
    export.write_single_file(tmp_path / "out.safetensors", made, {})
    export.write_folder(tmp_path / "out", made, {})
    before, after = load_file(base), load_file(tmp_path / "out.safetensors")
    assert before.keys() == after.keys()
    changed = {n for n in after if after[n].dtype != torch.bfloat16}
    # `linear1` holds the k that was trained and what was not: one type for all of it, the wider.
    assert {n.rpartition(".")[0] for n in changed} >= {"single_blocks.0.linear1", "double_blocks.1.img_attn.qkv"}
    assert all(n.startswith("double_blocks.1.") or "single_blocks.0.linear1" in n for n in changed)
    assert all(torch.equal(before[n], after[n]) for n in after if n not in changed)
    width = 32
    fused = after["single_blocks.0.linear1.weight"]
    rest = torch.cat([fused[:width], fused[2 * width :]])
    kept = before["single_blocks.0.linear1.weight"]
    assert torch.equal(rest, torch.cat([kept[:width], kept[2 * width :]]).float())
    split = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    kinds = {n: t.dtype for n, t in split.items()}
    assert {n for n, dtype in kinds.items() if dtype == torch.float32} == set(made.trained)
    assert set(kinds.values()) == {torch.float32, torch.bfloat16}


def test_fp8_bases_become_bf16(base, tmp_path):
    """ComfyUI takes a file's most frequent type for all of it: beside fp8, trained weights would be rounded to it."""
    tensors = {k: v.to(torch.float8_e4m3fn) if v.ndim == 2 else v for k, v in load_file(base).items()}
    save_file(tensors, tmp_path / "fp8.safetensors")
    _, made = trained(tmp_path / "fp8.safetensors", dtype=torch.bfloat16)
    export.write_single_file(tmp_path / "out.safetensors", made, {})
    after = load_file(tmp_path / "out.safetensors")
    assert {t.dtype for t in after.values()} == {torch.bfloat16}
    assert all(torch.equal(after[n].float(), t.float()) for n, t in tensors.items() if "double_blocks.0" in n)


def test_one_tensor_is_held_at_a_time(base, tmp_path, monkeypatch):
    _, made = trained(base)
    alive, most, largest = [], 0, 0
    read = export.TrainedModel.read

    def counted(self, name):
        nonlocal most, largest
        tensor = read(self, name).clone()
        alive.append((weakref.ref(tensor), tensor.nbytes))
        now = sum(size for ref, size in alive if ref() is not None)
        most, largest = max(most, now), max(largest, tensor.nbytes)
        return tensor

    monkeypatch.setattr(export.TrainedModel, "read", counted)
    export.write_single_file(tmp_path / "out.safetensors", made, {})
    export.write_folder(tmp_path / "out", made, {})
    assert most <= 4 * largest and most < made.bytes() / 3, "the parts of one fused tensor"


def test_an_older_folder_is_replaced_whole(base, tmp_path):
    _, made = trained(base)
    export.write_folder(tmp_path / "out", made, {"number": "1"}, shard_bytes=20_000)
    export.write_folder(tmp_path / "out", made, {"number": "2"})
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert open_weights(tmp_path / "out").metadata["number"] == "2"
    assert not list(tmp_path.glob(".*tmp"))
