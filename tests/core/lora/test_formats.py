"""LoRA files: what is written, every dialect that is read, and every kind of wrong file."""

import json
import math
import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from chroma_core.errors import LoraError
from chroma_core.lora.files import read_lora, write_lora
from chroma_core.lora.modules import LoraFile, LoraModule
from chroma_core.lora.report import describe
from chroma_core.names.transformer import to_diffusers_modules, to_original_module
from lora_cases import random_lora
from miniature import transformer


@pytest.fixture
def lora() -> LoraFile:
    return random_lora(transformer(), rank=4, alpha=6.0)


def same(a: LoraFile, b: LoraFile) -> bool:
    return a.modules.keys() == b.modules.keys() and all(
        torch.equal(a.modules[n].down, b.modules[n].down)
        and torch.equal(a.modules[n].up, b.modules[n].up)
        and a.modules[n].alpha == b.modules[n].alpha
        for n in a.modules
    )


def fused(lora_seed: int = 3, rank: int = 4, alpha: float = 2.0) -> dict[str, tuple]:
    """A LoRA on the original layout's modules of the miniature: module → (down, up, alpha)."""
    model = transformer()
    weights = {name: m.weight for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    generator = torch.Generator().manual_seed(lora_seed)
    modules = {}
    for name in weights:
        original = to_original_module(name)
        assert original is not None
        if name.startswith("distilled") or original.name in modules:
            continue
        parts = to_diffusers_modules(original.name) or ()
        rows = sum(weights[p.name].shape[0] for p in parts)
        down = torch.randn(rank, weights[name].shape[1], generator=generator)
        modules[original.name] = (down, torch.randn(rows, rank, generator=generator), alpha)
    return modules


def test_written_keys(tmp_path, lora):
    path = tmp_path / "folder" / "mine.safetensors"
    write_lora(path, LoraFile(lora.modules, {"trigger": "sks"}))
    with safe_open(path, "pt") as file:
        keys, header = set(file.keys()), file.metadata()
        assert file.get_tensor("transformer.proj_out.alpha").item() == 6.0
    assert len(keys) == 3 * len(lora.modules)
    name = "transformer.transformer_blocks.0.ff.net.0.proj"
    assert {f"{name}.lora_A.weight", f"{name}.lora_B.weight", f"{name}.alpha"} <= keys
    assert header["trigger"] == "sks" and header["format"] == "pt"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(tmp_path, lora, dtype):
    modules = {n: LoraModule(m.down.to(dtype), m.up.to(dtype), m.alpha) for n, m in lora.modules.items()}
    write_lora(tmp_path / "a.safetensors", LoraFile(modules, {"trigger": "sks"}))
    read = read_lora(tmp_path / "a.safetensors")
    assert same(read, LoraFile(modules))
    assert read.key_format == "universal" and read.unmatched == () and read.metadata["trigger"] == "sks"
    assert all(m.down.dtype == dtype for m in read.modules.values())


def test_nothing_to_write_and_nan_are_errors(tmp_path, lora):
    with pytest.raises(LoraError, match="no layers"):
        write_lora(tmp_path / "a.safetensors", LoraFile({}))
    module = LoraModule(torch.full((4, 8), math.nan), torch.zeros(8, 4), 4.0)
    with pytest.raises(LoraError, match="NaN"):
        write_lora(tmp_path / "a.safetensors", LoraFile({"proj_out": module}))
    assert list(tmp_path.iterdir()) == []


def test_peft(tmp_path, lora):
    tensors = {}
    for name, m in lora.modules.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = m.down
        tensors[f"base_model.model.{name}.lora_B.default.weight"] = m.up
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    read = read_lora(tmp_path / "adapter_model.safetensors")
    assert read.key_format == "peft" and read.alphas == [4.0]  # without alpha: alpha = rank
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"r": 4, "lora_alpha": 6, "alpha_pattern": {"proj_mlp": 9}, "use_rslora": False})
    )
    read = read_lora(tmp_path / "adapter_model.safetensors")
    assert read.modules["transformer_blocks.0.attn.to_q"].alpha == 6
    assert read.modules["single_transformer_blocks.1.proj_mlp"].alpha == 9
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 6, "use_rslora": True}))
    assert read_lora(tmp_path / "adapter_model.safetensors").alphas == [6 * math.sqrt(4)]
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(LoraError, match="adapter_config.json"):
        read_lora(tmp_path / "adapter_model.safetensors")


