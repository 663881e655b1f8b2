"""Whole models in ComfyUI's quantised formats: the weights are those that ComfyUI makes of the file, and stay quantised
where our layers hold them so; checkpoints with all parts in one file."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import to_tensor

import native_quantised
import recorded
from chroma_core.cli.main import main
from chroma_core.loading.load import describe, load_text_encoder, load_transformer, load_vae
from chroma_core.loading.model_files import locate
from chroma_core.loading.spec import LoraUse, ModelSpec
from chroma_core.lora.files import write_lora
from chroma_core.model.precision import dequantised_weight
from chroma_core.model.quantised import QuantisedLinear
from chroma_core.model.transformer import ChromaTransformer
from chroma_core.names import transformer as keys
from chroma_core.weights.opening import open_weights, parts_in
from lora_cases import random_lora
from miniature import t5, tokenizer, vae
from quantised_weights import CASES, WRITTEN, quantise
from tools.docs import format_table
from weight_files import (
    GGUF_TYPES,
    NOTATIONS,
    json_tensor,
    tiny_checkpoint,
    to_diffusers,
    write_gguf,
    write_safetensors,
    write_scaled_fp8,
)

CONFIG = {
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 64,
    "num_attention_heads": 4,
    "joint_attention_dim": 64,
    "axes_dims_rope": (16, 24, 24),
    "approximator_num_channels": 8,
    "approximator_hidden_dim": 32,
    "approximator_layers": 1,
    "in_channels": 64,
}
KEPT = {"float8_e4m3fn": "fp8", "int8_tensorwise": "int8", "int8_tensorwise by row": "int8"}
"""Formats whose codes are those of one of our precisions."""


def model() -> ChromaTransformer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return ChromaTransformer(**CONFIG).eval()


def in_blocks(name: str, tensor: Tensor) -> bool:
    return tensor.dim() == 2 and name.split(".")[0] in ("double_blocks", "single_blocks")


def write(
    path: Path, case: str, weights: Mapping[str, Tensor], names: Iterable[str], prefix: str = "", header: bool = False
) -> dict[str, Tensor]:
    """A file in which the weights of `names` are quantised; returns what comfy-kitchen makes of all, in fp32."""
    held, meant, declared = {}, {}, {}
    for name, tensor in weights.items():
        meant[name] = tensor.float()
        if name not in names:
            held[prefix + name] = tensor
            continue
        made, module = quantise(tensor.float(), case), prefix + name.removesuffix(".weight")
        meant[name] = made.meant
        held |= {f"{module}.{suffix}": part for suffix, part in made.tensors.items()}
        declared[module] = made
        if not header:
            held[f"{module}.comfy_quant"] = json_tensor(made.entry)
    write_safetensors(path, held, made.header(*declared) if header else None)
    return meant


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Mapping[str, tuple[Path, dict[str, Tensor]]]:
    """Every format: the file, and what it means in diffusers' layout."""
    folder, found = tmp_path_factory.mktemp("files"), {}
    weights = keys.to_original(model().state_dict())
    names = {name for name, tensor in weights.items() if in_blocks(name, tensor)}
    for i, case in enumerate(WRITTEN):
        path = folder / f"{case}.safetensors"
        meant = write(path, case, weights, names, "model.diffusion_model." if i % 2 else "", header=i % 3 == 0)
        found[case] = (path, to_diffusers(meant))
    return found


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """By full name, dequantised."""
    found = {
        f"{name}.weight": dequantised_weight(layer)
        for name, layer in module.named_modules()
        if isinstance(layer, (QuantisedLinear, nn.Linear))
    }
    return {name: tensor.float() for name, tensor in module.state_dict().items() if name not in found} | found


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], within: float) -> None:
    for name, tensor in expected.items():
        assert (found[name] - tensor).norm() <= within * tensor.norm(), name


@pytest.mark.parametrize("case", WRITTEN)
def test_the_weights_are_those_that_the_file_means(files, case: str):
    path, meant = files[case]
    loaded = load_transformer(ModelSpec("base", transformer=str(path), precision="fp32"), "cpu")
    same(weights_of(loaded), meant, 1e-6 if "onv" in case else 0)
    assert loaded.config.attention_head_dim == 64 and loaded.config.num_single_layers == 2


@pytest.mark.parametrize("case", WRITTEN)
@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_what_a_precision_holds_as_well_stays_as_it_is(files, caplog, case: str, precision: str):
    """No bit of it changes; any other format is rounded once more, and that is said."""
    path, meant = files[case]
    spec = ModelSpec("base", transformer=str(path), precision=precision)
    with caplog.at_level(logging.WARNING, "chromakit"):
        loaded = load_transformer(spec, "cpu")
    layers = {name: layer for name, layer in loaded.named_modules() if isinstance(layer, QuantisedLinear)}
    assert len(layers) == 12 + 2 * 5 and {layer.scheme for layer in layers.values()} == {precision}
    blocks = {f"{name}.weight": meant[f"{name}.weight"] for name in layers}
    if KEPT.get(case) == precision:
        same(weights_of(loaded), blocks, 0)
        assert not caplog.messages
    else:
        same(weights_of(loaded), blocks, 0.02 if precision == "int8" else 0.05)
        (said,) = caplog.messages
        assert f"22 of 22 are dequantised and quantised anew to {precision}, which rounds" in said
        advice = f"The precision {KEPT[case]} keeps them as they are." if case in KEPT else "a second time."
        assert said.endswith(advice)
    assert describe(spec, "transformer").notes == tuple(text.removeprefix("ChromaKit: ") for text in caplog.messages)


