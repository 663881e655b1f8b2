"""What goes with a LoRA that is given away: a cover image, a model card, a folder of it all to be uploaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ...errors import DiskFull, JobError, first_line
from ...files import atomic_folder, disk_is_full, free_name, require_room, sha256_file, write_atomic
from ...lora.files import read_metadata
from ...model.flavours import FLAVOURS
from ...sampling.recipe import Recipe
from ..config.job import Preview
from .grid import Cell, Grid

IN_DIFFUSERS = ("lora", "rslora")
"""Kinds of adapter that diffusers loads to the bit from the file as it is written (docs/lora.md)."""

TAGS = ["text-to-image", "lora", "chroma", "template:diffusion-lora"]
"""Of a card: a task, a kind, a family, and the layout in which the Hub shows LoRAs."""


@dataclass(frozen=True)
class Shown:
    """An image of a card: its place beside the card, and what it was sampled with."""

    url: str
    preview: Preview


def model_card(header: Mapping[str, str], file: str, strength: float, images: Sequence[Shown]) -> str:
    """A model card in Markdown, with the front matter that hubs read.

    Args:
        header: of the LoRA file; the card says nothing that is not in there or in the other arguments.
        file: the LoRA's file name.
        strength: at which the images were made.
        images: the first is the cover.
    """
    training: dict[str, Any] = json.loads(header.get("chromakit.training", "{}"))
    title, trigger = header.get("modelspec.title") or Path(file).stem, header.get("chromakit.trigger", "")
    base = _base(header)
    front: dict[str, Any] = {"tags": TAGS, "pipeline_tag": "text-to-image"}
    if "/" in base:
        front |= {"base_model": base, "base_model_relation": "adapter"}
    if training.get("kind") in IN_DIFFUSERS:
        front |= {"library_name": "diffusers"}
    if trigger:
        front |= {"instance_prompt": trigger}
    front["widget"] = [_widget(image) for image in images]
    use = {
        "file": f"`{file}`",
        "trigger word": f"`{trigger}`" if trigger else "none",
        "strength": f"{strength:g}",
        "base": base or "not recorded",
    }
    if images:
        settings = images[0].preview.settings
        use |= {
            "steps": settings.steps,
            "guidance": settings.guidance,
            "sampler": f"{settings.method}, {settings.spacing}",
        }
    numbers = {words: training[name] for name, words in _NUMBERS.items() if training.get(name) is not None}
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---",
        f"# {_line(title)}",
        "<Gallery />",
        *([f"![{_line(images[0].preview.prompt)}]({images[0].url})"] if images else ()),
        header.get("modelspec.description", ""),
        "## How to use it",
        _table(use),
        "In ComfyUI: put the file into `models/loras`, and choose it in *Chroma Apply LoRA* or in any LoRA loader. The "
        "images hold the graph that made them: drop one onto ComfyUI's page.",
        "## How it was trained",
        _table(numbers),
        f"Recipe (what decides an image beside the prompt): {_recipe(header)}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


_NUMBERS = {
    **{name: name for name in ("kind", "rank", "alpha", "target", "steps", "batch", "learning_rate")},
    "pictures": "images",
    "heldout_loss_base": "validation loss of the base",
    "heldout_loss": "validation loss",
}
"""Of what the header says of the training, what a card tells, in its words."""


def _base(header: Mapping[str, str]) -> str:
    """The base's id on the Hub; for one that is not there, the file's name or the flavour's."""
    own, name = header.get("chromakit.base_file"), header.get("chromakit.flavour", "")
    found = FLAVOURS.get(name)
    return own or (found and found.repository) or name


def _widget(image: Shown) -> dict[str, Any]:
    negative = {"parameters": {"negative_prompt": image.preview.negative}} if image.preview.negative else {}
    return {"text": image.preview.prompt, **negative, "output": {"url": image.url}}


def _recipe(header: Mapping[str, str]) -> str:
    text = header.get("chromakit.recipe")
    return f"{Recipe.from_dict(json.loads(text)).describe()}." if text else "not recorded."


def _table(rows: Mapping[str, object]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {_line(value)} |" for name, value in rows.items())])


def _line(value: object) -> str:
    """One line that breaks no table, heading or image of Markdown."""
    return " ".join(str(value).split()).translate({ord(sign): f"\\{sign}" for sign in "|[]<>"})


def keep(grid: Grid, lora: Path, cell: Cell, image: Path) -> tuple[dict[str, str], list[str]]:
    """Write the cover `NAME.png` and the card `NAME.md` beside a LoRA, where ComfyUI and other tools look for them.

    A file that is there and not as we wrote it is the user's, and stays. Returns the new `Grid.written`, and the names
    of the files that stayed.
    """
    cover, card = lora.with_suffix(".png"), lora.with_suffix(".md")
    text = model_card(read_metadata(lora), lora.name, cell.strength, [Shown(cover.name, cell.preview)])
    written, stayed = dict(grid.written), []
    for path, content in ((cover, image.read_bytes()), (card, text)):
        if path.exists() and sha256_file(path) != written.get(path.name):
            stayed.append(path.name)
        else:
            write_atomic(path, content)
            written[path.name] = sha256_file(path)
    return written, stayed


def publish(folder: Path, lora: Path, images: Sequence[tuple[Cell, Path]]) -> Path:
    """Write a folder of the LoRA's name below `folder`: the LoRA, `README.md` and `images/`; returns it.

    One that is there is never replaced: the new one is then NAME-2. Raises JobError when it cannot be written.
    """
    try:
        return _publish(folder, lora, images)
    except OSError as error:
        raise (DiskFull if disk_is_full(error) else JobError)(
            f"The folder to publish cannot be written to '{folder}': {first_line(error)}. Nothing is left of it. Make "
            "room, or allow writing there."
        ) from error


def _publish(folder: Path, lora: Path, images: Sequence[tuple[Cell, Path]]) -> Path:
    require_room(folder, lora.stat().st_size, "the folder to publish", JobError)
    target = folder / free_name(lora.stem, lambda name: not (folder / name).exists())
    with atomic_folder(target) as made:
        (made / "images").mkdir()
        shown = [Shown(f"images/{number:02d}.png", cell.preview) for number, (cell, _) in enumerate(images, 1)]
        for one, (_, path) in zip(shown, images, strict=True):
            shutil.copyfile(path, made / one.url)
        shutil.copyfile(lora, made / lora.name)
        card = model_card(read_metadata(lora), lora.name, images[0][0].strength, shown)
        (made / "README.md").write_text(card, encoding="utf-8")
    return target
