"""Chroma's transformer: diffusers' module tree with the forward pass that the recipe needs.

`ChromaTransformer` keeps diffusers' modules, names and configuration, so weights, adapters and quantisers work on it
unchanged, and replaces `forward` where diffusers 0.42 departs from the model:

- text padding is masked with booleans, on the key side only, for every row of the batch on its own (diffusers passes a
  float 0/1 mask, which attention adds to the scores, and multiplies it into the query side too);
- gradient checkpointing keeps that mask (diffusers drops it in the single blocks);
- the time stays in fp32 until it has been embedded (diffusers rounds it to the model's dtype before ×1000, which leaves
  126 distinct times in [.5, 1] at bf16);
- the modulation table of one time can be computed once and used for both passes of guidance.

Shapes use one letter an axis: B batch, L image tokens, T text tokens, D packed channels, C text channels, M width,
N modulation vectors.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from diffusers import ChromaTransformer2DModel
from diffusers.models.embeddings import apply_rotary_emb, get_timestep_embedding
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class KeyMaskedAttention:
    """Joint attention of Flux and Chroma with an optional boolean key mask, as a diffusers attention processor.

    The mask comes in as `key_mask` [B, 1, 1, T+L] (True = visible) rather than as diffusers' `attention_mask`, because
    the blocks multiply the latter into an outer product: a masked query row then has no key at all and becomes NaN.
    """

    def __call__(
        self,
        attn,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        key_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        query = attn.norm_q(heads(attn.to_q(hidden_states)))
        key = attn.norm_k(heads(attn.to_k(hidden_states)))
        value = heads(attn.to_v(hidden_states))
        if encoder_hidden_states is not None:
            query = torch.cat([attn.norm_added_q(heads(attn.add_q_proj(encoder_hidden_states))), query], dim=2)
            key = torch.cat([attn.norm_added_k(heads(attn.add_k_proj(encoder_hidden_states))), key], dim=2)
            value = torch.cat([heads(attn.add_v_proj(encoder_hidden_states)), value], dim=2)
        query = cast(Tensor, apply_rotary_emb(query, image_rotary_emb))
        key = cast(Tensor, apply_rotary_emb(key, image_rotary_emb))

        x = F.scaled_dot_product_attention(query, key, value, attn_mask=key_mask)
        x = x.transpose(1, 2).flatten(2)
        if encoder_hidden_states is None:
            return x
        text_tokens = encoder_hidden_states.shape[1]
        return attn.to_out[0](x[:, text_tokens:]), attn.to_add_out(x[:, :text_tokens])


class ChromaTransformer(ChromaTransformer2DModel):
    """Chroma's transformer: configuration, module names and weights as in diffusers' `ChromaTransformer2DModel`."""

    if TYPE_CHECKING:  # what diffusers' decorators hide from a checker
        config: Any

        def to(self, *args: Any, **kwargs: Any) -> ChromaTransformer: ...

    checkpointing_interval: int = 1
    """With gradient checkpointing every n-th block is recomputed, n ≥ 1: more memory and less time the larger it is."""

    # `from_config` reads the names of the arguments; to a checker `wraps` would hide `self`.
    @cast(Any, functools.wraps(ChromaTransformer2DModel.__init__))
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # Its buffer is rounded by every cast and left behind by a build on the meta device; `modulation` needs none.
        del self.time_text_embed
        self.set_attn_processor(cast(Any, KeyMaskedAttention()))

    @property
    def modulation_vectors(self) -> int:
        """N: three for each single block, twelve for each double block, two for the output norm (344 for Chroma 1)."""
        return 3 * len(self.single_transformer_blocks) + 12 * len(self.transformer_blocks) + 2

    def modulation(self, sigma_B: Tensor, guidance_B: Tensor | None = None) -> Tensor:
        """The modulation table [B, N, M] at times `sigma_B` in 0..1.

        `guidance_B` is the value of the guidance embedding; None is 0 everywhere, the only value Chroma has seen, since
        it is de-distilled. Like the time it is multiplied by 1000 before it is embedded, as in the author's code. Time,
        guidance and the vector's index are embedded in fp32 and only then cast to the approximator's dtype.
        """
        channels = cast(Any, self.config).approximator_num_channels // 4
        weight = self.distilled_guidance_layer.in_proj.weight
        sigma_B = sigma_B.to(weight.device, torch.float32)

        def embed(values: Tensor, size: int) -> Tensor:
            return get_timestep_embedding(values, size, flip_sin_to_cos=True, downscale_freq_shift=0)

        B, N = sigma_B.shape[0], self.modulation_vectors
        time = embed(sigma_B * 1000, channels)
        if guidance_B is None:
            guidance_B = torch.zeros_like(sigma_B)
        guidance = embed(guidance_B.to(weight.device, torch.float32) * 1000, channels)
        index = embed(torch.arange(N, device=weight.device) * 1000, 2 * channels)
        parts = (torch.cat([time, guidance], dim=1)[:, None].expand(B, N, -1), index.expand(B, N, -1))
        return self.distilled_guidance_layer(torch.cat(parts, dim=2).to(weight.dtype))

    def forward(  # type: ignore[override]
        self,
        latents_BLD: Tensor,
        text_BTC: Tensor,
        sigma_B: Tensor,
        img_ids_L3: Tensor,
        text_mask_BT: Tensor | None = None,
        modulation_BNM: Tensor | None = None,
        guidance_B: Tensor | None = None,
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
        Returns:
            velocity [B, L, D] in the dtype of the model's output projection.
        """
        if modulation_BNM is None:
            modulation_BNM = self.modulation(sigma_B, guidance_B)
        T = text_BTC.shape[1]
        text_ids = torch.zeros(T, 3, device=img_ids_L3.device, dtype=img_ids_L3.dtype)
        rotary = self.pos_embed(torch.cat([text_ids, img_ids_L3]))
        key_mask = None
        if text_mask_BT is not None:
            image_mask = text_mask_BT.new_ones(latents_BLD.shape[:2])
            key_mask = torch.cat([text_mask_BT, image_mask], dim=1)[:, None, None, :]

        image = self.x_embedder(latents_BLD)
        text = self.context_embedder(text_BTC)
        doubles, singles = self.transformer_blocks, self.single_transformer_blocks
        image_offset = 3 * len(singles)
        text_offset = image_offset + 6 * len(doubles)
        for i, block in enumerate(doubles):
            a, b = image_offset + 6 * i, text_offset + 6 * i
            modulation = torch.cat([modulation_BNM[:, a : a + 6], modulation_BNM[:, b : b + 6]], dim=1)
            text, image = self._run(i, block, image, text, modulation, rotary, key_mask=key_mask)
        joint = torch.cat([text, image], dim=1)
        for i, block in enumerate(singles):
            vectors = modulation_BNM[:, 3 * i : 3 * i + 3]
            joint = self._run(len(doubles) + i, block, joint, vectors, rotary, key_mask=key_mask)
        return self.proj_out(self.norm_out(joint[:, T:], modulation_BNM[:, -2:]))

    def recomputes(self, index: int) -> bool:
        """Whether gradient checkpointing recomputes block `index`, counted from 0 over double and single blocks."""
        return self.gradient_checkpointing and index % self.checkpointing_interval == 0

    def _run(self, index: int, block: nn.Module, *args: Any, key_mask: Tensor | None) -> Any:
        """Block `index`, recomputed in the backward pass where gradient checkpointing says so."""
        kwargs = {"key_mask": key_mask}
        if self.recomputes(index) and torch.is_grad_enabled():
            # No block draws random numbers; preserving the state would set the process-wide generator in the backward
            # pass, under the feet of a prompt that runs at that moment.
            return checkpoint(
                lambda *a: block(*a, joint_attention_kwargs=kwargs),
                *args,
                use_reentrant=False,
                preserve_rng_state=False,
            )
        return block(*args, joint_attention_kwargs=kwargs)
