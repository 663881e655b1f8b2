"""The window's form of a stock workflow: the same nodes with slots, widgets and places, and a note that explains it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .graph import Prompt

COLUMN, GAP, WIDTH, NOTE_WIDTH = 380, 55, 330, 420


@dataclass(frozen=True)
class Kind:
    """A ComfyUI node: title, column, inputs as (name, type, whether it is a widget), outputs as (name, type)."""

    title: str
    column: int
    inputs: tuple[tuple[str, str, bool], ...]
    outputs: tuple[tuple[str, str], ...] = ()
    tall: int = 0


def _widgets(**types: str) -> tuple[tuple[str, str, bool], ...]:
    return tuple((name, kind, True) for name, kind in types.items())


def _links(**types: str) -> tuple[tuple[str, str, bool], ...]:
    return tuple((name, kind, False) for name, kind in types.items())


def _same(*names: str) -> tuple[tuple[str, str], ...]:
    return tuple((name, name) for name in names)


KINDS: dict[str, Kind] = {
    "UNETLoader": Kind("Load Diffusion Model", 0, _widgets(unet_name="COMBO", weight_dtype="COMBO"), _same("MODEL")),
    "CLIPLoader": Kind("Load T5", 0, _widgets(clip_name="COMBO", type="COMBO", device="COMBO"), _same("CLIP")),
    "VAELoader": Kind("Load VAE", 0, _widgets(vae_name="COMBO"), _same("VAE")),
    "LoraLoaderModelOnly": Kind(
        "LoRA", 1, _links(model="MODEL") + _widgets(lora_name="COMBO", strength_model="FLOAT"), _same("MODEL")
    ),
    "T5TokenizerOptions": Kind(
        "Visible padding", 1, _links(clip="CLIP") + _widgets(min_padding="INT", min_length="INT"), _same("CLIP")
    ),
    "EmptySD3LatentImage": Kind("Size", 3, _widgets(width="INT", height="INT", batch_size="INT"), _same("LATENT")),
    "CLIPTextEncode": Kind("Prompt", 2, _widgets(text="STRING") + _links(clip="CLIP"), _same("CONDITIONING"), 110),
    "RandomNoise": Kind("Seed", 3, _widgets(noise_seed="INT"), _same("NOISE")),
    "KSamplerSelect": Kind("Method", 3, _widgets(sampler_name="COMBO"), _same("SAMPLER")),
    "ModelSamplingFlux": Kind(
        "Flow shift",
        2,
        _links(model="MODEL") + _widgets(max_shift="FLOAT", base_shift="FLOAT", width="INT", height="INT"),
        _same("MODEL"),
    ),
    "BasicScheduler": Kind(
        "Schedule",
        3,
        _links(model="MODEL") + _widgets(scheduler="COMBO", steps="INT", denoise="FLOAT"),
        _same("SIGMAS"),
    ),
    "ManualSigmas": Kind("Schedule", 3, _widgets(sigmas="STRING"), _same("SIGMAS")),
    "CFGGuider": Kind(
        "Guidance",
        3,
        _links(model="MODEL", positive="CONDITIONING", negative="CONDITIONING") + _widgets(cfg="FLOAT"),
        _same("GUIDER"),
    ),
    "SamplerCustomAdvanced": Kind(
        "Sampler",
        4,
        _links(noise="NOISE", guider="GUIDER", sampler="SAMPLER", sigmas="SIGMAS", latent_image="LATENT"),
        (("output", "LATENT"), ("denoised_output", "LATENT")),
    ),
    "VAEDecode": Kind("Decode", 5, _links(samples="LATENT", vae="VAE"), _same("IMAGE")),
    "SaveImage": Kind("Save", 6, _links(images="IMAGE") + _widgets(filename_prefix="STRING"), ()),
}
"""Every node that a stock workflow may hold; a test compares them with what ComfyUI says of itself."""

TITLES = {"negative": "Negative prompt"}


def window_form(prompt: Prompt, note: str) -> dict[str, Any]:
    """The graph as the page loads it, laid out in columns from the loaders to the image."""
    numbers = {key: number for number, key in enumerate(prompt, start=1)}
    links: list[list[Any]] = []
    nodes: list[dict[str, Any]] = []
    bottom: dict[int, int] = {}
    for key, entry in prompt.items():
        kind = KINDS[entry["class_type"]]
        inputs, values = [], []
        for name, type_, is_widget in kind.inputs:
            slot: dict[str, Any] = {"name": name, "type": type_, "link": None}
            value = entry["inputs"][name]
            if is_widget:
                slot["widget"] = {"name": name}
                values.append(value)
                if name == "noise_seed":
                    values.append("fixed")  # the page's own widget: what to do with the seed after a run
            else:
                source, output = value
                source_kind = KINDS[prompt[source]["class_type"]]
                links.append(
                    [len(links) + 1, numbers[source], output, numbers[key], len(inputs), source_kind.outputs[output][1]]
                )
                slot["link"] = len(links)
            inputs.append(slot)
        height = 60 + 24 * (max(len(inputs) - len(values), len(kind.outputs)) + len(values)) + kind.tall
        top = bottom.get(kind.column, 0)
        bottom[kind.column] = top + height + GAP
        nodes.append(
            {
                "id": numbers[key],
                "type": entry["class_type"],
                "pos": [kind.column * COLUMN, top],
                "size": [WIDTH, height],
                "flags": {},
                "order": numbers[key] - 1,
                "mode": 0,
                "inputs": inputs,
                "outputs": [{"name": name, "type": type_, "links": None} for name, type_ in kind.outputs],
                "title": TITLES.get(key, kind.title),
                "properties": {"Node name for S&R": entry["class_type"]},
                "widgets_values": values,
            }
        )
    for made in nodes:
        for number, output in enumerate(made["outputs"]):
            output["links"] = [link[0] for link in links if link[1:3] == [made["id"], number]] or None
    nodes.append(_note(len(nodes) + 1, note))
    return {
        "last_node_id": len(nodes),
        "last_link_id": len(links),
        "nodes": nodes,
        "links": links,
        "groups": [],
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def _note(number: int, text: str) -> dict[str, Any]:
    return {
        "id": number,
        "type": "MarkdownNote",
        "pos": [-NOTE_WIDTH - 50, 0],
        "size": [NOTE_WIDTH, 420],
        "flags": {},
        "order": number - 1,
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "title": "About this workflow",
        "properties": {},
        "widgets_values": [text],
        "color": "#432",
        "bgcolor": "#653",
    }
