"""The window's form of a stock workflow: the same nodes with slots, widgets and places, and a note that explains it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .graph import Prompt

COLUMN, GAP, WIDTH, NOTE_WIDTH = 380, 55, 330, 420


Slot = tuple[str, str, bool]
"""Name, type, whether it is a widget."""


@dataclass(frozen=True)
class Kind:
    """A ComfyUI node: its title, its column, and its slots as `name=TYPE` (a widget), `name:TYPE` or `TYPE` alone."""

    title: str
    column: int
    takes: str
    gives: str = ""
    tall: int = 0

    @property
    def inputs(self) -> tuple[Slot, ...]:
        """Links and widgets, in ComfyUI's order."""
        return tuple(_slots(self.takes))

    @property
    def outputs(self) -> tuple[tuple[str, str], ...]:
        """(name, type)."""
        return tuple((name, type_) for name, type_, _ in _slots(self.gives))


def _slots(text: str) -> Iterator[Slot]:
    for slot in text.split():
        name, _, type_ = slot.replace("=", ":").partition(":")
        yield name, type_ or name, "=" in slot


KINDS = {
    "UNETLoader": Kind("Load Diffusion Model", 0, "unet_name=COMBO weight_dtype=COMBO", "MODEL"),
    "CLIPLoader": Kind("Load T5", 0, "clip_name=COMBO type=COMBO device=COMBO", "CLIP"),
    "VAELoader": Kind("Load VAE", 0, "vae_name=COMBO", "VAE"),
    "LoraLoaderModelOnly": Kind("LoRA", 1, "model:MODEL lora_name=COMBO strength_model=FLOAT", "MODEL"),
    "T5TokenizerOptions": Kind("Visible padding", 1, "clip:CLIP min_padding=INT min_length=INT", "CLIP"),
    "EmptySD3LatentImage": Kind("Size", 3, "width=INT height=INT batch_size=INT", "LATENT"),
    "CLIPTextEncode": Kind("Prompt", 2, "text=STRING clip:CLIP", "CONDITIONING", 110),
    "RandomNoise": Kind("Seed", 3, "noise_seed=INT", "NOISE"),
    "KSamplerSelect": Kind("Method", 3, "sampler_name=COMBO", "SAMPLER"),
    "ModelSamplingFlux": Kind(
        "Flow shift", 2, "model:MODEL max_shift=FLOAT base_shift=FLOAT width=INT height=INT", "MODEL"
    ),
    "BasicScheduler": Kind("Schedule", 3, "model:MODEL scheduler=COMBO steps=INT denoise=FLOAT", "SIGMAS"),
    "ManualSigmas": Kind("Schedule", 3, "sigmas=STRING", "SIGMAS"),
    "CFGGuider": Kind("Guidance", 3, "model:MODEL positive:CONDITIONING negative:CONDITIONING cfg=FLOAT", "GUIDER"),
    "SamplerCustomAdvanced": Kind(
        "Sampler",
        4,
        "noise:NOISE guider:GUIDER sampler:SAMPLER sigmas:SIGMAS latent_image:LATENT",
        "output:LATENT denoised_output:LATENT",
    ),
    "VAEDecode": Kind("Decode", 5, "samples:LATENT vae:VAE", "IMAGE"),
    "SaveImage": Kind("Save", 6, "images:IMAGE filename_prefix=STRING"),
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
        place = [kind.column * COLUMN, top]
        made = stored_node(
            numbers[key], entry["class_type"], place, [WIDTH, height], TITLES.get(key, kind.title), values
        )
        made["inputs"] = inputs
        made["outputs"] = [{"name": name, "type": type_, "links": None} for name, type_ in kind.outputs]
        made["properties"] = {"Node name for S&R": entry["class_type"]}
        nodes.append(made)
    for made in nodes:
        for number, output in enumerate(made["outputs"]):
            output["links"] = [link[0] for link in links if link[1:3] == [made["id"], number]] or None
    nodes.append(about(len(nodes) + 1, [-NOTE_WIDTH - 50, 0], [NOTE_WIDTH, 420], note))
    return document(nodes, links)


def about(number: int, place: list[int], size: list[int], text: str) -> dict[str, Any]:
    """The note beside a workflow."""
    node = stored_node(number, "MarkdownNote", place, size, "About this workflow", [text])
    return node | {"color": "#432", "bgcolor": "#653"}


def document(nodes: list[dict[str, Any]], links: list[list[Any]]) -> dict[str, Any]:
    """The workflow as the page stores it."""
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


def stored_node(
    number: int, type_: str, place: list[int], size: list[int], title: str, values: list[Any]
) -> dict[str, Any]:
    """A node without slots, as the page stores it."""
    return {
        "id": number,
        "type": type_,
        "pos": place,
        "size": size,
        "flags": {},
        "order": number - 1,
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "title": title,
        "properties": {},
        "widgets_values": values,
    }
