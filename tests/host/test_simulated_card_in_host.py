"""A real ComfyUI on a simulated card too small for everybody: a job and prompts share it, and neither fails.

The card has memory and computes nothing, so what counts here are states and bytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from _host import Host, start_host
from nullgpu.run import CannotBuild, environment
from prompts import job_of, text_to_image, train
from waiting import until

CARD = 2.5
"""GiB: ComfyUI keeps 0.8 free for computing, and our components ask for 2 beside their weights, so the job has to leave
for each that is loaded."""


TRANSFORMER = 14_000_000
"""Bytes, fewer than those of tiny's transformer in fp32; its T5 and VAE together have 9 million."""


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Iterator[Host]:
    try:
        card = environment(gib=CARD)
    except CannotBuild as error:
        pytest.skip(str(error))
    before = dict(os.environ)
    os.environ.update(card, PYTHONPATH=str(root / "tests/support/nullgpu/in_comfyui"))
    try:
        with start_host(tmp_path_factory.mktemp("card"), cpu=False, extra=("--disable-cuda-malloc",)) as own:
            yield own
    finally:
        os.environ.clear()
        os.environ.update(before)


@pytest.mark.slow
def test_a_job_and_prompts_share_a_card_that_is_too_small_for_both(host: Host):
    assert host.get("/chromakit/memory")["device"] == "cuda:0"
    job = job_of(host.run(train("shares", 1_000_000)))

    def status() -> dict:
        found = host.get(f"/chromakit/jobs/{job}")
        assert found["state"] not in ("failed", "stopped"), found["message"]
        return found

    until(lambda: status()["step"] >= 2, "the first steps", report=host.log_tail)
    for number in range(10):
        step = status()["step"]
        prompt = text_to_image(f"a star, number {number}", seed=number)  # T5 is asked anew, and needs room
        if number % 3 == 2:
            prompt["load"]["inputs"].update(precision="bf16")  # a model of its own
        assert len(host.images(host.run(prompt))) == 1
        held = host.get("/chromakit/memory")["component_bytes"]
        assert number >= 2 or sum(held.values()) < TRANSFORMER, "the job's own model was lent"
        until(lambda least=step: status()["step"] > least, "the job to go on", report=host.log_tail)
    # Where it has left within a tenth of a second nothing is said of waiting for it.
    assert "has not left" not in host.log_tail(2000)
    metrics = (host.base / "output/chromakit/jobs" / job / "metrics.jsonl").read_text(encoding="utf-8")
    assert "out_of_memory" not in metrics, "the job has left in time, each time"
    assert host.post(f"/chromakit/jobs/{job}/stop")[0] == 200
    until(lambda: host.get(f"/chromakit/jobs/{job}")["state"] == "stopped", "the stop", report=host.log_tail)
    assert (host.base / host.get(f"/chromakit/jobs/{job}")["lora_path"]).is_file()
