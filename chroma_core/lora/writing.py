"""LoRAs in the names of other programs: what each dialect calls a tensor, how it states alpha, and what it can hold.

| dialect | layers | alpha | holds |
|---|---|---|---|
| `universal` | diffusers | a tensor | LoRA, DoRA, LoKr |
| `peft` | diffusers | `adapter_config.json` | LoRA, DoRA |
| `diffusers` | diffusers | folded: 1, also in the header | LoRA, DoRA |
| `simpletuner` | diffusers | folded: 1 | LoRA |
| `ai-toolkit` | original, fused | folded: 1 | LoRA |
| `kohya` | original, fused | a tensor | LoRA, DoRA |
| `onetrainer` | diffusers | a tensor | LoRA, DoRA |
| `lycoris` | diffusers | a tensor | LoRA, DoRA, LoKr |

*folded*: where the names have no place for alpha that every reader looks at, alpha / rank is multiplied into `up`, so
that the factor 1 which those readers assume is right.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..errors import LoraError
from .fusing import folded, fused_modules
from .modules import AdapterModule, LokrModule, LoraFile, LoraModule

Dialect = Literal["universal", "peft", "diffusers", "kohya", "ai-toolkit", "onetrainer", "simpletuner", "lycoris"]
"""What `write_lora` writes."""

DIALECTS: tuple[Dialect, ...] = get_args(Dialect)

ADAPTER_CONFIG = "lora_adapter_metadata"
"""The header field in which diffusers keeps PEFT's configuration."""


@dataclass(frozen=True)
class Style:
    """How a dialect names tensors. `{}` in `key` stands for the layer."""

    key: str
    down: str = "lora_A.weight"
    up: str = "lora_B.weight"
    magnitude: str | None = None
    column: bool = True
    lokr: bool = False
    flat: bool = False
    fused: bool = False
    alpha: Literal["tensor", "folded", "config"] = "tensor"


_KOHYA: dict[str, Any] = {"down": "lora_down.weight", "up": "lora_up.weight", "magnitude": "dora_scale", "flat": True}
_PEFT: dict[str, Any] = {"magnitude": "lora_magnitude_vector", "column": False}
STYLES: dict[Dialect, Style] = {
    "universal": Style("transformer.{}", magnitude="dora_scale", lokr=True),
    "peft": Style("base_model.model.{}", **_PEFT, alpha="config"),
    "diffusers": Style("transformer.{}", **_PEFT, alpha="folded"),
    "kohya": Style("lora_unet_{}", **_KOHYA, fused=True),
    "ai-toolkit": Style("diffusion_model.{}", fused=True, alpha="folded"),
    "onetrainer": Style("lora_transformer_{}", **_KOHYA),
    "simpletuner": Style("transformer.{}", alpha="folded"),
    "lycoris": Style("lycoris_{}", **_KOHYA, lokr=True),
}


@dataclass(frozen=True)
class Written:
    """The content of a file in some dialect; `config`: what goes into PEFT's `adapter_config.json`, if it has one."""

    tensors: dict[str, Tensor]
    header: dict[str, str]
    config: dict[str, Any] | None = None


def written(lora: LoraFile, dialect: str) -> Written:
    """The tensors and the header of `lora` in `dialect`, as copies in the dtype they have.

    Raises LoraError for an unknown dialect, and for a kind of adapter that it cannot hold, naming those that can.
    """
    style = _style(dialect)
    for name, module in lora.modules.items():
        _check_held(dialect, style, name, module)
    if style.magnitude == "lora_magnitude_vector" and len(lora.kinds) > 1:
        raise LoraError(
            f"The LoRA is not written in the {dialect} dialect: some of its layers are DoRA and some are not, and PEFT "
            "has one kind for all. The universal dialect holds both."
        )
    modules: Mapping[str, AdapterModule] = lora.modules
    if style.fused:
        modules = fused_modules(modules)
    if style.alpha == "folded":
        modules = {name: folded(module) for name, module in modules.items() if isinstance(module, LoraModule)}
    tensors: dict[str, Tensor] = {}
    for name, module in modules.items():
        key = style.key.format(name.replace(".", "_") if style.flat else name)
        # Copies: layers split from a fused one share their down matrix, which the file format does not allow.
        tensors |= {f"{key}.{leaf}": t.detach().clone() for leaf, t in _leaves(style, module).items()}
        if style.alpha == "tensor":
            tensors[f"{key}.alpha"] = torch.tensor(float(module.alpha))
    header = {key: value for key, value in lora.metadata.items() if key != ADAPTER_CONFIG}
    config = None
    if dialect == "peft":
        config = peft_config(modules)
    elif dialect == "diffusers":
        values = {f"transformer.{key}": value for key, value in peft_config(modules).items()}
        header[ADAPTER_CONFIG] = json.dumps(values, indent=2, sort_keys=True)
    return Written(tensors, {"format": "pt", **header}, config)


