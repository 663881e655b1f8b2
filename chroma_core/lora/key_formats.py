"""Key formats, the ways in which LoRA files name things: from a key in any known one to Chroma's layers and back.

Read:

| key format | keys | written by |
|---|---|---|
| `universal` | `transformer.<diffusers name>.lora_A/B.weight` and `.alpha` | ChromaKit, diffusers, SimpleTuner |
| `peft` | `base_model.model.<diffusers name>.lora_A/B[.adapter].weight` | PEFT's save_pretrained |
| `native` | `diffusion_model.<original name>.lora_A/B` or `lora_down/up` | ai-toolkit, ComfyUI |
| `kohya` | `lora_unet_<original name with _>.lora_down/up` and `.alpha` | sd-scripts and its descendants |
| `onetrainer` | `lora_transformer_<diffusers name with _>…` | OneTrainer |
| `lycoris` | `lycoris_<diffusers name with _>.lokr_w1…` | LyCORIS, SimpleTuner |
| `bare` | names without a prefix | various |

Of a layer they hold `lora_A/B`, `lora_down/up`, `lora.down/up` or `lora_linear_layer.down/up` (also without
`.weight`), `alpha`, `dora_scale`, `lora_magnitude_vector` or `magnitude`, LyCORIS' `lokr_…`, `hada_…` and `oft_blocks`
with `rescale`, and differences: `diff` or `w_norm` of a weight, `diff_b` or `b_norm` of a bias (ComfyUI's *Train LoRA*,
*Extract and Save LoRA*, LyCORIS' `full` and `train_norm`), and PEFT's `lora_B.bias`.

Prefix and layout mix freely in the wild (`diffusion_model.<diffusers name>` exists), so after its prefix a name is
looked up in both layouts, with dots and with underscores.

Written:

| key format | layers | alpha | holds |
|---|---|---|---|
| `universal` | diffusers | a tensor | every kind, biases |
| `peft` | diffusers | `adapter_config.json` | LoRA, DoRA |
| `diffusers` | diffusers | folded: 1, also in the header | LoRA, DoRA |
| `simpletuner` | diffusers | folded: 1 | LoRA |
| `ai-toolkit` | original, fused | folded: 1 | LoRA, full differences, biases |
| `kohya` | original, fused | a tensor | LoRA, DoRA, full differences, biases |
| `onetrainer` | diffusers | a tensor | LoRA, DoRA of both norms |
| `lycoris` | diffusers | a tensor | every kind |

In `universal`, what ComfyUI knows by the original layout's names alone has these: the approximator's layers, and the
biases of layers that it fuses.

*folded*: where the names have no place for alpha that every reader looks at, alpha / rank is multiplied into `up`, so
that the factor 1 which those readers assume is right.

Layers that the original layout fuses become one LoRA for `qkv` or `linear1`, and back, both exactly. Apart → fused:
parts with one and the same down matrix stack their up matrices, at their rank r. Parts with different ones go
block-diagonally, down over down and up beside zeros, at the sum of their ranks (3r for `qkv`, 4r for `linear1`).
Fused → apart: every part has the whole down and its own rows of up; from a block-diagonal one it gets back only the
columns that it put in, since the others are zero in its rows.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..errors import LoraError, did_you_mean
from ..names.transformer import APPROXIMATOR, Rows, to_diffusers_modules, to_original_module, unflatten
from .modules import (
    KINDS,
    AdapterModule,
    FullModule,
    LohaModule,
    LokrModule,
    LoraFile,
    LoraModule,
)

PREFIXES = (
    ("transformer.base_model.model.", "peft"),
    ("transformer.", "universal"),
    ("base_model.model.", "peft"),
    ("diffusion_model.", "native"),
    ("lora_unet_", "kohya"),
    ("lora_transformer_", "onetrainer"),
    ("lycoris_", "lycoris"),
    ("", "bare"),
)

_PARTS = (
    (re.compile(r"^(.+)\.(?:lora_A|lora_down|lora\.down|lora_linear_layer\.down)(?:\.\w+)?\.weight$"), "down"),
    (re.compile(r"^(.+)\.(?:lora_B|lora_up|lora\.up|lora_linear_layer\.up)(?:\.\w+)?\.weight$"), "up"),
    (re.compile(r"^(.+)\.lora_A$"), "down"),
    (re.compile(r"^(.+)\.lora_B$"), "up"),
    (re.compile(r"^(.+)\.(?:lora_B|lora_up)(?:\.\w+)?\.bias$"), "up_bias"),
    (re.compile(r"^(.+)\.((?:lokr|hada)_(?:w[12](?:_[ab])?|t[12]))(?:\.\w+)?$"), None),
    (re.compile(r"^(.+)\.(oft_blocks|rescale)$"), None),
    (re.compile(r"^(.+)\.(?:diff|w_norm)$"), "diff"),
    (re.compile(r"^(.+)\.(?:diff_b|b_norm)$"), "diff_b"),
    (re.compile(r"^(.+)\.(?:dora_scale|lora_magnitude_vector|magnitude)(?:\.\w+)*$"), "magnitude"),
    (re.compile(r"^(.*)\.alpha$"), "alpha"),
)
"""Keys of a module, and the kind of `Part` that they name; None: their second group."""

_FOREIGN = (
    (re.compile(r"\.oft_R"), "OFT by input columns (PEFT's, OneTrainer's)"),
    (re.compile(r"\.boft_"), "BOFT"),
    (re.compile(r"\.(a1|a2|b1|b2)\.weight$"), "GLoRA"),
    (re.compile(r"\.lora_mid\."), "LoCon with a middle matrix"),
    (re.compile(r"\.set_weight$"), "weights that replace the model's"),
    (re.compile(r"^(lora_te|text_encoder|text_encoders|te\d?_|text_model|clip_|t5xxl)"), "a text encoder's LoRA"),
    (
        re.compile(
            r"(img|txt)_mod[._]lin|\.modulation[._]lin|_modulation_lin|transformer_blocks[._]\d+[._]norm1?(_context)?[._]"
            r"linear|\b(guidance|vector|time)_in[._]|time_text_embed|norm_out[._]linear"
        ),
        "made for Flux: its modulation layers have no place in Chroma",
    ),
    (re.compile(r"(^|[._])nerf_"), "made for Chroma Radiance: its pixel layers have no place in Chroma 1"),
)


@dataclass(frozen=True)
class Part:
    """What one key of a LoRA file is, of the module with that raw name.

    kind: `down` or `up` (matrices), `up_bias`, `alpha`, `magnitude` (of a DoRA); of a LoKr `lokr_w1`, `lokr_w1_a`,
    `lokr_w1_b`, the same of `w2`, `lokr_t2`; of a LoHa `hada_w1_a` …, `hada_t1`; of an OFT `oft_blocks`, `rescale`;
    `diff` of a weight and `diff_b` of a bias.
    """

    module: str
    kind: str


@lru_cache(maxsize=8192)
def part_of(key: str) -> Part | None:
    """The part that a key names; None when it is no part of an adapter."""
    matches = ((pattern.match(key), kind) for pattern, kind in _PARTS)
    found = ((match, kind) for match, kind in matches if match)
    return next((Part(match[1], kind or match[2]) for match, kind in found), None)


def locate(module: str) -> tuple[str, tuple[Rows, ...]] | None:
    """Key format of a raw module name, and the Chroma layers (diffusers names) that it stands for; None: unknown."""
    for prefix, key_format in PREFIXES:
        if module.startswith(prefix):
            rows = _layers(module.removeprefix(prefix))
            if rows is not None:
                return key_format, rows
    return None


def _layers(name: str) -> tuple[Rows, ...] | None:
    if to_original_module(name) is not None:
        return (Rows(name),)
    rows = to_diffusers_modules(name)
    if rows is None:
        dotted = unflatten(name)
        if dotted is not None and dotted != name:
            return _layers(dotted)
    return rows


def foreign_kinds(keys: list[str]) -> list[str]:
    """What those keys are known to hold that is not read, as words for a message."""
    return [words for pattern, words in _FOREIGN if any(pattern.search(key) for key in keys)]


def looks_like_checkpoint(keys: list[str]) -> bool:
    """Whether these are the weights of a whole model."""
    roots = ("double_blocks.", "single_blocks.", "transformer_blocks.", "single_transformer_blocks.")
    return any(
        key.removeprefix("model.").removeprefix("diffusion_model.").startswith(roots) and key.endswith(".weight")
        for key in keys
    )


def declared_alpha(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """The alpha that a PEFT configuration gives a layer of that rank, as one number for scale = alpha / rank.

    Follows PEFT: `alpha_pattern` by regular expression on the name's end, else `lora_alpha` (`alpha` for a LoKr);
    rank-stabilised LoRA scales by alpha / √rank.
    """
    alpha = _by_pattern(config, "alpha_pattern", layer, config.get("lora_alpha", config.get("alpha", rank)))
    return alpha * (math.sqrt(rank) if config.get("use_rslora") else 1.0)


def declared_rank(config: Mapping[str, Any], layer: str) -> float | None:
    """The rank that a PEFT configuration gives a layer; None when it gives none."""
    return _by_pattern(config, "rank_pattern", layer, config["r"]) if "r" in config else None


def _by_pattern(config: Mapping[str, Any], option: str, layer: str, otherwise: Any) -> float:
    for pattern, value in (config.get(option) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return float(value)
    return float(otherwise)


def folded(module: LoraModule, scale: float = 1.0) -> LoraModule:
    """The same update with its factor at `scale` and the difference in `up`: computed in fp32, rounded once."""
    if module.scale == scale:
        return module
    up = (module.up.float() * (module.scale / scale)).to(module.up.dtype)
    return dataclasses.replace(module, up=up, alpha=scale * module.rank)


def fused_modules(modules: Mapping[str, AdapterModule]) -> dict[str, AdapterModule]:
    """Adapters by original name from adapters by diffusers name. A part that has none changes nothing in the fused
    layer.

    Raises LoraError for a name that is not Chroma's, for what cannot be fused (Kronecker and Hadamard products,
    rotations, a LoRA beside a full difference), and for a DoRA on only some of the parts: what the others' magnitudes
    would be stands in the base, not in the file.
    """
    gathered: dict[str, list[tuple[Rows, AdapterModule]]] = {}
    for name, module in modules.items():
        rows = to_original_module(name)
        if rows is None:
            raise LoraError(f"'{name}' cannot be written by the original layout's names: it is no layer of Chroma.")
        gathered.setdefault(rows.name, []).append((rows, module))
    return {original: fuse(original, parts) for original, parts in gathered.items()}


def fuse(original: str, parts: Sequence[tuple[Rows, AdapterModule]]) -> AdapterModule:
    """The adapter of a fused layer from those of its parts (each with the rows that it takes)."""
    parts = sorted(parts, key=lambda part: part[0].start)
    first, module = parts[0]
    if len(parts) == 1 and first.of == 1:
        return module
    low_rank = [(rows, part) for rows, part in parts if isinstance(part, LoraModule)]
    whole = [(rows, part.diff) for rows, part in parts if isinstance(part, FullModule) and part.diff is not None]
    other = [part.kind for _, part in parts if not isinstance(part, LoraModule | FullModule)]
    if other or (low_rank and whole):
        kinds = sorted({KINDS[part.kind] for _, part in parts})
        raise LoraError(
            f"'{original}' cannot be put together: its parts are {' and '.join(kinds)}. The universal and lycoris key "
            "formats keep the parts apart and hold it."
        )
    biases = [(rows, part.bias) for rows, part in parts if part.bias is not None]
    fused = (
        _fused_low_rank(original, low_rank) if low_rank else FullModule(_stacked(original, whole) if whole else None)
    )
    return dataclasses.replace(fused, bias=_stacked(original, biases) if biases else None)


def _stacked(original: str, parts: Sequence[tuple[Rows, Tensor]]) -> Tensor:
    """Rows of parts one above the other, zeros where there is no part."""
    first, tensor = parts[0]
    share = tensor.shape[0] // (first.stop - first.start)
    stacked = tensor.new_zeros(share * first.of, *tensor.shape[1:])
    for rows, part in parts:
        _check_rows(original, part.shape[0], (rows.stop - rows.start) * share)
        rows.take(stacked).copy_(part)
    return stacked


def _check_rows(original: str, found: int, wanted: int) -> None:
    if found != wanted:
        raise LoraError(
            f"'{original}' cannot be put together: its parts have other sizes than Chroma's ({found} rows where "
            f"{wanted} belong). The LoRA was made for another architecture."
        )


def _fused_low_rank(original: str, parts: Sequence[tuple[Rows, LoraModule]]) -> LoraModule:
    first, module = parts[0]
    names = [part.name for part in to_diffusers_modules(original) or ()]
    with_magnitude = [part for _, part in parts if part.magnitude is not None]
    if with_magnitude and len(with_magnitude) < len(names):
        raise LoraError(
            f"'{original}' cannot be put together: {len(with_magnitude)} of its {len(names)} parts are DoRA, and the "
            "magnitudes of the others stand in the base model only. The universal, peft and diffusers key formats keep "
            "the parts apart and hold it."
        )
    share = module.shape[0] // (first.stop - first.start)
    leading = next((part for _, part in parts if part.scale), module)  # an alpha of 0 cannot hold the others' factors
    same_scale = [folded(part, leading.scale) for _, part in parts]
    dtype = module.down.dtype
    for _, part in parts:
        dtype = torch.promote_types(torch.promote_types(dtype, part.down.dtype), part.up.dtype)
    shared = all(part.down.shape == module.down.shape and torch.equal(part.down, module.down) for _, part in parts)
    down = module.down.to(dtype) if shared else torch.cat([part.down.to(dtype) for part in same_scale])
    up = torch.zeros(share * first.of, down.shape[0], dtype=dtype)
    column = 0
    for (rows, _), part in zip(parts, same_scale, strict=True):
        start, stop = rows.start * share, rows.stop * share
        _check_rows(original, part.up.shape[0], stop - start)
        up[start:stop, column : column + part.rank] = part.up.to(dtype)
        column += 0 if shared else part.rank
    magnitude = None
    if with_magnitude:
        magnitude = torch.cat([part.magnitude for _, part in parts if part.magnitude is not None])
    # alpha · (sum of ranks) / rank, in this order: with whole numbers no digit is lost.
    return LoraModule(down, up, leading.alpha * down.shape[0] / leading.rank, magnitude)


def own_columns(up: Tensor, layers: Sequence[Rows]) -> dict[str, Tensor]:
    """Of a fused `up` [rows, rank]: which columns belong to which part alone (indices, ascending).

    Empty unless the parts use different columns, that is unless the matrix is block-diagonal; a part without any
    column is then one that the LoRA does not touch.
    """
    if len(layers) < 2 or up.ndim != 2 or up.shape[0] % layers[0].of:
        return {}
    used = {layer.name: layer.take(up).float().any(dim=0) for layer in layers}
    if not any(column.any() for column in used.values()):
        return {}  # an untrained one: all of it belongs to every part
    if torch.stack(list(used.values())).sum(dim=0).max() > 1:
        return {}
    return {name: column.nonzero().flatten() for name, column in used.items()}


KeyFormat = Literal["universal", "peft", "diffusers", "kohya", "ai-toolkit", "onetrainer", "simpletuner", "lycoris"]
"""What `write_lora` writes."""

KEY_FORMATS: tuple[KeyFormat, ...] = get_args(KeyFormat)

ADAPTER_CONFIG = "lora_adapter_metadata"
"""The header field in which diffusers keeps PEFT's configuration."""


