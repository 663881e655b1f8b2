"""The memory plan's numbers: exact where they can be, within 15 % of live tensors where they are a formula."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from chroma_core.errors import ConfigError, PrecisionError
from chroma_core.memory import estimate
from chroma_core.memory.activations import MOMENTS, dequantised, quantising
from chroma_core.memory.anatomy import anatomy, of_transformer, transformer_on_meta
from chroma_core.memory.plan import Settings, peaks
from chroma_core.model.precision import PRECISIONS, precision, quantise
from chroma_core.model.quantised import CHUNKS, dequantise_into, dequantise_weight, quantise_weight
from tools.docs.memory_cases import Case, LiveBytes, measure_t5, measure_vae

GIB = 2**30
OURS = ("int8", "fp8", "int4", "nf4")


# --- weights ----------------------------------------------------------------------------------------------------------


def test_parts_of_the_real_model():
    found = anatomy("base")
    parts = {name: part.parameters for name, part in found.transformer.parts.items()}
    assert sum(parts.values()) == 8_899_983_424
    assert sum(p.numel() for p in transformer_on_meta("base").parameters()) == 8_899_983_424
    assert transformer_on_meta("base").modulation_vectors == 344
    assert found.transformer.outside_blocks.parameters / 1e6 == pytest.approx(291.27, abs=0.01)
    assert found.transformer.whole.quantisable == 8_606_711_808
    assert (len(found.transformer.doubles), len(found.transformer.singles)) == (19, 38)
    assert found.text_encoder.whole.parameters == 4_762_310_656
    assert found.vae.whole.parameters == 83_819_683


def test_real_weights_are_exact():
    full = estimate(Settings("base", "bf16"))
    assert full.transformer_parameters == 8_899_983_424
    assert full.weights_bytes == 2 * 8_899_983_424
    assert estimate(Settings("base", "fp32")).weights_bytes == 4 * 8_899_983_424
    assert full.text_encoder_bytes / GIB == pytest.approx(8.87, abs=0.01)
    assert estimate(Settings("hd", "bf16")).weights_bytes == full.weights_bytes
    assert full.lora_bytes == 4 * 16 * 266 * 2 * 3072


@pytest.mark.parametrize("name", ["bf16", "fp32", *OURS])
def test_bytes_of_a_quantised_model_are_those_of_its_tensors(name: str):
    model = Case(name, heads=4).model()
    predicted = of_transformer(model).whole.bytes(precision(name))
    quantise(model, precision(name))
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert predicted == pytest.approx(held, rel=0.01)


def test_tiny_weights_are_its_files():
    found, folder = estimate(Settings("tiny", "bf16")), anatomy("tiny")
    assert found.weights_bytes == 2 * found.transformer_parameters
    assert found.text_encoder_bytes == 2 * folder.text_encoder.whole.parameters
    assert folder.text_encoder.whole.parameters / 1e6 == pytest.approx(0.6, abs=0.05)
    assert folder.vae.whole.parameters / 1e6 == pytest.approx(1.0, abs=0.1)
    assert found.sampling_peak_bytes < 0.1 * GIB


# --- working memory ---------------------------------------------------------------------------------------------------

PASSES = [
    *(Case(name) for name in ("fp32", "bf16", *OURS)),
    Case("bf16", heads=5, head_dim=32),
    Case("bf16", batch=2, text_tokens=64),
    *(Case(name, target="all") for name in ("fp32", "bf16", "int8", "nf4")),
    *(Case(name, target="all", checkpointing=True) for name in ("fp32", "bf16", "int8", "nf4")),
    *(Case("bf16", heads=2, text_tokens=64, target=target) for target in ("attention", "all+ffs", "tiny")),
    # Text layers only: the image stream of the first block needs no gradient yet, which shows with a single block.
    Case("bf16", heads=2, doubles=3, singles=3, text_tokens=64, target="context"),
    Case("bf16", heads=2, target="all+ffs", checkpointing=True),
    Case("bf16", heads=3, side=20, doubles=2, singles=4, target="all", checkpointing=True),
    Case("bf16", heads=4, side=12, text_tokens=64, batch=2, target="all"),
    Case("bf16", heads=4, target="all", rank=64),
]


@pytest.mark.parametrize("case", PASSES, ids=str)
def test_prediction_of_a_pass(case: Case):
    for what, (measured, predicted) in case.measure().items():
        assert predicted == pytest.approx(measured, rel=0.15), what


def test_checkpointing_keeps_one_state_a_block():
    """The point of it, on measured numbers: adding two blocks keeps two more states, not 28."""
    small, large = Case(target="all", checkpointing=True), Case(target="all", checkpointing=True, singles=4)
    state = (16 * 16 + 32) * 512 * 2
    more = large.measure()["kept"][0] - small.measure()["kept"][0]
    assert more / state == pytest.approx(2, abs=0.1)
    free = replace(large, checkpointing=False).measure()["kept"][0]
    assert (free - replace(small, checkpointing=False).measure()["kept"][0]) / state == pytest.approx(28, rel=0.05)


def test_prediction_of_the_vae_and_t5():
    for what, (measured, predicted) in measure_vae(64).items():
        assert predicted == pytest.approx(measured, rel=0.01), what
    for name, tokens in (("bf16", 128), ("fp32", 256), ("int8", 128), ("nf4", 128), ("int8", 512)):
        measured, predicted = measure_t5(name, tokens)
        assert predicted == pytest.approx(measured, rel=0.15)


def test_the_real_vae_needs_two_and_a_half_gib_to_decode_a_megapixel():
    settings = Settings(offload="model", precision="nf4", text_precision="nf4")
    alone = peaks(replace(settings, size=2048)).sampling - anatomy("base").vae.whole.parameters * 4
    assert alone == pytest.approx(2561 * 2048**2, rel=0.001)


@pytest.mark.parametrize("name", OURS)
def test_moments_of_quantising(name: str):
    weight = torch.randn(128, 1024).bfloat16()
    with LiveBytes() as there:
        parts = quantise_weight(weight, name)
    with LiveBytes() as back:
        dequantise_weight(parts, name, torch.bfloat16, weight.shape)
    assert there.peak / weight.numel() == pytest.approx(MOMENTS[name][1], rel=0.15)
    assert back.peak / weight.numel() == pytest.approx(MOMENTS[name][0], rel=0.15)


@pytest.mark.parametrize("name", ["int8", "fp8", "int4", "nf4"])
def test_large_weights_are_worked_on_in_pieces(name: str):
    """The largest linear of the real model: its moments are those of a piece, and its result."""
    chosen, weight = precision(name), torch.randn(12288, 3072, dtype=torch.bfloat16)
    with LiveBytes() as there:
        parts = quantise_weight(weight, name)
    with LiveBytes() as back:
        again = dequantise_weight(parts, name, torch.bfloat16, weight.shape)
    with LiveBytes() as on_gpu:
        result = torch.empty(weight.shape, dtype=torch.bfloat16)
        rows = CHUNKS["cuda"] // 3072
        for a, b in [(a, a + rows) for a in range(0, 12288, rows)]:
            dequantise_into(result[a:b], {key: tensor[a:b] for key, tensor in parts.items()}, name)
    assert quantising(weight.numel(), chosen) == pytest.approx(there.peak, rel=0.15)
    assert dequantised(weight.numel(), chosen, False) == pytest.approx(back.peak, rel=0.15)
    assert dequantised(weight.numel(), chosen, True) == pytest.approx(on_gpu.peak, rel=0.15)
    assert torch.equal(result, again), "the bits do not depend on the way"
    assert there.peak < 2.5 * weight.numel() and back.peak < 2.2 * weight.numel()


def test_every_quantised_precision_has_its_moments():
    quantised = {name for name, chosen in PRECISIONS.items() if chosen.quantised}
    assert set(MOMENTS) == quantised


# --- peaks ------------------------------------------------------------------------------------------------------------


def test_what_should_cost_more_does():
    small, large = estimate(Settings("base", "bf16", size=512)), estimate(Settings("base", "bf16", size=1024))
    assert large.activation_bytes > 3 * small.activation_bytes
    free = estimate(Settings("base", "bf16", size=512, gradient_checkpointing=False))
    assert free.activation_bytes > 8 * small.activation_bytes
    assert (
        estimate(Settings("base", "bf16", rank=32)).lora_bytes
        == 2 * estimate(Settings("base", "bf16", rank=16)).lora_bytes
    )
    assert estimate(Settings("base", "bf16", target="all+ffs")).lora_bytes > small.lora_bytes
    assert (
        estimate(Settings("base", "int8", batch_size=4)).activation_bytes
        > 3 * estimate(Settings("base", "int8")).activation_bytes
    )
    assert small.training_peak_bytes > small.weights_bytes + small.lora_bytes + small.optimizer_bytes
    order = [
        estimate(Settings("base", name, size=512, offload="model")).weights_bytes
        for name in ("bf16", *OURS[:1], *OURS[2:])
    ]
    assert order == sorted(order, reverse=True)


def test_offload_modes():
    none = peaks(Settings(precision="int8"))
    model = peaks(Settings(precision="int8", offload="model"))
    block = peaks(Settings(precision="int8", offload="block", text_precision="nf4"))
    assert none.sampling > none.weights + none.text_encoder  # all together
    assert model.weights < model.sampling < none.sampling  # the largest turn
    assert block.sampling < 0.5 * model.sampling
    assert none.host_sampling < 0.1 * none.weights  # one block in the computer's memory at a time
    assert model.host_sampling >= model.weights + model.text_encoder
    assert block.host_sampling > block.weights


def test_more_resident_blocks_need_more_and_all_of_them_are_the_whole_model():
    def held(count: int) -> int:
        return peaks(Settings(offload="block", text_precision="nf4", resident_blocks=count)).sampling

    assert held(2) < held(10) < held(57)
    double = anatomy("base").transformer.doubles[0].parameters * 2
    assert held(17) - held(12) == 5 * double
    assert held(57) == held(80) == peaks(Settings(offload="model", text_precision="nf4")).sampling


def test_quantising_during_startup_moves_to_the_computers_memory():
    plain = Settings(precision="fp8-torchao", size=256, text_precision="fp8-torchao")
    without, here = peaks(plain), peaks(replace(plain, offload_during_startup=True))
    assert here.sampling <= without.sampling and here.host_sampling > without.host_sampling
    turns = replace(plain, offload="model")
    assert peaks(turns).training >= peaks(replace(turns, offload_during_startup=True)).training


def test_one_memory_holds_everything():
    on_cpu, on_card = peaks(Settings(precision="int8"), shared_memory=True), peaks(Settings(precision="int8"))
    assert on_cpu.host_sampling > on_card.sampling - GIB
    assert on_cpu.host_training >= on_card.training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"offload": "disk"}, "none, model, block"),
        ({"optimizer": "lion"}, "adamw"),
        ({"rank": 0}, "rank"),
        ({"batch_size": 0}, "batch_size"),
        ({"resident_blocks": 1}, "resident_blocks"),
        ({"size": 8}, "8"),
        ({"target": "nothing"}, "nothing"),
    ],
)
def test_impossible_settings(options: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        estimate(Settings("base", "bf16", **options))


def test_unknown_names():
    with pytest.raises(ConfigError, match="base, hd, flash, tiny"):
        estimate(Settings("huge", "bf16"))
    with pytest.raises(PrecisionError, match="int7"):
        estimate(Settings("base", "int7"))


def test_an_estimate_is_quick_and_leaves_no_trace():
    before = torch.get_default_dtype(), torch.get_rng_state()
    anatomy.cache_clear()
    transformer_on_meta.cache_clear()
    started = time.process_time()
    estimate(Settings("base", "int8"))
    assert time.process_time() - started < 1
    assert torch.get_default_dtype() == before[0] and torch.equal(torch.get_rng_state(), before[1])
