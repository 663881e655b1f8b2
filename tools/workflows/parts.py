"""What the example workflows are made of: the words of their table, and nodes and sentences that several of them share.

A workflow lists its nodes in the order in which they run; a node's column is where it is laid out in the window.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Link:
    """An output of another node of the same workflow."""

    node: str
    slot: int = 0


@dataclass(frozen=True)
class ModelFile:
    """A file that a widget names, where to get it, and the folder below the host's `models` where it belongs.

    The page offers the download of what is not there; it takes addresses on huggingface.co and civitai.com only.
    """

    name: str
    url: str
    directory: str


@dataclass(frozen=True)
class Node:
    """One node: the inputs that differ from a widget's default, and its links. Sizes are pixels on top of the usual.

    collapsed: only its title shows; for what a newcomer need not look at, so that the rest opens large enough to read.
    labels: what a widget is called here, for app mode shows widgets without their nodes.
    """

    type: str
    column: int
    inputs: dict[str, Any] = field(default_factory=dict)
    title: str = ""
    extra_height: int = 0
    extra_width: int = 0
    models: tuple[ModelFile, ...] = ()
    collapsed: bool = False
    labels: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Workflow:
    """One for the window, under its `title`, and for programs, under its `name`.

    `summary` is its sentence in the index, `note` what stands beside its nodes. `form` is what the window's app mode
    shows of it: `node.widget` for each field, in this order, and `results` the nodes whose outputs are shown.
    """

    name: str
    title: str
    summary: str
    note: str
    nodes: dict[str, Node]
    form: tuple[str, ...] = ()
    results: tuple[str, ...] = ()

    def number(self, key: str) -> int:
        """The node's id in both forms, from 1."""
        return list(self.nodes).index(key) + 1

    def linear_data(self) -> dict[str, list]:
        """What app mode shows, as the page stores it: [node id, widget] for each field, and ids of nodes."""
        fields = [field.split(".") for field in self.form]
        return {
            "inputs": [[self.number(key), widget] for key, widget in fields],
            "outputs": [self.number(key) for key in self.results],
        }


REAL_MODEL = (
    "**It starts with `tiny`**, a small Chroma that ships with the pack: 64 × 64 pixels, coloured shapes, seconds on a "
    "CPU.\n\n**For the real Chroma 1** change\n- in **Chroma Load Model** *flavour* to `base`, `hd` or `flash` "
    "(downloaded on first use, about 27 GB; or choose your own *transformer*, *text_encoder* and *vae*), *precision*, "
    "*text_precision* and *offload* to what its *memory_plan* recommends for your machine; the templates "
    "*Chroma on … GB* are set up for a GPU of 4 to 24 GB\n"
)
REAL_SIZE = "- in **Chroma Empty Latent** *width* and *height* to 1024\n"
REAL_SAMPLING = REAL_MODEL + REAL_SIZE
REAL_FOLDER = (
    "- in **Chroma Dataset** *folder* to one of yours below ComfyUI's `input` (images, each with a `.txt` caption of "
    "the same name), and *resolution* to 512 or 1024"
)
REAL_TRAIN = (
    "- in **Chroma Train LoRA** *steps* to 1000–3000, *learning_rate* to 0.0002, *target* to `all`, *batch_size* to 1, "
    "and the *name* and *preview_prompt*\n"
)
REAL_TRAINING = (
    REAL_MODEL
    + REAL_FOLDER
    + ". The held-out images are optional\n"
    + REAL_TRAIN
    + "- in **Chroma Training Settings** *preserve_class_word* to what the concept is one of (for one dog: `dog`); or "
    "*preserve_class* to 0, which saves a third of the time\n"
)
TRAIN_FIRST = (
    "**Run *Chroma basics 2, first LoRA* first**: this workflow uses its LoRA, `sks`. Until then the page reports "
    "that file as missing.\n\n"
)

# bf16 is slow on many CPUs, where tiny is mostly run; and it needs no memory to speak of.
LOAD = {"load": Node("ChromaLoadModel", 0, {"precision": "fp32", "text_precision": "fp32"})}
PROMPT_LABEL = {"text": "prompt"}
PROMPTS = {
    "positive": Node(
        "ChromaTextEncode",
        1,
        {"text_encoder": Link("load", 1), "text": "a red star on a blue background"},
        "Prompt",
        labels=PROMPT_LABEL,
    ),
    "negative": Node(
        "ChromaTextEncode", 1, {"text_encoder": Link("load", 1), "text": ""}, "Negative prompt", collapsed=True
    ),
    "latent": Node("ChromaEmptyLatent", 1, {"width": 64, "height": 64, "batch_size": 1}),
}
LOAD_AND_NEGATIVE = LOAD | {"negative": replace(PROMPTS["negative"], column=0)}

TRAINING_SET = "sks_emblem"
CONCEPT_PROMPT = "a sks emblem on a red background"
SIZE_AND_SEED = ("latent.width", "latent.height", "sample.steps", "sample.seed")
"""Fields of an app form, after those of the prompt."""
LORA = "sks.safetensors"
"""What `TRAINING` makes, as the host lists it."""

