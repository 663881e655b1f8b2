"""The TOML of kohya's sd-scripts: the functions that its tables (`kohya.yaml`) name, and what it reads beside it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..data.dataset import DatasetConfig
from ..errors import ConfigError
from ..files import slug
from .ai_toolkit import LARGEST
from .convert import Draft, Given, Line, lost, near, overridden, shown, table, unchanged
from .job import Imported, finish, resolve, start_folders
from .layers import EVERY_BLOCK, original
from .prompts import of_line, of_object, plain
from .read import (
    ForeignPath,
    Unreadable,
    epochs_of,
    is_off,
    is_on,
    number,
    read_config,
    read_lines,
    switch,
    text,
    whole,
)

_DATA = read_config(Path(__file__).with_suffix(".yaml"))
FOR_ALL_SETS = tuple(_DATA["for_all_sets"].split())
"""Options of the configuration that hold for every set which does not say otherwise."""

FUSED = "sd-scripts has one LoRA for q, k and v together (and one for linear1); here each layer has its own"

DECAY = ("adamw", "adamw8bit")
"""Our optimizers whose weight decay is .01 in sd-scripts where none is stated; it is 0 for all others."""

SAMPLE_FIELDS = {
    "prompt": "prompt",
    "negative_prompt": "negative",
    "width": "width",
    "height": "height",
    "seed": "seed",
    "sample_steps": "steps",
    "scale": "guidance",
}
"""Fields of a prompt in a JSON or TOML file, and ours."""


def plain_name(name: str) -> str:
    """The name of an option that stands in the tables."""
    return _DATA["other_names"].get(name.replace("-", "_"), name.replace("-", "_"))


def precision(value: Any, given: Given) -> Any:
    word = {"no": "fp32", "fp16": "fp16", "bf16": "bf16"}.get(text(value).lower())
    if word is None:
        raise Unreadable("no, fp16 or bf16")
    if is_on(given, "fp8_base") or is_on(given, "fp8_base_unet"):
        return unchanged("weights in fp8 compute in bf16 here")
    return word


def fp8(value: Any, given: Given) -> Any:
    if not switch(value):
        return unchanged("not used")
    reason = "each row of a weight has its own scale here; there it is cast as it is"
    values = {"model.precision": "fp8"}
    return near(values if is_on(given, "fp8_base_unet") else {**values, "model.text_precision": "fp8"}, reason)


def swap(value: Any, given: Given) -> Any:
    if whole(value) == 0:
        return unchanged("not used")
    return near("block", "blocks are streamed by ChromaKit's own offloading")


def _by_epochs(given: Given) -> bool:
    return not is_off(given.get("max_train_epochs"))


def steps(value: Any, given: Given) -> Any:
    return unchanged("max_train_epochs decides") if _by_epochs(given) else whole(value)


def epochs(value: Any, given: Given) -> Any:
    return {"steps": epochs_of(value)}


def learning_rate(value: Any, given: Given) -> Any:
    return unchanged("unet_lr decides") if given.get("unet_lr") is not None else number(value)


def warmup(value: Any, given: Given) -> Any:
    share, schedule = number(value), text(given.get("lr_scheduler", "constant")).lower()
    if share and schedule == "constant":
        return unchanged("sd-scripts' constant schedule has no warm-up")
    if share >= 1 or share == 0:
        return whole(value)
    if _by_epochs(given):
        return lost(f"{share:g} of all steps: set warmup_steps")
    return int(share * whole(given.get("max_train_steps", 1600)))


def cycles(value: Any, given: Given) -> Any:
    if text(given.get("lr_scheduler", "constant")).lower() == "cosine_with_restarts":
        return whole(value)
    return unchanged("read by the restarting schedule alone")


def power(value: Any, given: Given) -> Any:
    if text(given.get("lr_scheduler", "constant")).lower() == "polynomial":
        return number(value)
    return unchanged("read by the polynomial schedule alone")


def arguments(value: Any) -> dict[str, str]:
    """`["weight_decay=0.1", "betas=.9,.99"]`, or one text with blanks between."""
    items = value.split() if isinstance(value, str) else value
    if not isinstance(items, list) or not all(isinstance(item, str) and "=" in item for item in items):
        raise Unreadable("a list of texts such as 'weight_decay=0.1'")
    return {key.strip(): each.strip().strip("\"'") for key, _, each in (item.partition("=") for item in items)}


SAME = {
    "relative_step": ("false",),
    "scale_parameter": ("false",),
    "warmup_init": ("false",),
    "decouple": ("true",),
    "use_bias_correction": ("true",),
    "safeguard_warmup": ("true",),
    "d_coef": ("1", "1.0"),
}
"""Arguments of Adafactor and Prodigy as ours have them."""


def optimizer_args(value: Any, given: Given) -> Any:
    values: dict[str, Any] = {}
    others = []
    for key, each in arguments(value).items():
        if key == "weight_decay":
            values[key] = number(each)
        elif key == "betas":
            values[key] = [number(part) for part in re.split(r"[,\s]+", each.strip("()[] ")) if part]
        elif each.lower() not in SAME.get(key, ()):
            others.append(key)
    if others:
        return near(values, f"without counterpart: {', '.join(others)}")
    return values or unchanged("as they are here")


ALGORITHMS = {"lora": "lora", "locon": "lora", "lokr": "lokr"}
MODULES = {"networks.lora_flux": "lora", "networks.lokr": "lokr"}


def rank(value: Any, given: Given) -> Any:
    if whole(value) > LARGEST:
        return near(LARGEST, "the largest rank, at which a LoKr's second factor is whole")
    return whole(value)


def alpha(value: Any, given: Given) -> Any:
    return number(value) or float(whole(given.get("network_dim", 4)))


def _kind(given: Given) -> tuple[str, bool]:
    """The adapter, "" where there is none such here, and whether LyCORIS makes it."""
    module = text(given.get("network_module", "networks.lora_flux")).lower()
    if not module.startswith("lycoris"):
        return MODULES.get(module, ""), False
    asked = arguments(given.get("network_args") or [])
    kind = ALGORITHMS.get(asked.get("algo", "lora").lower(), "")
    return ("dora" if kind == "lora" and asked.get("dora_wd", "").lower() == "true" else kind), True


def network_module(value: Any, given: Given) -> Any:
    kind, _ = _kind(given)
    if not kind:
        return near("lora", f"there is no {shown(value)} with these network_args here: choose a kind in [lora]")
    return unchanged("an ordinary LoRA") if kind == "lora" else kind


TYPES = {
    "img_attn_dim": r"double_blocks\.\d+\.img_attn",
    "txt_attn_dim": r"double_blocks\.\d+\.txt_attn",
    "img_mlp_dim": r"double_blocks\.\d+\.img_mlp",
    "txt_mlp_dim": r"double_blocks\.\d+\.txt_mlp",
    "single_dim": r"single_blocks\.\d+\.linear",
}
"""Ranks of kinds of layers."""
BLOCKS = {"train_double_block_indices": ("double_blocks", 19), "train_single_block_indices": ("single_blocks", 38)}
NOT_OF_CHROMA = ("img_mod_dim", "txt_mod_dim", "single_mod_dim", "conv_dim", "conv_alpha")


def network_args(value: Any, given: Given) -> Any:
    """Which layers are trained, and at which rank: by kind, by block, by regular expressions on sd-scripts' names."""
    asked = {key: each for key, each in arguments(value).items() if each not in ("", "None")}
    kind, lycoris = _kind(given)
    known = {*TYPES, *BLOCKS, *NOT_OF_CHROMA, "train_blocks", "network_reg_dims", "split_qkv"}
    known |= {"algo", "dora_wd", "factor"} if lycoris or kind == "lokr" else set()
    others = [key for key, each in asked.items() if key not in known and each.lower() != "false"]
    ranks = _ranks(asked, whole(given.get("network_dim", 4)))
    trained = sorted({rank for rank in ranks.values() if rank})
    target = original(lambda name: ranks[name] > 0)
    if not target:
        raise Unreadable("arguments that leave layers to train")
    values: dict[str, Any] = {"lora.target": "all" if lycoris else target}
    if lycoris:
        reason = "LyCORIS' own choice of layers is the attention here"
    else:
        base = whole(given.get("network_dim", 4))
        patterns = {p: r for r in trained if r != base for p in original(lambda name, r=r: ranks[name] == r)}
        values |= {"lora.rank_pattern": patterns} if patterns else {}
        reason = "" if asked.get("split_qkv", "").lower() == "true" else FUSED
    if "factor" in asked and kind == "lokr":
        values["lora.lokr_factor"] = whole(asked["factor"])
    if others:
        reason = "; ".join(filter(None, (reason, f"without counterpart: {', '.join(others)}")))
    return near(values, reason) if reason else values


