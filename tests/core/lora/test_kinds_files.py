"""Files of every kind of adapter: what is written, what others write, fused layers."""

import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from chroma_core.errors import LoraError
from chroma_core.lora.adapters import (
    attach,
    merge,
)
from chroma_core.lora.files import read_lora, write_lora
from chroma_core.lora.modules import LokrModule, LoraModule
from chroma_core.lora.report import describe
from chroma_core.names.transformer import to_diffusers_modules
from lora_cases import distance, equal, inputs, predict, random_kind
from miniature import transformer


def test_written_keys(tmp_path):
    name = "transformer.transformer_blocks.0.attn.to_q"
    for kind, leaves in {
        "dora": {"lora_A.weight": (4, 32), "lora_B.weight": (32, 4), "dora_scale": (32, 1), "alpha": ()},
        "lokr": {"lokr_w1": (4, 4), "lokr_w2_a": (8, 2), "lokr_w2_b": (2, 8), "alpha": ()},
    }.items():
        lora = random_kind(transformer(), kind, "*.to_q")
        write_lora(tmp_path / "a.safetensors", lora)
        with safe_open(tmp_path / "a.safetensors", "pt") as file:
            found = {k: tuple(file.get_slice(k).get_shape()) for k in file.keys() if k.startswith(f"{name}.")}  # noqa: SIM118
        assert found == {f"{name}.{leaf}": shape for leaf, shape in leaves.items()}
        assert equal(read_lora(tmp_path / "a.safetensors"), lora)
        assert describe(lora).startswith(
            f"4 {'DoRA' if kind == 'dora' else 'LoKr'} layers, rank {4 if kind == 'dora' else 2}, "
        )


def test_to_another_dtype_keeps_magnitudes_exact():
    lora = random_kind(transformer(), "dora")
    for module in lora.modules.values():
        cast = module.to(torch.bfloat16)
        assert cast.down.dtype == cast.up.dtype == torch.bfloat16 and torch.equal(cast.magnitude, module.magnitude)


def test_nan_is_not_written(tmp_path):
    lora = random_kind(transformer(), "dora", "proj_out")
    lora.modules["proj_out"].magnitude[0] = math.nan
    with pytest.raises(LoraError, match="NaN"):
        write_lora(tmp_path / "a.safetensors", lora)


def test_pefts_dora_is_read(tmp_path):
    lora = random_kind(transformer(), "dora")
    tensors = {}
    for name, m in lora.modules.items():
        key = f"base_model.model.{name}"
        tensors |= {
            f"{key}.lora_A.weight": m.down,
            f"{key}.lora_B.weight": m.up,
            f"{key}.lora_magnitude_vector": m.magnitude,
        }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 6, "use_dora": true}')
    assert equal(read_lora(tmp_path / "adapter_model.safetensors"), lora)


def test_pefts_lokr_is_read_with_its_own_scale(tmp_path):
    w1, w2 = torch.randn(4, 4), torch.randn(8, 8)
    key = "base_model.model.transformer_blocks.0.attn.to_q"
    save_file({f"{key}.lokr_w1": w1, f"{key}.lokr_w2": w2}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LOKR", "r": 8, "alpha": 2}')
    module = read_lora(tmp_path / "adapter_model.safetensors").modules["transformer_blocks.0.attn.to_q"]
    assert distance(module.delta(), torch.kron(w1, w2) / 4) <= 1e-6


@pytest.mark.parametrize("kind", ["dora", "lokr", "lokr-product", "lokr-blocks"])
@pytest.mark.parametrize("prefix", ["diffusion_model.", "lora_unet_", "lycoris_"])
def test_fused_layers_split_exactly(tmp_path, kind, prefix):
    """q, k, v of width 32 in one layer of 96 rows; with blocks of 12 rows q ends inside a block, with 8 it does not."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    original = "double_blocks.0.img_attn.qkv"
    weight = normal(96, 32)
    if kind == "dora":
        module = LoraModule(normal(4, 32), normal(96, 4), 2.0, normal(96).abs())
        tensors = {
            "lora_down.weight": module.down,
            "lora_up.weight": module.up,
            "dora_scale": module.magnitude[:, None],
        }
    else:
        rows = 12 if kind == "lokr-blocks" else 8
        left = (
            {"w1_a": normal(96 // rows, 2), "w1_b": normal(2, 4)}
            if kind == "lokr-product"
            else {"w1": normal(96 // rows, 4)}
        )
        module = LokrModule(2.0, **left, w2_a=normal(rows, 3), w2_b=normal(3, 8))
        tensors = {f"lokr_{factor}": tensor for factor, tensor in module.factors().items()}
    name = prefix + (original.replace(".", "_") if prefix.endswith("_") else original)
    tensors = {f"{name}.{leaf}": tensor.clone() for leaf, tensor in tensors.items()}
    save_file({**tensors, f"{name}.alpha": torch.tensor(2.0)}, tmp_path / "a.safetensors")
    lora = read_lora(tmp_path / "a.safetensors")
    assert lora.unmatched == () and len(lora.modules) == 3
    whole = module.delta(weight)
    model = transformer()
    for part in to_diffusers_modules(original) or ():
        found = lora.modules[part.name]
        assert found.shape == (32, 32)
        assert distance(found.delta(part.take(weight)), part.take(whole)) <= 1e-6
        layer = model.get_submodule(part.name)
        layer.weight.copy_(part.take(weight))
    merged = transformer()
    merged.load_state_dict(model.state_dict())
    call = inputs(model)
    attach(model, lora, 0.5)
    merge(merged, lora, 0.5)
    assert distance(predict(model, call), predict(merged, call)) <= 1e-5
    if kind == "lokr-blocks":
        with pytest.raises(LoraError, match="no Kronecker product"):
            write_lora(tmp_path / "b.safetensors", lora)
    else:
        write_lora(tmp_path / "b.safetensors", lora)
        assert equal(read_lora(tmp_path / "b.safetensors"), lora)
