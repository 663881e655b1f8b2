"""Every example workflow, in its API form, runs green in the real host."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import waiting
from _host import Host
from _workflows import Prompt, change, load_api, window_files
from chroma_core.names.transformer import to_original
from tools.workflows.build import stale
from tools.workflows.presets import CARDS, FILES, TRAINING_SIZE
from tools.workflows.presets import FOLDER as IMAGES

STEPS = 6  # of training, in place of the workflow's own number: what runs is the same
FEW = 3  # of sampling, where only a difference is looked for
ENDED = ("completed", "failed", "stopped")
ROOT = Path(__file__).resolve().parents[2]


def pixels(server: Host, history: dict) -> list[np.ndarray]:
    return [np.asarray(image) for image in server.images(history)]


def latents(server: Host, prompt: dict, sampler: str) -> torch.Tensor:
    """What the prompt's sampler gives, through the host's own Save Latent."""
    key = next(key for key, node in prompt.items() if node["class_type"] == sampler)
    save = {"class_type": "SaveLatent", "inputs": {"samples": [key, 0], "filename_prefix": f"test/{sampler}"}}
    (entry,) = server.run(prompt | {"save_latent": save})["outputs"]["save_latent"]["latents"]
    return load_file(server.base / "output" / entry["subfolder"] / entry["filename"])["latent_tensor"]


def test_files_are_current(server: Host):
    assert stale(server.get("/object_info")) == [], "run: python -m tools.workflows.build"


def test_text_to_image(server: Host):
    (image,) = pixels(server, server.run(load_api("chroma_1_first_picture")))
    assert image.shape == (64, 64, 3) and image.std() > 10


def test_tail_sigmas_in_the_hosts_sampler_equal_chroma_sampler(server: Host):
    """The host's sampler on our MODEL and SIGMAS gives what Chroma Sampler gives for the same numbers (fp32)."""
    prompt = load_api("chroma_tail_sigmas")
    (image,) = pixels(server, server.run(prompt))
    assert image.shape == (64, 64, 3)
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
    status = until(server, job["id"], lambda status: status["state"] in ENDED)
    assert status["state"] == "completed", status["message"]
    return status["lora_name"]


def test_train_then_use(server: Host, trained: str):
    prompt = load_api("chroma_3_use_lora")
    named = next(node["inputs"]["lora"] for node in prompt.values() if node["class_type"] == "ChromaApplyLora")
    assert trained == named, "the workflow names the LoRA that the training workflow makes"
    (image,) = pixels(server, server.run(prompt))
    assert image.shape == (64, 64, 3)


def test_a_converted_lora_paints_the_same(server: Host, trained: str):
    (used,) = pixels(server, server.run(load_api("chroma_3_use_lora")))
    images = pixels(server, server.run(load_api("chroma_convert_lora")))
    (painted,) = (image for image in images if image.shape == used.shape)
    assert len(images) == 2 and np.abs(painted.astype(int) - used.astype(int)).max() <= 1
    assert (server.base / "output" / "loras" / trained.replace(".safetensors", "-kohya.safetensors")).is_file()


def few_steps(workflow: str, name: str) -> Prompt:
    """A workflow that trains and samples, with few steps of each."""
    prompt = change(load_api(workflow), "ChromaTrainLora", steps=STEPS, name=name)
    return change(change(prompt, "ChromaTrainingSettings", preview_steps=FEW), "ChromaSampler", steps=FEW)


def test_train_wait_and_sample_in_one_prompt(server: Host):
    prompt = few_steps("chroma_2_first_lora", "one prompt")
    base, lora = pixels(server, server.run(prompt))
    assert base.shape == lora.shape and not np.array_equal(base, lora)


def job_of(history: dict) -> str:
    (job,) = next(output["chromakit_job"] for output in history["outputs"].values() if "chromakit_job" in output)
    return job


def until(server: Host, job: str, wanted: Any) -> dict:
    """The job's status as soon as `wanted` is true of it."""

    def met() -> dict | None:
        status = server.get(f"/chromakit/jobs/{job}")
        assert status["state"] != "failed", status["message"]
        return status if wanted(status) else None

    return waiting.until(met, f"what is wanted of {job}") or {}


def test_the_grid_compares_the_same_seeds_without_and_with_the_lora(server: Host):
    prompt = few_steps("chroma_compare_lora", "compared")
    (grid,) = pixels(server, server.run(prompt))
    cell, gap, seeds = 256, 4, 4
    assert grid.shape[1] == seeds * cell + (seeds - 1) * gap
    rows = grid[:200], grid[grid.shape[0] - cell :][:200]  # without the line of text
    without, with_lora = ([row[:, i * (cell + gap) :][:, :cell] for i in range(seeds)] for row in rows)
    assert all(not np.array_equal(a, b) for a, b in zip(without, with_lora, strict=True))
    assert not np.array_equal(without[0], without[1])


def test_a_stopped_job_goes_on(server: Host):
    """Stopped through its route, taken up by queueing the workflow: the same job, to its end."""
    steps = 24
    prompt = change(load_api("chroma_resume_training"), "ChromaTrainLora", steps=steps, name="resumed")
    prompt = change(prompt, "ChromaTrainingSettings", preview_steps=FEW)
    job = job_of(server.run(prompt))
    until(server, job, lambda status: status["step"] >= 2)
    server.post(f"/chromakit/jobs/{job}/stop")
    stopped = until(server, job, lambda status: status["state"] in ENDED)
    assert stopped["state"] == "stopped" and 2 <= stopped["step"] < steps
    history = server.run(prompt)
    assert job_of(history) == job
    ended = until(server, job, lambda status: status["state"] in ENDED)
    assert (ended["state"], ended["step"]) == ("completed", steps)
    shown = [str(output.get("text")) for output in server.run(prompt)["outputs"].values()]
    assert any(f"completed, step {steps} of {steps}" in text for text in shown)


