"""What a user can get wrong: one readable paragraph on the node, and a host that keeps running."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from _host import Host, PromptRejected
from prompts import at_defaults, dataset, load, message_of, node, text_to_image, train
from waiting import until

WIDTH = 160
"""Of tiny's transformer."""
EXAMPLE = Path(__file__).resolve().parents[2] / "example_datasets" / "sks_emblem"


@pytest.fixture(scope="module", autouse=True)
def folders(server: Host) -> None:
    """Data sets of all the wrong kinds in the host's input folder, and a LoRA of another model."""
    inputs = server.base / "input"
    for name in ("empty", "no_captions", "one_unreadable", "wants_trigger"):
        (inputs / name).mkdir(parents=True, exist_ok=True)
    for name in ("no_captions", "one_unreadable", "wants_trigger"):
        Image.new("RGB", (64, 64), "red").save(inputs / name / "good.png")
    shutil.copy(next(EXAMPLE.glob("*.png")), inputs / "one_unreadable" / "fine.png")
    for name in ("good", "fine", "broken"):
        (inputs / "one_unreadable" / f"{name}.txt").write_text("a red square")
    (inputs / "one_unreadable" / "broken.png").write_bytes(b"this is not a picture")
    (inputs / "wants_trigger" / "good.txt").write_text("a [trigger] on a table")
    (inputs / "no_captions" / "good.txt").unlink(missing_ok=True)
    loras = server.base / "output" / "loras"
    loras.mkdir(parents=True, exist_ok=True)
    keys = [f"transformer.blocks.9.attn.lora_{side}.weight" for side in "AB"]
    save_file({key: torch.zeros(4, 4) for key in keys}, loras / "of_another_model.safetensors")
    name = "diffusion_model.double_blocks.0.img_attn.proj"
    huge = {f"{name}.lora_{side}.weight": torch.full((4, WIDTH)[::way], 1e30) for side, way in (("A", 1), ("B", -1))}
    save_file(huge, loras / "far_too_strong.safetensors")


@pytest.fixture(autouse=True)
def the_host_keeps_running(server: Host):
    """After each mistake the next prompt works."""
    yield
    assert server.alive()
    assert len(server.images(server.run(text_to_image(steps=1)))) == 1


def with_dataset(folder: str, **inputs: object) -> dict:
    return {"dataset": dataset(folder, **inputs)}


def with_lora(**inputs: object) -> dict:
    prompt = text_to_image(steps=1, model="lora")
    return {**prompt, "lora": node("ChromaApplyLora", model=["load", 0], strength=1.0, **inputs)}


def test_unknown_flavour(server: Host):
    prompt = text_to_image()
    prompt["load"] = load(flavour="enormous")["load"]
    with pytest.raises(PromptRejected) as rejected:
        server.run(prompt)
    (error,) = rejected.value.node_errors["load"]["errors"]
    assert "enormous" in error["details"] and "tiny" in error["details"]


@pytest.mark.parametrize("folder", ["nowhere", "../output", "/etc", "", "."])
def test_missing_or_foreign_folder(server: Host, folder: str):
    message = message_of(server, with_dataset(folder))
    assert "There is no dataset folder" in message and "input" in message


def test_a_single_text_as_dataset_roots_opens_no_place(server: Host):
    """Its letters are no folders, least of all the first, `/`."""
    settings = server.base / "user" / "chromakit" / "config.toml"
    settings.parent.mkdir(parents=True, exist_ok=True)
    settings.write_text('dataset_roots = "/my/pictures"')
    try:
        assert "not a list of folders" in message_of(server, with_dataset("etc"))
    finally:
        settings.unlink()


def test_empty_folder(server: Host):
    assert "holds no image" in message_of(server, with_dataset("empty"))


def test_no_captions(server: Host):
    message = message_of(server, with_dataset("no_captions"))
    assert "good.png" in message and "caption" in message
    assert "good.png" in message_of(server, with_dataset("no_captions", missing_caption="error"))
    found = server.run(with_dataset("no_captions", default_caption="a red square"))
    assert "1 images" in found["outputs"]["dataset"]["text"][0]


def test_an_unreadable_image_is_counted_and_named(server: Host):
    text = server.run(with_dataset("one_unreadable"))["outputs"]["dataset"]["text"][0]
    assert "2 images" in text and "1 image was skipped" in text and "broken.png" in text


def test_size_zero(server: Host):
    prompt = text_to_image(size=0)
    with pytest.raises(PromptRejected) as rejected:
        server.run(prompt)
    assert "smaller than min of 32" in rejected.value.node_errors["latent"]["errors"][0]["message"]
    prompt["zero"] = node("PrimitiveInt", value=0)
    prompt["latent"]["inputs"].update(width=["zero", 0], height=64)
    assert "width is 0; it must be between 32" in message_of(server, prompt)


def test_a_lora_that_matches_nothing(server: Host):
    message = message_of(server, with_lora(lora="of_another_model.safetensors"))
    assert "another model" in message


def test_a_lora_that_leaves_no_numbers_is_no_black_image(server: Host):
    """Neither by our sampler, nor as a request."""
    message = message_of(server, with_lora(lora="far_too_strong.safetensors"))
    assert "transformer gives at step 1 of 1" in message and "lower their strengths" in message
    request = {
        "model": "tiny",
        "prompts": [{"prompt": "a star", "width": 64, "height": 64, "sample_steps": 1}],
        "loras": [{"path": "far_too_strong.safetensors"}],
    }
    code, answer = server.post("/chromakit/requests", request)
    assert code == 200, answer

    def ended() -> dict | None:
        now = server.get(f"/chromakit/requests/{answer['id']}")
        return now if now["state"] not in ("queued", "running") else None

    found = until(ended)
    assert found["state"] == "failed" and "NaN or infinite" in found["error"]


def test_no_lora_or_an_unknown_one(server: Host):
    assert "No LoRA is chosen" in message_of(server, with_lora(lora="none"))
    assert "no LoRA file '../secret.safetensors'" in message_of(server, with_lora(lora="../secret.safetensors"))


def test_the_hosts_lora_loader_on_our_model_is_refused(server: Host):
    prompt = {
        **load(),
        "model": node("ChromaHostModel", model=["load", 0]),
        "lora": node(
            "LoraLoaderModelOnly", model=["model", 0], lora_name="of_another_model.safetensors", strength_model=1.0
        ),
        "show": node("PreviewAny", source=["lora", 0]),
    }
    assert "Chroma Apply LoRA" in message_of(server, prompt)


def test_unset_trigger(server: Host):
    assert "no trigger word is set" in message_of(server, text_to_image("a [trigger] on a table"))
    assert "no trigger word is set" in message_of(server, with_dataset("wants_trigger", trigger=""))
    prompt = train("untriggered", preview_prompt="a [trigger]")
    prompt["dataset"]["inputs"]["trigger"] = ""
    assert "no trigger word is set" in message_of(server, prompt)


def test_settings_that_contradict_each_other(server: Host):
    prompt = train("contradiction", steps=1)
    prompt["train"]["inputs"]["settings"] = ["settings", 0]
    prompt["settings"] = at_defaults(server, "ChromaTrainingSettings", sigma_minimum=0.9, sigma_maximum=0.1)
    assert "minimum" in message_of(server, prompt)
