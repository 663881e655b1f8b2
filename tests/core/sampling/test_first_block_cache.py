"""The first-block cache: what it leaves out, what it never mixes, and that nothing of it stays behind."""

import pytest
import torch

from chroma_core.errors import ConfigError
from chroma_core.lora.adapters import attach
from chroma_core.lora.strengths import follow, layer_strengths
from chroma_core.model.first_block_cache import FirstBlockCache
from chroma_core.model.latents import image_ids, pack
from chroma_core.model.transformer import modulated
from chroma_core.sampling.sampler import SamplingSettings, initial_noise, sample
from chroma_core.sampling.text import TextCondition
from chroma_core.streaming import stream_blocks
from lora_cases import random_lora
from miniature import transformer


def condition(tokens: int, seed: int) -> TextCondition:
    return TextCondition(torch.randn(tokens, 32, generator=torch.Generator().manual_seed(seed)), "", tokens - 1)


RED, BLUE, EMPTY = condition(6, 1), condition(9, 2), condition(2, 3)


def run(threshold=0.0, positive=(RED,), negative=EMPTY, model=None, settings=None, **options):
    """Latents, and the share of passes that were cut short, step by step."""
    values = SamplingSettings(**{"steps": 8, "seed": 5, "first_block_cache": threshold} | (settings or {}))
    seen = []
    on_step = options.pop("on_step", lambda info: seen.append(info.cut_short))
    model = model or transformer(2, 2)
    latents = sample(model, list(positive), negative, width=64, height=64, settings=values, on_step=on_step, **options)
    return latents, seen


def apart(a, b) -> float:
    return float((a - b).abs().max() / b.abs().max())


def test_off_by_default_and_no_part_of_older_records():
    assert SamplingSettings().first_block_cache == 0 and "first_block_cache" not in SamplingSettings().to_dict()
    some = SamplingSettings(first_block_cache=0.1)
    assert SamplingSettings(**some.to_dict()) == some
    whole, seen = run()
    assert seen == [0.0] * 8
    none_left_out, seen = run(1e-9)
    assert seen == [0.0] * 8 and torch.equal(none_left_out, whole)


def test_all_blocks_but_the_first_are_left_out():
    model, calls = transformer(2, 2), []
    for blocks in (model.transformer_blocks, model.single_transformer_blocks):
        for block in blocks:
            block.register_forward_hook(lambda block, *_: calls.append(block))
    _, seen = run(1.0, model=model)
    assert seen == [pytest.approx(i / (i + 1)) for i in range(8)]  # the first step alone is whole
    first, others = model.transformer_blocks[0], [model.transformer_blocks[1], *model.single_transformer_blocks]
    assert calls.count(first) == 16 and [calls.count(block) for block in others] == [2, 2, 2]


@pytest.mark.parametrize("blocks", [(2, 2), (0, 3), (3, 0)])
def test_a_pass_cut_short_adds_what_the_others_added(blocks):
    """Against the sum by hand, from what goes into the blocks and out of them."""
    model, T = transformer(*blocks), len(RED.states)
    every = [*model.transformer_blocks, *model.single_transformer_blocks]
    image = {}

    def out_of(name):
        return lambda _, __, out: image.update({name: out[1] if isinstance(out, tuple) else out[:, T:]})

    every[0].register_forward_hook(out_of("first"))
    every[-1].register_forward_hook(out_of("last"))
    latents = [pack(initial_noise([seed], (16, 8, 8))) for seed in (1, 2)]
    sigma, ids = torch.tensor([0.7]), image_ids(8, 8)

    def through(x, **options):
        with torch.no_grad():
            return model(x, RED.states[None], sigma, ids, **options)

    cache = FirstBlockCache(1e9)
    assert torch.equal(through(latents[0], cache=cache), through(latents[0])) and cache.left_out == 0
    others = image["last"] - image["first"]
    short = through(latents[1], cache=cache)
    shift, scale = model.modulation(sigma)[:, -2:].split(1, dim=1)
    assert torch.equal(short, model.proj_out(modulated(image["first"] + others, shift, scale)))
    assert cache.left_out == 1 and apart(short, through(latents[1])) > 1e-3


