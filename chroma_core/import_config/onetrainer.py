"""OneTrainer's configuration: the functions that its tables (`onetrainer.yaml`) name, and what it reads beside it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ..data.dataset import DatasetConfig
from ..data.pictures import picture_extensions
from ..errors import ConfigError, counted
from ..files import slug
from .ai_toolkit import LARGEST
from .convert import Draft, Given, Line, lost, near, shown, table, unchanged
from .job import Imported, finish, resolve, start_folders
from .layers import ours
from .prompts import of_object, plain
from .read import ForeignPath, Unreadable, epochs_of, is_off, is_on, number, read_config, switch, text, whole

_DATA = read_config(Path(__file__).with_suffix(".yaml"))
FOR_ALL_SETS = tuple(_DATA["for_all_sets"].split())
"""Options of the configuration that hold for every concept."""

DECAY = {"adamw": 0.01, "adamw_8bit": 0.01, "schedule_free_adamw": 0.01, "came": 0.01, "came_8bit": 0.01}
"""The weight decay of OneTrainer's optimizers where none is stated; 0 for all others."""
BETAS = {"prodigy_plus_schedule_free": (0.9, 0.99), "prodigy_adv": (0.9, 0.99), "adamw_adv": (0.9, 0.99)}
"""Their betas, where they are not .9 and .999."""

SAMPLE_FIELDS = {
    "prompt": "prompt",
    "negative_prompt": "negative",
    "width": "width",
    "height": "height",
    "seed": "seed",
    "diffusion_steps": "steps",
    "cfg_scale": "guidance",
}
"""Fields of a sample, and ours."""
SAMPLE = {"width": 512, "height": 512, "seed": 42, "diffusion_steps": 20, "cfg_scale": 7.0, "negative_prompt": ""}
"""A sample's values that are not stated."""
NO_FIELDS = (
    "__version", "enabled", "random_seed", "frames", "length", "noise_scheduler", "text_encoder_1_layer_skip",
    "text_encoder_2_layer_skip", "text_encoder_3_layer_skip", "text_encoder_4_layer_skip",
    "transformer_attention_mask", "force_last_timestep", "sample_inpainting", "base_image_path", "mask_image_path",
)  # fmt: skip
"""Fields of a sample that mean nothing for Chroma, or are said in words."""


def plain_name(name: str) -> str:
    """The present name of an option."""
    return _DATA["other_names"].get(name, name)


def word(value: Any) -> str:
    return text(value).strip().upper()


def file_stem(value: Any) -> str:
    return PurePosixPath(text(value).replace("\\", "/")).stem or "imported"


def train_dtype(value: Any, given: Given) -> Any:
    name = word(value)
    if name == "BFLOAT_16":
        return unchanged("computing is in bf16 here too")
    return near({}, f"computing is in the type of model.precision here, not in {name.lower()}")


def epochs(value: Any, given: Given) -> Any:
    return {"steps": epochs_of(value)}


def learning_rate(value: Any, given: Given) -> Any:
    if given.get("transformer.learning_rate") is not None:
        return unchanged("transformer.learning_rate decides")
    return number(value)


def warmup(value: Any, given: Given) -> Any:
    steps = number(value)
    if 0 < steps <= 1:
        return lost(f"{steps:g} of all steps: set warmup_steps")
    return _steps(steps, given)


def _steps(batches: float, given: Given) -> int:
    """OneTrainer counts batches, ChromaKit updates."""
    return int(batches / whole(given.get("gradient_accumulation_steps", 1)))


def cycles(value: Any, given: Given) -> Any:
    if "RESTARTS" in word(given.get("learning_rate_scheduler", "CONSTANT")):
        return max(1, round(number(value)))
    return unchanged("read by the restarting schedules alone")


def ema(value: Any, given: Given) -> Any:
    if word(value) == "OFF":
        return 0.0
    every = whole(given.get("ema_update_step_interval", 5))
    decay = number(given.get("ema_decay", 0.999))
    return decay if every == 1 else near(decay, f"updated at every step here, every {every} there")


def loss(value: Any, given: Given) -> Any:
    strengths = {name: number(given.get(f"{name}_strength", 0.0)) for name in ("mae", "log_cosh", "huber")}
    others = [name for name, strength in strengths.items() if strength]
    mse, delta = number(value), number(given.get("huber_delta", 1.0))
    if not others:
        return {"objective.loss": "mse"} if mse == 1 else near({"objective.loss": "mse"}, "its strength is 1 here")
    if others == ["huber"] and not mse:
        values = {"objective.loss": "huber", "objective.huber_delta": delta}
        return near(values, "here it is the smooth pseudo-Huber, twice as large")
    if mse:
        return near({"objective.loss": "mse"}, f"losses are not mixed here: without {', '.join(others)}")
    return near({"objective.loss": "huber"}, f"the nearest loss that there is to {' and '.join(others)}")


