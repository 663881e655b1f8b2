"""What a LoRA in training is: kind, rank, alpha, for all layers or by patterns; and which linear layers it trains.

A target is a name for one of the usual choices, or patterns on full module names. The names and their contents are
SimpleTuner's (`--flux_lora_target`), so its recipes carry over. On Chroma 1:

| target | layers | what |
|---|---|---|
| `attention` | 190 | q, k, v of every block; output projection of the image stream (SimpleTuner's default) |
| `all` | 266 | `attention` and the text stream's q, k, v and output projection |
| `all+ffs` | 419 | `all`, every MLP (image, text, single blocks' in and out), and the model's last layer `proj_out` |
| `all+ffs+embedder` | 420 | `all+ffs` and the input projection `x_embedder` |
| `context` | 76 | the text stream's q, k, v and output projection |
| `context+ffs` | 114 | `context` and the text stream's MLP |
| `tiny` | 209 | `attention` and, in the double blocks, the first layer of the image stream's MLP |
| `tiny+embedder` | 210 | `tiny` and the input projection `x_embedder` |
| `ai-toolkit` | 419 | `all+ffs`: the norms that it has besides are no layers in Chroma |

`tiny` trains no layer that serves the text stream alone, and of the MLPs only the layer where the double blocks make
their image features. `proj_out` belongs to `all+ffs` because SimpleTuner's rule for the single blocks' `proj_out` also
matches the model's own last layer.
The approximator (`distilled_guidance_layer`) is never trained: it sets the modulation of all blocks at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

from pydantic import model_validator
from torch import nn
from typing_extensions import Self

from ..errors import ConfigError, did_you_mean
from ..names.transformer import APPROXIMATOR
from ..settings import Settings, option
from .adapters import linear_modules
from .modules import AdapterKind, quoted

Number = TypeVar("Number", int, float)

_ATTENTION = ("*.attn.to_q", "*.attn.to_k", "*.attn.to_v", "*.attn.to_out.0")
_CONTEXT = ("*.attn.add_q_proj", "*.attn.add_k_proj", "*.attn.add_v_proj", "*.attn.to_add_out")
_IMAGE_MLP = ("*.ff.net.0.proj", "*.ff.net.2")
_TEXT_MLP = ("*.ff_context.net.0.proj", "*.ff_context.net.2")
_SINGLE_MLP = ("*.proj_mlp", "*.proj_out", "proj_out")
_ALL_FFS = (*_ATTENTION, *_CONTEXT, *_IMAGE_MLP, *_TEXT_MLP, *_SINGLE_MLP)

_PATTERNS: dict[str, tuple[str, ...]] = {
    "all": (*_ATTENTION, *_CONTEXT),
    "all+ffs": _ALL_FFS,
    "context": _CONTEXT,
    "context+ffs": (*_CONTEXT, *_TEXT_MLP),
    "tiny": (*_ATTENTION, "*.ff.net.0.proj"),
    "attention": _ATTENTION,
    "all+ffs+embedder": (*_ALL_FFS, "x_embedder"),
    "tiny+embedder": (*_ATTENTION, "*.ff.net.0.proj", "x_embedder"),
    "ai-toolkit": _ALL_FFS,
}

TARGETS: tuple[str, ...] = tuple(_PATTERNS)
"""The names that `target_modules` knows."""


class LoraSettings(Settings):
    """What is trained: the adapter's kind, its size, its scale (alpha / rank) and the layers that it is added to.

    A layer with a rank of its own and no alpha given anywhere has alpha = that rank. Raises ConfigError for numbers
    that cannot work, ValidationError for those out of their range.
    """

    kind: AdapterKind = option(
        "lora",
        "lora works everywhere. rslora scales with the rank's root. dora also learns each row's length (ComfyUI's "
        "own loader computes it a little otherwise). lokr is a Kronecker product.",
        advanced=True,
    )
    rank: int = option(16, "Size of the LoRA: how much it can learn.", ge=1, le=1024, most=512)
    alpha: float | None = option(None, "Scale: alpha / rank. Unset: the same as rank.", gt=0, least=0, most=512, step=1)
    target: str | tuple[str, ...] = option(
        "all",
        "Which layers learn. all: attention. +ffs: feed-forward too. context: the text side. tiny: a small share.",
        choices=TARGETS,
    )
    rank_pattern: dict[str, int] = option(
        {}, "Ranks of their own for layers whose full name matches a pattern; the first match counts."
    )
    alpha_pattern: dict[str, float] = option({}, "The same for alphas.")
    dropout: float = option(0.0, "Dropout on the adapter's input.", ge=0, lt=1, most=0.9, step=0.05, advanced=True)
    lokr_factor: int = option(-1, "Size of LoKr's first factor. -1: both about equally large.", ge=-1)

    @model_validator(mode="after")
    def _numbers_work(self) -> Self:
        for rank in self.rank_pattern.values():
            if rank < 1:
                raise ConfigError(f"The LoRA rank is {rank}; it must be at least 1 (16 is usual).")
        for alpha in (self.alpha, *self.alpha_pattern.values()):
            if alpha is not None and not (math.isfinite(alpha) and alpha > 0):
                raise ConfigError(f"The LoRA alpha is {alpha}; it must be above 0. Leave it out for alpha = rank.")
        if self.lokr_factor == 0:
            raise ConfigError("The lokr_factor is 0; it must be -1 (about equal) or at least 1.")
        return self

    def rank_of(self, name: str) -> int:
        """The rank of the layer of that name."""
        return _first_match(self.rank_pattern, name, self.rank)

    def alpha_of(self, name: str) -> float:
        """The alpha of the layer of that name, before a kind's own scaling."""
        rank = self.rank_of(name)
        return float(_first_match(self.alpha_pattern, name, float(rank if self.alpha is None else self.alpha)))

    def check_patterns(self, names: Iterable[str]) -> None:
        """Raise ConfigError when a pattern matches none of the layers in training."""
        layers = tuple(names)
        for name, patterns in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            lost = [p for p in patterns if not any(fnmatchcase(layer, p) for layer in layers)]
            if lost:
                raise ConfigError(
                    f"The {name} {quoted(lost)} matches none of the {len(layers)} layers that are trained. A pattern "
                    f"must match a full layer name such as '{layers[0] if layers else '(none)'}'; see also the target."
                )