@dataclass(frozen=True)
class Style:
    """How a key format names tensors. `{}` in `key` stands for the layer."""

    key: str
    down: str = "lora_A.weight"
    up: str = "lora_B.weight"
    magnitude: str = "dora_scale"
    column: bool = True
    flat: bool = False
    fused: bool = False
    alpha: Literal["tensor", "folded", "config"] = "tensor"
    kinds: frozenset[str] = frozenset({"lora"})
    biases: bool = False

    def holds(self, kind: str) -> bool:
        """Whether it has a place for an adapter of that kind."""
        return kind in self.kinds


_ALL = frozenset(KINDS)
_KOHYA: dict[str, Any] = {"down": "lora_down.weight", "up": "lora_up.weight", "flat": True}
_PEFT: dict[str, Any] = {"magnitude": "lora_magnitude_vector", "column": False, "kinds": frozenset({"lora", "dora"})}
STYLES: dict[KeyFormat, Style] = {
    "universal": Style("transformer.{}", kinds=_ALL, biases=True),
    "peft": Style("base_model.model.{}", **_PEFT, alpha="config"),
    "diffusers": Style("transformer.{}", **_PEFT, alpha="folded"),
    "kohya": Style("lora_unet_{}", **_KOHYA, fused=True, kinds=frozenset({"lora", "dora", "full"}), biases=True),
    "ai-toolkit": Style(
        "diffusion_model.{}", fused=True, alpha="folded", kinds=frozenset({"lora", "full"}), biases=True
    ),
    "onetrainer": Style("lora_transformer_{}", **_KOHYA, kinds=frozenset({"lora", "dora", "dora-columns"})),
    "simpletuner": Style("transformer.{}", alpha="folded"),
    "lycoris": Style("lycoris_{}", **_KOHYA, kinds=_ALL),
}
NATIVE = "diffusion_model.{}"
"""How ComfyUI calls what it knows by the original layout's name only."""


