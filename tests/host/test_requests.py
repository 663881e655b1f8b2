"""Inference requests over HTTP: what is refused, what is queued, and that all roads lead to the same image."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from _host import Host
from chroma_core.cli.main import main
from chroma_core.loading.load import transformer_outline
from chroma_core.loading.spec import ModelSpec
from chroma_core.lora.files import write_lora
from lora_cases import random_lora
from prompts import node, text_to_image
from waiting import until
from weight_files import remove_files, tiny_checkpoint

URL = "/chromakit/requests"
TINY: dict[str, Any] = {"model": "tiny", "precision": "fp32", "text_precision": "fp32", "offload": "none"}
PROMPT: dict[str, Any] = {"prompt": "a red star on a blue background", "sample_steps": 3}


@pytest.fixture(scope="module", autouse=True)
def loras(server: Host) -> Path:
    """In the host's LoRA folder: one for tiny, one of another model, one for part of tiny, no LoRA, no safetensors."""
    folder = server.base / "models" / "loras" / "requests"
    folder.mkdir(parents=True, exist_ok=True)
    fitting = random_lora(transformer_outline(ModelSpec("tiny")), "all", rank=2, size=0.4)
    write_lora(folder / "fits.safetensors", fitting)
    other = {f"transformer.blocks.9.attn.lora_{side}.weight": torch.zeros(4, 4) for side in "AB"}
    save_file(other, folder / "other.safetensors")
    save_file({"weight": torch.zeros(2)}, folder / "none.safetensors")
    (folder / "broken.safetensors").write_bytes(b"not a file of tensors")
    save_file({"a.lora_A.weight": torch.zeros(4, 4)}, server.base / "outside.safetensors")
    return folder


def with_prompt(**fields: Any) -> dict[str, Any]:
    return {**TINY, "prompts": [PROMPT, {**PROMPT, **fields}]}


def with_lora(path: Any, **fields: Any) -> dict[str, Any]:
    return {**TINY, "prompts": [PROMPT], "loras": [{"path": path, **fields}]}


def with_field(**fields: Any) -> dict[str, Any]:
    return {**TINY, "prompts": [PROMPT], **fields}


