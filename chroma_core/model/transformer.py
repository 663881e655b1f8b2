"""Chroma's transformer.

Modules and weights are named as in diffusers' `ChromaTransformer2DModel`, so files, LoRAs and targets mean the same in
both. Where that class (diffusers 0.42) departs from the model, this one does not:

- text padding is masked with booleans, on the key side only, for every row of the batch on its own (diffusers passes a
  float 0/1 mask, which attention adds to the scores, and multiplies it into the query side too);
- gradient checkpointing keeps that mask (diffusers drops it in the single blocks);
- the time stays in fp32 until it has been embedded (diffusers rounds it to the model's dtype before ×1000, which leaves
  126 distinct times in [.5, 1] at bf16);
- the modulation table of one time can be computed once and used for both passes of guidance.

Shapes use one letter an axis: B batch, H heads, L image tokens, T text tokens, S tokens of either or both, D packed
channels, C text channels, M width, N modulation vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import configuration
from .device import flash_instead
from .first_block_cache import FirstBlockCache
from .recomputing import recomputing

MLP_RATIO = 4
ROTARY_BASE = 10000
TIME_PERIOD = 10000

Rotary = tuple[Tensor, Tensor]
"""Turns [S, head dimensions / 2] of the tokens' positions as complex numbers of length 1, and their conjugates."""


