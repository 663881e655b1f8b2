"""The real Chroma on cards of six sizes: workflows that differ in the memory plan alone.

The plan is asked of `chroma_core.memory` each time, so what a preset sets is what the pack recommends.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from _environment import ROOT

from .parts import SIZE_AND_SEED, Link, ModelFile, Node, Workflow, decode, sampler, status, with_text

if TYPE_CHECKING:
    from chroma_core.memory import Machine
    from chroma_core.memory.plan import Purpose, Settings

CARDS = (4, 6, 8, 12, 16, 24)  # GB of the card
COMPUTER = 32  # GB
TRAINING_SIZE = 512  # pixels
IMAGE_SIZE = 1024  # pixels
IMAGE_SIZES = {4: 512}  # where the VAE alone, which needs 2.8 GiB for 1024, does not fit
BUS = 12.0  # GB/s; what PCIe 3.0 x16, or 4.0 x8, carries in practice
STEPS = 1500
FOLDER = "my_pictures"
LORA_NAME = "my-lora"
HELD_OUT = 0.1
"""Share of the images; none of fewer than 8."""

HUB = "https://huggingface.co"
FILES = {
    "transformer": ModelFile(
        "Chroma1-Base.safetensors",
        f"{HUB}/lodestones/Chroma1-Base/resolve/main/Chroma1-Base.safetensors",
        "diffusion_models",
    ),
    "text_encoder": ModelFile(
        "t5xxl_fp16.safetensors",
        f"{HUB}/comfyanonymous/flux_text_encoders/resolve/main/t5xxl_fp16.safetensors",
        "text_encoders",
    ),
    "vae": ModelFile(
        "ae.safetensors",
        f"{HUB}/Comfy-Org/Lumina_Image_2.0_Repackaged/resolve/main/split_files/vae/ae.safetensors",
        "vae",
    ),
}
"""By the widget of Chroma Load Model that names it. T5 and the VAE as in the host's own templates. fp16, not fp8: the
plan quantises T5 where it must, and what is quantised twice loses twice."""


@dataclass(frozen=True)
class Preset:
    """A card and what is set for it; `settings` are those of sampling, and train too."""

    card: int
    on: Machine
    settings: Settings

    @property
    def name(self) -> str:
        return f"chroma_4_real_{self.card:02d}gb"

    @property
    def title(self) -> str:
        return f"Chroma on {self.card} GB"

    def fits(self, purpose: Purpose, size: int) -> bool:
        from chroma_core.memory.plan import fits_on

        return fits_on(replace(self.settings, size=size), self.on, purpose)


def preset(card: int) -> Preset:
    """What `chroma_core.memory` recommends for a card of `card` GB in a computer of `COMPUTER` GB.

    One Chroma Load Model serves both, so where sampling and training are given different weights it takes the smaller
    ones, which fit in both. Raises RuntimeError if what comes out does not fit.
    """
    sys.path[:0] = [] if str(ROOT) in sys.path else [str(ROOT)]
    from chroma_core.memory import Machine, recommend
    from chroma_core.memory.machine import GIB
    from chroma_core.memory.plan import CHOICES, Settings

    on = Machine(f"a card of {card} GB", card * GIB, COMPUTER * GIB)
    size = IMAGE_SIZES.get(card, IMAGE_SIZE)
    sampling = recommend(Settings("base", size=size), on, "sampling")
    training = recommend(Settings("base", size=TRAINING_SIZE), on, "training")
    smaller = max(sampling, training, key=lambda found: CHOICES.index(found.precision))
    # Sampling decides where the parts are: in training they take turns whatever the mode.
    settings = replace(
        sampling.applied_to(Settings(size=size)),
        precision=smaller.precision,
        text_precision=smaller.text_precision,
        resident_blocks=min(sampling.resident_blocks, training.resident_blocks),
        gradient_checkpointing=training.gradient_checkpointing,
    )
    found = Preset(card, on, settings)
    if not (found.fits("sampling", size) and found.fits("training", TRAINING_SIZE)):
        raise RuntimeError(f"The plan for {card} GB does not serve both sampling and training: {settings}")
    return found


def presets() -> tuple[Workflow, ...]:
    """Two workflows a card, to train and to use what was trained; smallest card first."""
    return tuple(made for card in CARDS for made in _workflows(preset(card)))


def _workflows(found: Preset) -> tuple[Workflow, Workflow]:
    plan = found.settings
    loader = {
        "flavour": "base",
        **{widget: file.name for widget, file in FILES.items()},
        "precision": plan.precision,
        "text_precision": plan.text_precision,
        "offload": plan.offload,
        "resident_blocks": plan.resident_blocks,
        "offload_during_startup": plan.offload_during_startup,
    }
    load = {"load": Node("ChromaLoadModel", 0, loader, models=tuple(FILES.values()))}
    train = Workflow(
        found.name,
        f"{found.title}, train a LoRA",
        f"The real Chroma on a GPU of {found.card} GB: train a LoRA on your images.",
        _note(found, _TRAIN, plan_of_training(found)),
        load
        | {
            "speed": Node("ChromaSpeedSettings", 0, {"gradient_checkpointing": plan.gradient_checkpointing}),
            "previews": Node(
                "ChromaPreviewSettings",
                0,
                {"preview_width": TRAINING_SIZE, "preview_height": TRAINING_SIZE, "settings": Link("speed")},
                collapsed=True,
            ),
            "saving": Node(
                "ChromaSavingSettings",
                0,
                {"hold_out": HELD_OUT, "settings": Link("previews")},
                "A tenth is held out",
                collapsed=True,
            ),
            "dataset": Node(
                "ChromaDataset", 1, {"folder": FOLDER, "trigger": "sks", "resolution": TRAINING_SIZE}, "Your images"
            ),
            "train": Node(
                "ChromaTrainLora",
                2,
                {
                    "model": Link("load", 0),
                    "text_encoder": Link("load", 1),
                    "dataset": Link("dataset"),
                    "settings": Link("saving"),
                    "name": LORA_NAME,
                    "steps": STEPS,
                    "preview_prompt": "a photo of [trigger]",
                },
            ),
        }
        | status(3),
        (
            "dataset.folder",
            "dataset.trigger",
            "dataset.resolution",
            "train.name",
            "train.steps",
            "train.learning_rate",
            "train.preview_prompt",
        ),
        ("status", "show"),
    )
    use = Workflow(
        f"{found.name}_use",
        f"{found.title}, use a LoRA",
        f"The real Chroma on a GPU of {found.card} GB: generate with the LoRA that you trained.",
        _note(found, _USE, plan_of_sampling(found)),
        load
        | {"lora": Node("ChromaApplyLora", 1, {"model": Link("load", 0), "lora": f"{LORA_NAME}.safetensors"})}
        | with_text("a photo of [trigger]", width=plan.pixels, height=plan.pixels, trigger="sks")
        | {"sample": sampler("lora", 2, steps=28)}
        | decode("sample", f"chroma/{LORA_NAME}", 3),
        ("lora.lora", "lora.strength", "positive.text", "positive.trigger", *SIZE_AND_SEED),
        ("save",),
    )
    return train, use


_TRAIN = (
    "**1. The files.** The page lists the missing files and offers to download them, 28 GB in all. What your browser "
    "downloads goes to `models/diffusion_models`, `models/text_encoders` or `models/vae`, as listed; then press R. "
    "Files that you have work too: choose them in **Chroma Load Model**.\n\n"
    f"**2. Your images.** 10 to 50 of them in a folder `{FOLDER}` below ComfyUI's `input`, {TRAINING_SIZE} "
    "pixels or larger, each with a `.txt` caption of the same name, with a made-up word for the new concept: “a "
    "photo of a sks dog on grass”. Then press R. A tenth of them is not trained on but measured on.\n\n"
    "**3. Run.** Before that, change *name*, *trigger* and *preview_prompt*. The job trains in the background, for "
    "hours; the queue is free at once. Run again, or open the **Chroma** tab, to see how it is doing.\n\n"
)
_USE = (
    "Train first, with *{title}, train a LoRA*. Then press R, choose your LoRA in **Chroma Apply LoRA** (the page "
    f"reports `{LORA_NAME}.safetensors` as missing until it is there), and write the *Prompt*; *trigger* is the word "
    "that you trained with.\n\n"
)


def plan_of_training(found: Preset) -> str:
    """What training needs on the card, and what a larger size would."""
    from chroma_core.memory import in_gib
    from chroma_core.memory.plan import peaks, step_traffic

    plan = replace(found.settings, size=TRAINING_SIZE)
    fits = "fits here too" if found.fits("training", IMAGE_SIZE) else "does not fit here with these settings"
    text = (
        f"Training at {TRAINING_SIZE} pixels needs about {in_gib(peaks(plan).training)} of GPU memory. A *resolution* "
        f"of {IMAGE_SIZE} {fits}."
    )
    if moved := step_traffic(plan):
        text += (
            f" The price: every step sends {in_gib(moved)} of weights to the GPU, at {BUS:g} GB/s at least "
            f"{moved / (BUS * 1e9):.1f} s, so that {STEPS} steps take {STEPS * moved / (BUS * 3.6e12):.1f} hours or "
            "more."
        )
    return text


def plan_of_sampling(found: Preset) -> str:
    """What an image needs on the card."""
    from chroma_core.memory import in_gib
    from chroma_core.memory.plan import peaks

    size = found.settings.pixels
    return f"An image of {size} × {size} needs about {in_gib(peaks(found.settings).sampling)} of GPU memory."


def _note(found: Preset, what_to_do: str, needed: str) -> str:
    from chroma_core.memory import in_gib

    plan = found.settings
    checkpointing = "on" if plan.gradient_checkpointing else "off"
    return (
        f"## The real Chroma on a GPU of {found.card} GB\n\n{what_to_do.replace('{title}', found.title)}"
        "### The memory plan\n\n"
        f"| setting | value |\n|---|---|\n| precision | {plan.precision} |\n"
        f"| text_precision | {plan.text_precision} |\n"
        f"| offload | {plan.offload} |\n| gradient_checkpointing | {checkpointing} |\n\n"
        f"{needed} {in_gib(found.on.device_budget)} are available, the rest is left for the desktop and the driver; "
        f"{COMPUTER} GB of RAM are assumed. These are predictions, not measured on such a GPU: **Chroma Load Model** "
        "shows what fits your machine."
    )