def _ranks(asked: Mapping[str, str], rank: int) -> dict[str, int]:
    """The rank of every layer by its original name; 0 where none is trained. What comes later goes before."""
    ranks: dict[str, int] = {}
    original(lambda name: bool(ranks.update({name: rank})))
    for option, pattern in TYPES.items():
        if option in asked:
            ranks |= {name: whole(asked[option]) for name in ranks if re.match(pattern, name)}
    only = asked.get("train_blocks", "all")
    if only not in ("all", "single", "double"):
        raise Unreadable("arguments with train_blocks=all, single or double")
    for option, (kind, count) in BLOCKS.items():
        chosen = _indices(asked.get(option, "all"), count)
        if only != "all" and not kind.startswith(only):
            chosen = set()
        ranks |= {name: 0 for name in ranks if name.startswith(kind) and int(name.split(".")[1]) not in chosen}
    for entry in filter(None, asked.get("network_reg_dims", "").split(",")):
        pattern, _, number_ = entry.rpartition("=")
        try:
            matches = re.compile(pattern).search
        except re.error as error:
            raise Unreadable(f"arguments with regular expressions ({pattern}: {error})") from error
        ranks |= {name: whole(number_) for name in ranks if matches("lora_unet_" + name.replace(".", "_"))}
    return ranks