@dataclass(frozen=True)
class Written:
    """The content of a file in some key format; `config`: what goes into PEFT's `adapter_config.json`, if any."""

    tensors: dict[str, Tensor]
    header: dict[str, str]
    config: dict[str, Any] | None = None


def written(lora: LoraFile, key_format: str) -> Written:
    """The tensors and the header of `lora` in `key format`, as copies in the dtype they have.

    Raises LoraError for an unknown key format, and for a kind of adapter that it cannot hold, naming those that can.
    """
    style = style_of(key_format)
    for name, module in lora.modules.items():
        _check_held(key_format, style, name, module)
    if not style.column and len(lora.kinds) > 1:
        raise LoraError(
            f"The LoRA is not written in the {key_format} key format: some of its layers are DoRA and some are not, "
            "and PEFT has one kind for all. The universal key format holds both."
        )
    modules: Mapping[str, AdapterModule] = lora.modules
    if style.fused:
        modules = fused_modules(modules)
    if style.alpha == "folded":
        modules = {name: folded(m) if isinstance(m, LoraModule) else m for name, m in modules.items()}
    tensors: dict[str, Tensor] = {}
    for name, module in modules.items():
        key = style.key.format(name.replace(".", "_") if style.flat else name)
        if key_format == "universal":
            key, module = _universal(name, module)
        leaves = _leaves(style, module)
        if style.alpha == "tensor" and not isinstance(module, FullModule):
            leaves["alpha"] = torch.tensor(float(module.alpha))
        # Copies: layers split from a fused one share their down matrix, which the file format does not allow.
        tensors |= {f"{key}.{leaf}": t.detach().clone() for leaf, t in leaves.items()}
    if key_format == "universal":
        tensors |= _fused_biases(lora.modules)
    header = {key: value for key, value in lora.metadata.items() if key != ADAPTER_CONFIG}
    config = None
    if key_format == "peft":
        config = peft_config(modules)
    elif key_format == "diffusers":
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
    """The key formats that hold a kind of adapter."""
    return [name for name, style in STYLES.items() if style.holds(kind)]


