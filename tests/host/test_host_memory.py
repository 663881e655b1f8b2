"""Living together with the host's own models: on its list, out of the way when it asks, back when a node needs them."""

from __future__ import annotations

import gc
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from _host import Host
from chroma_core.loading.spec import ModelSpec
from chroma_core.memory import Settings, estimate
from prompts import text_to_image
from waiting import until

ROOT = Path(__file__).resolve().parents[2]
TINY = ModelSpec("tiny", precision="fp32", text_precision="fp32")
TRANSFORMER_BYTES = 16_000_000  # of tiny in fp32, at least


# --- over HTTP --------------------------------------------------------------------------------------------------------


def held(server: Host) -> int:
    return sum(server.get("/chromakit/memory")["component_bytes"].values())


def test_free_returns_the_memory_of_our_models(server: Host):
    image = np.asarray(server.images(server.run(text_to_image(seed=21)))[0])
    report = server.get("/chromakit/memory")
    assert report["device"] == "cpu" and report["known_to_host"]
    assert report["component_bytes"]["cpu"] > TRANSFORMER_BYTES
    assert report["device_total_bytes"] > report["device_free_bytes"] > 0
    server.forget_cached_outputs()
    until(lambda: not held(server), "the memory to be returned")
    history = server.run(text_to_image(seed=21))
    assert not server.nodes_replayed(history)
    assert np.array_equal(image, np.asarray(server.images(history)[0])) and held(server) > TRANSFORMER_BYTES


def test_unloading_alone_returns_it_too(server: Host):
    """The page's "unload models" keeps what nodes gave; our components go nevertheless."""
    server.run(text_to_image(seed=23))
    assert held(server) > TRANSFORMER_BYTES
    assert server.post("/free", {"unload_models": True})[0] == 200
    until(lambda: not held(server), "the memory to be returned")


def test_another_model_takes_the_place_of_the_first(server: Host):
    """Never two transformers: after a change of precision, less is held, not more."""
    server.run(text_to_image(seed=22))
    before = held(server)
    prompt = text_to_image(seed=22)
    prompt["load"]["inputs"].update(precision="int8")
    server.run(prompt)
    assert 0 < held(server) < before


def test_the_plan_answers_what_the_core_estimates(server: Host):
    query = "flavour=base&precision=nf4&size=512&gradient_checkpointing=false&rank=32"
    expected = estimate(Settings("base", "nf4", size=512, gradient_checkpointing=False, rank=32)).to_dict()
    found = server.get(f"/chromakit/plan?{query}")
    assert found["weights_bytes"] == expected["weights_bytes"]
    assert found["training_peak_bytes"] == expected["training_peak_bytes"]
    assert found["transformer_parameters"] == 8_899_983_424
    assert {"sampling_peak_bytes", "host_peak_bytes", "recommendation"} <= set(found)


@pytest.mark.parametrize(
    ("query", "named"),
    [
        ("size=big", "size"), ("flavour=enormous", "enormous"), ("precision=int7", "int7"), ("colour=red", "colour"),
        ("gradient_checkpointing=maybe", "gradient_checkpointing"), ("offload=somewhere", "somewhere"),
            ("size=0", "0 pixels"), ("batch_size=0", "batch_size"),
    ],
)  # fmt: skip
def test_bad_values_for_the_plan_are_named(server: Host, query: str, named: str):
    status, body = server.request("GET", f"/chromakit/plan?{query}")
    assert status == 400 and named in body.decode() and b'"error"' in body


# --- the host's own memory management, in this process ----------------------------------------------------------------


