"""What docs/security.md promises of web pages, workflows and answers, in a real ComfyUI."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import aiohttp
import pytest
from PIL import Image
from safetensors import safe_open

from _host import Host
from prompts import ACTIVE, at_defaults, dataset, finish, message_of, node, text_to_image, train, until_not
from waiting import PATIENCE

ROUTES = sorted(
    {
        (method.upper(), re.sub(r"\{\w+\}", "none", path))
        for file in (Path(__file__).resolve().parents[2] / "nodes" / "routes").glob("*.py")
        for method, path in re.findall(r'Route\(\s*"(\w+)",\s*"([^"]+)"', file.read_text(encoding="utf-8"))
    }
)
POSTS = [path for method, path in ROUTES if method == "POST"]


def answer(
    server: Host, method: str, path: str, headers: dict[str, str], body: bytes | None = None
) -> tuple[int, bytes]:
    try:
        with urlopen(Request(server.url + path, body, headers, method=method), timeout=120) as found:
            return found.status, found.read()
    except HTTPError as error:
        return error.code, error.read()


def test_every_route_is_known_here():
    assert len(ROUTES) > 40 and {method for method, _ in ROUTES} == {"GET", "POST"}


@pytest.mark.parametrize(
    "headers",
    [{"Sec-Fetch-Site": "cross-site"}, {"Origin": "http://evil.example"}, {"Origin": "http://127.0.0.1:1"}],
    ids=["cross-site", "foreign origin", "another port"],
)
def test_no_route_answers_the_page_of_another_site(server: Host, headers: dict[str, str]):
    """ComfyUI's own rules stand before all of ours, under both of their names."""
    for method, path in ROUTES:
        for prefix in ("", "/api"):
            body = b"{}" if method == "POST" else None
            code, text = answer(server, method, prefix + path, {**headers, "Content-Type": "application/json"}, body)
            assert (code, text) == (403, b""), (method, path)


def test_no_route_answers_under_a_name_of_the_internet_that_leads_here(server: Host):
    """DNS rebinding: for the browser the foreign page and this server are one then, so that it says nothing of it."""
    port = server.url.rpartition(":")[2]
    for method, path in ROUTES:
        headers = {"Host": f"evil.example:{port}", "Content-Type": "application/json"}
        code, text = answer(server, method, path, headers, b"{}" if method == "POST" else None)
        assert code == 403 and f"was asked as 'evil.example:{port}'" in json.loads(text)["error"], (method, path)
    home = ("localhost", "127.0.0.1", "[::1]", "workstation", "workstation.local", "comfy.lan.", "comfy.home.arpa")
    proxies = ("comfy.example.org", "comfy.example.org:443", f"comfy.example.org:{'9' * 5000}")
    for name in (*(f"{each}:{port}" for each in home), "127.0.0.1", *proxies):
        assert answer(server, "GET", "/chromakit", {"Host": name})[0] == 200, name
    for name in (f"EVIL.example.:{port}", f"a.localhost.evil.example:{port}", f"127.0.0.1.evil.example:{port}"):
        assert answer(server, "GET", "/chromakit", {"Host": name})[0] == 403, name


def test_what_a_foreign_page_can_send_without_asking_is_refused(server: Host):
    """A form, plain text, or nothing said: for JSON a browser asks first, and ComfyUI does not allow it."""
    kinds = ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "")
    for path in POSTS:
        for kind in kinds:
            code, text = answer(server, "POST", path, {"Content-Type": kind}, b"{}")
            assert code == 415 and "Content-Type: application/json" in json.loads(text)["error"], (path, kind)
        code, _ = answer(server, "POST", path, {"Content-Type": "application/json; charset=utf-8"}, b"{}")
        assert code != 415, path
        preflight = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
        assert answer(server, "OPTIONS", path, preflight)[0] == 403, path


def test_a_body_has_a_limit(server: Host):
    for path in POSTS:
        code, text = answer(server, "POST", path, {"Content-Type": "application/json"}, b" " * (3 << 20))
        assert code == 413 and "more than 2097152 bytes" in json.loads(text)["error"], path


@pytest.mark.parametrize("value", [7, None, True, {"a": 1}, {"__value__": ["sks_emblem"]}, "\ud800"])
def test_what_is_no_name_is_told_so(server: Host, value: Any):
    words = "must be one of the texts|half a character"
    assert re.search(words, message_of(server, {"dataset": dataset("x") | {"inputs": dataset(value)["inputs"]}}))
    prompt = text_to_image(steps=1, model="lora")
    prompt["lora"] = node("ChromaApplyLora", model=["load", 0], strength=1.0, lora=value)
    assert re.search(words, message_of(server, prompt))