def style_of(key_format: str) -> Style:
    """Look up a key format. Raises LoraError for one that is not written."""
    if key_format not in STYLES:
        raise LoraError(
            f"'{key_format}' is no key format that ChromaKit writes. Choose one of: {', '.join(KEY_FORMATS)}."
            f"{did_you_mean(key_format, KEY_FORMATS)}"
        )
    return STYLES[key_format]


def _universal(name: str, module: AdapterModule) -> tuple[str, AdapterModule]:
    """The key of a layer in the universal key format, and what is written under it."""
    original = to_original_module(name)
    if original is not None and name.startswith(APPROXIMATOR):
        return NATIVE.format(original.name), module
    fused = original is not None and original.of > 1
    return f"transformer.{name}", dataclasses.replace(module, bias=None) if fused else module


def _fused_biases(modules: Mapping[str, AdapterModule]) -> dict[str, Tensor]:
    """The biases of layers that the original layout fuses, which ComfyUI reads by the fused layer's name alone."""
    gathered: dict[str, list[tuple[Rows, Tensor]]] = {}
    for name, module in modules.items():
        original = to_original_module(name)
        if module.bias is not None and original is not None and original.of > 1:
            gathered.setdefault(original.name, []).append((original, module.bias))
    return {f"{NATIVE.format(name)}.diff_b": _stacked(name, parts) for name, parts in gathered.items()}


