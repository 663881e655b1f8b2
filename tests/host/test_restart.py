"""A host that is ended in the middle of everything, and started again: nothing is lost."""

from __future__ import annotations

import json
import os
import signal

import pytest

from _host import Host
from prompts import job_of, train
from restarting import restarted
from waiting import until

SETTINGS = "/chromakit/settings"
CHOICE = "prompts_while_training"
ENDLESS = 1_000_000


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ending_the_host_saves_the_job_and_a_restart_keeps_the_choice(server: Host, number: signal.Signals):
    """Ctrl-C, and what docker stop, systemd and Slurm send."""
    if os.name == "nt" and number == signal.SIGTERM:
        pytest.skip("Windows ends a process without asking")
    assert server.post(SETTINGS, {CHOICE: "finish"})[0] == 200
    job = job_of(server.run(train(f"interrupted by {number.name}", ENDLESS)))
    until(lambda: (now := server.get(f"/chromakit/jobs/{job}"))["state"] == "running" and now["step"] >= 2, "steps")
    with restarted(server, number):
        saved = json.loads((server.base / "output" / "chromakit" / "jobs" / job / "job.json").read_text())
        assert saved["state"] == "interrupted" and saved["checkpoint"] == saved["step"] >= 2
    try:
        assert server.get(SETTINGS) == {CHOICE: "finish", "choices": ["yield", "finish", "refuse"], "held": 0}
        assert "settings.json" not in server.log_path.read_text(encoding="utf-8", errors="replace")
        found = server.get(f"/chromakit/jobs/{job}")
        assert (found["state"], found["step"]) == ("interrupted", saved["step"])
    finally:
        server.post(SETTINGS, {CHOICE: "yield"})
