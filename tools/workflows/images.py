"""Makes the images beside the example workflows (`.jpg`, shown under Templates): real ones in a real host, or drawings.

python -m tools.workflows.images                          a few minutes: it really trains
python -m tools.workflows.images chroma_4_real_06gb …     only these

What an image of `tiny` would not tell from its neighbours is drawn (drawing.py), as are all for the real Chroma, which
are not run. No image here is of the real model.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from _environment import ensure_environment, say
from _host import Host, start_host
from _workflows import FOLDER, load_api, window_files

FIRST = "chroma_2_first_lora"  # others use the LoRA that it trains


def image_of(host: Host, name: str):
    """The workflow's last image, or two of one size side by side."""
    images = host.images(host.run(load_api(name), timeout=3600))
    return _side_by_side(*images) if len({image.size for image in images}) < len(images) else images[-1]


def _side_by_side(left, right):
    from PIL import Image

    both = Image.new("RGB", (left.width + right.width, left.height))
    both.paste(left, (0, 0))
    both.paste(right, (left.width, 0))
    return both


def thumbnail(image):
    """The whole image in a square; what is longer one way is put on a dark ground."""
    from PIL import Image, ImageOps

    from .drawing import SIDE

    return ImageOps.pad(image, (SIDE, SIDE), Image.Resampling.BICUBIC, "#1c1d20")


def _write(image, path: Path) -> None:
    image.save(path, quality=88)
    say(f"wrote {path.relative_to(FOLDER.parent)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    files = {name: path.with_suffix(".jpg") for name, path in window_files().items()}
    parser.add_argument("names", nargs="*", choices=[[], *sorted(files)], metavar="NAME", help="workflows; none: all")
    chosen = parser.parse_args().names or list(files)
    ensure_environment()
    from .drawing import DRAWINGS, drawn

    for name in DRAWINGS.keys() & chosen:
        _write(drawn(name), files[name])
    if not (run := set(chosen) - DRAWINGS.keys()):
        return 0
    with tempfile.TemporaryDirectory() as base, start_host(Path(base)) as host:
        for name in sorted(run | {FIRST}, key=lambda name: (name != FIRST, name)):
            made = thumbnail(image_of(host, name))
            if name in chosen:
                _write(made, files[name])
    return 0


if __name__ == "__main__":
    sys.exit(main())
