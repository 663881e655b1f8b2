"""SIGKILL at ten random moments: every resumed run ends with the bits of the uninterrupted one."""

import sys

import pytest

import kill_resume
from training_cases import model_folder


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork server on Windows; run scripts/kill_resume.py")
def test_ten_kills_ten_identical_results(tmp_path):
    lines = []
    model = {"folder": str(model_folder(tmp_path / "model"))}
    identical = kill_resume.kill_and_compare(model, tmp_path / "runs", kills=10, seed=1, steps=16, say=lines.append)
    assert identical == 10, "\n".join(lines)
    assert any("half written" in line for line in lines) and any("running" in line for line in lines)