def timesteps(value: Any, given: Given) -> Any:
    name, bias = word(value), number(given.get("noising_bias", 0.0))
    weight = number(given.get("noising_weight", 0.0))
    if name == "LOGIT_NORMAL":
        values = {"objective.draw": "logit_normal", "objective.scale": weight + 1}
        return values | ({"objective.flow_shift": _shift(given)} if bias else {})
    if name == "INVERTED_PARABOLA" and weight and not bias:
        found = {"objective.draw": "chroma"}
        return found if weight == 7.7 else near(found, f"the author's parabola has the weight 7.7, not {weight:g}")
    even = {"objective.draw": "uniform"}
    if name == "UNIFORM" or (weight == 0 and name in ("HEAVY_TAIL", "SIGMOID", "INVERTED_PARABOLA")):
        return even
    return near(even, f"there is no {name.lower()} draw with weight {weight:g} and bias {bias:g}; levels are even here")


def _shift(given: Given) -> Any:
    """A bias b of the logit is a shift of e^b; two shifts multiply."""
    bias = 0.0
    if word(given.get("timestep_distribution", "UNIFORM")) == "LOGIT_NORMAL":
        bias = number(given.get("noising_bias", 0.0))
    shift = number(given.get("timestep_shift", 1.0)) * math.exp(bias)
    return "none" if shift == 1 else round(shift, 6)


def shift(value: Any, given: Given) -> Any:
    return _shift({**given, "timestep_shift": value})


def minimum(value: Any, given: Given) -> Any:
    return _limit(number(value), given)


def maximum(value: Any, given: Given) -> Any:
    return _limit(number(value), given)


def _limit(value: float, given: Given) -> Any:
    if _shift(given) == "none" or value in (0, 1):
        return value
    return near(value, "OneTrainer shifts what lies between the limits, ChromaKit squeezes what was shifted")


def checkpointing(value: Any, given: Given) -> Any:
    name = "ON" if value is True else "OFF" if value is False else word(value)
    if name not in ("ON", "OFF", "CPU_OFFLOADED"):
        raise Unreadable("ON, OFF or CPU_OFFLOADED")
    values: dict[str, Any] = {"gradient_checkpointing": name != "OFF"}
    if name == "CPU_OFFLOADED" and number(given.get("layer_offload_fraction", 0.0)) > 0:
        return near(values | {"model.offload": "block"}, "blocks are streamed by ChromaKit's own offloading")
    return values


def offload_fraction(value: Any, given: Given) -> Any:
    if number(value) == 0:
        return unchanged("not used")
    return near("block", "blocks are streamed by ChromaKit's own offloading")


def cloud(value: Any, given: Given) -> Any:
    enabled = isinstance(value, dict) and is_on(value, "enabled")
    return lost("a job runs on this computer") if enabled else unchanged("not used")


def layer_filter(value: Any, given: Given) -> Any:
    parts = [part.strip() for part in text(value).split(",") if part.strip()]
    if is_on(given, "layer_filter_regex"):
        try:
            patterns = [re.compile(part) for part in parts]
        except re.error as error:
            raise Unreadable(f"a regular expression ({error})") from error
        target = ours(lambda name: not parts or any(pattern.search(name) for pattern in patterns))
    else:
        target = ours(lambda name: not parts or any(part in name for part in parts))
    if not target:
        return lost(f"no layer of Chroma has such a name: {', '.join(parts)}")
    if parts == ["attn"]:
        return "all"
    return target if parts else near(target, "the approximator, which OneTrainer trains as well, is never trained here")


def peft_type(value: Any, given: Given) -> Any:
    name = word(value)
    if name == "LORA":
        return unchanged("an ordinary LoRA")
    if name != "LOKR":
        return near({"lora.kind": "lora"}, f"there is no {name} here: choose a kind in [lora]")
    full = is_on(given, "lokr_full_matrix")
    values = {
        "lora.kind": "lokr",
        "lora.rank": LARGEST if full else whole(given.get("lokr_dim", 16)),
        "lora.lokr_factor": whole(given.get("lokr_decompose_factor", -1)),
    }
    others = [option for option in ("lokr_decompose_both", "lokr_weight_decompose") if is_on(given, option)]
    return near(values, f"without counterpart: {', '.join(others)}") if others else values


