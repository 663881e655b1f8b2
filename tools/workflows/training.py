"""The example workflows that train."""

from __future__ import annotations

from .parts import (
    CONCEPT_PROMPT,
    LOAD,
    LOAD_AND_NEGATIVE,
    REAL_FOLDER,
    REAL_MODEL,
    REAL_SIZE,
    REAL_TRAIN,
    REAL_TRAINING,
    TRAINING,
    TRAINING_SET,
    Link,
    Node,
    Workflow,
    decode,
    generated,
    sampler,
    status,
    train_on,
    wait_and_apply,
    with_text,
)

SEEDS = 4

FIRST_LORA = Workflow(
    "chroma_2_first_lora",
    "Chroma basics 2, first LoRA",
    "Train a LoRA on 16 bundled images in a minute or two, and see an image without and with it.",
    "## Your first LoRA\n\n**Press *Run*.** `tiny` has never seen an “sks emblem”. It now learns one from 16 bundled "
    "images, in a minute or two on a CPU; then one image is generated without and with the LoRA.\n\n"
    "**Chroma Train LoRA** shows the step, the loss, *pause* and *stop*. This prompt waits for the job; *Cancel* "
    "ends the job and keeps what it has learnt. *Run* does not train twice: the same settings are the same job.\n"
    "\nThe LoRA is `output/loras/sks.safetensors`. Next: *Chroma basics 3, use a LoRA*.\n\n"
    + REAL_TRAINING
    + REAL_SIZE,
    LOAD
    | TRAINING
    | with_text(CONCEPT_PROMPT, 0)
    | wait_and_apply(2)
    | {"base": sampler("load", 2, collapsed=True), "sample": sampler("lora", 2, collapsed=True)}
    | decode("base", "chroma/without_lora", 3, "_base")
    | decode("sample", "chroma/with_lora", 3),
    ("dataset.folder", "dataset.trigger", "heldout.folder", "train.name", "train.steps", "positive.text"),
    ("save_base", "save"),
)


def compared(key: str, label: str) -> dict[str, Node]:
    """A sampler's images of several seeds in one row, with a line of text in its corner."""
    samples, vae = Link(f"sample_{key}"), Link("load", 2)
    text = {"text": label, "font_size": 9.0, "position": "bottom"}
    return {
        f"decode_{key}": Node("VAEDecode", 3, {"samples": samples, "vae": vae}, collapsed=True),
        # The grid takes a list of images, not a batch.
        f"list_{key}": Node("RebatchImages", 3, {"images": Link(f"decode_{key}"), "batch_size": 1}, collapsed=True),
        f"grid_{key}": Node("ImageGrid", 3, {"images": Link(f"list_{key}"), "columns": SEEDS}, collapsed=True),
        f"label_{key}": Node(
            "TextOverlay", 3, {"images": Link(f"grid_{key}"), **text}, f"Write: {label}", collapsed=True
        ),
    }


