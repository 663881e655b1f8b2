"""Caching a dataset's latents beside the usual loop, and what a second start costs in a new process.

    python -m benchmarks.caching --images 64 --size 512 --start 10000 --json

The peer is what trainers commonly do: decode, encode, write, one image after the other; here with the same functions,
so that both give the same entries, which is told. The images are JPEGs of
1600×1200 pixels, the VAE is that of the embedded `tiny` model. `--start N` is a folder of N small images with captions,
cached once; what is timed is the CPU time of finding everything cached, in a new process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from chroma_core.data.cache import LatentTextCache, decoded
from chroma_core.data.images import bucket_of
from chroma_core.data.remembered import Remembered
from chroma_core.data.samples import cache_samples, cache_texts, caption_texts
from chroma_core.data.scan import DatasetConfig, DatasetScan, scan
from chroma_core.data.views import views_of
from chroma_core.loading.load import load_text_encoder, load_vae
from chroma_core.loading.spec import ModelSpec
from chroma_core.model.vae import Autoencoder
from chroma_core.sampling.recipe import CANONICAL
from chroma_core.sampling.text import TextCondition

PHOTO = (1600, 1200)
TINY = ModelSpec(flavour="tiny")


def write_photos(folder: Path, count: int, size: tuple[int, int]) -> None:
    """Smooth random JPEGs, all different, each with a caption."""
    folder.mkdir(parents=True)
    draws = np.random.default_rng(0)
    for number in range(count):
        small = draws.integers(0, 255, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(folder / f"{number:06d}.jpg", quality=90)
        (folder / f"{number:06d}.txt").write_text(f"photo number {number} of a thing", encoding="utf-8")


def one_after_the_other(found: DatasetScan, cache: LatentTextCache, size: int, vae: Autoencoder) -> None:
    """The usual loop."""
    for image in found.items:
        views = views_of(image, bucket_of(image, found.config, size), found.config)
        cache.add_latents(cache.encoded(image, views, decoded(image, views[0]), vae), views[0])


def measure(count: int, size: int, rounds: int, device: str) -> dict[str, float]:
    """Images a second, ours and one after the other, in turn; and that their entries are the same."""
    vae = load_vae(TINY, "cpu").to(device)
    seconds: dict[str, list[float]] = {"ours": [], "peer": []}
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary)
        write_photos(base / "photos", count, PHOTO)
        found = scan(DatasetConfig(folder=str(base / "photos")), size)
        ways: dict[str, Callable[[LatentTextCache], object]] = {
            "ours": lambda cache: cache_samples(found, cache, size, lambda: nullcontext(vae)),
            "peer": lambda cache: one_after_the_other(found, cache, size, vae),
        }
        for number in range(rounds + 1):
            for way, work in ways.items():
                cache = LatentTextCache(base / f"{way}-{number}", "vae", "text", CANONICAL)
                started = time.perf_counter()
                work(cache)
                if number:
                    seconds[way].append(time.perf_counter() - started)
        entries = [sorted((base / f"{way}-0").rglob("*.safetensors")) for way in ways]
        same = [[path.read_bytes() for path in paths] for paths in entries]
    ours, peer = (statistics.median(seconds[way]) for way in ways)
    return {
        "pictures": count,
        "size": size,
        "ours_per_s": count / ours,
        "peer_per_s": count / peer,
        "ratio_peer": peer / ours,
        "equal_entries": len(same[0]) == count and same[0] == same[1],
    }


def start(folder: Path, size: int = 64) -> dict[str, float]:
    """What finding everything cached costs in this process: CPU seconds, and images."""
    begun = time.process_time()
    known = Remembered(folder / "cache")
    found = scan(DatasetConfig(folder=str(folder / "photos")), size, known)
    known.save()
    cache = LatentTextCache(folder / "cache", "vae", "text", CANONICAL)
    loaded: list[str] = []

    def lend(name: str, load: Callable) -> Callable:
        return lambda: [loaded.append(name), nullcontext(load(TINY, "cpu"))][1]

    samples, _ = cache_samples(found, cache, size, lend("vae", load_vae))
    cache_texts(caption_texts(samples), cache, lend("text encoder", load_text_encoder))
    return {"cpu_s": time.process_time() - begun, "images": len(samples), "loaded": len(loaded)}


def second_start(count: int) -> dict[str, float]:
    """`start` in a new process, after a first that filled the cache. Latents and texts are written without a model."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_photos(folder / "photos", count, (64, 64))
        known = Remembered(folder / "cache")
        time.sleep(2.5)  # what was written just now is not remembered
        found = scan(DatasetConfig(folder=str(folder / "photos")), 64, known)
        known.save()
        cache = LatentTextCache(folder / "cache", "vae", "text", CANONICAL)
        for image in found.items:
            (view,) = views_of(image, bucket_of(image, found.config, 64), found.config)
            cache.add_latents({cache.latents_path(image, view): torch.zeros(16, 8, 8)}, view)
            for text in (image.captions[0], ""):
                cache.keep_text(text, TextCondition(torch.zeros(1, 8), text, 1))
        program = f"from pathlib import Path; from benchmarks.caching import start; print(start(Path({temporary!r})))"
        said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    values = json.loads(said.replace("'", '"'))
    if values["loaded"] or values["images"] != count:
        raise SystemExit(f"the second start found not everything: {values}")
    return {"start_pictures": count, "start_cpu_s": values["cpu_s"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64, help="JPEGs to cache")
    parser.add_argument("--size", type=int, default=512, help="pixels a side")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured (default: 3)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--start", type=int, default=10_000, help="images of the second start; 0: not measured")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    options = parser.parse_args()
    row = measure(options.images, options.size, options.rounds, options.device)
    if options.start:
        row |= second_start(options.start)
    row = {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}
    print(json.dumps(row) if options.json else "\n".join(f"{key:<16} {value}" for key, value in row.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
