"""A LoRA is chosen over HTTP: a grid that ComfyUI's queue makes, ratings, what is kept and published."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from _host import Host
from chroma_core.files import sha256_file
from chroma_core.training.jobs.job import FolderLock
from prompts import ACTIVE, at_defaults, job_of, train, until_not
from waiting import until

OWN = "a [trigger] star"


@pytest.fixture(scope="module")
def job(server: Host) -> str:
    """A completed job that kept the LoRAs of its steps 2 and 4."""
    settings = at_defaults(server, "ChromaTrainingSettings", preview_steps=3, preview_guidance=1.0)
    prompt = train("to choose", 4, settings=["settings", 0], preview_prompt=OWN, preview_every=2, rank=4)
    found = job_of(server.run(prompt | {"settings": settings}))
    assert until_not(server, found, ACTIVE) == "completed"
    return found


def ask(server: Host, job: str, end: str, body: dict[str, Any], code: int = 200) -> Any:
    found, answer = server.post(f"/chromakit/jobs/{job}/{end}", body)
    assert found == code, answer
    return answer if code == 200 else answer["error"]


def made(server: Host, job: str) -> dict[str, Any]:
    """The grid once all its images are there."""

    def done() -> dict[str, Any] | None:
        grid = server.get(f"/chromakit/jobs/{job}/grid")
        states = {cell["state"] for cell in grid["cells"]}
        assert states <= {"queued", "running", "done", "none"}, grid
        return grid if states == {"done"} else None

    return until(done, "the grid")


def pixels(data: bytes) -> bytes:
    with Image.open(io.BytesIO(data)) as image:
        return image.convert("RGB").tobytes()


def image_of(server: Host, job: str, key: str) -> bytes:
    code, data = server.request("GET", f"/chromakit/jobs/{job}/grid/{key}")
    assert code == 200
    return data


def test_a_lora_is_chosen_kept_and_published(server: Host, job: str):
    where = f"/chromakit/jobs/{job}"
    before = server.get(f"{where}/grid")
    assert (before["choice"], before["own_prompts"], before["cells"]) == (None, ["a sks star"], [])
    choice = {"steps": [2, 4], "strengths": [0.5, 1, 1.5], "prompts": [OWN, "a red circle"]}
    asked = ask(server, job, "grid", choice)
    assert len(asked["cells"]) == 12 and [column["seed"] for column in asked["columns"]] == [42, 43]
    grid = made(server, job)
    by_place = {(cell["step"], cell["strength"], cell["prompt"]): cell["key"] for cell in grid["cells"]}
    images = {place: pixels(image_of(server, job, key)) for place, key in by_place.items()}
    assert len(set(images.values())) > 6, "steps and strengths differ"
    samples = server.get(where)["samples"]
    preview = server.request("GET", f"{where}/samples/{samples.index('step-000004-0.png')}")[1]
    assert images[4, 1, 0] == pixels(preview), "the wall's image, bit for bit"

    key = by_place[4, 1.5, 0]
    graph = server.get(f"{where}/grid/{key}/graph")["prompt"]
    (again,) = server.images(server.run(graph))
    assert again.tobytes() == images[4, 1.5, 0], "the graph gives what the grid shows"
    stock = server.get(f"{where}/grid/{key}/stock")["prompt"]
    assert {"KSampler", "ChromaHostModel"} <= {each["class_type"] for each in stock.values()}
    assert [image.size for image in server.images(server.run(stock))] == [(64, 64)]
    known = len(server.get("/history"))
    assert {cell["state"] for cell in ask(server, job, "grid", choice)["cells"]} == {"done"}
    assert len(server.get("/history")) == known, "nothing is made twice"

    for place, rating in (((4, 1.5, 0), 5), ((4, 1.5, 1), 4), ((2, 1, 0), 5), ((2, 1, 0), 2)):
        grid = ask(server, job, "rate", {"key": by_place[place], "rating": rating})
    assert (grid["best"]["step"], grid["best"]["strength"], grid["best"]["mean"]) == (4, 1.5, 4.5)
    assert server.get(f"{where}/grid") == grid, "kept by the server"

    kept = ask(server, job, "keep", {"key": key})
    lora = server.base / kept["path"]
    assert kept["lora"] == "to-choose-step-000004.safetensors" and kept["stayed"] == []
    source = server.base / "output" / "chromakit" / "jobs" / job / "loras" / "step-000004.safetensors"
    assert sha256_file(lora) == sha256_file(source), "the file as it was kept"
    assert lora.with_suffix(".png").read_bytes() == image_of(server, job, key)
    card = lora.with_suffix(".md").read_text(encoding="utf-8")
    assert "| strength | 1.5 |" in card and "| trigger word | `sks` |" in card and "canonical" in card
    shown = server.request("GET", f"/experiment/models/preview/loras/{_place(server, lora)}/{lora.name}")
    assert shown[0] == 200 and Image.open(io.BytesIO(shown[1])).size == (64, 64), "ComfyUI shows the cover"

    lora.with_suffix(".md").write_text("mine")
    again_kept = ask(server, job, "keep", {"key": by_place[4, 1, 0]})
    assert again_kept["stayed"] == [f"{lora.stem}.md"] and lora.with_suffix(".md").read_text() == "mine"
    assert lora.with_suffix(".png").read_bytes() == image_of(server, job, by_place[4, 1, 0])

    for name in (lora.stem, f"{lora.stem}-2"):
        told = ask(server, job, "publish", {"key": key})
        assert told == {"folder": f"output/chromakit/publish/{name}", "images": 2}
    folder = server.base / told["folder"]
    assert sha256_file(folder / lora.name) == sha256_file(source)
    front = yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---\n")[1])
    assert [entry["output"]["url"] for entry in front["widget"]] == ["images/01.png", "images/02.png"]
    assert (folder / "images" / "01.png").read_bytes() == image_of(server, job, key)


def _place(server: Host, lora: Path) -> int:
    """The number of the LoRA folder that a file is in, as ComfyUI counts them."""
    return next(one["pathIndex"] for one in server.get("/experiment/models/loras") if one["name"] == lora.name)


def test_what_cannot_be_is_said_in_words(server: Host, job: str):
    assert "no LoRA of step 3: there are" in ask(server, job, "grid", {"steps": [3]}, 409)
    assert "steps is empty" in ask(server, job, "grid", {"steps": []}, 400)
    assert "between -4 and 4" in ask(server, job, "grid", {"steps": [2], "strengths": [9]}, 400)
    many = {"steps": [2, 4], "strengths": [0.1 * i for i in range(1, 9)], "prompts": [str(i) for i in range(10)]}
    assert "160 images; at most 120" in ask(server, job, "grid", many, 400)
    grid = ask(server, job, "grid", {"steps": [2], "strengths": [1]})
    key = grid["cells"][0]["key"]
    assert "from 1 to 5" in ask(server, job, "rate", {"key": key, "rating": 6}, 400)
    assert "has no image '../x'" in ask(server, job, "rate", {"key": "../x", "rating": 1}, 404)
    assert server.request("GET", f"/chromakit/jobs/{job}/grid/*")[0] == 404
    made(server, job)
    folder = server.base / "output" / "chromakit" / "jobs" / job
    lock = FolderLock(folder)
    assert lock.take()
    try:
        assert "another process" in ask(server, job, "rate", {"key": key, "rating": 1}, 409)
    finally:
        lock.let_go()
    lora = server.base / "output" / "loras" / "to-choose-step-000002.safetensors"
    whole = lora.read_bytes()
    lora.write_bytes((folder / "loras" / "step-000004.safetensors").read_bytes())
    assert "another than when the grid was made" in ask(server, job, "keep", {"key": key}, 409)
    lora.unlink()
    assert "There is no LoRA file" in ask(server, job, "keep", {"key": key}, 409)
    lora.write_bytes(whole)
    (folder / "grid.json").write_text("{", encoding="utf-8")
    code, text = server.request("GET", f"/chromakit/jobs/{job}/grid")
    assert code == 409 and b"cannot be read as JSON" in text
    (folder / "grid.json").unlink()


def test_the_rest_of_a_grid_is_not_made(server: Host, job: str):
    """While training yields to other prompts they wait in the queue, and can be taken out of it."""
    running = job_of(server.run(train("meanwhile", 1_000_000)))
    try:
        until(lambda: server.get(f"/chromakit/jobs/{running}")["step"] >= 1, "the first step")
        asked = ask(server, job, "grid", {"steps": [2, 4], "strengths": [0.3], "prompts": ["a blue star"] * 2 + ["b"]})
        assert len(asked["cells"]) == 4, "a prompt counts once"
        assert {cell["state"] for cell in made(server, job)["cells"]} == {"done"}, "training yields"
        asked = ask(server, job, "grid", {"steps": [4], "strengths": [-1, -2, -3], "prompts": ["c", "d", "e", "f"]})
        left = ask(server, job, "grid/stop", {})
        assert not {cell["state"] for cell in left["cells"]} & {"queued", "failed"}
        until(lambda: not server.get("/queue")["queue_pending"], "an empty queue")
    finally:
        server.post(f"/chromakit/jobs/{running}/stop")
        until_not(server, running, ACTIVE)
