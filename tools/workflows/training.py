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
    painted,
    sampler,
    status,
    train_on,
    wait_and_apply,
    with_text,
)

SEEDS = 4

FIRST_LORA = Workflow(
    "chroma_2_first_lora",
    "Train a LoRA on 16 bundled pictures in about three minutes, and see a picture without and with it.",
    "## Your first LoRA\n\n**Press *Run*.** `tiny` has never seen an “sks emblem”. It now learns one from 16 bundled "
    "pictures, in about three minutes on a CPU; then one prompt is painted without the LoRA and with it.\n\nWatch "
    "**Chroma Train LoRA**: it shows the step, the loss, *pause* and *stop*. This prompt waits for the job; *Cancel* "
    "ends the job and keeps what it has learnt. *Run* again trains nothing anew: the same settings are the same job.\n"
    "\nThe LoRA is `output/loras/sks.safetensors`. Next: *chroma_3_use_lora*.\n\n" + REAL_TRAINING + REAL_SIZE,
    LOAD
    | TRAINING
    | with_text(CONCEPT_PROMPT, 0)
    | wait_and_apply(2)
    | {"base": sampler("load", 3), "sample": sampler("lora", 3)}
    | decode("base", "chroma/without_lora", 4, "_base")
    | decode("sample", "chroma/with_lora", 4),
)


def compared(key: str, label: str) -> dict[str, Node]:
    """A sampler's pictures of several seeds in one row, with a line of text in its corner."""
    samples, vae = Link(f"sample_{key}"), Link("load", 2)
    text = {"text": label, "font_size": 9.0, "position": "bottom"}
    return {
        f"decode_{key}": Node("VAEDecode", 4, {"samples": samples, "vae": vae}, collapsed=True),
        # The grid takes a list of pictures, not a batch.
        f"list_{key}": Node("RebatchImages", 4, {"images": Link(f"decode_{key}"), "batch_size": 1}, collapsed=True),
        f"grid_{key}": Node("ImageGrid", 4, {"images": Link(f"list_{key}"), "columns": SEEDS}),
        f"label_{key}": Node(
            "TextOverlay", 4, {"images": Link(f"grid_{key}"), **text}, f"Write: {label}", collapsed=True
        ),
    }