MALFORMED: list[tuple[Any, str]] = [
    # (body, what the answer must contain: the field, what was found or what to do)
    ("{", "not valid JSON"),
    ("", "not valid JSON"),
    ('{"prompts": [], "prompts": [{"prompt": "a"}]}', "the key 'prompts' stands twice"),
    ([PROMPT], "it is a list, and must be a JSON object"),
    (None, "it is null, and must be a JSON object"),
    ("a prompt", "it is a text"),
    ({}, "prompts is missing"),
    (with_field(prompts=[]), "prompts is empty; give at least one"),
    (with_field(prompts=PROMPT), "prompts is {'prompt'"),
    (with_field(prompts=["a star"]), 'prompts[0] is "a star", and must be a JSON object'),
    (with_field(prompts=[PROMPT] * 65), "prompts has 65 items; at most 64"),
    (with_field(prompts=[{"width": 64}]), "prompts[0].prompt is missing"),
    (with_prompt(prompt=7), "prompts[1].prompt is 7, and must be a text"),
    (with_prompt(prompt="a" * 10_001), "prompts[1].prompt has 10001 characters; at most 10000"),
    (with_prompt(width=63), "prompts[1].width is 63, and must be between 64 and 4096"),
    (with_prompt(height=4097), "prompts[1].height is 4097, and must be between 64 and 4096"),
    (with_prompt(width="64"), 'prompts[1].width is "64", and must be a whole number'),
    (with_prompt(width=64.5), "prompts[1].width is 64.5, and must be a whole number"),
    (with_prompt(height=True), "prompts[1].height is true, and must be a whole number"),
    (with_prompt(sample_steps=0), "prompts[1].sample_steps is 0, and must be between 1 and 150"),
    (with_prompt(sample_steps=151), "prompts[1].sample_steps is 151, and must be between 1 and 150"),
    (with_prompt(guidance_scale=-0.1), "prompts[1].guidance_scale is -0.1, and must be between 0 and 20"),
    (with_prompt(guidance_scale=20.5), "prompts[1].guidance_scale is 20.5, and must be between 0 and 20"),
    (with_prompt(guidance_scale=float("nan")), "prompts[1].guidance_scale is nan, and must be a finite number"),
    (with_prompt(seed=-2), "prompts[1].seed is -2, and must be between -1 and 9007199254740991"),
    (with_prompt(seed=2**53), "prompts[1].seed is 9007199254740992, and must be between"),
    (with_prompt(seed="random"), 'prompts[1].seed is "random", and must be a whole number'),
    (with_prompt(prompt=None), "prompts[1].prompt is null, and must be a text"),
    (with_prompt(steps=20), "prompts[1].steps is not a known field (did you mean sample_steps?)"),
    (with_prompt(prompt="a [trigger] star"), "prompts[1].prompt is \"a [trigger] star\" and contains [trigger]"),
    (with_prompt(neg="no [trigger]"), "prompts[1].neg is \"no [trigger]\" and contains [trigger]"),
    (with_prompt(prompt="[trigger]", trigger_word=" "), "neither the prompt nor the request has a trigger_word"),
    (with_field(trigger_word="a [trigger]"), "trigger_word is \"a [trigger]\""),
    (with_field(trigger_word=5), "trigger_word is 5, and must be a text"),
    (with_field(model="sdxl"), "model is \"sdxl\": there is no Chroma flavour 'sdxl'. Choose one of: base"),
    (with_field(model=None), "model is null, and must be a text"),
    (with_field(lora=[]), "lora is not a known field (did you mean loras?)"),
    (with_field(recipe="best"), "recipe is \"best\": there is no recipe 'best'"),
    (with_field(precision="int3"), "precision is \"int3\": there is no precision 'int3'"),
    (with_field(offload="disk"), "offload is \"disk\""),
    (with_field(lora_mode="fused"), "lora_mode is \"fused\""),
    (with_field(transformer="../secret.safetensors"), "There is no transformer '../secret.safetensors' in ComfyUI's"),
    (with_field(folder="/etc"), "There is no model '/etc' in models/diffusers"),
    (with_field(loras="fits"), 'loras is "fits", and must be a list'),
    (with_field(loras=[{"path": "requests/fits"}] * 17), "loras has 17 items; at most 16"),
    (with_field(loras=[{"network_multiplier": 1}]), "loras[0].path is missing"),
    (with_lora("requests/fits", strength=1), "loras[0].strength is not a known field (known are path"),
    (with_lora("requests/fits", network_multiplier=2.01), "loras[0].network_multiplier is 2.01, and must be between"),
    (with_lora("requests/fits", network_multiplier="1"), 'loras[0].network_multiplier is "1", and must be a number'),
    (with_lora(""), "loras[0].path is an empty text"),
    (with_lora("nowhere.safetensors"), "loras[0].path: there is no LoRA 'nowhere.safetensors' in ComfyUI's"),
    (with_lora("../../outside.safetensors"), "loras[0].path: there is no LoRA '../../outside.safetensors'"),
    (with_lora("requests/../../../outside.safetensors"), "loras[0].path: there is no LoRA"),
    (with_lora("/etc/passwd"), "loras[0].path: there is no LoRA '/etc/passwd'"),
    (with_lora("requests/other"), "loras[0].path"),
    (with_lora("requests/none"), "is not a LoRA that can be applied"),
    (with_lora("requests/broken"), "is not a readable safetensors file"),
]  # fmt: skip


def send(server: Host, body: Any) -> tuple[int, dict[str, Any]]:
    """(status, answer) of one request; a text is sent as it stands."""
    if not isinstance(body, str) or body == "a prompt":
        return server.post(URL, "a prompt" if body == "a prompt" else body) if body is not None else raw(server, "null")
    return raw(server, body)


