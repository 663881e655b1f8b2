"""The functions that the tables name: shared ones first, then those of each trainer (`ai_`, `st_`, `k_`, `ot_`).

One for `by` takes the value and all given options and answers as a `Rule` does; one for `read` takes the value and
gives ours.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from ..model.flavours import FLAVOURS
from ..sampling.schedule import dynamic_mu
from .read import (
    BLOCKS,
    Epochs,
    ForeignPath,
    Unreadable,
    ask,
    is_off,
    is_on,
    number,
    original,
    ours,
    preview_of_line,
    preview_of_object,
    read_config,
    read_lines,
    resolve,
    switch,
    text,
    whole,
    word,
)
from .table import Given, flow_shift, lost, near, shown, unchanged, without

DATA = {
    trainer: read_config(Path(__file__).with_name(f"{trainer}.yaml"))
    for trainer in ("simpletuner", "ai_toolkit", "onetrainer", "kohya")
}
LARGEST = 1024
"""The largest rank of a job, at which a LoKr's second factor is whole."""
WEIGHTS = (".safetensors", ".sft", ".gguf")
REPOSITORIES = {f.repository.lower(): f.name for f in FLAVOURS.values() if f.repository}


def is_local(name: str) -> bool:
    """Whether a model's name is a place on this computer and no repository: a repository is `owner/name`."""
    return name.lower().endswith(WEIGHTS) or re.fullmatch(r"[\w.-]+/[\w.-]+", name) is None or name.startswith(".")


def model_source(value: Any, given: Given) -> Any:
    """A repository, a folder or a single file as the model."""
    name = text(value).strip()
    if not name:
        return unchanged("not used")
    if flavour := REPOSITORIES.get(name.lower()):
        return {"model.flavour": flavour}
    if name.lower().endswith(WEIGHTS):
        return {"model.transformer": ForeignPath(name)}
    if re.match(r"lodestones/chroma\b", name, re.IGNORECASE):
        return near(
            {} if "model_flavour" in given else {"model.flavour": "base"},
            "a development version of Chroma; the published weights of the flavour are used: name a file in "
            "model.transformer",
        )
    if is_local(name):
        return {"model.folder": ForeignPath(name)}
    return lost("other repositories are not loaded: download it and name its folder in model.folder")


def part_source(part: str, value: Any, given: Given) -> Any:
    """One part of the model from a file or folder of this computer."""
    name = text(value).strip()
    if not name:
        return unchanged("not used")
    if is_local(name):
        return ForeignPath(name)
    return lost(f"the {part} comes from the flavour's repository, a file or a folder: name one in model.{part}")


transformer, vae, text_encoder = (partial(part_source, part) for part in ("transformer", "vae", "text_encoder"))


def start_from(value: Any, given: Given) -> Any:
    """The LoRA whose training goes on."""
    return ForeignPath(text(value)) if text(value).strip() else unchanged("not used")


def path(value: Any) -> ForeignPath:
    """A path that is not empty."""
    read = text(value).strip()
    if not read:
        raise Unreadable("a path")
    return ForeignPath(read)


def folder_name(value: Any) -> str:
    return PurePosixPath(text(value).replace("\\", "/")).name or "imported"


def file_name(value: Any) -> str:
    return PurePosixPath(text(value).replace("\\", "/")).stem or "imported"


def extension(value: Any) -> str:
    return "." + text(value).lstrip(".")


def listed(value: Any) -> list[str]:
    return [text(value)]


def sizes(value: Any) -> list[int]:
    """One size in pixels or several, in their order."""
    return sorted({whole(size) for size in (value if isinstance(value, list) else [value])})


def epochs_of(value: Any) -> Epochs:
    """A number of epochs above 0."""
    read = number(value)
    if read <= 0:
        raise Unreadable("a number above 0")
    return Epochs(read)


def epochs(value: Any, given: Given) -> Any:
    return {"steps": epochs_of(value)}


def previews(entries: Sequence[dict[str, Any]], left: Sequence[str]) -> Any:
    """The previews as a job has them: a text alone where nothing else is said."""
    plain = [entry["prompt"] if set(entry) == {"prompt"} else entry for entry in entries]
    return without({"previews.prompts": plain}, left)


# ai-toolkit


def ai_alpha(value: Any, given: Given) -> Any:
    rank, alpha = number(given.get("linear", given.get("rank", 16))), number(value)
    if ask(given, "type", word) == "lokr" or alpha == rank:
        return alpha
    return near(rank, "ai-toolkit trains Chroma at scale 1, whatever stands here")


