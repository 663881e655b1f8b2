"""T5's two name sets, against the `gguf` package's own tensor map."""

import gguf
import pytest
from gguf.tensor_mapping import get_tensor_name_map

import foreign_shapes
from chroma_core.names import t5 as t5_keys


@pytest.fixture(scope="module")
def names() -> list[str]:
    return list(foreign_shapes.shapes_of(foreign_shapes.t5()))


def test_names_are_those_that_llama_cpp_writes(names):
    reference = get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, 24)
    assert len(names) == 220
    for name in names:
        # The package knows the embeddings under one name only.
        known = "shared.weight" if name == "encoder.embed_tokens.weight" else name
        assert t5_keys.to_llama_cpp_key(name) == reference.get_name(known, try_suffixes=(".weight",))


def test_every_name_goes_there_and_back(names):
    for name in names:
        back = t5_keys.to_hugging_face_key(t5_keys.to_llama_cpp_key(name) or "")
        assert back == ("shared.weight" if name in t5_keys.EMBEDDINGS else name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "lm_head.weight",
        "decoder.block.0.layer.0.SelfAttention.q.weight",
        "encoder.block.0.layer.1.DenseReluDense.wi.weight",
        "encoder.block.x.layer.0.layer_norm.weight",
        "encoder.block.0.layer.0.SelfAttention.q.bias",
        "blk.0.attn_q.weight",
        "dec.blk.0.attn_q.weight",
    ],
)
def test_other_names_are_none(name):
    assert t5_keys.to_llama_cpp_key(name) is None
    assert t5_keys.to_hugging_face_key(name) is None
    assert not t5_keys.is_encoder_key(name)
