"""LoRAs merged, extracted, resized, looked at by block, and with strengths by block and step: as nodes."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from _host import Host
from chroma_core.loading.load import load_transformer
from chroma_core.loading.spec import ModelSpec
from chroma_core.lora.files import read_lora, write_lora
from lora_cases import random_lora
from prompts import load, node, text_to_image

LORA = "work.safetensors"


@pytest.fixture(scope="module")
def lora(server: Host):
    """A LoRA on all layers of tiny, in ComfyUI's folder."""
    made = random_lora(load_transformer(ModelSpec("tiny", precision="fp32"), "cpu"), "all+ffs", rank=4, size=0.2)
    write_lora(server.base / "output" / "loras" / LORA, made)
    return made


def said(history: dict, key: str) -> str:
    return history["outputs"][key]["text"][0]


def applied(**inputs) -> dict:
    return node("ChromaApplyLora", model=["load", 0], lora=LORA, strength=0.5, **inputs)


def latents(server: Host, prompt: dict) -> torch.Tensor:
    """The latents that a prompt's sampler gives."""
    prompt = {**prompt, "kept": node("SaveLatent", samples=["sample", 0], filename_prefix="work")}
    history = server.run(prompt)
    (saved,) = history["outputs"]["kept"]["latents"]
    return load_file(server.base / "output" / saved["subfolder"] / saved["filename"])["latent_tensor"]


def test_merge_extract_and_resize(server: Host, lora):
    prompt = {
        **load(),
        "apply": applied(blocks="single_blocks.*:0.5"),
        "merge": node("ChromaMergeLora", model=["apply", 0], layout="original", dtype="fp32", filename="mine"),
        "extract": node(
            "ChromaExtractLora", base=["load", 0], tuned=["merge", 0], dtype="fp32", rank=4, energy=1.0, filename="out"
        ),
        "convert": node(
            "ChromaConvertLora", lora="none", lora_name=["extract", 0], dialect="kohya", dtype="keep", filename="",
            rank=2, energy=1.0,
        ),
    }  # fmt: skip
    history = server.run(prompt)
    path = server.base / "output" / "diffusion_models" / "mine.safetensors"
    with safe_open(path, framework="pt") as file:
        (entry,) = json.loads(file.metadata()["chromakit.merged"])["loras"]
    assert (entry["file"], entry["strength"], entry["blocks"]) == (LORA, 0.5, "single_blocks.*:0.5")
    assert "1 LoRA merged into mine.safetensors" in said(history, "merge")
    back = read_lora(server.base / "output" / "loras" / "out.safetensors")
    assert back.modules.keys() == lora.modules.keys()
    for name, module in lora.modules.items():
        wanted = module.delta() * (0.25 if name.startswith("single") else 0.5)
        assert (back.modules[name].delta() - wanted).norm() <= 1e-4 * wanted.norm(), name
    assert "Rank 4 in" in said(history, "extract")
    small = read_lora(server.base / "output" / "loras" / "out-r2.safetensors")
    assert "Rank 2 in" in said(history, "convert") and small.key_format == "kohya"

    before = path.stat().st_mtime_ns
    server.forget_cached_outputs()
    server.run(prompt)
    assert path.stat().st_mtime_ns == before, "what is there already is not written again"
    assert f"{path.name}" in json.dumps(server.get("/object_info/ChromaLoadModel"))


def test_the_merged_model_samples_what_the_lora_gives(server: Host, lora):
    live = {**text_to_image(model="apply"), "apply": applied()}
    merged = {
        **text_to_image(model="merge"),
        "apply": applied(),
        "merge": node("ChromaMergeLora", model=["apply", 0], layout="diffusers", dtype="fp32", filename="folder"),
    }
    one, two = latents(server, live), latents(server, merged)
    assert (one - two).abs().max() <= 1e-3 * one.abs().max()
    assert (server.base / "output" / "diffusion_models" / "folder" / "config.json").is_file()


def test_a_schedule_in_our_sampler_and_in_comfyuis_own(server: Host, lora):
    """ComfyUI's sampler tells the noise level and its list of them: the strength of each step is the same."""
    schedule = "0:0, 0.5:2, 1:0.5"
    ours = {**text_to_image(model="apply"), "apply": applied(schedule=schedule)}
    plain = {**text_to_image(model="apply"), "apply": applied()}
    theirs = {
        **{key: value for key, value in text_to_image().items() if key != "sample"},
        "apply": applied(schedule=schedule),
        "host": node("ChromaHostModel", model=["apply", 0]),
        "sigmas": node(
            "ChromaTailSigmas", steps=4, tail_bias=0.0, flow_shift="dynamic", flow_shift_value=1.0, width=64, height=64,
            denoise=1.0,
        ),
        "noise": node("RandomNoise", noise_seed=1),
        "guider": node("CFGGuider", model=["host", 0], positive=["positive", 0], negative=["negative", 0], cfg=3.0),
        "euler": node("KSamplerSelect", sampler_name="euler"),
        "sample": node(
            "SamplerCustomAdvanced", noise=["noise", 0], guider=["guider", 0], sampler=["euler", 0],
            sigmas=["sigmas", 0], latent_image=["latent", 0],
        ),
    }  # fmt: skip
    here, there, without = latents(server, ours), latents(server, theirs), latents(server, plain)
    assert (here - without).abs().max() > 0.02 * here.abs().max()
    assert (here - there).abs().max() <= 2e-3 * here.abs().max()


def test_inspect_shows_what_each_block_does(server: Host, lora):
    prompt = {
        **text_to_image(model="apply"),
        "apply": applied(),
        "look": node(
            "ChromaInspectLora", lora=LORA, model=["apply", 0], positive=["positive", 0], negative=["negative", 0],
            latent=["sample", 0], groups=3,
        ),
        "sheet": node("SaveImage", images=["look", 2], filename_prefix="sheet"),
    }  # fmt: skip
    history = server.run(prompt)
    text = said(history, "look")
    assert "‖ΔW‖ / ‖W‖" in text and "Without the LoRA the image differs by" in text and "single 0-" in text
    (name,) = [image["filename"] for image in history["outputs"]["sheet"]["images"]]
    assert (server.base / "output" / name).stat().st_size > 5000


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({"schedule": "1:0, 0:1"}, "places must rise"),
        ({"schedule": "0:0, 1:1", "mode": "merged"}, "Apply it live"),
        ({"blocks": "double_blocks.90:1"}, "double_blocks.90"),
    ],
)
def test_what_cannot_be_is_explained(server: Host, lora, inputs, says):
    prompt = {**load(), "apply": applied(**inputs), "said": node("PreviewAny", source=["apply", 1])}
    with pytest.raises(Exception, match=says) as error:
        server.run(prompt)
    assert "Traceback" not in str(error.value)


def test_merging_nothing_and_half_an_image_are_explained(server: Host, lora):
    merge = node("ChromaMergeLora", model=["load", 0], layout="original", dtype="keep", filename="")
    with pytest.raises(Exception, match="no LoRA to merge"):
        server.run({**load(), "merge": merge})
    look = node("ChromaInspectLora", lora=LORA, model=["load", 0], latent=["latent", 0])
    empty = {"latent": node("ChromaEmptyLatent", width=64, height=64, batch_size=1)}
    with pytest.raises(Exception, match="model, positive and latent"):
        server.run({**load(), **empty, "look": look})