def test_prompt_and_negative_remember_each_for_themselves():
    whole, _ = run()
    alone, of_one = run(0.3, negative=None)
    both, of_two = run(0.3, negative=RED)
    assert 0 < of_one[-1] < 1 and of_two == of_one  # the same prompt on both sides decides as one does
    assert apart(both, alone) <= 1e-5
    near, seen = run(0.3)
    assert seen[-1] > 0 and 0 < apart(near, whole) < 0.3


def test_an_image_of_a_batch_is_what_it_is_alone():
    threshold = 0.4
    alone = [run(threshold, [text], settings={"seed": 5 + i}) for i, text in enumerate((RED, BLUE))]
    together, seen = run(threshold, [RED, BLUE])
    assert alone[0][1] != alone[1][1], "they are to decide differently somewhere"
    assert seen == [pytest.approx((a + b) / 2) for a, b in zip(alone[0][1], alone[1][1], strict=True)]
    for i, (latents, _) in enumerate(alone):
        assert apart(together[i : i + 1], latents) <= 1e-5


def test_a_step_with_another_strength_of_a_lora_is_whole():
    model = transformer(2, 2)
    lora = random_lora(model, size=0.5)
    attach(model, lora)
    strengths = layer_strengths(lora.modules, 1.0)

    def scheduled(text, threshold):
        model.step_hooks[:] = [follow(model, "lora", strengths, text)]
        return run(threshold, model=model)

    exact, _ = scheduled("0:0, 1:1", 0.0)
    rising, seen = scheduled("0:0, 1:1", 1.0)
    assert seen == [0.0] * 8 and torch.equal(rising, exact)
    _, seen = scheduled("0:0, 0.5:1", 1.0)
    passes = [b * (i + 1) - a * i for i, (a, b) in enumerate(zip([0.0, *seen], seen, strict=False))]
    assert passes[:5] == [0, 0, 0, 0, 0] and min(passes[5:]) > 0.4  # step 4 is the first at full strength


def test_with_a_mask_the_rest_stays_as_it_is():
    start = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(3))
    mask = torch.zeros(1, 8, 8)
    mask[:, :, 4:] = 1
    options = {"start_BCHW": start, "noise_mask_BHW": mask, "settings": {"denoise": 0.8}}
    whole, _ = run(**options)
    near, seen = run(0.8, **options)
    assert seen[-1] > 0 and torch.equal(near[..., :4], start[..., :4])
    assert 0 < apart(near, whole) < 0.3


@pytest.mark.parametrize("method", ["heun", "dpmpp_2m"])
def test_other_samplers_take_it(method):
    whole, _ = run(settings={"method": method})
    near, seen = run(0.3, settings={"method": method})
    assert seen[-1] > 0 and 0 < apart(near, whole) < 0.3


def test_nothing_stays_behind_from_one_run_to_the_next():
    model = transformer(2, 2)
    fresh, seen = run(0.3, model=model)

    def interrupt(info):
        if info.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(0.3, [BLUE], model=model, on_step=interrupt)
    again, seen_again = run(0.3, model=model)
    assert torch.equal(again, fresh) and seen_again == seen
    assert torch.equal(run(model=model)[0], run()[0])


def test_a_streamed_model_gives_the_same():
    plain, seen = run(0.3)
    model = transformer(2, 2)
    streamer = stream_blocks(model, "cpu", 2)
    streamed, seen_streamed = run(0.3, model=model)
    assert torch.equal(streamed, plain) and seen_streamed == seen and 0 < seen[-1] < 1
    assert streamer.peak_resident <= 2


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="this model has 1"):
        run(0.1, model=transformer(1, 0))
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(ConfigError, match="between 0"):
            SamplingSettings(first_block_cache=wrong)


def test_numbers_that_are_none_are_never_taken_for_no_change():
    cache = FirstBlockCache(1.0)
    whole = torch.ones(1, 2, 3)
    assert torch.equal(cache.through(whole, whole * 2, lambda _: whole * 5), whole * 5)
    broken = torch.full((1, 2, 3), float("nan"))
    assert cache.through(whole, broken, lambda _: broken).isnan().all() and cache.left_out == 0
    assert torch.equal(cache.through(whole, whole * 2, lambda _: whole * 6), whole * 6) and cache.left_out == 0
