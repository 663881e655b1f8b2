"""Changes of a dataset folder, each of which can be taken back and done again: by any page, and after a restart.

Every change is a step in `.removed/history.json`: captions and crops as they were and as they became, and files that
left the dataset or came into it, which lie in a numbered folder beside that file as long as they are out. A step is
undone only where nothing else has changed meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from ..errors import DataError
from ..files import read_kept, write_atomic, write_json
from .editing import (
    CAPTION,
    REMOVED,
    Changed,
    caption_text,
    exchange,
    files_aside,
    files_of,
    image_path,
    is_image,
    move_crops,
    plain,
    removed_folder,
    write_captions,
)
from .images import UnreadableImage, as_png, load_image
from .views import CENTRE, load_mask, mask_file, read_crops

FILE = "history.json"
FORMAT = 1
MOST = 200
"""Steps that can be taken back."""


class Step(TypedDict, total=False):
    """One change. label: what it was, in the words of whoever made it. captions, crops: by image, as they were and as
    they became. batch: the number under which files lie while they are out; leaving, coming: the files that the step
    takes out and brings in. group: steps of the same group that follow each other are one."""

    label: str
    captions: dict[str, tuple[str, str]]
    crops: dict[str, tuple[float, float]]
    batch: str
    leaving: list[str]
    coming: list[str]
    group: str


class History(TypedDict):
    """Steps that can be taken back, the last one last, and steps that were and can be done again."""

    done: list[Step]
    undone: list[Step]


_HISTORY = TypeAdapter(History)


def read_history(folder: Path) -> History:
    """What was done to a folder. Raises DataError when that is damaged, or a later version wrote it: then changes are
    made without being kept here, and cannot be undone."""
    file, what = removed_folder(folder) / FILE, f"The dataset's history '{REMOVED}/{FILE}'"
    return read_kept(file, what, FORMAT, _HISTORY.validate_python, DataError) or {"done": [], "undone": []}


def history_or_none(folder: Path) -> tuple[History | None, list[str]]:
    """`read_history`; None, and what to warn of, where that cannot be read."""
    try:
        return read_history(folder), []
    except DataError as error:
        return None, [f"{error} Until then no change of this dataset can be undone."]


def undo(folder: Path) -> None:
    """Take the last change back. Raises DataError when there is none, or it cannot be: then it is forgotten."""
    _turn(folder, "done", "undone")


def redo(folder: Path) -> None:
    """Do again what was taken back last. Raises as `undo` does."""
    _turn(folder, "undone", "done")


def _turn(folder: Path, source: str, target: str) -> None:
    history: Any = read_history(folder)
    if not history[source]:
        raise DataError(f"There is nothing to {'undo' if source == 'done' else 'redo'} in the dataset '{folder.name}'.")
    step = history[source].pop()
    try:
        _apply(folder, step if target == "done" else _reversed(step))
        history[target].append(step)
    finally:  # a step that cannot be undone would bar the way to those before it
        _write(folder, history)


def _reversed(step: Step) -> Step:
    def turned(pairs: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        return {name: (after, before) for name, (before, after) in pairs.items()}

    changed = {"captions": turned(step.get("captions", {})), "crops": turned(step.get("crops", {}))}
    files = {"leaving": step.get("coming", []), "coming": step.get("leaving", [])}
    return Step(**{**step, **changed, **files})


def _apply(folder: Path, step: Step) -> None:
    captions, crops = step.get("captions", {}), step.get("crops", {})
    if captions:
        before, after = ({name: pair[i] for name, pair in captions.items()} for i in (0, 1))
        write_captions(folder, after, before)
    if crops:
        move_crops(folder, {name: after for name, (_, after) in crops.items()})
    if "batch" in step:
        exchange(folder, step["batch"], step.get("leaving", []), step.get("coming", []))


def _do(folder: Path, step: Step) -> None:
    _apply(folder, step)
    history, _ = history_or_none(folder)
    if history is None:
        return
    last = history["done"][-1] if history["done"] else Step()
    if step.get("group") and last.get("group") == step.get("group"):
        last["captions"] = {**last.get("captions", {}), **step.get("captions", {})}
    else:
        history["done"] = [*history["done"], step][-MOST:]
    _write(folder, {"done": history["done"], "undone": []})


def _write(folder: Path, history: History) -> None:
    removed_folder(folder).mkdir(exist_ok=True)
    write_json(removed_folder(folder) / FILE, {"format": FORMAT, **history})


def _new_batch(folder: Path) -> str:
    """A number that no folder and no step has; where the steps cannot be read, one that no counting has reached."""
    history, _ = history_or_none(folder)
    names = [path.name for path in removed_folder(folder).glob("*")]
    if history is None:
        names.append(str(int(time.time())))
    else:
        names += [step["batch"] for step in (*history["done"], *history["undone"]) if "batch" in step]
    return str(1 + max((int(name) for name in names if name.isdecimal()), default=0))


# --- the changes ------------------------------------------------------------------------------------------------------


def caption(folder: Path, texts: Mapping[str, str], seen: Mapping[str, str], label: str = "", group: str = "") -> None:
    """Write captions, all or none, over what is `seen`; see `editing.write_captions`."""
    new = {name: plain(text) if text.strip() else "" for name, text in texts.items()}
    found = {name: caption_text(image_path(folder, name, foreign=True)) for name in new}
    if unreadable := [name for name, text in found.items() if text is None]:
        raise Changed(f"The caption of '{unreadable[0]}' is no text in UTF-8. Repair or remove its {CAPTION} file.")
    pairs = {name: (seen.get(name, found[name] or ""), text) for name, text in new.items()}
    pairs = {name: (old, text) for name, (old, text) in pairs.items() if old != text or found[name] != old}
    if pairs:
        _do(folder, Step(label=label, captions=pairs, group=group))


def crop(folder: Path, crops: Mapping[str, float], label: str = "") -> None:
    """Say where images are cropped; see `editing.move_crops`."""
    now = read_crops(folder)
    _do(folder, Step(label=label, crops={name: (now.get(name, CENTRE), at) for name, at in crops.items()}))


def take_out(folder: Path, names: Sequence[str], label: str = "") -> str:
    """Move images out of the dataset, each with its caption and mask; returns the batch, for `bring_back`."""
    if not names:
        raise DataError("No image is named. Name at least one.")
    batch = _new_batch(folder)
    _do(folder, Step(label=label, batch=batch, leaving=files_of(folder, names), coming=[]))
    return batch


def bring_back(folder: Path, batch: str, label: str = "") -> list[str]:
    """Move what `take_out` moved back to its places; returns the images' names."""
    files = files_aside(folder, batch)
    _do(folder, Step(label=label, batch=batch, leaving=[], coming=files))
    return [name for name in files if is_image(Path(name))]


