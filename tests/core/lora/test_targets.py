"""Target names select the layers that they always selected, counted on the real module tree (on the meta device)."""

import pytest
import torch

from chroma_core.errors import ConfigError
from chroma_core.lora.adapters import attach, linear_modules
from chroma_core.lora.settings import TARGETS, target_modules
from chroma_core.model.transformer import ChromaTransformer
from lora_cases import random_lora
from miniature import transformer

COUNTS = {
    "all": 266,
    "all+ffs": 419,
    "context": 76,
    "context+ffs": 114,
    "tiny": 209,
    "attention": 190,
    "all+ffs+embedder": 420,
    "tiny+embedder": 210,
    "ai-toolkit": 419,
}


@pytest.fixture(scope="module")
def real() -> ChromaTransformer:
    with torch.device("meta"):
        return ChromaTransformer()


@pytest.mark.parametrize("target", TARGETS)
def test_counts_on_the_real_model(real, target):
    names = target_modules(real, target)
    assert len(names) == len(set(names)) == COUNTS[target]
    assert not any("distilled_guidance_layer" in name for name in names)
    for name in names:
        assert isinstance(real.get_submodule(name), torch.nn.Linear)


def test_every_name_is_counted():
    assert set(COUNTS) == set(TARGETS)


def test_names_contain_each_other(real):
    chosen = {target: set(target_modules(real, target)) for target in TARGETS}
    assert chosen["attention"] < chosen["all"] < chosen["all+ffs"] < chosen["all+ffs+embedder"]
    assert chosen["all"] - chosen["attention"] == chosen["context"] < chosen["context+ffs"]
    assert chosen["all+ffs+embedder"] - chosen["all+ffs"] == {"x_embedder"}
    assert chosen["tiny+embedder"] - chosen["tiny"] == {"x_embedder"}
    assert "proj_out" in chosen["all+ffs"]
    # SimpleTuner's `ai-toolkit` also names the linear layers of the norms, of which Chroma has none.
    assert chosen["ai-toolkit"] == chosen["all+ffs"]
    assert not any(".norm" in name for name in linear_modules(real))
    extra = chosen["tiny"] - chosen["attention"]
    assert extra == {f"transformer_blocks.{i}.ff.net.0.proj" for i in range(19)}


def test_patterns(real):
    assert len(target_modules(real, "transformer_blocks.[0-3].attn.to_q")) == 4
    assert target_modules(real, "proj_out") == ["proj_out"]  # the model's own, not the single blocks'
    both = target_modules(real, ["context", "single_transformer_blocks.37.*"])
    assert len(both) == 76 + 5
    assert both == target_modules(real, "single_transformer_blocks.37.*, context, context")
    assert len(target_modules(real, "*")) == 421  # everything but the approximator


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("al", "Did you mean 'all'"),
        ("to_q", r"Did you mean '\*\.to_q'"),
        ("context+fs", r"Did you mean 'context\+ffs'"),
        ("distilled_guidance_layer.*", "never trained"),
        ("all, transformer_blocks.99.*", r"transformer_blocks\.99"),
        ("", "empty"),
        ([], "empty"),
    ],
)
def test_a_target_that_matches_nothing_is_an_error(real, target, says):
    with pytest.raises(ConfigError, match=says):
        target_modules(real, target)


def test_names_are_the_same_with_adapters_on():
    model = transformer()
    before = target_modules(model, "all+ffs+embedder")
    attach(model, random_lora(model))
    assert target_modules(model, "all+ffs+embedder") == before
