"""One training step at the real widths, on a card that computes nothing: what it allocates and launches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import forked
from chroma_core.loading.load import load_transformer
from chroma_core.loading.spec import ModelSpec
from nullgpu.run import CannotBuild, environment

COSTS = {
    "bf16": ("--blocks", "1", "1", "--calls"),
    "int8": ("--blocks", "1", "1", "--precision", "int8"),
    "nf4": ("--blocks", "1", "1", "--precision", "nf4", "--bytes"),
    "whole": ("--blocks", "2", "2"),
    "streamed": ("--blocks", "2", "2", "--resident", "2"),
}
ONE_AFTER_THE_OTHER = """
import gc, json, sys
from benchmarks import step_cost
for arguments in json.loads(sys.argv[1]):
    gc.collect()  # the model before, which some Pythons would still have
    sys.argv[1:] = [*arguments, "--json"]
    assert step_cost.main() == 0
"""

RUN_TESTS = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"


@pytest.fixture(scope="module")
def costs(root) -> dict[str, dict]:
    """What `benchmarks/step_cost.py` says of each of COSTS, all in one process."""
    said = run_on_a_card(root, "-c", ONE_AFTER_THE_OTHER, json.dumps(list(COSTS.values())), NULL_GPU_GIB="80")
    return dict(zip(COSTS, map(json.loads, said.splitlines()), strict=True))


def test_a_step_costs_what_it_did(costs):
    """Simulated numbers do not depend on the machine; 460 launches and 1.38 GiB were counted when this was written."""
    assert costs["bf16"]["simulated"]
    assert 400 < costs["bf16"]["launches"] < 520
    assert costs["bf16"]["allocated_gib"] == pytest.approx(1.382, rel=0.1)
    assert costs["bf16"]["python_calls"] < 6000, "4621, and 8850 with torch's own gradient checkpointing"


def test_quantised_weights_take_less_and_launch_more(costs):
    assert costs["int8"]["weights_gib"] < 0.8 * costs["bf16"]["weights_gib"]
    assert costs["int8"]["allocated_gib"] < 0.9 * costs["bf16"]["allocated_gib"]
    assert costs["int8"]["launches"] > costs["bf16"]["launches"]


def test_four_bits_take_one_kernel_a_weight(costs):
    """Triton's, if it passed its trial; PyTorch's launch 853 and move 19 GB."""
    assert costs["nf4"]["launches"] == costs["int8"]["launches"]
    assert costs["nf4"]["gb_moved"] < 10 and costs["nf4"]["gb_by_operation"]["nf4 kernel"] > 1


def test_streamed_blocks_take_less_and_are_copied(costs):
    assert costs["streamed"]["allocated_gib"] < costs["whole"]["allocated_gib"]
    assert costs["streamed"]["host_to_device_gib"] > 1 > costs["whole"]["host_to_device_gib"]


@pytest.mark.parametrize("script", ["gpu", "step_cost"])
def test_without_a_card_a_benchmark_says_so(script, monkeypatch, capsys, tmp_path):
    from benchmarks import gpu, step_cost

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("sys.argv", [script] + (["--out", str(tmp_path)] if script == "gpu" else []))
    assert {"gpu": gpu, "step_cost": step_cost}[script].main() == 2
    captured = capsys.readouterr()
    assert "no CUDA card here" in captured.err and "nullgpu" in captured.err and not captured.out


def on_a_card(root: Path, script: str, **variables: str) -> dict:
    """What a script of tests/support says, run on the simulated card."""
    return json.loads(run_on_a_card(root, str(root / "tests/support" / script), **variables))


def run_on_a_card(root: Path, *arguments: str, **variables: str) -> str:
    """What `python *arguments` prints on the simulated card."""
    try:
        card = environment(gib=24)
    except CannotBuild as error:
        pytest.skip(str(error))
    done = forked.run(forked.FULL, *arguments, cwd=root, env=card | variables)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_tests_that_need_a_card_run_on_one(root):
    """Their numbers are compared on a real card only; devices, sizes and the order of streaming here too."""
    tests = str(root / "tests/core/streaming/test_training.py")
    command = [tests, "-q", "-p", "no:cacheprovider", "-p", "xdist.plugin", "-p", "pytest_timeout", "-k", "accelerator"]
    said = run_on_a_card(root, "-c", RUN_TESTS, *command, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    assert "6 passed" in said


def test_a_job_lends_its_base_leaves_and_comes_back(root):
    """What is frozen goes down once, at the first leaving; a loan moves nothing."""
    found = on_a_card(root, "sharing_a_card.py")
    weights, trained, more = found["weights"], found["trained"], found["beside"]
    assert weights > trained > more > 0
    assert found["own"] == [[0, 32 << 20]] * 3  # whatever else is on the card
    for number, row in enumerate(found["rounds"]):
        assert row["borrowed"] == {"up": 0, "down": 0} and row["lent"] == weights
        assert row["gone"] == 0 and row["asked"] == weights
        assert row["back"]["up"] == pytest.approx(weights + more, rel=0.01) and row["back"]["down"] == 0
        assert row["left"]["down"] == pytest.approx(weights + more if number == 0 else trained, rel=0.01)
    assert found["came_back"]


@pytest.mark.parametrize("capability", ["75", "89", "90"])
def test_steps_before_and_after_a_resume_on_an_old_and_a_new_card(root, capability):
    """Before Ampere a quantised model computes in fp16, where attention has a fused kernel; from Hopper on cuDNN's,
    which is not there, is not asked for; a resume costs nothing."""
    found = on_a_card(root, "steps_on_a_card.py", NULL_GPU_SM=capability)
    old = capability == "75"
    assert found["dtype"] == ("torch.float16" if old else "torch.bfloat16") and found["scaled"] == old
    assert found["attention"] == (["efficient_attention"] if old else ["flash_attention"])
    assert found["restored"] and found["waits"] == [1, 1]
    spec = ModelSpec(flavour="tiny", precision="int8")
    here = load_transformer(spec, "cpu").transformer_blocks[0].attn.to_q.weight
    assert found["codes"] == int(here.long().sum())
    assert [("emulates bf16" in line) for line in found["said"]] == [True] * old
