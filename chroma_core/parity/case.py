"""What is painted: everything that decides a picture, as one value that every runtime is given."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from ..errors import ChromaKitError, ConfigError
from ..loading.spec import LoraUse, ModelHandle, ModelSpec
from ..model.latents import snap_size
from ..sampling.recipe import CANONICAL, RECIPES, Recipe
from ..sampling.sampler import SamplingSettings


class NotRun(ChromaKitError):
    """A runtime cannot paint this case here; the message says why."""


@dataclass(frozen=True)
class Case:
    """One picture. `prompt` and `negative` have their trigger word in them; `width`, `height` in pixels."""

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
        """The case that a picture's record tells. Raises ConfigError when a part of it is missing or unknown."""
        try:
            known = {f.name for f in fields(SamplingSettings)}
            unknown = set(record["settings"]) - known
            if unknown:
                raise ConfigError(f"The picture was sampled with settings unknown here: {', '.join(sorted(unknown))}.")
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
                f"The picture's record has no {missing}, so it cannot be painted again. Replay a preview of a training "
                "job that this version made."
            ) from None

    @property
    def handle(self) -> ModelHandle:
        """Model and LoRAs as the component cache takes them."""
        return ModelHandle(self.spec, self.loras)

    @property
    def effective_size(self) -> tuple[int, int]:
        """Width and height after flooring to the recipe's multiple."""
        return snap_size(self.width, self.height, self.recipe.size_multiple)

    @property
    def guided(self) -> bool:
        """Whether the negative prompt is read."""
        return self.settings.guidance > 1

    @property
    def recipe_words(self) -> tuple[str, dict[str, str]]:
        """The recipe as users write it: the name of a known one, and the fields that differ from it."""
        known = RECIPES.get(self.recipe.name.partition(" with ")[0], CANONICAL)
        names = [field.name for field in fields(Recipe) if field.name != "name"]
        differing = [name for name in names if getattr(self.recipe, name) != getattr(known, name)]
        return known.name, {name: str(getattr(self.recipe, name)) for name in differing}

    @property
    def in_parts(self) -> bool:
        """Whether only a part of the schedule is run, or from something else than pure noise."""
        settings = self.settings
        return (settings.denoise, settings.start_step, settings.end_step, settings.add_noise) != (1.0, 0, None, True)

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
            "loras": [{"path": use.path, "strength": use.strength, "mode": use.mode} for use in self.loras],
        }
