"""The example workflows as a table: nodes, the inputs that differ from a widget's default, links, and a note.

`build_workflows.py` turns this into the window form and the API form of each. Nodes stand in the order in which they
run; a node's column is where it is laid out in the window.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Link:
    """An output of another node of the same workflow."""

    node: str
    slot: int = 0


@dataclass(frozen=True)
class Node:
    type: str
    column: int
    inputs: dict[str, Any] = field(default_factory=dict)
    title: str = ""
    extra_height: int = 0
    extra_width: int = 0


@dataclass(frozen=True)
class Workflow:
    name: str
    note: str
    nodes: dict[str, Node]

    def number(self, key: str) -> int:
        """The node's id in both forms, from 1."""
        return list(self.nodes).index(key) + 1


REAL_MODEL = (
    "**It starts with `tiny`**, a small Chroma that ships with the pack: 64 × 64 pixels, coloured shapes, seconds on a "
    "CPU.\n\n**For the real Chroma 1** change\n- in **Chroma Load Model** *flavour* to `base`, `hd` or `flash` "
    "(downloaded on first use, about 27 GB; or choose your own *transformer*, *text_encoder* and *vae*), *precision*, "
    "*text_precision* and *offload* to what its *memory_plan* recommends for your machine\n"
)
REAL_SIZE = "- in **Chroma Empty Latent** *width* and *height* to 1024\n"
REAL_SAMPLING = REAL_MODEL + REAL_SIZE
REAL_TRAINING = (
    REAL_MODEL + "- in **Chroma Dataset** *folder* to one of yours below ComfyUI's `input` (pictures, each with a "
    "`.txt` caption of the same name), and *resolution* to 512 or 1024. The held-out pictures are optional\n"
    "- in **Chroma Train LoRA** *steps* to 1000–3000, *learning_rate* to 0.0002, *target* to `all`, *batch_size* "
    "to 1, and the *name* and *preview_prompt*\n"
)

# bf16 is slow on many CPUs, where tiny is mostly run; and it needs no memory to speak of.
LOAD = {"load": Node("ChromaLoadModel", 0, {"precision": "fp32", "text_precision": "fp32"})}
PROMPTS = {
    "positive": Node(
        "ChromaTextEncode",
        1,
        {"text_encoder": Link("load", 1), "text": "a red star on a blue background"},
        "Prompt",
    ),
    "negative": Node("ChromaTextEncode", 1, {"text_encoder": Link("load", 1), "text": ""}, "Negative prompt"),
    "latent": Node("ChromaEmptyLatent", 1, {"width": 64, "height": 64, "batch_size": 1}),
}


def decode(samples: str, prefix: str, column: int, key: str = "") -> dict[str, Node]:
    return {
        f"decode{key}": Node("VAEDecode", column, {"samples": Link(samples), "vae": Link("load", 2)}),
        f"save{key}": Node(
            "SaveImage", column, {"images": Link(f"decode{key}"), "filename_prefix": prefix}, extra_height=250
        ),
    }


def with_text(text: str) -> dict[str, Node]:
    """The nodes for prompts and size, with another prompt."""
    prompt = {"text_encoder": Link("load", 1), "text": text}
    return PROMPTS | {"positive": Node("ChromaTextEncode", 1, prompt, "Prompt")}


def sampler(model: str, column: int, **inputs: Any) -> Node:
    links = {"model": Link(model), "positive": Link("positive"), "negative": Link("negative"), "latent": Link("latent")}
    return Node("ChromaSampler", column, {**links, **inputs})


TRAINING_SET = "sks_emblem"
CONCEPT_PROMPT = "a sks emblem on a red background"
TRAINING = {
    "dataset": Node("ChromaDataset", 1, {"folder": TRAINING_SET, "trigger": "sks"}, extra_height=250),
    "heldout": Node(
        "ChromaDataset",
        1,
        {"folder": f"{TRAINING_SET}_heldout", "trigger": "sks"},
        "Held-out pictures",
        extra_height=250,
    ),
    "settings": Node("ChromaTrainingSettings", 0, {"lr_schedule": "cosine", "validate_every": 100}),
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
            "steps": 600,
            "learning_rate": 2e-3,
            "target": "all+ffs",
            "batch_size": 4,
            "preview_prompt": CONCEPT_PROMPT,
            "preview_every": 100,
        },
        extra_height=120,
    ),
}

