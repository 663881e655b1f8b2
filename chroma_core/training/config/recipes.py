"""Options to begin with for a LoRA of a person, a style, an object or a pose, each with where its number comes from.

None of them was run on the real model here. docs/recipes.md is made from these tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ...errors import ConfigError, did_you_mean

MEASURED = (
    "The real model has not been trained here. Numbers marked study were measured on tiny, a miniature of 64 × 64 "
    "pixels; the others are what trainers and their users document, mostly for Chroma's relatives."
)
"""What holds for all recipes."""

SOURCES: dict[str, tuple[str, str]] = {
    "author": (
        "the author of Chroma on the released models",
        "https://www.reddit.com/r/StableDiffusion/comments/1mxwr4e/",
    ),
    "onetrainer": (
        "OneTrainer's preset for Chroma",
        "https://github.com/Nerogar/OneTrainer/blob/3835ac0b/training_presets/%23chroma%20LoRA%2024GB.json",
    ),
    "ai-toolkit": (
        "ai-toolkit's example for Chroma",
        "https://github.com/ostris/ai-toolkit/blob/main/config/examples/train_lora_chroma_24gb.yaml",
    ),
    "ai-toolkit docs": (
        "what ai-toolkit says of its preservation",
        "https://github.com/ostris/ai-toolkit/blob/main/ui/src/docs.tsx",
    ),
    "simpletuner": (
        "SimpleTuner's guide for Chroma",
        "https://github.com/bghira/SimpleTuner/blob/main/documentation/quickstart/CHROMA.md",
    ),
    "diffusers": (
        "diffusers' DreamBooth for Flux",
        "https://github.com/huggingface/diffusers/blob/main/examples/dreambooth/README_flux.md",
    ),
    "faces": (
        "a course on training a LoRA of a face",
        "https://setuproll.com/courses/ai-image/lessons/ai-image-pro-training-a-lora",
    ),
    "styles": (
        "56 style LoRAs of Flux 2 Klein compared",
        "https://happyin.space/image-generation/flux-klein-style-lora-system/",
    ),
    "poses": ("a published LoRA of poses, with its data", "https://huggingface.co/houseofboern/pose-pack-krea2-v1"),
    "captions": ("Scenario on captions by kind", "https://help.scenario.com/en/articles/advanced-captioning"),
    "study": ("measured on tiny", "quality.md"),
    "verdict": ("what the verdict needs", "verdict.md"),
    "own": ("chosen here, by nothing that was measured", "recipes.md"),
}
"""What the numbers come from: words, and an address, which is a page of docs/ where it is no URL."""


@dataclass(frozen=True)
class Recipe:
    """A recipe. options: by dotted name, each with its value and the names of its SOURCES; images: fewest and most that
    are advised; images_from, captions_from: names of SOURCES."""

    title: str
    options: Mapping[str, tuple[Any, tuple[str, ...]]]
    images: tuple[int, int]
    images_from: tuple[str, ...]
    captions: str
    captions_from: tuple[str, ...]


ALIKE: dict[str, tuple[Any, tuple[str, ...]]] = {
    "model.flavour": ("hd", ("author", "onetrainer")),
    "lora.rank": (16, ("ai-toolkit", "simpletuner")),
    "learning_rate": (1e-4, ("ai-toolkit",)),
    "dataset.caption_dropout": (0.05, ("ai-toolkit",)),
    "hold_out": (0.1, ("verdict",)),
    "validate_every": (100, ("verdict", "own")),
    "previews.every": (250, ("ai-toolkit",)),
}
"""What no recipe has a reason to change."""

CLASS = {
    "preserve.class_weight": (1.0, ("ai-toolkit docs", "study")),
    "preserve.share": (0.33, ("study",)),
}


def _prompts(*prompts: str) -> dict[str, tuple[Any, tuple[str, ...]]]:
    return {"previews.prompts": (prompts, ("own",))}


RECIPE_TABLE: dict[str, Recipe] = {
    "person": Recipe(
        "one person or character",
        {
            **ALIKE,
            "steps": (2000, ("ai-toolkit",)),
            **CLASS,
            "preserve.class_word": ("person", ("ai-toolkit docs",)),
            **_prompts(
                "a portrait photo of [trigger], daylight",
                "[trigger] riding a bicycle through a city",
                "an oil painting of [trigger]",
                "a portrait photo of an old man with a beard",
            ),
        },
        (15, 30),
        ("faces",),
        "Write the trigger word and what changes from image to image: clothes, pose, place, light, framing. Leave out "
        "what should belong to the person, such as the face.",
        ("captions", "faces"),
    ),
    "style": Recipe(
        "a style of drawing, painting or photography",
        {
            **ALIKE,
            "lora.rank": (32, ("styles",)),
            "steps": (1000, ("styles",)),
            **CLASS,
            **_prompts(
                "[trigger], a castle on a hill at night",
                "[trigger], a portrait of a woman",
                "[trigger], a bowl of fruit on a table",
                "a photo of a dog on a beach",
            ),
        },
        (15, 50),
        ("styles",),
        "Write the trigger word and everything that the image shows, but no word about the style: what no caption "
        "says, the trigger word comes to mean.",
        ("captions", "styles"),
    ),
    "object": Recipe(
        "one thing, product or animal",
        {
            **ALIKE,
            "steps": (2000, ("diffusers", "ai-toolkit")),
            **CLASS,
            "preserve.class_word": ("object", ("own",)),
            **_prompts(
                "a photo of [trigger] on a white table",
                "[trigger] in the grass of a garden",
                "[trigger] in a shop window at night",
                "a photo of a red chair in a kitchen",
            ),
        },
        (8, 20),
        ("diffusers", "verdict"),
        "Write the trigger word where the thing's name would stand (a photo of sks on a shelf), then angle, light and "
        "surroundings. Set class_word to what the thing is one of, e.g. teapot.",
        ("captions", "diffusers"),
    ),
    "pose": Recipe(
        "a pose or gesture that anybody can take",
        {
            **ALIKE,
            "steps": (1250, ("poses",)),
            "preserve.prompts": (
                (
                    "a woman standing in a park",
                    "a man sitting at a table in a cafe",
                    "two children playing on a beach",
                    "a portrait photo of an old man",
                    "a dancer on a stage",
                    "a cyclist on a road",
                ),
                ("own", "study"),
            ),
            "preserve.share": (0.33, ("study",)),
            **_prompts(
                "a woman in a red dress, [trigger], in a street",
                "an old man, [trigger], studio photo",
                "a robot, [trigger], in a forest",
                "a woman standing in a park",
            ),
        },
        (20, 60),
        ("poses", "own"),
        "Use many different people, clothes and places, and describe all of them; say nothing of the pose but the "
        "trigger word.",
        ("captions", "poses"),
    ),
}
"""The recipes by name."""


def recipe(name: str) -> dict[str, Any]:
    """The options of a recipe, nested as a job file has them; all others stay at their defaults.

    Still to be given: the job's `name` and `dataset.folder`, and for most `dataset.trigger`. Raises ConfigError.
    """
    if name not in RECIPE_TABLE:
        meant = did_you_mean(name, RECIPE_TABLE)
        raise ConfigError(f"There is no recipe '{name}'. Choose one of: {', '.join(RECIPE_TABLE)}.{meant}")
    options: dict[str, Any] = {}
    for path, (value, _) in RECIPE_TABLE[name].options.items():
        *sections, last = path.split(".")
        place = options
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = list(value) if isinstance(value, tuple) else value
    return options


def recipes_as_json() -> dict[str, Any]:
    """All recipes with everything that is said of them, as JSON values."""
    sources = {name: {"words": words, "address": address} for name, (words, address) in SOURCES.items()}
    found = []
    for name, each in RECIPE_TABLE.items():
        table = asdict(each)
        del table["options"]
        found.append(
            {
                "name": name,
                **table,
                "options": recipe(name),
                "options_from": {path: list(names) for path, (_, names) in each.options.items()},
            }
        )
    return {"recipes": found, "sources": sources, "measured": MEASURED}
