"""The commands that make new files of LoRAs: at a smaller rank, merged into a model, out of two models."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .lora import model_spec
from .options import Bar, add_conversion, add_device, add_flag, add_json, add_lora_flags

MODEL = "a flavour, a transformer's file, or a diffusers folder"


def resize_options(resize: argparse.ArgumentParser) -> None:
    """What resize-lora is asked."""
    add_conversion(resize, default="universal")
    _add_rank(resize)
    resize.add_argument("--layers", action="store_true", help="also print what each layer keeps")
    add_json(resize)
    resize.set_defaults(run=_resize)


def merge_options(merge: argparse.ArgumentParser) -> None:
    """What merge-lora is asked."""
    from ..checkpoints.merge import LAYOUTS
    from ..loading.spec import LoraUse
    from ..lora.convert import DTYPES

    merge.add_argument("model", help=MODEL)
    add_lora_flags(merge)
    add_flag(merge, LoraUse, "allow_partial")
    merge.add_argument("--output", type=Path, required=True, help="the .safetensors file, or the folder, to write")
    merge.add_argument(
        "--layout",
        default="original",
        choices=LAYOUTS,
        help="original: one file, for ComfyUI and most others. diffusers: a transformer folder (default: original)",
    )
    merge.add_argument(
        "--dtype",
        default="keep",
        choices=list(DTYPES),
        help="number format of all weights. keep: the model's own; fp8 and GGUF become bf16 (default: keep)",
    )
    merge.set_defaults(run=_merge)


def extract_options(extract: argparse.ArgumentParser) -> None:
    """What extract-lora is asked."""
    extract.add_argument("base", help=f"{MODEL}: what the other was tuned from")
    extract.add_argument("tuned", help=MODEL)
    _add_rank(extract)
    extract.add_argument("--output", type=Path, required=True, help="the .safetensors file to write")
    extract.add_argument("--dtype", default="bf16", choices=["fp32", "bf16", "fp16"], help="number format")
    extract.add_argument(
        "--exact", action="store_true", help="decompose every layer exactly: on a CPU many times slower"
    )
    add_device(extract, "where to decompose")
    extract.set_defaults(run=_extract)


def _add_rank(command: argparse.ArgumentParser) -> None:
    command.add_argument("--rank", type=int, default=None, help="keep at most this rank")
    command.add_argument(
        "--energy", type=float, default=None, metavar="SHARE", help="keep no more than this share of ‖ΔW‖², e.g. 0.95"
    )


@contextmanager
def _bar(unit: str, what: str) -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar, as an `OnPart`."""
    with Bar(unit, what) as bar:

        def show(done: int, total: int, part: str) -> None:
            bar.total = total
            bar.set_postfix_str(part, refresh=False)
            bar.update(done - bar.n)

        yield show


def _resize(options: argparse.Namespace) -> None:
    from ..lora.convert import convert_lora
    from ..lora.lowrank import Truncation

    how = Truncation(options.rank, options.energy)
    made = convert_lora(options.file, options.to, options.output, options.dtype, how)
    assert made.resized is not None
    if options.json:
        layers: dict[str, Any] = {name: dataclasses.asdict(kept) for name, kept in made.resized.layers.items()}
        print(json.dumps({"file": str(made.path), "report": made.report(), "layers": layers}, ensure_ascii=False))
        return
    print(made.path)
    print(made.report(), file=sys.stderr)
    if options.layers:
        print(made.resized.table())


def _merge(options: argparse.Namespace) -> None:
    from ..checkpoints.merge import merge_loras

    uses = [dataclasses.replace(use, allow_partial=options.allow_partial) for use in options.lora]
    with _bar("tensor", "merging") as show:
        made = merge_loras(model_spec(options.model), uses, options.output, options.layout, options.dtype, show)
    print(made.path)
    print(made.report, file=sys.stderr)


def _extract(options: argparse.Namespace) -> None:
    from ..checkpoints.extract import extract_lora
    from ..lora.lowrank import Truncation
    from ..model.device import best_device

    how = Truncation(options.rank, options.energy)
    with _bar("tensor", "comparing") as show:
        made = extract_lora(
            model_spec(options.base),
            model_spec(options.tuned),
            options.output,
            how,
            options.dtype,
            options.exact,
            best_device(options.device),
            show,
        )
    print(made.path)
    print(made.report(), file=sys.stderr)
