"""Training beside a working host: neither disturbs the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from safetensors.torch import load_file

import waiting
from _host import Host
from prompts import Prompt, at_defaults, interrupted, job_of, node, text_to_image, train, until_not

ENDLESS = 1_000_000
STEPS = 3


def status(server: Host, job: str) -> dict:
    return server.get(f"/chromakit/jobs/{job}")


def until(server: Host, job: str, condition: Callable[[dict], bool]) -> dict:
    """The job's status as soon as it meets a condition."""

    def met() -> dict | None:
        found = status(server, job)
        assert found["state"] != "failed", found
        return found if condition(found) else None

    return waiting.until(met, f"a condition of {job}", report=lambda: status(server, job)) or {}


def act(server: Host, job: str, action: str) -> dict:
    code, answer = server.post(f"/chromakit/jobs/{job}/{action}")
    assert code == 200, answer
    return answer


def image(server: Host, prompt: Prompt) -> np.ndarray:
    (found,) = server.images(server.run(prompt))
    return np.asarray(found)


@pytest.fixture(scope="module")
def without_training(server: Host) -> dict[int, np.ndarray]:
    """Images by seed, made while nothing trains."""
    return {seed: image(server, text_to_image(seed=seed)) for seed in (21, 22)}


@pytest.fixture
def job(server: Host, without_training: dict, request: pytest.FixtureRequest) -> Iterator[str]:
    """A running job that does not end by itself."""
    name = request.node.name.removeprefix("test_")[:40]
    found = job_of(server.run(train(name, ENDLESS)))
    until(server, found, lambda now: now["state"] == "running" and now["step"] >= 2)
    yield found
    if status(server, found)["state"] in ("queued", "preparing", "running", "paused"):
        act(server, found, "stop")
    until(server, found, lambda now: now["state"] == "stopped")


def test_images_made_during_training_are_the_same_bits(server: Host, job: str, without_training: dict):
    server.forget_cached_outputs()
    before = status(server, job)
    prompts = {seed: server.post_prompt(text_to_image(seed=seed)) for seed in without_training}
    for seed, prompt_id in prompts.items():
        (found,) = server.images(server.wait(prompt_id))
        assert np.array_equal(np.asarray(found), without_training[seed])
    after = until(server, job, lambda now: now["step"] > before["step"] + 2)
    assert after["state"] == "running" and not after["yielded"], "both images are there and training goes on"


def test_a_prompt_for_the_model_in_training_loads_none_of_its_own(server: Host, job: str, without_training: dict):
    server.forget_cached_outputs()
    assert np.array_equal(image(server, text_to_image(seed=21)), without_training[21])
    held = sum(server.get("/chromakit/memory")["component_bytes"].values())
    assert 0 < held < 14_000_000, "T5 and the VAE have 9 million bytes, the transformer 16 more"
    assert status(server, job)["state"] == "running"


def test_training_yields_to_a_prompt(server: Host, job: str):
    prompt_id = server.post_prompt(text_to_image(seed=31, steps=40, size=128))
    until(server, job, lambda now: now["yielded"])
    held = status(server, job)["step"]
    assert server.finished(prompt_id) is None and status(server, job)["step"] == held
    server.wait(prompt_id)
    until(server, job, lambda now: not now["yielded"] and now["step"] > held)


def test_cancelling_a_prompt_leaves_the_job_alone(server: Host, job: str):
    prompt_id = server.post_prompt(text_to_image(seed=32, steps=150, size=256))
    until(server, job, lambda now: now["yielded"])
    assert interrupted(server, prompt_id)
    step = status(server, job)["step"]
    assert until(server, job, lambda now: now["step"] > step + 2)["state"] == "running"


def test_the_same_prompt_again_is_the_same_job(server: Host, job: str):
    name = status(server, job)["name"]
    for _ in range(2):
        assert job_of(server.run(train(name, ENDLESS))) == job
        server.forget_cached_outputs()  # the second time the node really runs
    assert [found["id"] for found in server.get("/chromakit/jobs") if found["name"] == name] == [job]


def test_pause_and_resume(server: Host, job: str):
    act(server, job, "pause")
    held = until(server, job, lambda now: now["state"] == "paused")["step"]
    waiting.stays(lambda: status(server, job)["step"] == held, "paused", 0.5)
    act(server, job, "resume")
    until(server, job, lambda now: now["state"] == "running" and now["step"] > held)


def test_stopping_leaves_a_lora_that_works(server: Host, job: str, without_training: dict):
    act(server, job, "stop")
    found = until(server, job, lambda now: now["state"] == "stopped")
    assert (server.base / found["lora_path"]).is_file()
    options = server.get("/object_info/ChromaApplyLora")["ChromaApplyLora"]["input"]["required"]["lora"][1]["options"]
    assert found["lora_name"] in options, "listed without a restart"
    plain, adapted = without_training[21], {}
    for strength in (0.0, 1.0):
        prompt = text_to_image(seed=21, model="lora")
        prompt["lora"] = node("ChromaApplyLora", model=["load", 0], lora=found["lora_name"], strength=strength)
        adapted[strength] = image(server, prompt)
    assert np.array_equal(adapted[0.0], plain) and not np.array_equal(adapted[1.0], plain)


