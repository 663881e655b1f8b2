"""What the memory plan is checked with: live tensor memory counted on the CPU, for small models, and its formulas.

Allocators, workspaces of libraries and caches are not seen: what is counted is what the program itself holds.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from chroma_core.lora.trainable import LoraSettings, add_trainable
from chroma_core.memory.activations import (
    Pass,
    kept_bytes,
    sampling_bytes,
    text_encoder_bytes,
    training_bytes,
    vae_decode_bytes,
    vae_encode_bytes,
)
from chroma_core.memory.anatomy import FLUX_VAE, lora_layers_of, of_text_encoder, of_transformer, of_vae
from chroma_core.model.latents import image_ids
from chroma_core.model.precision import precision, quantise
from chroma_core.model.text_encoder import T5Encoder
from chroma_core.model.transformer import ChromaTransformer
from chroma_core.model.vae import Autoencoder


class LiveBytes(TorchDispatchMode):
    """Counts the storages that come to life inside the block; `peak` and `now` are bytes.

    What was there before does not count. A storage is seen as the result of an operation and forgotten when the last
    reference to it dies; views and results in place share their storage and count once. Backward passes count too (on
    the CPU they run in this thread).
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for value in tree_iter((args, kwargs)):
            self._see(value, count=False)  # was there before the block, e.g. a weight: never counted
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            self._see(value, count=True)
        return result

    def _see(self, value: object, count: bool) -> None:
        if not isinstance(value, torch.Tensor) or value.device.type == "meta":
            return
        storage = value.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if count else 0
        self._known[key] = size
        weakref.finalize(storage, self._forget, key)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _forget(self, key: int) -> None:
        self.now -= self._known.pop(key, 0)


@dataclass(frozen=True)
class Case:
    """A small transformer and a pass through it: `side` × `side` image tokens. `target` None: sampling."""

    precision: str = "bf16"
    heads: int = 4
    head_dim: int = 128
    doubles: int = 1
    singles: int = 2
    side: int = 16
    text_tokens: int = 32
    batch: int = 1
    target: str | None = None
    rank: int = 4
    checkpointing: bool = False

    def model(self) -> ChromaTransformer:
        """Random weights, unquantised, in the precision's dtype."""
        first = max(2, self.head_dim // 8)
        rest = (self.head_dim - first) // 2
        model = ChromaTransformer(
            num_layers=self.doubles,
            num_single_layers=self.singles,
            attention_head_dim=self.head_dim,
            num_attention_heads=self.heads,
            joint_attention_dim=64,
            axes_dims_rope=(first, rest, rest),
            approximator_num_channels=64,
            approximator_hidden_dim=64,
            approximator_layers=1,
        )
        return model.to(precision(self.precision).dtype).requires_grad_(False)

    def measure(self) -> dict[str, tuple[int, int]]:
        """Bytes measured and predicted: `peak`, and in training `kept`, what lies there after the forward pass."""
        model, chosen = self.model(), precision(self.precision)
        body, run = of_transformer(model), Pass(self.batch, self.side**2, self.text_tokens, chosen)
        layers = None if self.target is None else lora_layers_of(model, self.target)
        quantise(model, chosen)
        latents = torch.randn(self.batch, self.side**2, 64).to(chosen.dtype)
        text = torch.randn(self.batch, self.text_tokens, 64).to(chosen.dtype)
        args = latents, text, torch.full((self.batch,), 0.5), image_ids(2 * self.side, 2 * self.side, latents.device)
        if layers is None:
            with torch.no_grad(), LiveBytes() as live:
                model(*args)
            return {"peak": (live.peak, sampling_bytes(body, run))}
        assert self.target is not None
        add_trainable(model, LoraSettings(rank=self.rank, target=self.target), seed=1)
        model.train()
        model.checkpointing_interval = int(self.checkpointing)
        with LiveBytes() as live:
            velocity = model(*args)
            kept = live.now
            velocity.float().square().mean().backward()
        return {
            "kept": (kept, kept_bytes(body, run, layers, self.rank, self.checkpointing)),
            "peak": (live.peak, training_bytes(body, run, layers, self.rank, self.checkpointing)),
        }


def measure_vae(size: int) -> dict[str, tuple[int, int]]:
    """Flux's VAE with random weights, fp32: bytes measured and predicted of `decode` and `encode`."""
    vae = Autoencoder(**FLUX_VAE).eval().requires_grad_(False)
    with torch.no_grad(), LiveBytes() as decoding:
        vae.decode(torch.randn(1, 16, size // 8, size // 8))
    with torch.no_grad(), LiveBytes() as encoding:
        vae.encode(torch.randn(1, 3, size, size))
    body = of_vae(vae)
    return {
        "decode": (decoding.peak, vae_decode_bytes(body, size)),
        "encode": (encoding.peak, vae_encode_bytes(body, size)),
    }


def measure_t5(name: str, tokens: int, width: int = 512, heads: int = 64) -> tuple[int, int]:
    """A T5 encoder of that width with T5-XXL's number of heads: bytes measured and predicted."""
    encoder = T5Encoder(
        vocab_size=100,
        d_model=width,
        d_kv=width // heads,
        d_ff=width * 5 // 2,
        num_layers=2,
        num_heads=heads,
        feed_forward_proj="gated-gelu",
    )
    chosen = precision(name)
    model = encoder.to(chosen.dtype).eval().requires_grad_(False)
    body = of_text_encoder(model)
    quantise(model, chosen)
    ids = torch.zeros(1, tokens, dtype=torch.long)
    with torch.no_grad(), LiveBytes() as live:
        model(ids, torch.ones_like(ids))
    return live.peak, text_encoder_bytes(body, chosen, tokens)
