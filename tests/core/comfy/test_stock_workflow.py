"""The stock workflow's numbers, and what it refuses: everything that needs no host."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from chroma_core.cli.main import main
from chroma_core.comfy.stock import PREVIEW_KEY, literal, stock_preview, stock_prompt
from chroma_core.errors import ChromaKitError
from chroma_core.lora.files import write_lora
from chroma_core.lora.modules import LoraFile, LoraModule
from chroma_core.sampling.recipe import RECIPES
from chroma_core.sampling.sampler import SamplingSettings
from chroma_core.sampling.schedule import sampling_sigmas

ATTENDED = RECIPES["comfyui"].override({"visible_padding": 1})
PREVIEW = {"prompt": "a sks cat", "negative": "", "width": 768, "height": 512}


def lora(folder: Path, recipe: str = "canonical", **header: str | None) -> Path:
    """A LoRA with a header like a job's; None leaves a field out."""
    written: dict[str, str | None] = {
        "chromakit.flavour": "hd",
        "chromakit.trigger": "sks",
        "chromakit.recipe": json.dumps(RECIPES[recipe].to_dict()),
        PREVIEW_KEY: preview(),
    }
    metadata = {key: value for key, value in {**written, **header}.items() if value is not None}
    modules = {"transformer_blocks.0.attn.to_q": LoraModule(torch.ones(2, 4), torch.ones(4, 2), 2.0)}
    write_lora(folder / "a.safetensors", LoraFile(modules, metadata))
    return folder / "a.safetensors"


def preview(**settings: object) -> str:
    chosen = SamplingSettings(steps=20, seed=9)
    return json.dumps({**PREVIEW, "settings": {**chosen.to_dict(), **settings}})


def test_the_header_is_repeated_and_options_go_before_it(tmp_path: Path):
    prompt = stock_prompt(stock_preview(lora(tmp_path)))
    inputs = {key: node["inputs"] for key, node in prompt.items()}
    assert inputs["model"]["unet_name"] == "Chroma1-HD.safetensors" and inputs["lora"]["lora_name"] == "a.safetensors"
    assert (
        (inputs["latent"]["width"], inputs["latent"]["height"])
        == (768, 512)
        == (
            inputs["shift"]["width"],
            inputs["shift"]["height"],
        )
    )
    assert (inputs["noise"]["noise_seed"], inputs["sigmas"]["steps"], inputs["guider"]["cfg"]) == (9, 20, 4.0)
    assert (inputs["clip"]["type"], inputs["padding"]["min_padding"]) == ("mochi", 1)
    changed = stock_preview(lora(tmp_path), {"prompt": "a [trigger]", "width": 1000, "seed": 1, "guidance": 0.5})
    inputs = {key: node["inputs"] for key, node in stock_prompt(changed, vae="mine.safetensors").items()}
    assert (inputs["positive"]["text"], inputs["latent"]["width"], inputs["noise"]["noise_seed"]) == ("a sks", 992, 1)
    assert inputs["guider"]["cfg"] == 1.0 and inputs["vae"]["vae_name"] == "mine.safetensors"


@pytest.mark.parametrize(
    "settings",
    [{"steps": 28}, {"spacing": "beta"}, {"tail_bias": 0.5}, {"flow_shift": 3.0}, {"flow_shift": "none", "steps": 150}],
)
def test_manual_sigmas_are_ours_to_the_last_bit(tmp_path: Path, settings: dict):
    path = lora(tmp_path, **{PREVIEW_KEY: preview(**settings)})
    node = stock_prompt(stock_preview(path))["sigmas"]
    assert node["class_type"] == "ManualSigmas"
    written = torch.FloatTensor([float(value) for value in node["inputs"]["sigmas"].split(",")])
    own = {"steps": 20, "tail_bias": 0.0, "flow_shift": "dynamic", **settings}
    assert torch.equal(written, sampling_sigmas(own.pop("steps"), 768 * 512 // 256, **own))


def test_the_unpadded_recipe_needs_no_options_node(tmp_path: Path):
    prompt = stock_prompt(stock_preview(lora(tmp_path, "comfyui")))
    assert prompt["clip"]["inputs"]["type"] == "chroma" and "padding" not in prompt


def test_brackets_are_literal():
    assert literal("a (red:1.2) cat \\o/") == "a \\(red:1.2\\) cat \\o/"


@pytest.mark.parametrize(
    ("recipe", "header", "message"),
    [
        ("ai-toolkit", {}, "no T5 that attends to padding"),
        ("diffusers", {}, "noise_dtype model"),
        ("comfyui", {"chromakit.recipe": json.dumps(ATTENDED.to_dict())}, "no visible_padding 1 that T5 attends to"),
        ("canonical", {PREVIEW_KEY: preview(denoise=0.5)}, "denoise 0.5"),
        ("canonical", {PREVIEW_KEY: preview(method="unipc")}, "no method unipc"),
        ("canonical", {PREVIEW_KEY: None}, "records no preview"),
        ("canonical", {PREVIEW_KEY: "{"}, "damaged header"),
        ("canonical", {PREVIEW_KEY: preview(colour="red")}, "does not know"),
        ("canonical", {"chromakit.flavour": "tiny"}, "was trained on tiny"),
    ],
)
def test_what_stock_nodes_cannot_do_is_said(tmp_path: Path, recipe: str, header: dict, message: str):
    with pytest.raises(ChromaKitError, match=message):
        stock_preview(lora(tmp_path, recipe, **header))


def test_the_command(tmp_path: Path, capsys):
    output = tmp_path / "flow.json"
    arguments = ["export-workflow", str(lora(tmp_path)), "--output", str(output), "--transformer", "my.safetensors"]
    assert main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == {"workflow": str(output), "api": str(tmp_path / "flow_api.json"), "remarks": []}
    assert json.loads((tmp_path / "flow_api.json").read_text())["model"]["inputs"]["unet_name"] == "my.safetensors"
    graph = json.loads(output.read_text())
    assert "768×512, 20 steps" in graph["nodes"][-1]["widgets_values"][0]
    assert main(["export-workflow", str(tmp_path / "gone.safetensors")]) == 1
