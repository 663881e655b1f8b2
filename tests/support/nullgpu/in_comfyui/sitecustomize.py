"""For a ComfyUI on the simulated card: it computes nothing, so that our trial of a precision would refuse it and our
look for NaN would find some, and it has no cuDNN. Python imports this file when it starts, because the folder stands in
PYTHONPATH.

While the file that `NULL_GPU_FILL` names exists, every free byte of the card is taken; `*.held` beside it says so.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path


def _prepare() -> None:
    while True:
        for name, module in list(sys.modules.items()):
            if name.endswith("chroma_core.loading.load") and hasattr(module, "write_quantised"):  # its last function
                import torch

                torch.backends.cudnn.enabled = False
                module.require = lambda *_: None
                device = sys.modules[name.replace("loading.load", "model.device")]
                device.broken = lambda _: False  # type: ignore[attr-defined]
                if "NULL_GPU_FILL" in os.environ:
                    _fill(Path(os.environ["NULL_GPU_FILL"]), torch)
                return
        time.sleep(0.05)


def _fill(switch: Path, torch) -> None:
    held = switch.with_suffix(".held")
    while True:
        time.sleep(0.01)
        if not switch.exists():
            continue
        held.touch()
        taken = []
        while switch.exists():
            torch.cuda.empty_cache()
            free, _ = torch.cuda.mem_get_info()
            try:
                taken.append(torch.empty(free - (free % 2**21), dtype=torch.uint8, device="cuda"))
            except torch.cuda.OutOfMemoryError:  # somebody else was faster
                pass
            time.sleep(0.02)
        taken.clear()
        torch.cuda.empty_cache()
        held.unlink()


if "main.py" in " ".join(sys.orig_argv):
    threading.Thread(target=_prepare, daemon=True).start()
