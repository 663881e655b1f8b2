"""The memory estimate: exact where it can be, ordered where it is a rule of thumb."""

import json

import pytest

from chroma_core.cli import main
from chroma_core.errors import ConfigError
from chroma_core.memory import estimate

GIB = 2**30


def test_real_weights_are_exact():
    full = estimate("base", "bf16")
    assert full.transformer_parameters == 8_899_983_424
    assert full.weights_bytes == 2 * 8_899_983_424
    assert estimate("base", "fp32").weights_bytes == 4 * 8_899_983_424
    assert estimate("base", "int8-quanto").weights_bytes / GIB == pytest.approx(8.6, abs=0.1)
    assert full.text_encoder_bytes / GIB == pytest.approx(8.9, abs=0.1)


def test_what_should_cost_more_does():
    small, large = estimate("base", "bf16", size=512), estimate("base", "bf16", size=1024)
    assert large.activation_bytes > 3 * small.activation_bytes
    free = estimate("base", "bf16", size=512, gradient_checkpointing=False)
    assert free.activation_bytes > 8 * small.activation_bytes
    assert estimate("base", "bf16", rank=32).lora_bytes == 2 * estimate("base", "bf16", rank=16).lora_bytes
    assert small.training_peak_bytes > small.sampling_peak_bytes > small.weights_bytes


def test_command_prints_a_table_and_json(capsys):
    assert main(["plan", "--flavour", "base", "--size", "512", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values == estimate("base", "bf16", size=512).to_dict()
    assert main(["plan"]) == 0
    assert "16.58 GiB" in capsys.readouterr().out


def test_unknown_flavour():
    with pytest.raises(ConfigError, match="base, hd, flash, tiny"):
        estimate("huge", "bf16")
