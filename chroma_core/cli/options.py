"""What several commands share: flags from options, the model's flags, the type of `--lora`, the progress bar."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from ..errors import ConfigError

if TYPE_CHECKING:
    from ..loading.spec import LoraUse, ModelSpec, Offload

PARTS = ("transformer", "text_encoder", "tokenizer", "vae")
MODEL = (
    *("flavour", "folder", *PARTS, "revision", "precision", "text_precision"),
    *("offload", "resident_blocks", "offload_during_startup", "compute"),
)
"""The fields of a `ModelSpec` that are flags under their own names."""


class Bar(tqdm):
    """A progress bar that is first shown when there is progress, so that an error before that stands alone."""

    def __init__(self, unit: str, desc: str, total: int | None = None, disable: bool = False):
        super().__init__(unit=unit, desc=desc, total=total, disable=disable, delay=0.001)

    def refresh(self, *args: Any, **kwargs: Any) -> Any:
        """Show it, and, as it is shown, leave it there at the end."""
        if not self.disable:
            self.last_print_t = max(self.last_print_t, self.start_t + self.delay)
        return super().refresh(*args, **kwargs)


def add_flag(parser: argparse.ArgumentParser, owner: type, field: str, flag: str = "", **changes: Any) -> None:
    """The flag for the option `field` of `owner` (see `chroma_core.options`); `changes` are what this command has
    otherwise, `flag` the name where it is not the option's."""
    from ..options import option_of

    option = option_of(owner, field)
    given: dict[str, Any] = {"default": option.default, "help": option.sentence.replace("%", "%%")}
    if option.kind is bool:
        given["action"] = "store_true"
    elif option.choices:
        given["choices"] = list(option.choices)
    elif option.kind in (int, float):
        given["type"] = option.kind
    parser.add_argument(flag or f"--{field.replace('_', '-')}", **{**given, **changes})


def add_device(parser: argparse.ArgumentParser, what: str = "where to compute") -> None:
    """`--device`, as every command that computes has it."""
    parser.add_argument("--device", default=None, help=f"{what}: cuda, mps or cpu (default: the best there is)")


def add_json(parser: argparse.ArgumentParser, what: str = "print JSON") -> None:
    """`--json`: for programs."""
    parser.add_argument("--json", action="store_true", help=what)


def add_size(parser: argparse.ArgumentParser, of: str = "of the image, in pixels") -> None:
    """`--width` and `--height`; None where the flavour, or the image that is repeated, says it."""
    for name in ("width", "height"):
        parser.add_argument(f"--{name}", type=int, default=None, help=of)


def add_lora_file(parser: argparse.ArgumentParser) -> None:
    """The LoRA file that a command reads."""
    parser.add_argument("file", type=Path, help="a .safetensors file, or a folder of PEFT's")


def add_conversion(parser: argparse.ArgumentParser, **to: Any) -> None:
    """A LoRA file and the file that is made of it; `to` is what the command says of `--to`."""
    from ..lora.convert import DTYPES
    from ..lora.key_formats import KEY_FORMATS

    add_lora_file(parser)
    parser.add_argument("--to", choices=KEY_FORMATS, metavar="KEY_FORMAT", help=", ".join(KEY_FORMATS), **to)
    parser.add_argument("--output", type=Path, default=None, help="file, or folder to write into (default: beside)")
    parser.add_argument("--dtype", default="keep", choices=list(DTYPES), help="number format (default: keep)")


def add_model_options(parser: argparse.ArgumentParser, offload: Offload = "model") -> None:
    """The options that `spec_from` reads."""
    from ..loading.spec import ModelSpec

    changes: dict[str, dict[str, Any]] = {
        **dict.fromkeys(PARTS, {"metavar": "FILE"}),
        **dict.fromkeys(("precision", "text_precision"), {"choices": None, "metavar": "NAME"}),
        "offload": {"default": offload},
    }
    for field in MODEL:
        add_flag(parser, ModelSpec, field, **changes.get(field, {}))
    add_flag(parser, ModelSpec, "quantised_folder", "--keep-quantised", metavar="FOLDER")


def spec_from(options: argparse.Namespace) -> ModelSpec:
    """The model that the options of `add_model_options` choose."""
    from ..loading.spec import ModelSpec

    chosen = {field: getattr(options, field) for field in MODEL}
    return ModelSpec(**chosen, quantised_folder=options.keep_quantised)


def add_lora_flags(parser: argparse.ArgumentParser) -> None:
    """`--lora`, repeated for several, and the flags that say more of the one before them."""
    from ..loading.spec import LoraUse

    parser.add_argument(
        "--lora", type=lora_use, action="append", default=[], metavar="FILE[@STRENGTH]", help="repeat for several"
    )
    of_the_last = {"action": _OfTheLastLora, "dest": "lora", "default": argparse.SUPPRESS}
    for field, example in (("blocks", "PATTERN:FACTOR,…"), ("schedule", "PLACE:FACTOR,…")):
        text = {"metavar": example, "choices": None}
        add_flag(parser, LoraUse, field, f"--lora-{field}", **of_the_last, **text)


class _OfTheLastLora(argparse.Action):
    """Sets a field of the LoRA that the last `--lora` before it named."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None):
        loras, field = namespace.lora, (option_string or "").removeprefix("--lora-")
        if not loras:
            raise ConfigError(f"{option_string} belongs to the LoRA before it: name one with --lora first.")
        namespace.lora = [*loras[:-1], replace(loras[-1], **{field: values})]


def lora_use(text: str) -> LoraUse:
    """FILE[@STRENGTH] as a `LoraUse`: the type of `--lora`. Raises ConfigError."""
    from ..loading.spec import LoraUse

    path, separator, strength = text.rpartition("@")
    if not separator:
        return LoraUse(text)
    try:
        return LoraUse(path, float(strength))
    except ValueError:
        raise ConfigError(f"--lora {text}: what stands after the last @ must be a number, the strength.") from None