def _check_held(key_format: str, style: Style, name: str, module: AdapterModule) -> None:
    if not style.holds(module.kind):
        raise LoraError(
            f"The LoRA is not written in the {key_format} key format, which has no place for {KINDS[module.kind]} "
            f"('{name}'). These have: {', '.join(holders(module.kind))}."
        )
    if module.bias is not None and not style.biases:
        having = ", ".join(other for other, known in STYLES.items() if known.biases)
        raise LoraError(
            f"The LoRA is not written in the {key_format} key format, which has no place for differences of biases "
            f"('{name}'). These have: {having}."
        )
    if isinstance(module, LokrModule) and module.rows is not None:
        raise LoraError(
            f"The LoKr is not written: '{name}' is a part of a fused layer that is no Kronecker product by itself. Use "
            "the file that it was read from."
        )


def _leaves(style: Style, module: AdapterModule) -> dict[str, Tensor]:
    """How a module's tensors are called after its name."""
    prefix = {LokrModule: "lokr_", LohaModule: "hada_"}.get(type(module), "")
    names = {"down": style.down, "up": style.up, "blocks": "oft_blocks", "bias": "diff_b", "magnitude": style.magnitude}
    leaves = {names.get(factor, prefix + factor): tensor.contiguous() for factor, tensor in module.factors().items()}
    magnitude = leaves.get(style.magnitude)
    if magnitude is not None and magnitude.ndim == 1 and style.column:
        leaves[style.magnitude] = magnitude[:, None]  # one column, where ComfyUI multiplies the weight [out, in] by it
    return leaves


def _commonest(values: list[Any]) -> Any:
    return max(sorted(set(values)), key=values.count)


def _whole(value: float) -> float | int:
    """Whole numbers as such: PEFT's `lora_alpha` is one by its own annotation."""
    return int(value) if float(value).is_integer() else value