def train_wait_sample(name: str, steps: int) -> Prompt:
    return {
        **text_to_image(seed=21, model="lora"),
        **train(name, steps, preview_prompt="a [trigger] star", preview_every=2),
        "wait": node("ChromaWaitForTraining", job=["train", 0]),
        "lora": node("ChromaApplyLora", model=["load", 0], lora="none", strength=1.0, lora_name=["wait", 1]),
        "losses": node("LossGraphNode", loss=["wait", 2], filename_prefix="loss"),
        "copy": node("SaveLoRA", lora=["wait", 0], prefix="copies/lora"),
    }


def test_train_wait_and_sample_in_one_prompt(server: Host, without_training: dict):
    prompt = train_wait_sample("one prompt", STEPS)
    history = server.run(prompt)
    (found,) = server.images({"outputs": {"save": history["outputs"]["save"]}})
    assert not np.array_equal(np.asarray(found), without_training[21])
    done = status(server, job_of(history))
    assert done["state"] == "completed" and done["step"] == STEPS
    copy = load_file(max((server.base / "output" / "copies").glob("*.safetensors")))
    trained = load_file(server.base / done["lora_path"])
    assert copy.keys() == trained.keys() and all((copy[key] == trained[key]).all() for key in copy)
    assert any(key.endswith(".alpha") for key in copy), "the host's loaders find the alpha"

    again = server.run(prompt)
    replayed = server.nodes_replayed(again)
    assert {"train", "wait", "lora", "sample"} <= replayed, "nothing changed, so nothing runs again"

    prompt["lora"]["inputs"] = {"model": ["load", 0], "lora": ["wait", 1], "strength": 1.0}
    (linked,) = server.images({"outputs": {"save": server.run(prompt)["outputs"]["save"]}})
    assert np.array_equal(np.asarray(linked), np.asarray(found)), "the name may be linked into the list itself"


def test_status_is_never_replayed(server: Host, job: str):
    prompt = train(status(server, job)["name"], ENDLESS)
    prompt["status"] = node("ChromaTrainingStatus", job=["train", 0])
    texts = []
    for _ in range(2):
        texts.append(server.run(prompt)["outputs"]["status"]["text"][0])
        step = status(server, job)["step"]
        until(server, job, lambda now, seen=step: now["step"] > seen)
    assert texts[0] != texts[1] and job in texts[0] and f"of {ENDLESS}" in texts[0]


def test_a_status_before_the_first_step_shows_words_and_no_black_image(server: Host):
    """All that an app form shows of a training that has just begun."""
    prompt = train("just begun", ENDLESS)
    prompt["status"] = node("ChromaTrainingStatus", job=["train", 0])
    entry = server.run(prompt)
    job = next(each for each in server.get("/chromakit/jobs") if each["name"] == "just begun")
    server.post(f"/chromakit/jobs/{job['id']}/stop")
    images = server.images({"outputs": {"status": entry["outputs"]["status"]}}, "temp")
    assert all(image.getextrema() != ((0, 0),) * 3 for image in images) and images[-1].size == (768, 432)


def test_cancelling_the_wait_stops_and_saves(server: Host):
    prompt = train_wait_sample("cancelled wait", ENDLESS)
    prompt_id = server.post_prompt(prompt)
    jobs = waiting.until(lambda: [j["id"] for j in server.get("/chromakit/jobs") if j["name"] == "cancelled wait"])
    (job,) = jobs
    until(server, job, lambda now: now["state"] == "running" and now["step"] >= 2)
    server.post("/interrupt")
    entry = server.wait(prompt_id, check=False)
    assert entry["status"]["messages"][-1][0] == "execution_interrupted"
    found = until(server, job, lambda now: now["state"] == "stopped")
    assert (server.base / found["lora_path"]).is_file() and 2 <= found["step"] < ENDLESS


def test_adapter_optimizer_and_data_settings_reach_the_job(server: Host):
    """Every widget of the two nodes, at its default or another value, through a job that really trains."""

    prompt = train("many settings", settings=["settings", 0])
    others = {"adapter": "dora", "optimizer": "adafactor", "loss": "huber", "ema_decay": 0.9, "text_padding": "zero"}
    prompt["settings"] = at_defaults(server, "ChromaTrainingSettings", **others, lr_schedule="polynomial")
    data = {"folder": "sks_emblem", "trigger": "sks", "tag_shuffles": 1, "alignment": 32, "crop": "random"}
    prompt["dataset"] = at_defaults(server, "ChromaDataset", **data)
    job = job_of(server.run(prompt))
    assert until_not(server, job) == "completed", server.get(f"/chromakit/jobs/{job}")["message"]
    status = server.get(f"/chromakit/jobs/{job}")
    config = status["config"]
    assert (config["lora"]["kind"], config["optimizer"], config["objective"]["loss"]) == ("dora", "adafactor", "huber")
    assert (config["dataset"]["alignment"], config["dataset"]["crop"]) == (32, "random")
    assert any(name.endswith("-ema.safetensors") for name in server.get("/models/loras"))