REAL_TRAIN = (
    "- in **Chroma Train LoRA** *steps* to 1000–3000, *learning_rate* to 0.0002, *target* to `all`, *batch_size* to 1, "
    "and the *name* and *preview_prompt*\n"
)


def train_on(dataset: str, column: int, **inputs: Any) -> dict[str, Node]:
    """A short training of tiny on one data set link, and what shows how it is doing."""
    links = {"model": Link("load", 0), "text_encoder": Link("load", 1), "dataset": Link(dataset)}
    common = {"steps": 300, "learning_rate": 2e-3, "target": "all+ffs", "batch_size": 4, "preview_every": 100}
    return {
        "train": Node("ChromaTrainLora", column, {**links, **common, **inputs}, extra_height=120),
        "status": Node("ChromaTrainingStatus", column + 1, {"job": Link("train")}, extra_height=300),
        "show": Node("PreviewAny", column + 1, {"source": Link("status", 0)}, "Status", extra_height=100),
    }


def painted(key: str, text: str, batch: int, seed: int) -> dict[str, Node]:
    """Pictures that the model paints itself, as IMAGE; they share the negative prompt of the workflow."""
    prompt = {"text_encoder": Link("load", 1), "text": text}
    size = {"width": 64, "height": 64, "batch_size": batch}
    links = {"model": Link("load"), "positive": Link(f"prompt_{key}"), "negative": Link("negative")}
    return {
        f"prompt_{key}": Node("ChromaTextEncode", 1, prompt, "Prompt"),
        f"latent_{key}": Node("ChromaEmptyLatent", 1, size),
        f"sample_{key}": Node("ChromaSampler", 2, {**links, "latent": Link(f"latent_{key}"), "seed": seed}),
        f"decode_{key}": Node("VAEDecode", 3, {"samples": Link(f"sample_{key}"), "vae": Link("load", 2)}),
    }


NEGATIVE = {"negative": PROMPTS["negative"]}

