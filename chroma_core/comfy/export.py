"""Writes a stock workflow: the window's form, and beside it the API form."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import free_path, write_json
from .graph import Prompt, has_simple_schedule, stock_prompt
from .source import StockPreview, stock_preview
from .window import window_form


def export_workflow(
    path: Path, output: Path | None = None, changes: Mapping[str, Any] | None = None, **names: str | None
) -> tuple[Path, Path, StockPreview]:
    """Write the workflow of a LoRA file; returns (window's file, API file, what it repeats).

    Args:
        output: the window's file; default `<lora>_stock.json` in the current folder, never one that exists already.
        changes: see `stock_preview`.
        names: lora, transformer, text_encoder, vae: file names in the host's folders.
    Raises what `stock_preview` raises.
    """
    preview = stock_preview(path, changes)
    prompt = stock_prompt(preview, **names)
    window = output or free_path(Path(), f"{path.stem}_stock.json")
    api = window.with_name(f"{window.stem}_api.json")
    write_json(window, window_form(prompt, note(preview, prompt)))
    write_json(api, prompt)
    return window, api, preview


def note(preview: StockPreview, prompt: Prompt) -> str:
    """What the workflow repeats and what must stay as it is, for the note in the window."""
    settings = preview.settings
    schedule = (
        "**Flow shift** and **Schedule** follow the picture's size: change *width* and *height* in both places."
        if has_simple_schedule(preview)
        else "**Schedule** holds the sigmas of these steps at this size; another size or number of steps needs others: "
        "export the workflow again."
    )
    lines = [
        f"Repeats the preview of **{preview.lora.name}** with the host's own nodes: {preview.width}×{preview.height}, "
        f"{settings.steps} steps, guidance {settings.guidance:g}, seed {settings.seed}, {settings.method}, recipe "
        f"{preview.recipe.name}.",
        "Choose your files in the three loaders: Chroma's transformer, T5-XXL, the Flux VAE.",
        schedule,
    ]
    if "padding" in prompt:
        lines.append(
            "T5 is loaded with the type *mochi* on purpose: it is the same T5-XXL with its padding masked. With the "
            "type *chroma* T5 would attend to the visible pad token, and the picture would differ."
        )
    lines.append("Brackets in prompts are escaped: \\\\( is a bracket, ( starts a weight.")
    return "\n\n".join([*lines, *preview.remarks])
