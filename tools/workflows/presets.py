"""The real Chroma on cards of six sizes: workflows that differ in the memory plan alone.

The plan is asked of `chroma_core.memory` each time, so what a preset sets is what the pack recommends.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from _environment import ROOT

from .parts import Link, ModelFile, Node, Workflow, decode, sampler, wait_and_apply, with_text

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
    """One workflow a card, smallest first."""
    return tuple(_workflow(preset(card)) for card in CARDS)


def _workflow(found: Preset) -> Workflow:
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
    return Workflow(
        found.name,
        f"The real Chroma on a GPU of {found.card} GB: train a LoRA on your images, then generate with it.",
        _note(found),
        {
            "load": Node("ChromaLoadModel", 0, loader, extra_height=60, models=tuple(FILES.values())),
            "settings": Node(
                "ChromaTrainingSettings",
                0,
                {
                    "gradient_checkpointing": plan.gradient_checkpointing,
                    "preview_width": TRAINING_SIZE,
                    "preview_height": TRAINING_SIZE,
                },
                collapsed=True,
            ),
            "dataset": Node(
                "ChromaDataset",
                1,
                {"folder": FOLDER, "trigger": "sks", "resolution": TRAINING_SIZE},
                "Your images",
                extra_height=250,
            ),
            "train": Node(
                "ChromaTrainLora",
                2,
                {
                    "model": Link("load", 0),
                    "text_encoder": Link("load", 1),
                    "dataset": Link("dataset"),
                    "settings": Link("settings"),
                    "name": "my-lora",
                    "steps": STEPS,
                    "preview_prompt": "a photo of [trigger]",
                },
                extra_height=120,
            ),
        }
        | with_text("a photo of [trigger]", 0, width=plan.pixels, height=plan.pixels, trigger="sks")
        | wait_and_apply(2)
        | {"sample": sampler("lora", 3, steps=28)}
        | decode("sample", "chroma/my-lora", 4),
    )


def _note(found: Preset) -> str:
    from chroma_core.memory import in_gib
    from chroma_core.memory.plan import peaks, step_traffic

    plan = found.settings
    size = plan.pixels
    sampling, training = peaks(plan), peaks(replace(plan, size=TRAINING_SIZE))
    fits = "fits here too" if found.fits("training", IMAGE_SIZE) else "does not fit here with these settings"
    larger = f"A *resolution* of {IMAGE_SIZE} {fits}."
    if moved := step_traffic(replace(plan, size=TRAINING_SIZE)):
        larger += (
            f" The price: every training step sends {in_gib(moved)} of weights to the GPU, at {BUS:g} GB/s at least "
            f"{moved / (BUS * 1e9):.1f} s, so that {STEPS} steps take {STEPS * moved / (BUS * 3.6e12):.1f} hours or "
            "more."
        )
    checkpointing = "on" if plan.gradient_checkpointing else "off"
    return (
        f"## The real Chroma on a GPU of {found.card} GB\n\n"
        "**1. The files.** The page lists the missing files and offers to download them, 28 GB in all. If your browser "
        "downloads them, move each to `models/diffusion_models`, `models/text_encoders` or `models/vae`, as listed; "
        "then press R. Files that you already have work too, e.g. an fp8 T5: choose them in **Chroma Load Model**.\n\n"
        f"**2. Your images.** 10 to 50 of them in a folder `{FOLDER}` below ComfyUI's `input`, {TRAINING_SIZE} "
        "pixels or larger, each with a `.txt` caption of the same name. Use a made-up word for the new concept: “a "
        "photo of a sks dog on grass”. Then press R.\n\n"
        "**3. Run.** It trains, waits, and generates an image. Before that, change *name*, *trigger* (in **Your "
        "images** and in the *Prompt*), the *Prompt* and *preview_prompt*.\n\n"
        "The prompt waits until the LoRA is finished, which takes hours; *Cancel* ends the job and keeps what it has "
        "learnt. To keep the queue free meanwhile, select the five nodes from **Chroma Wait for Training** to **Save "
        "Image** and mute them (Ctrl+M) before you run; unmute them and run again when the job is completed.\n\n"
        "### The memory plan\n\n"
        f"| setting | value |\n|---|---|\n| precision | `{plan.precision}` |\n"
        f"| text_precision | `{plan.text_precision}` |\n"
        f"| offload | `{plan.offload}` |\n| gradient_checkpointing | {checkpointing} |\n\n"
        f"This assumes {COMPUTER} GB of RAM. Sampling at {size} × {size} needs about "
        f"{in_gib(sampling.sampling)} of GPU memory, training at {TRAINING_SIZE} about "
        f"{in_gib(training.training)}; {in_gib(found.on.device_budget)} are available, the rest is left for the "
        f"desktop and the driver. {larger} These are predictions (docs/memory.md), not measured on such a GPU. "
        "The output *memory_plan* of **Chroma Load Model** shows what fits your machine; see *chroma_your_files*.\n\n"
        "The templates for 4 to 24 GB differ in this plan only (and that for 4 GB in the size of the image); 12 and "
        "16 GB have the same one, as there is nothing between `int8` and `bf16`."
    )