WORKFLOWS = (
    Workflow(
        "chroma_text_to_image",
        "## Text to image\n\nOne prompt, one picture.\n\n" + REAL_SAMPLING,
        LOAD | PROMPTS | {"sample": sampler("load", 2)} | decode("sample", "chroma/text_to_image", 3),
    ),
    Workflow(
        "chroma_your_files",
        "## Your own files, and what fits this machine\n\n*transformer*, *text_encoder* and *vae* take what lies in "
        "ComfyUI's folders: the released single files, fp8, scaled fp8, GGUF, diffusers folders. What you leave *as "
        "published* comes from the flavour. A file that is something else is refused, and named for what it is.\n\n"
        "The text on the right says what each *precision* and *offload* needs, and which to choose here. *offload* "
        "`model` lets the parts take turns on the card, `block` keeps only a few of the transformer's blocks there; "
        "the picture is the same. *keep_quantised* makes the next start of `int8`, `int4` or `nf4` fast.\n\n"
        + REAL_SAMPLING,
        {
            "load": Node(
                "ChromaLoadModel",
                0,
                {"precision": "int8", "text_precision": "fp32", "offload": "model"},
                extra_height=60,
            ),
            "plan": Node(
                "PreviewAny",
                4,
                {"source": Link("load", 3)},
                "What fits this machine",
                extra_height=380,
                extra_width=330,
            ),
        }
        | with_text("a blue ring on a yellow background")
        | {"sample": sampler("load", 2)}
        | decode("sample", "chroma/your_files", 3),
    ),
    Workflow(
        "chroma_tail_sigmas",
        "## Tail sigmas in the host's own sampler\n\n**Chroma Tail Sigmas** crowds the steps near both ends of the "
        "noise range; *tail_bias* 0 is the plain schedule. **Chroma Host Model** makes the model drivable by the "
        "host's guiders and samplers. LoRAs go through **Chroma Apply LoRA** before it.\n\n" + REAL_SAMPLING,
        LOAD
        | with_text("a yellow ring on a green background")
        | {
            "bridge": Node("ChromaHostModel", 1, {"model": Link("load", 0)}),
            "guider": Node(
                "CFGGuider",
                2,
                {
                    "model": Link("bridge"),
                    "positive": Link("positive"),
                    "negative": Link("negative"),
                    "cfg": 4.0,
                },
            ),
            "noise": Node("RandomNoise", 2, {"noise_seed": 42}),
            "method": Node("KSamplerSelect", 2, {"sampler_name": "euler"}),
            "sigmas": Node(
                "ChromaTailSigmas",
                2,
                {"steps": 25, "tail_bias": 0.3, "width": Link("latent", 1), "height": Link("latent", 2)},
            ),
            "sample": Node(
                "SamplerCustomAdvanced",
                3,
                {
                    "noise": Link("noise"),
                    "guider": Link("guider"),
                    "sampler": Link("method"),
                    "sigmas": Link("sigmas"),
                    "latent_image": Link("latent"),
                },
            ),
        }
        | decode("sample", "chroma/tail_sigmas", 3),
    ),
    Workflow(
        "chroma_train_lora",
        "## Train a LoRA\n\nThe job starts in the background and the queue is free again at once: keep making "
        "pictures while it trains. Queue this workflow again to see how far it is: the same settings never start a "
        "second job. The finished LoRA lands in `output/loras` and works in **Chroma Apply LoRA**, in the host's *Load "
        "LoRA* and in diffusers.\n\n" + REAL_TRAINING,
        LOAD
        | TRAINING
        | {
            "status": Node("ChromaTrainingStatus", 3, {"job": Link("train")}, extra_height=300),
            "show": Node("PreviewAny", 3, {"source": Link("status", 0)}, "Status", extra_height=100),
        },
    ),
    Workflow(
        "chroma_train_and_sample",
        "## Train, wait, sample\n\nOne prompt from pictures to picture: the queue waits until the LoRA is trained, "
        "then samples without and with it. *Cancel* stops the job and keeps what it has learnt.\n\n"
        + REAL_TRAINING
        + REAL_SIZE,
        LOAD
        | TRAINING
        | {
            "wait": Node("ChromaWaitForTraining", 3, {"job": Link("train")}),
            "lora": Node("ChromaApplyLora", 3, {"model": Link("load", 0), "lora_name": Link("wait", 1)}),
        }
        | {key: Node(node.type, 3, node.inputs, node.title) for key, node in with_text(CONCEPT_PROMPT).items()}
        | {"base": sampler("load", 4), "sample": sampler("lora", 4)}
        | decode("base", "chroma/without_lora", 5, "_base")
        | decode("sample", "chroma/with_lora", 5),
    ),
    Workflow(
        "chroma_convert_lora",
        "## Look into a LoRA, and convert it\n\n**Chroma Inspect LoRA** says what a file holds, where it acts, and "
        "whether it was trained on this model. **Chroma Convert LoRA** writes it in the names of another program, into "
        "`output/loras`; the result is applied here to show that it is the same LoRA. Any file in your LoRA folders "
        "will do: this workflow names the one that *Train a LoRA* makes.\n\n" + REAL_SAMPLING,
        LOAD
        | {
            "inspect": Node(
                "ChromaInspectLora", 1, {"lora": "sks.safetensors", "model": Link("load", 0)}, extra_height=220
            ),
            "report": Node("PreviewAny", 1, {"source": Link("inspect", 0)}, "Report", extra_height=250),
            "map": Node(
                "SaveImage",
                1,
                {"images": Link("inspect", 1), "filename_prefix": "chroma/lora_heat_map"},
                "Where it acts",
                extra_height=150,
            ),
            "convert": Node("ChromaConvertLora", 2, {"lora": "sks.safetensors", "dialect": "kohya"}),
            "written": Node("PreviewAny", 2, {"source": Link("convert", 2)}, "What was written", extra_height=80),
            "lora": Node("ChromaApplyLora", 2, {"model": Link("load", 0), "lora_name": Link("convert", 1)}),
        }
        | {key: Node(node.type, 3, node.inputs, node.title) for key, node in with_text(CONCEPT_PROMPT).items()}
        | {"sample": sampler("lora", 4)}
        | decode("sample", "chroma/converted_lora", 4),
    ),
    Workflow(
        "chroma_use_lora",
        "## Use a trained LoRA\n\nPick the file in **Chroma Apply LoRA**; chain several for several LoRAs. Run "
        "*Train a LoRA* first: this workflow names the LoRA that it makes.\n\n" + REAL_SAMPLING,
        LOAD
        | {"lora": Node("ChromaApplyLora", 1, {"model": Link("load", 0), "lora": "sks.safetensors", "strength": 1.0})}
        | with_text(CONCEPT_PROMPT)
        | {"sample": sampler("lora", 2)}
        | decode("sample", "chroma/with_lora", 3),
    ),
    Workflow(
        "chroma_parity",
        "## Which number moves the picture?\n\n**Chroma Parity** paints one picture, then again with one number "
        "changed at a time, and lists the changes by how far they move it. Choose in *factors* what to change; link a "
        "**job** to replay the preview of a training.\n\n"
        + REAL_MODEL
        + "- in **Chroma Parity** *width* and *height* to 1024",
        LOAD
        | {
            "parity": Node(
                "ChromaParity",
                1,
                {
                    "model": Link("load", 0),
                    "text_encoder": Link("load", 1),
                    "prompt": "a red star on a blue background",
                    "width": 64,
                    "height": 64,
                    "factors": "recipe",
                },
                extra_height=300,
                extra_width=200,
            ),
            "save": Node("SaveImage", 3, {"images": Link("parity"), "filename_prefix": "chroma/parity"}),
        },
    ),
    Workflow(
        "chroma_train_from_images",
        "## Train on pictures from other nodes\n\n**Chroma Dataset from Images** takes any IMAGE: here two batches "
        "that the model paints itself, joined by *Batch Images*, with one line of caption for each picture. A word of "
        "your own, `sks`, comes to mean a yellow ring.\n\n**For your own pictures** link *Load Image*, *Load Image "
        "(from Folder)*, a crop or an upscaler in place of the samplers, and write one caption a line in the same "
        "order. Pictures of different sizes come as a list, not through *Batch Images*. A copy is kept below "
        "`output/chromakit/datasets`; the node's text says how much lies there.\n\n"
        + REAL_MODEL
        + "- in both **Chroma Empty Latent** *width* and *height* to 1024, or leave the samplers out\n"
        + "- in **Chroma Dataset from Images** *resolution* to 512 or 1024, *captions* and *trigger*\n"
        + REAL_TRAIN,
        LOAD
        | NEGATIVE
        | painted("first", "a yellow ring on a green background", 2, 11)
        | painted("second", "a yellow ring on a blue background", 2, 12)
        | {
            "join": Node("ImageBatch", 3, {"image1": Link("decode_first"), "image2": Link("decode_second")}),
            "dataset": Node(
                "ChromaDatasetFromImages",
                4,
                {
                    "images": Link("join"),
                    "captions": "a sks on a green background\na sks on a green background\n"
                    "a sks on a blue background\na sks on a blue background",
                    "trigger": "sks",
                },
                extra_height=300,
            ),
        }
        | train_on("dataset", 5, name="from-images", preview_prompt="a sks on a red background"),
    ),
    Workflow(
        "chroma_train_with_regularisation",
        "## A main set and a regularisation set\n\nThe LoRA learns the emblem from the main set. The second set holds "
        "ordinary pictures, painted by the model itself and marked *regularisation*: on them the LoRA is trained to "
        "change nothing, so that a star stays a star. **Chroma Combine Datasets** mixes both: with *weight_2* 0.5 a "
        "picture of the second set is used half as often as one of the first. Each set keeps its own options; the "
        "trigger word of previews and LoRA is the main set's. How strongly it holds back: *prior_weight* in **Chroma "
        "Training Settings**.\n\n"
        + REAL_MODEL
        + "- in **Chroma Dataset** *folder* to one of yours below ComfyUI's `input` (pictures, each with a `.txt` "
        "caption of the same name), and *resolution* to 512 or 1024\n"
        + "- the *Prompt* and the *captions* to what your concept is one of (for one dog: `a photo of a dog`), *width* "
        "and *height* to the *resolution*, *batch_size* to as many pictures as fit; or use a second **Chroma Dataset** "
        "with *regularisation* on\n" + REAL_TRAIN,
        LOAD
        | NEGATIVE
        | painted("ordinary", "a red star on a blue background", 4, 21)
        | {
            "main": Node("ChromaDataset", 4, {"folder": TRAINING_SET, "trigger": "sks"}, "Main set", extra_height=250),
            "ordinary": Node(
                "ChromaDatasetFromImages",
                4,
                {
                    "images": Link("decode_ordinary"),
                    "captions": "a red star on a blue background",
                    "regularisation": True,
                },
                "Regularisation set",
                extra_height=250,
            ),
            "combine": Node(
                "ChromaCombineDatasets",
                5,
                {"dataset_1": Link("main"), "dataset_2": Link("ordinary"), "weight_2": 0.5},
            ),
            "mixture": Node(
                "PreviewAny", 5, {"source": Link("combine", 1)}, "How the sets are mixed", extra_height=100
            ),
        }
        | train_on("combine", 6, name="sks-regularised", preview_prompt=CONCEPT_PROMPT),
    ),
)
