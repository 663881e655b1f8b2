"""What a LoRA must leave as it is, as options: which captions, how strongly, and in how many of the steps."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import model_validator
from typing_extensions import Self

from ...errors import ConfigError
from ...settings import Settings, option

Preserved = Literal["class", "blank", "prompts"]
"""What is preserved: see `PreserveConfig`."""


class PreserveConfig(Settings):
    """What the adapter must leave as it is: some steps have a second pass, whose target is the base's prediction.

    The second pass has the noisy latents of the step's samples under their captions with `class_word` in place of the
    trigger word, under the empty caption, or (without `images`) under some of `prompts`; or latents that the base
    generated for `prompts`, under these. A kind is on when its weight is above 0, and `prompts` only with a prompt.
    Raises ConfigError for options that do nothing.
    """

    class_weight: float = option(
        0.0,
        "Above 0: captions with class_word in place of the trigger word stay as the model without LoRA has them. For "
        "one of a class that should not change with it: one dog among dogs.",
        ge=0,
        le=100,
        step=0.1,
        advanced=True,
    )
    class_word: str = option(
        "", "What takes the trigger word's place, e.g. dog. Empty: the trigger word is left out.", advanced=True
    )
    blank_weight: float = option(
        0.0,
        "Above 0: the empty caption stays what it is without LoRA. For a LoRA that shows without its trigger word, "
        "and with caption_dropout, which teaches the empty caption the concept.",
        ge=0,
        le=100,
        step=0.1,
        advanced=True,
    )
    prompts: tuple[str, ...] = option(
        (),
        "Prompts of ordinary things that should stay as they are; the model generates their images itself, once, "
        "before training. For bleed into prompts that have nothing to do with the concept.",
        advanced=True,
    )
    prompts_weight: float = option(1.0, "Weight of prompts.", ge=0, le=100, step=0.1, advanced=True)
    images: int = option(
        1,
        "Images generated for each of prompts. 0: none; prompts are compared on the noisy training images.",
        ge=0,
        le=64,
        advanced=True,
    )
    share: float = option(
        0.25,
        "Share of the steps with the second pass; kinds that are on take turns. A third makes training half as long "
        "again.",
        gt=0,
        le=1,
        least=0.01,
        step=0.05,
        advanced=True,
    )

    @model_validator(mode="after")
    def _does_something(self) -> Self:
        if self.class_word and not self.class_weight:
            raise ConfigError(
                f"preserve.class_word is '{self.class_word}', but its class_weight is 0, so that nothing is done with "
                "it. Set class_weight (1 is usual), or leave class_word out."
            )
        return self

    @property
    def weights(self) -> dict[Preserved, float]:
        """The kinds that are on, and the weight of each."""
        weights: dict[Preserved, float] = {"class": self.class_weight, "blank": self.blank_weight}
        weights |= {"prompts": self.prompts_weight if self.prompts else 0.0}
        return {kind: weight for kind, weight in weights.items() if weight}

    def turn(self, step: int) -> Preserved | None:
        """What the second pass of step `step` (0-based) preserves; None: there is none.

        The passes lie evenly: the first n steps have floor(n · share) of them. The kinds take turns.
        """
        done, kinds = math.floor(step * self.share), tuple(self.weights)
        return kinds[done % len(kinds)] if kinds and math.floor((step + 1) * self.share) > done else None
