"""A ComfyUI that says that it is older than the pack needs: it starts, and says what to do in its log and list."""

from __future__ import annotations

import pytest

from _environment import host_folder
from _host import Host, PromptFailed, start_comfyui
from chroma_core.comfy.old_host import NODE_ID, OLDEST
from chroma_core.comfy.server import PACK_NAME
from prompts import node

SENTENCE = f"ChromaKit needs ComfyUI {OLDEST} or newer, and this is 0.3.75: update ComfyUI."


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory):
    """A server that another pack's start script has told an old version."""
    base = tmp_path_factory.mktemp("older")
    (base / "custom_nodes" / "older").mkdir(parents=True)
    (base / "custom_nodes" / "older" / "__init__.py").write_text("NODE_CLASS_MAPPINGS = {}\n")
    (base / "custom_nodes" / "older" / "prestartup_script.py").write_text(
        "import comfyui_version\ncomfyui_version.__version__ = '0.3.75'\n"
    )
    host = start_comfyui(host_folder(), base, extra=("--whitelist-custom-nodes", PACK_NAME, "older"))
    yield host
    host.stop()


def test_one_node_says_which_version_is_needed(older: Host):
    ours = {name: info for name, info in older.get("/object_info").items() if info["category"] == "Chroma"}
    assert list(ours) == [NODE_ID]
    assert ours[NODE_ID]["display_name"] == ours[NODE_ID]["description"] == SENTENCE
    assert ours[NODE_ID]["category"] == "Chroma" and ours[NODE_ID]["output_node"]


def test_the_log_says_it_once_without_a_traceback(older: Host):
    log = older.log_tail(10_000)
    assert log.count(SENTENCE) == 1 and "Traceback" not in log and "IMPORT FAILED" not in log


def test_running_the_node_is_that_error(older: Host):
    with pytest.raises(PromptFailed) as failed:
        older.run({"only": node(NODE_ID)})
    (error,) = (body for kind, body in failed.value.messages if kind == "execution_error")
    assert error["exception_message"].strip() == SENTENCE
