"""On a ComfyUI that is too old the pack says which it needs, instead of failing somewhere inside."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from chroma_core.comfy.old_host import NODE_ID, OLDEST, complaint

ROOT = Path(__file__).resolve().parents[3]

IMPORT = """
import importlib.util, json, logging, sys
logging.basicConfig(format="%(levelname)s %(message)s")
# As ComfyUI's load_custom_node does: a module named after its path.
spec = importlib.util.spec_from_file_location("/custom_nodes/my_pack", sys.argv[1] + "/__init__.py")
module = importlib.util.module_from_spec(spec)
sys.modules["/custom_nodes/my_pack"] = module
spec.loader.exec_module(module)
nodes = getattr(module, "NODE_CLASS_MAPPINGS", {})
said = {}
for name, node in nodes.items():
    try:
        getattr(node(), node.FUNCTION)(**node.INPUT_TYPES()["required"])
    except RuntimeError as error:
        said[name] = str(error)
print(json.dumps({
    "said": said,
    "names": getattr(module, "NODE_DISPLAY_NAME_MAPPINGS", None),
    "web": getattr(module, "WEB_DIRECTORY", None),
    "entry": hasattr(module, "comfy_entrypoint"),
    "heavy": sorted({"torch", "comfy_api", "pydantic"} & set(sys.modules)),
}))
"""


def imported(folder: Path, version: str | None) -> tuple[dict, str]:
    """What the pack gives a ComfyUI of that version, and what it logs; in a process that has no other ComfyUI."""
    folder.mkdir(exist_ok=True)
    if version is not None:
        (folder / "comfyui_version.py").write_text(f'__version__ = "{version}"\n')
    done = subprocess.run(
        [sys.executable, "-c", IMPORT, str(ROOT)], cwd=folder, capture_output=True, text=True, timeout=120, check=True
    )
    return json.loads(done.stdout), done.stderr


@pytest.mark.parametrize("version", ["0.3.75", "0.16.2", None])
def test_one_that_is_too_old_gets_a_sentence(tmp_path: Path, version: str | None):
    result, log = imported(tmp_path, version)
    sentence = f"ChromaKit needs ComfyUI {OLDEST} or newer, and this is {version or 'an older one'}: update ComfyUI."
    assert log == f"ERROR {sentence}\n"
    assert result["said"] == result["names"] == {NODE_ID: sentence}
    assert result["web"] is None and not result["entry"], "the page's scripts need a newer ComfyUI, too"
    assert result["heavy"] == []


@pytest.mark.parametrize("version", [OLDEST, "0.16.10", "0.30.0", "1.0.0", "0.31.0-rc.1"])
def test_one_that_is_new_enough_gets_the_nodes(tmp_path: Path, version: str):
    result, log = imported(tmp_path, version)
    assert (result["said"], result["names"], result["web"], result["entry"], log) == ({}, None, "./web", True, "")
    assert result["heavy"] == [], "nothing is imported before ComfyUI asks for the nodes"
    assert complaint(version) is None


def test_the_version_is_the_one_that_is_declared():
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r'^requires-comfyui = ">=(.*)"$', pyproject, re.MULTILINE).group(1) == OLDEST
    assert f"ComfyUI {OLDEST} or newer" in (ROOT / "README.md").read_text(encoding="utf-8")