def convert(folder: Path, names: Sequence[str], label: str = "") -> list[str]:
    """Make PNGs of images in other formats, beside their captions; the files that they are made of are kept with what
    is taken out. Returns the names of the PNGs.

    Raises DataError for one that cannot be read, Changed when there is a file of the PNG's name.
    """
    batch, made = _new_batch(folder), []
    for name in dict.fromkeys(names):
        path = image_path(folder, name, foreign=True)
        try:
            content = as_png(path)
        except UnreadableImage as error:
            raise DataError(f"'{name}' cannot be converted: {error}. Save it as PNG or JPEG elsewhere.") from error
        made.append(_aside(folder, batch, path.with_suffix(".png"), content))
    _do(folder, Step(label=label, batch=batch, leaving=list(dict.fromkeys(names)), coming=made))
    return made


def mask(folder: Path, name: str, content: bytes, label: str = "") -> None:
    """Give an image a loss mask, white where it is trained; empty `content`: take it away.

    Raises DataError for what is no image, or of another shape than the image, or black all over.
    """
    path = image_path(folder, name)
    target, batch = mask_file(path), _new_batch(folder)
    there = [target.relative_to(folder).as_posix()] if target.is_file() else []
    coming = []
    if content:
        coming = [_aside(folder, batch, target, content)]
        kept = removed_folder(folder) / batch / coming[0]
        try:
            load_mask(path, kept)
            stream = BytesIO()
            load_image(kept, "black").convert("L").save(stream, "PNG")
        except UnreadableImage as error:
            kept.unlink()
            raise DataError(f"The mask of '{name}' cannot be used: {error}.") from error
        write_atomic(kept, stream.getvalue())
    if there or coming:
        _do(folder, Step(label=label, batch=batch, leaving=there, coming=coming))


def _aside(folder: Path, batch: str, target: Path, content: bytes) -> str:
    """Write what is to come to a place in the dataset into a batch; its name."""
    name = target.relative_to(folder).as_posix()
    path = removed_folder(folder) / batch / name
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, content)
    return name
