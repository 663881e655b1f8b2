"""Makes the pictures beside the example workflows (`.jpg`, shown under Templates) by running each in a real host.

python scripts/build_workflow_pictures.py        a few minutes: it really trains
"""

from __future__ import annotations

import sys
import tempfile
import time
from io import BytesIO
from pathlib import Path

from _environment import ensure_environment, say
from _host import Host, start_host
from _workflows import FOLDER, load_api

SIDE = 320  # pixels
FIRST = "chroma_train_lora"  # chroma_3_use_lora uses the LoRA that it trains


def picture_of(host: Host, name: str):
    """The workflow's last picture; for one that only trains, the job's last preview."""
    from PIL import Image

    history = host.run(load_api(name), timeout=3600)
    if pictures := host.images(history):
        return pictures[-1]
    job = host.get("/chromakit/jobs")[0]["id"]
    while (status := host.get(f"/chromakit/jobs/{job}"))["state"] != "completed":
        if status["state"] not in ("queued", "preparing", "running"):
            raise SystemExit(f"error: the job is {status['state']}: {status['message']}")
        time.sleep(1)
    _, body = host.request("GET", f"/chromakit/jobs/{job}/samples/{len(status['samples']) - 1}")
    return Image.open(BytesIO(body)).convert("RGB")


def main() -> int:
    ensure_environment()
    from PIL import Image

    names = sorted((path.stem for path in FOLDER.glob("*.json")), key=lambda name: (name != FIRST, name))
    with tempfile.TemporaryDirectory() as base, start_host(Path(base)) as host:
        for name in names:
            picture = picture_of(host, name).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            picture.save(FOLDER / f"{name}.jpg", quality=88)
            say(f"wrote example_workflows/{name}.jpg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
