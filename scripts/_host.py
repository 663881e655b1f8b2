"""The real ComfyUI with every node of this pack, for the demo and the tests; see `chroma_core.comfy.server`."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from _environment import ROOT, host_folder

if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from chroma_core.comfy.server import Host, HostError, PromptFailed, PromptRejected, free_port, start_comfyui  # noqa: E402

__all__ = ["Host", "HostError", "PromptFailed", "PromptRejected", "free_port", "pack_node_ids", "start_host"]


def pack_node_ids() -> list[str]:
    """The ids that the node files declare, read from their text: a node that failed to load is one of them too."""

    found: set[str] = set()
    for path in (ROOT / "nodes").glob("*.py"):
        found.update(re.findall(r"node_id\s*=\s*\"(Chroma\w+)\"", path.read_text(encoding="utf-8")))
    return sorted(found)


def start_host(base: Path, **options: Any) -> Host:
    """Start the server (options as `start_comfyui` has them); return when every node of the pack is there.

    Raises HostError, with the end of the log, if it does not come up or a node is missing.
    """
    host = start_comfyui(host_folder(), base, **options)
    try:
        missing = [name for name in pack_node_ids() if name not in host.get("/object_info")]
        if missing:
            raise HostError(f"the host runs, but without the pack's nodes {', '.join(missing)}.\n{host.log_tail(80)}")
    except BaseException:
        host.stop()
        raise
    return host
