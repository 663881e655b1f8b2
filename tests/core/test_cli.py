"""The command line, on real folders and files."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from chroma_core.cli.main import main
from chroma_core.lora.files import write_lora
from chroma_core.lora.settings import LoraSettings
from chroma_core.lora.trainable import add_trainable, trained_lora
from chroma_core.model.images import decode, preview_image, preview_matrix, read_record, to_images, to_tensor
from chroma_core.model.latents import LatentFormat
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


def test_sample_writes_images_that_tell_how_they_were_made(folder, tmp_path):
    paths = sample(
        folder, tmp_path, "--prompt", "a red [trigger]", "--prompt", "blue", "--trigger", "sks", "--seed", "7"
    )
    assert [p.name for p in paths] == ["chroma-7.png", "chroma-8.png"]
    record = read_record(paths[0])
    assert record is not None and record["prompt"] == "a red sks" and record["settings"]["seed"] == 7
    assert record["recipe"]["name"] == "canonical" and record["model"]["folder"] == Path(folder).name
    with Image.open(paths[0]) as image:
        assert image.size == (64, 64)


def test_a_prompt_that_is_cut_says_so(folder, tmp_path, capsys):
    sample(folder, tmp_path, "--prompt", "star " * 600, "--prompt", "a star", "--steps", "1")
    said = capsys.readouterr().err
    assert "“star star" in said and "tokens are cut off" in said and said.count("cut off") == 1


def test_the_record_has_the_trigger_word_and_the_loras_in_it(folder, lora_file, tmp_path):
    words = ["--prompt", "a [trigger]", "--negative", "no [trigger]", "--trigger", "sks"]
    (path,) = sample(folder, tmp_path, *words, "--lora", f"{lora_file}@0.5", "--lora-mode", "merged")
    record = read_record(path)
    assert record is not None and (record["prompt"], record["negative"]) == ("a sks", "no sks")
    assert record["loras"] == [{"path": Path(lora_file).name, "network_multiplier": 0.5, "mode": "merged"}]


def test_same_seed_same_image_and_nothing_is_overwritten(folder, tmp_path):
    (first,) = sample(folder, tmp_path, "--prompt", "red")
    (second,) = sample(folder, tmp_path, "--prompt", "red")
    assert second.name == "chroma-42-2.png" and second.read_bytes() == first.read_bytes()


def test_lora_and_strength(folder, lora_file, tmp_path):
    (plain,) = sample(folder, tmp_path, "--prompt", "red")
    (with_lora,) = sample(folder, tmp_path, "--prompt", "red", "--lora", f"{lora_file}@1.5")
    (none,) = sample(folder, tmp_path, "--prompt", "red", "--lora", f"{lora_file}@0")
    assert Image.open(with_lora).tobytes() != Image.open(plain).tobytes() == Image.open(none).tobytes()


def test_schedule_method_and_recipe_reach_the_sampler(folder, tmp_path, capsys):
    options = ["--method", "dpmpp_2m", "--spacing", "beta", "--recipe", "comfyui", "--steps", "3"]
    changes = ["--recipe-set", "visible_padding=1", "--recipe-set", "flow_shift=3"]
    (path,) = sample(folder, tmp_path, "--prompt", "red", *options, *changes)
    record = read_record(path)
    assert record is not None and record["recipe"]["flow_shift"] == 3.0 and record["recipe"]["visible_padding"] == 1
    assert (record["settings"]["method"], record["settings"]["spacing"]) == ("dpmpp_2m", "beta")
    line = "recipe comfyui with visible_padding=1, flow_shift=3.0: text_attention=unpadded, visible_padding=1"
    assert line in capsys.readouterr().err
    (plain,) = sample(folder, tmp_path, "--prompt", "red", "--steps", "3")
    assert Image.open(plain).tobytes() != Image.open(path).tobytes()


def test_the_first_block_cache_is_recorded_and_said(folder, tmp_path, capsys):
    (path,) = sample(folder, tmp_path, "--prompt", "red", "--steps", "4", "--first-block-cache", "1")
    record = read_record(path)
    assert record is not None and record["settings"]["first_block_cache"] == 1.0
    assert "approximate, 75% of the passes cut short" in capsys.readouterr().err
    (exact,) = sample(folder, tmp_path, "--prompt", "red", "--steps", "4")
    assert Image.open(exact).tobytes() != Image.open(path).tobytes()
    assert "first_block_cache" not in (read_record(exact) or {})["settings"]


def test_an_image_to_start_from_and_a_mask(folder, tmp_path):
    (source,) = sample(folder, tmp_path, "--prompt", "red", "--height", "96")
    start = ["--prompt", "blue", "--image", str(source), "--seed", "9"]
    arguments = ["sample", "--folder", folder, "--precision", "fp32", "--device", "cpu", "--output", str(tmp_path)]
    mask = Image.new("L", (64, 96), 0)
    mask.save(tmp_path / "mask.bmp")
    assert main([*arguments, *start, "--steps", "3", "--denoise", "0.3", "--mask", str(tmp_path / "mask.bmp")]) == 0
    assert main([*arguments, *start, "--steps", "3", "--start-step", "2"]) == 0
    assert main([*arguments, *start, "--steps", "3"]) == 0
    kept, some, none = (Image.open(tmp_path / f"chroma-9{end}.png") for end in ("", "-2", "-3"))
    assert kept.size == (64, 96)
    record = read_record(tmp_path / "chroma-9.png")
    assert record is not None and (record["image"], record["mask"]) == (source.name, "mask.bmp")

    def difference(a, b):
        return (to_tensor(a) - to_tensor(b)).abs().mean()

    # Nothing may change under a black mask, so what is left is the VAE's own loss; the other two go further away.
    start_from = to_tensor(Image.open(source))
    model = vae()
    with torch.no_grad():
        again = to_images(model.decode(model.encode(start_from).mean))[0]
    assert difference(kept, again) < 0.01 < difference(some, again) < difference(none, again)


def test_inspect_lora(lora_file, capsys):
    assert main(["inspect-lora", lora_file, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (
        report["ranks"] == [4] and report["alphas"] == [4.0] and report["modules"] == len(trained_lora_names())
    )  # every target of `all`
    assert main(["inspect-lora", lora_file]) == 0
    assert "rank 4" in capsys.readouterr().out


def trained_lora_names():
    from chroma_core.lora.settings import target_modules

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
        (["--prompt", "a", "--recipe-set", "noise=bf16"], "no field 'noise'"),
        (["--prompt", "a", "--denoise", "0.5"], "--image"),
        (["--prompt", "a", "--image", "missing.png"], "cannot be read"),
        (["--prompt", "a", "--end-step", "0"], "none to run"),
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


def test_images_round_trip_and_decode_rows_alone():
    image = Image.effect_noise((64, 32), 80).convert("RGB")
    back = np.asarray(to_images(to_tensor(image))[0], dtype=int)
    assert abs(back - np.asarray(image, dtype=int)).max() <= 1
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


HEAVY = {"torch", "diffusers", "transformers", "numpy", "pydantic"}
WORKING = (
    "training.jobs.manager loading.component_cache sampling.sampler sampling.text memory.plan parity cli.main".split()
)


@pytest.mark.parametrize(
    ("code", "unwanted"),
    [
        # `--help` answers at once: options that need a library's types are added when their command is asked for.
        ("from chroma_core.cli.main import command_line; command_line().format_help()", HEAVY),
        # ComfyUI's start and every process of a job: the libraries that take longer than torch come when they are used.
        (
            "import " + ", ".join(f"chroma_core.{name}" for name in WORKING),
            {"diffusers", "transformers", "peft", "accelerate", "bitsandbytes", "torchao", "torch._dynamo"},
        ),
    ],
    ids=["the commands' names", "all that works"],
)
def test_importing_takes_nothing_heavy(code: str, unwanted: set[str]):
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {code}\nprint(*sorted({unwanted!r} & set(sys.modules)))"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == ""
