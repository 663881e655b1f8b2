"""Latents and text states on disk, so that the VAE and T5 can leave memory before training starts.

One small safetensors file an entry, named by a hash of everything that decides its content (image or prompt, model
files, settings): entries survive restarts, are shared by jobs, and a changed input makes a new entry.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from PIL import ImageOps
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import DataError
from ..model.images import to_tensor
from ..model.latents import LatentFormat
from ..model.vae import Autoencoder
from ..sampling.recipe import Recipe
from ..sampling.text import TextCondition, TextEncoder
from ..weights.safetensors_files import save_safetensors
from .buckets import resize_and_crop
from .images import DatasetImage, load_image
from .views import View, load_mask, mask_tensor, posterior_noise

_HEAD = 4096
"""Bytes that hold an entry's header, of one tensor and few words, many times over."""

_AS_JSON = json.JSONEncoder(ensure_ascii=False).encode

FORMAT = 1
"""Raised whenever entries of an older version would no longer be what training expects."""

Between = Callable[[], None]
"""Called before every entry is made; may wait (host busy, paused) or raise (stop)."""


def component_key(where: Path) -> str:
    """Identifies a model component by its file or files: JSON by content, weights by name, size and time of change.

    Hashing weights would read 9 GB for T5-XXL; a touched file at worst encodes again.
    """
    digest = hashlib.sha256()
    root, files = (where, where.rglob("*")) if where.is_dir() else (where.parent, [where])
    for path in sorted(p for p in files if p.is_file()):
        stat = path.stat()
        content = path.read_bytes() if path.suffix == ".json" else f"{stat.st_size} {stat.st_mtime_ns}".encode()
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + content + b"\0")
    return digest.hexdigest()


def decoded(image: DatasetImage, view: View) -> Tensor:
    """An image as a view of it is encoded: [1, 3, height, width], -1..1, fp32. Raises UnreadableImage."""
    cropped = resize_and_crop(load_image(image.path, view.background), view.bucket, view.crop)
    return to_tensor(ImageOps.mirror(cropped) if view.flipped else cropped)


class LatentTextCache:
    """The entries of one VAE and one text encoder with its recipe.

    Args:
        folder: where entries lie; may be shared by any number of jobs and processes.
        vae_key, text_key: from `component_key`, with the precision in which the text encoder computes.
    """

    def __init__(self, folder: Path, vae_key: str, text_key: str, recipe: Recipe):
        self.folder = folder
        self.vae_key = vae_key
        self.text_key = text_key
        self.recipe = recipe

    def latents_path(self, image: DatasetImage, view: View) -> Path:
        """The entry of a view of an image."""
        extras = view.extras()
        key = (image.sha256, view.bucket, view.flipped, self.vae_key)
        return self._path("latents", *key, *((extras,) if extras else ()))

    def mask_path(self, image: DatasetImage, view: View, floor: float) -> Path:
        """The entry of an image's mask in a view; the same for all draws of the posterior."""
        key = (image.sha256, image.mask_sha256, view.bucket, view.flipped, view.crop, floor, self.vae_key)
        return self._path("masks", *key)

    def text_path(self, text: str) -> Path:
        """The entry of a prompt."""
        return self._path("texts", text, self.recipe.text_attention, self.recipe.visible_padding, self.text_key)

    def generated_path(self, about: str) -> Path:
        """The entry of latents that a model generated; `about` is everything that decides them."""
        return self._path("generated", about)

    def latents(self, path: Path) -> Tensor:
        """Latents [C, H, W] in the transformer's space, fp32. Raises DataError when the entry is gone or damaged."""
        return self._read(path)[0]["latents"]

    def mask(self, path: Path) -> Tensor:
        """A mask [1, H, W] at the size of its latents, 0..1, fp32. Raises DataError when it is gone or damaged."""
        return self._read(path)[0]["mask"]

    def text(self, prompt: str) -> TextCondition:
        """The encoded prompt. Raises DataError when the entry is gone or damaged."""
        tensors, metadata = self._read(self.text_path(prompt))
        return TextCondition(tensors["states"], prompt, int(metadata["real_tokens"]), int(metadata["truncated"]))

    @staticmethod
    def about(path: Path) -> dict[str, str] | None:
        """What an entry says of itself; None when it is not there, or not whole.

        It is asked of every image and caption at every start: a third of the time that safetensors' own reader takes.
        """
        try:
            file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            try:
                head, size = os.read(file, _HEAD), os.fstat(file).st_size
            finally:
                os.close(file)
            begin = 8 + int.from_bytes(head[:8], "little")
            header = json.loads(head[8:begin].decode())
            metadata = header.pop("__metadata__")
            whole = size == begin + max(entry["data_offsets"][1] for entry in header.values())
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return None
        return metadata if whole else None

    @torch.no_grad()
    def encoded(
        self, image: DatasetImage, views: Sequence[View], pixels: Tensor, vae: Autoencoder
    ) -> dict[Path, Tensor]:
        """The latents of `views`, which differ in nothing but the posterior's draw, by their entries.

        The mean does not depend on chance; a draw depends on the image, the view and its number.

        Args:
            pixels: what `decoded` gives for one of the views.
        """
        posterior = vae.encode(pixels.to(vae.device, vae.dtype))
        found = {}
        for view in views:
            z = posterior.mean
            if view.draw is not None:
                noise = posterior_noise(image.sha256, view, z.shape).to(z.device)
                z = z.float() + posterior.std.float() * noise
            found[self.latents_path(image, view)] = LatentFormat.of(vae).to_model(z[0].float())
        return found

    @staticmethod
    def add_latents(found: Mapping[Path, Tensor], view: View) -> None:
        """Write what `encoded` gave for `view` and those like it."""
        for path, latents in found.items():
            save_safetensors(path, {"latents": latents}, {"bucket": f"{view.bucket[0]}x{view.bucket[1]}"})

    @staticmethod
    def add_generated(path: Path, latents: Tensor) -> None:
        """Write latents [C, H, W] that a model generated."""
        save_safetensors(path, {"latents": latents.float().cpu().contiguous()}, {})

    def add_mask(self, image: DatasetImage, view: View, floor: float) -> None:
        """Write a view's mask; its latents are there already. Raises UnreadableImage, and DataError as `latents`."""
        height, width = self.latents(self.latents_path(image, view)).shape[-2:]
        mask = load_mask(image.path, image.mask)
        values = torch.ones(1, height, width) if mask is None else mask_tensor(mask, view, height, width, floor)
        save_safetensors(self.mask_path(image, view, floor), {"mask": values}, {})

    def add_text(self, prompt: str, encoder: TextEncoder) -> None:
        """Encode a prompt with the cache's recipe."""
        self.keep_text(prompt, encoder.encode(prompt, self.recipe))

    def keep_text(self, prompt: str, condition: TextCondition) -> None:
        """Write an encoded prompt."""
        metadata = {"real_tokens": str(condition.real_tokens), "truncated": str(condition.truncated)}
        save_safetensors(self.text_path(prompt), {"states": condition.states}, metadata)

    def _path(self, kind: str, *key: object) -> Path:
        text = _AS_JSON([FORMAT, kind, *key])
        name = hashlib.sha256(text.encode()).hexdigest()
        return Path(f"{self.folder}/{kind}/{name[:2]}/{name}.safetensors")

    @staticmethod
    def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
        try:
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise DataError(
                f"The cached {path.parent.parent.name} entry {path.name[:12]}… is missing or damaged ({error}). Resume "
                "the job: it is then made again from the dataset."
            ) from error
