"""Working memory beside the weights: what a pass through a model keeps and needs for a moment.

The unit is one hidden state: batch × tokens × width × bytes of the dtype. How many of them are alive follows from the
forward pass and was measured with live tensors on the CPU (`tools/docs/memory_table.py`; the tests repeat it at
other widths and lengths). At 2 bytes a value more units are needed, because norms and rotation of query and key work in
fp32. Attention is counted without its scores: fused kernels (CUDA, ROCm, CPU) never hold them. Work areas of libraries
such as cuDNN are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..model.eight_bits import LARGEST, ROWS, Compute
from ..model.precision import Precision
from ..model.quantised import CHUNK, CHUNKS
from ..model.transformer import MLP_RATIO
from .anatomy import LoraLayers, TextEncoder, Transformer, Vae

TEXT_TOKENS = 128
"""Text length assumed for the transformer; a long caption."""

T5_TOKENS = 512
"""Text length assumed for T5; the longest prompt."""

PATCH = 16
"""Pixels a side of one image token."""

_SAMPLING = {4: 13.1, 2: 15.1}
"""Units at the peak of a forward pass without gradients: a single block while it rotates query and key."""
_SAMPLING_LINEAR = 8.0
"""The same while its largest linear works, when a dequantised weight lies beside them."""

_KEPT_DOUBLE = {4: 13.0, 2: 15.0}
_KEPT_SINGLE = {4: 11.0, 2: 13.0}
"""Units that a block keeps for its backward pass, without what LoRA layers keep."""
_FUSED_NORM = 2.0
"""Units fewer that a block keeps in 16 bits on a GPU, whose norm of query and key is one kernel."""
_BACKWARD = {4: 9.5, 2: 12.5}
_BACKWARD_MLP = {4: 8.8, 2: 8.8}
"""Units on top of what is kept when the backward pass begins; second: with a LoRA on the single blocks' last layer."""
_RECOMPUTE = {4: 20.3, 2: 26.3}
_RECOMPUTE_MLP = {4: 25.4, 2: 27.5}
"""The same with gradient checkpointing: one block's kept values and its backward pass."""
_LINEAR_SHARE = 6.5
"""Units fewer than at the peak while a dequantised weight lies beside them in the backward pass."""

MOMENTS = {
    "int8": (6.0, 13.0),
    "fp8": (6.0, 9.0),
    "int4": (9.1, 12.1),
    "nf4": (6.0, 10.0),
    "int8-quanto": (8.0, 6.0),
    "int4-quanto": (9.1, 5.0),
    "fp8-quanto": (8.0, 6.0),
    "nf4-bnb": (2.1, 5.0),
    "fp8-torchao": (10.0, 15.0),
}
"""Bytes a weight while (a piece of) one linear is dequantised on a CPU, and while it is quantised, beside its
unquantised weight; measured."""

BESIDE = {"int8": 0.0, "fp8": 0.0, "int4": 2.0, "nf4": 6.0}
"""Bytes a weight of a piece beside the result while our own schemes are dequantised on a GPU, which rounds as it
writes."""


@dataclass(frozen=True)
class Pass:
    """Sizes of one pass through the transformer: images, image and text tokens, and how it computes.

    on_gpu: RMS norms are one kernel, which keeps no fp32 copy, and so is rounding. compute: see `eight_bits`.
    """

    batch: int
    image_tokens: int
    text_tokens: int
    chosen: Precision
    on_gpu: bool = False
    compute: Compute = "weights"

    @property
    def tokens(self) -> int:
        """Text and image tokens of the whole batch."""
        return self.batch * (self.image_tokens + self.text_tokens)

    @property
    def text_share(self) -> float:
        """Text tokens among all tokens."""
        return self.text_tokens / (self.image_tokens + self.text_tokens)

    def unit(self, body: Transformer) -> int:
        """Bytes of one hidden state."""
        return self.tokens * body.width * self.chosen.dtype.itemsize

    def rotation(self, body: Transformer) -> int:
        """Bytes of the sines and cosines of all positions, fp32, alive throughout."""
        return 2 * 4 * (self.image_tokens + self.text_tokens) * body.head_dim


def dequantised(weights: int, chosen: Precision, on_gpu: bool) -> int:
    """Bytes for a moment while a linear of `weights` weights is dequantised."""
    if not chosen.quantised:
        return 0
    size = chosen.dtype.itemsize
    if on_gpu and chosen.library is None:
        return round(BESIDE[chosen.name] * min(weights, CHUNKS["cuda"]) + size * weights)
    whole = _in_pieces(weights, chosen, MOMENTS[chosen.name][0], size, CHUNKS["cpu"])
    # Pieces are rounded as they are written into the result, which the moment of a whole weight includes.
    twice = chosen.scheme in ("int8", "fp8", "nf4") and weights > CHUNKS["cpu"]
    return whole - twice * size * CHUNKS["cpu"]


def product_bytes(body: Transformer, run: Pass) -> int:
    """Bytes for a moment beside the input and the result of the largest product."""
    largest = body.whole.largest_linear
    if run.compute == "weights" or run.chosen.scheme not in LARGEST:
        return dequantised(largest, run.chosen, run.on_gpu)
    # Codes of one row, its sums twice, four widths wide; and fp8's weight once more, turned.
    return min(run.tokens, ROWS) * body.width * (1 + 8 * MLP_RATIO) + (largest if run.chosen.scheme == "fp8" else 0)