TRAINING_WORKFLOWS = (
    Workflow(
        "chroma_train_lora",
        "Chroma train in the background",
        "Train in the background: the queue is free again at once.",
        "## Train in the background\n\nThe job starts in the background and the queue is free again at once: keep "
        "generating images while it trains. Queue this workflow again to see the progress: the same settings never "
        "start a second job. The finished LoRA is saved to `output/loras` and works in **Chroma Apply LoRA**, in "
        "ComfyUI's *Load LoRA* and in diffusers.\n\n" + REAL_TRAINING,
        LOAD | TRAINING | status(3),
    ),
    Workflow(
        "chroma_resume_training",
        "Chroma resume training",
        "Resume a job that was stopped, and see its status.",
        "## Resume a job\n\nThe settings of this workflow are those of *Chroma basics 2, first LoRA*: the same "
        "settings are the same job. *if_exists* is `resume`, so *Run* continues it where it stopped, bit for bit as if "
        "it had never stopped. If there is no such job yet, it is started. For one of your own jobs, open the workflow "
        "that started it and set *if_exists* to `resume`.\n\n"
        "- **pause**: training waits between two steps and keeps its memory; *resume* continues\n"
        "- **stop**: the LoRA is saved as it is and the memory is freed. `resume` here continues from there\n"
        "- **crash, power cut, or ComfyUI closed**: `keep` and `resume` both continue from the last checkpoint "
        "(*checkpoint_every* in **Chroma Training Settings**)\n"
        "- **completed, but not enough**: do not raise *steps* here, which would be another job from step 0. *Extend* "
        "the job instead, in the **Chroma** tab of the sidebar\n"
        "- `restart` discards what the job has learnt and starts again\n\n"
        "*pause* and *stop* are on the node and in the tab. Queue again to refresh the status.\n\n" + REAL_TRAINING,
        LOAD
        | TRAINING
        | {
            "train": Node(
                "ChromaTrainLora",
                2,
                {**TRAINING["train"].inputs, "if_exists": "resume"},
            )
        }
        | status(3),
    ),
    Workflow(
        "chroma_compare_lora",
        "Chroma compare without and with LoRA",
        "Train, then compare images in a grid: the same seeds without and with the LoRA.",
        "## What did it learn?\n\nTrains (or takes the LoRA of *Chroma basics 2, first LoRA*, which is the same job), "
        f"then generates one prompt with {SEEDS} seeds, without the LoRA (top) and with it (bottom). Each column has "
        "one seed, so only the LoRA differs within a column.\n\nCheck three things: does the concept appear; does "
        "everything "
        "else (background, composition) stay; do the lower images still differ from each other. If they are all the "
        "same, there were too many steps. To compare strengths, link a **Chroma Apply LoRA** with another *strength* "
        "in place of the model at the top.\n\nMore seeds: *batch_size* in **Chroma Empty Latent**, and *columns* in "
        "both "
        "grids.\n\n" + REAL_TRAINING + REAL_SIZE,
        LOAD
        | TRAINING
        | with_text(CONCEPT_PROMPT, 0, batch_size=SEEDS)
        | wait_and_apply(2)
        | {"sample_without": sampler("load", 2, collapsed=True), "sample_with": sampler("lora", 2, collapsed=True)}
        | compared("without", "without the LoRA")
        | compared("with", "with the LoRA")
        | {
            "stitch": Node(
                "ImageStitch",
                3,
                {
                    "image1": Link("label_without"),
                    "image2": Link("label_with"),
                    "direction": "down",
                    "spacing_width": 8,
                },
                collapsed=True,
            ),
            "save": Node(
                "SaveImage",
                3,
                {"images": Link("stitch"), "filename_prefix": "chroma/compared"},
                "Without and with the LoRA",
                extra_height=350,
            ),
        },
    ),
    Workflow(
        "chroma_train_from_images",
        "Chroma train on images from nodes",
        "Train on images from other nodes.",
        "## Train on images from other nodes\n\n**Chroma Dataset from Images** takes any IMAGE: here two batches "
        "generated by the model itself, joined by *Batch Images*, with one caption line for each image. The new word "
        "`sks` comes to mean a yellow ring.\n\n**For your own images** link *Load Image*, *Load Image (from Folder)*, "
        "a crop or an upscaler in place of the samplers, and write one caption per line in the same order. Pass images "
        "of different sizes as a list, not through *Batch Images*. A copy is kept in `output/chromakit/datasets`; the "
        "node's text says how much space it takes.\n\n"
        + REAL_MODEL
        + "- in both **Chroma Empty Latent** *width* and *height* to 1024, or leave the samplers out\n"
        + "- in **Chroma Dataset from Images** *resolution* to 512 or 1024, *captions* and *trigger*\n"
        + REAL_TRAIN,
        LOAD_AND_NEGATIVE
        | generated("first", "a yellow ring on a green background", 2, 11)
        | generated("second", "a yellow ring on a blue background", 2, 12)
        | {
            "join": Node("ImageBatch", 2, {"image1": Link("decode_first"), "image2": Link("decode_second")}),
            "dataset": Node(
                "ChromaDatasetFromImages",
                2,
                {
                    "images": Link("join"),
                    "captions": "a sks on a green background\na sks on a green background\n"
                    "a sks on a blue background\na sks on a blue background",
                    "trigger": "sks",
                },
            ),
        }
        | train_on("dataset", 3, name="from-images", preview_prompt="a sks on a red background")
        | status(4),
    ),
    Workflow(
        "chroma_train_with_regularisation",
        "Chroma train with regularisation",
        "Two datasets: the concept, and a regularisation set of ordinary images that should not change.",
        "## A main dataset and a regularisation set\n\nThe LoRA learns the emblem from the main dataset. The second "
        "one has ordinary images, generated by the model itself and marked *regularisation*: on them the LoRA is "
        "trained "
        "to change nothing, so that a star stays a star. **Chroma Combine Datasets** mixes both: with *weight_2* 0.5 "
        "an "
        "image of the second is used half as often as one of the first. Each dataset keeps its own options. "
        "*prior_weight* in **Chroma Training Settings** sets how strongly it regularises.\n\n"
        + REAL_MODEL
        + REAL_FOLDER
        + "\n- the *Prompt* and the *captions* to your concept's class (for one dog: `a photo of a dog`), "
        "*width* and *height* to the *resolution*, *batch_size* to as many images as fit; or use a second **Chroma "
        "Dataset** with *regularisation* on\n" + REAL_TRAIN,
        LOAD_AND_NEGATIVE
        | generated("ordinary", "a red star on a blue background", 4, 21, column=0)
        | {
            "main": Node("ChromaDataset", 1, {"folder": TRAINING_SET, "trigger": "sks"}, "Main dataset"),
            "ordinary": Node(
                "ChromaDatasetFromImages",
                2,
                {
                    "images": Link("decode_ordinary"),
                    "captions": "a red star on a blue background",
                    "regularisation": True,
                },
                "Regularisation set",
            ),
            "combine": Node(
                "ChromaCombineDatasets",
                3,
                {"dataset_1": Link("main"), "dataset_2": Link("ordinary"), "weight_2": 0.5},
            ),
            "mixture": Node(
                "PreviewAny", 3, {"source": Link("combine", 1)}, "How the datasets are mixed", extra_height=60
            ),
        }
        | train_on("combine", 4, name="sks-regularised", preview_prompt=CONCEPT_PROMPT)
        | status(3)
        | {"show": Node("PreviewAny", 4, {"source": Link("status", 0)}, "Status", extra_height=60)},
    ),
)