def _indices(text_: str, count: int) -> set[int]:
    """`all`, `none` or `0,1,5-8`."""
    if text_ in ("all", "none"):
        return set(range(count)) if text_ == "all" else set()
    found: set[int] = set()
    for part in text_.split(","):
        first, _, last = part.strip().partition("-")
        found |= set(range(whole(first), whole(last or first) + 1))
    return found


def timesteps(value: Any, given: Given) -> Any:
    name = text(value).lower()
    scale, constant = number(given.get("sigmoid_scale", 1.0)), number(given.get("discrete_flow_shift", 3.0))
    shaped = {"objective.draw": "logit_normal", "objective.scale": scale}
    if name == "sigma":
        return _indexed(given, constant)
    known: dict[str, dict[str, Any]] = {
        "uniform": {"objective.draw": "uniform", "objective.flow_shift": "none"},
        "sigmoid": {**shaped, "objective.flow_shift": "none"},
        "shift": {**shaped, "objective.flow_shift": _shift(constant)},
        "flux_shift": {**shaped, "objective.flow_shift": "dynamic"},
    }
    if name not in known:
        return near(known["sigmoid"], f"there is no {name!r} here")
    return known[name]


def _indexed(given: Given, constant: float) -> Any:
    """Noise levels from sd-scripts' shifted table, by an index that `weighting_scheme` draws from the noisy end."""
    scheme = text(given.get("weighting_scheme", "none")).lower()
    if scheme == "logit_normal":  # the index's mean counts from the noisy end: −m in the logit, a shift of e^−m
        mean, width = number(given.get("logit_mean", 0.0)), number(given.get("logit_std", 1.0))
        shift = _shift(constant * math.exp(-mean))
        return {"objective.draw": "logit_normal", "objective.scale": width, "objective.flow_shift": shift}
    values = {"objective.draw": "uniform", "objective.flow_shift": _shift(constant)}
    if scheme == "mode":
        return near(values, "there is no draw of that name; levels are even here before the shift")
    return values