def raw(server: Host, text: str) -> tuple[int, dict[str, Any]]:
    import urllib.error
    import urllib.request

    declared = {"Content-Type": "application/json"}
    asked = urllib.request.Request(server.url + URL, data=text.encode(), headers=declared, method="POST")
    try:
        with urllib.request.urlopen(asked, timeout=120) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def finished(server: Host, id_: str) -> dict[str, Any]:
    return until(
        lambda: (now := server.get(f"{URL}/{id_}"))["state"] not in ("queued", "running") and now, "the request's end"
    )


def paint(server: Host, body: dict[str, Any]) -> tuple[dict[str, Any], list[np.ndarray]]:
    """A request's last answer and its images."""
    status, answer = server.post(URL, body)
    assert status == 200, answer
    answer = finished(server, answer["id"])
    assert answer["state"] == "done", answer
    return answer, [pixels(server, url) for prompt in answer["prompts"] for url in prompt["images"]]


def pixels(server: Host, url: str) -> np.ndarray:
    status, body = server.request("GET", url)
    assert status == 200
    return np.asarray(Image.open(io.BytesIO(body)).convert("RGB"))


def test_malformed_requests_are_refused_precisely_and_queue_nothing(server: Host):
    assert len(MALFORMED) >= 40
    before = (server.get("/prompt"), len(server.get("/history")))
    for body, expected in MALFORMED:
        status, answer = send(server, body)
        message = answer.get("error", "")
        assert status == 400, (body, answer)
        assert expected in message and "\n" not in message and "Traceback" not in message, (body, message)
    assert (server.get("/prompt"), len(server.get("/history"))) == before


def test_request_command_line_and_nodes_paint_the_same_bits_at_two_strengths(
    server: Host, loras: Path, tmp_path, capsys
):
    """With a LoRA at two strengths. Also: sizes are floored and reported, seeds count up, a negative counts."""
    body = {
        **TINY,
        "trigger_word": "star",
        "prompts": [
            {**PROMPT, "prompt": "a red [trigger] on a blue background", "width": 70, "height": 100, "neg": "green"},
            {**PROMPT, "trigger_word": "circle", "prompt": "a [trigger]", "guidance_scale": 1.0},
        ],
        "loras": [{"path": "requests/fits", "network_multiplier": 0.8}],
    }
    answer, (first, second) = paint(server, body)
    expected = [
        {"prompt": "a red star on a blue background", "neg": "green", "width": 64, "height": 96, "seed": 42},
        {"prompt": "a circle", "neg": "", "width": 64, "height": 64, "seed": 43, "guidance_scale": 1.0},
    ]
    for found, wanted in zip(answer["prompts"], expected, strict=True):
        assert wanted.items() <= found.items() and found["steps_done"] == found["sample_steps"] == 3
    assert first.shape == (96, 64, 3)

    weaker = {**body, "loras": [{"path": "requests/fits.safetensors", "network_multiplier": -0.5}]}
    _, (first_weaker, _) = paint(server, weaker)
    assert not np.array_equal(first, first_weaker)

    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file, asked in zip(files, (body, weaker), strict=True):
        local = [{**asked["loras"][0], "path": str(loras / "fits.safetensors")}]
        file.write_text(json.dumps({**asked, "loras": local}))
    out = ["--output", str(tmp_path), "--device", "cpu"]
    assert main(["request", *map(str, files), "--json", *out]) == 0
    made = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    cli = [np.asarray(Image.open(prompt["file"])) for result in made for prompt in result["prompts"]]
    for seen, wanted in zip(cli[:3], (first, second, first_weaker), strict=True):
        assert np.array_equal(seen, wanted)

    prompt = text_to_image("a red star on a blue background", seed=42, steps=3, guidance=3.0, model="lora")
    prompt["negative"]["inputs"]["text"] = "green"
    prompt["latent"]["inputs"] |= {"width": 64, "height": 96}
    prompt["lora"] = node("ChromaApplyLora", model=["load", 0], lora="requests/fits.safetensors", strength=0.8)
    (nodes,) = server.images(server.run(prompt))
    assert np.array_equal(np.asarray(nodes), first)

    options = ["--flavour", "tiny", "--precision", "fp32", "--text-precision", "fp32", "--steps", "3"]
    options += ["--prompt", expected[0]["prompt"], "--negative", "green", "--width", "64", "--height", "96"]
    assert main(["sample", *options, "--lora", f"{loras / 'fits.safetensors'}@0.8", *out]) == 0
    (sampled,) = capsys.readouterr().out.split()
    assert np.array_equal(np.asarray(Image.open(sampled)), first)


