"""T5's encoder in version 1.1, with the gated GELU: what reads the prompt.

Modules and weights are named as in transformers' `T5EncoderModel`. Shapes: B batch, T tokens, C channels, H heads.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import configuration


class Norm(nn.Module):
    """Root mean square norm: no mean is taken off, no bias added; computed in fp32."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        mean_square = x.float().pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(mean_square + self.eps)).to(self.weight.dtype)


def embedding(count: int, width: int) -> nn.Embedding:
    """As `nn.Embedding` draws it, but nothing on the meta device, where drawing imports PyTorch's compiler (1.2 s)."""
    weight = torch.empty(count, width)
    return nn.Embedding(count, width, _weight=weight if weight.is_meta else nn.init.normal_(weight))


class SelfAttention(nn.Module):
    """Attention without a scale; only the first block's has the table of the relative positions."""

    def __init__(self, width: int, heads: int, head_width: int, buckets: int | None):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(width, heads * head_width, bias=False) for _ in range(3))
        self.o = nn.Linear(heads * head_width, width, bias=False)
        if buckets is not None:
            self.relative_attention_bias = embedding(buckets, heads)

    def forward(self, x_BTC: Tensor, bias_BHTT: Tensor) -> Tensor:
        query, key, value = (
            layer(x_BTC).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        x = F.scaled_dot_product_attention(query, key, value, attn_mask=bias_BHTT, scale=1.0)
        return self.o(x.transpose(1, 2).flatten(2))


class GatedFeedForward(nn.Module):
    """T5's MLP."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.wi_0, self.wi_1 = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.wo = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(_gelu(self.wi_0(x)) * self.wi_1(x))


class AttentionLayer(nn.Module):
    """The first half of a block."""

    def __init__(self, attention: SelfAttention, norm: Norm):
        super().__init__()
        self.SelfAttention = attention
        self.layer_norm = norm

    def forward(self, x_BTC: Tensor, bias_BHTT: Tensor) -> Tensor:
        return x_BTC + self.SelfAttention(self.layer_norm(x_BTC), bias_BHTT)


class FeedForwardLayer(nn.Module):
    """The second half of a block."""

    def __init__(self, feed_forward: GatedFeedForward, norm: Norm):
        super().__init__()
        self.DenseReluDense = feed_forward
        self.layer_norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return x + self.DenseReluDense(self.layer_norm(x))


class Block(nn.Module):
    """Attention, then the MLP."""

    def __init__(self, attention: AttentionLayer, feed_forward: FeedForwardLayer):
        super().__init__()
        self.layer = nn.ModuleList([attention, feed_forward])

    def forward(self, x_BTC: Tensor, bias_BHTT: Tensor) -> Tensor:
        return _finite(self.layer[1](_finite(self.layer[0](x_BTC, bias_BHTT))))


class Stack(nn.Module):
    """The blocks. `embed_tokens` is the whole model's table once more, under the name that files have it by, too."""

    def __init__(self, embed_tokens: nn.Embedding, blocks: list[Block], norm: Norm):
        super().__init__()
        self.embed_tokens = embed_tokens
        self.block = nn.ModuleList(blocks)
        self.final_layer_norm = norm


class T5Encoder(nn.Module):
    """The arguments are those of transformers' `T5Config`, with its defaults. The others of a config.json are about
    training, decoding and the file.

    Raises ValueError for another feed-forward than the gated GELU of version 1.1.
    """

    def __init__(
        self,
        vocab_size: int = 32128,
        d_model: int = 512,
        d_kv: int = 64,
        d_ff: int = 2048,
        num_layers: int = 6,
        num_heads: int = 8,
        relative_attention_num_buckets: int = 32,
        relative_attention_max_distance: int = 128,
        layer_norm_epsilon: float = 1e-6,
        feed_forward_proj: str = "relu",
        **others: Any,
    ):
        config = configuration(locals())
        super().__init__()
        if feed_forward_proj != "gated-gelu":
            raise ValueError(f"feed_forward_proj is '{feed_forward_proj}'; T5 version 1.1 has 'gated-gelu'")
        self.config: Any = config

        def norm() -> Norm:
            return Norm(d_model, layer_norm_epsilon)

        def block(index: int) -> Block:
            attention = SelfAttention(d_model, num_heads, d_kv, None if index else relative_attention_num_buckets)
            return Block(AttentionLayer(attention, norm()), FeedForwardLayer(GatedFeedForward(d_model, d_ff), norm()))

        self.shared = embedding(vocab_size, d_model)
        self.encoder = Stack(self.shared, [block(i) for i in range(num_layers)], norm())

    def forward(self, tokens_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """The last states [B, T, C] of token ids. mask: true, or 1, for the tokens that the others see."""
        x = self.shared(tokens_BT)
        bias = self._position_bias(tokens_BT.shape[1])
        bias = torch.where(mask_BT.bool()[:, None, None], bias, torch.finfo(bias.dtype).min)
        for block in self.encoder.block:
            x = block(x, bias)
        return self.encoder.final_layer_norm(x)

    def _position_bias(self, tokens: int) -> Tensor:
        """What attention adds to its scores [1, H, T, T]: a number for each distance from query to key.

        A quarter of the buckets for each direction is for single distances, a quarter for ranges that grow up to
        `relative_attention_max_distance`.
        """
        table = self.encoder.get_submodule("block.0.layer.0.SelfAttention.relative_attention_bias")
        assert isinstance(table, nn.Embedding)
        places = torch.arange(tokens, device=table.weight.device)
        distance = places[None] - places[:, None]
        half = table.num_embeddings // 2
        exact = half // 2
        away = distance.abs()
        ranges = (
            (away.float() / exact).log()
            / math.log(self.config.relative_attention_max_distance / exact)
            * (half - exact)
        )
        far = (exact + ranges.to(torch.long)).clamp(max=half - 1)
        bucket = (distance > 0).to(torch.long) * half + torch.where(away < exact, away, far)
        return table(bucket).permute(2, 0, 1)[None].contiguous()


def _gelu(x: Tensor) -> Tensor:
    """GELU (tanh), written out as T5 was trained with it: torch's own differs in the last bits."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def _finite(x: Tensor) -> Tensor:
    """fp16 that has run over its range is brought back below its end."""
    if x.dtype != torch.float16:
        return x
    end = torch.finfo(x.dtype).max
    limit = torch.where(x.isinf().any(), end - 1000, end)
    return x.clamp(-limit, limit)