def _shift(value: float) -> Any:
    return "none" if value == 1 else round(value, 6)


def prediction(value: Any, given: Given) -> Any:
    name = text(value).lower()
    if name == "raw":
        return unchanged("the velocity is what is compared here too")
    if name == "sigma_scaled":
        return near({}, "there the error counts σ² as much, i.e. little at low noise; here the loss is not weighted")
    return lost(f"{name}: the velocity is what is compared here")


def guidance(value: Any, given: Given) -> Any:
    scale = number(value)
    if scale == 0:
        return {"objective.guidance": "none"}
    values = {"objective.guidance": "constant", "objective.guidance_range": [scale, scale]}
    return near(values, "Chroma has only seen 0, which sd-scripts' guide asks for: set guidance to none")


def loss(value: Any, given: Given) -> Any:
    name = text(value).lower()
    delta = number(given.get("huber_c", 0.1))
    if name == "l2":
        return {"objective.loss": "mse"}
    if name == "huber":
        values = {"objective.loss": "huber", "objective.huber_delta": delta}
        schedule = text(given.get("huber_schedule", "snr")).lower()
        return values if schedule == "constant" else near(values, f"the threshold is constant here, not {schedule}")
    if name in ("l1", "smooth_l1"):
        return near({"objective.loss": "huber", "objective.huber_delta": delta}, "the nearest loss that there is")
    raise Unreadable("l1, l2, huber or smooth_l1")


def noise_offset(value: Any, given: Given) -> Any:
    if is_on(given, "noise_offset_random_strength"):
        return near(number(value), "its strength is always the same here")
    return number(value)


def save_epochs(value: Any, given: Given) -> Any:
    if given.get("save_every_n_steps") is not None:
        return unchanged("checkpoints are made by steps, see save_every_n_steps")
    return {"checkpoint_every": epochs_of(value)}


def last_epochs(value: Any, given: Given) -> Any:
    every = whole(given.get("save_every_n_epochs") or 0)
    if not every or given.get("save_every_n_steps") is not None:
        return unchanged("not used without save_every_n_epochs")
    return max(1, math.ceil(whole(value) / every))


def validate_epochs(value: Any, given: Given) -> Any:
    return {"validate_every": epochs_of(value)}


def sample_epochs(value: Any, given: Given) -> Any:
    if given.get("sample_every_n_steps") is not None:
        return unchanged("previews are made by steps, see sample_every_n_steps")
    return {"previews.every": epochs_of(value)}


def prompts(value: Any, given: Given) -> Any:
    """The file's prompts: a text with one a line, or a list in JSON or TOML."""
    place = Path(resolve(ForeignPath(text(value)), given["folders"]))
    if not place.is_file():
        return lost("the file is not here: write its prompts into previews.prompts")
    found, left = [], []
    if place.suffix.lower() in (".json", ".toml"):
        content = read_config(place)
        shared = content.get("prompt", {}) if isinstance(content, dict) else {}
        items = shared.get("subset", []) if isinstance(shared, dict) else shared
        base = {key: each for key, each in shared.items() if key != "subset"} if isinstance(shared, dict) else {}
        for item in content if isinstance(content, list) else items:
            fields = {**base, **item}
            if not fields.get("guidance_scale"):
                fields.pop("guidance_scale", None)
            entry, without = of_object(fields, SAMPLE_FIELDS)
            found.append(entry)
            left += without
    else:
        for line in read_lines(place):
            if line.strip() and not line.startswith("#"):
                entry, without = of_line(line)
                found.append(entry)
                left += [flag for flag in without if flag not in ("--g 0", "--g 0.0")]
    reason = f"without counterpart: {', '.join(left)}"
    previews = {"previews.prompts": plain([{"prompt": "", **entry} for entry in found])}
    return near(previews, reason) if left else previews


def masked(value: Any, given: Given) -> Any:
    return unchanged("where a set has masks" if switch(value) else "not used")


def reg_folder(value: Any, given: Given) -> Any:
    return unchanged("a regularisation set, see below")


def extension(value: Any) -> str:
    return "." + text(value).lstrip(".")