class Attention(nn.Module):
    """Joint attention over text and image (`joint`), or over both in one row."""

    def __init__(self, width: int, heads: int, joint: bool):
        super().__init__()
        self.heads, self.deterministic = heads, False
        self.norm_q = nn.RMSNorm(width // heads, eps=1e-6)
        self.norm_k = nn.RMSNorm(width // heads, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        if joint:
            self.to_out = nn.ModuleList([nn.Linear(width, width)])
            self.norm_added_q = nn.RMSNorm(width // heads, eps=1e-6)
            self.norm_added_k = nn.RMSNorm(width // heads, eps=1e-6)
            self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(width, width) for _ in range(3))
            self.to_add_out = nn.Linear(width, width)

    def forward(
        self, x_BSM: Tensor, rotary: Rotary, key_mask_B11S: Tensor | None, text_BTM: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """(image, text) where the text comes by itself. key_mask: True = visible; a row that is hidden still asks, so
        that it has keys and does not become NaN.
        """

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        query = self.norm_q(heads(self.to_q(x_BSM)))
        key = self.norm_k(heads(self.to_k(x_BSM)))
        value = heads(self.to_v(x_BSM))
        if text_BTM is not None:
            query = torch.cat([self.norm_added_q(heads(self.add_q_proj(text_BTM))), query], dim=2)
            key = torch.cat([self.norm_added_k(heads(self.add_k_proj(text_BTM))), key], dim=2)
            value = torch.cat([heads(self.add_v_proj(text_BTM)), value], dim=2)
        query = rotated(query, rotary)
        key = rotated(key, rotary)
        exactly = self.deterministic and torch.is_grad_enabled()
        attend = unfused_attention if exactly else fused_attention
        x = attend(query, key, value, key_mask_B11S).transpose(1, 2).flatten(2)
        if text_BTM is None:
            return x
        tokens = text_BTM.shape[1]
        return self.to_out[0](x[:, tokens:]), self.to_add_out(x[:, :tokens])


def fused_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """softmax(q·kᵀ/√d)·v [B, heads, S, d] without the scores in memory, by the kernel that torch chooses.

    But in training on NVIDIA's Hopper and later by flash attention: torch's choice there is cuDNN, which makes a plan
    for each new number of tokens (on an H200, captions of 50 lengths took 531 ms a step over the first fifty steps and
    125 later; flash attention 127 and 133). Asked for by its own name, because torch's preference is the process'.
    """
    training = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if training and attn_mask is None and flash_instead(query, key, value):
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask)


def unfused_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """softmax(q·kᵀ/√d)·v [B, heads, S, d] in fp32, with all scores in memory.

    The backward pass of fused kernels adds in any order on a GPU, so that no two runs have the same bits; this one does
    not.
    """
    scores = query.float() @ key.float().transpose(-1, -2) * query.shape[-1] ** -0.5
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    return (scores.softmax(dim=-1) @ value.float()).to(value.dtype)


class Gelu(nn.Module):
    """A linear layer, then GELU (tanh)."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(width, inner)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """The MLP of a double block. The place between its layers is that of a dropout, which Chroma does not have."""

    def __init__(self, width: int):
        super().__init__()
        inner = MLP_RATIO * width
        self.net = nn.Sequential(Gelu(width, inner), nn.Identity(), nn.Linear(inner, width))

    def begun(self, x: Tensor) -> tuple[Tensor, ...]:
        """Up to the last layer."""
        return begun(self.net[2], self.net[1](self.net[0](x)))


class Block(nn.Module):
    """A block in two halves: `last` layers with what follows them, and all before. The backward pass needs nothing of
    the second half but its weights, so with gradient checkpointing only the first is computed again.
    """

    def last(self) -> list[nn.Module]:
        """The layers that the second half begins with."""
        raise NotImplementedError

    def first_half(self, *inputs: Any) -> tuple[Any, ...]:
        """From the block's inputs to what the last layers read, as `begun` gives it."""
        raise NotImplementedError

    def second_half(self, inputs: Sequence[Any], *between: Any) -> Any:
        """From there to the block's result."""
        raise NotImplementedError

    def forward(self, *inputs: Any) -> Any:
        return self.second_half(inputs, *self.first_half(*inputs))

    def recomputed(self, *inputs: Any) -> Any:
        """`forward`, of which the backward pass computes what it needs again."""
        hooked = self._forward_hooks or self._forward_pre_hooks or "forward" in self.__dict__
        clipped = inputs[0].dtype == torch.float16  # see `finite`: clipping keeps what was clipped
        if hooked or clipped or self._compiled_call_impl is not None or not all(map(in_halves, self.last())):
            return recomputing(self, *inputs)
        between: Any = recomputing(self.first_half, *inputs)
        return self.second_half(inputs, *between)


def in_halves(layer: nn.Module) -> bool:
    """Whether a layer's result can be computed outside of a checkpoint without keeping its input; an adapted layer
    knows that of itself."""
    own = getattr(layer, "in_halves", None)
    return not any(p.requires_grad for p in layer.parameters()) if own is None else own()


def begun(layer: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """What `ended` takes: the input, and of an adapted layer what its branches made of it."""
    begin: Any = getattr(layer, "begin", None)
    return (x,) if begin is None else begin(x)


def ended(layer: nn.Module, *between: Tensor) -> Tensor:
    """layer(x), from what `begun` gave."""
    end: Any = getattr(layer, "end", layer)
    return end(*between)


class DoubleBlock(Block):
    """Text and image side by side, each with weights of its own, joined in attention."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attn = Attention(width, heads, joint=True)
        self.ff = FeedForward(width)
        self.ff_context = FeedForward(width)

    def last(self) -> list[nn.Module]:
        return [self.ff.net[2], self.ff_context.net[2]]

    def first_half(
        self, image_BLM: Tensor, text_BTM: Tensor, modulation: Tensor, rotary: Rotary, key_mask: Tensor | None
    ) -> tuple[Any, ...]:
        """modulation [B, 12, M]: the image's six vectors, then the text's."""
        shift, scale, gate, mlp_shift, mlp_scale, _ = modulation[:, :6].split(1, dim=1)
        t_shift, t_scale, t_gate, t_mlp_shift, t_mlp_scale, _ = modulation[:, 6:].split(1, dim=1)
        image, text = self.attn(
            modulated(image_BLM, shift, scale), rotary, key_mask, modulated(text_BTM, t_shift, t_scale)
        )
        image = image_BLM + gate * image
        text = text_BTM + t_gate * text
        for_text = self.ff_context.begun(modulated(text, t_mlp_shift, t_mlp_scale))
        # The larger one last: its GELU is not computed again, since the backward pass needs only what goes into it.
        for_image = self.ff.begun(modulated(image, mlp_shift, mlp_scale))
        return image, text, for_image, for_text

    def second_half(
        self, inputs: Sequence[Any], image: Tensor, text: Tensor, for_image: Any, for_text: Any
    ) -> tuple[Tensor, Tensor]:
        """(text, image)."""
        modulation = inputs[2]
        image = image + modulation[:, 5:6] * ended(self.ff.net[2], *for_image)
        text = text + modulation[:, 11:12] * ended(self.ff_context.net[2], *for_text)
        return finite(text), finite(image)


class SingleBlock(Block):
    """Text and image in one row; attention and MLP read the same input, and one layer takes both results."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        inner = MLP_RATIO * width
        self.proj_mlp = nn.Linear(width, inner)
        self.proj_out = nn.Linear(width + inner, width)
        self.attn = Attention(width, heads, joint=False)

    def last(self) -> list[nn.Module]:
        return [self.proj_out]

    def first_half(
        self, x_BSM: Tensor, modulation: Tensor, rotary: Rotary, key_mask: Tensor | None
    ) -> tuple[Tensor, ...]:
        """modulation: [B, 3, M]."""
        shift, scale, _ = modulation.split(1, dim=1)
        x = modulated(x_BSM, shift, scale)
        inner, attended = self.proj_mlp(x), self.attn(x, rotary, key_mask)
        # Last, so that it is not computed again: the backward pass needs only what goes into it.
        mlp = F.gelu(inner, approximate="tanh")
        del inner
        return begun(self.proj_out, torch.cat([attended, mlp], dim=2))

    def second_half(self, inputs: Sequence[Any], *between: Tensor) -> Tensor:
        x_BSM, modulation = inputs[:2]
        return finite(x_BSM + modulation[:, 2:] * ended(self.proj_out, *between))


class ApproximatorLayer(nn.Module):
    """Two linear layers with SiLU between them."""

    def __init__(self, width: int):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class Approximator(nn.Module):
    """From the embedded time and a vector's number to that modulation vector."""

    def __init__(self, channels: int, width: int, inner: int, layers: int):
        super().__init__()
        self.in_proj = nn.Linear(channels, inner)
        self.layers = nn.ModuleList(ApproximatorLayer(inner) for _ in range(layers))
        self.norms = nn.ModuleList(nn.RMSNorm(inner) for _ in range(layers))
        self.out_proj = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.in_proj(x)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + layer(norm(x))
        return self.out_proj(x)


class ChromaTransformer(nn.Module):
    """Chroma's transformer. The arguments are those of diffusers' `ChromaTransformer2DModel`, by default Chroma 1's.

    Raises ValueError for arguments that do not fit together.
    """

    checkpointing_interval: int = 0
    """With gradients every n-th block is computed again in the backward pass: more memory and less time the larger n
    is. 0: none is."""

    step_hooks: list[Callable[[float], bool]]
    """What `at_step` calls, e.g. LoRAs whose strength changes over the run. True: the model is another one now."""

    between_blocks: Callable[[], None] | None
    """Called before each block's forward pass and before its backward pass; it may raise. None: nothing is."""

    def __init__(
        self,
        patch_size: int = 1,
        in_channels: int = 64,
        out_channels: int | None = None,
        num_layers: int = 19,
        num_single_layers: int = 38,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 4096,
        axes_dims_rope: Sequence[int] = (16, 56, 56),
        approximator_num_channels: int = 64,
        approximator_hidden_dim: int = 5120,
        approximator_layers: int = 5,
    ):
        config = configuration(locals())
        super().__init__()
        if len(axes_dims_rope) != 3 or sum(axes_dims_rope) != attention_head_dim or any(n % 2 for n in axes_dims_rope):
            raise ValueError(
                f"axes_dims_rope is {list(axes_dims_rope)}: three even numbers are needed, {attention_head_dim} in all"
            )
        self.config: Any = config
        self.step_hooks = []
        self.between_blocks = None
        self.inner_dim = width = num_attention_heads * attention_head_dim
        self.distilled_guidance_layer = Approximator(
            approximator_num_channels, width, approximator_hidden_dim, approximator_layers
        )
        self.context_embedder = nn.Linear(joint_attention_dim, width)
        self.x_embedder = nn.Linear(in_channels, width)
        heads = num_attention_heads
        self.transformer_blocks = nn.ModuleList(DoubleBlock(width, heads) for _ in range(num_layers))
        self.single_transformer_blocks = nn.ModuleList(SingleBlock(width, heads) for _ in range(num_single_layers))
        self.proj_out = nn.Linear(width, patch_size**2 * (out_channels or in_channels))

    @property
    def modulation_vectors(self) -> int:
        """N: three for each single block, twelve for each double block, two for the output norm (344 for Chroma 1)."""
        return 3 * len(self.single_transformer_blocks) + 12 * len(self.transformer_blocks) + 2

    def at_step(self, place: float) -> bool:
        """Say where a sampling run is, before each of its steps: 0 at the first step, 1 at the last.

        Returns whether the model is another one than at the step before.
        """
        changed = [hook(place) for hook in self.step_hooks]  # every one is to hear it
        return any(changed)

    def modulation(self, sigma_B: Tensor, guidance_B: Tensor | None = None) -> Tensor:
        """The modulation table [B, N, M] at times `sigma_B` in 0..1.

        `guidance_B` is the value of the guidance embedding; None is 0 everywhere, the only value Chroma has seen, since
        it is de-distilled. Like the time it is multiplied by 1000 before it is embedded, as in the author's code. Time,
        guidance and the vector's index are embedded in fp32 and only then cast to the approximator's dtype.
        """
        channels = self.config.approximator_num_channels // 4
        weight = self.distilled_guidance_layer.in_proj.weight
        sigma_B = sigma_B.to(weight.device, torch.float32)
        B, N = sigma_B.shape[0], self.modulation_vectors
        time = embedded(sigma_B * 1000, channels)
        if guidance_B is None:
            guidance_B = torch.zeros_like(sigma_B)
        guidance = embedded(guidance_B.to(weight.device, torch.float32) * 1000, channels)
        index = embedded(torch.arange(N, device=weight.device) * 1000, 2 * channels)
        parts = (torch.cat([time, guidance], dim=1)[:, None].expand(B, N, -1), index.expand(B, N, -1))
        return self.distilled_guidance_layer(torch.cat(parts, dim=2).to(weight.dtype))

    def forward(
        self,
        latents_BLD: Tensor,
        text_BTC: Tensor,
        sigma_B: Tensor,
        img_ids_L3: Tensor,
        text_mask_BT: Tensor | None = None,
        modulation_BNM: Tensor | None = None,
        guidance_B: Tensor | None = None,
        cache: FirstBlockCache | None = None,
    ) -> Tensor:
        """Predict the velocity ε − x₀.

        Args:
            latents_BLD: packed noisy latents, in the dtype in which the model computes.
            text_BTC: T5 states of the visible tokens.
            sigma_B: noise levels in 0..1 (fp32).
            img_ids_L3: position ids from `latents.image_ids`.
            text_mask_BT: booleans, True for a visible text token; None when every row uses all T. A row's result does
                not depend on what stands in its masked places.
            modulation_BNM: the table from `modulation(sigma_B)`, if the caller already has it.
            guidance_B: value of the guidance embedding; None = 0. Not read when the table is given.
            cache: leaves out all blocks but the first where it thinks that they change little; without gradients.
        Returns:
            velocity [B, L, D] in the dtype of the model's output projection.
        """
        if modulation_BNM is None:
            modulation_BNM = self.modulation(sigma_B, guidance_B)
        T = text_BTC.shape[1]
        text_ids = torch.zeros(T, 3, device=img_ids_L3.device, dtype=img_ids_L3.dtype)
        rotary = rotary_table(torch.cat([text_ids, img_ids_L3]), self.config.axes_dims_rope)
        key_mask = None
        if text_mask_BT is not None:
            image_mask = text_mask_BT.new_ones(latents_BLD.shape[:2])
            key_mask = torch.cat([text_mask_BT, image_mask], dim=1)[:, None, None, :]

        conditions = modulation_BNM, rotary, key_mask
        if cache is None:
            tokens = [self.x_embedder(latents_BLD), self.context_embedder(text_BTC)]
            image = self._blocks(0, None, tokens, *conditions)[0]
        else:
            image = self.x_embedder(latents_BLD)
            first, text = self._blocks(0, 1, [image, self.context_embedder(text_BTC)], *conditions)

            def rest(rows: Tensor | None) -> Tensor:
                if rows is None:
                    return self._blocks(1, None, [first, text], *conditions)[0]
                masked = None if key_mask is None else key_mask[rows]
                return self._blocks(1, None, [first[rows], text[rows]], modulation_BNM[rows], rotary, masked)[0]

            image = cache.through(image, first, rest)
        shift, scale = modulation_BNM[:, -2:].split(1, dim=1)
        return self.proj_out(modulated(image, shift, scale))

    def _blocks(
        self,
        begin: int,
        end: int | None,
        tokens: list[Tensor],
        modulation_BNM: Tensor,
        rotary: Rotary,
        key_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Image [B, L, M] and text [B, T, M] after the blocks from `begin` to before `end`, double then single.

        tokens: those before, image and text. The list is emptied: what only it holds is freed after the first block.
        """
        image, text = tokens
        tokens.clear()
        doubles, singles = len(self.transformer_blocks), len(self.single_transformer_blocks)
        image_offset = 3 * singles
        text_offset = image_offset + 6 * doubles
        chosen = range(doubles + singles)[begin:end]
        for i in (i for i in chosen if i < doubles):
            a, b = image_offset + 6 * i, text_offset + 6 * i
            modulation = torch.cat([modulation_BNM[:, a : a + 6], modulation_BNM[:, b : b + 6]], dim=1)
            text, image = self._run(i, self.transformer_blocks[i], image, text, modulation, rotary, key_mask)
        if not chosen or chosen[-1] < doubles:
            return image, text
        joint, T = torch.cat([text, image], dim=1), text.shape[1]
        for i in (i - doubles for i in chosen if i >= doubles):
            vectors = modulation_BNM[:, 3 * i : 3 * i + 3]
            joint = self._run(doubles + i, self.single_transformer_blocks[i], joint, vectors, rotary, key_mask)
        return joint[:, T:], joint[:, :T]

    def set_deterministic(self, on: bool) -> None:
        """Whether gradients are to have the same bits in every run, on a GPU too; see `unfused_attention`."""
        for block in (*self.transformer_blocks, *self.single_transformer_blocks):
            block.attn.deterministic = on  # type: ignore[union-attr]

    def recomputes(self, index: int) -> bool:
        """Whether the backward pass computes block `index` again, counted from 0 over double and single blocks."""
        return self.checkpointing_interval > 0 and index % self.checkpointing_interval == 0

    def _run(self, index: int, block: Any, *args: Any) -> Any:
        between, grad = self.between_blocks, torch.is_grad_enabled()
        if between is not None:
            between()
        result = block.recomputed(*args) if self.recomputes(index) and grad else block(*args)
        if between is not None and grad:
            last = result[-1] if isinstance(result, tuple) else result
            if last.requires_grad:
                last.register_hook(lambda gradient: between())
        return result


def modulated(x_BSM: Tensor, shift_B1M: Tensor, scale_B1M: Tensor) -> Tensor:
    """The layer norm of x, scaled and shifted."""
    return F.layer_norm(x_BSM, x_BSM.shape[-1:], eps=1e-6) * (1 + scale_B1M) + shift_B1M


def finite(x: Tensor) -> Tensor:
    """fp16 that has run over its range is brought back to its end."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


def embedded(values_B: Tensor, size: int) -> Tensor:
    """Cosines, then sines [B, size] of each value at `size` / 2 frequencies from 1 down to 1 / 10000, fp32."""
    half = size // 2
    exponents = -math.log(TIME_PERIOD) * torch.arange(half, dtype=torch.float32, device=values_B.device) / half
    angles = values_B[:, None].float() * exponents.exp()[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rotary_table(ids_S3: Tensor, axes: Sequence[int]) -> Rotary:
    """The rotary embedding of positions with so many dimensions an axis; angles in fp64 where the device has it."""
    dtype = torch.float32 if ids_S3.device.type in ("mps", "npu", "neuron") else torch.float64
    angles = []
    for axis, size in enumerate(axes):
        exponents = torch.arange(0, size, 2, dtype=dtype, device=ids_S3.device) / size
        angles.append(torch.outer(ids_S3[:, axis].float(), 1.0 / ROTARY_BASE**exponents))
    both = torch.cat(angles, dim=-1)
    cos, sin = both.cos().float(), both.sin().float()
    return torch.complex(cos, sin), torch.complex(cos, -sin)


def rotated(x_BHSd: Tensor, rotary: Rotary) -> Tensor:
    """Each pair of neighbouring dimensions turned by its angle; computed in fp32."""
    if not torch.compiler.is_compiling():
        return _Turn.apply(x_BHSd, *rotary)  # type: ignore[return-value]
    # The compiler cannot write code for complex numbers.
    a, b = x_BHSd.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = torch.view_as_real(rotary[0]).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x_BHSd.dtype)


class _Turn(torch.autograd.Function):
    """Forwards, and for gradients backwards: nothing of x is kept, and every number is rounded once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(there, back)
        return _turned(x, there)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _turned(gradients[0], ctx.saved_tensors[1]), None, None


def _turned(x_BHSd: Tensor, turns_SD: Tensor) -> Tensor:
    """Pairs as complex numbers, times turns: three operations instead of nine, and the same bits."""
    x = x_BHSd.float()
    x = x if x.stride(-1) == 1 else x.contiguous()
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns_SD).flatten(-2).to(x_BHSd.dtype)
