"""What prompts do while a job trains, in the real host: yield, finish, refuse."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from _host import Host, PromptRejected
from prompts import Prompt, finish, job_of, node, text_to_image, train
from waiting import PATIENCE, until

ENDLESS = 1_000_000
SETTINGS = "/chromakit/settings"
NAME = "prompts_while_training"


def status(server: Host, job: str) -> dict:
    return server.get(f"/chromakit/jobs/{job}")


def act(server: Host, job: str, action: str) -> None:
    code, answer = server.post(f"/chromakit/jobs/{job}/{action}")
    assert code == 200, answer


def goes_on(server: Host, job: str, steps: int = 3) -> dict:
    """The job's status after a few more steps."""
    step = status(server, job)["step"]
    return until(lambda: (now := status(server, job))["step"] >= step + steps and now)


def choose(server: Host, choice: str) -> None:
    code, answer = server.post(SETTINGS, {NAME: choice})
    assert code == 200 and answer[NAME] == choice, answer


def held(server: Host) -> int:
    return server.get(SETTINGS)["held"]


def pending(server: Host) -> list[str]:
    return [item[1] for item in server.get("/queue")["queue_pending"]]


@pytest.fixture(scope="module")
def one_job(server: Host) -> Iterator[str]:
    """A job that does not end by itself."""
    job = job_of(server.run(train("beside prompts", ENDLESS, batch_size=4)))
    yield job
    act(server, job, "stop")
    until(lambda: status(server, job)["state"] == "stopped")


@pytest.fixture
def job(server: Host, one_job: str) -> str:
    """The same one, at work."""
    if status(server, one_job)["state"] == "paused":
        act(server, one_job, "resume")
    until(lambda: (now := status(server, one_job))["state"] == "running" and not now["yielded"])
    goes_on(server, one_job, 2)
    return one_job


@pytest.fixture(autouse=True)
def afterwards_yield(server: Host) -> Iterator[None]:
    yield
    choose(server, "yield")
    server.post("/queue", {"clear": True})
    until(lambda: not server.get("/queue")["queue_running"])


def test_a_prompt_gets_the_machine_within_one_step(server: Host, job: str):
    """The steps that the trainer finished after the prompt was in the queue, by the times of its log's last lines."""
    metrics = server.base / "output" / "chromakit" / "jobs" / job / "metrics.jsonl"
    written: list[float] = []
    watching = threading.Event()

    def watch() -> None:
        size = metrics.stat().st_size
        while not watching.wait(0.002):
            found = metrics.stat()
            if found.st_size != size:
                size = found.st_size
                written.append(found.st_mtime)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for seed in range(3):
            goes_on(server, job)
            step = status(server, job)["step"]
            entry = server.wait(server.post_prompt(text_to_image(seed=seed, steps=8)))
            queued = entry["prompt"][3]["create_time"] / 1000
            messages = dict(entry["status"]["messages"])
            started, ended = (messages[f"execution_{name}"]["timestamp"] / 1000 for name in ("start", "success"))
            after = [moment for moment in written if queued < moment < ended]
            print(
                f"prompt {seed}: {len(after)} step(s) ended after it was queued, "
                f"{[round(moment - queued, 3) for moment in after]} s later; it took {ended - queued:.2f} s; "
                f"a step takes {status(server, job)['step_seconds']} s; at step {step}"
            )
            assert len(after) <= 1
            assert started - queued < 3, "the prompt starts at once"
            goes_on(server, job)
    finally:
        watching.set()
        watcher.join()