def is_reg(value: Any, given: Given) -> Any:
    if not switch(value):
        return unchanged("images to train")
    return near(True, "sd-scripts trains these images too; here their target is the model without the LoRA")


def resolution(value: Any, given: Given) -> Any:
    """`512`, `512,768` or [512, 768]: width and height."""
    sides = value if isinstance(value, list) else [part for part in text(value).split(",") if part.strip()]
    sides = [whole(side) for side in sides]
    if len(sides) not in (1, 2):
        raise Unreadable("one number, or width and height")
    side = round(math.sqrt(sides[0] * sides[-1]))
    if sides[0] == sides[-1]:
        return [side]
    return near([side], "the side of a square with as many pixels; images keep their own shape here")


def upscale(value: Any, given: Given) -> Any:
    return not switch(value)


def keep_tags(value: Any, given: Given) -> Any:
    return whole(value) if is_on(given, "shuffle_caption") else unchanged("not used without shuffle_caption")


def separator(value: Any, given: Given) -> Any:
    return unchanged("commas here too") if text(value).strip() == "," else lost("only tags between commas are shuffled")


def wildcard(value: Any, given: Given) -> Any:
    if not switch(value):
        return "first"
    return near("each", "one of the lines is drawn here too, but {a|b} in a caption stays as it is written")


def conditioning(value: Any, given: Given) -> Any:
    return near({"masks": "files"}, "masks lie beside the images here, see below")


def split(value: Any, given: Given) -> Any:
    share = number(value)
    if share in (0, 1):
        return unchanged("held out" if share else "not used")
    return lost("held-out images are a folder of their own: set validation_dataset")


OPTIONS, SET_OPTIONS = table(_DATA["config"], globals()), table(_DATA["datasets"], globals(), DatasetConfig)
UNSTATED, UNSTATED_SETS = _DATA["config"]["unstated"], _DATA["datasets"]["unstated"]
"""What sd-scripts takes for options that are not stated, in the configuration and in a set."""


