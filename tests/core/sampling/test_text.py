"""Prompts: trigger words, the n+1 visible tokens, and ragged batches."""

import pytest
import torch

from chroma_core.errors import PromptError
from chroma_core.sampling.recipe import CANONICAL, RECIPES, Recipe
from chroma_core.sampling.text import TextEncoder, apply_trigger, batch_conditions
from miniature import t5, tokenizer


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return TextEncoder(t5(), tokenizer())


@pytest.mark.parametrize(
    ("prompt", "triggers", "expected"),
    [
        ("a [trigger] circle", ("sks",), "a sks circle"),
        ("[trigger] and [trigger]", (" sks ",), "sks and sks"),
        ("a circle", ("sks",), "a circle"),
        ("a [trigger]", ("", None, "job"), "a job"),
        ("a [trigger]", ("prompt", "job"), "a prompt"),
    ],
)
def test_trigger_is_replaced(prompt, triggers, expected):
    assert apply_trigger(prompt, *triggers) == expected


@pytest.mark.parametrize("triggers", [(), ("",), (None, "  ")])
def test_unset_trigger_is_an_error(triggers):
    with pytest.raises(PromptError, match="no trigger word is set"):
        apply_trigger("a [trigger] circle", *triggers)


def test_real_tokens_and_one_pad_are_visible(encoder):
    condition = encoder.encode("a red circle")
    assert condition.real_tokens == 4  # three words and </s>
    assert condition.states.shape == (5, 32) and condition.states.dtype == torch.float32
    assert encoder.encode("").states.shape == (2, 32)


def test_states_equal_a_padded_masked_run(encoder):
    ids = torch.tensor([[3, 4, 7, 1] + [0] * 508])
    with torch.no_grad():
        long = encoder.model(ids, ids != 0)[0, :5]
    assert (encoder.encode("a red circle").states - long).abs().max() <= 1e-5


def test_recipes_differ_where_they_should(encoder):
    masked, unpadded, full = (
        encoder.encode("a red circle", RECIPES[n]) for n in ("canonical", "comfyui", "ai-toolkit")
    )
    assert unpadded.states.shape == (4, 32) and full.states.shape == (5, 32)
    assert (masked.states[:4] - unpadded.states).abs().max() <= 1e-5
    assert (masked.states - full.states).abs().max() > 1e-3


def test_a_long_prompt_keeps_its_end_and_says_what_it_lost(encoder):
    condition = encoder.encode("red " * 600)
    assert condition.states.shape[0] == 512 and condition.real_tokens == 511 and condition.truncated == 601 - 511
    same = encoder.encode("red " * 510)
    assert same.truncated == 0 and torch.equal(same.states, condition.states)


def test_batches(encoder):
    a, b = encoder.encode("a red circle"), encoder.encode("a blue square on a green background")
    states, mask = batch_conditions([a, b])
    assert states.shape == (2, 9, 32) and mask is not None and mask.sum(1).tolist() == [5, 9]
    assert torch.equal(states[0, :5], a.states)
    assert batch_conditions([a, a])[1] is None


def test_recipe_round_trip_and_errors():
    from chroma_core.errors import ConfigError

    for recipe in RECIPES.values():
        assert Recipe.from_dict(recipe.to_dict()) == recipe
    with pytest.raises(ConfigError, match="does not know"):
        Recipe.from_dict(CANONICAL.to_dict() | {"clip_skip": 2})
    with pytest.raises(ConfigError):
        Recipe(noise_dtype="fp8")  # type: ignore[arg-type]
