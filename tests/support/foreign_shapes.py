"""Names and shapes of models that are not Chroma, as their own libraries build them on the meta device, or (where no
installed library has the layout) as their released files name them. Few blocks each: the names repeat.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from chroma_core.model.transformer import ChromaTransformer
from chroma_core.names import encoders as vae_keys
from chroma_core.names import transformer as keys

Shapes = dict[str, tuple[int, ...]]


def shapes_of(model: nn.Module | dict[str, torch.Tensor], prefix: str = "") -> Shapes:
    state = model.state_dict() if isinstance(model, nn.Module) else model
    return {prefix + name: tuple(tensor.shape) for name, tensor in state.items()}


def prefixed(shapes: Shapes, prefix: str) -> Shapes:
    return {prefix + name: shape for name, shape in shapes.items()}


def weights_file(shapes: Shapes, name: str = "x.safetensors", metadata: dict[str, str] | None = None) -> Any:
    """What `describe_part` asks of an opened file."""
    return SimpleNamespace(path=name, shapes=shapes, metadata=metadata or {})


def meta(build: Any, *args: Any, **config: Any) -> nn.Module:
    with torch.device("meta"):
        return build(*args, **config)


def chroma(layers: int = 19, single_layers: int = 38, norm_leaf: str = "scale") -> Shapes:
    """Chroma 1 in the original layout; with fewer blocks if asked."""
    model = meta(ChromaTransformer, num_layers=layers, num_single_layers=single_layers)
    return shapes_of(keys.to_original(model.state_dict(), norm_leaf))


def chroma_diffusers(layers: int = 1, single_layers: int = 1) -> Shapes:
    return shapes_of(meta(ChromaTransformer, num_layers=layers, num_single_layers=single_layers))


def radiance() -> Shapes:
    """Chroma Radiance: Chroma's blocks between a patch convolution and a NeRF head (16 pixel patches)."""
    shapes = {k: v for k, v in chroma(1, 1).items() if not k.startswith(("img_in.", "final_layer."))}
    shapes |= {"img_in_patch.weight": (3072, 3, 16, 16), "img_in_patch.bias": (3072,)}
    shapes |= {"nerf_image_embedder.embedder.0.weight": (64, 67), "nerf_blocks.0.norm.scale": (64,)}
    return shapes | {"nerf_final_layer_conv.norm.scale": (64,), "nerf_final_layer_conv.conv.weight": (3, 64, 3, 3)}


def flux(guidance: bool = True) -> Shapes:
    """Flux.1 dev (with an embedding of guidance) or schnell (without), one block of each kind."""
    shapes = {k: v for k, v in chroma(1, 1).items() if not k.startswith("distilled_guidance_layer.")}
    width = 3072
    layers = {f"double_blocks.0.{side}_mod.lin": (6 * width, width) for side in ("img", "txt")}
    layers |= {
        "single_blocks.0.modulation.lin": (3 * width, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
    }
    for embedder, inputs in {"time_in": 256, "vector_in": 768, **({"guidance_in": 256} if guidance else {})}.items():
        layers |= {f"{embedder}.in_layer": (width, inputs), f"{embedder}.out_layer": (width, width)}
    for name, shape in layers.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def flux_diffusers(guidance: bool = True) -> Shapes:
    return shapes_of(
        meta(diffusers.FluxTransformer2DModel, num_layers=1, num_single_layers=1, guidance_embeds=guidance)
    )


def flux2_diffusers() -> Shapes:
    return shapes_of(meta(diffusers.Flux2Transformer2DModel, num_layers=1, num_single_layers=1))


def vae(latent_channels: int = 16, quant_conv: bool = False, **config: Any) -> nn.Module:
    """Flux's VAE, or with other latents Stable Diffusion's (4) or Flux 2's (32)."""
    config = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, **config}
    levels = len(config["block_out_channels"])
    return meta(
        diffusers.AutoencoderKL,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=latent_channels,
        use_quant_conv=quant_conv,
        use_post_quant_conv=quant_conv,
        **config,
    )


def vae_ldm(latent_channels: int = 16, quant_conv: bool = False, **config: Any) -> Shapes:
    """The same in the layout of `ae.safetensors`, attention as 1×1 convolutions."""
    model = vae(latent_channels, quant_conv, **config)
    shapes: Shapes = {}
    for name, shape in shapes_of(model).items():
        key = vae_keys.to_ldm_key(name, len(model.config.block_out_channels))  # type: ignore[union-attr]
        assert key is not None
        shapes[key] = (*shape, 1, 1) if ".attn_1." in key and len(shape) == 2 else shape
    return shapes


def clip_l(prefix: str = "") -> Shapes:
    config = transformers.CLIPTextConfig(num_hidden_layers=1, hidden_size=768)
    shapes = shapes_of(meta(transformers.CLIPTextModel, config))
    return {prefix + (n if n.startswith("text_model.") else f"text_model.{n}"): s for n, s in shapes.items()}