def peft_config(modules: Mapping[str, AdapterModule]) -> dict[str, Any]:
    """The configuration with which PEFT builds exactly these layers, at these ranks and alphas.

    PEFT takes listed target names, and keys of its patterns, for *endings*: `proj_out` would also be the 38 `proj_out`
    of the single blocks. Hence one regular expression over whole names, and `^` before the keys.
    """
    ranks = {name: module.rank for name, module in modules.items() if isinstance(module, LoraModule)}
    alphas = {name: module.alpha for name, module in modules.items()}
    rank, alpha = _commonest(list(ranks.values())), _commonest(list(alphas.values()))
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": _whole(alpha),
        "rank_pattern": {f"^{re.escape(name)}": found for name, found in ranks.items() if found != rank},
        "alpha_pattern": {f"^{re.escape(name)}": _whole(found) for name, found in alphas.items() if found != alpha},
        "target_modules": "|".join(re.escape(name) for name in modules),
        "use_dora": any(isinstance(module, LoraModule) and module.magnitude is not None for module in modules.values()),
        "use_rslora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }


def holders(kind: str) -> list[str]:
    """The dialects that hold a kind of adapter."""
    return [name for name, style in STYLES.items() if _holds(style, kind)]


def _style(dialect: str) -> Style:
    if dialect not in STYLES:
        raise LoraError(f"'{dialect}' is no dialect that ChromaKit writes. Choose one of: {', '.join(DIALECTS)}.")
    return STYLES[dialect]


def _holds(style: Style, kind: str) -> bool:
    held: dict[str, Callable[[], bool]] = {"dora": lambda: style.magnitude is not None, "lokr": lambda: style.lokr}
    return held.get(kind, lambda: True)()


def _check_held(dialect: str, style: Style, name: str, module: AdapterModule) -> None:
    if not _holds(style, module.kind):
        shown = {"dora": "DoRA", "lokr": "LoKr"}[module.kind]
        raise LoraError(
            f"The LoRA is not written in the {dialect} dialect, which has no place for a {shown} ('{name}'). "
            f"These have: {', '.join(holders(module.kind))}."
        )
    if isinstance(module, LokrModule) and module.rows is not None:
        raise LoraError(
            f"The LoKr is not written: '{name}' is a part of a fused layer that is no Kronecker product by itself. Use "
            "the file that it was read from."
        )


def _leaves(style: Style, module: AdapterModule) -> dict[str, Tensor]:
    """How a module's tensors are called after its name."""
    if isinstance(module, LokrModule):
        return {f"lokr_{factor}": tensor.contiguous() for factor, tensor in module.factors().items()}
    leaves = {style.down: module.down, style.up: module.up}
    if module.magnitude is None:
        return leaves
    assert style.magnitude is not None
    # One column where ComfyUI reads it: it multiplies the weight [out, in] by it.
    return {**leaves, style.magnitude: module.magnitude[:, None] if style.column else module.magnitude}


def _commonest(values: list[Any]) -> Any:
    return max(sorted(set(values)), key=values.count)


def _whole(value: float) -> float | int:
    """Whole numbers as such: PEFT's `lora_alpha` is one by its own annotation."""
    return int(value) if float(value).is_integer() else value
