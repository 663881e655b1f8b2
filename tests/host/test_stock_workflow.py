"""The exported stock workflow, run node by node with the host's own node classes on a Chroma of the real depth."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

import native_lora_check
from _host import Host
from chroma_core.comfy.stock import PREVIEW_KEY, StockPreview, export_workflow, stock_preview, stock_prompt
from chroma_core.comfy.window import KINDS
from chroma_core.loading.load import load_vae
from chroma_core.loading.spec import ModelSpec
from chroma_core.lora.adapters import attach, detach
from chroma_core.lora.files import read_lora, write_lora
from chroma_core.lora.modules import LoraFile, LoraModule
from chroma_core.model.images import decode
from chroma_core.model.latents import FLUX_LATENTS
from chroma_core.model.text_encoder import T5Encoder
from chroma_core.model.transformer import ChromaTransformer
from chroma_core.names.transformer import to_original
from chroma_core.sampling.sampler import SamplingSettings, sample
from chroma_core.sampling.text import TextEncoder
from lora_cases import random_lora
from miniature import REAL_DEPTH
from tools.workflows.build import is_widget, ordered_inputs

TEXT = {"vocab_size": 32128, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
FILES = ("unet_name", "clip_name", "vae_name", "lora_name")
SETTINGS = {"steps": 8, "guidance": 4.0, "seed": 7}


@dataclass
class World:
    """The same weights twice: ours, and inside the host's own classes."""

    transformer: ChromaTransformer
    encoder: TextEncoder
    vae: Any
    load: dict[str, Callable[..., tuple]]


@pytest.fixture(scope="module")
def world(comfy: ModuleType) -> World:
    """Random weights, large enough that every block, token and pad token matters."""
    import comfy.model_management
    import comfy.sd
    import comfy.text_encoders.genmo
    import comfy.text_encoders.pixart_t5

    logging.getLogger().setLevel(logging.WARNING)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ours = ChromaTransformer(**REAL_DEPTH)
        torch.nn.init.normal_(ours.distilled_guidance_layer.out_proj.weight, std=0.05)
        t5 = T5Encoder(**TEXT, feed_forward_proj="gated-gelu")
        for parameter in t5.parameters():  # its first weights are so small that attention sees nothing
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.3)
    ours.requires_grad_(False).eval()
    tokens = Path(comfy.sd.__file__).parent / "text_encoders" / "t5_tokenizer"
    encoder = TextEncoder(t5.requires_grad_(False).eval(), AutoTokenizer.from_pretrained(tokens))
    vae = load_vae(ModelSpec("tiny"), "cpu")

    patcher = native_lora_check.build_native(REAL_DEPTH)
    patcher.model.diffusion_model.load_state_dict(to_original(ours.state_dict(), norm_leaf="weight"))
    targets = {
        "chroma": (comfy.text_encoders.pixart_t5.pixart_te(), comfy.text_encoders.pixart_t5.PixArtTokenizer),
        "mochi": (comfy.text_encoders.genmo.mochi_te(), comfy.text_encoders.genmo.MochiT5Tokenizer),
    }

    def load_clip(type: str, **_: Any) -> tuple:
        """CLIPLoader's classes of that type, with a small T5 for the published one."""

        class Target:
            params: dict[str, Any] = {}
            clip, tokenizer = targets[type]

        small = {"t5xxl_model_config": dict(TEXT), "dtype": torch.float32}
        clip = comfy.sd.CLIP(Target, parameters=1, model_options=small, disable_dynamic=True)
        missing, unexpected = clip.load_sd(t5.state_dict())
        assert unexpected == ["encoder.embed_tokens.weight"] and all("logit_scale" in name for name in missing)
        return (clip,)

    return World(
        ours,
        encoder,
        vae,
        {"UNETLoader": lambda **_: (patcher,), "CLIPLoader": load_clip, "VAELoader": lambda **_: (None,)},
    )


def with_header(path: Path, modules: dict[str, Any]) -> Path:
    """A LoRA file with the header that training writes."""
    preview = {"prompt": "a sks emblem (red) on a \\ wall", "negative": "blurry", "width": 96, "height": 64}
    preview["settings"] = SamplingSettings(**SETTINGS).to_dict()
    header = {"chromakit.flavour": "base", "chromakit.trigger": "sks", PREVIEW_KEY: json.dumps(preview)}
    write_lora(path, LoraFile(modules, header))
    return path


@pytest.fixture(scope="module")
def lora_file(world: World, tmp_path_factory) -> Path:
    """A LoRA on all 419 layers."""
    modules = random_lora(world.transformer, "all+ffs", size=0.3).modules
    return with_header(tmp_path_factory.mktemp("stock") / "sks.safetensors", modules)


def ours(world: World, preview: StockPreview) -> Tensor:
    """Our preview's latents in the transformer's space."""
    attach(world.transformer, read_lora(preview.lora), preview.strength)
    try:
        return sample(
            world.transformer,
            [world.encoder.encode(preview.prompt, preview.recipe)],
            world.encoder.encode(preview.negative, preview.recipe),
            width=preview.width,
            height=preview.height,
            settings=preview.settings,
            recipe=preview.recipe,
        )
    finally:
        detach(world.transformer, "lora")


