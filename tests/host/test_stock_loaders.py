"""Graphs that mix ComfyUI's own loaders, LoRA nodes and ours: the same file gives the same bits, and no second copy."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import native_lora_check
from _host import Host, PromptFailed
from chroma_core.loading.load import transformer_outline
from chroma_core.loading.spec import ModelSpec
from chroma_core.lora.files import read_lora, write_lora
from chroma_core.names.transformer import to_original
from lora_cases import equal, random_lora
from miniature import REAL_DEPTH
from prompts import Prompt, at_defaults, node, text_to_image
from weight_files import remove_files

TINY = Path(__file__).resolve().parents[2] / "chroma_core" / "assets" / "tiny"
FILES = {"transformer": "stock.safetensors", "text_encoder": "stock_t5.safetensors", "vae": "stock_vae.safetensors"}
FOLDERS = {"transformer": "diffusion_models", "text_encoder": "text_encoders", "vae": "vae"}


@pytest.fixture(scope="module", autouse=True)
def lora(server: Host) -> Iterator[str]:
    """tiny's parts as single files in ComfyUI's folders, and a LoRA for it by its name."""
    models = server.base / "models"
    for part, name in FILES.items():
        (path,) = (TINY / part).glob("*.safetensors")
        (models / FOLDERS[part]).mkdir(parents=True, exist_ok=True)
        if part == "transformer":
            save_file(to_original(load_file(path)), models / FOLDERS[part] / name)
        else:
            shutil.copy(path, models / FOLDERS[part] / name)
    loras = server.base / "output" / "loras"
    loras.mkdir(parents=True, exist_ok=True)
    write_lora(
        loras / "stock.safetensors",
        random_lora(transformer_outline(ModelSpec("tiny")), "all", rank=2, alpha=3.0, size=0.2),
    )
    yield "stock.safetensors"
    for folder in FOLDERS.values():
        remove_files(models / folder)


def stock(server: Host, **links: Any) -> Prompt:
    """An image by our sampler from the files that ComfyUI's loaders name; the same by ours is `text_to_image`."""
    prompt = text_to_image()
    return {
        **prompt,
        "unet": node("UNETLoader", unet_name=FILES["transformer"], weight_dtype="default"),
        "clip": node("CLIPLoader", clip_name=FILES["text_encoder"], type="chroma"),
        "vae": node("VAELoader", vae_name=FILES["vae"]),
        "ours": prompt["load"],
        "load": at_defaults(
            server,
            "ChromaFromHost",
            **{"model": ["unet", 0], "clip": ["clip", 0], "vae": ["vae", 0], **links},
            flavour="tiny",
            precision="fp32",
            text_precision="fp32",
        ),
        "decode": node("VAEDecode", samples=["sample", 0], vae=["ours", 2]),
    }


def image(server: Host, prompt: Prompt) -> np.ndarray:
    return np.asarray(server.images(server.run(prompt))[0])


def test_the_files_of_stock_loaders_give_the_bits_of_our_loader_and_are_not_loaded_twice(server: Host, lora: str):
    """ComfyUI cannot even load this transformer, whose widths its detection does not know: it was never asked to."""
    mixed = stock(server)
    ours = text_to_image()
    ours["load"]["inputs"].update(FILES)
    plain = image(server, ours)
    assert np.array_equal(image(server, mixed), plain)
    with pytest.raises(PromptFailed, match="positional dim"):
        server.run(mixed | {"load": stock(server, model=["through", 0])["load"], "through": through("unet")})

    mixed["load"]["inputs"]["model"] = ["with lora", 0]
    mixed["with lora"] = node("LoraLoaderModelOnly", model=["unet", 0], lora_name=lora, strength_model=0.5)
    ours["sample"]["inputs"]["model"] = ["apply", 0]
    ours["apply"] = node("ChromaApplyLora", model=["load", 0], lora=lora, strength=0.5)
    changed = image(server, ours)
    assert np.array_equal(image(server, mixed), changed) and not np.array_equal(plain, changed)


def through(source: str) -> dict[str, Any]:
    """A node that the graph is not read through."""
    return node("ModelSamplingFlux", model=[source, 0], max_shift=1.15, base_shift=0.5, width=64, height=64)


def test_what_cannot_be_taken_over_is_refused(server: Host):
    wrong = stock(server)
    wrong["unet"]["inputs"]["unet_name"] = "misplaced.safetensors"
    misplaced = server.base / "models" / "diffusion_models" / "misplaced.safetensors"
    shutil.copy(server.base / "models" / "vae" / FILES["vae"], misplaced)
    without_file = stock(server, model=["theirs", 0])
    without_file["theirs"] = node("ChromaHostModel", model=["ours", 0])
    for prompt, says in (
        (wrong, "misplaced.safetensors"),
        (without_file, "does not say which file"),
        (stock(server, vae=["ours", 2]), "does not say which file"),
        (stock(server, model="a text"), "takes nothing but a link, e.g. from Load Diffusion Model"),
    ):
        with pytest.raises(PromptFailed, match=says):
            server.run(prompt)
    misplaced.unlink()


def test_a_lora_over_a_link_is_that_of_its_file(server: Host, lora: str):
    """A LORA_MODEL as ComfyUI's Train LoRA gives one, into Chroma Apply LoRA and into ComfyUI's Save LoRA Weights."""
    by_file = text_to_image()
    by_file["sample"]["inputs"]["model"] = ["apply", 0]
    by_file["apply"] = node("ChromaApplyLora", model=["load", 0], lora=lora, strength=0.5)
    by_link = by_file | {
        "convert": node("ChromaConvertLora", lora=lora, dialect="kohya", dtype="keep", filename="linked"),
        "apply": node("ChromaApplyLora", model=["load", 0], lora="none", strength=0.5, lora_model=["convert", 0]),
        "theirs": node("SaveLoRA", lora=["convert", 0], prefix="copies/linked"),
    }
    assert np.array_equal(image(server, by_link), image(server, by_file))
    (kept,) = (server.base / "output" / "chromakit" / "lora_models").iterdir()
    (copy,) = (server.base / "output" / "copies").glob("linked*")
    assert equal(read_lora(kept), read_lora(copy))


def test_a_loaded_value_says_its_file_unless_it_was_changed(pack_host: ModuleType):
    """Where the graph does not say it: the note of ComfyUI's loaders."""
    import comfy.sd
    from comfy_extras.nodes_model_advanced import ModelSamplingFlux

    patcher = native_lora_check.build_native(REAL_DEPTH)
    refused = pack_host.provenance.ConfigError
    with pytest.raises(refused, match="does not say which file"):
        pack_host.file_of(patcher, "transformer")
    patcher.cached_patcher_init = (comfy.sd.load_diffusion_model, ("a.safetensors", {}))
    assert pack_host.file_of(patcher.clone(), "transformer").path == "a.safetensors"
    (shifted,) = ModelSamplingFlux().patch(patcher, 1.15, 0.5, 64, 64)
    with pytest.raises(refused, match=r"MODEL was changed .*model_sampling"):
        pack_host.file_of(shifted, "transformer")
    key = "diffusion_model.img_in.weight"
    with_lora = patcher.clone()
    with_lora.add_patches({key: ("diff", (torch.zeros_like(patcher.model.state_dict()[key]),))})
    with pytest.raises(refused, match="patches on 1 weights"):
        pack_host.file_of(with_lora, "transformer")