def test_alpha_in_the_header_as_diffusers_writes_it(tmp_path, lora):
    tensors = {f"transformer.{n}.lora_A.weight": m.down for n, m in lora.modules.items()}
    tensors |= {f"transformer.{n}.lora_B.weight": m.up for n, m in lora.modules.items()}
    header = {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 6})}
    save_file(tensors, tmp_path / "a.safetensors", header)
    assert same(read_lora(tmp_path / "a.safetensors"), lora)
    header = {"lora_adapter_metadata": json.dumps({"transformer.use_dora": True})}
    save_file(tensors, tmp_path / "b.safetensors", header)
    with pytest.raises(LoraError, match="DoRA"):
        read_lora(tmp_path / "b.safetensors")


@pytest.mark.parametrize("down,up", [("lora_A", "lora_B"), ("lora_down", "lora_up")])
@pytest.mark.parametrize("dialect", ["native", "kohya"])
def test_fused_dialects_split_exactly(tmp_path, dialect, down, up):
    tensors, expected = {}, {}
    for original, (a, b, alpha) in fused().items():
        name = f"diffusion_model.{original}" if dialect == "native" else f"lora_unet_{original.replace('.', '_')}"
        tensors |= {f"{name}.{down}.weight": a, f"{name}.{up}.weight": b, f"{name}.alpha": torch.tensor(alpha)}
        delta = b @ a * (alpha / a.shape[0])
        expected |= {part.name: part.take(delta) for part in to_diffusers_modules(original) or ()}
    save_file(tensors, tmp_path / "a.safetensors")
    read = read_lora(tmp_path / "a.safetensors")
    assert read.key_format == dialect and read.unmatched == ()
    assert read.modules.keys() == expected.keys()
    for name, delta in expected.items():
        assert (read.modules[name].delta() - delta).abs().max() <= 1e-5
    assert {m.rank for m in read.modules.values()} == {4}  # split, not padded
    write_lora(tmp_path / "b.safetensors", read)  # parts that share a matrix can be written
    assert same(read_lora(tmp_path / "b.safetensors"), read)


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "lora_transformer_", "lora_unet_"])
def test_other_mixtures_of_prefix_and_layout(tmp_path, lora, prefix):
    def raw(name: str) -> str:
        return prefix + (name.replace(".", "_") if prefix.endswith("_") else name)

    tensors = {f"{raw(n)}.lora_A.weight": m.down for n, m in lora.modules.items()}
    tensors |= {f"{raw(n)}.lora_B.weight": m.up for n, m in lora.modules.items()}
    tensors |= {f"{raw(n)}.alpha": torch.tensor(m.alpha) for n, m in lora.modules.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    assert same(read_lora(tmp_path / "a.safetensors"), lora)


def test_flux_keys_are_listed_not_dropped(tmp_path):
    """Flux and Chroma share block names; Flux's modulation layers are not in Chroma."""
    name = "diffusion_model.double_blocks.0"
    pair = {"lora_A.weight": torch.ones(2, 32), "lora_B.weight": torch.ones(32, 2)}
    tensors = {f"{name}.img_attn.proj.{k}": v for k, v in pair.items()}
    tensors |= {f"{name}.img_mod.lin.{k}": v.clone() for k, v in pair.items()}
    tensors["lora_te1_text_model.alpha"] = torch.tensor(1.0)
    save_file(tensors, tmp_path / "a.safetensors")
    read = read_lora(tmp_path / "a.safetensors")
    assert list(read.modules) == ["transformer_blocks.0.attn.to_out.0"]
    assert set(read.unmatched) == {*(f"{name}.img_mod.lin.{k}" for k in pair), "lora_te1_text_model.alpha"}
    assert "3 keys" in describe(read)


def test_describe(tmp_path, lora):
    text = describe(LoraFile(lora.modules, {"trigger": "sks"}))
    assert text.splitlines()[0].startswith(f"{len(lora.modules)} layers, rank 4, alpha 6, ")
    assert "trigger: sks" in text


A, B = torch.ones(2, 8), torch.ones(8, 2)
BLOCK = "transformer.transformer_blocks.0.attn.to_q"
WRONG = {
    "None of the 1 keys .*lokr_w1": {"lycoris_transformer_blocks_0_attn_to_q.lokr_w1": A},
    "both a LoRA and a LoKr": {
        **{f"{BLOCK}.lora_A.weight": A, f"{BLOCK}.lora_B.weight": B},
        **{f"{BLOCK}.lokr_w1": A, f"{BLOCK}.lokr_w2": B},
    },
    "an OFT with DoRA": {f"{BLOCK}.oft_blocks": torch.ones(2, 4, 4), f"{BLOCK}.dora_scale": torch.ones(8, 1)},
    "both a LoRA and a full difference": {
        **{f"{BLOCK}.lora_A.weight": A, f"{BLOCK}.lora_B.weight": B},
        f"{BLOCK}.diff": torch.ones(8, 8),
    },
    "made for convolutions": {f"{BLOCK}.lokr_w1": A, f"{BLOCK}.lokr_w2": B, f"{BLOCK}.lokr_t2": A},
    "which do not multiply": {f"{BLOCK}.lokr_w1": A, f"{BLOCK}.lokr_w2_a": A, f"{BLOCK}.lokr_w2_b": A},
    "is a BOFT": {f"{BLOCK}.oft_blocks": torch.ones(2, 2, 4, 4)},
    "OFT by input columns": {"base_model.model.transformer_blocks.0.attn.to_q.oft_R.weight": A},
    "are not square": {f"{BLOCK}.oft_blocks": torch.ones(2, 4, 3)},
    "which do not part where": {"diffusion_model.double_blocks.0.img_attn.qkv.oft_blocks": torch.ones(4, 6, 6)},
    "DoRA by input columns over a fused layer": {
        "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": A,
        "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": torch.ones(24, 2),
        "lora_unet_double_blocks_0_img_attn_qkv.dora_scale": torch.ones(1, 8),
    },
    "the matrices of .* which do not multiply": {
        f"{BLOCK}.{leaf}": A for leaf in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    },
    "a DoRA whose": {f"{BLOCK}.lora_A.weight": A, f"{BLOCK}.lora_B.weight": B, f"{BLOCK}.dora_scale": torch.ones(1, 7)},
    "made for Flux: its modulation layers": {
        "lora_unet_single_blocks_0_modulation_lin.lora_down.weight": A,
        "lora_unet_single_blocks_0_modulation_lin.lora_up.weight": B,
    },
    "made for Chroma Radiance": {
        "diffusion_model.nerf_blocks.0.param_generator.lora_A.weight": A,
        "diffusion_model.nerf_blocks.0.param_generator.lora_B.weight": B,
    },
    "a text encoder's LoRA": {
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": A,
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": B,
    },
    "whole model": {"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": A},
    "no LoRA keys; its 1 tensors are 'embedding'": {"embedding": A},
    "it is empty": {},
    "None of the 2 keys .* belongs to Chroma": {
        "unet.down_blocks.0.to_q.lora_A.weight": A,
        "unet.down_blocks.0.to_q.lora_B.weight": B,
    },
    "None of the 1 keys": {f"{BLOCK}.lora_A.weight": A},
    "do not multiply": {f"{BLOCK}.lora_A.weight": A, f"{BLOCK}.lora_B.weight": torch.ones(8, 3)},
    "in 2 dimensions": {f"{BLOCK}.lora_A.weight": A, f"{BLOCK}.lora_B.weight": torch.ones(8, 2, 1)},
    "NaN": {f"{BLOCK}.lora_A.weight": A, f"{BLOCK}.lora_B.weight": B * math.inf},
    "several adapters": {
        f"{BLOCK}.lora_A.weight": A,
        f"{BLOCK}.lora_A.second.weight": A,
        f"{BLOCK}.lora_B.weight": B,
    },
    "twice": {
        **{f"{BLOCK}.lora_A.weight": A, f"{BLOCK}.lora_B.weight": B},
        **{f"{BLOCK.removeprefix('transformer.')}.lora_A.weight": A},
        **{f"{BLOCK.removeprefix('transformer.')}.lora_B.weight": B},
    },
    "do not divide": {
        "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight": A,
        "diffusion_model.double_blocks.0.img_attn.qkv.lora_B.weight": torch.ones(8, 2),
    },
}


@pytest.mark.parametrize("says", WRONG)
def test_a_file_that_is_no_lora_for_chroma_says_what_it_is(tmp_path, says):
    path = tmp_path / "wrong.safetensors"
    save_file({key: tensor.clone() for key, tensor in WRONG[says].items()}, path)
    with pytest.raises(LoraError, match=says) as error:
        read_lora(path)
    assert "wrong.safetensors" in str(error.value)


def test_a_file_that_cannot_be_opened(tmp_path, lora):
    with pytest.raises(LoraError, match="no LoRA file"):
        read_lora(tmp_path / "absent.safetensors")
    with pytest.raises(LoraError, match="no LoRA file"):
        read_lora(tmp_path)
    whole = tmp_path / "whole.safetensors"
    write_lora(whole, lora)
    for name, content in {"cut": whole.read_bytes()[:-100], "noise": b"\x00\x01" * 50, "empty": b""}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(LoraError, match="cut off or damaged"):
            read_lora(tmp_path / name)
    torch.save({"a": torch.zeros(1)}, tmp_path / "zip.pt")
    (tmp_path / "old.bin").write_bytes(pickle.dumps({"a": 1}))
    for name in ("zip.pt", "old.bin"):
        with pytest.raises(LoraError, match="pickled"):
            read_lora(tmp_path / name)