def _is_lokr(given: Given) -> bool:
    return word(given.get("peft_type", "LORA")) == "LOKR"


def rank(value: Any, given: Given) -> Any:
    return unchanged("lokr_dim decides") if _is_lokr(given) else whole(value)


def decompose(value: Any, given: Given) -> Any:
    if not switch(value):
        return unchanged("not used")
    if _is_lokr(given):
        return lost("there is no LoKr with DoRA here")
    if is_on(given, "lora_decompose_output_axis"):
        return "dora"
    return near("dora", "OneTrainer's norm is one for each input of a layer, here one for each output")


def validation(value: Any, given: Given) -> Any:
    return unchanged("taken over with validate_after" if switch(value) else "not used")


def _interval(value: Any, unit: str, path: str, given: Given) -> Any:
    """Every so many batches or epochs; other units have no counterpart."""
    if unit == "NEVER":
        return {path: 0}
    if unit == "ALWAYS":
        return {path: 1}
    if unit == "STEP":
        every = whole(value)
        return {path: max(_steps(every, given), 1) if every else 0}
    if unit == "EPOCH":
        return {path: epochs_of(value)}
    return lost(f"steps are counted here, not {unit.lower()}s")


def validate_after(value: Any, given: Given) -> Any:
    if not is_on(given, "validation"):
        return unchanged("not used without validation")
    return _interval(value, word(given.get("validate_after_unit", "EPOCH")), "validate_every", given)


def sample_after(value: Any, given: Given) -> Any:
    return _interval(value, word(given.get("sample_after_unit", "MINUTE")), "previews.every", given)


def save_every(value: Any, given: Given) -> Any:
    unit = word(given.get("save_every_unit", "NEVER"))
    return unchanged("not used") if unit == "NEVER" else _interval(value, unit, "checkpoint_every", given)


def backup_after(value: Any, given: Given) -> Any:
    unit = word(given.get("backup_after_unit", "MINUTE"))
    minutes = {"SECOND": 1 / 60, "MINUTE": 1.0, "HOUR": 60.0}
    if unit in minutes:
        return {"checkpoint_minutes": round(number(value) * minutes[unit], 3)}
    return unchanged("not used") if unit == "NEVER" else lost("checkpoints follow save_every, or minutes")


def rolling(value: Any, given: Given) -> Any:
    return whole(value) if is_on(given, "rolling_backup") else unchanged("not used without rolling_backup")


def text_dropout(value: Any, given: Given) -> Any:
    reason = "every set's caption_dropout"
    return near({}, f"{reason}: there the text states become 0, here the caption empty") if number(value) else (
        unchanged(reason)
    )  # fmt: skip


def betas(value: Any, given: Given) -> Any:
    name = text(given.get("optimizer", "ADAMW")).lower()
    if name == "adafactor":
        return unchanged("Adafactor has none")
    first, second = BETAS.get(name, (0.9, 0.999))
    return [number(given.get("beta1", first)), number(given.get("beta2", second))]


def eps(value: Any, given: Given) -> Any:
    name = text(given.get("optimizer", "ADAMW")).lower()
    if not name.startswith(("adam", "prodigy", "schedule_free")) or number(value) == 1e-8:
        return unchanged("the same here")
    return lost("epsilon is 1e-8")


def resolution(value: Any, given: Given) -> Any:
    if is_on(given, "image.enable_resolution_override"):
        return unchanged("image.resolution_override decides")
    return sizes(value)


def override(value: Any, given: Given) -> Any:
    if not switch(value):
        return unchanged("not used")
    return sizes(given.get("image.resolution_override", "512"))


def sizes(value: Any) -> Any:
    """`512`, `512,768` or `1024x768`."""
    parts = [part.strip().lower() for part in re.split(r"[,;\s]+", text(value)) if part.strip()]
    sides = [[whole(side) for side in part.split("x")] for part in parts]
    if not sides or any(len(side) > 2 for side in sides):
        raise Unreadable("sizes such as 512, or 512,768")
    values = {"resolutions": sorted({round(math.sqrt(math.prod(s) if len(s) == 2 else s[0] ** 2)) for s in sides})}
    if any(len(side) == 2 for side in sides):
        return near(values, "every image has a size of its own shape here, of that area")
    return near(values, "each image is trained at each of them; OneTrainer draws one") if len(sides) > 1 else values


def unmasked_weight(value: Any, given: Given) -> Any:
    return number(value) if is_on(given, "masked_training") else unchanged("not used without masked_training")