@pytest.mark.parametrize("value", [7, {"lora": {"start_from": "/etc/passwd"}}, {"__value__": [[1, {}]]}])
def test_json_does_not_stand_in_for_a_link(server: Host, value: Any):
    """Least of all settings, which could then name any file."""
    prompt = train("forged", 1, settings=value)
    assert "settings is " in message_of(server, prompt) and "Chroma Training Settings" in message_of(server, prompt)
    prompt = text_to_image(steps=1)
    prompt["sample"]["inputs"]["latent"] = value
    assert "it takes nothing but a link" in message_of(server, prompt)


def test_links_lead_to_other_datasets_and_nowhere_else(server: Host, tmp_path: Path):
    folder = server.base / "input" / "with_links"
    folder.mkdir()
    Image.new("RGB", (64, 64), "red").save(folder / "own.png")
    (folder / "own.txt").write_text("a red square")
    example = Path(__file__).resolve().parents[2] / "example_datasets" / "sks_emblem"
    (folder / "linked.png").symlink_to(example / "01.png")
    (folder / "linked.txt").symlink_to(example / "01.txt")
    (folder / "nowhere.png").symlink_to(tmp_path / "gone.png")
    assert "2 images" in server.run({"dataset": dataset("with_links")})["outputs"]["dataset"]["text"][0]
    (tmp_path / "secret.txt").write_text("a secret")
    (folder / "own.txt").unlink()
    (folder / "own.txt").symlink_to(tmp_path / "secret.txt")
    for told in (
        message_of(server, {"dataset": dataset("with_links")}),
        server.post("/chromakit/datasets/look", {"folder": "with_links"})[1]["error"],
    ):
        assert "links to files that lie elsewhere: own.txt" in told and "dataset_roots" in told


def test_nothing_that_is_told_or_given_away_names_this_machines_folders(server: Host):
    """Neither answers, events and errors, nor images and LoRA files. The paths for resuming stay in job.json."""
    heard: list[str] = []

    async def listen() -> None:
        async with aiohttp.ClientSession() as session, session.ws_connect(f"{server.url}/ws?clientId=other") as socket:
            job = server.post_prompt(train("private", 2, preview_prompt="a [trigger] star", preview_every=2))
            while not heard or '"completed"' not in heard[-1]:
                message = await socket.receive(timeout=PATIENCE)
                if message.type == aiohttp.WSMsgType.TEXT and "chromakit.job" in message.data:
                    heard.append(message.data)
            assert job

    finish(listen())
    job = next(each["id"] for each in server.get("/chromakit/jobs") if each["name"] == "private")
    where = f"/chromakit/jobs/{job}"
    status = server.get(where)
    assert until_not(server, job, ACTIVE) == "completed"
    lora = server.base / status["lora_path"]
    assert status["lora_path"] == f"output/loras/{status['lora_name']}" and lora.is_file()
    assert status["config"]["dataset"]["folder"] == "example_datasets/sks_emblem"
    gets = ("", "/metrics", "/curve", "/log", "/graph/again", "/graph/use", *(f"/samples/{n}" for n in range(2)))
    bodies = [server.request("GET", where + end)[1] for end in gets]
    bodies += [server.request("GET", f"/chromakit/{path}")[1] for path in ("jobs", "plan", "memory", "settings")]
    folder = server.base / "output" / "chromakit" / "jobs" / job
    bodies += [path.read_bytes() for path in (folder / "samples").iterdir()]
    with safe_open(lora, framework="pt") as file:
        bodies.append(json.dumps(file.metadata()).encode())
    bodies.append(message_of(server, {"dataset": dataset("nowhere")}).encode())
    prompt = text_to_image(steps=1, model="lora")
    prompt["lora"] = node("ChromaApplyLora", model=["load", 0], strength=1.0, lora="nowhere")
    bodies += [message_of(server, prompt).encode(), *(text.encode() for text in heard)]
    images = {
        "dataset": at_defaults(server, "ChromaDatasetFromImages", images=["image", 0], captions="a square"),
        "image": node("EmptyImage", width=64, height=64, batch_size=1, color=255),
    }
    bodies.append(json.dumps(server.run(images)).encode())
    places = {str(server.base), str(Path.home()), str(Path(__file__).resolve().parents[2])}
    for place in places:
        assert not [body[:300] for body in bodies if place.encode() in body], place
    disk = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    assert Path(disk["config"]["dataset"]["folder"]).is_absolute()
    # What is told can be sent back.
    code, found = server.post(f"{where}/change", {"changes": {"dataset": status["config"]["dataset"]}})
    assert code == 200 and found["id"] == job, found
