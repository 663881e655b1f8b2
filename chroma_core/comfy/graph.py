"""ComfyUI prompts in API format: the builder, and the graph of our own nodes that generates images.

A prompt is `{node id: {class_type, inputs, _meta}}`, as `POST /prompt` takes it; a link is `[node id, output]`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..requests.request import InferenceRequest, PlannedImage
from ..requests.run import PARTS

Prompt = dict[str, dict[str, Any]]

Link = list[Any]
"""[id of a node, number of its output]."""

PUBLISHED = "as published"
"""The choice of the load node that leaves a part to the flavour."""


def node(class_type: str, title: str = "", /, **inputs: Any) -> dict[str, Any]:
    """A node in API form, titled with its type unless another title is given."""
    return {"class_type": class_type, "inputs": inputs, "_meta": {"title": title or class_type}}


@dataclass(frozen=True)
class Node:
    """A node of a graph; `node[i]` is a link to its output i."""

    id: str

    def __getitem__(self, output: int) -> Link:
        return [self.id, output]


@dataclass
class Graph:
    """A prompt in the making."""

    prompt: Prompt = field(default_factory=dict)

    def add(self, id: str, class_type: str, title: str = "", /, **inputs: Any) -> Node:
        """Add a node; inputs are widget values and links. Raises ValueError for an id that is taken."""
        if id in self.prompt:
            raise ValueError(f"the prompt has a node '{id}' already")
        self.prompt[id] = node(class_type, title, **inputs)
        return Node(id)

    def add_lora(
        self,
        number: int,
        model: Link,
        name: str,
        strength: float,
        mode: str,
        allow_partial: bool = False,
        blocks: str = "",
        schedule: str = "",
    ) -> Link:
        """Chroma Apply LoRA as node `lora_<number>`, counted from 0; returns the model with it."""
        applied = {"model": model, "lora": name, "strength": strength, "mode": mode, "allow_partial": allow_partial}
        applied |= {key: text for key, text in (("blocks", blocks), ("schedule", schedule)) if text}
        return self.add(f"lora_{number}", "ChromaApplyLora", f"LoRA {number + 1}", **applied)[0]

    def add_image(
        self,
        model: Link,
        loader: Node,
        prompt: str,
        negative: str,
        size: tuple[int, int],
        settings: Mapping[str, Any],
        filename_prefix: str,
        number: int | None = None,
    ) -> Node:
        """The nodes from two texts to a saved image; returns the sampler.

        Their ids are positive, negative, latent, sample, decode and save, each with `_<number>` if there is one.

        Args:
            model: the model to sample with: the loader's, or one with LoRAs.
            loader: the Chroma Load Model, for T5 and the VAE.
            size: width and height in pixels.
            settings: the widgets of Chroma Sampler.
        """
        mark, count = ("", "") if number is None else (f"_{number}", f" {number + 1}")

        def add(id: str, class_type: str, title: str, **inputs: Any) -> Node:
            return self.add(f"{id}{mark}", class_type, f"{title}{count}", **inputs)

        texts = {"positive": prompt, "negative": negative}
        conditions = {
            name: add(name, "ChromaTextEncode", name.capitalize(), text_encoder=loader[1], text=text, trigger="")[0]
            for name, text in texts.items()
        }
        latent = add("latent", "ChromaEmptyLatent", "Size", width=size[0], height=size[1], batch_size=1)
        sampler = add("sample", "ChromaSampler", "Image", model=model, **conditions, latent=latent[0], **settings)
        decoded = add("decode", "VAEDecode", "Decode", samples=sampler[0], vae=loader[2])
        add("save", "SaveImage", "Save", images=decoded[0], filename_prefix=filename_prefix)
        return sampler


def to_prompt(
    request: InferenceRequest,
    images: Sequence[PlannedImage],
    lora_names: Sequence[str],
    filename_prefix: str = "chroma/request",
) -> Prompt:
    """A request as a prompt of our own nodes; image i comes from the node `save_<i>`.

    Args:
        images: from `request.images()`: a prompt has no random seeds.
        lora_names: the request's LoRAs under their names in ComfyUI's LoRA folders.
    """
    graph = Graph()
    loader = graph.add(
        "load",
        "ChromaLoadModel",
        "Model",
        flavour=request.flavour.name,
        precision=request.precision,
        text_precision=request.text_precision,
        offload=request.offload,
        **{part: getattr(request, part) or PUBLISHED for part in PARTS},
    )
    model = loader[0]
    for i, (lora, name) in enumerate(zip(request.loras, lora_names, strict=True)):
        how = request.lora_mode, lora.allow_partial, lora.blocks, lora.schedule
        model = graph.add_lora(i, model, name, lora.network_multiplier, *how)
    for i, image in enumerate(images):
        chosen, widgets = request.settings(image), ("seed", "steps", "guidance", "tail_bias", "denoise")
        settings = {name: getattr(chosen, name) for name in widgets} | {"recipe": request.recipe}
        if chosen.first_block_cache:
            settings["first_block_cache"] = chosen.first_block_cache
        size = (image.width, image.height)
        graph.add_image(model, loader, image.prompt, image.neg, size, settings, filename_prefix, i)
    return graph.prompt