TRAINING = {
    "dataset": Node("ChromaDataset", 1, {"folder": TRAINING_SET, "trigger": "sks"}),
    "heldout": Node(
        "ChromaDataset",
        1,
        {"folder": f"{TRAINING_SET}_heldout", "trigger": "sks"},
        "Held-out images",
        collapsed=True,
        labels={"folder": "held-out folder"},
    ),
    "settings": Node(
        "ChromaTrainingSettings",
        1,
        # Ordinary images stay ordinary: docs/quality.md.
        {"lr_schedule": "cosine", "validate_every": 100, "preserve_class": 1.0, "preserve_share": 0.33},
        collapsed=True,
    ),
    "train": Node(
        "ChromaTrainLora",
        2,
        {
            "model": Link("load", 0),
            "text_encoder": Link("load", 1),
            "dataset": Link("dataset"),
            "validation_dataset": Link("heldout"),
            "settings": Link("settings"),
            "name": "sks",
            "steps": 400,
            "learning_rate": 2e-3,
            "target": "all+ffs",
            "batch_size": 4,
            "preview_prompt": CONCEPT_PROMPT,
            "preview_every": 100,
        },
    ),
}
"""The training that several workflows share: the same settings are the same job, whichever of them starts it."""


def decode(samples: str, prefix: str, column: int, key: str = "") -> dict[str, Node]:
    """Latents to a saved image."""
    return {
        f"decode{key}": Node("VAEDecode", column, {"samples": Link(samples), "vae": Link("load", 2)}, collapsed=True),
        f"save{key}": Node(
            "SaveImage", column, {"images": Link(f"decode{key}"), "filename_prefix": prefix}, extra_height=200
        ),
    }


def with_text(text: str, column: int = 1, trigger: str = "", **size: int) -> dict[str, Node]:
    """The nodes for prompts and size, with another prompt."""
    prompt = {"text_encoder": Link("load", 1), "text": text, "trigger": trigger}
    latent = {**PROMPTS["latent"].inputs, **size}
    return {
        "positive": Node("ChromaTextEncode", column, prompt, "Prompt", labels=PROMPT_LABEL),
        "negative": replace(PROMPTS["negative"], column=column),
        "latent": Node("ChromaEmptyLatent", column, latent),
    }


def sampler(model: str, column: int, collapsed: bool = False, **inputs: Any) -> Node:
    """A Chroma Sampler on the workflow's prompts and latent."""
    links = {"model": Link(model), "positive": Link("positive"), "negative": Link("negative"), "latent": Link("latent")}
    return Node("ChromaSampler", column, {**links, **inputs}, collapsed=collapsed)


def wait_and_apply(column: int) -> dict[str, Node]:
    """What makes a model with the LoRA of a job that has just been started."""
    lora = {"model": Link("load", 0), "lora_name": Link("wait", 1)}
    return {
        "wait": Node("ChromaWaitForTraining", column, {"job": Link("train")}, collapsed=True),
        "lora": Node("ChromaApplyLora", column, lora, collapsed=True),
    }


def status(column: int) -> dict[str, Node]:
    """How a job is doing, as images and as text."""
    return {
        "status": Node("ChromaTrainingStatus", column, {"job": Link("train")}, extra_height=200),
        "show": Node("PreviewAny", column, {"source": Link("status", 0)}, "Status", extra_height=100),
    }


def train_on(dataset: str, column: int, **inputs: Any) -> dict[str, Node]:
    """A short training of tiny on one dataset link."""
    links = {"model": Link("load", 0), "text_encoder": Link("load", 1), "dataset": Link(dataset)}
    common = {"steps": 300, "learning_rate": 2e-3, "target": "all+ffs", "batch_size": 4, "preview_every": 100}
    return {"train": Node("ChromaTrainLora", column, {**links, **common, **inputs})}


def generated(key: str, text: str, batch: int, seed: int, column: int = 1) -> dict[str, Node]:
    """Images that the model generates itself, as IMAGE; they share the negative prompt of the workflow."""
    prompt = {"text_encoder": Link("load", 1), "text": text}
    size = {"width": 64, "height": 64, "batch_size": batch}
    links = {"model": Link("load"), "positive": Link(f"prompt_{key}"), "negative": Link("negative")}
    return {
        f"prompt_{key}": Node("ChromaTextEncode", column, prompt, "Prompt"),
        f"latent_{key}": Node("ChromaEmptyLatent", column, size, collapsed=True),
        f"sample_{key}": Node(
            "ChromaSampler", column, {**links, "latent": Link(f"latent_{key}"), "seed": seed}, collapsed=True
        ),
        f"decode_{key}": Node(
            "VAEDecode", column, {"samples": Link(f"sample_{key}"), "vae": Link("load", 2)}, collapsed=True
        ),
    }