def test_finish_first_holds_prompts_and_the_job_goes_on(server: Host, job: str):
    choose(server, "finish")
    prompts = [server.post_prompt(text_to_image(seed=seed)) for seed in (41, 42)]
    step = status(server, job)["step"]
    watched: list[dict] = []
    until(lambda: watched.append(now := status(server, job)) or now["step"] >= step + 5)
    assert not any(now["yielded"] for now in watched)
    assert (pending(server), held(server), server.get("/queue")["queue_running"]) == (prompts, 2, [])
    assert server.get("/prompt")["exec_info"]["queue_remaining"] == 2

    server.post("/queue", {"delete": [prompts[0]]})
    assert (pending(server), held(server)) == (prompts[1:], 1)

    server.forget_cached_outputs()
    assert server.get("/chromakit/memory")["component_bytes"] == {}, "held or not, the worker frees what it is told to"

    act(server, job, "pause")
    assert server.images(server.wait(prompts[1], timeout=PATIENCE)) and held(server) == 0
    assert server.finished(prompts[0]) is None
    act(server, job, "resume")
    assert goes_on(server, job)["state"] == "running"


@pytest.mark.parametrize("choice", ["yield", "refuse"])
def test_another_choice_lets_held_prompts_run(server: Host, job: str, choice: str):
    choose(server, "finish")
    prompt = server.post_prompt(text_to_image(seed=43))
    goes_on(server, job)
    assert server.finished(prompt) is None and held(server) == 1
    choose(server, choice)
    server.wait(prompt, timeout=PATIENCE)
    assert held(server) == 0
    goes_on(server, job)


def light(server: Host, job: str) -> Prompt:
    """Looks at the job, and queues nothing new."""
    prompt = train(status(server, job)["name"], ENDLESS, batch_size=4)
    return {**prompt, "status": node("ChromaTrainingStatus", job=["train", 0])}


@pytest.mark.parametrize("choice", ["finish", "refuse"])
def test_looking_at_jobs_and_queueing_another_stay_possible(server: Host, job: str, choice: str):
    choose(server, choice)
    waiting = [server.post_prompt(text_to_image(seed=44))] if choice == "finish" else []
    history = server.run(light(server, job), timeout=PATIENCE)
    assert job in history["outputs"]["status"]["text"][0]
    other = job_of(server.run(train(f"another {choice}", ENDLESS), timeout=PATIENCE))
    assert status(server, other)["state"] == "queued" and pending(server) == waiting

    act(server, job, "pause")
    until(lambda: status(server, job)["state"] == "paused")
    for prompt in waiting or [server.post_prompt(text_to_image(seed=44))]:
        server.wait(prompt, timeout=PATIENCE)  # a job behind a paused one is not about to begin
    act(server, other, "stop")

    # One branch of a graph: what the chosen outputs do not need does not count.
    act(server, job, "resume")
    until(lambda: status(server, job)["state"] == "running")
    both = {**text_to_image(seed=45), **light(server, job)}
    code, answer = server.post("/prompt", {"prompt": both, "partial_execution_targets": ["status"]})
    assert code == 200, answer
    server.wait(answer["prompt_id"], timeout=PATIENCE)


def test_train_wait_and_sample_in_one_prompt_with_finish_first(server: Host, job: str):
    act(server, job, "stop")
    until(lambda: status(server, job)["state"] == "stopped")
    choose(server, "finish")
    prompt = {
        **text_to_image(seed=46, model="lora"),
        **train("finish in one prompt", 30),
        "wait": node("ChromaWaitForTraining", job=["train", 0]),
        "lora": node("ChromaApplyLora", model=["load", 0], lora="none", strength=1.0, lora_name=["wait", 1]),
    }
    first = server.post_prompt(prompt)
    trained = until(lambda: next((j for j in server.get("/chromakit/jobs") if j["name"] == "finish in one prompt"), 0))
    second = server.post_prompt(text_to_image(seed=47))
    entry = server.wait(first, timeout=PATIENCE)
    assert server.images(entry) and status(server, trained["id"])["state"] == "completed"
    server.wait(second, timeout=PATIENCE)  # held or not, it runs when the job has ended
    act(server, job, "resume")


