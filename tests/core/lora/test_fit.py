"""LoRAs that do not fit the model, or fit in part; names and strengths."""

import pytest
import torch

from chroma_core.errors import LoraError
from chroma_core.lora.adapters import attach, attached, check_fits, detach, set_strength
from chroma_core.lora.modules import LoraFile, LoraModule
from lora_cases import inputs, predict, random_lora
from miniature import transformer


def attached_model(model, lora):
    attach(model, lora)
    return model


def test_a_lora_that_matches_nothing():
    model = transformer()
    lora = LoraFile({"transformer_blocks.77.attn.to_q": LoraModule(torch.zeros(2, 32), torch.zeros(32, 2), 2)})
    for allow_partial in (False, True):
        with pytest.raises(LoraError, match=r"changes nothing.*transformer_blocks\.77"):
            check_fits(model, lora, allow_partial)


def test_a_lora_that_matches_in_part():
    deep, model = transformer(layers=3), transformer()
    call = inputs(model)
    lora = random_lora(deep)
    extra = [n for n in lora.modules if n.startswith("transformer_blocks.2")]
    with pytest.raises(LoraError, match=rf"{len(extra)} do not.*transformer_blocks\.2\.\S+ and {len(extra) - 4} more"):
        attach(model, lora)
    assert attached(model) == []
    fit = attach(model, lora, allow_partial=True)
    assert set(fit.unmatched) == set(extra) and f"{len(extra)} left out" in fit.report()
    kept = LoraFile({n: m for n, m in lora.modules.items() if n not in extra})
    assert torch.equal(predict(model, call), predict(attached_model(transformer(), kept), call))


def test_keys_that_are_not_chromas_count_as_unmatched():
    model = transformer()
    lora = random_lora(model)
    with pytest.raises(LoraError, match=r"lora_te1_text.*a text encoder's LoRA.*allow_partial"):
        check_fits(model, LoraFile(lora.modules, unmatched=("lora_te1_text.alpha",)))
    assert len(check_fits(model, LoraFile(lora.modules, unmatched=("x",)), allow_partial=True).matched) == 35


def test_a_lora_for_another_width():
    lora = LoraFile({"proj_out": LoraModule(torch.zeros(2, 3072), torch.zeros(64, 2), 2)})
    with pytest.raises(LoraError, match="64×3072, the model 64×32"):
        check_fits(transformer(), lora, allow_partial=True)


def test_names_and_strengths_are_checked():
    model = transformer()
    lora = random_lora(model)
    attach(model, lora, name="a")
    with pytest.raises(LoraError, match="already"):
        attach(model, lora, name="a")
    for act in (lambda: detach(model, "b"), lambda: set_strength(model, "b", 1.0)):
        with pytest.raises(LoraError, match="Attached are: a"):
            act()
    with pytest.raises(LoraError, match="finite"):
        attach(model, lora, float("nan"), name="c")
