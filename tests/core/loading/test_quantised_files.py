"""Quantised models on disk: loaded again identically, by every precision; kept copies; and files that do not fit."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from chroma_core.cli.main import main
from chroma_core.errors import LoraError, ModelFileError
from chroma_core.loading.load import load_text_encoder, load_transformer, transformer_outline, write_quantised
from chroma_core.loading.quantised_files import is_quantised_file, quantised_header
from chroma_core.loading.spec import LoraUse, ModelSpec
from chroma_core.lora.files import write_lora
from chroma_core.model.precision import PRECISIONS
from lora_cases import inputs, predict, random_lora
from miniature import transformer, write_model_folder

QUANTISED = [name for name, chosen in PRECISIONS.items() if chosen.quantised]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_model_folder(tmp_path_factory.mktemp("model"))


def output(spec: ModelSpec) -> torch.Tensor:
    model = load_transformer(spec, "cpu")
    return predict(model, inputs(model), model.x_embedder.weight.dtype)


@pytest.mark.parametrize("name", QUANTISED)
def test_a_kept_copy_is_the_same_model(folder, tmp_path, name):
    spec = ModelSpec("base", str(folder), name, name, quantised_folder=str(tmp_path))
    first = output(spec)
    (kept,) = tmp_path.iterdir()
    assert is_quantised_file(kept) and quantised_header(kept)["precision"] == name
    changed = kept.stat().st_mtime_ns
    assert torch.equal(output(spec), first) and kept.stat().st_mtime_ns == changed
    as_file = ModelSpec("base", str(folder), name, transformer=str(kept))
    assert torch.equal(output(as_file), first)
    assert transformer_outline(as_file).config == transformer_outline(spec).config
    for offload in ("model", "block"):
        streamed = ModelSpec("base", str(folder), name, offload=offload, quantised_folder=str(tmp_path))
        assert torch.equal(output(streamed), first)


@pytest.mark.parametrize("name", QUANTISED)
def test_a_kept_text_encoder_is_the_same_model(folder, tmp_path, name):
    spec = ModelSpec("base", str(folder), text_precision=name, quantised_folder=str(tmp_path))
    states = [load_text_encoder(spec, "cpu").encode("a red circle").states for _ in range(2)]
    assert len(list(tmp_path.iterdir())) == 1 and torch.equal(*states)


def test_a_kept_copy_is_smaller_and_holds_only_what_is_needed(folder, tmp_path):
    write_quantised(tmp_path / "nf4.safetensors", ModelSpec("base", str(folder), "nf4"), "transformer", "cpu")
    with safe_open(tmp_path / "nf4.safetensors", framework="pt") as file:
        names = set(file.keys())
    plain = set(transformer().state_dict())
    assert names >= {name for name in plain if not name.startswith(("transformer_blocks.", "single_"))}
    assert "transformer_blocks.0.attn.to_q.scale" in names


def test_other_files_make_another_copy_and_a_damaged_one_is_made_anew(folder, tmp_path, caplog):
    kept = tmp_path / "kept"
    spec = ModelSpec("base", str(folder), "int8", quantised_folder=str(kept))
    first = output(spec)
    (file,) = kept.iterdir()
    file.write_bytes(file.read_bytes()[:1000])
    assert torch.equal(output(spec), first) and is_quantised_file(file)
    assert "made anew" in caplog.text
    other = write_model_folder(tmp_path / "other", seed=1)
    assert not torch.equal(output(ModelSpec("base", str(other), "int8", quantised_folder=str(kept))), first)
    assert len(list(kept.iterdir())) == 2


def test_a_merged_lora_goes_in_before_and_is_never_kept(folder, tmp_path):
    path = tmp_path / "lora.safetensors"
    write_lora(path, random_lora(transformer(), size=0.3))
    spec = ModelSpec("base", str(folder), "int8", quantised_folder=str(tmp_path / "kept"))
    plain = output(spec)
    model = load_transformer(spec, "cpu", [LoraUse(str(path), 1.0, "merged")])
    assert not torch.equal(predict(model, inputs(model), torch.bfloat16), plain)
    assert torch.equal(output(spec), plain)
    (kept,) = (tmp_path / "kept").iterdir()
    with pytest.raises(LoraError, match="live"):
        load_transformer(
            ModelSpec("base", str(folder), "int8", transformer=str(kept)), "cpu", [LoraUse(str(path), 1.0, "merged")]
        )


def test_what_does_not_fit_is_named(folder, tmp_path):
    spec = ModelSpec("base", str(folder), "int8")
    path = tmp_path / "int8.safetensors"
    write_quantised(path, spec, "transformer", "cpu")
    with pytest.raises(ModelFileError, match="quantised to int8.*precision chosen is nf4"):
        load_transformer(ModelSpec("base", str(folder), "nf4", transformer=str(path)), "cpu")
    with pytest.raises(ModelFileError, match="holds the transformer"):
        load_text_encoder(ModelSpec("base", str(folder), text_precision="int8", text_encoder=str(path),
                                    tokenizer=str(folder / "tokenizer")), "cpu")  # fmt: skip
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelFileError, match=str(path.name)):
        load_transformer(ModelSpec("base", str(folder), "int8", transformer=str(path)), "cpu")


def test_commands_write_and_explain_a_quantised_file(folder, tmp_path, capsys):
    path = tmp_path / "out" / "nf4.safetensors"
    options = ["quantise", "--folder", str(folder), "--precision", "nf4", "--output", str(path), "--device", "cpu"]
    assert main(options) == 0
    capsys.readouterr()
    assert main(["inspect-model", str(path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["part"], report["precision"]) == ("transformer", "nf4")
    assert main(options) == 1 and "exists already" in capsys.readouterr().err
    assert main([*options[:4], "bf16", *options[5:]]) == 1
    source = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    assert main(["inspect-model", str(source), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["part"], report["layout"], report["stored_as"]) == ("transformer", "diffusers", ["fp32"])
    assert report["config"]["num_layers"] == 2
