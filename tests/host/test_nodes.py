"""The nodes in the real host: what they paint, and that host and core agree on it."""

from __future__ import annotations

import asyncio
import struct
from types import ModuleType

import aiohttp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from _host import Host
from chroma_core.loading.component_cache import ComponentCache
from chroma_core.loading.load import load_vae
from chroma_core.loading.spec import ModelHandle, ModelSpec
from chroma_core.model.images import decode, to_tensor
from chroma_core.model.latents import LatentFormat
from chroma_core.sampling.recipe import recipe
from chroma_core.sampling.sampler import SamplingSettings, sample
from chroma_core.sampling.schedule import sampling_sigmas
from prompts import finish, interrupted, node, text_to_image

TINY = ModelSpec("tiny", precision="fp32", text_precision="fp32")
PREVIEW_EVENTS = (1, 4)  # the host's binary messages that carry a preview image


def pixels(server: Host, prompt: dict) -> list[np.ndarray]:
    return [np.asarray(image) for image in server.images(server.run(prompt))]


def test_every_node_explains_itself(server: Host):
    nodes = {name: info for name, info in server.get("/object_info").items() if info["category"].startswith("Chroma/")}
    assert len(nodes) >= 11
    for name, info in nodes.items():
        assert info["display_name"].startswith("Chroma "), name
        assert info["description"], name
        inputs = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
        assert all(options.get("tooltip") for _, options in inputs.values()), name


def test_the_node_paints_what_the_core_paints(server: Host):
    """Node, preview and command line share one sampler: the host's PNG is the core's image."""
    text = "a green circle on a yellow background"
    (seen,) = pixels(server, text_to_image(text, seed=7, steps=6, tail_bias=0.4))
    cache = ComponentCache()
    encoder = cache.text_encoder(TINY, "cpu")
    with cache.transformer(ModelHandle(TINY), "cpu") as transformer:
        settings = SamplingSettings(steps=6, guidance=3.0, seed=7, tail_bias=0.4)
        prompts = [encoder.encode(text)], encoder.encode("")
        latents = sample(transformer, *prompts, width=64, height=64, settings=settings)
    (expected,) = decode(cache.vae(TINY, "cpu"), latents)
    assert np.abs(seen.astype(int) - np.asarray(expected).astype(int)).max() <= 1  # the two round to 8 bits differently


def test_same_prompt_same_bits_and_no_negative_is_the_empty_one(server: Host):
    prompt = text_to_image(seed=3)
    (first,) = pixels(server, prompt)
    server.forget_cached_outputs()
    (again,) = pixels(server, prompt)
    assert np.array_equal(first, again)
    del prompt["sample"]["inputs"]["negative"]
    (unlinked,) = pixels(server, prompt)
    assert np.array_equal(first, unlinked)


def test_row_i_of_a_batch_is_the_image_of_seed_plus_i(server: Host):
    batch = pixels(server, text_to_image(seed=5, batch=2))
    (second,) = pixels(server, text_to_image(seed=6))
    assert np.abs(batch[1].astype(int) - second.astype(int)).max() <= 1


@pytest.mark.parametrize("recipe", ["comfyui", "ai-toolkit", "diffusers"])
def test_recipes_differ(server: Host, recipe: str):
    (canonical,) = pixels(server, text_to_image(seed=2))
    (other,) = pixels(server, text_to_image(seed=2, recipe=recipe))
    assert np.array_equal(canonical, other) == (recipe == "diffusers")  # in fp32 its roundings do nothing


def test_each_step_shows_progress_and_a_preview(server: Host):
    async def watch() -> tuple[list[int], int]:
        url = f"{server.url}/ws?clientId={server.client_id}"
        steps, previews = [], 0
        async with aiohttp.ClientSession() as session, session.ws_connect(url, max_msg_size=0) as socket:
            prompt_id = await asyncio.to_thread(server.post_prompt, text_to_image(seed=11, steps=5))
            while True:
                message = await socket.receive(timeout=120)
                if message.type == aiohttp.WSMsgType.BINARY:
                    previews += struct.unpack(">I", message.data[:4])[0] in PREVIEW_EVENTS
                    continue
                event = message.json()
                data = event["data"]
                if event["type"] == "progress" and data["node"] == "sample":
                    steps.append(data["value"])
                if event["type"] == "executing" and data["node"] is None and data["prompt_id"] == prompt_id:
                    return steps, previews

    steps, previews = finish(watch())
    assert steps == [1, 2, 3, 4, 5] and previews == 5


def test_interrupting_ends_the_prompt_and_nothing_else(server: Host):
    prompt_id = server.post_prompt(text_to_image(seed=12, steps=150, size=256))
    assert interrupted(server, prompt_id)
    assert len(pixels(server, text_to_image(seed=3))) == 1


def test_the_mask_keeps_what_it_covers(server: Host):
    """With a noise mask over the right half only, the left half of the latents stays as it was, to rounding."""
    prompt = text_to_image(seed=4)
    prompt["first"] = {**prompt["sample"], "inputs": dict(prompt["sample"]["inputs"])}
    prompt["left"] = node("SolidMask", value=0.0, width=32, height=64)
    prompt["all"] = node("SolidMask", value=1.0, width=64, height=64)
    prompt["mask"] = node("MaskComposite", destination=["all", 0], source=["left", 0], x=0, y=0, operation="multiply")
    prompt["masked"] = node("SetLatentNoiseMask", samples=["first", 0], mask=["mask", 0])
    prompt["sample"]["inputs"].update(latent=["masked", 0], seed=99)
    for name, source in (("before", "first"), ("after", "sample")):
        prompt[name] = node("SaveLatent", samples=[source, 0], filename_prefix=f"mask/{name}")
    server.run(prompt)
    saved = {
        n: load_file(max((server.base / "output" / "mask").glob(f"{n}_*")))["latent_tensor"]
        for n in ("before", "after")
    }
    left, right = (saved["after"] - saved["before"]).abs().chunk(2, dim=-1)
    assert left.max() < 1e-5 < 0.1 < right.max()


