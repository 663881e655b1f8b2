"""The command line, on real folders and files."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from chroma_core.cli import main
from chroma_core.latents import LatentFormat
from chroma_core.lora.adapters import LoraSettings, add_trainable, trained_lora
from chroma_core.lora.formats import write_lora
from chroma_core.pictures import decode, preview_image, preview_matrix, read_record, to_pictures, to_tensor
from miniature import transformer, vae, write_model_folder

SMALL = ["--width", "64", "--height", "64", "--steps", "2", "--precision", "fp32", "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(write_model_folder(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def lora_file(tmp_path_factory) -> str:
    model = transformer()
    for parameter in add_trainable(model, LoraSettings(rank=4), seed=1):
        with torch.no_grad():
            parameter.fill_(0.1)
    path = tmp_path_factory.mktemp("lora") / "a@home.safetensors"
    write_lora(path, trained_lora(model))
    return str(path)


def sample(folder, output, *options) -> list[Path]:
    before = set(output.glob("*.png"))
    assert main(["sample", "--folder", folder, *SMALL, "--output", str(output), *options]) == 0
    return sorted(set(output.glob("*.png")) - before)


def test_sample_writes_pictures_that_tell_how_they_were_made(folder, tmp_path):
    paths = sample(
        folder, tmp_path, "--prompt", "a red [trigger]", "--prompt", "blue", "--trigger", "sks", "--seed", "7"
    )
    assert [p.name for p in paths] == ["chroma-7.png", "chroma-8.png"]
    record = read_record(paths[0])
    assert record is not None and record["prompt"] == "a red sks" and record["settings"]["seed"] == 7
    assert record["recipe"]["name"] == "canonical" and record["model"]["folder"] == folder
    assert Image.open(paths[0]).size == (64, 64)


def test_same_seed_same_picture_and_nothing_is_overwritten(folder, tmp_path):
    (first,) = sample(folder, tmp_path, "--prompt", "red")
    (second,) = sample(folder, tmp_path, "--prompt", "red")
    assert second.name == "chroma-42-2.png" and second.read_bytes() == first.read_bytes()


def test_lora_and_strength(folder, lora_file, tmp_path):
    (plain,) = sample(folder, tmp_path, "--prompt", "red")
    (with_lora,) = sample(folder, tmp_path, "--prompt", "red", "--lora", f"{lora_file}@1.5")
    (none,) = sample(folder, tmp_path, "--prompt", "red", "--lora", f"{lora_file}@0")
    assert Image.open(with_lora).tobytes() != Image.open(plain).tobytes() == Image.open(none).tobytes()


def test_inspect_lora(lora_file, capsys):
    assert main(["inspect-lora", lora_file, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (
        report["ranks"] == [4] and report["alphas"] == [4.0] and report["modules"] == len(trained_lora_names())
    )  # every target of `all`
    assert main(["inspect-lora", lora_file]) == 0
    assert "rank 4" in capsys.readouterr().out


def trained_lora_names():
    from chroma_core.lora.targets import target_modules

    return target_modules(transformer(), "all")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "a [trigger]"], "no trigger word"),
        (["--prompt", "a", "--width", "8"], "width is 8"),
        (["--prompt", "a", "--precision", "int2"], "no precision 'int2'"),
        (["--prompt", "a", "--lora", "missing.safetensors"], "missing.safetensors"),
        (["--prompt", "a", "--lora", "x@strong"], "must be a number"),
        (["--prompt", "a", "--flow-shift", "-2"], "flow shift"),
        (["--prompt", "a", "--device", "warp"], "not a device"),
    ],
)
def test_bad_input_is_one_paragraph(folder, tmp_path, capsys, arguments, message):
    assert main(["sample", "--folder", folder, *SMALL, "--output", str(tmp_path), *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_module_entry_point_tells_the_truth():
    run = subprocess.run(
        [sys.executable, "-m", "chroma_core", "inspect-lora", "missing.safetensors"],
        cwd=Path(__file__).parents[2], capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 1 and run.stderr.startswith("error: ") and "missing.safetensors" in run.stderr


def test_pictures_round_trip_and_decode_rows_alone():
    picture = Image.effect_noise((64, 32), 80).convert("RGB")
    assert to_pictures(to_tensor(picture))[0].tobytes() == picture.tobytes()
    model, latents = vae(), torch.randn(2, 16, 4, 4)
    assert decode(model, latents)[1].tobytes() == decode(model, latents[1:])[0].tobytes()


def test_preview_is_the_best_linear_guess():
    model = vae()
    matrix = preview_matrix(model)
    assert matrix.shape == (17, 3)
    preview = preview_image(torch.zeros(1, 16, 4, 8), matrix)
    assert preview.size == (256, 128)
    grey = to_tensor(preview)[0, :, 0, 0]
    assert torch.allclose(grey, matrix[-1].clamp(-1, 1), atol=1 / 127)
    assert LatentFormat.of(model) == LatentFormat()
