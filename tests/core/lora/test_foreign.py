"""Files by the names that each trainer documents, with alpha in each of the places where it may stand."""

import json

import pytest
import torch
from safetensors.torch import save_file

from chroma_core.lora.formats import lora_of, read_lora
from chroma_core.names.transformer import Rows, to_diffusers_modules
from foreign_loras import HEADS, foreign
from lora_cases import equal

WIDTH, BLOCKS, RANK = 32, 2, 4
ALPHA = 6.0


def write(tmp_path, trainer, alpha):
    """The file with alpha `tensor`, `absent`, in the `header` (diffusers) or `beside` (PEFT's adapter_config.json)."""
    tensors, layers = foreign(trainer, WIDTH, BLOCKS, BLOCKS, ALPHA if alpha == "tensor" else None, RANK)
    config = {"r": RANK, "lora_alpha": int(ALPHA)}
    header = {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in config.items()})}
    path = tmp_path / ("adapter_model.safetensors" if alpha == "beside" else "a.safetensors")
    save_file(tensors, path, header if alpha == "header" else {})
    if alpha == "beside":
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    return path, layers


@pytest.mark.parametrize("alpha", ["tensor", "absent", "header", "beside"])
@pytest.mark.parametrize("trainer", HEADS)
def test_it_means_what_its_trainer_meant(tmp_path, trainer, alpha):
    path, layers = write(tmp_path, trainer, alpha)
    scale = 1.0 if alpha == "absent" else ALPHA / RANK
    read = read_lora(path)
    expected = {}
    for name, (down, up) in layers.items():
        for row in to_diffusers_modules(name) or (Rows(name),):
            expected[row.name] = row.take(up @ down * scale)
    assert read.unmatched == () and read.modules.keys() == expected.keys()
    for name, delta in expected.items():
        assert (read.modules[name].delta() - delta).abs().max() <= 1e-6 * delta.abs().max()
    assert {module.scale for module in read.modules.values()} == {scale}
    places = {"tensor": "tensors", "absent": "absent"}
    assert read.alpha_source == places.get(alpha, "configuration")


def test_a_tensor_goes_before_a_configuration(tmp_path):
    tensors, _ = foreign("diffusers", WIDTH, 1, 0, alpha=2.0)
    header = {"lora_adapter_metadata": json.dumps({"transformer.r": RANK, "transformer.lora_alpha": 16})}
    save_file(tensors, tmp_path / "a.safetensors", header)
    read = read_lora(tmp_path / "a.safetensors")
    assert read.alphas == [2.0] and read.alpha_source == "tensors"


def test_alpha_for_some_layers_is_said(tmp_path):
    tensors, layers = foreign("onetrainer", WIDTH, 1, 0, alpha=2.0)
    del tensors["lora_transformer_transformer_blocks_0_attn_to_q.alpha"]
    save_file(tensors, tmp_path / "a.safetensors")
    read = read_lora(tmp_path / "a.safetensors")
    assert read.alpha_source == "mixed" and len(layers) == len(read.modules)
    assert read.modules["transformer_blocks.0.attn.to_q"].alpha == RANK and read.alphas == [2.0, 4.0]


def test_a_folder_and_the_tensors_alone_are_read_too(tmp_path):
    path, _ = write(tmp_path, "peft", "beside")
    assert equal(read_lora(tmp_path), read_lora(path))
    tensors, _ = foreign("kohya", WIDTH, 1, 1, alpha=2.0)
    save_file(tensors, tmp_path / "a.safetensors")
    with torch.inference_mode():  # as in a node
        held = lora_of(tensors)
    assert equal(held, read_lora(tmp_path / "a.safetensors"))
    assert not any(t.is_inference() for m in held.modules.values() for t in m.factors().values())
