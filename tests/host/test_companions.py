"""Companion nodes: an option means the same there as on the node they are linked to; left alone, it says nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from _host import Host, PromptFailed
from prompts import Prompt, at_defaults, load, node, text_to_image

SUBJECTS = ("Optimizer", "Noise", "Preview", "Saving", "Adapter", "Speed")


def image(server: Host, prompt: Prompt) -> np.ndarray:
    return np.asarray(server.images(server.run(prompt))[0])


def test_every_option_of_the_settings_belongs_to_one_subject(server: Host):
    def names(id_: str) -> list[str]:
        found = server.get(f"/object_info/{id_}")[id_]["input"]
        return sorted({**found.get("required", {}), **found["optional"]}.keys() - {"settings"})

    by_subject = sorted(name for subject in SUBJECTS for name in names(f"Chroma{subject}Settings"))
    assert by_subject == names("ChromaTrainingSettings")


def test_sampler_options_are_the_samplers_own_widgets(server: Host):
    chosen = {"method": "heun", "spacing": "beta", "end_step": 3}
    linked = text_to_image(steps=4)
    linked["options"] = at_defaults(server, "ChromaSamplerOptions", **chosen)
    linked["sample"]["inputs"]["options"] = ["options", 0]
    plain = text_to_image(steps=4)
    own = text_to_image(steps=4, **chosen)
    assert np.array_equal(image(server, linked), image(server, own))
    assert not np.array_equal(image(server, plain), image(server, own))
    linked["sample"]["inputs"]["method"] = "heun"  # said on both, and the same
    assert np.array_equal(image(server, linked), image(server, own))
    linked["sample"]["inputs"]["method"] = "unipc"
    with pytest.raises(PromptFailed, match="method is 'unipc' on Chroma Sampler, and 'heun' in the options"):
        server.run(linked)


def job(server: Host, dataset: dict[str, Any], settings: dict[str, Any] | None = None, **more: Any) -> str:
    """The id of the job of one step that these nodes mean; `more` are the nodes that they are linked to."""
    links = {"model": ["load", 0], "text_encoder": ["load", 1], "dataset": ["set", 0]}
    prompt = {
        **load(),
        **more,
        "set": at_defaults(server, "ChromaDataset", folder="sks_emblem", trigger="sks", **dataset),
        "train": at_defaults(server, "ChromaTrainLora", **links, name="companions", steps=1, rank=1, target="tiny"),
    }
    if settings is not None:
        prompt["train"]["inputs"]["settings"] = settings
    (found,) = server.run(prompt)["outputs"]["train"]["chromakit_job"]
    return found


def test_a_job_is_the_same_by_companions_and_by_its_own_widgets(server: Host):
    subjects = {
        name: at_defaults(
            server, f"Chroma{name}Settings", **({"settings": [SUBJECTS[i - 1], 0]} if i else {})
        )
        for i, name in enumerate(SUBJECTS)
    }  # fmt: skip
    nothing = at_defaults(server, "ChromaDatasetOptions")
    plain = job(server, {})
    assert job(server, {"options": ["few", 0]}, [SUBJECTS[-1], 0], few=nothing, **subjects) == plain

    chosen = {"lr_schedule": "cosine", "preview_guidance": 2.0, "preserve_prompts": "a dog\na cat"}
    all_ = at_defaults(server, "ChromaTrainingSettings", **chosen)
    own = job(server, {"flip": True, "more_resolutions": "32"}, ["all", 0], all=all_)
    assert own != plain
    subjects["Optimizer"]["inputs"]["lr_schedule"] = "cosine"
    subjects["Preview"]["inputs"]["preview_guidance"] = 2.0
    subjects["Adapter"]["inputs"]["preserve_prompts"] = chosen["preserve_prompts"]
    some = at_defaults(server, "ChromaDatasetOptions", flip=True, more_resolutions="32")
    assert job(server, {"options": ["few", 0]}, [SUBJECTS[-1], 0], few=some, **subjects) == own

    clash = at_defaults(server, "ChromaTrainingSettings", lr_schedule="linear", settings=["Optimizer", 0])
    with pytest.raises(PromptFailed, match="lr_schedule is 'linear' on Chroma Training Settings, and 'cosine'"):
        job(server, {}, ["all", 0], all=clash, Optimizer=subjects["Optimizer"])


def test_an_option_that_images_from_nodes_lack_is_refused(server: Host):
    prompt = {
        "few": at_defaults(server, "ChromaDatasetOptions", caption_column="other"),
        "image": node("EmptyImage", width=64, height=64, batch_size=1, color=255),
        "set": at_defaults(
            server, "ChromaDatasetFromImages", images=["image", 0], captions="a square", options=["few", 0]
        ),
    }
    with pytest.raises(PromptFailed, match="Chroma Dataset from Images has no caption_column"):
        server.run(prompt)
    prompt["few"]["inputs"]["caption_column"] = "text"
    prompt["set"]["inputs"]["options"] = {"caption_column": "text"}
    with pytest.raises(PromptFailed, match="takes nothing but a link, e.g. from Chroma Dataset Options"):
        server.run(prompt)
