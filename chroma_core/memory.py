"""How much memory a run will need: an estimate from the module tree on the meta device, shown before anything starts.

Weights are exact. Activations follow two measured rules of thumb for a block's training pass: 18 × tokens × width ×
bytes kept without gradient checkpointing, 1.1 × with it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from .flavours import flavour
from .loading.components import transformer_outline
from .precision import precision, quantisable_linears
from .transformer import ChromaTransformer

KEPT_PLAIN, KEPT_CHECKPOINTED = 18.0, 1.1
"""Values a block keeps for its backward pass, in units of tokens × width."""

TEXT_TOKENS = 128
"""Text length assumed for activations; a long caption."""

T5_XXL_PARAMETERS = 4_762_310_656
VAE_DECODE_BYTES_PER_PIXEL = 2178
"""The host's own estimate for this VAE at one byte a value, per picture pixel."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes, by what they are for. Peaks assume that T5, transformer and VAE take turns on the device."""

    transformer_parameters: int
    weights_bytes: int
    text_encoder_bytes: int
    lora_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    sampling_peak_bytes: int
    training_peak_bytes: int

    def to_dict(self) -> dict[str, int]:
        """Plain values for JSON."""
        return asdict(self)

    def table(self) -> str:
        """Two columns for people: what, and GiB (MiB below one)."""
        rows = [
            (name.removesuffix("_bytes").replace("_", " "), _size(value))
            for name, value in self.to_dict().items()
            if name.endswith("_bytes")
        ]
        return "\n".join(f"{name:<18} {value:>11}" for name, value in rows)


def _size(value: float) -> str:
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.1f} MiB"


def transformer_on_meta(flavour_name: str) -> ChromaTransformer:
    """The module tree of a flavour without memory: `tiny` from its folder, the others are Chroma 1 by default."""
    folder = flavour(flavour_name).folder
    if folder is not None:
        return transformer_outline(folder / "transformer")
    with torch.device("meta"):
        return ChromaTransformer()  # type: ignore[call-arg] (the checker counts the `self` of the wrapped signature)


def estimate(
    flavour_name: str,
    precision_name: str,
    *,
    size: int | None = None,
    batch_size: int = 1,
    rank: int = 16,
    gradient_checkpointing: bool = True,
    text_precision: str = "bf16",
) -> MemoryEstimate:
    """Estimate sampling and LoRA training at `size` × `size` pixels (None: the flavour's default).

    The LoRA is counted on every block linear, in fp32, with gradients and the two moments of AdamW.
    """
    model = transformer_on_meta(flavour_name)
    chosen = precision(precision_name)
    width = model.inner_dim
    parameters = sum(p.numel() for p in model.parameters())
    linears = [linear for _, linear in quantisable_linears(model)]
    small = sum(linear.weight.numel() for linear in linears) if chosen.quantised else 0
    weights = int(small * chosen.bytes_per_weight + (parameters - small) * chosen.dtype.itemsize)
    lora = 4 * rank * sum(linear.in_features + linear.out_features for linear in linears)
    side = size or flavour(flavour_name).size
    tokens = (side // 16) ** 2 + TEXT_TOKENS
    blocks = len(model.transformer_blocks) + len(model.single_transformer_blocks)
    token_bytes = batch_size * tokens * width * chosen.dtype.itemsize
    kept = KEPT_CHECKPOINTED * blocks + KEPT_PLAIN if gradient_checkpointing else KEPT_PLAIN * blocks
    activations = int(kept * token_bytes)
    text_bytes = int(T5_XXL_PARAMETERS * precision(text_precision).bytes_per_weight)
    if flavour(flavour_name).folder is not None:
        text_bytes = _folder_weights(Path(flavour(flavour_name).folder or "") / "text_encoder")
    sampling = max(weights + int(KEPT_PLAIN * token_bytes), text_bytes, VAE_DECODE_BYTES_PER_PIXEL * side * side * 2)
    return MemoryEstimate(
        transformer_parameters=parameters,
        weights_bytes=weights,
        text_encoder_bytes=text_bytes,
        lora_bytes=lora,
        optimizer_bytes=2 * lora,
        activation_bytes=activations,
        sampling_peak_bytes=sampling,
        training_peak_bytes=max(weights + 4 * lora + activations, text_bytes),
    )


def _folder_weights(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
