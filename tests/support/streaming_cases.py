"""A miniature model whose blocks are streamed, what it is called with, and a watcher from outside."""

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from chroma_core.lora.settings import LoraSettings
from chroma_core.lora.trainable import add_trainable
from chroma_core.model.latents import image_ids
from chroma_core.model.precision import precision, quantise
from miniature import transformer

DOUBLE, SINGLE = 2, 3
BLOCKS = [f"transformer_blocks.{i}" for i in range(DOUBLE)] + [f"single_transformer_blocks.{i}" for i in range(SINGLE)]
TRAINED_PRECISIONS = ["fp32", "int8", "nf4", "int8-quanto"]


def model(name: str = "fp32", seed: int = 0):
    made = transformer(DOUBLE, SINGLE, seed).to(precision(name).dtype)
    quantise(made, precision(name))
    return made.requires_grad_(False)


def call(dtype: torch.dtype = torch.float32, seed: int = 1, device: str = "cpu"):
    """Two rows of different length."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, 4:] = False
    made = {
        "latents_BLD": torch.randn(2, 24, 64, generator=generator).to(dtype),
        "text_BTC": torch.randn(2, 7, 32, generator=generator).to(dtype),
        "sigma_B": torch.tensor([0.3, 0.9]),
        "img_ids_L3": image_ids(8, 12),
        "text_mask_BT": mask,
    }
    return {key: value.to(device) for key, value in made.items()}


def predict(made, inputs):
    with torch.inference_mode():
        return made(**inputs)


def backward(made, inputs, seed: int = 5):
    """A loss and its gradients on the trained LoRA's parameters."""
    weight = torch.randn(2, 24, 64, generator=torch.Generator().manual_seed(seed))
    velocity = made(**inputs).float()
    loss = (velocity * weight.to(velocity.device)).sum()
    loss.backward()
    return loss.detach()


def trainable(made, dropout: float = 0.0):
    """Parameters of a LoRA whose `up` is not zero, so that every gradient counts."""
    parameters = add_trainable(made, LoraSettings(rank=4, target="all+ffs", dropout=dropout), seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in parameters:
            noise = torch.randn(parameter.shape, generator=generator) * 0.05
            parameter.add_(noise.to(parameter.device))
    return parameters


class Watch:
    """Counts, from outside, the blocks whose device tensors are alive, each time a block's layer computes."""

    def __init__(self, made):
        self.most, self.order, self._alive = 0, [], {}
        self._own = {t.untyped_storage().data_ptr() for t in (*made.parameters(), *made.buffers())}
        for name in BLOCKS:
            for leaf in made.get_submodule(name).modules():
                if getattr(leaf, "weight", None) is not None and not list(leaf.children()):
                    leaf.register_forward_pre_hook(lambda leaf, _, name=name: self.look(name, leaf))

    def look(self, name, leaf):
        storage = leaf.weight.untyped_storage()
        assert storage.data_ptr() not in self._own, "computes with the host's tensor"
        if self.order[-1:] != [name]:
            self.order.append(name)
        self._alive.setdefault(storage.data_ptr(), (name, StorageWeakRef(storage)))
        self._alive = {key: seen for key, seen in self._alive.items() if not seen[1].expired()}
        self.most = max(self.most, len({name for name, _ in self._alive.values()}))