def _first_match(patterns: Mapping[str, Number], name: str, otherwise: Number) -> Number:
    return next((value for pattern, value in patterns.items() if fnmatchcase(name, pattern)), otherwise)


def target_modules(transformer: nn.Module, target: str | Sequence[str]) -> list[str]:
    """Full names of the layers that `target` selects, in the order of the module tree, each once.

    Args:
        transformer: a `ChromaTransformer` (on any device, also meta), with or without adapters.
        target: a name from TARGETS; or a pattern; or several of either, as a list or separated by commas. Patterns are
            shell patterns (`*`, `?`, `[…]`) that must match a full name: `transformer_blocks.[0-3].attn.*`.
    Raises:
        ConfigError for an empty target, a misspelt name, or a pattern that matches no trainable layer.
    """
    wanted = [part.strip() for part in target.split(",")] if isinstance(target, str) else [str(t) for t in target]
    wanted = [part for part in wanted if part]
    if not wanted:
        raise ConfigError(f"The LoRA target is empty; choose one of: {', '.join(TARGETS)}, or give patterns.")
    names = [name for name in linear_modules(transformer) if not name.startswith(APPROXIMATOR)]
    chosen: set[str] = set()
    for part in wanted:
        named = part in _PATTERNS
        found = {n for n in names if any(fnmatchcase(n, p) for p in (_PATTERNS[part] if named else (part,)))}
        if not found:
            raise ConfigError(_nothing_matches(part, names))
        chosen |= found
    return [name for name in names if name in chosen]


def named_target(names: Sequence[str]) -> str | None:
    """The name from TARGETS that selects layers of exactly these kinds; None when none does."""
    for target, patterns in _PATTERNS.items():
        if all(any(fnmatchcase(n, p) for p in patterns) for n in names) and all(
            any(fnmatchcase(n, p) for n in names) for p in patterns
        ):
            return target
    return None


def _nothing_matches(part: str, names: list[str]) -> str:
    if part.startswith(APPROXIMATOR):
        return (
            f"The LoRA target '{part}' lies in the approximator, which is never trained: it sets the modulation of all "
            f"blocks at once. Choose one of: {', '.join(TARGETS)}, or patterns on block layers."
        )
    leaf = [n for n in names if n.endswith(f".{part}")]
    hint = did_you_mean(part, TARGETS) or (f" Did you mean '*.{part}'?" if leaf else "")
    return (
        f"The LoRA target '{part}' matches no layer of this model.{hint} The names are: {', '.join(TARGETS)}; a "
        f"pattern must match a full module name such as '{names[0] if names else '(this model has no linear layer)'}'."
    )
