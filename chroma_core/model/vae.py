"""The VAE: images to latents and back.

Modules and weights are named as in diffusers' `AutoencoderKL`. Shapes: B batch, C channels, H and W height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import configuration
from .device import check_finite


@dataclass(frozen=True)
class Posterior:
    """What an image may be as latents: a Gaussian [B, C, H, W] with independent entries. std: standard deviation."""

    mean: Tensor
    std: Tensor


class Residual(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, groups: int):
        super().__init__()
        self.norm1, self.conv1 = _norm(inputs, groups), _conv(inputs, outputs)
        self.norm2, self.conv2 = _norm(outputs, groups), _conv(outputs, outputs)
        self.conv_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        # No name for what is between: at full size each one is a gigabyte that would stay.
        y = self.conv2(_silu(self.norm2(self.conv1(_silu(self.norm1(x))))))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + y


class PixelAttention(nn.Module):
    """Attention with one head among all places of an image."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = _norm(channels, groups)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x_BCHW: Tensor) -> Tensor:
        places = self.group_norm(x_BCHW.flatten(2)).transpose(1, 2)
        query, key, value = (layer(places)[:, None] for layer in (self.to_q, self.to_k, self.to_v))
        y = self.to_out[0](F.scaled_dot_product_attention(query, key, value)[:, 0])
        return y.transpose(1, 2).reshape(x_BCHW.shape) + x_BCHW


class Middle(nn.Module):
    """The level of the smallest resolution."""

    def __init__(self, channels: int, groups: int, attention: bool):
        super().__init__()
        self.attentions = nn.ModuleList([PixelAttention(channels, groups)] if attention else [])
        self.resnets = nn.ModuleList(Residual(channels, channels, groups) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class Halve(nn.Module):
    """Every second place; the image is padded to the right and below."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Double(nn.Module):
    """Every place four times, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = _conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The residual blocks of a resolution, and the way to the next one under the name that files have it by."""

    def __init__(self, inputs: int, outputs: int, layers: int, groups: int, **resampler: nn.Module):
        super().__init__()
        self.resnets = nn.ModuleList(Residual(outputs if i else inputs, outputs, groups) for i in range(layers))
        for name, module in resampler.items():
            self.add_module(name, nn.ModuleList([module]))


def levels(
    widths: Sequence[int], layers: int, groups: int, name: str, way: Callable[[int], nn.Module]
) -> nn.ModuleList:
    """A level for each width; all but the last lead to the next one by `way`, called `name`."""
    found = nn.ModuleList()
    for i, width in enumerate(widths):
        onward = {name: way(width)} if i < len(widths) - 1 else {}
        found.append(Level(widths[max(0, i - 1)], width, layers, groups, **onward))
    return found


def blocks(levels: nn.ModuleList) -> Iterator[nn.Module]:
    """In the order in which they run. They are called one by one, so that nobody keeps what a level began with."""
    for level in levels:
        for part in level.children():
            yield from part.children()


class Encoder(nn.Module):
    """Images to the posterior's mean and log variance, one above the other."""

    def __init__(self, inputs: int, latents: int, widths: Sequence[int], layers: int, groups: int, attention: bool):
        super().__init__()
        self.conv_in = _conv(inputs, widths[0])
        self.down_blocks = levels(widths, layers, groups, "downsamplers", Halve)
        self.mid_block = Middle(widths[-1], groups, attention)
        self.conv_norm_out, self.conv_out = _norm(widths[-1], groups), _conv(widths[-1], 2 * latents)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in blocks(self.down_blocks):
            x = block(x)
        return self.conv_out(_silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """Latents to images."""

    def __init__(self, latents: int, outputs: int, widths: Sequence[int], layers: int, groups: int, attention: bool):
        super().__init__()
        widths = list(reversed(widths))
        self.conv_in = _conv(latents, widths[0])
        self.up_blocks = levels(widths, layers, groups, "upsamplers", Double)
        self.mid_block = Middle(widths[0], groups, attention)
        self.conv_norm_out, self.conv_out = _norm(widths[-1], groups), _conv(widths[-1], outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for block in blocks(self.up_blocks):
            x = block(x)
        return self.conv_out(_silu(self.conv_norm_out(x)))


class Autoencoder(nn.Module):
    """The arguments are those of diffusers' `AutoencoderKL`, with its defaults.

    Raises ValueError for kinds of blocks and activations that no VAE of a Flux or Stable Diffusion model has.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: Sequence[str] = ("DownEncoderBlock2D",),
        up_block_types: Sequence[str] = ("UpDecoderBlock2D",),
        block_out_channels: Sequence[int] = (64,),
        layers_per_block: int = 1,
        act_fn: str = "silu",
        latent_channels: int = 4,
        norm_num_groups: int = 32,
        sample_size: int = 32,
        scaling_factor: float = 0.18215,
        shift_factor: float | None = None,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
        force_upcast: bool = True,
        use_quant_conv: bool = True,
        use_post_quant_conv: bool = True,
        mid_block_add_attention: bool = True,
    ):
        config = configuration(locals())
        super().__init__()
        count = len(block_out_channels)
        for name, value, right in (
            ("down_block_types", list(down_block_types), ["DownEncoderBlock2D"] * count),
            ("up_block_types", list(up_block_types), ["UpDecoderBlock2D"] * count),
            ("act_fn", act_fn, "silu"),
            ("latents_mean", latents_mean, None),
            ("latents_std", latents_std, None),
        ):
            if value != right:
                raise ValueError(f"{name} is {value}; only {right} is known here")
        self.config: Any = config
        widths, groups, attention = block_out_channels, norm_num_groups, mid_block_add_attention
        self.encoder = Encoder(in_channels, latent_channels, widths, layers_per_block, groups, attention)
        self.decoder = Decoder(latent_channels, out_channels, widths, layers_per_block + 1, groups, attention)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1) if use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1) if use_post_quant_conv else None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.decoder.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """In what the weights are, and images and latents are to be."""
        return self.decoder.conv_in.weight.dtype

    def encode(self, pixels_B3HW: Tensor) -> Posterior:
        """Images in −1..1 to latents in the VAE's own space. Raises NotFiniteError."""
        moments = self.encoder(pixels_B3HW)
        mean, log_variance = (moments if self.quant_conv is None else self.quant_conv(moments)).chunk(2, dim=1)
        check_finite(mean, "What the VAE makes of the image", self._remedy())
        return Posterior(mean, (0.5 * log_variance.clamp(-30.0, 20.0)).exp())

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Latents in the VAE's own space to images [B, 3, H, W] of about −1..1. Raises NotFiniteError."""
        check_finite(latents_BCHW, "What is to be decoded", "Look at what made these latents, and at its LoRAs.")
        pixels = self.decoder(latents_BCHW if self.post_quant_conv is None else self.post_quant_conv(latents_BCHW))
        return check_finite(pixels, "The image that the VAE decodes", self._remedy())

    def _remedy(self) -> str:
        return f"It computes in {str(self.dtype)[6:]}, and fp16 overflows: use fp32. If it does, its file is damaged."


def _silu(x: Tensor) -> Tensor:
    """In the place of x where nobody needs that any more: a third less memory at full size."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


def _norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)