def test_plain_precisions_say_that_the_weights_take_more_memory(files):
    int8, four_bits = (
        describe(ModelSpec("base", transformer=str(files[case][0])), "transformer").notes
        for case in ("int8_tensorwise", "convrot_w4a4")
    )
    assert int8 == (
        "'int8_tensorwise.safetensors' holds weights of its layers as int8_tensorwise: 22 of 22 are dequantised to "
        "bf16. The precision int8 keeps them as they are.",
    )
    assert four_bits[0].endswith("holds weights of its layers as convrot_w4a4: 22 of 22 are dequantised to bf16.")


def test_a_kept_weight_computes_as_the_dequantised_one(files):
    path, _ = files["int8_tensorwise by row"]
    kept, plain = (
        load_transformer(ModelSpec("base", transformer=str(path), precision=name), "cpu") for name in ("int8", "bf16")
    )
    x = torch.randn(3, 256, dtype=torch.bfloat16)
    layer, other = (loaded.transformer_blocks[0].attn.to_k for loaded in (kept, plain))
    assert torch.equal(layer(x), nn.functional.linear(x, other.weight) + other.bias)


def test_a_lora_is_merged_before_weights_are_quantised_anew(files, tmp_path):
    path, _ = files["int8_tensorwise by row"]
    spec = ModelSpec("base", transformer=str(path), precision="int8")
    plain = load_transformer(spec, "cpu")
    lora = random_lora(model(), ["transformer_blocks.0.attn.to_q"], 2)
    write_lora(tmp_path / "lora.safetensors", lora)
    merged = load_transformer(spec, "cpu", [LoraUse(str(tmp_path / "lora.safetensors"), mode="merged")])
    before = weights_of(plain)
    changed = {n for n, w in weights_of(merged).items() if n.endswith(".weight") and not torch.equal(w, before[n])}
    assert changed == {"transformer_blocks.0.attn.to_q.weight"}


@pytest.mark.parametrize("case", ["float8_e4m3fn", "int8_tensorwise by row", "mxfp8", "nvfp4"])
def test_a_text_encoder(tmp_path, case: str):
    encoder = t5()
    weights = {n: t for n, t in encoder.state_dict().items() if n != "encoder.embed_tokens.weight"}
    linears = {f"{name}.weight" for name, layer in encoder.named_modules() if isinstance(layer, nn.Linear)}
    path = tmp_path / "t5.safetensors"
    meant = write(path, case, weights, linears)
    tokenizer().save_pretrained(tmp_path)
    spec = ModelSpec("base", text_encoder=str(path), text_precision="fp32")
    same(weights_of(load_text_encoder(spec, "cpu").model), meant, 0)
    if case in KEPT:
        kept = load_text_encoder(replace(spec, text_precision=KEPT[case]), "cpu").model
        same(weights_of(kept), {name: meant[name] for name in linears}, 0)


# --- checkpoints of ComfyUI's own saver ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(files, tmp_path_factory) -> Mapping[str, tuple[Path, dict[str, Tensor]]]:
    """Every format, and bf16: the file that ComfyUI saves, with all parts; the transformer's weights as it has them."""
    folder, given = tmp_path_factory.mktemp("checkpoints"), {}
    text = {n: t for n, t in t5(width=64).state_dict().items() if n != "encoder.embed_tokens.weight"}
    weights = keys.to_original(model().state_dict(), "weight")
    names = {name for name, tensor in weights.items() if in_blocks(name, tensor)}
    for case in ("bf16", *WRITTEN):
        given[case] = folder / f"{case}.safetensors"
        if case == "bf16":
            write_safetensors(given[case], {name: tensor.bfloat16() for name, tensor in weights.items()})
        else:
            write(given[case], case, weights, names)
    found = native_quantised.through_comfyui(given, folder / "saved", CONFIG, text, vae().state_dict())
    return {case: (path, to_diffusers(meant)) for case, (path, meant) in found.items()}


@pytest.mark.parametrize("case", ["bf16", *WRITTEN])
def test_comfyuis_own_saver_writes_what_is_read(saved, case: str):
    path, meant = saved[case]
    loaded = load_transformer(ModelSpec("base", transformer=str(path), precision="fp32"), "cpu")
    assert set(meant) <= set(loaded.state_dict())
    same(weights_of(loaded), meant, 1e-6 if "onv" in case else 0)
    if case in KEPT:
        kept = load_transformer(ModelSpec("base", transformer=str(path), precision=KEPT[case]), "cpu")
        layers = [name for name, layer in kept.named_modules() if isinstance(layer, QuantisedLinear)]
        same(weights_of(kept), {f"{name}.weight": meant[f"{name}.weight"] for name in layers}, 0)


