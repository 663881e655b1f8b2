"""The component cache: one of each kind, turns on the device, parking, and what is in use staying where it is."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from chroma_core.loading.component_cache import HOST_MEMORY_MARGIN, ComponentCache
from chroma_core.loading.spec import ModelHandle, ModelSpec
from chroma_core.model.flavours import flavour
from chroma_core.streaming import module_bytes, streamed
from lora_cases import inputs, predict
from miniature import write_model_folder

PLENTY, NONE_LEFT = (lambda: 1 << 50), (lambda: HOST_MEMORY_MARGIN - 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_model_folder(tmp_path_factory.mktemp("model"))


def spec(folder: Path, **options) -> ModelSpec:
    return ModelSpec("base", str(folder), "fp32", "fp32", **options)


def test_one_of_each_kind_and_room_is_made_first(folder):
    asked = []
    cache = ComponentCache(make_room=asked.append)
    with cache.transformer(ModelHandle(spec(folder)), "cpu") as first:
        pass
    with cache.transformer(ModelHandle(spec(folder)), "cpu") as again:
        assert again is first
    assert len(asked) == 1
    with cache.transformer(ModelHandle(ModelSpec("base", str(folder), "bf16")), "cpu") as other:
        assert other is not first
    assert len(asked) == 2
    assert cache.text_encoder(spec(folder), "cpu") is cache.text_encoder(spec(folder), "cpu")
    cache.clear()
    assert cache.device_bytes() == {}
    with cache.transformer(ModelHandle(spec(folder)), "cpu") as fresh:
        assert fresh is not first


def test_a_part_that_is_chosen_anew_leaves_the_others_loaded(tmp_path):
    components, tiny = ComponentCache(), ModelSpec("tiny", precision="fp32", text_precision="fp32")
    text_encoder, vae = components.text_encoder(tiny, "cpu"), components.vae(tiny, "cpu")
    matrix = components.preview_matrix(tiny, "cpu")
    other = replace(tiny, precision="int8", compute="w8a8", resident_blocks=3)
    assert components.text_encoder(other, "cpu") is text_encoder and components.vae(other, "cpu") is vae
    assert components.preview_matrix(other, "cpu") is matrix
    assert components.text_encoder(replace(other, text_precision="bf16"), "cpu") is not text_encoder
    with components.transformer(ModelHandle(tiny), "cpu") as transformer:
        pass
    (published,) = (flavour("tiny").folder / "vae").glob("*.safetensors")
    darker = load_file(published) | {"decoder.conv_out.bias": torch.full((3,), -1.0)}
    save_file(darker, tmp_path / "darker.safetensors")
    other = replace(tiny, vae=str(tmp_path / "darker.safetensors"), text_precision="int8")
    assert components.vae(other, "cpu") is not vae and components.preview_matrix(other, "cpu") is not matrix
    with components.transformer(ModelHandle(other), "cpu") as again:
        assert again is transformer


def test_room_is_made_before_the_old_model_has_a_successor(folder):
    """Never two transformers: when the next one is loaded, the last one is gone."""
    held = []
    cache = ComponentCache(make_room=lambda needed: held.append(cache.device_bytes()))
    for precision in ("fp32", "bf16"):
        with cache.transformer(ModelHandle(ModelSpec("base", str(folder), precision)), "cpu"):
            pass
    assert held == [{}, {}]


@pytest.mark.parametrize("offload", ["model", "block"])
@pytest.mark.parametrize(("memory", "kept"), [(PLENTY, True), (NONE_LEFT, False)])
def test_components_take_turns_and_stay_only_where_there_is_room(folder, offload, memory, kept):
    cache = ComponentCache(free_host_memory=memory)
    chosen = spec(folder, offload=offload)
    encoder = cache.text_encoder(chosen, "cpu")
    with cache.transformer(ModelHandle(chosen), "cpu"):
        pass
    assert (cache.text_encoder(chosen, "cpu") is encoder) is kept


def test_every_offload_mode_computes_the_same(folder):
    results, residents = {}, {}
    for offload in ("none", "model", "block"):
        for early in (False, True):
            chosen = spec(folder, offload=offload, offload_during_startup=early)
            with ComponentCache().transformer(ModelHandle(chosen), "cpu") as model:
                results[offload, early] = predict(model, inputs(model))
                streamer = streamed(model)
                residents[offload] = streamer.peak_resident if streamer else None
    first = results["none", False]
    assert all(torch.equal(result, first) for result in results.values())
    assert residents == {"none": None, "model": None, "block": 2}


def test_what_is_in_use_is_not_sent_away(folder):
    cache = ComponentCache(free_host_memory=NONE_LEFT)
    with cache.transformer(ModelHandle(spec(folder, offload="model")), "cpu") as model:
        before = module_bytes(model)
        cache.park()
        cache.clear()
        cache.vae(spec(folder, offload="model"), "cpu")
        with cache.transformer(ModelHandle(spec(folder, offload="model")), "cpu") as again:
            assert again is model
    assert before["cpu"] > 0
    cache.clear()
    assert cache.device_bytes() == {}


def test_bytes_are_those_of_the_weights(folder):
    cache = ComponentCache()
    with cache.transformer(ModelHandle(spec(folder)), "cpu") as model:
        expected = sum(p.numel() * 4 for p in model.parameters())
        assert cache.device_bytes() == {"cpu": expected}
