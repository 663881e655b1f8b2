"""A full-rank job from nodes, and its model chosen in Chroma Load Model of the same host."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors import safe_open

from _host import Host, PromptFailed
from prompts import at_defaults, job_of, node, text_to_image, train
from weight_files import remove_files


def image(server: Host, **load_inputs: object) -> np.ndarray:
    prompt = text_to_image(seed=5)
    prompt["load"]["inputs"].update(load_inputs)
    (found,) = server.images(server.run(prompt))
    return np.asarray(found)


def error_of(failed: pytest.ExceptionInfo[PromptFailed]) -> str:
    (error,) = (body for kind, body in failed.value.messages if kind == "execution_error")
    return error["exception_message"].strip()


def test_a_full_rank_job_ends_with_a_model_that_can_be_chosen_and_paints(server: Host):
    prompt = train("whole blocks", steps=2, settings=["settings", 0])
    prompt["settings"] = at_defaults(
        server, "ChromaTrainingSettings", full_rank_blocks="double_blocks.0, single_blocks.1", optimizer="adafactor"
    )
    job = job_of(server.run(prompt))
    with pytest.raises(PromptFailed) as failed:
        server.run({**prompt, "wait": node("ChromaWaitForTraining", job=["train", 0]), "graph":
                    node("LossGraphNode", loss=["wait", 2], filename_prefix="loss")})  # fmt: skip
    message = error_of(failed)
    assert "no LoRA" in message and "whole-blocks.safetensors" in message and "Chroma Load Model" in message

    status = server.get(f"/chromakit/jobs/{job}")
    assert status["state"] == "completed" and status["config"]["full"]["target"] == "double_blocks.0, single_blocks.1"
    assert any("learning rate" in warning for warning in status["warnings"])
    path, folder = server.base / status["model_path"], server.base / status["model_folder"]
    try:
        assert path == server.base / "output" / "diffusion_models" / "whole-blocks.safetensors"
        with safe_open(path, framework="pt") as file:
            assert json.loads(file.metadata()["chromakit.training"])["kind"] == "full"
        assert sorted(p.name for p in folder.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]

        # The host lists it among its own models, and so does Chroma Load Model: the file, and nothing of the folder.
        for node_id, name in (("UNETLoader", "unet_name"), ("ChromaLoadModel", "transformer")):
            inputs = server.get(f"/object_info/{node_id}")[node_id]["input"]
            kind, *rest = {**inputs["required"], **inputs.get("optional", {})}[name]
            offered = kind if isinstance(kind, list) else rest[0]["options"]
            assert [entry for entry in offered if "whole" in entry] == [path.name]
        assert not np.array_equal(image(server, transformer=path.name), image(server))
    finally:
        path.unlink()
        remove_files(folder.parent)


def test_adapter_options_beside_full_rank_blocks_are_refused(server: Host):
    prompt = train("refused", steps=2, settings=["settings", 0])
    prompt["settings"] = at_defaults(
        server, "ChromaTrainingSettings", full_rank_blocks="all", adapter="dora", dropout=0.1
    )
    with pytest.raises(PromptFailed) as failed:
        server.run(prompt)
    assert "kind, dropout" in error_of(failed)
