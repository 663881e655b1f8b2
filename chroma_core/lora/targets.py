"""Which linear layers a LoRA trains: names for the usual choices, or patterns on full module names.

The names and their contents are SimpleTuner's (`--flux_lora_target`), so its recipes carry over. On Chroma 1:

| target | layers | what |
|---|---|---|
| `attention` | 190 | q, k, v of every block; output projection of the image stream (SimpleTuner's default) |
| `all` | 266 | `attention` and the text stream's q, k, v and output projection |
| `all+ffs` | 419 | `all`, every MLP (image, text, single blocks' in and out), and the model's last layer `proj_out` |
| `all+ffs+embedder` | 420 | `all+ffs` and the input projection `x_embedder` |
| `context` | 76 | the text stream's q, k, v and output projection |
| `context+ffs` | 114 | `context` and the text stream's MLP |
| `tiny` | 209 | `attention` and, in the double blocks, the first layer of the image stream's MLP |

`tiny` trains no layer that serves the text stream alone, and of the MLPs only the layer where the double blocks make
their image features. `proj_out` belongs to `all+ffs` because SimpleTuner's rule for the single blocks' `proj_out` also
matches the model's own last layer.
The approximator (`distilled_guidance_layer`) is never trained: it sets the modulation of all blocks at once.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from ..errors import ConfigError
from .layer import linear_modules

APPROXIMATOR = "distilled_guidance_layer."

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
}

TARGETS: tuple[str, ...] = tuple(_PATTERNS)
"""The names that `target_modules` knows."""


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
    if part.startswith(APPROXIMATOR.rstrip(".")):
        return (
            f"The LoRA target '{part}' lies in the approximator, which is never trained: it sets the modulation of all "
            f"blocks at once. Choose one of: {', '.join(TARGETS)}, or patterns on block layers."
        )
    near = difflib.get_close_matches(part, TARGETS, n=1)
    leaf = [n for n in names if n.endswith(f".{part}")]
    hint = f" Did you mean '{near[0]}'?" if near else f" Did you mean '*.{part}'?" if leaf else ""
    return (
        f"The LoRA target '{part}' matches no layer of this model.{hint} The names are: {', '.join(TARGETS)}; a "
        f"pattern must match a full module name such as '{names[0] if names else '(this model has no linear layer)'}'."
    )
