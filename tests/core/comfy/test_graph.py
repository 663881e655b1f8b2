"""The builder of ComfyUI prompts."""

import pytest

from chroma_core.comfy.graph import Graph


def test_links_are_ids_and_outputs_and_an_id_is_given_once():
    graph = Graph()
    loader = graph.add("load", "ChromaLoadModel", "Model", flavour="tiny")
    model = graph.add_lora(0, loader[0], "a.safetensors", 0.5, "live")
    sampler = graph.add_image(model, loader, "a star", "", (64, 32), {"seed": 7}, "here/x")
    graph.add_image(loader[0], loader, "another", "bad", (64, 64), {"seed": 8}, "here/y", number=1)
    assert sampler[0] == ["sample", 0] and graph.prompt["load"]["_meta"] == {"title": "Model"}
    assert graph.prompt["sample"]["inputs"] == {
        "model": ["lora_0", 0],
        "positive": ["positive", 0],
        "negative": ["negative", 0],
        "latent": ["latent", 0],
        "seed": 7,
    }
    assert graph.prompt["decode_1"]["inputs"] == {"samples": ["sample_1", 0], "vae": ["load", 2]}
    every = set(graph.prompt)
    links = [value for node in graph.prompt.values() for value in node["inputs"].values() if isinstance(value, list)]
    assert len(links) == 19 and {key for key, _ in links} <= every, "no link leads nowhere"
    with pytest.raises(ValueError, match="a node 'load' already"):
        graph.add("load", "ChromaLoadModel")
