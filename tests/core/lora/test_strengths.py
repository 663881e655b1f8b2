"""The strength of a LoRA by block and over the steps: what is computed, what is refused, what an image says of it."""

import json

import pytest
import torch
from PIL import Image

from chroma_core.cli.main import main
from chroma_core.errors import ConfigError, LoraError
from chroma_core.loading.component_cache import ComponentCache
from chroma_core.loading.spec import LoraUse, ModelHandle, ModelSpec
from chroma_core.lora.adapters import attach, detach, set_strength
from chroma_core.lora.files import read_lora, write_lora
from chroma_core.lora.strengths import factor_at, follow, layer_strengths, parse_blocks, parse_schedule
from chroma_core.requests.request import InferenceRequest
from chroma_core.requests.run import use_record
from chroma_core.sampling.recipe import CANONICAL
from chroma_core.sampling.sampler import SamplingSettings, sample
from chroma_core.sampling.text import TextCondition
from lora_cases import distance, inputs, predict, random_lora
from miniature import transformer

TINY = ModelSpec("tiny", precision="fp32", text_precision="fp32")


def test_factors_lie_on_straight_lines():
    points = parse_schedule("0:.2, .5:.8, 1:1")
    assert points == ((0.0, 0.2), (0.5, 0.8), (1.0, 1.0))
    places = {0: 0.2, 0.25: 0.5, 0.5: 0.8, 0.75: 0.9, 1: 1.0}
    assert all(factor_at(points, place) == pytest.approx(factor) for place, factor in places.items())
    inner = parse_schedule(".3:-1,\n.6:2")  # the first holds before, the last after
    assert [factor_at(inner, place) for place in (0, 0.3, 0.45, 0.6, 1)] == pytest.approx([-1, -1, 0.5, 2, 2])
    assert parse_schedule("") == () and factor_at((), 0.7) == 1.0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("0.5", "must read like 0:0.2"),
        ("0:", "must read like"),
        ("a:1", "'a' must be a number"),
        ("0:x", "'x' must be a number"),
        ("0:nan", "must be a number"),
        ("0:1e9", "at most 100"),
        ("1.5:1", "0 is the first step and 1 the last"),
        ("-0.1:1", "0 is the first step and 1 the last"),
        ("0:1, .5:1, .5:0", "places must rise"),
        ("1:1, 0:0", "places must rise"),
        (",".join(f"{i / 200}:1" for i in range(150)), "150 parts; at most 100"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(text, says):
    with pytest.raises(ConfigError, match=says):
        parse_schedule(text)
    with pytest.raises(ConfigError, match=says):
        LoraUse("a.safetensors", schedule=text)


def test_blocks_by_either_layout_s_names_and_the_first_that_fits():
    layers = ["transformer_blocks.0.attn.to_q", "transformer_blocks.3.ff.net.2", "single_transformer_blocks.7.proj_mlp"]
    cases = {
        "": [0.5, 0.5, 0.5],
        "double_blocks.0-2:0, single_blocks.*:2": [0.0, 0.5, 1.0],
        "transformer_blocks.0:0, transformer_blocks.*:-1": [0.0, -0.5, 0.5],
        "*.attn.*:0.2, single_blocks.7.linear1:0": [0.1, 0.5, 0.0],
        "double_blocks.*.img_mlp.2:4": [0.5, 2.0, 0.5],
    }
    for text, wanted in cases.items():
        assert list(layer_strengths(layers, 0.5, text).values()) == pytest.approx(wanted), text
    with pytest.raises(LoraError, match=r"names 'double_blocks.9', which is none of its 3 layers"):
        layer_strengths(layers, 1.0, "double_blocks.*:1, double_blocks.9:0")
    with pytest.raises(ConfigError, match="the first block comes first"):
        parse_blocks("double_blocks.5-2:1")
    with pytest.raises(ConfigError, match="must read like double_blocks"):
        LoraUse("a.safetensors", blocks="double_blocks.0")


def test_a_block_at_half_is_the_lora_with_half_of_that_block():
    model = transformer()
    lora, call = random_lora(model), inputs(model)
    attach(model, lora, layer_strengths(lora.modules, 0.8, "double_blocks.1:0.5, single_blocks.*:0"))
    by_block = predict(model, call)
    detach(model, "lora")
    changed = dict(lora.modules)
    for name, module in lora.modules.items():
        factor = 0.5 if name.startswith("transformer_blocks.1.") else 0.0 if name.startswith("single") else 1.0
        changed[name] = type(module)(module.down, module.up * factor, module.alpha)
    attach(model, type(lora)(changed), 0.8)
    assert distance(by_block, predict(model, call)) <= 1e-6


def condition(model) -> TextCondition:
    states = torch.randn(5, model.config.joint_attention_dim, generator=torch.Generator().manual_seed(1))
    return TextCondition(states, "", 4)


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_every_step_has_the_strength_of_its_place(method):
    """Against a sampler that sets the strength by hand: step i of N is at i / (N − 1)."""
    model = transformer()
    lora = random_lora(model, size=0.5)
    attach(model, lora)
    strengths = layer_strengths(lora.modules, 0.8)
    settings = SamplingSettings(steps=5, guidance=1.0, method=method)
    seen = []

    def run(**part) -> torch.Tensor:
        now = SamplingSettings(**{**settings.to_dict(), **part.pop("settings", {})})
        return sample(model, [condition(model)], None, width=64, height=64, settings=now, recipe=CANONICAL, **part)

    model.step_hooks.append(lambda place: seen.append(place))
    model.step_hooks.append(follow(model, "lora", strengths, "0:.2, .5:.8, 1:1"))
    scheduled = run()
    assert seen == [0, 0.25, 0.5, 0.75, 1]
    first = run(settings={"end_step": 2})
    second = run(settings={"start_step": 2, "add_noise": False}, start_BCHW=first)
    assert seen[5:] == [0, 0.25, 0.5, 0.75, 1] and distance(second, scheduled) <= 1e-5
    model.step_hooks.clear()
    factors = iter([0.5, 0.8, 0.9, 1.0, 1.0])
    set_strength(model, "lora", 0.8 * 0.2)
    by_hand = run(on_step=lambda _: set_strength(model, "lora", 0.8 * next(factors)))
    assert torch.equal(scheduled, by_hand)
    set_strength(model, "lora", 0.8)
    assert distance(run(), scheduled) > 0.01


def test_one_step_is_the_first():
    model, seen = transformer(), []
    model.step_hooks.append(seen.append)
    settings = SamplingSettings(steps=1, guidance=1.0)
    sample(model, [condition(model)], None, width=64, height=64, settings=settings)
    assert seen == [0]


@pytest.fixture(scope="module")
def style(tmp_path_factory):
    path = tmp_path_factory.mktemp("style") / "style.safetensors"
    with ComponentCache().transformer(ModelHandle(TINY), "cpu") as model:
        write_lora(path, random_lora(model, "all", rank=2, size=0.3))
    return path


def test_the_cache_takes_a_schedule_off_again(style):
    cache, use = ComponentCache(), LoraUse(str(style), schedule="0:0, 1:1", blocks="double_blocks.*:0.5")
    with cache.transformer(ModelHandle(TINY, (use,)), "cpu") as model:
        assert len(model.step_hooks) == 1
        layer = model.transformer_blocks[0].attn.to_q
        single = model.single_transformer_blocks[0].attn.to_q
        for place, wanted in ((0, 0.0), (0.5, 0.25), (1, 0.5)):
            model.at_step(place)
            assert [b.strength for b in layer.loras()] == [wanted] and single.loras()[0].strength == 2 * wanted
    with cache.transformer(ModelHandle(TINY), "cpu") as model:
        assert model.step_hooks == []
    with pytest.raises(LoraError, match="double_blocks.40"):
        with cache.transformer(ModelHandle(TINY, (LoraUse(str(style), blocks="double_blocks.40:1"),)), "cpu"):
            pass


def test_a_merged_lora_has_blocks_but_no_schedule(style):
    with pytest.raises(ConfigError, match=r"'style.safetensors' has a strength over the steps .*Apply it live"):
        LoraUse(str(style), mode="merged", schedule="0:0, 1:1")
    cache = ComponentCache()
    weights = []
    for use in (LoraUse(str(style), 0.5, "merged", blocks="double_blocks.*:0"), LoraUse(str(style), 0.5, "merged")):
        with cache.transformer(ModelHandle(TINY, (use,)), "cpu") as model:
            weights.append(model.transformer_blocks[0].attn.to_q.weight.clone())
    with cache.transformer(ModelHandle(TINY), "cpu") as model:
        plain = model.transformer_blocks[0].attn.to_q.weight
        assert torch.equal(weights[0], plain)
        delta = read_lora(style).modules["transformer_blocks.0.attn.to_q"].delta()
        assert (weights[1] - plain - 0.5 * delta).abs().max() <= 1e-6


def test_an_image_says_what_repeats_it(style, tmp_path, capsys):
    """The command line's record, given back to the command line, is the same image; without the schedule another."""
    words = [
        "sample",
        "--flavour",
        "tiny",
        "--precision",
        "fp32",
        "--text-precision",
        "fp32",
        "--prompt",
        "a red circle",
    ]
    words += ["--steps", "4", "--device", "cpu", "--output", str(tmp_path)]

    def run(*more: str) -> Image.Image:
        assert main([*words, *more]) == 0
        return Image.open(capsys.readouterr().out.split()[-1])

    first = run(f"--lora={style}@0.9", "--lora-schedule=0:2, 1:0", "--lora-blocks=single_blocks.*:0.5")
    (record,) = json.loads(first.text["chromakit"])["loras"]
    assert record == {
        "path": "style.safetensors", "network_multiplier": 0.9, "mode": "live",
        "blocks": "single_blocks.*:0.5", "schedule": "0:2, 1:0",
    }  # fmt: skip
    lora = f"--lora={style}@{record['network_multiplier']}"
    again = run(lora, f"--lora-schedule={record['schedule']}", f"--lora-blocks={record['blocks']}")
    assert first.tobytes() == again.tobytes()
    assert first.tobytes() != run(lora).tobytes()
    assert use_record(LoraUse("/x/a.safetensors")) == {
        "path": "a.safetensors", "network_multiplier": 1.0, "mode": "live",
    }  # fmt: skip


def test_flags_belong_to_the_lora_before_them(capsys):
    assert main(["sample", "--prompt", "a", "--lora-schedule", "0:1"]) == 1
    assert "name one with --lora first" in capsys.readouterr().err
    assert main(["sample", "--prompt", "a", "--lora", "x", "--lora-schedule", "9:1"]) == 1
    assert "0 is the first step and 1 the last" in capsys.readouterr().err


def test_a_request_says_it_too():
    lora = {"path": "a", "blocks": "double_blocks.*:0.5", "schedule": "0:0, 1:1"}
    request = InferenceRequest.parse({"prompts": [{"prompt": "x"}], "loras": [lora]})
    assert (request.loras[0].blocks, request.loras[0].schedule) == (lora["blocks"], lora["schedule"])
    assert InferenceRequest.parse({"prompts": [{"prompt": "x"}], "loras": [{"path": "a", "schedule": None}]})
    for field, value, says in (
        ("schedule", "2:1", r"loras\[0\].schedule is \"2:1\".*0 is the first step"),
        ("blocks", "double_blocks.*", r"loras\[0\].blocks is .*must read like"),
        ("schedule", 3, r"loras\[0\].schedule is 3, and must be a text"),
    ):
        with pytest.raises(ConfigError, match=says):
            InferenceRequest.parse({"prompts": [{"prompt": "x"}], "loras": [{"path": "a", field: value}]})
