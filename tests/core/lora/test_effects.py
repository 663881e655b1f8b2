"""What a LoRA changes where: norms against the weights, and an image without one group of blocks at a time."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from chroma_core.checkpoints.merge import norms_on
from chroma_core.cli.main import main
from chroma_core.errors import ConfigError
from chroma_core.loading.spec import ModelSpec
from chroma_core.lora.adapters import adapted_layers, attach
from chroma_core.lora.effects import REST, WITH, WITHOUT, Effects, block_groups, effects_of
from chroma_core.lora.files import write_lora
from chroma_core.lora.modules import LoraFile
from chroma_core.lora.report import heat_map, lora_report, report_text, update_norms
from chroma_core.names.transformer import to_original
from lora_cases import inputs, predict, random_kind, random_lora
from miniature import real_depth, transformer


def test_groups_are_neighbouring_blocks_of_one_kind():
    layers = list(random_lora(real_depth(), "all+ffs").modules)
    groups = block_groups(layers, 8)
    assert list(groups) == [
        "double 0-6", "double 7-12", "double 13-18", "single 0-7", "single 8-15", "single 16-23", "single 24-30",
        "single 31-37", REST,
    ]  # fmt: skip
    assert sorted(layer for group in groups.values() for layer in group) == sorted(layers)
    assert groups[REST] == ["proj_out"]
    assert all(layer.startswith("single_transformer_blocks.") for layer in groups["single 8-15"])
    assert len(block_groups(layers, 57)) == 58 and "single 3" in block_groups(layers, 57)
    assert list(block_groups(["single_transformer_blocks.4.proj_out"], 8)) == ["single 4"]
    assert list(block_groups(layers, 1)) == ["double 0-18", "single 0-37", REST]
    with pytest.raises(ConfigError, match="at least 1"):
        block_groups(layers, 0)


def test_each_result_is_the_lora_without_those_layers():
    model = transformer()
    lora, call = random_lora(model), inputs(model)
    attach(model, lora, 0.7, name="style")
    attach(model, random_lora(model, seed=9), 0.3, name="other")  # stays on throughout
    whole = predict(model, call)
    found = effects_of(model, "style", 4, lambda: predict(model, call))
    assert list(found) == [WITH, WITHOUT, "double 0", "double 1", "single 0", "single 1", REST]
    assert torch.equal(found[WITH], whole) and torch.equal(predict(model, call), whole)
    for label, layers in block_groups(lora.modules, 4).items():
        alone = transformer()
        attach(alone, LoraFile({n: m for n, m in lora.modules.items() if n not in layers}), 0.7, name="style")
        attach(alone, random_lora(alone, seed=9), 0.3, name="other")
        assert (predict(alone, call) - found[label]).abs().max() <= 1e-5
        assert (whole - found[label]).abs().max() > 1e-3
    plain = transformer()
    attach(plain, random_lora(plain, seed=9), 0.3)
    assert (predict(plain, call) - found[WITHOUT]).abs().max() <= 1e-5


def test_strengths_come_back_after_an_error():
    model = transformer()
    attach(model, random_lora(model), 0.7)

    def broken():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        effects_of(model, "lora", 2, broken)
    assert {branch.strength for _, layer in adapted_layers(model) for branch in layer.loras()} == {0.7}


def test_differences_are_in_levels_of_255():
    grey = {WITH: 100, WITHOUT: 180, "double 0-3": 110, "single 0": 100}
    effects = Effects({label: Image.new("RGB", (32, 16), (level,) * 3) for label, level in grey.items()})
    assert effects.differences == {WITHOUT: 80.0, "double 0-3": 10.0, "single 0": 0.0}
    lines = effects.report().splitlines()
    assert "differs by 80.00 of 255" in lines[0] and lines[1:] == ["double 0-3: 10.00", "single 0: 0.00"]
    sheet = np.asarray(effects.sheet())
    assert sheet.shape[1] == 4 * 264 + 8 and sheet.max() == 255  # the largest difference is white


@pytest.mark.parametrize("kind", ["lora", "dora", "lokr"])
def test_norms_against_the_weights(tmp_path, kind):
    model = transformer()
    save_file({k: v.contiguous() for k, v in to_original(model.state_dict()).items()}, tmp_path / "base.safetensors")
    spec = ModelSpec("tiny", transformer=str(tmp_path / "base.safetensors"))
    lora = random_lora(model) if kind == "lora" else random_kind(model, kind)
    for norms in (norms_on(lora, spec), norms_on(lora, spec)):  # the second time from memory
        assert norms.weight is not None
        for name, module in lora.modules.items():
            weight = model.state_dict()[f"{name}.weight"]
            wanted = module.delta(weight).norm() / weight.norm()
            assert norms.of([name]) == pytest.approx(float(wanted), rel=1e-4)
    pair = ["transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k"]
    deltas = torch.cat([lora.modules[n].delta(model.state_dict()[f"{n}.weight"]) for n in pair])
    weights = torch.cat([model.state_dict()[f"{n}.weight"] for n in pair])
    assert norms.of(pair) == pytest.approx(float(deltas.norm() / weights.norm()), rel=1e-4)
    assert "‖ΔW‖ / ‖W‖" in report_text(lora_report(lora, norms=norms))
    assert "‖ΔW‖ / ‖W‖" not in report_text(lora_report(lora))
    assert heat_map(norms).tobytes() != heat_map(update_norms(lora)).tobytes()
    deeper = LoraFile({**lora.modules, "transformer_blocks.7.attn.to_q": next(iter(lora.modules.values()))})
    assert norms_on(deeper, spec).weight is None  # the model cannot say


def test_the_command(tmp_path, capsys):
    from chroma_core.loading.component_cache import ComponentCache
    from chroma_core.loading.spec import ModelHandle

    with ComponentCache().transformer(ModelHandle(ModelSpec("tiny")), "cpu") as model:
        lora = random_lora(model, "all", rank=2, size=0.3)
    path, sheet = write_lora(tmp_path / "a.safetensors", lora), tmp_path / "sheet.png"
    words = ["inspect-lora", str(path), "--base", "tiny", "--json", "--effects", str(sheet), "--device", "cpu"]
    assert main(words) == 1 and "--prompt" in capsys.readouterr().err
    assert main([*words, "--prompt", "a red circle", "--steps", "2", "--groups", "2", "--seed", "7"]) == 0
    said = capsys.readouterr()
    report = json.loads(said.out)
    assert list(report["effects"])[0] == WITHOUT and len(report["effects"]) == 3 and report["effects"][WITHOUT] > 0.2
    assert all(group["of_weight"] > 0 for group in report["groups"])
    with Image.open(sheet) as image:
        record = json.loads(image.text["chromakit"])
    assert record["settings"]["seed"] == 7 and record["differences"] == report["effects"]
    assert "of 255 on average" in said.err
