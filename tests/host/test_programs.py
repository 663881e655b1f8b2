"""What programs use: the index, the OpenAPI document held to every route, a job as JSON, prompts that run by half."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from openapi_spec_validator import validate
from PIL import Image

from _host import Host, PromptRejected
from openapi_client import Client
from prompts import ACTIVE, EXAMPLES, at_defaults, finish, job_of, text_to_image, train, until_not
from waiting import until

MODEL = {"flavour": "tiny", "precision": "fp32", "text_precision": "fp32"}
JOB: dict[str, Any] = {
    "name": "as json", "steps": 4, "learning_rate": 2e-3, "seed": 1, "model": MODEL,
    "dataset": {"folder": EXAMPLES, "trigger": "sks", "caption_dropout": 0.1},
    "lora": {"rank": 2, "target": "tiny"},
    "previews": {"prompts": ["a [trigger] star"], "every": 2, "steps": 2},
}  # fmt: skip
"""A job file as JSON; the dataset by its name."""


@pytest.fixture(scope="module")
def client(server: Host) -> Client:
    return Client(server.url, server.get("/chromakit")["openapi"])


@pytest.fixture(scope="module")
def done(server: Host, client: Client) -> str:
    """The job, posted and completed."""
    first = client.call("post_jobs", JOB)
    assert first.status == 202 and first.value["state"] in ACTIVE
    assert first.value["status_url"] == f"/chromakit/jobs/{first.value['id']}"
    assert until_not(server, first.value["id"]) == "completed", server.get(first.value["status_url"])["message"]
    return first.value["id"]


def test_a_posted_job_is_the_one_of_the_graph(server: Host, client: Client, done: str):
    """Trained, used by a request, and found again: posted, as a graph, and as its own status tells it."""
    image = {"prompt": "a star", "width": 64, "height": 64, "sample_steps": 1}
    request = {"model": "tiny", "prompts": [image], "loras": [{"path": done}]}
    asked = client.call("post_requests", request).value
    assert server.wait(asked["id"]) and client.call("get_requests_id", id=asked["id"]).value["prompts"][0]["images"]
    graph = train("as json", 4, preview_prompt="a [trigger] star", preview_every=2, settings=["settings", 0])
    graph["settings"] = at_defaults(server, "ChromaTrainingSettings", preview_steps=2)
    assert job_of(server.run(graph)) == done
    status = client.call("get_jobs_id", id=done).value
    for body in (JOB, status["config"]):
        again = client.call("post_jobs", body, checked=False)
        assert (again.status, again.value["id"], again.value["state"]) == (200, done, "completed")


def test_every_operation_answers_as_the_document_says(server: Host, client: Client, done: str):
    validate(client.document)
    routes = {(each["method"].lower(), each["address"]) for each in server.get("/chromakit")["routes"]}
    assert routes == {(method, path) for method, path, _ in client.operations.values()}
    bodies: dict[str, Any] = {
        "post_jobs": {**JOB, "name": "walked", "steps": 1_000_000},
        "post_requests": {"model": "tiny", "prompts": [{"prompt": "a star", "width": 64, "height": 64}]},
        "post_jobs_id_change": {"changes": {"previews.every": 3}},
        "post_jobs_id_branch": {"step": 0, "learning_rate": 1e-3},
        "post_jobs_id_extend": {"steps": 1},
        "post_jobs_id_use": {"step": 4},
        "post_jobs_id_grid": {"steps": [4], "strengths": [1]},
        "post_datasets_look": {"folder": EXAMPLES},
        "post_settings": {"prompts_while_training": "yield"},
    }
    values: dict[str, Any] = {"id": done, "number": 0, "kind": "again", "brief": True, "side": 32, "points": 10}
    (cell,) = client.call("post_jobs_id_grid", bodies["post_jobs_id_grid"], id=done).value["cells"]
    until(lambda: client.call("get_jobs_id_grid", id=done).value["cells"][0]["state"] == "done", "the grid")
    values["key"] = cell["key"]
    bodies |= {f"post_jobs_id_{end}": {"key": cell["key"]} for end in ("keep", "publish")}
    bodies["post_jobs_id_rate"] = {"key": cell["key"], "rating": 5}
    posted = client.call("post_jobs", bodies["post_jobs"]).value["id"]
    for action in ("pause", "resume", "stop"):
        assert client.call("post_jobs_id_action", id=posted, action=action).status == 200
    until_not(server, posted)
    folder = server.base / "input" / "told"
    folder.mkdir()
    for name in ("a.png", "b.tga"):
        Image.new("RGB", (96, 64)).save(folder / name)
    own = {"captions": {"captions": {"a.png": "a star"}}, "crops": {"crops": {"a.png": 0.2}}, "images": {"size": 64}}
    own |= {"remove": {"names": ["a.png"]}, "restore": {"batch": "1"}, "convert": {"names": ["b.tga"]}}
    own |= {
        "mask": {"name": "a.png", "mask": ""},
        "undo": {},
        "redo": {},
        "caption": {"node": "TestTagger"},
        "caption/stop": {},
    }
    bodies |= {f"post_datasets_{end.replace('/', '_')}": {"folder": "told", **body} for end, body in own.items()}
    special = {
        "post_jobs_id_delete": {"id": posted},
        "get_requests_id": {"id": (asked := client.call("post_requests", bodies["post_requests"]).value["id"])},
        "post_requests_id_cancel": {"id": asked},
        "get_datasets_thumbnail": {"folder": "told", "name": "a.png"},
        "get_datasets_caption": {"folder": "told"},
        "get_docs_name": {"name": "guide.md"},
        "get_docs_images_name": {"name": "room.webp"},
        "get_datasets_sheets_id": {
            "id": client.call("post_datasets_look", bodies["post_datasets_look"]).value["sheet"].rpartition("/")[2]
        },
    }
    for name, (_, _, operation) in client.operations.items():
        named = [each["name"] for each in operation["parameters"]]
        given = {key: value for key, value in {**values, **special.get(name, {})}.items() if key in named}
        if name not in ("post_jobs_id_action", "post_jobs"):
            answer = client.call(name, bodies.get(name), **given)
            assert answer.status == 200 or (name, answer.status) == ("post_requests_id_cancel", 409), (name, answer)
        if "id" in named:
            wrong = {**given, "id": "none"} | ({"action": "stop"} if "action" in named else {})
            assert client.call(name, bodies.get(name), **wrong).status == 404, name
        elif "requestBody" in operation:
            assert client.call(name, {"nonsense": 1}, checked=False).status == 400, name
    assert not [name for name, statuses in client.called.items() if not statuses & {200, 202}]
    for left in server.get("/chromakit/jobs?brief=true"):
        if left["state"] in ACTIVE:
            client.call("post_jobs_id_action", id=left["id"], action="stop")
            until_not(server, left["id"])


WRONG: tuple[tuple[dict[str, Any], str], ...] = (
    ({"stpes": 4}, "stpes is not a known option (did you mean steps?)"),
    ({"rank": 4}, "rank is not a known option (did you mean lora.rank?)"),
    ({"lora": {"rnak": 4}}, "did you mean rank?"),
    ({"optimizer": "adamv"}, "Did you mean 'adamw'?"),
    ({"model": {**MODEL, "precision": "int3"}}, "There is no precision 'int3'"),
    ({"model": {"flavor": "tiny"}}, "Did you mean 'flavour'?"),
    ({"dataset": {"folder": "sks_emblm"}}, "Did you mean 'sks_emblem'?"),
    ({"dataset": {"folder": "../../outside"}}, "There is no dataset folder"),
    ({"more_datasets": [{"folder": "/etc"}]}, "There is no dataset folder"),
    ({"validation_dataset": {"folder": "/etc"}}, "There is no dataset folder"),
    ({"model": {"transformer": "/etc/passwd"}}, "There is no transformer '/etc/passwd'"),
    ({"model": {"folder": ".."}}, "There is no model '..'"),
    ({"model": {**MODEL, "tokenizer": "/etc"}}, "model.tokenizer is '/etc'"),
    ({"model": {**MODEL, "quantised_folder": "/tmp"}}, "model.quantised_folder is '/tmp'"),
    ({"model": {**MODEL, "revision": "main"}}, "model.revision is 'main'"),
    ({"lora": {"start_from": "/etc/passwd"}}, "there is no LoRA '/etc/passwd'"),
    ({"previews": {"prompts": ["[trigger]"]}, "dataset": {"folder": EXAMPLES}}, "no trigger word"),
    ({"dataset": {"folder": EXAMPLES, "regularisation": True}}, "is a regularisation set"),
)


def test_a_job_that_cannot_work_is_refused_in_words(server: Host, client: Client):
    before = len(server.get("/chromakit/jobs"))
    for changes, said in WRONG:
        answer = client.call("post_jobs", {**JOB, **changes}, checked=False)
        assert answer.status == 400 and said in answer.value["error"], (changes, answer)
    assert client.call("post_jobs", JOB, checked=False, if_exists="never").status == 400
    away = client.call("post_jobs", {**JOB, "model": {"flavour": "flash"}})
    assert away.status == 409 and "fetch --flavour flash" in away.value["error"]
    assert len(server.get("/chromakit/jobs")) == before


def test_the_examples_of_the_page_run(server: Host, root: Path, tmp_path: Path):
    """docs/programs.md, from its first to its last block, in the order of the page."""
    page = (root / "docs" / "programs.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(sh|python)\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert [kind for kind, _ in blocks] == ["sh", "python", "sh"]
    for kind, text in blocks:
        command = ["bash", "-ec"] if kind == "sh" else [sys.executable, "-c"]
        text = text.replace("http://127.0.0.1:8188", server.url)
        done = subprocess.run([*command, text], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, (text, done.stderr)
    with Image.open(tmp_path / "emblem.png") as image:
        assert image.size == (64, 64)


def test_half_a_prompt_is_told_to_the_page_that_queued_it(server: Host):
    prompt = text_to_image(seed=77)
    prompt["small"] = {**prompt["sample"], "inputs": {**prompt["sample"]["inputs"], "steps": 0}}
    prompt["small"]["_meta"] = {"title": "My sampler"}
    prompt["decode_2"] = {**prompt["decode"], "inputs": {**prompt["decode"]["inputs"], "samples": ["small", 0]}}
    prompt["save_2"] = {**prompt["save"], "inputs": {**prompt["save"]["inputs"], "images": ["decode_2", 0]}}

    async def from_a_page() -> tuple[dict[str, Any], dict[str, Any]]:
        async with aiohttp.ClientSession() as session, session.ws_connect(f"{server.url}/ws?clientId=half") as socket:
            body = {"prompt": prompt, "client_id": "half"}
            async with session.post(f"{server.url}/prompt", json=body) as answer:
                accepted = await answer.json()
            while True:
                event = await socket.receive(60)
                if event.type == aiohttp.WSMsgType.TEXT and event.json()["type"] == "chromakit.prompt_half":
                    return accepted, event.json()["data"]

    accepted, told = finish(from_a_page())
    assert told["prompt_id"] == accepted["prompt_id"]
    (problem,) = told["problems"]
    assert (problem["node"], problem["title"]) == ("small", "My sampler") and "min of 1" in problem["error"]
    assert len(server.images(server.wait(accepted["prompt_id"]))) == 1, "ComfyUI runs what is left"
    with pytest.raises(PromptRejected) as rejected:
        server.post_prompt(prompt)
    assert list(rejected.value.node_errors) == ["small"]