TRAINING_WORKFLOWS = (
    Workflow(
        "chroma_train_lora",
        "Train in the background: the queue is free again at once.",
        "## Train in the background\n\nThe job starts in the background and the queue is free again at once: keep "
        "making pictures while it trains. Queue this workflow again to see how far it is: the same settings never "
        "start a second job. The finished LoRA lands in `output/loras` and works in **Chroma Apply LoRA**, in the "
        "host's *Load LoRA* and in diffusers.\n\n" + REAL_TRAINING,
        LOAD | TRAINING | status(3),
    ),
    Workflow(
        "chroma_resume_training",
        "Go on with a job that was stopped, and see how it is doing.",
        "## Go on with a job\n\nThe settings of this workflow are those of *chroma_2_first_lora*: the same settings "
        "are the same job. *if_exists* is `resume`, so *Run* takes it up where it ended, bit for bit as if it had "
        "never been stopped. A job that is not there yet is started. For a job of yours open the workflow that started "
        "it and set *if_exists* to `resume`.\n\n"
        "- **pause**: training rests between two steps and keeps its memory; *resume* goes on\n"
        "- **stop**: the LoRA is written as it is, the memory is free. `resume` here goes on from there\n"
        "- **the computer went off, or the host was closed**: nothing to do, `keep` and `resume` both go on from the "
        "last checkpoint (*checkpoint_every* in **Chroma Training Settings**)\n"
        "- **completed, but not enough**: do not raise *steps* here, that is another job from step 0. *Extend* the "
        "job instead, in the **Chroma** tab at the side\n"
        "- `restart` throws away what the job has learnt and begins anew\n\n"
        "*pause* and *stop* are on the node and in the tab. Queue again to see a newer status.\n\n" + REAL_TRAINING,
        LOAD
        | TRAINING
        | {
            "train": Node(
                "ChromaTrainLora",
                2,
                {**TRAINING["train"].inputs, "if_exists": "resume"},
                extra_height=TRAINING["train"].extra_height,
            )
        }
        | status(3),
    ),
    Workflow(
        "chroma_compare_lora",
        "Train, then one grid of pictures: the same seeds without the LoRA and with it.",
        "## What did it learn?\n\nTrains (or takes the LoRA of *chroma_2_first_lora*, which is the same job), then "
        f"paints one prompt with {SEEDS} seeds, without the LoRA above and with it below. Each column has one seed, so "
        "a column differs by the LoRA alone.\n\nLook at three things: does the concept come; does all else (the "
        "background, the composition) stay; do the pictures below still differ from each other. All the same: too "
        "many steps. To compare strengths, link **Chroma Apply LoRA** of another *strength* in place of the model "
        "above.\n\nMore seeds: *batch_size* in **Chroma Empty Latent**, and *columns* in both grids.\n\n"
        + REAL_TRAINING
        + REAL_SIZE,
        LOAD
        | TRAINING
        | with_text(CONCEPT_PROMPT, 0, batch_size=SEEDS)
        | wait_and_apply(2)
        | {"sample_without": sampler("load", 3), "sample_with": sampler("lora", 3)}
        | compared("without", "without the LoRA")
        | compared("with", "with the LoRA")
        | {
            "stitch": Node(
                "ImageStitch",
                4,
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
                4,
                {"images": Link("stitch"), "filename_prefix": "chroma/compared"},
                "Without and with the LoRA",
                extra_height=350,
            ),
        },
    ),
    Workflow(
        "chroma_train_from_images",
        "Train on pictures that other nodes hand over.",
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
        LOAD_AND_NEGATIVE
        | painted("first", "a yellow ring on a green background", 2, 11)
        | painted("second", "a yellow ring on a blue background", 2, 12)
        | {
            "join": Node("ImageBatch", 3, {"image1": Link("decode_first"), "image2": Link("decode_second")}),
            "dataset": Node(
                "ChromaDatasetFromImages",
                3,
                {
                    "images": Link("join"),
                    "captions": "a sks on a green background\na sks on a green background\n"
                    "a sks on a blue background\na sks on a blue background",
                    "trigger": "sks",
                },
                extra_height=300,
            ),
        }
        | train_on("dataset", 4, name="from-images", preview_prompt="a sks on a red background"),
    ),
    Workflow(
        "chroma_train_with_regularisation",
        "Two data sets: the concept, and ordinary pictures on which nothing shall change.",
        "## A main set and a regularisation set\n\nThe LoRA learns the emblem from the main set. The second set holds "
        "ordinary pictures, painted by the model itself and marked *regularisation*: on them the LoRA is trained to "
        "change nothing, so that a star stays a star. **Chroma Combine Datasets** mixes both: with *weight_2* 0.5 a "
        "picture of the second set is used half as often as one of the first. Each set keeps its own options; the "
        "trigger word of previews and LoRA is the main set's. How strongly it holds back: *prior_weight* in **Chroma "
        "Training Settings**.\n\n"
        + REAL_MODEL
        + REAL_FOLDER
        + "\n- the *Prompt* and the *captions* to what your concept is one of (for one dog: `a photo of a dog`), "
        "*width* and *height* to the *resolution*, *batch_size* to as many pictures as fit; or use a second **Chroma "
        "Dataset** with *regularisation* on\n" + REAL_TRAIN,
        LOAD_AND_NEGATIVE
        | painted("ordinary", "a red star on a blue background", 4, 21, column=0)
        | {
            "main": Node("ChromaDataset", 2, {"folder": TRAINING_SET, "trigger": "sks"}, "Main set", extra_height=250),
            "ordinary": Node(
                "ChromaDatasetFromImages",
                3,
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
                1,
                {"dataset_1": Link("main"), "dataset_2": Link("ordinary"), "weight_2": 0.5},
            ),
            "mixture": Node(
                "PreviewAny", 1, {"source": Link("combine", 1)}, "How the sets are mixed", extra_height=100
            ),
        }
        | train_on("combine", 4, name="sks-regularised", preview_prompt=CONCEPT_PROMPT),
    ),
)
