"""Benchmarks as programs: turns, ratios, the chart, and ComfyUI's process on a small model."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import growth
from benchmarks.comfyui_peer import ComfyUI
from benchmarks.turns import Turn, ratios, take_turns
from chroma_core.model.transformer import ChromaTransformer
from tools import soak

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))

SMALL = {
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 4096,
    "axes_dims_rope": (4, 6, 6),
    "approximator_num_channels": 64,
    "approximator_hidden_dim": 32,
    "approximator_layers": 1,
    "in_channels": 64,
}


def test_contestants_take_turns_and_every_second_round_goes_backwards():
    seen: list[str] = []
    seconds = {"a": iter((9.0, 2.0, 4.0, 3.0)), "b": iter((9.0, 6.0, 8.0, 12.0))}

    def turn(name: str) -> Turn:
        def taken() -> float:
            seen.append(name)
            return next(seconds[name])

        return taken

    row = take_turns({name: turn(name) for name in seconds}, rounds=3, parts=2)
    assert "".join(seen) == "abbaabba"
    assert (row["a_s"], row["a_least_s"], row["a_spread"]) == (1.5, 1.0, 2.0)  # the first turn only warms up
    found = ratios(row, ["b"], "a", "_auto")
    assert found == {"ratio_b_auto": pytest.approx(4 / 1.5), "least_ratio_b_auto": 3.0}


def test_growth_is_the_median_slope_of_what_was_sampled():
    growth = soak.Growth(os.getpid())
    growth.sample(0)
    assert growth.samples[0][1] > 1 << 20 and min(growth.samples[0][2:]) > 0
    growth.samples = [(done, 10 * done + 900 * (done == 90), 4, 9) for done in range(100)]
    assert growth.slopes(50, 1000) == {"memory": 10_000, "threads": 0, "handles": 0}
    assert growth.slopes(99, 1000)["memory"] == 0, "of one sample nothing is said"
    assert growth.parts(50) == [(24, 245, 4, 9), (74, 745, 4, 9)]


def test_the_chart_shows_the_numbers_that_are_kept(tmp_path):
    rows = json.loads(growth.DATA.read_text(encoding="utf-8"))
    assert {row["size"] for row in rows} == set(growth.AXES["size"][1])
    growth.chart(rows, tmp_path / "growth.png")
    with Image.open(tmp_path / "growth.png") as drawn, Image.open(growth.CHART) as kept:
        assert drawn.size == kept.size and drawn.convert("RGB").tobytes() == kept.convert("RGB").tobytes()


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("train", {"size": 32, "text": 3, "rank": 2, "checkpointing": True}),
        ("sample", {"size": 32, "texts": [3, 2], "guidance": 4.0, "sigmas": [1.0, 0.5, 0.0]}),
    ],
)
def test_comfyuis_own_code_takes_turns(kind, settings):
    """The real node and the real sampler, on a model with other depths than Chroma 1's."""
    from _environment import host_folder, is_host

    if not is_host(host_folder()):
        pytest.skip("needs a ComfyUI")
    config = vars(ChromaTransformer(**SMALL).config)
    with ComfyUI(kind, config, 1, "wall", **settings) as peer:
        assert all(0 < peer.turn() < 60 for _ in range(3))
        assert peer.process.poll() is None
    assert peer.process.poll() is not None
