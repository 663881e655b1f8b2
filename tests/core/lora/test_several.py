"""Several LoRAs at once, with strengths of their own and of either sign, live and merged, on every precision."""

import pytest
import torch

from chroma_core.lora.adapters import attach, merge, set_strength
from chroma_core.model.precision import PRECISIONS, precision, quantise
from lora_cases import distance, inputs, predict, random_lora
from miniature import transformer


def model_in(name: str):
    """A model in that precision, and the dtype of its calls."""
    chosen = precision(name)
    model = transformer().to(chosen.dtype)
    if chosen.quantised:
        quantise(model, chosen)
    return model, chosen.dtype


@pytest.mark.parametrize("name", PRECISIONS)
def test_live_strengths_add_up_and_the_order_does_not_matter(name):
    """Twice the same LoRA, at 0.8 and −0.5, is that LoRA at 0.3; two of them commute; a sum of zero is the base."""
    model, dtype = model_in(name)
    call = inputs(model)
    first, second = random_lora(model, seed=1, size=0.3), random_lora(model, "all", rank=3, alpha=2, seed=5, size=0.3)
    rounding = 1e-5 if dtype == torch.float32 else 0.03
    base = predict(model, call, dtype)
    attach(model, first, 0.8, "a")
    attach(model, first, -0.5, "b")
    both = predict(model, call, dtype)
    set_strength(model, "a", 0.3)
    set_strength(model, "b", 0.0)
    once = predict(model, call, dtype)
    assert distance(once, base) > 0.03
    assert distance(both, once) <= rounding
    set_strength(model, "b", -0.3)
    assert distance(predict(model, call, dtype), base) <= rounding
    set_strength(model, "b", 0.0)
    attach(model, second, -0.6, "c")
    forwards = predict(model, call, dtype)
    other, _ = model_in(name)
    attach(other, second, -0.6, "c")
    attach(other, first, 0.3, "a")
    assert distance(forwards, once) > 0.03
    assert distance(predict(other, call, dtype), forwards) <= rounding


@pytest.mark.parametrize("name", PRECISIONS)
def test_merged_before_quantising_they_are_what_live_is(name):
    chosen = precision(name)
    live, dtype = model_in(name)
    merged = transformer()
    call = inputs(live)
    loras = [
        (random_lora(live, seed=1, size=0.3), 0.7),
        (random_lora(live, "all", rank=3, alpha=2, seed=5, size=0.3), -0.6),
    ]
    base = predict(live, call, dtype)
    for i, (lora, strength) in enumerate(loras):
        attach(live, lora, strength, str(i))
        merge(merged, lora, strength)
    merged = merged.to(dtype)
    if chosen.quantised:
        quantise(merged, chosen)
    error = 1e-5 if name == "fp32" else 0.2 if "4" in name else 0.06  # the precision's own rounding of the weights
    one, other = predict(live, call, dtype), predict(merged, call, dtype)
    assert distance(one, base) > 0.1
    assert distance(other, one) <= error
