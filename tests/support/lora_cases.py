"""Random LoRAs and inputs that the LoRA tests share."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from chroma_core.lora.adapters import features, linear_modules
from chroma_core.lora.modules import LokrModule, LoraFile, LoraModule
from chroma_core.lora.settings import target_modules
from chroma_core.lora.trainable import factorization
from chroma_core.model.latents import image_ids
from chroma_core.model.precision import dequantised_weight
from chroma_core.model.transformer import ChromaTransformer


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


def random_kind(model: nn.Module, kind: str, target: str = "all+ffs", seed: int = 1, size: float = 1.0) -> LoraFile:
    """Like `random_lora`, of any kind; a DoRA's magnitudes are up to a quarter off the weight's own."""
    made = random_lora(model, target, seed=seed, size=size)
    generator = torch.Generator().manual_seed(seed)
    linears = linear_modules(model)
    modules = dict(made.modules)
    for name, plain in made.modules.items():
        assert isinstance(plain, LoraModule)
        rows, columns = plain.shape
        if kind == "dora":
            norms = dequantised_weight(linears[name]).norm(dim=1)
            modules[name] = replace(plain, magnitude=norms * (0.75 + torch.rand(rows, generator=generator) / 2))
        elif kind == "lokr":
            (a, b), (c, d) = factorization(rows), factorization(columns)
            w1 = torch.randn(a, c, generator=generator) / columns**0.25
            w2_a, w2_b = torch.randn(b, 2, generator=generator), torch.randn(2, d, generator=generator)
            modules[name] = LokrModule(3.0, w1=w1, w2_a=w2_a * size / columns**0.25, w2_b=w2_b)
    return LoraFile(modules)


def equal(a: LoraFile, b: LoraFile) -> bool:
    """Whether two LoRAs hold the very same numbers."""
    return a.modules.keys() == b.modules.keys() and all(
        a.modules[n].alpha == b.modules[n].alpha
        and a.modules[n].factors().keys() == b.modules[n].factors().keys()
        and all(torch.equal(t, b.modules[n].factors()[f]) for f, t in a.modules[n].factors().items())
        for n in a.modules
    )


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
    a, b = a.detach().float(), b.detach().float()
    return float((a - b).abs().max() / b.abs().max())
