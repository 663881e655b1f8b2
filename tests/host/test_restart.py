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


@pytest.mark.skipif(os.name == "nt", reason="Windows ends a process without asking")
def test_ending_the_host_saves_the_job_and_a_restart_keeps_the_choice(server: Host):
    """By SIGTERM, which docker stop, systemd and Slurm send; Ctrl-C is in tests/browser/test_jobs_tab.py."""
    assert server.post(SETTINGS, {CHOICE: "finish"})[0] == 200
    job = job_of(server.run(train("interrupted", ENDLESS)))
    until(lambda: (now := server.get(f"/chromakit/jobs/{job}"))["state"] == "running" and now["step"] >= 2, "steps")
    with restarted(server, signal.SIGTERM):
        saved = json.loads((server.base / "output" / "chromakit" / "jobs" / job / "job.json").read_text())
        assert saved["state"] == "interrupted" and saved["checkpoint"] == saved["step"] >= 2
    try:
        assert server.get(SETTINGS) == {CHOICE: "finish", "choices": ["yield", "finish", "refuse"], "held": 0}
        assert "settings.json" not in server.log_path.read_text(encoding="utf-8", errors="replace")
        found = server.get(f"/chromakit/jobs/{job}")
        assert (found["state"], found["step"]) == ("interrupted", saved["step"])
    finally:
        server.post(SETTINGS, {CHOICE: "yield"})
