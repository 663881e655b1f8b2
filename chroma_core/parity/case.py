"""What is sampled, as one value that every runtime is given; what came out; and how far two results are apart."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import ChromaKitError, ConfigError
from ..loading.spec import LoraMode, LoraUse, ModelSpec
from ..model.images import read_latents
from ..model.latents import snap_size
from ..sampling.recipe import CANONICAL, RECIPES, Recipe
from ..sampling.sampler import SamplingSettings


class NotRun(ChromaKitError):
    """A runtime cannot sample this case here; the message says why."""


@dataclass(frozen=True)
class Case:
    """One image. `prompt` and `negative` have their trigger word in them; `width`, `height` in pixels."""

    spec: ModelSpec
    prompt: str
    width: int
    height: int
    negative: str = ""
    settings: SamplingSettings = SamplingSettings()
    recipe: Recipe = CANONICAL
    loras: tuple[LoraUse, ...] = ()

    @classmethod
    def from_record(cls, record: dict[str, Any], loras: tuple[LoraUse, ...] = ()) -> Case:
        """The case that an image's record tells. Raises ConfigError when a part of it is missing or unknown."""
        try:
            known = {f.name for f in fields(SamplingSettings)}
            unknown = set(record["settings"]) - known
            if unknown:
                raise ConfigError(f"The image was sampled with settings unknown here: {', '.join(sorted(unknown))}.")
            return cls(
                ModelSpec.from_dict(record["model"]),
                record["prompt"],
                record["width"],
                record["height"],
                record["negative"],
                SamplingSettings(**record["settings"]),
                Recipe.from_dict(record["recipe"]),
                loras,
            )
        except KeyError as missing:
            raise ConfigError(
                f"The image's record has no {missing}, so it cannot be sampled again. Replay a preview of a training "
                "job that this version made."
            ) from None

    @property
    def effective_size(self) -> tuple[int, int]:
        """Width and height after flooring to the recipe's multiple."""
        return snap_size(self.width, self.height, self.recipe.size_multiple)

    @property
    def recipe_words(self) -> tuple[str, dict[str, str]]:
        """The recipe as users write it: the name of a known one, and the fields that differ from it."""
        known = RECIPES.get(self.recipe.name.partition(" with ")[0], CANONICAL)
        names = [field.name for field in fields(Recipe) if field.name != "name"]
        differing = [name for name in names if getattr(self.recipe, name) != getattr(known, name)]
        return known.name, {name: str(getattr(self.recipe, name)) for name in differing}

    def check_whole(self, why: str = "The comparison starts from pure noise and runs the whole schedule.") -> None:
        """Raise NotRun(why) when only a part of the schedule is run, or from something else than pure noise."""
        settings = self.settings
        if (settings.denoise, settings.start_step, settings.end_step, settings.add_noise) != (1.0, 0, None, True):
            raise NotRun(why)

    @property
    def lora_modes(self) -> tuple[LoraMode, ...]:
        """The modes in which the LoRAs can be applied; a strength over the steps is live only."""
        return ("live",) if any(use.schedule for use in self.loras) else ("live", "merged")

    def with_loras(self, **changes: Any) -> Case:
        """The same case with every LoRA's use changed."""
        return replace(self, loras=tuple(replace(use, **changes) for use in self.loras))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a report."""
        return {
            "prompt": self.prompt,
            "negative": self.negative,
            "size": list(self.effective_size),
            "settings": self.settings.to_dict(),
            "recipe": self.recipe.to_dict(),
            "model": self.spec.to_dict(),
            "loras": [_use_values(use) for use in self.loras],
        }


def _use_values(use: LoraUse) -> dict[str, Any]:
    values = {"path": use.path, "strength": use.strength, "mode": use.mode}
    return values | {field: text for field in ("blocks", "schedule") if (text := getattr(use, field))}


@dataclass(frozen=True)
class Sampled:
    """`latents` [1, C, H, W], fp32 on the CPU, in the VAE's space as LATENT links carry them; and their image."""

    latents: Tensor
    image: Image.Image

    @classmethod
    def read(cls, image: Path, latents: Path) -> Sampled:
        """From a PNG and the latents file beside it. Raises ConfigError."""
        with Image.open(image) as file:
            return cls(read_latents(latents), file.convert("RGB"))


@dataclass(frozen=True)
class Difference:
    """Two results of one case. `max_abs_diff`, `mean_abs_diff`: of the latents, whose standard deviation is about 3.

    `psnr`: of the 8-bit images, in dB; None when no pixel differs (it would be infinite).
    """

    pair: str
    max_abs_diff: float
    mean_abs_diff: float
    psnr: float | None

    @property
    def identical(self) -> bool:
        """Not one bit of the latents and not one pixel differs."""
        return self.max_abs_diff == 0 and self.psnr is None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "identical": self.identical}


def compare(pair: str, a: Sampled, b: Sampled) -> Difference:
    """How far apart they are. Raises ConfigError when their sizes differ, or a number is not finite."""
    if a.latents.shape != b.latents.shape or a.image.size != b.image.size:
        raise ConfigError(
            f"{pair}: the images are {a.image.size} and {b.image.size} pixels, so they cannot be compared."
        )
    distance = (a.latents.double() - b.latents.double()).abs()
    if not bool(distance.isfinite().all()):
        raise ConfigError(f"{pair}: the latents hold numbers that are not finite.")
    return Difference(pair, float(distance.max()), float(distance.mean()), psnr(a.image, b.image))


def psnr(a: Image.Image, b: Image.Image) -> float | None:
    """Peak signal-to-noise ratio of two RGB images of one size: 10·log₁₀(255² / mean square), None when equal."""
    pixels = [torch.from_numpy(np.array(image.convert("RGB"), dtype=np.float64)) for image in (a, b)]
    square = float((pixels[0] - pixels[1]).square().mean())
    return None if square == 0 else 10 * math.log10(255**2 / square)