def quantising(weights: int, chosen: Precision) -> int:
    """Bytes for a moment while a linear of `weights` weights is quantised."""
    if not chosen.quantised:
        return 0
    return _in_pieces(weights, chosen, MOMENTS[chosen.name][1], chosen.bytes_per_weight, CHUNK)


def _in_pieces(weights: int, chosen: Precision, moment: float, result: float, piece: int) -> int:
    """Our own schemes work on a piece of a large weight, beside the result so far; libraries on all of it."""
    if chosen.library is not None or weights <= piece:
        return round(moment * weights)
    return round(moment * piece + result * weights)


def sampling_bytes(body: Transformer, run: Pass) -> int:
    """Peak of one forward pass without gradients (guidance runs its two passes one after the other)."""
    unit, size = run.unit(body), run.chosen.dtype.itemsize
    extra = product_bytes(body, run)
    return round(max(_SAMPLING[size] * unit, _SAMPLING_LINEAR * unit + extra)) + run.rotation(body)


def kept_bytes(body: Transformer, run: Pass, layers: LoraLayers, rank: int, interval: int) -> int:
    """What lies in memory when the forward pass of training is done, weights and LoRA apart.

    interval: gradient checkpointing of every n-th block; 0: of none.
    """
    unit, size = run.unit(body), run.chosen.dtype.itemsize
    double, single = _kept_blocks(run, layers)
    doubles, singles = _kept_whole(body, interval)
    units = 1.0 + len(body.blocks) - doubles - singles + doubles * double + singles * single
    if layers.last:
        units += 1 - run.text_share
    # Each LoRA keeps its `down` result, and copies of its weights in the dtype in which it computes.
    share = run.text_share
    rows = run.tokens * (layers.image * (1 - share) + layers.text * share + layers.joint)
    adapter = rank * size * (rows + (layers.features if size < 4 else 0)) * (doubles + singles) / len(body.blocks)
    return round(units * unit + adapter) + run.rotation(body)


def _kept_whole(body: Transformer, interval: int) -> tuple[int, int]:
    """Double and single blocks that are not computed again; see `ChromaTransformer.recomputes`."""
    whole = [interval == 0 or index % interval != 0 for index in range(len(body.blocks))]
    return sum(whole[: len(body.doubles)]), sum(whole[len(body.doubles) :])


def training_bytes(body: Transformer, run: Pass, layers: LoraLayers, rank: int, interval: int) -> int:
    """Peak of a training step's forward and backward pass, weights, LoRA, gradients and optimizer apart; interval as
    `kept_bytes` has it."""
    unit, size = run.unit(body), run.chosen.dtype.itemsize
    mlp = "single" in layers.mlp_out
    plain, with_mlp = (_RECOMPUTE, _RECOMPUTE_MLP) if interval else (_BACKWARD, _BACKWARD_MLP)
    peak = (with_mlp if mlp else plain)[size]
    extra = product_bytes(body, run)
    on_top = round(max(peak * unit, (peak - _LINEAR_SHARE) * unit + extra))
    return kept_bytes(body, run, layers, rank, interval) + on_top


def score_bytes(body: Transformer, run: Pass, interval: int) -> int:
    """What attention without its fused kernel adds to a training step: each block keeps its weights (the softmax of the
    scores, fp32), and while one works there are three more of that size."""
    scores = 4 * run.batch * (body.width // body.head_dim) * (run.image_tokens + run.text_tokens) ** 2
    return scores * (3 + max(1, sum(_kept_whole(body, interval))))


def _kept_blocks(run: Pass, layers: LoraLayers) -> tuple[float, float]:
    """Units that a double and a single block keep: a trained layer also keeps its input (an MLP's second, 4 wide)."""
    size, share = run.chosen.dtype.itemsize, run.text_share
    shares = {"double image": 1 - share, "double text": share, "single": 1.0}

    def kept(kinds: tuple[str, ...]) -> float:
        return sum(
            shares[kind] * ((kind in layers.attention) + (kind in layers.mlp_in) + 4 * (kind in layers.mlp_out))
            for kind in kinds
        )

    double = _KEPT_DOUBLE[size] + kept(("double image", "double text"))
    # A single block's last layer reads attention and MLP side by side: 5 wide.
    single = _KEPT_SINGLE[size] + kept(("single",)) + ("single" in layers.mlp_out)
    if run.on_gpu and size == 2:
        double, single = double - _FUSED_NORM, single - _FUSED_NORM
    if run.chosen.dtype == torch.float16:  # fp16 is clipped after every block, which keeps what was clipped
        double, single = double + share, single + 1
    return double, single


def text_encoder_bytes(body: TextEncoder, chosen: Precision, tokens: int = T5_TOKENS, on_gpu: bool = False) -> int:
    """Peak of T5 on a prompt (by default the longest): scores, their softmax (attention is not fused), and states."""
    scores, state, size = body.heads * tokens**2, tokens * body.width, chosen.dtype.itemsize
    attention = (2 * scores + 7.25 * state) * size
    # The position bias stays alive while the linears work.
    linear = (scores + 11.5 * state) * size + dequantised(body.whole.largest_linear, chosen, on_gpu)
    return round(max(attention, linear))


def vae_decode_bytes(body: Vae, size: int) -> int:
    """Peak of decoding one image in fp32: at full size, two feature maps of the last stage but one and one of the
    last (640 values a pixel for Flux's VAE)."""
    return round(4 * (2 * body.channels[1] + body.channels[0] + 0.25) * size * size)


def vae_encode_bytes(body: Vae, size: int) -> int:
    """Peak of encoding one image in fp32: three feature maps of the first stage, at full size, and the image."""
    return 4 * (3 * body.channels[0] + 3) * size * size
