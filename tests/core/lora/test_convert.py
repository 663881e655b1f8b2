"""Converting files: what is kept, what is said, what is never overwritten; the two commands."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from chroma_core.cli.main import main
from chroma_core.errors import LoraError
from chroma_core.lora.convert import JOB_KEY, convert_lora
from chroma_core.lora.files import read_lora, write_lora
from chroma_core.lora.modules import LoraFile, LoraModule
from chroma_core.lora.report import Norms, heat_map, layer_group, lora_report, report_text, update_norm
from chroma_core.lora.settings import TARGETS, named_target, target_modules
from foreign_loras import foreign
from lora_cases import distance, equal, random_kind, random_lora
from miniature import transformer

RECIPE = {"chromakit.recipe": '{"name": "canonical"}', "chromakit.trigger": "sks", JOB_KEY: "job-1"}


@pytest.fixture
def source(tmp_path) -> Path:
    lora = random_lora(transformer(), rank=4, alpha=6.0)
    return write_lora(tmp_path / "mine.safetensors", LoraFile(lora.modules, RECIPE))


def test_the_recipe_goes_along_and_the_origin_is_noted(source):
    made = convert_lora(source, "kohya")
    assert made.path == source.with_name("mine-kohya.safetensors")
    header = read_lora(made.path).metadata
    assert header["chromakit.recipe"] == RECIPE["chromakit.recipe"] and header["chromakit.trigger"] == "sks"
    assert JOB_KEY not in header  # the job may not take this file for its own and replace it
    origin = json.loads(header["chromakit.converted_from"])
    assert (origin["file"], origin["dialect"], origin["job_id"]) == ("mine.safetensors", "universal", "job-1")
    assert "mine.safetensors (universal, 35 layers) → mine-kohya.safetensors" in made.report()
    assert equal(read_lora(convert_lora(made.path, "universal").path), read_lora(source))


def test_a_header_of_diffusers_does_not_outlive_its_dialect(tmp_path):
    """With alpha in tensors and another one in the header, readers would differ."""
    tensors, _ = foreign("diffusers", 32, 1, 1)
    header = {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 6})}
    save_file(tensors, tmp_path / "a.safetensors", header)
    made = convert_lora(tmp_path / "a.safetensors", "universal")
    assert made.lora.alphas == [6.0] and "lora_adapter_metadata" not in made.lora.metadata
    assert "multiplied into the matrices" in convert_lora(made.path, "ai-toolkit").report()


@pytest.mark.parametrize(("dtype", "error"), [("fp32", 0.0), ("bf16", 8e-3), ("fp16", 1e-3)])
def test_number_formats(source, dtype, error):
    made = convert_lora(source, "universal", dtype=dtype)
    before = read_lora(source)
    stored = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    for name, module in made.lora.modules.items():
        assert module.down.dtype == module.up.dtype == stored
        assert distance(module.delta(), before.modules[name].delta()) <= error


def test_a_number_too_large_for_fp16_is_no_infinity_in_a_file(source, tmp_path):
    lora = read_lora(source)
    lora.modules["proj_out"].up[0, 0] = 1e6
    path = write_lora(tmp_path / "large.safetensors", lora)
    with pytest.raises(LoraError, match="too large for float16.*bf16"):
        convert_lora(path, "universal", dtype="fp16")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["large.safetensors", "mine.safetensors"]


@pytest.mark.parametrize("dialect", ["simpletuner", "ai-toolkit", "diffusers"])
def test_alpha_that_makes_a_number_too_large_is_no_infinity_in_a_file(tmp_path, dialect):
    up = torch.full((8, 2), 30000.0, dtype=torch.float16)
    lora = LoraFile({"transformer_blocks.0.attn.to_q": LoraModule(torch.ones(2, 8).half(), up, alpha=8.0)})
    path = write_lora(tmp_path / "half.safetensors", lora)
    with pytest.raises(LoraError, match="too large for float16.*bf16"):
        convert_lora(path, dialect)
    with pytest.raises(LoraError, match="too large for float16.*bf16"):
        write_lora(tmp_path / "other.safetensors", lora, dialect)
    assert [p.name for p in tmp_path.iterdir()] == ["half.safetensors"]
    assert convert_lora(path, dialect, dtype="fp32").lora.modules.popitem()[1].up.max() == 120000


def test_a_folded_alpha_and_a_shorter_format_are_one_rounding(tmp_path):
    random = torch.Generator().manual_seed(0)
    module = LoraModule(torch.randn(3, 8, generator=random), torch.randn(512, 3, generator=random), alpha=1.0)
    path = write_lora(tmp_path / "a.safetensors", LoraFile({"transformer_blocks.0.attn.to_q": module}))
    made = convert_lora(path, "simpletuner", dtype="bf16").lora.modules["transformer_blocks.0.attn.to_q"]
    assert torch.equal(made.up, (module.up * module.scale).bfloat16())


def test_foreign_files_are_never_overwritten_and_own_ones_do_not_pile_up(source, tmp_path):
    (tmp_path / "mine-kohya.safetensors").write_bytes(b"someone's")
    first = convert_lora(source, "kohya").path
    assert first.name == "mine-kohya-2.safetensors" == convert_lora(source, "kohya").path.name
    assert convert_lora(source, "kohya", dtype="bf16").path.name == "mine-kohya-3.safetensors"
    assert (tmp_path / "mine-kohya.safetensors").read_bytes() == b"someone's"
    with pytest.raises(LoraError, match="exists already"):
        convert_lora(source, "kohya", tmp_path / "mine-kohya.safetensors")
    with pytest.raises(LoraError, match="exists already"):
        convert_lora(source, "kohya", source)
    assert convert_lora(source, "peft").path == tmp_path / "mine-peft" / "adapter_model.safetensors"
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "adapter_config.json").write_text("{}")
    with pytest.raises(LoraError, match="exists already"):
        convert_lora(source, "peft", tmp_path / "theirs.safetensors")
    (tmp_path / "into").mkdir()
    assert convert_lora(source, "kohya", tmp_path / "into").path == tmp_path / "into" / "mine-kohya.safetensors"
    again = convert_lora(tmp_path / "mine-peft", "onetrainer")
    assert again.path.parent == tmp_path and equal(again.lora, read_lora(source))


def test_what_cannot_be_converted_is_refused_before_a_file_is_made(source, tmp_path):
    lora = read_lora(source)
    save_file({"lora_te1_text.alpha": torch.tensor(1.0), **_raw(source)}, tmp_path / "text.safetensors")
    lokr = write_lora(tmp_path / "lokr.safetensors", random_kind(transformer(), "lokr"))
    names = {path.name for path in tmp_path.iterdir()}
    for path, dialect, dtype, says in (
        (tmp_path / "text.safetensors", "kohya", "keep", "lora_te1_text"),
        (lokr, "ai-toolkit", "keep", "no place for LoKr.*universal, lycoris"),
        (source, "webui", "keep", "no key format"),
        (source, "kohya", "int8", "no number format"),
        (tmp_path / "absent.safetensors", "kohya", "keep", "no LoRA file"),
    ):
        with pytest.raises(LoraError, match=says):
            convert_lora(path, dialect, dtype=dtype)
    assert {path.name for path in tmp_path.iterdir()} == names and lora.unmatched == ()


def _raw(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


# --- the report -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_the_size_of_the_change_is_that_of_the_whole_matrix(kind):
    lora = random_kind(transformer(), kind)
    for name, module in lora.modules.items():
        assert update_norm(module) == pytest.approx(float(module.delta().norm()), rel=1e-5), name


def test_the_report_says_what_is_known(source):
    report = lora_report(read_lora(source), "mine", source, ["a remark"])
    assert report["target"] == "all+ffs" and report["trigger"] == "sks" and report["recipe"] == {"name": "canonical"}
    assert report["bytes"] == source.stat().st_size and report["warnings"] == ["a remark"]
    assert sum(group["count"] for group in report["groups"]) == report["modules"] == 35
    group = next(g for g in report["groups"] if g["layers"] == "single mlp in")
    assert (group["count"], group["ranks"], group["alphas"], group["shapes"]) == (2, [4], [6.0], [[128, 32]])
    text = report_text(report)
    assert "WARNING: a remark" in text and "single mlp in  2      128×32" in text
    assert json.loads(json.dumps(report)) == report


@pytest.mark.parametrize("target", TARGETS)
def test_targets_are_recognised(target):
    same = {"ai-toolkit": "all+ffs"}  # one choice, two names
    assert named_target(target_modules(transformer(), target)) == same.get(target, target)
    assert named_target(["transformer_blocks.0.attn.to_q"]) is None


def test_doubts_are_warnings(tmp_path):
    tensors, _ = foreign("peft", 32, 1, 1)
    still = next(key for key in tensors if "lora_B" in key)
    tensors[still].zero_()
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 64}')
    warnings = " ".join(lora_report(read_lora(tmp_path))["warnings"])
    for word in ("1 of 8 layers change nothing", "unusually strong", "ComfyUI does not read", "peft key format"):
        assert word in warnings


def test_the_heat_map_is_bright_where_the_change_is():
    norms = dict.fromkeys(random_lora(transformer()).modules, 0.0)
    loud = "single_transformer_blocks.1.proj_mlp"
    dark, bright = heat_map(Norms(norms)), heat_map(Norms(norms | {loud: 3.0}))
    assert layer_group(loud) == "single mlp in"
    changed = [
        (x, y)
        for x in range(100, dark.width)
        for y in range(30, dark.height - 50)
        if dark.getpixel((x, y)) != bright.getpixel((x, y))
    ]
    # Its field, and that of its block above.
    assert changed and len({x for x, _ in changed}) <= 14 and len({y for _, y in changed}) <= 28


# --- the commands -----------------------------------------------------------------------------------------------------


def test_inspect_and_convert_on_the_command_line(source, tmp_path, capsys):
    assert main(["convert-lora", str(source), "--to", "ai-toolkit", "--output", str(tmp_path / "out.safetensors")]) == 0
    out, notes = capsys.readouterr()
    assert Path(out.strip()) == tmp_path / "out.safetensors" and "multiplied into" in notes
    image = tmp_path / "map.png"
    assert main(["inspect-lora", out.strip(), "--json", "--heat-map", str(image)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["dialect"] == "native" and report["alpha_source"] == "absent" and report["modules"] == 35
    assert report["converted_from"]["file"] == "mine.safetensors"
    with Image.open(image) as shown:
        assert shown.width >= 360
    assert main(["convert-lora", str(source), "--to", "kohya", "--output", str(source)]) == 1
    assert "exists already" in capsys.readouterr().err


def test_inspect_compares_with_a_base(tmp_path, source, capsys):
    trained = LoraFile(read_lora(source).modules, {"chromakit.base_sha256": "0" * 64, "chromakit.flavour": "hd"})
    path = write_lora(tmp_path / "hd.safetensors", trained)
    assert main(["inspect-lora", str(path), "--base", "tiny"]) == 0
    captured = capsys.readouterr()
    assert "trained on another base" in captured.out and "hd (sha256 000000000000…)" in captured.err
