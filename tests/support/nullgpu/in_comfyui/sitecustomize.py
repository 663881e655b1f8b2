"""For a ComfyUI on the simulated card, which has no cuDNN. Python imports this file when it starts, because the folder
stands in PYTHONPATH."""

from __future__ import annotations

import sys
import threading
import time


def _prepare() -> None:
    while True:
        if any(name.endswith("chroma_core.loading.load") for name in list(sys.modules)):  # torch is imported by then
            import torch

            torch.backends.cudnn.enabled = False
            return
        time.sleep(0.05)


if "main.py" in " ".join(sys.orig_argv):
    threading.Thread(target=_prepare, daemon=True).start()
