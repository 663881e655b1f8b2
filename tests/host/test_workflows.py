"""Every example workflow, in its API form, runs green in the real host."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from _host import Host
from _workflows import FOLDER, change, load_api
from build_workflows import stale

STEPS = 6  # of training, in place of the workflow's own number: what runs is the same


def pixels(server: Host, history: dict) -> list[np.ndarray]:
    return [np.asarray(picture) for picture in server.images(history)]


def latents(server: Host, prompt: dict, sampler: str) -> torch.Tensor:
    """What the prompt's sampler gives, through the host's own Save Latent."""
    key = next(key for key, node in prompt.items() if node["class_type"] == sampler)
    save = {"class_type": "SaveLatent", "inputs": {"samples": [key, 0], "filename_prefix": f"test/{sampler}"}}
    (entry,) = server.run(prompt | {"save_latent": save})["outputs"]["save_latent"]["latents"]
    return load_file(server.base / "output" / entry["subfolder"] / entry["filename"])["latent_tensor"]


def test_files_are_current(server: Host):
    assert stale(server.get("/object_info")) == [], "run: python scripts/build_workflows.py"


def test_text_to_image(server: Host):
    (picture,) = pixels(server, server.run(load_api("chroma_1_first_picture")))
    assert picture.shape == (64, 64, 3) and picture.std() > 10


def test_tail_sigmas_in_the_hosts_sampler_equal_chroma_sampler(server: Host):
    """The host's sampler on our MODEL and SIGMAS gives what Chroma Sampler gives for the same numbers (fp32)."""
    prompt = load_api("chroma_tail_sigmas")
    (picture,) = pixels(server, server.run(prompt))
    assert picture.shape == (64, 64, 3)
    theirs = latents(server, prompt, "SamplerCustomAdvanced")
    sigmas = next(node["inputs"] for node in prompt.values() if node["class_type"] == "ChromaTailSigmas")
    shared = {name: sigmas[name] for name in ("steps", "tail_bias", "flow_shift", "flow_shift_value", "denoise")}
    guidance = next(node["inputs"]["cfg"] for node in prompt.values() if node["class_type"] == "CFGGuider")
    seed = next(node["inputs"]["noise_seed"] for node in prompt.values() if node["class_type"] == "RandomNoise")
    text = next(node["inputs"]["text"] for node in prompt.values() if node["_meta"]["title"] == "Prompt")
    ours_prompt = change(load_api("chroma_1_first_picture"), "ChromaTextEncode", title="Prompt", text=text)
    ours_prompt = change(ours_prompt, "ChromaSampler", seed=seed, guidance=guidance, **shared)
    ours = latents(server, ours_prompt, "ChromaSampler")
    assert ours.std() > 0.5
    assert (ours - theirs).abs().max() <= 1e-4


@pytest.fixture(scope="module")
def trained(server: Host) -> str:
    """The LoRA that the training workflow makes, by the name under which the host lists it."""
    server.run(change(load_api("chroma_train_lora"), "ChromaTrainLora", steps=STEPS))
    jobs = server.get("/chromakit/jobs")
    job = next(job for job in (jobs["jobs"] if isinstance(jobs, dict) else jobs) if job["name"] == "sks")
    while (status := server.get(f"/chromakit/jobs/{job['id']}"))["state"] not in ("completed", "failed", "stopped"):
        assert server.alive()
    assert status["state"] == "completed", status["message"]
    return status["lora_name"]


def test_train_then_use(server: Host, trained: str):
    prompt = load_api("chroma_3_use_lora")
    named = next(node["inputs"]["lora"] for node in prompt.values() if node["class_type"] == "ChromaApplyLora")
    assert trained == named, "the workflow names the LoRA that the training workflow makes"
    (picture,) = pixels(server, server.run(prompt))
    assert picture.shape == (64, 64, 3)


def test_a_converted_lora_paints_the_same(server: Host, trained: str):
    (used,) = pixels(server, server.run(load_api("chroma_3_use_lora")))
    pictures = pixels(server, server.run(load_api("chroma_convert_lora")))
    (painted,) = (picture for picture in pictures if picture.shape == used.shape)
    assert len(pictures) == 2 and np.abs(painted.astype(int) - used.astype(int)).max() <= 1
    assert (server.base / "output" / "loras" / trained.replace(".safetensors", "-kohya.safetensors")).is_file()


def test_train_wait_and_sample_in_one_prompt(server: Host):
    prompt = change(load_api("chroma_2_first_lora"), "ChromaTrainLora", steps=STEPS, name="one prompt")
    base, lora = pixels(server, server.run(prompt))
    assert base.shape == lora.shape and not np.array_equal(base, lora)


def test_your_files_shows_the_memory_plan_beside_the_picture(server: Host):
    history = server.run(load_api("chroma_your_files"))
    (picture,) = pixels(server, history)
    assert picture.shape == (64, 64, 3) and picture.std() > 10
    (text,) = next(output["text"] for output in history["outputs"].values() if "text" in output)
    assert "offload" in text and "recommended" in text and "chosen" in text


def test_parity_says_which_number_moves_the_picture(server: Host):
    history = server.run(load_api("chroma_parity"))
    (sheet,) = server.images(history)
    assert sheet.width > 1000 and np.asarray(sheet).std() > 10
    (text,) = next(output["text"] for output in history["outputs"].values() if "text" in output)
    rows = text.splitlines()
    order = [next(i for i, row in enumerate(rows) if row.startswith(name)) for name in ("recipe ai", "time_dtype bf16")]
    assert order == sorted(order) and "identical" in next(row for row in rows if row.startswith("recipe diffusers"))


def test_each_workflow_is_run_here():
    """Two of them in test_datasets_in_host.py."""
    assert {path.stem for path in FOLDER.glob("*.json")} == {
        "chroma_1_first_picture", "chroma_tail_sigmas", "chroma_train_lora", "chroma_2_first_lora", "chroma_3_use_lora",
        "chroma_your_files", "chroma_parity", "chroma_convert_lora", "chroma_train_from_images",
        "chroma_train_with_regularisation",
    }  # fmt: skip
