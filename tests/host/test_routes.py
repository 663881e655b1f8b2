"""HTTP under /chromakit, and the broadcasts that pages listen to."""

from __future__ import annotations

import io
from collections.abc import Iterator

import aiohttp
import pytest
from PIL import Image

from _host import Host
from prompts import ACTIVE, finish, job_of, train, until_not
from waiting import PATIENCE, until


@pytest.fixture(scope="module")
def done(server: Host) -> str:
    """A completed job with previews."""
    job = job_of(server.run(train("routes", 3, preview_prompt="a [trigger] star\na red circle", preview_every=2)))
    assert until_not(server, job, ACTIVE) == "completed"
    return job


@pytest.fixture
def running(server: Host, request: pytest.FixtureRequest) -> Iterator[str]:
    """A job that does not end by itself."""
    job = job_of(server.run(train(request.node.name, 1_000_000, preview_prompt="a [trigger] star")))
    assert until_not(server, job, ("queued", "preparing")) == "running"
    until(lambda: server.get(f"/chromakit/jobs/{job}")["step"] >= 1, "the first step")
    yield job
    server.post(f"/chromakit/jobs/{job}/stop")
    until_not(server, job, ACTIVE)


def test_jobs(server: Host, done: str):
    assert done in [job["id"] for job in server.get("/chromakit/jobs")]
    found = server.get(f"/chromakit/jobs/{done}")
    expected = {
        "id", "name", "state", "step", "steps", "loss", "loss_smooth", "lr", "step_seconds", "eta_seconds", "message",
        "warnings", "lora_path", "lora_name", "samples", "heldout_loss_base", "heldout_loss", "train_seconds",
        "yielded", "config", "created", "updated",
    }  # fmt: skip
    assert expected <= set(found)
    assert (found["id"], found["name"], found["step"], found["steps"]) == (done, "routes", 3, 3)


def test_metrics(server: Host, done: str):
    losses = [line["loss"] for line in server.get(f"/chromakit/jobs/{done}/metrics") if "loss" in line]
    assert len(losses) == 3 and all(loss > 0 for loss in losses)


def test_samples_by_number(server: Host, done: str):
    names = server.get(f"/chromakit/jobs/{done}")["samples"]
    assert len(names) == 2 * 3  # two prompts at steps 0, 2 and 3
    for number in range(len(names)):
        code, body = server.request("GET", f"/chromakit/jobs/{done}/samples/{number}")
        assert code == 200 and Image.open(io.BytesIO(body)).size == (64, 64)
    for wrong in ("6", "-1", "x", "..%2F..%2Fjob.json", names[0]):
        assert server.request("GET", f"/chromakit/jobs/{done}/samples/{wrong}")[0] == 404


@pytest.mark.parametrize("job", ["nothing", "..", "..%2F..%2Floras", "%00"])
def test_unknown_ids(server: Host, done: str, job: str):
    for path in (job, f"{job}/metrics", f"{job}/samples/0"):
        assert server.request("GET", f"/chromakit/jobs/{path}")[0] == 404
    code, answer = server.post(f"/chromakit/jobs/{job}/stop")
    assert code in (404, 405)
    if job == "nothing":
        assert code == 404 and "There is no training job 'nothing'" in answer["error"]


def test_actions_that_cannot_be(server: Host, done: str):
    code, answer = server.post(f"/chromakit/jobs/{done}/pause")
    assert code == 409 and "completed" in answer["error"]
    code, answer = server.post(f"/chromakit/jobs/{done}/explode")
    assert code == 409 and "pause" in answer["error"]
    assert server.request("GET", f"/chromakit/jobs/{done}/stop")[0] in (404, 405), "looking at a link changes nothing"


def test_another_site_may_not_steer(server: Host, running: str):
    async def post() -> int:
        async with aiohttp.ClientSession() as session:
            url = f"{server.url}/chromakit/jobs/{running}/stop"
            async with session.post(url, json={}, headers={"Origin": "http://evil.example"}) as answer:
                return answer.status

    assert finish(post()) == 403
    assert server.get(f"/chromakit/jobs/{running}")["state"] == "running"


