"""Kernels in Triton's language. Imported only where Triton is, and tried before they are used (see `four_bits`).

Each computes in fp32 what `quantised` computes with PyTorch, operation by operation. A product of a 4-bit and an 11-bit
number is exact in fp32, so it does not matter whether the compiler joins it with the addition that follows.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rounded(value, bf16: tl.constexpr):
    """The bits of the nearest bf16 numbers as int16, ties to even; not for infinity and NaN. Otherwise the value, which
    is rounded as it is stored. (Triton's interpreter cuts bf16 off instead of rounding it.)"""
    if bf16:
        bits = value.to(tl.int32, bitcast=True)
        value = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16)
    return value


@triton.jit
def nf4(weight, codes, scale, levels, pairs, half: tl.constexpr, bf16: tl.constexpr, block: tl.constexpr):
    """weight[i] = levels[code i] · scale[group of i]: two codes to a byte (`pairs` of them), the low one first, and
    `half` bytes to a group."""
    place = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    there = place < pairs
    byte = tl.load(codes + place, mask=there, other=0).to(tl.int32)
    step = tl.load(scale + place // half, mask=there, other=0).to(tl.float32)
    low = tl.load(levels + (byte & 15)) * step
    high = tl.load(levels + ((byte >> 4) & 15)) * step
    tl.store(weight + 2 * place, rounded(low, bf16), mask=there)
    tl.store(weight + 2 * place + 1, rounded(high, bf16), mask=there)


@triton.jit
def int4(weight, codes, scale, minimum, pairs, half: tl.constexpr, bf16: tl.constexpr, block: tl.constexpr):
    """weight[i] = minimum[group of i] + code i · scale[group of i], laid out as in `nf4`."""
    place = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    there = place < pairs
    byte = tl.load(codes + place, mask=there, other=0).to(tl.int32)
    step = tl.load(scale + place // half, mask=there, other=0).to(tl.float32)
    least = tl.load(minimum + place // half, mask=there, other=0).to(tl.float32)
    low = least + (byte & 15).to(tl.float32) * step
    high = least + ((byte >> 4) & 15).to(tl.float32) * step
    tl.store(weight + 2 * place, rounded(low, bf16), mask=there)
    tl.store(weight + 2 * place + 1, rounded(high, bf16), mask=there)
