"""The command line, on real folders and files."""

import json
import os
import shutil
import subprocess
import sys
from functools import reduce
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from chroma_core.cli.main import main
from chroma_core.data.scan import DatasetConfig
from chroma_core.lora.files import write_lora
from chroma_core.lora.settings import LoraSettings
from chroma_core.lora.trainable import add_trainable, trained_lora
from chroma_core.model.images import decode, preview_image, preview_matrix, read_record, to_images, to_tensor
from chroma_core.model.latents import LatentFormat
from chroma_core.training.config import TrainingConfig
from chroma_core.training.config.recipes import RECIPE_TABLE
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


MISSPELT = (
    (["trian"], "Did you mean 'train'?"),
    (["train", "job.toml", "--otput", "x"], "there is no option --otput. Did you mean '--output'?"),
    (["sample", "--promt", "a star"], "Did you mean '--prompt'?"),
    (["jobs", "shwo"], "Did you mean 'show'?"),
    (["jobs", "list", "--jsn"], "Did you mean '--json'?"),
    (["jobs", "show", "my-lora-1234abcf"], "Did you mean 'my-lora-1234abcd'?"),
    (["resume", "my-lora-1234abcf"], "There is no training job"),
    (["plan", "--flavour", "bse"], "Did you mean 'base'?"),
    (["plan", "--precision", "INT-8"], "Did you mean 'int8'?"),
    (["plan", "--optimizer", "adamv"], "Did you mean 'adamw'?"),
    (["parity", "--factors", "recpie"], "Did you mean 'recipe'?"),
    (["sample", "--prompt", "a", "--recipe-set", "noise_dtyp=bf16"], "Did you mean 'noise_dtype'?"),
    (["train", "names.toml"], "stpes is not a known option (did you mean steps?)"),
    (["train", "names.toml"], "rank is not a known option (did you mean lora.rank?)"),
    (["train", "names.toml"], "lora.steps is not a known option (did you mean steps?)"),
    (
        ["train", "names.toml"],
        "previews.prompts.0.PreviewPrompt.negativ is not a known option (did you mean negative?)",
    ),
    (["train", "values.toml"], "Did you mean 'constant'?"),
    (["train", "model.toml"], "Did you mean 'flavour'?"),
)
NAMES = """
name = "a"
stpes = 1
rank = 4
dataset.folder = "."
lora.steps = 4
previews.prompts = [{ prompt = "a", negativ = "b" }]
"""


def test_what_is_misspelt_is_named_with_what_was_meant(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "output" / "jobs" / "my-lora-1234abcd").mkdir(parents=True)
    (tmp_path / "output" / "jobs" / "my-lora-1234abcd" / "job.json").write_text("{}")
    (tmp_path / "names.toml").write_text(NAMES)
    (tmp_path / "values.toml").write_text('name = "a"\nlr_schedule = "constnt"\ndataset.folder = "."')
    (tmp_path / "model.toml").write_text('name = "a"\nmodel.flavor = "tiny"\ndataset.folder = "."')
    for arguments, message in MISSPELT:
        try:
            status = main(arguments)
        except SystemExit as usage:
            status = usage.code
        said = capsys.readouterr().err
        assert status in (1, 2) and message in said, (arguments, said)


WRONG = """
train gone.toml
train --resume gone
resume gone
jobs show gone
init gone
sample --prompt a --flavour tiny --width 8
fetch --flavour hd --revision ../x
quantise --flavour tiny --output x
inspect-model gone
import-config gone
parity --factors gone
request gone
export-workflow gone
inspect-lora gone
convert-lora gone --to universal
resize-lora gone --rank 2
merge-lora tiny --lora gone --output m.safetensors
extract-lora tiny gone --rank 2 --output e.safetensors
plan --optimizer gone
"""
ALONE = """
import os, shlex, sys
from chroma_core.cli.main import main
for number, line in enumerate(sys.argv[1:]):
    os.dup2(os.open(f"{number}.txt", os.O_WRONLY | os.O_CREAT), 2)
    assert main(shlex.split(line)) == 1, line
"""


