"""Random LoRAs and inputs that the LoRA tests share."""

import torch
from torch import Tensor, nn

from chroma_core.latents import image_ids
from chroma_core.lora.formats import LoraFile, LoraModule
from chroma_core.lora.layer import features, linear_modules
from chroma_core.lora.targets import target_modules
from chroma_core.transformer import ChromaTransformer


def random_lora(
    model: nn.Module, target: str = "all+ffs", rank: int = 4, alpha: float = 6.0, seed: int = 1, size: float = 1.0
) -> LoraFile:
    """A LoRA whose every ΔW is random and, at size 1, about as large as a freshly initialised weight."""
    generator = torch.Generator().manual_seed(seed)
    linears = linear_modules(model)
    modules = {}
    for name in target_modules(model, target):
        rows, columns = features(linears[name])
        down = torch.randn(rank, columns, generator=generator) / columns**0.5
        up = torch.randn(rows, rank, generator=generator) * size * (rank / alpha) / rank**0.5
        modules[name] = LoraModule(down, up, alpha)
    return LoraFile(modules)


def inputs(model: ChromaTransformer, seed: int = 2, size: int = 8, tokens: int = 5) -> dict[str, Tensor]:
    """One random forward call: `size` latent rows and columns, `tokens` text tokens."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "latents_BLD": torch.randn(1, size * size // 4, model.config.in_channels, generator=generator),
        "text_BTC": torch.randn(1, tokens, model.config.joint_attention_dim, generator=generator),
        "sigma_B": torch.tensor([0.7]),
        "img_ids_L3": image_ids(size, size),
    }


def predict(model: ChromaTransformer, call: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    """The model's velocity for that call, without gradients."""
    with torch.no_grad():
        return model(call["latents_BLD"].to(dtype), call["text_BTC"].to(dtype), call["sigma_B"], call["img_ids_L3"])


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference between two tensors, relative to the largest value of the second."""
    return float((a.float() - b.float()).abs().max() / b.float().abs().max())