def test_sample_now_and_save_now(server: Host, running: str):
    before = server.get(f"/chromakit/jobs/{running}")
    for action in ("save", "sample"):
        code, answer = server.post(f"/chromakit/jobs/{running}/{action}")
        assert code == 200 and answer["id"] == running

    def both_there() -> bool:
        now = server.get(f"/chromakit/jobs/{running}")
        return len(now["samples"]) > len(before["samples"]) and (now["checkpoint"] or 0) > (before["checkpoint"] or 0)

    until(both_there, "previews and a checkpoint")


def test_every_page_hears_of_a_job(server: Host, running: str):
    """The status is broadcast, so a page that did not start the job hears of it too."""

    async def listen() -> dict:
        async with aiohttp.ClientSession() as session, session.ws_connect(f"{server.url}/ws?clientId=other") as socket:
            while True:
                message = await socket.receive(timeout=PATIENCE)
                event = message.json() if message.type == aiohttp.WSMsgType.TEXT else {}
                if event.get("type") == "chromakit.job" and event["data"]["step"] > 0:
                    return event["data"]

    heard = finish(listen())
    assert heard["id"] == running and heard["state"] == "running"


def test_going_on_under_other_options(server: Host):
    job = job_of(server.run(train("goes on", 1)))
    assert until_not(server, job, ACTIVE) == "completed"
    where = f"/chromakit/jobs/{job}"
    code, answer = server.post(f"{where}/extend", {"steps": 1})
    assert (code, answer["id"], answer["steps"]) == (200, job, 2)
    assert until_not(server, job, ACTIVE) == "completed" and server.get(where)["step"] == 2
    code, answer = server.post(f"{where}/change", {"changes": {"learning_rate": 1e-3}})
    assert code == 409 and "learning_rate 0.002 → 0.001" in answer["error"] and "force: true" in answer["error"]
    code, answer = server.post(f"{where}/change", {"changes": {"previews.every": 7}})
    assert (code, answer["state"], answer["config"]["previews"]["every"]) == (200, "completed", 7)
    assert [change["changes"] for change in answer["changes"]] == [{"steps": [1, 2]}, {"previews.every": [0, 7]}]
    for action, body in (("extend", {"steps": "1"}), ("extend", {"steps": True}), ("change", {"change": {}})):
        assert server.post(f"{where}/{action}", body)[0] == 400
    assert server.post(f"{where}/extend", {"steps": -1})[0] == 409
    assert server.post("/chromakit/jobs/nothing/extend", {"steps": 1})[0] == 404

    # Nobody gets at files through it that the nodes would not take; the folders that it has may be given again.
    own = answer["config"]["dataset"]
    elsewhere = {
        "dataset.folder": "/",
        "more_datasets": [{**own, "folder": "/"}],
        "validation_dataset": {"folder": "/"},
        "model.quantised_folder": "/anywhere",
        "model.transformer": "/anywhere.safetensors",
        "lora.start_from": "/anywhere.safetensors",
    }
    for field, value in elsewhere.items():
        code, answer = server.post(f"{where}/change", {"changes": {field: value}, "force": True})
        assert code == 409 and "Files and folders" in answer["error"], field
    assert server.post(f"{where}/change", {"changes": {"dataset": own}})[0] == 200
    assert len(server.get(where)["changes"]) == 2 and server.get(where)["state"] == "completed"


def test_recipes(server: Host):
    found = server.get("/chromakit/recipes")
    assert [each["name"] for each in found["recipes"]] == ["person", "style", "object", "pose"]
    assert found["recipes"][0]["options"]["model"] == {"flavour": "hd"}
    assert found["sources"]["author"]["address"].startswith("https://") and "not been trained here" in found["measured"]