def test_every_part_is_taken_out_of_the_transformers_file(saved, capsys):
    path, _ = saved["convrot_w4a4"]
    assert parts_in(path) == {"transformer", "text_encoder", "vae"}
    spec = ModelSpec("base", transformer=str(path), text_precision="fp32")
    assert locate(spec, "vae") == locate(spec, "text_encoder") == path
    found, expected = weights_of(load_vae(spec, "cpu")), vae().state_dict()
    same(found, {name: tensor for name, tensor in expected.items() if ".attentions." not in name}, 0)
    tokenizer().save_pretrained(path.parent)
    encoder = load_text_encoder(spec, "cpu").model
    same(weights_of(encoder), t5(width=64).state_dict(), 0)
    main(["inspect-model", str(path)])
    printed = capsys.readouterr().out
    assert "what: a Chroma transformer" in printed and "holds as well: ['text_encoder', 'vae']" in printed


def test_a_named_part_goes_before_the_transformers_file(files, tmp_path):
    """And a file without the part changes nothing: the flavour's own is taken."""
    path, _ = files["nvfp4"]
    assert locate(ModelSpec("tiny", transformer=str(path)), "vae").parent.name == "tiny"
    other = write_safetensors(tmp_path / "vae.safetensors", vae().state_dict())
    assert locate(ModelSpec("tiny", transformer=str(path), vae=str(other)), "vae") == other
    assert not parts_in(tmp_path / "missing.safetensors") and not parts_in(tmp_path)


def test_the_command_line_takes_every_part_out_of_one_file(tmp_path):
    def image(*options: str) -> Tensor:
        arguments = ["--prompt", "a star", "--steps", "2", "--seed", "1", "--device", "cpu", "--output", str(tmp_path)]
        assert main(["sample", "--flavour", "tiny", *arguments, *options]) == 0
        (path,) = tmp_path.glob("*.png")
        with Image.open(path) as written:
            found = to_tensor(written)
        path.unlink()
        return found

    darker = {"decoder.conv_out.bias": torch.full((3,), -0.8)}
    for name, weights in (("same", tiny_checkpoint()), ("darker", tiny_checkpoint(vae=darker))):
        write_safetensors(tmp_path / f"{name}.safetensors", weights)
    plain = image()
    assert torch.equal(image("--transformer", str(tmp_path / "same.safetensors")), plain)
    assert image("--transformer", str(tmp_path / "darker.safetensors")).mean() < plain.mean() - 0.1


# --- the table of docs/models.md -------------------------------------------------------------------------------------


def row(
    kind: str,
    name: str,
    path: Path,
    meant: Mapping[str, Tensor],
    quantised: Iterable[str] | None = None,
    within: float = 0.0,
) -> dict[str, Any]:
    """What is read of a file, beside what it means. within: the relative difference that a weight may have."""
    weights = open_weights(path)
    same({n: weights.read(n, torch.float32) for n in meant}, meant, within)
    schemes = {weights.schemes.get(n) for n in (quantised or meant)}
    kept = schemes.pop() if len(schemes) == 1 else None
    return {"kind": kind, "format": name, "within": within, "kept": kept}


@pytest.mark.skipif(len(WRITTEN) < len(CASES), reason="this safetensors cannot write every format")
def test_the_table_of_formats(saved, tmp_path):
    """What the table in docs/models.md says is measured here. `python -m tools.docs.format_table` writes it."""
    matrix = {"a.weight": torch.randn(64, 512, generator=torch.Generator().manual_seed(0))}
    rows = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
        held = {name: tensor.to(dtype) for name, tensor in matrix.items()}
        path, title = tmp_path / f"{dtype}.safetensors", str(dtype).removeprefix("torch.")
        write_safetensors(path, held)
        rows.append(row("plain", title, path, {name: tensor.float() for name, tensor in held.items()}))
    for notation in NOTATIONS:
        for per_row in (False, True):
            path = tmp_path / f"{notation}-{per_row}.safetensors"
            meant = write_scaled_fp8(path, matrix, notation, per_row=per_row)
            rows.append(row("scaled fp8", f"{notation}{' by row' if per_row else ''}", path, meant))
    for case in CASES:
        path, whole = saved[case]
        names = keys.to_original(whole, "weight")
        prefixed = {f"model.diffusion_model.{name}": tensor for name, tensor in names.items()}
        blocks = [f"model.diffusion_model.{name}" for name, tensor in names.items() if in_blocks(name, tensor)]
        rows.append(row("ComfyUI", case, path, prefixed, blocks, 1e-6 if "onv" in case else 0.0))
    for kind in GGUF_TYPES:
        meant = write_gguf(tmp_path / f"{kind}.gguf", matrix, kind)
        rows.append(row("GGUF", kind, tmp_path / f"{kind}.gguf", meant))
    recorded.hold("quant_formats", rows)


def test_the_page_has_the_table():
    assert format_table.PAGE.read_text(encoding="utf-8") == format_table.page(), "python -m tools.docs.format_table"