def t5(layers: int = 24, cls: Any = None, **config: Any) -> nn.Module:
    """T5-XXL version 1.1's encoder; other widths and classes if asked."""
    real = {"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_heads": 64}
    values = {**real, "num_layers": layers, "feed_forward_proj": "gated-gelu", **config}
    return meta(cls or transformers.T5EncoderModel, transformers.T5Config(**values))


def umt5() -> Shapes:
    config = transformers.UMT5Config(num_layers=2, d_model=512)
    return shapes_of(meta(transformers.UMT5EncoderModel, config))


def language_model() -> Shapes:
    config = transformers.Qwen2Config(
        num_hidden_layers=1, hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=4
    )
    return shapes_of(meta(transformers.Qwen2ForCausalLM, config))


def stable_diffusion() -> Shapes:
    """A checkpoint of SD 1.5: UNet, VAE and CLIP under their usual prefixes."""
    unet: Shapes = {
        "time_embed.0.weight": (1280, 320),
        "input_blocks.0.0.weight": (320, 4, 3, 3),
        "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
        "output_blocks.0.0.in_layers.0.weight": (2560,),
        "out.2.weight": (4, 320, 3, 3),
    }
    return {
        **clip_l("cond_stage_model.transformer."),
        **prefixed(vae_ldm(4, quant_conv=True), "first_stage_model."),
        **prefixed(unet, "model.diffusion_model."),
    }


def stable_diffusion_xl() -> Shapes:
    shapes = {k: v for k, v in stable_diffusion().items() if not k.startswith("cond_stage_model.")}
    return {
        **clip_l("conditioner.embedders.0.transformer."),
        "conditioner.embedders.1.model.text_projection": (1280, 1280),
        **shapes,
        "model.diffusion_model.label_emb.0.0.weight": (1280, 2816),
    }


def stable_diffusion_unet() -> Shapes:
    return shapes_of(meta(diffusers.UNet2DConditionModel, cross_attention_dim=768))


def stable_diffusion_3() -> Shapes:
    """A checkpoint of SD 3 with its VAE (16 channels, as Flux's) and T5-XXL."""
    transformer: Shapes = {
        "pos_embed": (1, 36864, 1536),
        "x_embedder.proj.weight": (1536, 16, 2, 2),
        "context_embedder.weight": (1536, 4096),
        "joint_blocks.0.context_block.attn.qkv.weight": (4608, 1536),
        "joint_blocks.0.x_block.attn.qkv.weight": (4608, 1536),
        "final_layer.linear.weight": (64, 1536),
    }
    return {
        **prefixed(vae_ldm(), "first_stage_model."),
        **prefixed(transformer, "model.diffusion_model."),
        **shapes_of(t5(2), "text_encoders.t5xxl.transformer."),
        **clip_l("text_encoders.clip_l.transformer."),
    }


def stable_diffusion_3_diffusers() -> Shapes:
    return shapes_of(meta(diffusers.SD3Transformer2DModel, num_layers=2))


def flux_checkpoint() -> Shapes:
    """Flux with everything it needs in one file: foreign as a transformer, but T5 and VAE are those of Chroma."""
    return {
        **prefixed(flux(), "model.diffusion_model."),
        **clip_l("text_encoders.clip_l.transformer."),
        **shapes_of(t5(2), "text_encoders.t5xxl.transformer."),
        **prefixed(vae_ldm(), "vae."),
    }


def qwen_image() -> Shapes:
    return shapes_of(meta(diffusers.QwenImageTransformer2DModel, num_layers=1))


def video_vae() -> Shapes:
    return shapes_of(meta(diffusers.AutoencoderKLWan))


def controlnet() -> Shapes:
    return shapes_of(meta(diffusers.FluxControlNetModel, num_layers=1, num_single_layers=1))


def lora_diffusers() -> Shapes:
    module = "transformer.single_transformer_blocks.0.attn.to_q"
    return {f"{module}.lora_A.weight": (16, 3072), f"{module}.lora_B.weight": (3072, 16), f"{module}.alpha": ()}


def lora_original() -> Shapes:
    module = "diffusion_model.double_blocks.0.img_attn.qkv"
    return {f"{module}.lora_A.weight": (16, 3072), f"{module}.lora_B.weight": (9216, 16)}


def lora_kohya() -> Shapes:
    module = "lora_unet_double_blocks_0_img_attn_qkv"
    return {f"{module}.lora_down.weight": (16, 3072), f"{module}.lora_up.weight": (9216, 16), f"{module}.alpha": ()}


def lokr() -> Shapes:
    module = "lycoris_double_blocks_0_img_attn_proj"
    return {f"{module}.lokr_w1": (16, 16), f"{module}.lokr_w2": (192, 192), f"{module}.alpha": ()}