@pytest.fixture(scope="module")
def host(comfy: ModuleType) -> ModuleType:
    """This pack's `nodes/host`, imported beside the host's `comfy` as the host imports it: as part of a package."""
    name = "chromakit_memory_under_test"
    spec = importlib.util.spec_from_file_location(name, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    assert spec and spec.loader
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return importlib.import_module(f"{name}.nodes.host")


@pytest.fixture
def management(comfy: ModuleType, host: ModuleType) -> Iterator[ModuleType]:
    import comfy.model_management as management

    management.unload_all_models()
    yield management
    management.unload_all_models()
    assert entries(management) == []


def entries(management: ModuleType) -> list:
    return [
        entry
        for entry in management.current_loaded_models
        if entry.model is not None and type(entry.model.model).__name__ == "ChromaKitComponents"
    ]


def specification(host: ModuleType) -> ModuleType:
    """`chroma_core.loading.spec` of the pack under test."""
    return importlib.import_module("..chroma_core.loading.spec", host.__package__.rpartition(".")[0])


def use(host: ModuleType) -> int:
    """Load tiny's transformer as a node does, and return the bytes that are held then."""
    spec = specification(host)
    handle = spec.ModelHandle(spec.ModelSpec.from_dict(TINY.to_dict()))
    with host.components.transformer(handle, host.device()) as transformer:
        assert transformer.x_embedder.weight.dtype == torch.float32
    return sum(host.components.device_bytes().values())


def test_what_we_hold_is_one_entry_on_the_hosts_list(host: ModuleType, management: ModuleType):
    assert not entries(management)
    size = use(host)
    (entry,) = entries(management)
    assert entry.model_loaded_memory() == entry.model_memory() == size > TRANSFORMER_BYTES
    assert entry.model_offloaded_memory() == 0
    host.make_room(0)
    host.make_room(1 << 20)
    gc.collect()
    management.cleanup_models()
    management.cleanup_models_gc()
    (entry,) = entries(management)
    assert not entry.is_dead() and entry.model_loaded_memory() == size


def test_unloading_everything_takes_ours_and_the_next_use_brings_them_back(host: ModuleType, management: ModuleType):
    size = use(host)
    management.unload_all_models()
    assert sum(host.components.device_bytes().values()) == 0 and not entries(management)
    assert use(host) == size and len(entries(management)) == 1


def test_the_host_takes_only_when_it_is_short(host: ModuleType, management: ModuleType):
    size = use(host)
    management.free_memory(1, host.device())
    assert sum(host.components.device_bytes().values()) == size
    (entry,) = entries(management)
    assert entry.model_unload(size // 2) is False  # partly asked for, all given: the entry stays, empty
    assert entry.model_loaded_memory() == 0 and entries(management) == [entry]
    assert use(host) == size and entry.model_loaded_memory() == size


def test_nothing_is_taken_from_under_a_node_that_computes(host: ModuleType, management: ModuleType):
    size = use(host)
    with host.working():
        management.unload_all_models()
        assert sum(host.components.device_bytes().values()) == size
        host.make_room(0)
        assert len(entries(management)) == 1
    management.unload_all_models()
    assert sum(host.components.device_bytes().values()) == 0


def test_the_hosts_own_models_load_beside_ours(host: ModuleType, management: ModuleType):
    use(host)
    vae = host.host_vae(specification(host).ModelSpec("tiny"))
    with torch.no_grad():
        vae.decode(torch.zeros(1, 16, 8, 8))
    assert len(entries(management)) == 1
    assert vae.patcher in management.loaded_models()
    use(host)
    assert vae.patcher in management.loaded_models()  # on a CPU the host's models stay where they are


def test_a_download_moves_the_nodes_bar_and_stops_at_cancel(host: ModuleType, management: ModuleType, monkeypatch):
    import comfy.utils

    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, *_, **__: seen.append((value, total)))
    on_download = host.Downloads()
    on_download(3 << 30, 9 << 30, "model-00001-of-00002.safetensors")
    assert seen == [(3 << 30, 9 << 30)]
    management.interrupt_current_processing()
    with pytest.raises(host.Interrupted):
        on_download(4 << 30, 9 << 30, "model-00001-of-00002.safetensors")
    assert len(seen) == 1 and not management.processing_interrupted()


def test_a_host_that_cannot_count_us_is_told_once(host: ModuleType, management: ModuleType, monkeypatch, caplog):
    def other_version(models: list, unheard_of: int) -> None: ...

    monkeypatch.setattr(management, "load_models_gpu", other_version)
    with caplog.at_level("WARNING", "chromakit"):
        first = use(host)
        host.make_room(0)
    assert first > TRANSFORMER_BYTES
    assert len([record for record in caplog.records if "cannot count" in record.message]) == 1
    host.components.clear()
