"""Makes the images beside the example workflows (`.jpg`, shown under Templates) by running each in a real host.

python -m tools.workflows.images                          a few minutes: it really trains
python -m tools.workflows.images chroma_4_real_06gb …     only these

The presets for the real Chroma are not run: theirs is drawn, with the size of the GPU and what is done on it. No image
here is of the real model.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from io import BytesIO
from pathlib import Path

from _environment import ensure_environment, say
from _host import Host, start_host
from _workflows import FOLDER, load_api

SIDE = 320  # pixels
FIRST = "chroma_2_first_lora"  # others use the LoRA that it trains
PRESET = "chroma_4_real_"


def image_of(host: Host, name: str):
    """The workflow's last image, two of one size side by side; for one that only trains, the job's last preview."""
    from PIL import Image

    history = host.run(load_api(name), timeout=3600)
    if images := host.images(history):
        return _side_by_side(*images) if len({image.size for image in images}) < len(images) else images[-1]
    (job,) = next(output["chromakit_job"] for output in history["outputs"].values() if "chromakit_job" in output)
    while (status := host.get(f"/chromakit/jobs/{job}"))["state"] != "completed":
        if status["state"] not in ("queued", "preparing", "running"):
            raise SystemExit(f"error: the job is {status['state']}: {status['message']}")
        time.sleep(1)
    _, body = host.request("GET", f"/chromakit/jobs/{job}/samples/{len(status['samples']) - 1}")
    return Image.open(BytesIO(body)).convert("RGB")


def _side_by_side(left, right):
    from PIL import Image

    both = Image.new("RGB", (left.width + right.width, left.height))
    both.paste(left, (0, 0))
    both.paste(right, (left.width, 0))
    return both


def thumbnail(image):
    """The whole image in a square; what is longer one way is put on white."""
    from PIL import Image, ImageOps

    return ImageOps.pad(image, (SIDE, SIDE), Image.Resampling.BICUBIC, "white")


def card(name: str):
    """What a preset's image says: the GPU, and what is done on it. None of it is of the real model."""
    from PIL import Image, ImageDraw, ImageFont

    gigabytes, _, use = name.removeprefix(PRESET).partition("gb")
    made = Image.new("RGB", (SIDE, SIDE), "#3b3561" if use else "#1f4e46")
    draw = ImageDraw.Draw(made)
    for text, size, y in ((f"{int(gigabytes)} GB", 4, 0.45), ("use a LoRA" if use else "train a LoRA", 9, 0.7)):
        draw.text((SIDE / 2, SIDE * y), text, "white", ImageFont.load_default(size=SIDE / size), "mm")
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = sorted(path.stem for path in FOLDER.glob("*.json"))
    parser.add_argument("names", nargs="*", choices=[[], *known], metavar="NAME", help="workflows; none: all")
    chosen = parser.parse_args().names or known
    ensure_environment()
    for name in (each for each in chosen if each.startswith(PRESET)):
        card(name).save(FOLDER / f"{name}.jpg", quality=88)
        say(f"wrote example_workflows/{name}.jpg")
    chosen = [name for name in chosen if not name.startswith(PRESET)]
    if not chosen:
        return 0
    names = sorted({FIRST, *chosen}, key=lambda name: (name != FIRST, name))
    with tempfile.TemporaryDirectory() as base, start_host(Path(base)) as host:
        for name in names:
            made = thumbnail(image_of(host, name))
            if name not in chosen:
                continue
            made.save(FOLDER / f"{name}.jpg", quality=88)
            say(f"wrote example_workflows/{name}.jpg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
