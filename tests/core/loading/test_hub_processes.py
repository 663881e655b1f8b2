"""Downloads in processes of their own: by environment alone, killed, out of room, with a terminal, over xet."""

import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import forked
from chroma_core.loading.hub import fetch
from chroma_core.model.flavours import flavour
from hub_cases import ROOT, SHARD, assert_same, cache_fixture, chroma_files, hub_fixture, partial, run  # noqa: F401
from hub_server import REPOSITORY, Fault, sha256
from waiting import until

ALL = 1 << 40  # bytes that no download here reaches

IMPORTS = "from chroma_core.model.flavours import flavour; from chroma_core.loading.hub import *"


def test_a_fresh_process_driven_by_its_environment_alone_killed_and_started_again(hub, cache):
    """`kill -9` in the middle of a file; the second process continues it."""
    script = f"{IMPORTS}; print(fetch(flavour('base'), ['transformer'], 'main'))"
    environment = os.environ | {"HF_TOKEN": "hf_mine", "OMP_NUM_THREADS": "1"}
    hub.pace = 20e6
    first = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)

    def half_there() -> bool:
        assert first.poll() is None
        return partial(cache).exists() and partial(cache).stat().st_size >= 10 << 20

    until(half_there)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    hub.pace, asked = 0, len(hub.log)
    second = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert second.returncode == 0, second.stderr
    assert_same(Path(second.stdout.strip()))
    assert [r.range for r in hub.log[asked:] if r.host == "localhost"][0] == f"bytes={10 << 20}-"
    assert {r.token for r in hub.asked(REPOSITORY)} == {"Bearer hf_mine"}
    assert {r.token for r in hub.log if r.host == "localhost"} == {None}  # the token never leaves the Hub


@pytest.mark.skipif(os.name == "nt", reason="limits on a file's size are set with the resource module")
def test_a_disk_that_takes_no_more_in_the_middle_of_a_file(hub, cache):
    script = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (15 << 20,) * 2)\n"
        "from chroma_core.model.flavours import flavour\nfrom chroma_core.loading.hub import *\n"
        "try: fetch(flavour('base'), ['transformer'])\n"
        "except ModelFileError as error: print(error)"
    )
    done = forked.run(forked.LIGHT, "-c", script)
    assert "no room in the cache" in done.stdout and "is kept" in done.stdout, done
    assert partial(cache).stat().st_size >= 10 << 20
    assert_same(fetch(flavour("base"), ["transformer"]))


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
def test_a_bar_is_drawn_in_a_terminal(hub):
    import fcntl
    import struct
    import termios

    terminal, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 120, 0, 0))
    script = f"{IMPORTS}; fetch(flavour('base'), ['transformer'])"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, stderr=slave, check=True, timeout=300)
    os.close(slave)
    drawn = b""
    while True:
        try:
            drawn += os.read(terminal, 1 << 16)
        except OSError:  # the other end is closed and all is read
            break
    os.close(terminal)
    assert b"Chroma1-Base transformer: 100%" in drawn and b"26.2M/26.2M" in drawn


UPLOAD = """
import sys, hf_xet
with hf_xet.XetSession().new_upload_commit(endpoint=sys.argv[2]) as commit:
    file = commit.start_upload_file(sys.argv[1], sha256=hf_xet.COMPUTE_SHA256)
print(file.result().xet_info.hash)
"""
DOWNLOAD = """
import sys
from chroma_core.model.flavours import flavour
from chroma_core.loading.hub import *
def stop(done, total, name):
    if done > int(sys.argv[1]):
        raise KeyboardInterrupt
try:
    print(fetch(flavour('base'), ['transformer'], on_progress=stop))
except KeyboardInterrupt:
    print('stopped')
"""


def needs_xet() -> None:
    pytest.importorskip("hf_xet")
    if not hasattr(importlib.import_module("huggingface_hub.utils._xet"), "get_xet_session"):
        pytest.skip("this huggingface_hub has no xet session to stream from: every file comes by plain HTTP")


@pytest.fixture
def xet(hub, tmp_path):
    """The server offers the shard over xet, from a content store in a folder (the real xet library at both ends)."""
    needs_xet()
    shard = tmp_path / "shard"
    shard.write_bytes(chroma_files()[SHARD])
    store = f"local://{tmp_path / 'store'}"
    hub.xet = {SHARD: (run(UPLOAD, shard, store), store)}
    return hub


def test_xet_carries_large_files_and_is_continued_too(xet, cache):
    """The library hands over up to 64 MiB at a time, so that the shard is cut here by hand to its first 7 MiB."""
    assert run(DOWNLOAD, 8 << 20) == "stopped"
    assert partial(cache).read_bytes() == chroma_files()[SHARD]
    os.truncate(partial(cache), 7 << 20)
    assert_same(Path(run(DOWNLOAD, ALL)))
    assert len(xet.asked("xet-read-token")) == 2
    assert not xet.asked(sha256(chroma_files()[SHARD]))  # nothing of it by plain HTTP


def test_a_stuck_xet_transfer_can_be_cancelled(hub, cache):
    needs_xet()
    hub.xet = {SHARD: ("ab" * 32, hub.endpoint)}
    hub.faults = [Fault("/reconstructions/", wait=60.0, times=9)]
    script = """
import time
from chroma_core.model.flavours import flavour
from chroma_core.loading.hub import *
began = []
def stop(done, total, name):
    if name == %r:
        began.append(time.monotonic())
        if began[-1] - began[0] > 2:
            raise KeyboardInterrupt
try:
    fetch(flavour('base'), ['transformer'], on_progress=stop)
except KeyboardInterrupt:
    print(time.monotonic() - began[0])
"""
    assert 2 < float(run(script % SHARD)) < 40
    assert hub.asked("/reconstructions/") and not hub.asked(sha256(chroma_files()[SHARD]))


def test_xet_can_be_switched_off_and_a_failing_one_is_replaced_by_http(xet, cache):
    digest = sha256(chroma_files()[SHARD])
    assert run(DOWNLOAD, 8 << 20) == "stopped"
    os.truncate(partial(cache), 7 << 20)
    assert run(DOWNLOAD, 18 << 20, HF_HUB_DISABLE_XET="1") == "stopped"
    assert len(xet.asked("xet-read-token")) == 1
    assert [r.range for r in xet.asked(digest)] == [f"bytes={7 << 20}-"]
    xet.xet = {SHARD: (xet.xet[SHARD][0], f"local://{cache / 'nothing'}")}
    assert_same(Path(run(DOWNLOAD, ALL)))
    assert len(xet.asked("xet-read-token")) == 2
    assert [r.range for r in xet.asked(digest)][1:] == [f"bytes={17 << 20}-"]
