"""A host that is ended in the middle of everything, and started again: nothing is lost."""

from __future__ import annotations

import json
import os
import signal
import time

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
    load, asked = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1)), time.time()
    with restarted(server, signal.SIGTERM):
        saved = json.loads((server.base / "output" / "chromakit" / "jobs" / job / "job.json").read_text())
        assert saved["state"] == "interrupted" and saved["checkpoint"] == saved["step"] >= 2
        assert saved["updated"] - asked < 10 * load, "docker stop kills after ten seconds"
    try:
        assert server.get(SETTINGS) == {CHOICE: "finish", "choices": ["yield", "finish", "refuse"], "held": 0}
        assert "settings.json" not in server.log_path.read_text(encoding="utf-8", errors="replace")
        found = server.get(f"/chromakit/jobs/{job}")
        assert (found["state"], found["step"]) == ("interrupted", saved["step"])
    finally:
        server.post(SETTINGS, {CHOICE: "yield"})


def test_a_later_version_s_settings_are_left_alone(server: Host):
    assert server.post(SETTINGS, {CHOICE: "yield"})[0] == 200
    file = server.base / "user/chromakit/settings.json"
    ours, later = file.read_text(), '{"format": 2, "prompts_while_training": "yield", "and": "more"}'
    file.write_text(later)
    try:
        code, answer = server.post(SETTINGS, {CHOICE: "finish"})
        assert code == 400 and "settings.json' has the format 2, which a later version" in answer["error"]
        assert file.read_text() == later and server.get(SETTINGS)[CHOICE] == "yield"
    finally:
        file.write_text(ours)