def test_odd_sizes_are_floored(server: Host):
    prompt = text_to_image(seed=1)
    prompt["latent"] = node("EmptyLatentImage", width=88, height=72, batch_size=1)
    (image,) = pixels(server, prompt)
    assert image.shape == (64, 64, 3)


def test_the_hosts_conditioning_nodes_are_honoured_or_refused(server: Host):
    prompt = text_to_image(seed=1)
    prompt["zero"] = node("ConditioningZeroOut", conditioning=["positive", 0])
    prompt["sample"]["inputs"]["positive"] = ["zero", 0]
    assert len(pixels(server, prompt)) == 1
    prompt["zero"] = node("ConditioningCombine", conditioning_1=["positive", 0], conditioning_2=["negative", 0])
    message = server.wait(server.post_prompt(prompt), check=False)["status"]["messages"][-1][1]["exception_message"]
    assert "combination of 2 prompts" in message


def test_tail_sigmas_are_the_samplers_schedule(server: Host):
    """The numbers by themselves; test_workflows compares an image that the host's own sampler makes with them."""
    prompt = {
        "sigmas": node("ChromaTailSigmas", steps=4, tail_bias=0.5, flow_shift="dynamic", flow_shift_value=1.0,
                       width=512, height=512, denoise=1.0),
        "show": node("PreviewAny", source=["sigmas", 0]),
    }  # fmt: skip
    text = server.run(prompt)["outputs"]["show"]["text"][0]
    numbers = [float(n) for n in text.partition("[")[2].partition("]")[0].split(",")]
    expected = sampling_sigmas(4, 1024, tail_bias=0.5)
    assert np.allclose(numbers, expected, atol=1e-4)


def test_the_vae_is_the_hosts_own_and_decodes_as_diffusers_does(comfy: ModuleType, pack_host: ModuleType):
    """As the core's does, which has diffusers' bits (tests/core/model/test_encoders.py)."""
    import comfy.sd

    ours, reference = pack_host.host_vae(TINY), load_vae(TINY, "cpu")
    assert type(ours) is comfy.sd.VAE
    generator = torch.Generator().manual_seed(0)
    z = LatentFormat.of(reference).to_vae(torch.randn(2, 16, 8, 12, generator=generator))
    with torch.no_grad():
        pixels_BHWC = ours.decode(z)
        expected = (reference.decode(z).permute(0, 2, 3, 1) / 2 + 0.5).clamp(0, 1)
    assert pixels_BHWC.shape == (2, 64, 96, 3)
    assert (pixels_BHWC - expected).abs().max() <= 1e-3


def test_the_vae_encodes_as_diffusers_does(pack_host: ModuleType):
    from PIL import Image

    ours, reference = pack_host.host_vae(TINY), load_vae(TINY, "cpu")
    pixels_B3HW = to_tensor(Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)))
    with torch.no_grad():
        z = ours.encode((pixels_B3HW.permute(0, 2, 3, 1) + 1) / 2)
        expected = reference.encode(pixels_B3HW).mean
    assert (z - expected).abs().max() <= 1e-3


def latent_of(server: Host, prompt: dict, name: str) -> torch.Tensor:
    """The latents of the prompt's sampler, through the host's own Save Latent."""
    prompt = {k: v for k, v in prompt.items() if k not in ("decode", "save")}
    prompt["keep"] = node("SaveLatent", samples=["sample", 0], filename_prefix=f"parts/{name}")
    server.run(prompt)
    return load_file(max((server.base / "output" / "parts").glob(f"{name}_*")))["latent_tensor"]


def test_two_parts_are_the_whole_run(server: Host):
    whole = latent_of(server, text_to_image(seed=8, steps=6), "whole")
    prompt = text_to_image(seed=8, steps=6, start_step=4, add_noise=False)
    prompt["first"] = {**prompt["sample"], "inputs": dict(prompt["sample"]["inputs"])}
    prompt["first"]["inputs"].update(start_step=0, end_step=4, add_noise=True)
    prompt["sample"]["inputs"]["latent"] = ["first", 0]
    parts = latent_of(server, prompt, "parts")
    assert (parts - whole).abs().max() <= 1e-4


def test_methods_spacing_and_overrides_reach_the_sampler(server: Host):
    options = {"seed": 8, "steps": 5, "method": "dpmpp_2m", "spacing": "beta", "first_block_cache": 0.3}
    seen = latent_of(server, text_to_image("a red star", **options, recipe_overrides="visible_padding=0"), "options")
    rules, cache = recipe("canonical", {"visible_padding": 0}), ComponentCache()
    encoder = cache.text_encoder(TINY, "cpu")
    with cache.transformer(ModelHandle(TINY), "cpu") as transformer:
        settings = SamplingSettings(5, 3.0, 8, method="dpmpp_2m", spacing="beta", first_block_cache=0.3)
        prompts = [encoder.encode("a red star", rules)], encoder.encode("", rules)
        x = sample(transformer, *prompts, width=64, height=64, settings=settings, recipe=rules)
    assert torch.equal(seen, LatentFormat().to_vae(x))
    failed = server.wait(server.post_prompt(text_to_image(recipe_overrides="noise=bf16")), check=False)
    assert "no field 'noise'" in failed["status"]["messages"][-1][1]["exception_message"]
