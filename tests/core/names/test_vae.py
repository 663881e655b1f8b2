"""The VAE's two layouts, against diffusers' own converter of ldm checkpoints and ComfyUI's own ldm modules."""

import json

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

import foreign_shapes
import forked
import miniature
from chroma_core.loading.matching import describe_part
from chroma_core.names import encoders as vae_keys

LDM_NAMES = """
import json, sys
import native_lora_check
native_lora_check.import_host()
import torch
from comfy.ldm.modules.diffusionmodules.model import Decoder, Encoder
common = dict(ch=128, out_ch=3, ch_mult=[1, 2, 4, 4], num_res_blocks=2, attn_resolutions=[], in_channels=3,
              resolution=256, z_channels=16)
with torch.device("meta"):
    parts = {"encoder": Encoder(double_z=True, **common), "decoder": Decoder(**common)}
print(json.dumps({f"{part}.{k}": list(v.shape) for part, m in parts.items() for k, v in m.state_dict().items()}))
"""


def test_names_and_shapes_are_those_of_the_hosts_own_modules():
    done = forked.run(forked.NATIVE, "-c", LDM_NAMES)
    assert done.returncode == 0, done.stderr
    native = {name: tuple(shape) for name, shape in json.loads(done.stdout.splitlines()[-1]).items()}
    assert native == foreign_shapes.vae_ldm()


@pytest.mark.parametrize("quant_conv", [False, True])
def test_every_name_goes_there_and_back(quant_conv):
    names = list(foreign_shapes.shapes_of(foreign_shapes.vae(quant_conv=quant_conv)))
    assert len(names) == (248 if quant_conv else 244)
    original = [vae_keys.to_ldm_key(name, 4) for name in names]
    assert len(set(original)) == len(names) and None not in original
    assert [vae_keys.to_diffusers_key(key or "", 4) for key in original] == names
    assert vae_keys.count_levels(names) == vae_keys.count_levels(key or "" for key in original) == 4


def test_the_decoder_counts_backwards():
    key = "decoder.up_blocks.0.resnets.1.conv_shortcut.weight"
    assert vae_keys.to_ldm_key(key, 4) == "decoder.up.3.block.1.nin_shortcut.weight"
    assert vae_keys.to_ldm_key("decoder.up_blocks.2.upsamplers.0.conv.bias", 4) == "decoder.up.1.upsample.conv.bias"
    assert vae_keys.to_diffusers_key("encoder.mid.attn_1.proj_out.bias", 4) == (
        "encoder.mid_block.attentions.0.to_out.0.bias"
    )


@pytest.mark.parametrize(
    "name",
    [
        "",
        "decoder",
        "decoder.up.4.block.0.conv1.weight",
        "decoder.up.0.block.x.conv1.weight",
        "encoder.mid.attn_2.q.weight",
    ],
)
def test_unknown_names_are_none(name):
    assert vae_keys.to_diffusers_key(name, 4) is None
    assert vae_keys.to_ldm_key(name, 4) is None


@pytest.mark.parametrize("size", ["miniature", "real"])
def test_converting_equals_diffusers_own_converter(size):
    """Every weight lands where diffusers puts it, number for number: random numbers in the shapes of an ldm file."""
    if size == "real":
        shapes = foreign_shapes.vae_ldm()
        config = foreign_shapes.vae().config  # type: ignore[union-attr]
    else:
        config = vars(miniature.vae().config)
        shapes = foreign_shapes.vae_ldm(block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4)
    generator = torch.Generator().manual_seed(0)
    file = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    reference = convert_ldm_vae_checkpoint(dict(file), config)
    component = describe_part(foreign_shapes.weights_file(shapes), "vae")
    assert component.sources.keys() == reference.keys()
    for name, source in component.sources.items():
        assert source.rows is None
        assert torch.equal(file[source.name].reshape(source.shape), reference[name]), name
