"""Our models as ComfyUI's own classes: VAE and MODEL."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import comfy.ldm.modules.diffusionmodules.model as ldm
import comfy.model_base
import comfy.model_management as management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import torch
from comfy.patcher_extension import WrappersMP

from ...chroma_core.errors import LoraError, ModelFileError
from ...chroma_core.loading.load import load_vae
from ...chroma_core.loading.spec import ModelSpec
from ...chroma_core.model.vae import Autoencoder
from .memory import device


def host_vae(spec: ModelSpec) -> comfy.sd.VAE:
    """The model's VAE as ComfyUI's own class, so that its VAE Encode, Decode and tiled nodes work on it.

    ComfyUI's detection knows the published widths only; any other configuration is spelled out for it.
    """
    source = load_vae(spec, "cpu")
    config: Any = source.config
    state = dict(source.state_dict())
    widths, groups = config.block_out_channels, config.norm_num_groups
    if len(widths) != 4 or any(width % widths[0] for width in widths) or not config.mid_block_add_attention:
        raise ModelFileError(
            f"The VAE has the block widths {list(widths)}; ComfyUI's VAE class takes four, each a multiple of the "
            "first, and attention in the middle block."
        )
    if (widths[0], config.layers_per_block, groups) == (128, 2, 32):
        return _computed_by(source, comfy.sd.VAE(sd=state))
    channels = config.latent_channels
    for name, size in (("quant_conv", 2 * channels), ("post_quant_conv", channels)):
        state.setdefault(f"{name}.weight", torch.eye(size)[:, :, None, None])
        state.setdefault(f"{name}.bias", torch.zeros(size))
    ddconfig = {
        "double_z": True, "z_channels": channels, "resolution": 256, "in_channels": 3, "out_ch": 3, "dropout": 0.0,
        "ch": widths[0], "ch_mult": [width // widths[0] for width in widths],
        "num_res_blocks": config.layers_per_block, "attn_resolutions": [],
    }  # fmt: skip
    with _group_norms(groups):
        vae = comfy.sd.VAE(sd=state, config={"params": {"ddconfig": ddconfig, "embed_dim": channels}})
    vae.latent_channels = channels
    return _computed_by(source, vae)


class _Network(torch.nn.Module):
    """The VAE's network in the shape in which ComfyUI calls one."""

    def __init__(self, source: Autoencoder):
        super().__init__()
        self.source = source

    def state_dict(self, *args: Any, **options: Any) -> Any:
        """Under diffusers' names, which ComfyUI reads too: a file that its Save VAE writes can be loaded."""
        return self.source.state_dict(*args, **options)

    def encode(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        return self.source.encode(pixels_BCHW).mean

    def decode(self, z_BCHW: torch.Tensor) -> torch.Tensor:
        return self.source.decode(z_BCHW)


def _computed_by(source: Autoencoder, vae: Any) -> comfy.sd.VAE:
    """ComfyUI's VAE with previews' and the command line's own network in it, so that an image has the same bits.

    ComfyUI's network differs from it in the last bits (2e-7), enough to move an 8-bit value now and then.
    """
    network = _Network(source).to(vae.vae_dtype).eval()
    vae.patcher = type(vae.patcher)(network, load_device=vae.device, offload_device=vae.patcher.offload_device)
    vae.first_stage_model = network
    return vae


@contextmanager
def _group_norms(groups: int) -> Iterator[None]:
    """Build ComfyUI's VAE modules with `groups` groups a norm, which their constructors take no argument for."""
    stock = ldm.ops

    class Operations(stock):
        class GroupNorm(stock.GroupNorm):
            def __init__(self, num_groups: int, num_channels: int, **options: Any):
                super().__init__(groups, num_channels, **options)

    ldm.ops = Operations
    try:
        yield
    finally:
        ldm.ops = stock


class _ChromaPatcher(comfy.model_patcher.ModelPatcher):
    """A patcher over a network that holds no weights: what ComfyUI would silently not patch is an error."""

    def add_patches(self, *_: Any, **__: Any) -> Any:
        raise LoraError(
            "ComfyUI's LoRA loader cannot reach the weights of a model that came through Chroma Host Model. Put "
            "Chroma Apply LoRA before Chroma Host Model instead."
        )


def as_host_model(module: torch.nn.Module, opened: Callable[[], AbstractContextManager]) -> Any:
    """A MODEL whose forward pass is `module`, kept open by `opened()` for the whole of a sampling run.

    Latents, schedules and conditioning are ComfyUI's own Chroma's; building its network is switched off, because that
    one has published sizes only.
    """
    config = comfy.supported_models.Chroma(
        {"image_model": "chroma", "disable_unet_model_creation": True, "in_channels": 16, "out_channels": 16}
    )
    model: Any = comfy.model_base.Chroma(config, device=torch.device("cpu"))
    model.diffusion_model = module

    def sample_opened(executor: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        with opened():
            return executor(*arguments, **named)

    patcher = _ChromaPatcher(model, device(), management.unet_offload_device())
    patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "chromakit", sample_opened)
    return patcher