def test_the_resumed_job_is_the_one_that_the_first_lora_trains():
    def settings(name: str) -> list[dict]:
        kinds = ("ChromaLoadModel", "ChromaDataset", "ChromaTrainingSettings", "ChromaTrainLora")
        nodes = [node for node in load_api(name).values() if node["class_type"] in kinds]
        return [{k: v for k, v in n["inputs"].items() if k != "if_exists" and not isinstance(v, list)} for n in nodes]

    names = ("chroma_2_first_lora", "chroma_train_lora", "chroma_resume_training", "chroma_compare_lora")
    first, *others = map(settings, names)
    assert all(other == first for other in others)


def test_the_lora_paints_in_the_hosts_own_sampler(server: Host, trained: str):
    prompt = load_api("chroma_lora_in_host_nodes")
    (with_lora,) = pixels(server, server.run(prompt))
    (without,) = pixels(server, server.run(change(prompt, "ChromaApplyLora", strength=0.0)))
    assert with_lora.shape == (64, 64, 3) and with_lora.std() > 10
    assert not np.array_equal(with_lora, without)


def test_only_the_masked_part_is_painted_over(server: Host):
    history = server.run(load_api("chroma_inpaint"))
    (after,) = pixels(server, history)
    (before,) = (np.asarray(image) for image in server.images(history, kind="temp"))
    hole = np.zeros((64, 64), dtype=bool)
    hole[12:52, 12:52] = True
    moved = np.abs(after.astype(int) - before.astype(int)).max(axis=2)
    assert moved[~hole].max() <= 1, "what is outside the mask stays"
    assert (moved[hole] > 40).mean() > 0.1, "what is inside is new"


def test_a_preset_without_its_files_names_them_and_starts_no_job(server: Host):
    before = server.get("/chromakit/jobs")
    _, answer = server.post("/prompt", {"prompt": load_api("chroma_4_real_08gb")})
    assert all(file.name in str(answer["node_errors"]) for file in FILES.values())
    history = server.wait(answer["prompt_id"], check=False)  # the data set alone needs no model
    assert f"no dataset folder '{IMAGES}'" in str(history["status"]["messages"])
    assert server.get("/chromakit/jobs") == before


@pytest.fixture(scope="module")
def downloaded(server: Host) -> Iterator[None]:
    """The files that the presets name, where the page's download puts them (the weights are tiny's), and images."""
    written = []
    for part, file in FILES.items():
        (weights,) = (ROOT / "chroma_core" / "assets" / "tiny" / part).glob("*.safetensors")
        path = server.base / "models" / file.directory / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = load_file(weights)
        save_file(to_original(tensors) if part == "transformer" else tensors, path)
        written.append(path)
    images = server.base / "input" / IMAGES
    images.mkdir()
    for number in ("01", "02"):
        source = ROOT / "example_datasets" / "sks_emblem" / f"{number}.png"
        with Image.open(source) as image:
            image.resize((TRAINING_SIZE, TRAINING_SIZE)).save(images / source.name)
        shutil.copy(source.with_suffix(".txt"), images)
    yield
    shutil.rmtree(images)
    for path in written:
        path.unlink()


def preset_on_tiny(name: str, **sizes: int) -> Prompt:
    """A preset with the flavour tiny and few steps; the files, the precisions and where they lie are its own."""
    steps = 2 if sizes else 1
    prompt = change(load_api(name), "ChromaLoadModel", flavour="tiny")
    if "ChromaSampler" in str(prompt):
        return change(change(prompt, "ChromaSampler", steps=steps), "ChromaEmptyLatent", **sizes)
    prompt = change(prompt, "ChromaTrainLora", steps=2)
    return change(prompt, "ChromaPreviewSettings", preview_steps=steps, **{f"preview_{k}": v for k, v in sizes.items()})


def train_and_use(server: Host, card: int, **sizes: int) -> np.ndarray:
    """The image of the second preset of a card, with the LoRA of the first."""
    name = f"chroma_4_real_{card:02d}gb"
    prompt = preset_on_tiny(name, **sizes)
    if sizes:
        prompt = change(prompt, "ChromaDataset", resolution=sizes["width"])
    job = job_of(server.run(prompt))
    until(server, job, lambda status: status["state"] in ENDED)
    (image,) = pixels(server, server.run(preset_on_tiny(f"{name}_use", **sizes), timeout=500))
    return image


@pytest.mark.parametrize("card", CARDS)
def test_a_preset_trains_and_paints(server: Host, downloaded: None, card: int):
    """At tiny's own size."""
    assert train_and_use(server, card, width=64, height=64).shape == (64, 64, 3)


@pytest.mark.slow
def test_a_preset_trains_and_paints_at_its_own_sizes(server: Host, downloaded: None):
    assert train_and_use(server, CARDS[1]).shape == (1024, 1024, 3)


def test_each_workflow_is_run_here():
    """Two of them in test_datasets_in_host.py."""
    assert set(window_files()) == {
        "chroma_1_first_picture", "chroma_2_first_lora", "chroma_3_use_lora",
        *(f"chroma_4_real_{card:02d}gb{use}" for card in CARDS for use in ("", "_use")),
        "chroma_tail_sigmas", "chroma_train_lora", "chroma_resume_training", "chroma_compare_lora",
        "chroma_your_files", "chroma_parity", "chroma_convert_lora", "chroma_train_from_images",
        "chroma_train_with_regularisation", "chroma_inpaint", "chroma_lora_in_host_nodes",
    }  # fmt: skip