def test_an_error_stands_alone(tmp_path):
    """In a process of its own, where libraries are imported anew: nothing of theirs, and no progress bar."""
    commands = WRONG.strip().splitlines()
    where = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", ALONE, *commands], cwd=tmp_path, env=where, check=True, capture_output=True)
    for number, command in enumerate(commands):
        said = (tmp_path / f"{number}.txt").read_text().splitlines()
        ours = [line for line in said if not line.startswith("recipe canonical")]
        assert len(ours) == 1 and ours[0].startswith("error: "), (command, said)


def test_a_job_file_for_a_folder(tmp_path, capsys):
    images, file = Path(__file__).parents[2] / "example_datasets" / "sks_emblem", tmp_path / "job.toml"
    command = ["init", str(images), "--flavour", "tiny", "--trigger", "sks", "--output", str(file)]
    assert main(command) == 0
    assert "16 images" in (said := capsys.readouterr().out) and "Train at 64 pixels" in said
    config = TrainingConfig.from_toml(file)
    assert (config.name, config.model.flavour, config.hold_out) == ("sks_emblem", "tiny", 0.1)
    assert config.dataset == DatasetConfig(folder=str(images), trigger="sks")
    assert file.read_text().count("\n# ") > 200, "every other option stands there as a comment"
    assert main(command) == 1 and "exists already" in capsys.readouterr().err
    other = [*command[:-1], str(tmp_path / "style.toml"), "--recipe", "style"]
    assert main(other) == 0
    style = TrainingConfig.from_toml(tmp_path / "style.toml")
    wanted = {path: value for path, (value, _) in RECIPE_TABLE["style"].options.items() if path != "model.flavour"}
    for path, value in wanted.items():
        found = reduce(getattr, path.split("."), style)
        assert found == value or path in ("model.precision", "gradient_checkpointing"), (path, found)
    capsys.readouterr()
    assert main([*other[:3], "base", "--output", str(tmp_path / "no.toml"), "--recipe", "style"]) == 1
    assert "trigger" in capsys.readouterr().err


def completed(script: str, *words: str) -> list[str]:
    """What bash would offer for the last of these words."""
    ask = 'COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _chromakit; printf "%s\\n" "${COMPREPLY[@]}"'
    found = subprocess.run(
        ["bash", "-c", f"{script}\n{ask}", "bash", *words], capture_output=True, text=True, check=True
    )
    return found.stdout.split()


def test_a_shell_completes_the_commands(capsys):
    scripts = {}
    for shell in ("bash", "zsh", "fish"):
        assert main(["completion", shell]) == 0
        scripts[shell] = capsys.readouterr().out
    assert completed(scripts["bash"], "chromakit", "in") == ["init", "inspect-model", "inspect-lora"]
    assert completed(scripts["bash"], "chromakit", "jobs", "") == ["list", "show", "use", "resume"]
    assert completed(scripts["bash"], "chromakit", "train", "--output", "") == []
    assert completed(scripts["bash"], "chromakit", "jobs", "use", "--j") == ["--json"]
    assert completed(scripts["bash"], "chromakit", "train", "--sharding", "") == ["ddp", "fsdp"]
    assert completed(scripts["bash"], "chromakit", "train", "job") == [], "then bash completes names of files"
    assert scripts["zsh"].endswith(scripts["bash"])
    seen = "complete -c chromakit -n '__fish_seen_subcommand_from train'"
    assert f"{seen} -l sharding" in scripts["fish"] and "-x -a 'ddp fsdp'" in scripts["fish"]
    for shell in ("zsh", "fish"):  # where there is one, it can read it
        if shutil.which(shell):
            subprocess.run([shell, "-n"], input=scripts[shell], text=True, check=True)


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
        # An image: PyTorch's compiler comes as soon as anything is drawn on the meta device.
        (
            "from chroma_core.cli.main import main; main('sample --flavour tiny --steps 1 --prompt a'.split())",
            {"diffusers", "torch._dynamo"},
        ),
    ],
    ids=["the commands' names", "all that works", "an image"],
)
def test_importing_takes_nothing_heavy(code: str, unwanted: set[str], tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {code}\nprint(*sorted({unwanted!r} & set(sys.modules)))"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == ""