def unmasked_probability(value: Any, given: Given) -> Any:
    if not is_on(given, "masked_training") or number(value) == 0:
        return unchanged("not used")
    return near({}, "a mask counts at every use here")


def balancing(value: Any, given: Given) -> Any:
    uses = number(value)
    if word(given.get("balancing_strategy", "REPEATS")) == "SAMPLES":
        return near({}, f"{uses:g} samples of an epoch there; here all images of a set, see weight")
    if uses >= 1 and uses == int(uses):
        return {"repeats": int(uses)}
    return near({"weight": uses}, "a part of the images in each epoch there; here how often, against other sets")


def subfolders(value: Any, given: Given) -> Any:
    if switch(value):
        return unchanged("they count here too")
    if not given["subfolders"]:
        return unchanged("there are none with images")
    return near({}, "images in sub-folders count here: move them away")


def crop(value: Any, given: Given) -> Any:
    if not switch(value):
        return {"crop": "centre"}
    return {"crop": "random", "random_crops": max(1, whole(given.get("image_variations", 1)))}


def keep_tags(value: Any, given: Given) -> Any:
    return whole(value) if is_on(given, "text.enable_tag_shuffling") else unchanged("not used without shuffling")


def delimiter(value: Any, given: Given) -> Any:
    if text(value) == "," or not is_on(given, "text.enable_tag_shuffling"):
        return unchanged("commas here too" if text(value) == "," else "not used without shuffling")
    return lost("only tags between commas are shuffled")


SET_OPTIONS = table(_DATA["datasets"], globals(), DatasetConfig)
SECTIONS = {
    "" if name == "config" else name: table(_DATA[name], globals())
    for name in ("config", "transformer", "text_encoder", "vae", "quantization", "optimizer")
}
UNSTATED = {name: _DATA[name or "config"].get("unstated", {}) for name in SECTIONS}
UNSTATED_SETS = _DATA["datasets"]["unstated"]
"""What OneTrainer takes for options that are not stated, section by section, and in a concept."""


def read(file: Path, content: Mapping[str, Any], beside: Path | None) -> Imported:
    """A configuration for a Chroma LoRA, with the concepts and samples in it or in the files that it names.

    `beside`: the file of the concepts. Raises ConfigError.
    """
    model = content.get("model_type")
    if model != "CHROMA_1":
        found = f"is for the model type {model!r}" if model else "does not say its model_type"
        raise ConfigError(f"'{file.name}' {found}. ChromaKit trains Chroma alone: import one with CHROMA_1.")
    if content.get("training_method", "FINE_TUNE") != "LORA":
        method = content.get("training_method", "FINE_TUNE (not stated)")
        raise ConfigError(f"'{file.name}' has the training_method {method}. Only LORA is imported.")
    options = {plain_name(key): value for key, value in content.items()}
    spelled = {plain_name(key): key for key in content}
    if "clip_grad_norm" in options and options["clip_grad_norm"] is None:
        options["clip_grad_norm"] = 0.0  # null is no clipping
    sections: dict[str, dict[str, Any]] = {}
    for name in filter(None, SECTIONS):
        section = options.pop(name, None)
        if name == "transformer" and section is None:
            section = options.pop("prior", None)  # its name in earlier versions
        section = {"optimizer": section} if name == "optimizer" and isinstance(section, str) else section or {}
        if not isinstance(section, dict):
            raise ConfigError(f"'{file.name}': {name} is {shown(section)}; it must be a section with options.")
        sections[name] = section
    folders, todo, lines = start_folders(file), [], []
    for_all_sets = {name: options.pop(name) for name in FOR_ALL_SETS if name in options}
    sources = [file.name]
    concepts = _beside(file, options, "concepts", "concept_file_name", beside, folders, sources, todo)
    samples = _beside(file, options, "samples", "sample_definition_file_name", None, folders, sources, [])
    job = Draft(file.name, lines)
    context = {f"{name}.{key}": value for name, part in sections.items() for key, value in part.items()}
    sections[""] = options
    for name, rules in SECTIONS.items():
        prefix = f"{name}." if name else ""
        own = {} if name else spelled
        job.walk(rules, sections[name], prefix=prefix, context=context, spelled=own, unstated=UNSTATED[name])
    _built_in(job, sections["optimizer"])
    _previews(job, samples or [])
    sets: list[tuple[str, Draft]] = []
    dropout = number(sections["text_encoder"].get("dropout_probability") or 0.0)
    for i, concept in enumerate(concepts or []):
        found = _concept(f"concepts.{i}", concept, for_all_sets, dropout, folders, lines)
        sets += [found] if found else []
    if not concepts:  # what every set would have
        sets.append(("image", _set(Draft(file.name, lines), "", for_all_sets, {}, dropout, folders)))
    if "name" not in job.values:
        job.put("name", slug(file.stem.lstrip("#")), "the file's name")
    return finish("OneTrainer", tuple(sources), job, sets, folders, todo)