def flattened(content: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a TOML; its sections mean nothing to sd-scripts."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        inner = value if isinstance(value, dict) else {key: value}
        found |= {plain_name(name): each for name, each in inner.items()}
    return found


def read(file: Path, content: Mapping[str, Any], beside: Path | None) -> Imported:
    """A configuration for a Chroma LoRA with its datasets; `beside` is the dataset file. Raises ConfigError."""
    options = flattened(content)
    model = options.get("model_type", "flux")
    if model != "chroma":
        raise ConfigError(
            f"'{file.name}' is for kohya's sd-scripts and has the model_type {shown(model)}. ChromaKit trains "
            'Chroma alone: import a file with model_type = "chroma" (add it to the file where it stands on the command '
            "line)."
        )
    if "network_module" not in options and "network_dim" not in options:
        raise ConfigError(
            f"'{file.name}' has no network_module: it trains the whole model. Only LoRA jobs are imported."
        )
    for_all_sets = {name: options.pop(name) for name in FOR_ALL_SETS if name in options}
    folders, todo, lines = start_folders(file), [], []
    batch = options.pop("batch_size", None)
    job, context = Draft(file.name, lines), {"folders": folders}
    job.walk(OPTIONS, options, context=context, unstated=UNSTATED)
    _built_in(job, options)
    place = beside
    named = options.get("dataset_config")
    if place is None and isinstance(named, str) and named:
        place = Path(resolve(ForeignPath(named), folders))
        if not place.is_file():
            place = None
            todo.append(
                f"'{file.name}' takes its datasets from '{named}', which is not here: import with --dataloader."
            )
    sets: list[tuple[str, Draft]] = []
    batches: list[Any] = []
    for prefix, kind, stated, own in _sets(place, options, for_all_sets, lines):
        batches.append(own if own is not None else batch)
        part = Draft(prefix or file.name, lines)
        unstated = UNSTATED_SETS if "folder" in stated or "image_dir" in stated or "train_data_dir" in stated else {}
        part.walk(SET_OPTIONS, stated, prefix=prefix, unstated=unstated)
        part.record(f"{prefix}repeats in folders' names", "built in", {"repeat_folders": "train_data_dir" in stated})
        if part.values.get("masks") == "files":
            todo.append(
                f"Copy each mask from '{stated['conditioning_data_dir']}' beside its image, as name-masklabel.png."
            )
        sets.append((kind, part))
    _batch(job, batches or [batch])
    if "name" not in job.values:
        job.put("name", slug(file.stem), "the file's name")
    return finish(
        "kohya's sd-scripts", (file.name,) if place is None else (file.name, place.name), job, sets, folders, todo
    )


def _built_in(job: Draft, options: Given) -> None:
    """What sd-scripts does for Chroma without an option."""
    job.record("noise levels", "built in", {"objective.remap": "none"})
    job.record("trained layers", "built in", near({"lora.target": list(EVERY_BLOCK)}, FUSED), over=False)
    decay = 0.01 if job.values.get("optimizer") in DECAY else 0.0
    job.record("optimizer_args: weight_decay", f"{decay} (not stated)", {"weight_decay": decay}, over=False)
    if job.values.get("optimizer") == "adafactor":
        asked = arguments(options.get("optimizer_args") or [])
        if asked.get("relative_step", "true").lower() != "false":
            reason = "Adafactor makes its own rate there; here it is learning_rate"
            job.lines.append(Line("optimizer_args: relative_step", "True (not stated)", "differs", {}, reason))


def _batch(job: Draft, batches: list[Any]) -> None:
    """One batch size for the job: that of its sets, or the first of several."""
    sizes = [whole(1 if size is None else size) for size in batches]
    said = "batch_size" if any(size is not None for size in batches) else "batch_size (not stated)"
    values = {"batch_size": sizes[0]}
    different = len(set(sizes)) > 1
    reason = f"a job has one batch size; the sets have {', '.join(map(str, sizes))}"
    job.record(said, shown(sizes[0]), near(values, reason) if different else values)


def _sets(
    place: Path | None, options: Given, for_all: Given, lines: list[Line]
) -> list[tuple[str, str, dict[str, Any], Any]]:
    """Every subset as prefix, kind, options with what holds for it, and its batch size."""
    if place is None:
        found = []
        for option, reg in (("train_data_dir", False), ("reg_data_dir", True)):
            if options.get(option):
                own = {"train_data_dir": options[option], **({"is_reg": True} if reg else {})}
                found.append((f"{option}: ", "image", {**for_all, **own}, None))
        return found or [("", "image", dict(for_all), None)]
    content = read_config(place)
    whole_file = content if isinstance(content, dict) else {}
    others = [str(key) for key in whole_file if key not in ("general", "datasets")]
    if others:
        raise ConfigError(f"'{place.name}' is no dataset file of sd-scripts: it has {', '.join(others)}.")
    datasets = whole_file.get("datasets")
    if not isinstance(datasets, list) or not all(isinstance(item, dict) for item in datasets):
        raise ConfigError(f"'{place.name}' is no dataset file of sd-scripts: it has no [[datasets]].")
    general = {plain_name(key): value for key, value in (whole_file.get("general") or {}).items()}
    found, everywhere = [], []
    for i, dataset in enumerate(datasets):
        shared = {plain_name(key): value for key, value in dataset.items() if key != "subsets"}
        subsets = dataset.get("subsets")
        if not isinstance(subsets, list) or not subsets:
            raise ConfigError(f"'{place.name}': dataset {i} has no [[datasets.subsets]].")
        own = [{plain_name(key): value for key, value in subset.items()} for subset in subsets]
        overridden(lines, f"datasets.{i}.", shared, own)
        everywhere += [{**shared, **each} for each in own]
        for j, each in enumerate(own):
            stated = {**for_all, **general, **shared, **each}
            size = stated.pop("batch_size", None)
            kind = "eval" if stated.get("validation_split") == 1 else "image"
            found.append((f"datasets.{i}.subsets.{j}.", kind, stated, size))
    overridden(lines, "general.", general, everywhere)
    overridden(lines, "", for_all, [{**general, **each} for each in everywhere])
    return found
