"""API-format prompts that the host tests post: small, on `tiny`."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest

from _host import Host, PromptFailed
from waiting import until

Result = TypeVar("Result")
Prompt = dict[str, dict[str, Any]]
EXAMPLES = "sks_emblem"
ACTIVE = ("queued", "preparing", "running", "paused")
"""States of a job that is not over."""


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def at_defaults(server: Host, class_type: str, **inputs: Any) -> dict[str, Any]:
    """A node with every widget at its default but these."""
    groups = server.get(f"/object_info/{class_type}")[class_type]["input"]
    found: dict[str, Any] = {}
    for name, (_, *options) in (groups["required"] | groups.get("optional", {})).items():
        values = options[0] if options else {}
        if "default" in values or "options" in values:
            found[name] = values.get("default", values.get("options", [None])[0])
    return node(class_type, **{**found, **inputs})


def load(**inputs: Any) -> Prompt:
    return {
        "load": node("ChromaLoadModel", **{"flavour": "tiny", "precision": "fp32", "text_precision": "fp32", **inputs})
    }


def sampler(model: str = "load", **inputs: Any) -> dict[str, Any]:
    settings = {"seed": 1, "steps": 4, "guidance": 3.0, "tail_bias": 0.0, "denoise": 1.0}
    links = {"model": [model, 0], "positive": ["positive", 0], "negative": ["negative", 0], "latent": ["latent", 0]}
    return node("ChromaSampler", **{**links, **settings, **inputs})


def text_to_image(
    text: str = "a red star on a blue background", size: int = 64, batch: int = 1, **inputs: Any
) -> Prompt:
    """One image; `inputs` go to the sampler."""
    return {
        **load(),
        "positive": node("ChromaTextEncode", text_encoder=["load", 1], text=text, trigger=""),
        "negative": node("ChromaTextEncode", text_encoder=["load", 1], text="", trigger=""),
        "latent": node("ChromaEmptyLatent", width=size, height=size, batch_size=batch),
        "sample": sampler(**inputs),
        "decode": node("VAEDecode", samples=["sample", 0], vae=["load", 2]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="test"),
    }


def dataset(folder: str = EXAMPLES, **inputs: Any) -> dict[str, Any]:
    settings = {"trigger": "sks", "resolution": 0, "repeats": 1, "caption_dropout": 0.1, "default_caption": ""}
    return node("ChromaDataset", folder=folder, **{**settings, **inputs})


def train(name: str, steps: int = 4, **inputs: Any) -> Prompt:
    """A training job on the bundled images; `inputs` go to the train node. A preview takes two steps, unless `inputs`
    bring settings."""
    settings = {
        "rank": 2, "alpha": 0.0, "learning_rate": 2e-3, "target": "tiny", "batch_size": 1, "seed": 1,
        "preview_prompt": "", "preview_every": 0, "if_exists": "keep",
    }  # fmt: skip
    links = {"model": ["load", 0], "text_encoder": ["load", 1], "dataset": ["dataset", 0]}
    prompt = {**load(), "dataset": dataset()}
    if inputs.get("preview_prompt") and "settings" not in inputs:
        prompt["previews"] = node("ChromaPreviewSettings", preview_steps=2)
        links["settings"] = ["previews", 0]
    return prompt | {"train": node("ChromaTrainLora", name=name, steps=steps, **{**links, **settings, **inputs})}


def message_of(server: Host, prompt: dict) -> str:
    """The error on the node: one paragraph."""
    with pytest.raises(PromptFailed) as failed:
        server.run(prompt)
    message = failed.value.exception_message.strip()
    assert message and "\n" not in message and "Traceback" not in message
    return message


def job_of(history: dict[str, Any]) -> str:
    """The job id that a prompt with a train node ended with."""
    return history["outputs"]["train"]["chromakit_job"][0]


def until_not(server: Host, job: str, states: tuple[str, ...] = ACTIVE) -> str:
    """The job's state once it has left `states`."""
    return until(lambda: (now := server.get(f"/chromakit/jobs/{job}")["state"]) not in states and now, f"{job}'s end")


def interrupted(server: Host, prompt_id: str) -> bool:
    """Cancel a prompt that is at work, and whether it ended so. The host forgets a Cancel that comes before the prompt
    has begun, so it is asked until the prompt has ended."""

    def ended() -> dict[str, Any] | None:
        server.post("/interrupt", {"prompt_id": prompt_id})
        return server.finished(prompt_id)

    return until(ended, "the interrupted prompt's end", interval=0.1)["status"]["messages"][-1][0] == (
        "execution_interrupted"
    )


def finish(work: Coroutine[Any, Any, Result]) -> Result:
    """Run a coroutine to its end, in a thread of its own: Playwright keeps an event loop in the tests' one."""
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(asyncio.run, work).result()
