"""Preview = nodes = this process, to the last bit, through the real host: every recipe, precision and LoRA mode."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from _host import Host
from chroma_core.loading.component_cache import ComponentCache
from chroma_core.loading.spec import ModelSpec
from chroma_core.parity import Case, Sampled, compare, in_process, read_preview, train_briefly
from chroma_core.parity.runtimes import through_comfyui
from chroma_core.sampling.recipe import CANONICAL, RECIPES, recipe
from chroma_core.sampling.sampler import SamplingSettings

SPEC = ModelSpec("tiny", precision="fp32", text_precision="fp32")
SETTINGS = SamplingSettings(steps=5, guidance=3.0, seed=11)


@pytest.fixture(scope="module")
def components() -> ComponentCache:
    return ComponentCache()


@pytest.fixture(scope="module")
def preview(tmp_path_factory) -> tuple[Case, Sampled]:
    """A preview of the real trainer, and the case that it shows."""
    folder = tmp_path_factory.mktemp("parity")
    prompt = "a photo of a sks emblem"
    return read_preview(train_briefly(SPEC, prompt, "blue", (64, 64), SETTINGS, CANONICAL, folder, "cpu", steps=3))


def test_the_nodes_paint_what_the_preview_showed(server: Host, preview):
    case, shown = preview
    painted = through_comfyui(case, server)
    assert torch.equal(painted.latents, shown.latents)
    assert painted.image.tobytes() == shown.image.tobytes()


def test_changed_fields_of_a_recipe_and_other_methods(server: Host, preview, components):
    changed = replace(preview[0], recipe=recipe("comfyui").override({"noise_dtype": "bf16", "flow_shift": 3.0}))
    changed = replace(changed, settings=replace(SETTINGS, method="dpmpp_2m", spacing="beta"))
    assert torch.equal(through_comfyui(changed, server).latents, in_process(changed, components, "cpu").latents)


@pytest.mark.parametrize("name", list(RECIPES))
@pytest.mark.parametrize("mode", ["live", "merged"])
def test_every_recipe_and_lora_mode(server: Host, preview, components, name, mode):
    case = replace(preview[0].with_loras(mode=mode, strength=0.7), recipe=recipe(name))
    assert torch.equal(through_comfyui(case, server).latents, in_process(case, components, "cpu").latents)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "int8", "fp8", "int4", "nf4"])
def test_every_precision(server: Host, preview, components, precision):
    spec = replace(SPEC, precision=precision, text_precision=precision)
    case = replace(preview[0], spec=spec)
    painted = through_comfyui(case, server)
    assert torch.equal(painted.latents, in_process(case, components, "cpu").latents)
    assert compare("quantised", painted, preview[1]).mean_abs_diff > 0
