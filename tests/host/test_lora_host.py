"""Our weights and LoRA files in the two other runtimes: ComfyUI's own Chroma, and diffusers' ChromaPipeline."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import native
from chroma_core.lora.adapters import attach, detach
from chroma_core.lora.files import read_lora, write_lora
from chroma_core.lora.modules import LoraFile
from chroma_core.model.latents import unpack
from chroma_core.model.transformer import ChromaTransformer
from chroma_core.names.transformer import to_original
from lora_cases import distance, inputs, predict, random_lora
from miniature import REAL_DEPTH, WIDTHS, real_depth

STRENGTH = 0.7


@pytest.fixture(scope="module")
def model() -> ChromaTransformer:
    """19 + 38 blocks of width 32, with weights large enough that every block matters."""
    return real_depth()


@pytest.fixture(scope="module")
def lora(model, tmp_path_factory) -> tuple[LoraFile, Path]:
    """A LoRA on all 419 layers with alpha ≠ rank, and its file."""
    made = random_lora(model, "all+ffs", rank=4, alpha=6.0, size=0.3)
    path = tmp_path_factory.mktemp("lora") / "ours.safetensors"
    write_lora(path, made)
    return made, path


@pytest.fixture(scope="module")
def ours(model, lora) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The call, and our velocities [B, C, H, W] without and with the LoRA."""
    call = inputs(model)
    base = predict(model, call)
    attach(model, lora[0], STRENGTH)
    changed = predict(model, call)
    detach(model, "lora")
    assert distance(changed, base) > 0.1
    return call, unpack(base, 8, 8), unpack(changed, 8, 8)


@pytest.fixture(scope="module")
def fused(model, tmp_path_factory) -> Path:
    """A LoRA file as ai-toolkit writes it: original layout, fused layers, no alpha; and with the last layer."""
    generator = torch.Generator().manual_seed(9)
    tensors = {}
    for key, weight in to_original(model.state_dict()).items():
        if weight.ndim == 2 and not key.startswith(("distilled", "img_in", "txt_in")):
            name = f"diffusion_model.{key.removesuffix('.weight')}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(4, weight.shape[1], generator=generator) * 0.1
            tensors[f"{name}.lora_B.weight"] = torch.randn(weight.shape[0], 4, generator=generator) * 0.1
    assert len(tensors) == 2 * (228 + 1)
    path = tmp_path_factory.mktemp("fused") / "fused.safetensors"
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def theirs(model, lora, fused, ours, tmp_path_factory) -> tuple[Tensor, ...]:
    """The host's velocities: without a LoRA, with our file, with the fused one."""
    call = ours[0]
    return native.forward(
        tmp_path_factory.mktemp("native"),
        REAL_DEPTH,
        to_original(model.state_dict(), norm_leaf="weight"),
        unpack(call["latents_BLD"], 8, 8),
        call["text_BTC"],
        call["sigma_B"],
        (lora[1], fused),
        STRENGTH,
    )


def test_our_weights_in_the_hosts_chroma_give_our_output(ours, theirs):
    error = (ours[1] - theirs[0]).abs().max().item()
    print(f"largest difference {error:.2e}, largest value {theirs[0].abs().max().item():.2f}")
    assert error <= 5e-6


def test_our_lora_in_the_host_changes_the_output_as_ours_does(ours, theirs):
    error = distance(ours[2] - ours[1], theirs[1] - theirs[0])
    print(f"relative difference of the change {error:.2e}")
    assert error <= 1e-4


def test_a_fused_lora_is_the_same_in_the_host_and_after_our_split(model, fused, ours, theirs):
    call, base, _ = ours
    attach(model, read_lora(fused), STRENGTH)
    changed = unpack(predict(model, call), 8, 8)
    detach(model, "lora")
    assert distance(theirs[2], theirs[0]) > 0.05
    assert distance(changed - base, theirs[2] - theirs[0]) <= 1e-4


def test_the_host_patches_every_layer_of_our_file(lora, tmp_path):
    assert native.match(lora[1], tmp_path, REAL_DEPTH) == (419, 419)


def test_on_a_small_model_too(tmp_path):
    """`tiny` is built like this: other depth, other widths."""
    config = {**WIDTHS, "num_layers": 3, "num_single_layers": 6}
    with torch.device("meta"):
        small = ChromaTransformer(**config)
    write_lora(tmp_path / "a.safetensors", random_lora(small, "all+ffs+embedder"))
    assert native.match(tmp_path / "a.safetensors", tmp_path, config) == (68, 68)


def test_the_check_reports_what_the_host_would_drop(tmp_path, lora):
    """PEFT's own dialect means nothing to the host, and a LoRA of another width cannot be applied."""
    tensors = load_file(lora[1])
    foreign = {f"base_model.model.{k.removeprefix('transformer.')}": v.clone() for k, v in tensors.items()}
    save_file({**tensors, **foreign}, tmp_path / "both.safetensors")
    # Without a model folder the check is against Chroma 1, whose layers are 3072 wide.
    result = native.check(tmp_path / "both.safetensors")
    assert (result["matched"], result["total"], len(result["unmatched"])) == (0, 838, 838)
    assert "transformer.transformer_blocks.0.attn.to_q" in result["unmatched"]
    assert "base_model.model.transformer_blocks.0.attn.to_q" in result["unmatched"]


def test_our_lora_in_diffusers_changes_the_output_as_ours_does(model, lora, ours):
    from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

    reference = ChromaTransformer2DModel(**REAL_DEPTH)
    reference.load_state_dict(model.state_dict())
    reference.requires_grad_(False).eval()
    pipeline = ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=None,  # type: ignore[arg-type]
        text_encoder=None,  # type: ignore[arg-type]
        tokenizer=None,  # type: ignore[arg-type]
        transformer=reference,
    )
    call, base, changed = ours

    def velocity() -> Tensor:
        with torch.no_grad():
            out = reference(
                hidden_states=call["latents_BLD"],
                encoder_hidden_states=call["text_BTC"],
                timestep=call["sigma_B"],
                img_ids=call["img_ids_L3"],
                txt_ids=torch.zeros(call["text_BTC"].shape[1], 3),
            ).sample
        return unpack(out, 8, 8)

    before = velocity()
    pipeline.load_lora_weights(str(lora[1].parent), weight_name=lora[1].name, adapter_name="ours")
    pipeline.set_adapters("ours", STRENGTH)
    after = velocity()
    adapted = [n for n, m in reference.named_modules() if hasattr(m, "lora_A")]
    assert set(adapted) == set(lora[0].modules)
    error = distance(changed - base, after - before)
    print(f"relative difference of the change {error:.2e}")
    assert error <= 1e-4
