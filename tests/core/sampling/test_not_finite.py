"""NaN and infinite numbers end as an error that names the stage and the remedy, never as a black image."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import miniature
from chroma_core.cli.main import main
from chroma_core.errors import LoraError, NotFiniteError
from chroma_core.lora.adapters import attach
from chroma_core.lora.files import read_lora, write_lora
from chroma_core.lora.modules import LokrModule, LoraFile, LoraModule
from chroma_core.sampling.sampler import SamplingSettings, sample
from chroma_core.sampling.text import TextCondition, TextEncoder
from training_cases import model_folder

LAYER = "transformer_blocks.0.attn.to_v"
WIDTH = 32


def lora(alpha: float = 4.0) -> LoraFile:
    draws = torch.Generator().manual_seed(0)
    down, up = torch.randn(4, WIDTH, generator=draws), torch.randn(WIDTH, 4, generator=draws)
    return LoraFile({LAYER: LoraModule(down, up, alpha)})


def sampled(transformer, **options) -> torch.Tensor:
    settings = SamplingSettings(steps=2, seed=1, guidance=1.0)
    text = TextCondition(torch.zeros(3, WIDTH), "x", 3)
    return sample(transformer, [text], None, width=64, height=64, settings=settings, **options)


def test_a_transformer_with_one_nan_is_named_with_step_and_remedy():
    made = miniature.transformer()
    assert sampled(made).isfinite().all()
    made.single_transformer_blocks[0].proj_out.weight[0, 0] = float("nan")
    with pytest.raises(NotFiniteError, match=r"transformer gives at step 1 of 2 .* LoRAs off.*damaged"):
        sampled(made)


def test_a_lora_so_strong_that_nothing_is_left_is_named():
    made = miniature.transformer()
    attach(made, lora(), 1e30)
    with pytest.raises(NotFiniteError, match="lower their strengths"):
        sampled(made)


def test_what_is_broken_from_the_start_is_named():
    start = torch.full((1, 16, 8, 8), float("inf"))
    with pytest.raises(NotFiniteError, match="start from"):
        sampled(miniature.transformer(), start_BCHW=start)


def test_a_text_encoder_with_an_infinite_norm_is_named_with_the_prompt():
    encoder = TextEncoder(miniature.t5(), miniature.tokenizer())  # type: ignore[arg-type]
    encoder.model.encoder.final_layer_norm.weight.data[0] = float("inf")
    with pytest.raises(NotFiniteError, match="text encoder makes of “a star”.*bf16 or fp32"):
        encoder.encode("a star")


@pytest.mark.parametrize("way", ["encode", "decode"])
def test_a_vae_with_one_nan_is_named(way):
    made = miniature.vae()
    coder = made.encoder if way == "encode" else made.decoder
    coder.conv_in.weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(NotFiniteError, match="VAE .*float32.*damaged"):
        getattr(made, way)(torch.zeros(1, 3, 64, 64) if way == "encode" else torch.zeros(1, 16, 8, 8))


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), -float("inf")])
def test_a_lora_without_a_finite_alpha_is_refused(tmp_path, alpha):
    path = with_alpha(write_lora(tmp_path / "a.safetensors", lora()), torch.tensor(alpha))
    with pytest.raises(LoraError, match=r"alpha of 'transformer_blocks.0.attn.to_v' .* not a finite number.*Export it"):
        read_lora(path)


def test_an_alpha_of_several_numbers_is_refused(tmp_path):
    path = with_alpha(write_lora(tmp_path / "a.safetensors", lora()), torch.ones(2))
    with pytest.raises(LoraError, match="not a finite number"):
        read_lora(path)


@pytest.mark.parametrize("alpha", [torch.tensor(float("nan")), torch.tensor(1e10).half()])
def test_whole_factors_of_a_lokr_mean_no_alpha(tmp_path, alpha):
    """LyCORIS writes 1e10 there, of which fp16 makes infinity."""
    draws = torch.Generator().manual_seed(0)
    module = LokrModule(1.0, w1=torch.randn(4, 4, generator=draws), w2=torch.randn(8, 8, generator=draws))
    path = write_lora(tmp_path / "a.safetensors", LoraFile({LAYER: module}))
    (found,) = read_lora(with_alpha(path, alpha)).modules.values()
    assert found.alpha == 1.0
    weight = torch.zeros(WIDTH, WIDTH)
    assert torch.equal(found.delta(weight), module.delta(weight))


def with_alpha(path: Path, alpha: torch.Tensor) -> Path:
    tensors = load_file(path)
    (key,) = [key for key in tensors if key.endswith(".alpha")]
    save_file(tensors | {key: alpha}, path)
    return path


def test_the_command_line_ends_with_words_and_without_an_image(tmp_path, capsys):
    folder = model_folder(tmp_path / "model")
    (weights,) = (folder / "transformer").glob("*.safetensors")
    tensors = load_file(weights)
    tensors["proj_out.weight"][0, 0] = float("nan")
    save_file(tensors, weights, {"format": "pt"})
    command = ["sample", "--flavour", "tiny", "--folder", str(folder), "--precision", "fp32", "--device", "cpu"]
    command += ["--prompt", "a star", "--width", "64", "--height", "64", "--steps", "2", "--output", str(tmp_path)]
    assert main(command) == 1
    assert "NaN or infinite" in capsys.readouterr().err and not list(tmp_path.glob("*.png"))
