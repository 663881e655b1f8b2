"""The inference request: `[trigger]`, seeds and sizes, what it becomes as a prompt, and how it is carried out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from chroma_core.cli.main import main
from chroma_core.comfy.graph import to_prompt
from chroma_core.errors import ConfigError
from chroma_core.loading.component_cache import ComponentCache
from chroma_core.loading.load import transformer_outline
from chroma_core.loading.spec import ModelSpec
from chroma_core.lora.files import write_lora
from chroma_core.model.images import read_record
from chroma_core.requests.request import InferenceRequest
from chroma_core.requests.run import lora_file, lora_uses, model_spec, part_file, run_request
from lora_cases import random_lora

# The reference's own example, word for word (ai-toolkit-inference, page "chroma").
MINIMAL = """
{
  "model": "chroma",
  "trigger_word": "sks",
  "prompts": [
    {
      "prompt": "[trigger] a photo of a person",
      "width": 1024,
      "height": 1024,
      "seed": 42,
      "sample_steps": 25,
      "guidance_scale": 4.0,
      "neg": ""
    }
  ],
  "loras": [
    {
      "path": "my_lora_job/my_lora.safetensors",
      "network_multiplier": 1.0
    }
  ]
}
"""


def images(prompts: list[dict], random: Iterator[int] | None = None, **fields: object):
    request = InferenceRequest.parse({"prompts": prompts, **fields})
    return request.images(lambda: next(random)) if random else request.images()  # type: ignore[arg-type]


def test_the_references_minimal_request():
    request = InferenceRequest.read(MINIMAL)
    (image,) = request.images()
    assert image.to_dict() == {
        "prompt": "sks a photo of a person", "neg": "", "width": 1024, "height": 1024, "seed": 42, "sample_steps": 25,
        "guidance_scale": 4.0,
    }  # fmt: skip
    assert request.flavour.name == "base"
    assert [(lora.path, lora.network_multiplier) for lora in request.loras] == [("my_lora_job/my_lora.safetensors", 1)]


@pytest.mark.parametrize(
    ("model", "size", "steps", "guidance"),
    [("chroma", 1024, 25, 4.0), ("hd", 1024, 25, 4.0), ("flash", 1024, 12, 1.0), ("tiny", 64, 25, 3.0)],
)
def test_defaults_are_the_models(model: str, size: int, steps: int, guidance: float):
    (image,) = images([{"prompt": "a"}], model=model)
    assert (image.width, image.height, image.sample_steps, image.guidance_scale) == (
        size,
        size,
        steps,
        guidance,
    )
    assert (image.seed, image.neg) == (42, "")


@pytest.mark.parametrize(
    ("asked", "painted"),
    [(64, 64), (95, 64), (96, 96), (1000, 992), (1023, 992), (1024, 1024), (4095, 4064), (4096, 4096)],
)
def test_sizes_are_floored_to_32(asked: int, painted: int):
    for recipe in ("canonical", "comfyui"):
        (image,) = images([{"prompt": "a", "width": asked, "height": 4096}], recipe=recipe)
        assert (image.width, image.height) == (painted, 4096)


@pytest.mark.parametrize(
    ("base", "asked", "seeds"),
    [
        (None, [None, None, None], [42, 43, 44]),
        (None, [None, 7, None], [42, 7, 44]),
        (100, [None, 0, None], [100, 0, 102]),
        (None, [-1, None, -1], [1000, 43, 1001]),
        (-1, [None, None, 5], [1000, 1001, 5]),
        (-1, [-1, None], [1001, 1001]),
        (2**53 - 65, [None, 2**53 - 1], [2**53 - 65, 2**53 - 1]),
    ],
)
def test_seeds(base: int | None, asked: list[int | None], seeds: list[int]):
    prompts = [{"prompt": "a"} | ({} if seed is None else {"seed": seed}) for seed in asked]
    found = images(prompts, iter(range(1000, 1010)), **({} if base is None else {"seed": base}))
    assert [image.seed for image in found] == seeds


def test_random_seeds_differ_and_are_reported():
    found = images([{"prompt": "a", "seed": -1}] * 8)
    assert len({image.seed for image in found}) == 8 and all(0 <= image.seed < 2**32 for image in found)


@pytest.mark.parametrize(
    ("prompt", "own", "job", "expected"),
    [
        ("a [trigger] cat", None, "sks", "a sks cat"),
        ("a [trigger] cat", "ohwx", "sks", "a ohwx cat"),
        ("a [trigger] cat", "ohwx", None, "a ohwx cat"),
        ("a [trigger] cat", "", "sks", "a sks cat"),
        ("a [trigger] cat", "  ", " sks ", "a sks cat"),
        ("[trigger], [trigger]", None, "sks", "sks, sks"),
        ("a cat", "ohwx", "sks", "a cat"),  # never added where it is not asked for
        ("a [Trigger] cat", None, "sks", "a [Trigger] cat"),
        ("a cat", None, None, "a cat"),
    ],
)
def test_trigger(prompt: str, own: str | None, job: str | None, expected: str):
    asked = {"prompt": prompt, "neg": f"no {prompt}", "trigger_word": own}
    (image,) = images([asked], trigger_word=job)
    assert (image.prompt, image.neg) == (expected, f"no {expected}")


@pytest.mark.parametrize("field", ["prompt", "neg"])
@pytest.mark.parametrize("own", [None, "", " "])
def test_trigger_without_a_word_is_an_error(field: str, own: str | None):
    asked = {"prompt": "a", field: "a [trigger]", "trigger_word": own}
    with pytest.raises(ConfigError, match=rf"prompts\[1\].{field} .*neither the prompt nor the request has"):
        images([{"prompt": "a"}, asked])


NULLS = ("width", "height", "seed", "sample_steps", "guidance_scale", "neg", "trigger_word", "ctrl_img", "resolution")


def test_null_is_what_was_left_out():
    """Programs that write down every field send it."""
    plain = InferenceRequest.parse({"prompts": [{"prompt": "a"}], "loras": [{"path": "x"}]})
    asked = {"prompt": "a", **dict.fromkeys((*NULLS, "num_frames", "fps", "sampler"))}
    full = {"trigger_word": None, "prompts": [asked], "loras": [{"path": "x", "network_multiplier": None}]}
    found = InferenceRequest.parse(full)
    assert found == plain and found.remarks == ()
    assert InferenceRequest.parse({"prompts": [{"prompt": "a"}], "loras": None}).loras == ()


def test_a_lora_may_be_applied_in_part():
    asked = {"prompts": [{"prompt": "a"}], "loras": [{"path": "x", "allow_partial": True}]}
    request = InferenceRequest.parse(asked)
    assert [use.allow_partial for use in lora_uses(request, Path)] == [True]
    prompt = to_prompt(request, request.images(), ["x"])
    assert prompt["lora_0"]["inputs"]["allow_partial"] is True
    asked["loras"][0]["allow_partial"] = "yes"
    with pytest.raises(ConfigError, match=r"allow_partial is \"yes\", and must be true or false"):
        InferenceRequest.parse(asked)


def test_whole_numbers_may_have_a_point():
    (found,) = images([{"prompt": "a", "seed": 42.0, "width": 512.0, "sample_steps": 7.0}])
    assert (found.seed, found.width, found.sample_steps) == (42, 512, 7) and isinstance(found.seed, int)


def test_fields_without_effect_are_said():
    found = InferenceRequest.parse(
        {
            "hf_token": "hf_x",
            "priority": 5,
            "prompts": [{"prompt": "a"}, {"prompt": "b", "sampler": "unipc", "num_frames": 1, "metadata": {"a": 1}}],
        }
    )
    assert found.remarks == (
        "hf_token has no effect: what a download needs is the server's, HF_TOKEN.",
        "priority has no effect: there is no such field here.",
        "prompts[1].sampler has no effect: requests use euler.",
        "prompts[1].num_frames has no effect: Chroma makes single images.",
        "prompts[1].metadata has no effect: there is no such field here.",
    )


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"prompts": [{"prompt": "a", "steps": 20}]}, r"prompts\[0\].steps .*did you mean sample_steps"),
        ({"prompts": [{"prompt": "a"}], "loras": [{"path": "x", "scale": 2}]}, r"loras\[0\].scale is not a known"),
        ({"prompts": [{"prompt": "a", "ctrl_img": "x.png"}]}, "no control image"),
        ({"prompts": [{"prompt": None}]}, "must be a text"),
    ],
)
def test_what_would_change_the_image_is_not_passed_over(asked, message):
    with pytest.raises(ConfigError, match=message):
        InferenceRequest.parse(asked)


def test_all_mistakes_are_named_at_once():
    with pytest.raises(ConfigError) as raised:
        InferenceRequest.parse({"prompts": [{"prompt": 1, "width": 5}], "loras": [{}], "recipes": "euler"})
    for part in (
        "prompts[0].prompt is 1",
        "prompts[0].width is 5",
        "loras[0].path is missing",
        "recipes is not a known",
    ):
        assert part in str(raised.value)


def test_the_prompt_has_one_model_for_all_images():
    request = InferenceRequest.parse(
        {
            "prompts": [{"prompt": "a"}, {"prompt": "b"}],
            "loras": [{"path": "x"}, {"path": "y", "network_multiplier": -1}],
        }
    )
    prompt = to_prompt(request, request.images(), ["sub/x.safetensors", "y.safetensors"])
    classes = [node["class_type"] for node in prompt.values()]
    assert classes.count("ChromaLoadModel") == 1 and classes.count("ChromaSampler") == classes.count("SaveImage") == 2
    assert prompt["lora_0"]["inputs"]["model"] == ["load", 0] and prompt["lora_1"]["inputs"]["model"] == ["lora_0", 0]
    assert (prompt["lora_1"]["inputs"]["lora"], prompt["lora_1"]["inputs"]["strength"]) == ("y.safetensors", -1)
    assert all(prompt[f"sample_{i}"]["inputs"]["model"] == ["lora_1", 0] for i in (0, 1))
    links = [v for node in prompt.values() for v in node["inputs"].values() if isinstance(v, list)]
    assert all(key in prompt for key, _ in links)


def test_the_first_block_cache_reaches_the_sampler():
    asked = InferenceRequest.parse({"prompts": [{"prompt": "a"}], "first_block_cache": 0.1})
    assert asked.settings(asked.images()[0]).first_block_cache == 0.1
    assert to_prompt(asked, asked.images(), [])["sample_0"]["inputs"]["first_block_cache"] == 0.1
    plain = InferenceRequest.parse({"prompts": [{"prompt": "a"}]})
    assert "first_block_cache" not in to_prompt(plain, plain.images(), [])["sample_0"]["inputs"]
    with pytest.raises(ConfigError, match="first_block_cache is 2, and must be between 0 and 1"):
        InferenceRequest.parse({"prompts": [{"prompt": "a"}], "first_block_cache": 2})


def test_strengths_change_without_loading_again(tmp_path: Path):
    """One load for all prompts of all requests in live mode; the image's record says what made it."""
    write_lora(tmp_path / "a.safetensors", random_lora(transformer_outline(ModelSpec("tiny")), "all", rank=2))
    loads: list[str] = []
    cache = ComponentCache(on_part=lambda done, total, what: loads.append(what) if done == total else None)
    results = []
    for strength in (1.0, -1.0):
        request = InferenceRequest.parse(
            {
                "model": "tiny", "precision": "fp32", "text_precision": "fp32",
                "prompts": [{"prompt": "a red star", "sample_steps": 1}, {"prompt": "a", "sample_steps": 2}],
                "loras": [{"path": "a.safetensors", "network_multiplier": strength}],
            }
        )  # fmt: skip
        spec = model_spec(request, lambda field, name: part_file(tmp_path, field, name))
        uses = lora_uses(request, lambda name: lora_file(tmp_path, name))
        steps: list[tuple[int, int, int]] = []
        results.append(
            run_request(request, spec, uses, cache, "cpu", tmp_path, lambda *step, steps=steps: steps.append(step))
        )
        assert steps == [(0, 1, 1), (1, 1, 2), (1, 2, 2)]
        if strength == 1.0:
            loaded = len(loads)
    assert loaded and len(loads) == loaded, "nothing is loaded for the second request"
    files = [Path(prompt["file"]) for result in results for prompt in result["prompts"]]
    assert [file.name for file in files] == ["chroma-42.png", "chroma-43.png", "chroma-42-2.png", "chroma-43-2.png"]
    assert files[0].read_bytes() != files[2].read_bytes()
    record = read_record(files[2])
    assert record and record["loras"] == [{"path": "a.safetensors", "network_multiplier": -1.0, "mode": "live"}]
    assert (record["prompt"], record["settings"]["seed"], record["width"]) == ("a red star", 42, 64)


def test_the_command_refuses_before_it_paints(tmp_path: Path, capsys):
    good = {"model": "tiny", "prompts": [{"prompt": "a", "sample_steps": 1}]}
    (tmp_path / "good.json").write_text(json.dumps(good))
    (tmp_path / "bad.json").write_text(json.dumps({**good, "loras": [{"path": "gone.safetensors"}]}))
    arguments = [str(tmp_path / "good.json"), str(tmp_path / "bad.json"), "--output", str(tmp_path / "out")]
    assert main(["request", *arguments]) == 1
    error = capsys.readouterr().err
    assert "loras[0].path: there is no LoRA file 'gone.safetensors'" in error and not (tmp_path / "out").exists()
    assert main(["request", str(tmp_path / "nothing.json")]) == 1
    assert "cannot be read" in capsys.readouterr().err
    assert main(["request", str(tmp_path / "good.json"), "--api-prompt"]) == 0
    assert json.loads(capsys.readouterr().out)["load"]["inputs"]["flavour"] == "tiny"
