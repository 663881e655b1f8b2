"""Looking into a job over HTTP: its curve, log and thumbnails, graphs made of it, and its end."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from _host import Host
from prompts import Prompt, at_defaults, dataset, job_of, load, node, text_to_image, train, until_not
from waiting import until

OPTIONS: dict[str, Any] = {
    "lr_schedule": "polynomial", "warmup_steps": 2, "sigma_draw": "chroma", "sigma_remap": "none",
    "sigma_shift": "constant", "sigma_shift_value": 2.5, "sigma_minimum": 0.1, "preview_method": "heun",
    "preview_steps": 2, "preview_guidance": 1.0, "preview_seed": 7, "preview_negative": "a star", "save_dtype": "bf16",
    "recipe_overrides": "noise_dtype=bf16, flow_shift=3.0", "dropout": 0.1, "ema_decay": 0.9, "adapter": "rslora",
    "loss": "huber", "gradient_checkpointing": False, "target_patterns": "transformer_blocks.*.attn.to_q",
}  # fmt: skip
"""Widgets of Chroma Training Settings that are not at their defaults."""


def looked_into() -> Prompt:
    return train("looked into", 3, preview_prompt="a [trigger] star\na red circle", preview_every=2)


@pytest.fixture(scope="module")
def done(server: Host) -> str:
    """A completed job with previews."""
    job = job_of(server.run(looked_into()))
    assert until_not(server, job) == "completed"
    return job


def test_the_list_can_be_brief(server: Host, done: str):
    found = next(job for job in server.get("/chromakit/jobs?brief=true") if job["id"] == done)
    assert (found["state"], found["step"], found["flavour"], found["kind"]) == ("completed", 3, "tiny", "lora")
    assert not {"config", "recipe", "samples"} & set(found)


def test_the_curve_is_read_on(server: Host, done: str):
    whole = server.get(f"/chromakit/jobs/{done}/curve")
    metrics = [line for line in server.get(f"/chromakit/jobs/{done}/metrics") if "loss" in line]
    assert whole["step"] == [1, 2, 3] and whole["loss"] == pytest.approx([line["loss"] for line in metrics], rel=1e-5)
    rest = server.get(f"/chromakit/jobs/{done}/curve?after=2&token={whole['token']}")
    assert rest["continued"] and rest["step"] == [3]
    for query in ("points=0", "points=many", "after=-1"):
        status, body = server.request("GET", f"/chromakit/jobs/{done}/curve?{query}")
        assert status == 400 and b"whole number" in body
    assert server.request("GET", "/chromakit/jobs/nothing/curve")[0] == 404


def test_the_log(server: Host, done: str):
    lines = server.get(f"/chromakit/jobs/{done}/log")
    assert lines[-1].endswith("completed at step 3") and any("previews of step 2" in line for line in lines)
    assert server.get(f"/chromakit/jobs/{done}/log?lines=1") == lines[-1:]


def test_thumbnails(server: Host, done: str):
    status, body = server.request("GET", f"/chromakit/jobs/{done}/samples/0?side=32")
    with Image.open(io.BytesIO(body)) as small:
        assert status == 200 and small.format == "JPEG" and small.size == (32, 32)
    assert server.request("GET", f"/chromakit/jobs/{done}/samples/99?side=32")[0] == 404
    assert server.request("GET", f"/chromakit/jobs/{done}/samples/0?side=5")[0] == 400


def test_a_step_is_used_by_route_and_node_and_a_branch_goes_on_from_it(server: Host, done: str):
    status, answer = server.post(f"/chromakit/jobs/{done}/use", {"step": 1})
    assert status == 409 and "no LoRA of step 1: there are" in str(answer)
    status, answer = server.post(f"/chromakit/jobs/{done}/use", {"step": 2})
    name = "looked-into-step-000002.safetensors"
    used, kept = (server.base / "output" / part for part in ("loras", f"chromakit/jobs/{done}/loras"))
    assert status == 200 and {one["step"]: one["used"] for one in answer["kept"]}[2] == name
    assert (used / name).read_bytes() == (kept / "step-000002.safetensors").read_bytes()
    (used / name).unlink()

    prompt = text_to_image() | looked_into() | {"use": node("ChromaUseStep", job=["train", 0], step=2)}
    prompt["lora"] = node("ChromaApplyLora", model=["load", 0], lora="none", strength=1.0, lora_name=["use", 1])
    prompt["sample"]["inputs"]["model"] = ["lora", 0]
    history = server.run(prompt)
    assert job_of(history) == done and history["outputs"]["use"]["text"] == [name] and (used / name).is_file()

    status, branch = server.post(f"/chromakit/jobs/{done}/branch", {"step": 2, "learning_rate": 1e-3})
    assert status == 200 and branch["id"] != done and branch["config"]["learning_rate"] == 1e-3
    assert branch["config"]["lora"]["start_from"].endswith(name)
    assert until_not(server, branch["id"]) == "completed"


def again(server: Host, job: str) -> dict[str, Any]:
    return server.get(f"/chromakit/jobs/{job}/graph/again")


def test_a_plain_job_as_a_graph_is_the_same_job(server: Host, done: str):
    graph = again(server, done)
    before = len(server.get("/chromakit/jobs"))
    assert graph["missing"] == []
    history = server.run(graph["prompt"])
    assert job_of(history) == done and len(server.get("/chromakit/jobs")) == before


def test_a_job_with_many_options_as_a_graph_is_the_same_job(server: Host):
    prompt = train("every option", 2, settings=["settings", 0], dataset=["both", 0], validation_dataset=["more", 0])
    prompt["settings"] = at_defaults(server, "ChromaTrainingSettings", **OPTIONS)
    prompt["dataset"]["inputs"] |= {"caption_prefix": "x ", "repeats": 2, "flip": True, "more_resolutions": "96, 128"}
    prompt["more"] = {**prompt["dataset"], "inputs": {**prompt["dataset"]["inputs"], "folder": "sks_emblem_heldout"}}
    prompt["both"] = node(
        "ChromaCombineDatasets", dataset_1=["dataset", 0], dataset_2=["more", 0], weight_1=1.0, weight_2=0.5
    )
    job = job_of(server.run(prompt))
    assert until_not(server, job) == "completed", server.get(f"/chromakit/jobs/{job}")["message"]
    graph = again(server, job)
    assert graph["missing"] == []
    assert job_of(server.run(graph["prompt"])) == job


def test_what_no_widget_can_say_is_said(server: Host, done: str):
    changes = {"previews.prompts": [{"prompt": "a star", "steps": 3}], "validation_pictures": 2, "betas": [0.8, 0.99]}
    status, _ = server.post(f"/chromakit/jobs/{done}/change", {"changes": changes, "force": True})
    assert status == 200
    missing = " ".join(again(server, done)["missing"])
    assert all(option in missing for option in ("previews.prompts", "validation_pictures", "betas")), missing


def test_a_job_whose_images_are_gone_is_a_graph_that_says_so(server: Host, root: Path):
    folder = server.base / "input" / "soon_gone"
    shutil.copytree(root / "example_datasets" / "sks_emblem", folder)
    job = job_of(server.run(train("pictures gone", 1) | {"dataset": dataset("soon_gone")}))
    assert until_not(server, job) == "completed"
    assert again(server, job)["missing"] == []
    shutil.rmtree(folder)
    graph = again(server, job)
    assert [text for text in graph["missing"] if "dataset" in text and "“soon_gone”" in text], graph["missing"]
    assert graph["prompt"]["dataset"]["inputs"]["folder"] == "soon_gone"


def test_using_the_result_paints_the_preview(server: Host):
    prompt = "a [trigger] emblem on a red background"
    job = job_of(server.run(train("to be used", 3, preview_prompt=prompt, preview_every=3)))
    assert until_not(server, job) == "completed"
    graph = server.get(f"/chromakit/jobs/{job}/graph/use")
    (painted,) = server.images(server.run(graph["prompt"]))
    last = len(server.get(f"/chromakit/jobs/{job}")["samples"]) - 1
    with Image.open(io.BytesIO(server.request("GET", f"/chromakit/jobs/{job}/samples/{last}")[1])) as preview:
        assert painted.tobytes() == preview.convert("RGB").tobytes(), "what the preview shows is what one gets"
    assert server.request("GET", f"/chromakit/jobs/{job}/graph/other")[0] == 404


def test_images_from_nodes_are_found_again(server: Host):
    prompt = text_to_image(batch=2) | load() | train("from nodes", 1, dataset=["pictures", 0])
    prompt["pictures"] = node(
        "ChromaDatasetFromImages", images=["decode", 0], captions="a sks", trigger="sks", resolution=0, repeats=1,
        caption_dropout=0.1,
    )  # fmt: skip
    job = job_of(server.run(prompt))
    assert until_not(server, job) == "completed"
    graph = again(server, job)
    assert graph["missing"] == [] and job_of(server.run(graph["prompt"])) == job


def test_a_job_that_wrote_nothing_cannot_be_used(server: Host):
    job = job_of(server.run(train("used too early", 1_000_000)))
    try:
        status, body = server.request("GET", f"/chromakit/jobs/{job}/graph/use")
        assert status == 409 and b"has written no LoRA yet" in body
    finally:
        server.post(f"/chromakit/jobs/{job}/stop")
        until_not(server, job)


def test_deleting(server: Host):
    prompt = train("to be deleted", 2)
    job = job_of(server.run(prompt))
    assert until_not(server, job) == "completed"
    assert server.post(f"/chromakit/jobs/{job}/delete") == (200, {"id": job})
    assert server.request("GET", f"/chromakit/jobs/{job}")[0] == 404
    assert not (server.base / "output" / "chromakit" / "jobs" / job).exists()
    assert (server.base / "output" / "loras" / "to-be-deleted.safetensors").is_file()
    assert job_of(server.run(prompt)) == job, "the host must not replay the id of a job that is gone"
    until(lambda: job in [found["id"] for found in server.get("/chromakit/jobs")], "the job in the list")
    assert until_not(server, job) == "completed"