def test_the_image_carries_its_request_and_state_survives_eviction(server: Host):
    status, answer = server.post(URL, {**TINY, "prompts": [{**PROMPT, "seed": -1}]})
    assert status == 200 and answer["id"] in answer["status_url"]
    answer = finished(server, answer["id"])
    (prompt,) = answer["prompts"]
    assert 0 <= prompt["seed"] < 2**32
    _, body = server.request("GET", prompt["images"][0])
    note = json.loads(Image.open(io.BytesIO(body)).info["chromakit_request"])
    assert note["request"]["prompts"][0]["seed"] == -1 and note["pictures"][0]["seed"] == prompt["seed"]
    server.forget_cached_outputs()
    assert server.get(f"{URL}/{answer['id']}") == answer
    again = {**TINY, "prompts": [{**PROMPT, "seed": prompt["seed"]}]}
    assert np.array_equal(paint(server, again)[1][0], pixels(server, prompt["images"][0]))


def test_cancelling(server: Host):
    """The running one is interrupted, the waiting one never runs, the next one works."""
    long = {**TINY, "prompts": [{**PROMPT, "width": 256, "height": 256, "sample_steps": 150, "seed": -1}]}
    running = server.post(URL, long)[1]["id"]
    waiting = server.post(URL, long)[1]
    assert waiting["state"] == "queued" and waiting["position"] >= 0
    now = until(lambda: (now := server.get(f"{URL}/{running}"))["prompts"][0]["steps_done"] and now, "the first step")
    assert now["state"] == "running"
    for id_ in (waiting["id"], running):
        status, _ = server.post(f"{URL}/{id_}/cancel")
        assert status == 200
    assert finished(server, running)["state"] == "cancelled"
    assert finished(server, waiting["id"])["state"] == "cancelled"
    answer, _ = paint(server, {**TINY, "prompts": [PROMPT]})
    status, refused = server.post(f"{URL}/{answer['id']}/cancel")
    assert status == 409 and "done already" in refused["error"]


def test_a_checkpoint_with_all_parts_is_found_by_name_and_each_is_used(server: Host):
    checkpoints = server.base / "models" / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    darker = {"decoder.conv_out.bias": torch.full((3,), -0.8)}
    save_file(tiny_checkpoint(vae=darker), checkpoints / "darker.safetensors")
    body = {**TINY, "prompts": [PROMPT]}
    _, (plain,) = paint(server, body)
    _, (dark,) = paint(server, {**body, "transformer": "darker.safetensors"})
    _, (again,) = paint(server, {**body, "vae": "darker.safetensors"})
    assert dark.mean() < plain.mean() - 20 and np.array_equal(dark, again)
    remove_files(checkpoints)


def test_failures_say_why_and_foreign_prompts_are_no_requests(server: Host):
    """What shows only when the model is opened, e.g. that a file of the right name is no VAE."""
    vaes = server.base / "models" / "vae"
    vaes.mkdir(parents=True, exist_ok=True)
    save_file({"weight": torch.zeros(2)}, vaes / "no_vae.safetensors")
    status, answer = server.post(URL, {**TINY, "prompts": [PROMPT], "vae": "no_vae.safetensors"})
    assert status == 200, answer
    answer = finished(server, answer["id"])
    assert (
        answer["state"] == "failed" and "no_vae.safetensors" in answer["error"] and not answer["prompts"][0]["images"]
    )
    (vaes / "no_vae.safetensors").unlink()
    ordinary = server.post_prompt(text_to_image(steps=1))
    server.wait(ordinary)
    for id_ in (ordinary, "nothing", "..%2Fjobs"):
        for status, body in (
            server.request("GET", f"{URL}/{id_}"),
            server.request("POST", f"{URL}/{id_}/cancel", {}),
        ):
            assert status == 404 and b"There is no request" in body