def run_nodes(world: World, prompt: dict, lora: Path, until: str = "sample") -> tuple:
    """The outputs of node `until`, every node executed by the host's own class; the loaders give the small parts."""
    import folder_paths
    from comfy_extras import nodes_cond, nodes_custom_sampler, nodes_model_advanced, nodes_sd3

    import nodes

    assert hasattr(nodes, "NODE_CLASS_MAPPINGS"), "the host's nodes, not ours"
    modules = (nodes_cond, nodes_custom_sampler, nodes_model_advanced, nodes_sd3)
    folder_paths.add_model_folder_path("loras", str(lora.parent), is_default=True)
    done: dict[str, tuple] = {}
    for key, entry in prompt.items():
        inputs = {k: done[v[0]][v[1]] if isinstance(v, list) else v for k, v in entry["inputs"].items()}
        type_ = entry["class_type"]
        with torch.inference_mode():
            if type_ in world.load:
                done[key] = world.load[type_](**inputs)
            elif type_ in nodes.NODE_CLASS_MAPPINGS:
                node = nodes.NODE_CLASS_MAPPINGS[type_]()
                done[key] = getattr(node, node.FUNCTION)(**inputs)
            else:
                class_ = next(getattr(m, type_) for m in modules if hasattr(m, type_))
                out = getattr(class_, "execute", None) or getattr(class_(), class_.FUNCTION)
                result = out(**inputs)
                done[key] = tuple(getattr(result, "result", result))
        if key == until:
            return done[key]
    raise KeyError(until)


CASES: dict[str, dict[str, Any]] = {
    "as recorded, the host's simple schedule": {},
    "another size, and steps that its table has no entries for": {"width": 64, "height": 160, "steps": 6},
    "no guidance, strength": {"guidance": 0.5, "steps": 4, "strength": -0.6},
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_the_hosts_nodes_repeat_our_preview(world: World, lora_file: Path, changes: dict[str, Any]):
    preview = stock_preview(lora_file, changes)
    prompt = stock_prompt(preview)
    expected = ours(world, preview)
    (out, *_) = run_nodes(world, prompt, lora_file)
    theirs = FLUX_LATENTS.to_model(out["samples"])
    error = (theirs - expected).abs().max().item()
    print(f"{prompt['sigmas']['class_type']}: largest difference {error:.2e}, of {expected.abs().max():.2f}")
    assert error <= 1e-3
    images = decode(world.vae, theirs), decode(world.vae, expected)
    difference = [torch.tensor(list(p[0].tobytes()), dtype=torch.int) for p in images]
    assert (difference[0] - difference[1]).abs().max() <= 1


def test_the_clip_type_chroma_would_paint_another_image(world: World, lora_file: Path):
    """Why the workflow says `mochi`: with `chroma` T5 attends to the visible pad token."""
    preview = stock_preview(lora_file, {"steps": 1})
    prompt = stock_prompt(preview)
    masked, unmasked = (
        run_nodes(world, {**prompt, "clip": {**prompt["clip"], "inputs": {"type": type_}}}, lora_file, "positive")[0]
        for type_ in ("mochi", "chroma")
    )
    (expected,) = world.encoder.encode(preview.prompt).states[None]
    assert (masked[0][0][0] - expected).abs().max() <= 1e-5
    assert (unmasked[0][0][0] - expected).abs().max() > 1e-2


def test_the_windows_form_knows_the_hosts_nodes(server: Host, tmp_path: Path):
    """Slots and widgets as the running host declares them, and every choice is one that it offers."""
    module = LoraModule(torch.ones(2, 4), torch.ones(4, 2), 2.0)
    lora_file = with_header(tmp_path / "a.safetensors", {"transformer_blocks.0.attn.to_q": module})
    about = server.get("/object_info")
    for type_, kind in KINDS.items():
        specs = ordered_inputs(about[type_])
        found = [(n, "COMBO" if isinstance(s[0], list) else s[0], is_widget(s)) for n, s in specs.items()]
        assert sorted(found) == sorted(kind.inputs), type_
        widgets = [name for name, _, widget in found if widget]
        assert widgets == [name for name, _, widget in kind.inputs if widget], type_
        outputs = list(zip(about[type_]["output_name"], about[type_]["output"], strict=True))
        assert tuple(map(tuple, outputs[: len(kind.outputs)])) == kind.outputs, type_
    for part, changes in (("simple", {}), ("manual", {"steps": 7})):
        window, api, _ = export_workflow(lora_file, tmp_path / f"{part}.json", changes)
        graph, prompt = json.loads(window.read_text()), json.loads(api.read_text())
        assert [node["type"] for node in graph["nodes"][:-1]] == [node["class_type"] for node in prompt.values()]
        assert all(about[node["class_type"]]["python_module"] != "custom_nodes.chromakit" for node in prompt.values())
        for node in prompt.values():
            for name, value in node["inputs"].items():
                kind, *options = ordered_inputs(about[node["class_type"]])[name]
                choices = kind if isinstance(kind, list) else options[0].get("options") if options else None
                if choices and name not in FILES:
                    assert value in choices, (node["class_type"], name)
        places = [tuple(node["pos"]) for node in graph["nodes"]]
        assert len(set(places)) == len(places)
        ends = {(link[0], link[3], link[4]) for link in graph["links"]}
        wired = {
            (slot["link"], n["id"], i) for n in graph["nodes"] for i, slot in enumerate(n["inputs"]) if slot["link"]
        }
        assert ends == wired
