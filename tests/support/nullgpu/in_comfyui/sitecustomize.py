"""For a ComfyUI on the simulated card: it computes nothing, so that our trial of a precision would refuse it, and it
has no cuDNN. Python imports this file when it starts, because the folder stands in PYTHONPATH."""

from __future__ import annotations

import sys
import threading
import time


def _prepare() -> None:
    while True:
        for name, module in list(sys.modules.items()):
            if name.endswith("chroma_core.loading.load") and hasattr(module, "write_quantised"):  # its last function
                import torch

                torch.backends.cudnn.enabled = False
                module.require = lambda *_: None
                return
        time.sleep(0.05)


if "main.py" in " ".join(sys.orig_argv):
    threading.Thread(target=_prepare, daemon=True).start()