def _beside(
    file: Path,
    options: dict[str, Any],
    inside: str,
    named: str,
    given: Path | None,
    folders: list[Path],
    sources: list[str],
    todo: list[str],
) -> list[dict[str, Any]] | None:
    """A list that stands in the configuration or in a file of its own, a source; None where it is not here."""
    content = options.get(inside)
    if given is not None or content is None:
        name = options.get(named)
        place = given or (Path(resolve(ForeignPath(name), folders)) if isinstance(name, str) and name else None)
        if place is None or (given is None and not place.is_file()):
            if place is not None:
                todo.append(
                    f"'{file.name}' takes its {inside} from '{name}', which is not here: import with --dataloader."
                )
            return None
        content = read_config(place)
        sources.append(place.name)
    if not isinstance(content, list) or not all(isinstance(item, dict) for item in content):
        raise ConfigError(f"'{file.name}': {inside} is {shown(content)}; it must be a list of objects.")
    return content


def _built_in(job: Draft, optimizer: Given) -> None:
    """What OneTrainer does for Chroma without an option."""
    job.record("noise levels", "built in", {"objective.remap": "none"})
    name = text(optimizer.get("optimizer") or "ADAMW").lower()
    decay = DECAY.get(name, 0.0)
    job.record("optimizer.weight_decay", f"{decay} (not stated)", {"weight_decay": decay}, over=False)
    if name in BETAS:
        job.record("optimizer.beta1, beta2", "not stated", {"betas": list(BETAS[name])}, over=False)


def _previews(job: Draft, samples: list[dict[str, Any]]) -> None:
    found: list[dict[str, Any]] = []
    left: list[str] = []
    for i, sample in enumerate(samples):
        if is_off(sample.get("enabled", True)):
            job.lines.append(Line(f"samples.{i}", "disabled", "ignored", {}, "a disabled sample is left out"))
            continue
        values = {**SAMPLE, **{key: value for key, value in sample.items() if value is not None}}
        if is_on(sample, "random_seed"):
            del values["seed"]
            left.append("random_seed")
        entry, without = of_object({key: v for key, v in values.items() if key not in NO_FIELDS}, SAMPLE_FIELDS)
        found.append({"prompt": "", **entry})
        left += without
    if found:
        reason = f"without counterpart: {', '.join(left)}"
        previews = {"previews.prompts": plain(found)}
        job.record("samples", counted(len(found), "sample"), near(previews, reason) if left else previews)


def _concept(
    name: str, concept: dict[str, Any], for_all: Given, dropout: float, folders: list[Path], lines: list[Line]
) -> tuple[str, Draft] | None:
    """A concept as a dataset, flat: `image.` and `text.` before what stands in those sections."""
    flat: dict[str, Any] = {}
    for key, value in concept.items():
        if key in ("image", "text") and isinstance(value, dict):
            flat |= {f"{key}.{option}": each for option, each in value.items() if option != "__version"}
        else:
            flat["balancing" if key == "repeats" else key] = value
    if is_off(flat.get("enabled", True)):
        lines.append(Line(name, "disabled", "ignored", {}, "a disabled concept is left out"))
        return None
    held_out = is_on(flat, "validation_concept") or flat.get("type") == "VALIDATION"
    part = _set(Draft(name, lines), f"{name}.", for_all, flat, dropout, folders)
    return "eval" if held_out else "image", part


def _set(
    part: Draft, prefix: str, for_all: Given, options: dict[str, Any], dropout: float, folders: list[Path]
) -> Draft:
    place = options.get("path")
    folder = Path(resolve(ForeignPath(place), folders)) if isinstance(place, str) and place else Path("?")
    below = folder.is_dir() and any(p.suffix.lower() in picture_extensions() for p in folder.glob("*/**/*"))
    stated = {key: value for key, value in for_all.items() if value is not None}
    part.walk(
        SET_OPTIONS,
        {**stated, "caption_dropout": dropout, **options},
        prefix=prefix,
        context={"subfolders": below},
        unstated=UNSTATED_SETS,
    )
    values = {"missing_caption": "empty", "upscale": True, "repeat_folders": False}
    part.record(f"{prefix}images and captions", "built in", values)
    return part