def test_refused_prompts_say_why(server: Host, job: str):
    choose(server, "refuse")
    for path in ("/prompt", "/api/prompt"):
        code, answer = server.post(path, {"prompt": text_to_image(seed=48)})
        error = answer["error"]
        assert (code, error["type"], answer["node_errors"]) == (400, "chromakit_training", {})
        assert {"type", "message", "details", "extra_info"} == set(error)
        for words in ("'beside prompts'", "step ", f"of {ENDLESS}, about", "Pause the job", "Settings → Chroma"):
            assert words in error["message"]
        assert len(error["message"]) < 140, "the window cuts off what is longer"
    with pytest.raises(PromptRejected):
        server.post_prompt({**light(server, job), **text_to_image(seed=48)})
    code, answer = server.post("/chromakit/requests", {"model": "tiny", "prompts": [{"prompt": "a star"}]})
    assert code == 409 and "'beside prompts'" in answer["error"]
    assert pending(server) == [] and not status(server, job)["yielded"]

    for body in ({}, {"prompt": {}}, {"prompt": []}):
        code, answer = server.post("/prompt", body)
        assert code >= 400 and "chromakit" not in str(answer), "the host has its own words for what is no prompt"

    act(server, job, "pause")
    until(lambda: status(server, job)["state"] == "paused")
    server.run(text_to_image(seed=48), timeout=PATIENCE)
    act(server, job, "resume")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({NAME: "never"}, "'never'; choose one of: yield, finish, refuse"),
        ({NAME: None}, "None; choose one of:"),
        ({NAME: ["yield"]}, "['yield']; choose one of:"),
        ({}, "found nothing"),
        ({NAME: "yield", "more": 1}, f"found {NAME}, more"),
        ([NAME], "found list"),
    ],
)
def test_bad_settings_are_named(server: Host, body: Any, words: str):
    code, answer = server.post(SETTINGS, body)
    assert code == 400 and words in answer["error"]
    assert server.get(SETTINGS) == {NAME: "yield", "choices": ["yield", "finish", "refuse"], "held": 0}


def test_what_is_no_json_is_named(server: Host):
    async def post() -> tuple[int, dict]:
        declared = {"Content-Type": "application/json"}
        async with (
            aiohttp.ClientSession(headers=declared) as session,
            session.post(server.url + SETTINGS, data=b"{") as answer,
        ):
            return answer.status, await answer.json()

    code, answer = finish(post())
    assert code == 400 and "not JSON" in answer["error"]


def test_a_later_version_s_settings_are_left_alone(server: Host):
    assert server.post(SETTINGS, {NAME: "yield"})[0] == 200
    file = server.base / "user/chromakit/settings.json"
    ours, later = file.read_text(), '{"format": 2, "prompts_while_training": "yield", "and": "more"}'
    file.write_text(later)
    try:
        code, answer = server.post(SETTINGS, {NAME: "finish"})
        assert code == 400 and "settings.json' has the format 2, which a later version" in answer["error"]
        assert file.read_text() == later and server.get(SETTINGS)[NAME] == "yield"
    finally:
        file.write_text(ours)


def test_pages_hear_of_a_change(server: Host):
    async def listen() -> dict:
        async with aiohttp.ClientSession() as session, session.ws_connect(f"{server.url}/ws?clientId=page") as socket:
            async with session.post(server.url + SETTINGS, json={NAME: "refuse"}) as answer:
                assert answer.status == 200
            while True:
                message = await socket.receive(timeout=PATIENCE)
                event = message.json() if message.type == aiohttp.WSMsgType.TEXT else {}
                if event.get("type") == "chromakit.settings":
                    return event["data"]

    assert finish(listen()) == {NAME: "refuse", "choices": ["yield", "finish", "refuse"], "held": 0}


def test_nodes_without_device_exist(server: Host, root: Path):
    text = (root / "nodes" / "while_training.py").read_text(encoding="utf-8")
    listed = text.split("frozenset(")[1].split(")")[0].replace('"', " ").replace(",", " ")
    names = [word for word in listed.split() if word.isalpha()]
    assert len(names) >= 15 and not set(names) - set(server.get("/object_info"))