def ai_accumulation(value: Any, given: Given) -> Any:
    return whole(value) * max(ask(given, "gradient_accumulation_steps", whole), 1)


def ai_quantize(value: Any, given: Given) -> Any:
    """The transformer, and with it T5 unless `quantize_te` says otherwise."""
    follows = {} if "quantize_te" in given else {"model.text_precision": "qtype_te"}
    return _quantised({"model.precision": "qtype", **follows}, value, given)


def ai_quantize_te(value: Any, given: Given) -> Any:
    return _quantised({"model.text_precision": "qtype_te"}, value, given)


def _quantised(options: Mapping[str, str], value: Any, given: Given) -> Any:
    """`options`: ours, and the one that has ai-toolkit's type."""
    if not switch(value):
        return unchanged("not used")
    asked = {to: ask(given, option, text) for to, option in options.items()}
    known = DATA["ai_toolkit"]["qtypes"]
    for qtype in asked.values():
        if qtype not in known:
            return lost(f"there is no {qtype}: choose a precision, e.g. int8 or nf4")
    values = {to: known[qtype] for to, qtype in asked.items()}
    own = {"int8", "int4"} & set(values.values())
    return near(values, "stored by ChromaKit's own quantised layers instead") if own else values


def ai_shifted(value: Any, given: Given) -> Any:
    """Even draws, with the shift that ai-toolkit has for images of those sizes: Flux's, but for latents before they are
    packed, of which there are four times as many."""
    found = sorted(given["sizes"])
    shifts = [round(math.exp(dynamic_mu(4 * (size // 16) ** 2)), 4) for size in found]
    values = {"objective.draw": "uniform", "objective.flow_shift": shifts[-1]}
    if len(shifts) == 1:
        return values
    others = ", ".join(f"{shift:g} at {size}" for shift, size in zip(shifts, found, strict=True))
    return near(values, f"ai-toolkit's shift is another at each size ({others}); here all have the largest one's")


def ai_noise_level(value: Any) -> float:
    return round(1 - whole(value) / 1000, 6)


def ai_ema(value: Any, given: Given) -> Any:
    if not isinstance(value, dict):
        raise Unreadable("a section with use_ema and ema_decay")
    if not is_on(value, "use_ema"):
        return 0.0
    others = [key for key in value if key not in ("use_ema", "ema_decay")]
    return without(number(value.get("ema_decay", 0.999)), others)


def ai_prompts(value: Any, given: Given) -> Any:
    if not is_off(given.get("train.disable_sampling")):
        return unchanged("disable_sampling")
    found, left = [], []
    for item in value if isinstance(value, list) else [value]:
        item = item if isinstance(item, dict) else {"prompt": item}
        fields, others = preview_of_object(item, DATA["ai_toolkit"]["sample"]["fields"])
        line, behind = preview_of_line(fields.pop("prompt", ""))
        found.append({**line, **fields})
        left += [*others, *behind]
    if len(found) > 1 and not is_on(given, "walk_seed"):  # all have the same one; here the i-th has the seed + i
        found = [{"seed": whole(given.get("seed", 0)), **entry} for entry in found]
    return previews(found, left)


def ai_output_preservation(value: Any, given: Given) -> Any:
    kept = _preserved(value, given, "diff_output_preservation", "preserve.class_weight")
    word = text(given.get("diff_output_preservation_class", ""))
    return {**kept, "preserve.class_word": word} if isinstance(kept, dict) else kept


def ai_blank_preservation(value: Any, given: Given) -> Any:
    return _preserved(value, given, "blank_prompt_preservation", "preserve.blank_weight")


def _preserved(value: Any, given: Given, option: str, to: str) -> Any:
    """A comparison with the model without its LoRA, which ai-toolkit makes at every step."""
    weight = number(given.get(f"{option}_multiplier", 1.0))
    return {to: weight, "preserve.share": 1.0} if switch(value) and weight else unchanged("not used")


def ai_network_kwargs(value: Any, given: Given) -> Any:
    """`only_if_contains` and `ignore_if_contains`: parts of a layer's name, with dots or underscores."""
    if not isinstance(value, dict):
        raise Unreadable("a section with options")
    others = [key for key in value if key not in ("only_if_contains", "ignore_if_contains")]
    only, ignored = (value.get(f"{which}_if_contains") or [] for which in ("only", "ignore"))
    if not (isinstance(only, list) and isinstance(ignored, list)):
        raise Unreadable("a section with lists of parts of layers' names")

    def has(name: str, parts: list[Any]) -> bool:
        full = f"transformer.{name}"
        return any(text(part) in full or text(part) in full.replace(".", "_") for part in parts)

    target = original(lambda name: (not only or has(name, only)) and not has(name, ignored))
    if not target:
        return lost(f"no layer of Chroma's blocks has such a name: {', '.join(map(str, [*only, *ignored]))}")
    if not (only or ignored):
        return lost("not built in") if others else unchanged("not used")
    return _fused("ai_toolkit", {"lora.target": target}, others)


def _fused(trainer: str, values: dict[str, Any], others: Sequence[Any], fused: bool = True) -> Any:
    """Which layers are trained, and where the trainer's layers are others than ours."""
    reasons = [DATA[trainer]["fused"]] if fused else []
    reasons += [f"without counterpart: {', '.join(map(str, others))}"] if others else []
    return near(values, "; ".join(reasons)) if reasons else values


# SimpleTuner


def st_lora_type(value: Any, given: Given) -> Any:
    """LyCORIS' own defaults hold for what the file that `lycoris_config` names, `lycoris`, does not state."""
    kind, lycoris = word(value), given.get("lycoris")
    if kind == "standard":
        return unchanged("an ordinary LoRA")
    if kind != "lycoris":
        return lost(f"there is no {kind!r} here")
    if not isinstance(lycoris, dict):
        return near("lokr", "the file that lycoris_config names is not here: set in [lora] what it says")
    algo, rank = text(lycoris.get("algo", "lora")).lower(), whole(lycoris.get("linear_dim", 4))
    if algo not in ("lora", "locon", "lokr"):
        return lost(f"there is no {algo!r} here: choose a kind in [lora]")
    values: dict[str, Any] = {"lora.kind": "lokr" if algo == "lokr" else "lora", "lora.target": "all"}
    values |= {"lora.rank": min(LARGEST, rank), "lora.alpha": number(lycoris.get("linear_alpha", 1))}
    known = {"algo", "linear_dim", "linear_alpha", "dora_wd"}
    if algo == "lokr":
        values["lora.lokr_factor"] = whole(lycoris.get("factor", -1))
        known |= {"factor"}
    elif is_on(lycoris, "dora_wd"):
        values["lora.kind"] = "dora"
    others = [str(key) for key in lycoris if key not in known and not (key == "multiplier" and lycoris[key] == 1)]
    reasons = [f"without counterpart in lycoris_config: {', '.join(others)}"] if others else []
    reasons += [f"{LARGEST} is the largest rank, at which a LoKr's second factor is whole"] if rank > LARGEST else []
    return near(values, "; ".join(reasons)) if reasons else values


def st_preview_size(value: Any, given: Given) -> Any:
    """`1024`, `1024x768` or several, separated by commas; below 16 megapixels."""
    first, *others = [part.strip().lower() for part in text(value).split(",")]
    width, _, height = first.partition("x")
    sides = [number(width), number(height or width)]
    if not height and sides[0] < 16:
        sides = [_square(sides[0])] * 2
    size = {"previews.width": whole(sides[0]), "previews.height": whole(sides[1])}
    return near(size, "all previews have one size: the first is taken") if others else size


def st_square(value: Any, given: Given) -> Any:
    return [_square(number(value))]


def _square(area: float) -> int:
    """The side in pixels of a square with `area` million pixels, to the next multiple of 64 (1.0 → 1024)."""
    if area < 0:
        raise Unreadable("a size above 0")
    return max(64, 64 * round(math.sqrt(area * 1e6) / 64))


def st_masks(value: Any, given: Given) -> Any:
    """The sets that go with this one: masks are beside the images here."""
    wanted = [text(item) for item in (value if isinstance(value, list) else [value])]
    if all(item in given["mask_sets"] for item in wanted):
        return near({"masks": "files"}, "masks lie beside the images here, see below")
    return lost("no conditioning images")


def st_uses(value: Any) -> int:
    return whole(value) + 1


def st_shuffle(value: Any, given: Given) -> Any:
    if not isinstance(value, dict) or not is_on(value, "enable"):
        return unchanged("not used")
    if value.get("split_on", "comma") != "comma":
        return lost("only tags between commas are shuffled")
    values = {"tag_shuffles": whole(value.get("count", 1)), "keep_tags": whole(value.get("position_start", 0))}
    if switch(value.get("include_original", True)):
        return values
    return near(values, "the caption as written is always one of the orders")


def st_sigma_bias(value: Any) -> float:
    return round(number(value) / math.log(8), 6)


# sd-scripts


def k_share(value: Any, given: Given) -> Any:
    return int(number(value) * ask(given, "max_train_steps", whole))


def k_kept(value: Any, given: Given) -> Any:
    return max(1, math.ceil(whole(value) / ask(given, "save_every_n_epochs", whole)))


def k_logit_normal(value: Any, given: Given) -> Any:
    """The index's mean counts from the noisy end: −m in the logit, a shift of e^−m."""
    mean, width = ask(given, "logit_mean", number), ask(given, "logit_std", number)
    shift = flow_shift(ask(given, "discrete_flow_shift", number) * math.exp(-mean))
    return {"objective.draw": "logit_normal", "objective.scale": width, "objective.flow_shift": shift}


def k_arguments(value: Any) -> dict[str, str]:
    """`["weight_decay=0.1", "betas=.9,.99"]`, or one text with blanks between."""
    items = value.split() if isinstance(value, str) else value
    if not isinstance(items, list) or not all(isinstance(item, str) and "=" in item for item in items):
        raise Unreadable("a list of texts such as 'weight_decay=0.1'")
    return {key.strip(): each.strip().strip("\"'") for key, _, each in (item.partition("=") for item in items)}


def k_optimizer_args(value: Any, given: Given) -> Any:
    values: dict[str, Any] = {}
    others = []
    for key, each in k_arguments(value).items():
        if key == "weight_decay":
            values[key] = number(each)
        elif key == "betas":
            values[key] = [number(part) for part in re.split(r"[,\s]+", each.strip("()[] ")) if part]
        elif each.lower() not in DATA["kohya"]["same_arguments"].get(key, "").split():
            others.append(key)
    return without(values, others) if values or others else unchanged("as they are here")


def _k_kind(given: Given) -> tuple[str, bool]:
    """The adapter, "" where there is none such here, and whether LyCORIS makes it."""
    data, module = DATA["kohya"], ask(given, "network_module", word)
    if not module.startswith("lycoris"):
        return data["modules"].get(module, ""), False
    asked = ask(given, "network_args", k_arguments)
    kind = data["algorithms"].get(asked.get("algo", "lora").lower(), "")
    return ("dora" if kind == "lora" and asked.get("dora_wd", "").lower() == "true" else kind), True


def k_network_module(value: Any, given: Given) -> Any:
    kind, _ = _k_kind(given)
    if not kind:
        return near("lora", f"there is no {shown(value)} with these network_args here: choose a kind in [lora]")
    return unchanged("an ordinary LoRA") if kind == "lora" else kind


def k_network_args(value: Any, given: Given) -> Any:
    """Which layers are trained, and at which rank: by kind, by block, by regular expressions on sd-scripts' names."""
    asked = {key: each for key, each in k_arguments(value).items() if each not in ("", "None")}
    data, (kind, lycoris), base = DATA["kohya"], _k_kind(given), ask(given, "network_dim", whole)
    known = {*data["ranks"], *data["blocks"], *data["not_of_chroma"].split()}
    known |= {"train_blocks", "network_reg_dims", "split_qkv"}
    known |= {"algo", "dora_wd", "factor"} if lycoris or kind == "lokr" else set()
    others = [key for key, each in asked.items() if key not in known and each.lower() != "false"]
    ranks = _k_ranks(asked, base)
    target = original(lambda name: ranks[name] > 0)
    if not target:
        raise Unreadable("arguments that leave layers to train")
    values: dict[str, Any] = {"lora.target": "all" if lycoris else target}
    patterns = {
        pattern: rank
        for rank in sorted(set(ranks.values()) - {0, base})
        for pattern in original(lambda name, rank=rank: ranks[name] == rank)
    }
    if patterns and not lycoris:
        values["lora.rank_pattern"] = patterns
    if "factor" in asked and kind == "lokr":
        values["lora.lokr_factor"] = whole(asked["factor"])
    if lycoris:
        without_ = f"; without counterpart: {', '.join(others)}" if others else ""
        return near(values, f"LyCORIS' own choice of layers is the attention here{without_}")
    return _fused("kohya", values, others, fused=asked.get("split_qkv", "").lower() != "true")


def _k_ranks(asked: Mapping[str, str], rank: int) -> dict[str, int]:
    """The rank of every layer by its original name; 0 where none is trained. What comes later goes before."""
    ranks = dict.fromkeys(BLOCKS, rank)
    for option, pattern in DATA["kohya"]["ranks"].items():
        if option in asked:
            ranks |= {name: whole(asked[option]) for name in ranks if re.match(pattern, name)}
    only = asked.get("train_blocks", "all")
    if only not in ("all", "single", "double"):
        raise Unreadable("arguments with train_blocks=all, single or double")
    for option, (kind, count) in DATA["kohya"]["blocks"].items():
        chosen = _k_indices(asked.get(option, "all"), count) if only == "all" or kind.startswith(only) else set()
        ranks |= {name: 0 for name in ranks if name.startswith(kind) and int(name.split(".")[1]) not in chosen}
    for entry in filter(None, asked.get("network_reg_dims", "").split(",")):
        pattern, _, dim = entry.rpartition("=")
        try:
            matches = re.compile(pattern).search
        except re.error as error:
            raise Unreadable(f"arguments with regular expressions ({pattern}: {error})") from error
        ranks |= {name: whole(dim) for name in ranks if matches("lora_unet_" + name.replace(".", "_"))}
    return ranks


def _k_indices(said: str, count: int) -> set[int]:
    """`all`, `none` or `0,1,5-8`."""
    if said in ("all", "none"):
        return set(range(count)) if said == "all" else set()
    found: set[int] = set()
    for part in said.split(","):
        first, _, last = part.strip().partition("-")
        found |= set(range(whole(first), whole(last or first) + 1))
    return found


def k_prompts(value: Any, given: Given) -> Any:
    """The file's prompts: a text with one a line, or a list in JSON or TOML."""
    place = Path(resolve(ForeignPath(text(value)), given["folders"]))
    if not place.is_file():
        return lost("the file is not here: write its prompts into previews.prompts")
    if place.suffix.lower() not in (".json", ".toml"):
        lines = [preview_of_line(line) for line in read_lines(place) if line.strip() and not line.startswith("#")]
        left = [flag for _, behind in lines for flag in behind if flag not in ("--g 0", "--g 0.0")]
        return previews([entry for entry, _ in lines], left)
    content = read_config(place)
    shared = content.get("prompt", {}) if isinstance(content, dict) else {}
    items, base = (shared.get("subset", []), shared) if isinstance(shared, dict) else (shared, {})
    found, left = [], []
    for item in content if isinstance(content, list) else items:
        fields = {key: each for key, each in {**base, **item}.items() if key != "subset"}
        if not fields.get("guidance_scale"):
            fields.pop("guidance_scale", None)
        entry, others = preview_of_object(fields, DATA["kohya"]["fields"])
        found.append({"prompt": "", **entry})
        left += others
    return previews(found, left)


def k_resolution(value: Any, given: Given) -> Any:
    """`512`, `512,768` or [512, 768]: width and height."""
    sides = value if isinstance(value, list) else [part for part in text(value).split(",") if part.strip()]
    sides = [whole(side) for side in sides]
    if len(sides) not in (1, 2):
        raise Unreadable("one number, or width and height")
    side = round(math.sqrt(sides[0] * sides[-1]))
    if sides[0] == sides[-1]:
        return [side]
    return near([side], "the side of a square with as many pixels; images keep their own shape here")


# OneTrainer


def ot_updates(value: Any, given: Given) -> int:
    """OneTrainer counts batches, ChromaKit updates."""
    return int(number(value) / max(1, ask(given, "gradient_accumulation_steps", whole)))


def ot_cycles(value: Any) -> int:
    return max(1, round(number(value)))


def ot_loss(value: Any, given: Given) -> Any:
    others = [name for name in ("mae", "log_cosh", "huber") if ask(given, f"{name}_strength", number)]
    mse = number(value)
    if not others:
        return {"objective.loss": "mse"} if mse == 1 else near({"objective.loss": "mse"}, "its strength is 1 here")
    if others == ["huber"] and not mse:
        values = {"objective.loss": "huber", "objective.huber_delta": ask(given, "huber_delta", number)}
        return near(values, "here it is the smooth pseudo-Huber, twice as large")
    if mse:
        return near({"objective.loss": "mse"}, f"losses are not mixed here: without {', '.join(others)}")
    return near({"objective.loss": "huber"}, f"the nearest loss that there is to {' and '.join(others)}")


def ot_logit_normal(value: Any, given: Given) -> Any:
    values = {"objective.draw": "logit_normal", "objective.scale": ask(given, "noising_weight", number) + 1}
    shifted = ask(given, "noising_bias", number) != 0
    return values | ({"objective.flow_shift": ot_shift(given["timestep_shift"], given)} if shifted else {})


def ot_shift(value: Any, given: Given) -> Any:
    """A bias b of the logit is a shift of e^b; two shifts multiply."""
    logit = ask(given, "timestep_distribution", word) == "logit_normal"
    return flow_shift(number(value) * math.exp(ask(given, "noising_bias", number) if logit else 0))


def ot_limit(value: Any, given: Given) -> Any:
    if number(value) in (0, 1) or ask(given, "timestep_shift", lambda shift: ot_shift(shift, given)) == "none":
        return number(value)
    return near(number(value), "OneTrainer shifts what lies between the limits, ChromaKit squeezes what was shifted")


def ot_layer_filter(value: Any, given: Given) -> Any:
    parts = [part.strip() for part in text(value).split(",") if part.strip()]
    found = is_on(given, "layer_filter_regex")
    try:
        patterns = [re.compile(part if found else re.escape(part)) for part in parts]
    except re.error as error:
        raise Unreadable(f"a regular expression ({error})") from error
    target = ours(lambda name: not patterns or any(pattern.search(name) for pattern in patterns))
    if not target:
        return lost(f"no layer of Chroma has such a name: {', '.join(parts)}")
    if parts == ["attn"]:
        return "all"
    return target if parts else near(target, "the approximator, which OneTrainer trains as well, is never trained here")


def ot_peft_type(value: Any, given: Given) -> Any:
    name = text(value).strip().upper()
    if name == "LORA":
        return unchanged("an ordinary LoRA")
    if name != "LOKR":
        return near({"lora.kind": "lora"}, f"there is no {name} here: choose a kind in [lora]")
    values = {
        "lora.kind": "lokr",
        "lora.rank": LARGEST if is_on(given, "lokr_full_matrix") else ask(given, "lokr_dim", whole),
        "lora.lokr_factor": ask(given, "lokr_decompose_factor", whole),
    }
    return without(values, [o for o in ("lokr_decompose_both", "lokr_weight_decompose") if is_on(given, o)])


def ot_interval(value: Any, given: Given) -> Any:
    """Every so many batches or epochs; other units have no counterpart."""
    unit = ask(given, given["option"] + "_unit", word)
    if unit in ("never", "always"):
        return 1 if unit == "always" else 0
    if unit == "step":
        every = whole(value)
        return max(ot_updates(every, given), 1) if every else 0
    return epochs_of(value) if unit == "epoch" else lost(f"steps are counted here, not {unit}s")


def ot_minutes(value: Any, given: Given) -> Any:
    unit = {"second": 1 / 60, "minute": 1.0, "hour": 60.0}[ask(given, "backup_after_unit", word)]
    return round(number(value) * unit, 3)


def ot_betas(value: Any, given: Given) -> Any:
    first, second = DATA["onetrainer"]["betas"].get(ask(given, "optimizer", word), (0.9, 0.999))
    return [number(given.get("beta1", first)), number(given.get("beta2", second))]


def ot_eps(value: Any, given: Given) -> Any:
    if not ask(given, "optimizer", word).startswith(("adam", "prodigy", "schedule_free")) or number(value) == 1e-8:
        return unchanged("the same here")
    return lost("epsilon is 1e-8")


def ot_resolutions(value: Any, given: Given) -> Any:
    """`512`, `512,768` or `1024x768`."""
    parts = [part.strip().lower() for part in re.split(r"[,;\s]+", text(value)) if part.strip()]
    sides = [[whole(side) for side in part.split("x")] for part in parts]
    if not sides or any(len(side) > 2 for side in sides):
        raise Unreadable("sizes such as 512, or 512,768")
    values = sorted({round(math.sqrt(math.prod(s) if len(s) == 2 else s[0] ** 2)) for s in sides})
    if any(len(side) == 2 for side in sides):
        return near(values, "every image has a size of its own shape here, of that area")
    return near(values, "each image is trained at each of them; OneTrainer draws one") if len(sides) > 1 else values


def ot_override(value: Any, given: Given) -> Any:
    return ask(given, "image.resolution_override", lambda sizes: ot_resolutions(sizes, given))


def ot_repeats(value: Any, given: Given) -> Any:
    uses = number(value)
    if uses >= 1 and uses == int(uses):
        return {"repeats": int(uses)}
    return near({"weight": uses}, "a part of the images in each epoch there; here how often, against other sets")


FUNCTIONS: dict[str, Callable[..., Any]] = {name: f for name, f in globals().items() if callable(f)}
