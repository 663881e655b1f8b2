"""Training that starts from a finished LoRA."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from chroma_core.errors import LoraError
from chroma_core.lora.adapters import attach
from chroma_core.lora.files import read_lora
from chroma_core.lora.modules import LokrModule, LoraFile, LoraModule
from chroma_core.lora.settings import LoraSettings
from chroma_core.lora.trainable import add_trainable, start_from, trained_lora
from lora_cases import distance, inputs, predict, random_kind, random_lora
from miniature import transformer


def applied(lora: LoraFile) -> torch.Tensor:
    model = transformer()
    attach(model, lora)
    return predict(model, inputs(model))


def started(lora: LoraFile, **settings) -> tuple:
    """A model with a fresh LoRA that was told to begin as `lora`, and the layers that it lacked."""
    model = transformer()
    add_trainable(model, LoraSettings(**{"target": "all+ffs", **settings}), seed=3)
    return model, start_from(model, lora)


@pytest.mark.parametrize(
    "kind,settings",
    [
        ("lora", {"rank": 4, "alpha": 6}),
        ("lora", {"rank": 4, "alpha": 1}),
        ("lora", {"rank": 9, "alpha": 5}),
        ("lora", {"rank": 9, "alpha": 5, "kind": "rslora"}),
        ("dora", {"rank": 4, "alpha": 6, "kind": "dora"}),
        ("dora", {"rank": 7, "kind": "dora"}),
        ("lokr", {"rank": 2, "alpha": 3, "kind": "lokr"}),
        ("lokr", {"rank": 3, "alpha": 2, "kind": "lokr"}),
        ("lokr", {"rank": 64, "kind": "lokr"}),
    ],
)
def test_it_begins_as_the_file_whatever_rank_and_alpha(kind, settings):
    lora = random_kind(transformer(), kind)
    model, fresh = started(lora, **settings)
    assert fresh == ()
    assert distance(predict(model, inputs(model)), applied(lora)) <= 1e-5
    if settings.get("alpha") in (6, 3):  # nothing to adapt: the very numbers
        found = trained_lora(model).modules
        for name, module in lora.modules.items():
            assert all(torch.equal(t, found[name].factors()[f]) for f, t in module.factors().items())


@pytest.mark.parametrize("kind", ["lora", "dora", "lokr"])
def test_the_added_rank_can_learn(kind):
    """Both factors zero would never move."""
    rank = 3 if kind == "lokr" else 9
    model, _ = started(random_kind(transformer(), kind), kind=kind, rank=rank)
    call = inputs(model)
    out = model(call["latents_BLD"], call["text_BTC"], call["sigma_B"], call["img_ids_L3"])
    out.square().mean().backward()
    branch = model.get_submodule("transformer_blocks.0.attn.to_q").branches[0]
    assert (branch.w2_b.grad[2:] if kind == "lokr" else branch.up.grad[:, 4:]).abs().min() > 0


def test_any_dialect_and_dtype(tmp_path):
    tensors = {}
    for name, m in random_lora(transformer(), "all").modules.items():
        key = "lora_transformer_" + name.replace(".", "_")
        tensors |= {f"{key}.lora_down.weight": m.down.bfloat16(), f"{key}.lora_up.weight": m.up.bfloat16()}
    save_file(tensors, tmp_path / "a.safetensors")
    lora = read_lora(tmp_path / "a.safetensors")
    assert lora.key_format == "onetrainer"
    model, fresh = started(lora, rank=4, alpha=4)
    assert len(fresh) == 35 - 22 and all(".ff" in n or "proj_" in n for n in fresh)
    found = trained_lora(model).modules
    for name, module in lora.modules.items():
        assert torch.equal(found[name].up, module.up.float()) and found[name].down.dtype == torch.float32
    assert not any(found[name].up.any() for name in fresh)


def test_what_does_not_fit_is_refused_and_changes_nothing():
    lora = random_lora(transformer())
    lokr = random_kind(transformer(), "lokr")
    part = "transformer_blocks.0.attn.to_q"
    wide = LoraFile({part: LoraModule(torch.ones(2, 64), torch.ones(64, 2), 2.0)})
    sliced = replace(lokr.modules[part], rows=(0, 32))
    whole = LokrModule(1.0, w1=torch.ones(4, 4), w2=torch.ones(8, 8))
    for given, settings, says in (
        (lora, {"rank": 3}, "its rank is 4, in training is 3.*Train with rank 4 or more"),
        (lora, {"rank_pattern": {"proj_out": 2}}, "'proj_out' its rank is 4, in training is 2"),
        (lora, {"target": "all"}, "13 of its layers or keys are not among the 22"),
        (LoraFile(lora.modules, unmatched=("lora_te1.alpha",)), {}, "lora_te1.alpha"),
        (lora, {"kind": "dora"}, "it is a LoRA, in training is a DoRA.*Train with the kind .lora"),
        (lora, {"kind": "lokr"}, "it is a LoRA, in training is a LoKr"),
        (random_kind(transformer(), "dora"), {}, "it is a DoRA, in training is a LoRA"),
        (wide, {}, "64×64, the model 32×32"),
        (lokr, {"kind": "lokr", "lokr_factor": 2, "rank": 2}, "4×4 ⊗ 8×8, in training is 2×2 ⊗ 16×16.*lokr_factor"),
        (lokr, {"kind": "lokr", "rank": 1}, "its rank is 2, in training is 1"),
        (LoraFile({part: whole}), {"kind": "lokr", "rank": 2}, "whole matrix.*a rank of at least 4"),
        (LoraFile({part: sliced}), {"kind": "lokr", "rank": 2}, "part of a fused layer"),
    ):
        model = transformer()
        add_trainable(model, LoraSettings(**{"target": "all+ffs", **settings}), seed=3)
        before = predict(model, inputs(model))
        with pytest.raises(LoraError, match=says):
            start_from(model, given)
        assert torch.equal(predict(model, inputs(model)), before)


def test_without_a_lora_in_training():
    model = transformer()
    with pytest.raises(LoraError, match="no LoRA in training"):
        start_from(model, random_lora(model))
