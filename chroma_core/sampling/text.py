"""Prompts to T5 states. The transformer sees the n real tokens (with `</s>`) and one pad token, and nothing else.

Running those n+1 tokens without a mask equals the masked 512-token run and is faster ("trim, don't mask").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ..errors import PromptError, shortened
from ..model.device import check_finite
from ..model.text_encoder import T5Encoder
from .recipe import CANONICAL, Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_TOKENS = 512
"""Text positions that Chroma was trained with; a longer prompt is cut so that the visible padding still fits."""

TRIGGER = "[trigger]"

TextPadding = Literal["trim", "zero", "unmodified"]
"""What stands after the n real tokens: `trim` nothing but the recipe's visible pad; `zero` zeros, and `unmodified` T5's
outputs on pad tokens, both up to 512 and all visible.

Both cost time: the transformer attends to 512 text tokens (1.45 times as long at 512² as with 64 tokens, 2.2 times at
256², 1.1 times at 1024²). `unmodified` also costs disk: 8 MiB a caption for T5-XXL. Neither is what the recipe samples
with, so they are for reproducing runs that were trained like that.
"""


def apply_trigger(prompt: str, *triggers: str | None) -> str:
    """Replace `[trigger]` by the first trigger word that is set (prompt-level before job-level).

    Raises PromptError when the prompt asks for a trigger word and none is set: the literal text would only confuse
    the model.
    """
    if TRIGGER not in prompt:
        return prompt
    for trigger in triggers:
        if trigger and trigger.strip():
            return prompt.replace(TRIGGER, trigger.strip())
    raise PromptError(
        f"The prompt “{prompt}” contains {TRIGGER}, but no trigger word is set. Enter the trigger word of the LoRA, "
        f"or take {TRIGGER} out of the prompt."
    )


@dataclass(frozen=True)
class TextCondition:
    """One encoded prompt: `states` [T, C] of the visible tokens, of which the first `real_tokens` are not padding.

    `truncated` counts tokens that did not fit and were cut off.
    """

    states: Tensor
    text: str
    real_tokens: int
    truncated: int = 0


class TextEncoder:
    """A T5 encoder and its tokenizer. With `keep_padding` it returns all 512 states, T5's outputs on pads included."""

    def __init__(self, model: T5Encoder, tokenizer: PreTrainedTokenizerBase, keep_padding: bool = False):
        self.model = model
        self.tokenizer = tokenizer
        self.keep_padding = keep_padding

    def to(self, device: torch.device | str) -> TextEncoder:
        """Move the weights; returns itself."""
        self.model.to(device)
        return self

    def with_padding(self) -> TextEncoder:
        """The same weights, as the text padding `unmodified` needs them. Its states want cache entries of their own."""
        return TextEncoder(self.model, self.tokenizer, keep_padding=True)

    @torch.no_grad()
    def encode(self, prompt: str, recipe: Recipe = CANONICAL) -> TextCondition:
        """Encode one prompt; states are fp32 on the encoder's device.

        One prompt at a time on purpose: a batch of other prompts would change the last bits, and a cached, a previewed
        and a sampled prompt must be one and the same. Raises NotFiniteError.
        """
        ids: list[int] = self.tokenizer(prompt, truncation=False, verbose=False).input_ids
        room = MAX_TOKENS - recipe.visible_padding
        truncated = max(0, len(ids) - room)
        if truncated:
            ids = [*ids[: room - 1], ids[-1]]  # keep </s>
        real = len(ids)
        whole = self.keep_padding or recipe.text_attention == "full"
        length = MAX_TOKENS if whole else real + recipe.visible_padding
        tokens = torch.tensor(
            [ids + [self.tokenizer.pad_token_id] * (length - real)], device=self.model.shared.weight.device
        )
        mask = torch.ones_like(tokens)
        # Padding that is kept must not change the real tokens where the recipe says that T5 does not see it.
        if recipe.text_attention == "masked" or (self.keep_padding and recipe.text_attention != "full"):
            mask[:, real:] = 0
        states = check_finite(
            self.model(tokens, mask)[0],
            f"What the text encoder makes of “{shortened(prompt)}”",
            "T5 overflows in fp16: choose bf16 or fp32 for it. If it computes in one of these, its file is damaged.",
        )
        visible = MAX_TOKENS if self.keep_padding else real + recipe.visible_padding
        return TextCondition(states[:visible].float(), prompt, real, truncated)


def zero_padded(condition: TextCondition) -> TextCondition:
    """The condition as the text padding `zero` has it: the real tokens, then zeros up to 512, all of them visible."""
    real = condition.states[: condition.real_tokens]
    return replace(condition, states=torch.nn.functional.pad(real, (0, 0, 0, MAX_TOKENS - len(real))))


def batch_conditions(conditions: Sequence[TextCondition]) -> tuple[Tensor, Tensor | None]:
    """Stack prompts to states [B, T, C] and a mask [B, T] (True = visible), or None when all have one length."""
    lengths = [c.states.shape[0] for c in conditions]
    if len(set(lengths)) == 1:
        return torch.stack([c.states for c in conditions]), None
    states = torch.nn.utils.rnn.pad_sequence([c.states for c in conditions], batch_first=True)
    positions = torch.arange(states.shape[1], device=states.device)
    return states, positions[None, :] < torch.tensor(lengths, device=states.device)[:, None]
