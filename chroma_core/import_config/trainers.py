"""The four trainers: their tables, and for each a function that makes a job of its file.

All do the same: what the file is not, its sections, what the trainer does without an option, then each dataset.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data.dataset import DatasetConfig
from ..data.images import image_extensions
from ..errors import ConfigError, counted
from ..files import slug
from ..options import option_of
from ..training.config import TrainingConfig
from .answers import DATA, FUNCTIONS, k_arguments, previews
from .job import NAME_LENGTH, Imported, finish, start_folders
from .read import ForeignPath, is_off, is_on, number, preview_of_object, read_config, resolve, sizes, whole, word
from .table import Draft, Line, holds, near, shown, table

Options = dict[str, Any]


class Tables:
    """The tables of a trainer.

    sections: by name, "" for the topmost one; sets: of its datasets. unstated, assumed: what it takes for options that
    are not stated, by section; the second are not written, unless through another option. for_all_sets: options that
    hold for every set which does not say otherwise.
    """

    def __init__(self, name: str, top: str = "config") -> None:
        self.data = data = DATA[name]
        found = {
            "" if k == top else k: v for k, v in data.items() if isinstance(v, dict) and {"options", "lost"} & set(v)
        }
        self.unstated: dict[str, Options] = {section: part.get("unstated", {}) for section, part in found.items()}
        self.assumed: dict[str, Options] = {section: part.get("assumed", {}) for section, part in found.items()}
        self.sets = table(found.pop("datasets"), FUNCTIONS, DatasetConfig)
        self.sections = {section: table(part, FUNCTIONS) for section, part in found.items()}
        self.built_in = table({"options": data["built_in"]}, FUNCTIONS)
        self.built_in_sets = table({"options": data["built_in_sets"]}, FUNCTIONS, DatasetConfig)
        self.for_all_sets: tuple[str, ...] = tuple(data.get("for_all_sets", "").split())

    def plain_name(self, name: str) -> str:
        """The name of an option as the tables have it: without dashes, and not one of earlier versions."""
        name = name.strip().lstrip("-").replace("-", "_")
        return self.data.get("other_names", {}).get(name, name)


SIMPLETUNER, AI_TOOLKIT = Tables("simpletuner"), Tables("ai_toolkit", "process")
ONETRAINER, KOHYA = Tables("onetrainer"), Tables("kohya")


class Import:
    """One import: what has been read so far. `tool`: the trainer's name; `given`: all options of the configuration that
    are stated, those of sections with the section's name before."""

    def __init__(self, tables: Tables, tool: str, file: Path) -> None:
        self.tables, self.tool, self.file = tables, tool, file
        self.folders, self.sources = start_folders(file), [file.name]
        self.lines: list[Line] = []
        self.todo: list[str] = []
        self.sets: list[tuple[str, Draft]] = []
        self.job = Draft(file.name, self.lines)
        self.given: Options = {}

    def walk(
        self, sections: Mapping[str, Options], spelled: Mapping[str, str] | None = None, left_out: Sequence[str] = ()
    ) -> None:
        """The options of all sections, and what the trainer does without one; `left_out`: options that it has not."""
        tables = self.tables
        for name, rules in tables.sections.items():
            self.job.walk(
                rules,
                sections[name],
                prefix=f"{name}." if name else "",
                context=tables.assumed[name] | self.given,
                spelled=None if name else spelled,
                unstated={key: value for key, value in tables.unstated[name].items() if key not in left_out},
            )
        for name, rule in tables.built_in.items():
            self.job.record(name, "built in", rule.convert(True, self.given), over=False)

    def decay(self, option: str, optimizer: str) -> None:
        """The weight decay of an optimizer where none is stated."""
        decay = self.tables.data["decay"].get(optimizer, 0.0)
        self.job.record(option, f"{decay} (not stated)", {"weight_decay": decay}, over=False)

    def add_set(
        self,
        options: Options,
        prefix: str,
        *,
        kind: str = "image",
        label: str | None = None,
        context: Mapping[str, Any] | None = None,
        spelled: Mapping[str, str] | None = None,
        unstated: Options | None = None,
    ) -> Draft:
        """A dataset, `image` or held out (`eval`); `label` stands before what the trainer does without an option."""
        tables, part = self.tables, Draft(self.sources[-1], self.lines)
        part.walk(
            tables.sets,
            options,
            prefix=prefix,
            context={**tables.assumed["datasets"], **(context or {})},
            spelled=spelled,
            unstated=tables.unstated["datasets"] if unstated is None else unstated,
        )
        for name, rule in tables.built_in_sets.items():
            part.record((prefix if label is None else label) + name, "built in", rule.convert(True, stated(options)))
        self.sets.append((kind, part))
        return part

    def beside(self, named: Any, given: Path | None, what: str = "datasets", needed: bool = True) -> Path | None:
        """The file that the configuration names, or that was given in its place; None where it is not here."""
        if given is None and isinstance(named, str) and named:
            given = Path(resolve(ForeignPath(named), self.folders))
            if not given.is_file():
                if needed:
                    self.todo.append(
                        f"'{self.file.name}' takes its {what} from '{named}', which is not here: import again with "
                        "--dataloader."
                    )
                return None
        if given is not None:
            self.sources.append(given.name)
        return given

    def overridden(self, prefix: str, shared: Options, sets: Sequence[Options], spelled: Mapping[str, str]) -> None:
        """A line for each option that holds for all sets, where every set states it itself."""
        for name, value in shared.items():
            if sets and all(each.get(name) is not None for each in sets):
                line = Line(prefix + spelled.get(name, name), shown(value), "ignored", {}, "every set says its own")
                self.lines.append(line)

    def finish(self, name: str, origin: str) -> Imported:
        """The job; `name`: for one whose file says none, `origin`: where from."""
        if "name" not in self.job.values:
            self.job.put("name", slug(name), origin)
        return finish(self.tool, tuple(self.sources), self.job, self.sets, self.folders, self.todo)


def stated(options: Mapping[str, Any]) -> Options:
    """The options that are not null."""
    return {key: value for key, value in options.items() if value is not None}


def together(shared: Mapping[str, Any], own: Mapping[str, Any]) -> Options:
    """A set's own options and the shared ones that it does not state; its null is not stated."""
    return {**shared, **{key: value for key, value in own.items() if value is not None or key not in shared}}


def is_list_of_objects(content: Any) -> bool:
    return isinstance(content, list) and all(isinstance(item, dict) for item in content)


def other_model(file: Path, kind: str, found: object, option: str, wanted: str) -> ConfigError:
    """The error for a configuration that is not for Chroma."""
    what = f"is for the {kind} {found!r}" if found else f"does not say its {option}"
    return ConfigError(f"'{file.name}' {what}. ChromaKit trains Chroma alone: import {wanted}.")


def simpletuner(file: Path, content: Mapping[str, Any], beside: Path | None) -> Imported:
    """SimpleTuner's config.json with its dataset file. Raises ConfigError, as all of them."""
    run = Import(SIMPLETUNER, "SimpleTuner", file)
    options, spelled = _under_one_name(file, content)
    if (family := options.get("model_family")) != "chroma":
        raise other_model(file, "model family", family, "model_family", "a config with model_family chroma")
    if options.get("model_type", "lora") != "lora":
        raise ConfigError(
            f"'{file.name}' has model_type {shown(options['model_type'])}. Only LoRA jobs are imported: set it to lora."
        )
    for_all_sets = {name: options.pop(name) for name in SIMPLETUNER.for_all_sets if name in options}
    run.given = stated(options) | stated(for_all_sets)
    left_out = SIMPLETUNER.data["not_of_lycoris"].split() if run.given.get("lora_type") == "lycoris" else ()
    if left_out:
        _read_lycoris(run, options)
    run.walk({"": options}, spelled, left_out)
    place = run.beside(run.given.get("data_backend_config"), beside)
    masks: dict[str, str] = {}
    found = _simpletuner_sets(run, place, masks) or [("", "image", {})]
    run.overridden("", for_all_sets, [backend for _, _, backend in found], spelled)
    for name, kind, backend in found:
        unstated = dict(SIMPLETUNER.unstated["datasets"])
        if not name:  # what the set's captions are is not known
            del unstated["caption_strategy"]
        part = run.add_set(
            together(for_all_sets, backend),
            f"{name}: " if name else "",
            kind=kind,
            context={"mask_sets": masks},
            spelled={key: spelled[key] for key in for_all_sets if backend.get(key) is None},
            unstated=unstated,
        )
        if part.values.get("masks") == "files":
            run.todo.append(
                f"Copy each mask of the set '{name}' beside its image, as name-masklabel.png, from "
                f"{' and '.join(repr(folder) for folder in masks.values())}."
            )
    return run.finish(file.resolve().parent.name or "imported", "the file's folder")


def _under_one_name(file: Path, content: Mapping[str, Any]) -> tuple[Options, dict[str, str]]:
    """SimpleTuner's options without dashes and under one name each, and how the file spells them."""
    options: Options = {}
    spelled: dict[str, str] = {}
    for key, value in content.items():
        name = SIMPLETUNER.plain_name(key)
        known = options.get(name)
        if known is None:
            options[name], spelled[name] = value, key
        elif value is not None and value != known:
            raise ConfigError(
                f"'{file.name}': {spelled[name]} and {key} are the same option with two values, {shown(known)} and "
                f"{shown(value)}. Remove one of the two."
            )
    return options, spelled


def _read_lycoris(run: Import, options: Options) -> None:
    """What `lycoris_config` says, as `lycoris`; SimpleTuner's own rank and alpha then mean nothing."""
    named = run.given.get("lycoris_config", "config/lycoris_config.json")
    place = Path(resolve(ForeignPath(named), run.folders)) if isinstance(named, str) else Path()
    if not place.is_file():
        run.todo.append(f"What is trained is in '{named}', which is not here: set kind, rank and alpha in [lora].")
        return
    run.given["lycoris"] = read_config(place)
    for name in SIMPLETUNER.data["not_of_lycoris"].split():
        if name in options:
            run.lines.append(Line(name, shown(options.pop(name)), "ignored", {}, "lycoris_config says it"))


def _simpletuner_sets(run: Import, place: Path | None, masks: dict[str, str]) -> list[tuple[str, str, Options]]:
    """SimpleTuner's datasets that become ours, as name, kind and options; a line for each of the others.

    `masks` is filled with the sets of loss masks and their folders; a set that is the source of one refers to it.
    """
    content = [] if place is None else read_config(place)
    if place is not None and not is_list_of_objects(content):
        raise ConfigError(
            f"'{place.name}' is no dataloader file: it must be a list of datasets, each with its options."
        )
    used: list[tuple[str, str, Options]] = []
    sources: dict[str, str] = {}
    for i, item in enumerate(content):
        backend = {str(key).lstrip("-"): value for key, value in item.items()}
        name, kind = str(backend.get("id", i)), str(backend.get("dataset_type", "image"))
        if kind in ("text_embeds", "image_embeds", "conditioning_image_embeds"):
            line = (kind, "ignored", "only says where a cache lies")
        elif not is_off(backend.get("disabled", backend.get("disable"))):
            line = ("disabled", "ignored", "a disabled set is left out")
        elif kind == "conditioning" and backend.get("conditioning_type") in ("mask", "segmentation"):
            masks[name] = str(backend.get("instance_data_dir"))
            sources[str(backend.get("source_dataset_id"))] = name
            reason = "masks lie beside the images here, as name-masklabel.png; white counts, and the loss is normalised"
            line = (kind, "differs", reason)
        elif kind not in ("image", "eval"):
            line = (kind, "no counterpart", "only images are trained")
        elif backend.get("instance_data_dir") is None:
            reason = "only folders of this computer are read, and instance_data_dir names none"
            line = (str(backend.get("type", "local")), "no counterpart", reason)
        else:
            used.append((name, kind, backend))
            continue
        run.lines.append(Line(name, line[0], line[1], {}, line[2]))
    return [(n, k, {"conditioning_data": sources[n], **b} if n in sources else b) for n, k, b in used]


def ai_toolkit(file: Path, content: Mapping[str, Any], beside: Path | None) -> Imported:
    """ai-toolkit's YAML, which has its datasets inside."""
    if beside is not None:
        raise ConfigError(
            f"'{file.name}' is an ai-toolkit file, which has its datasets inside: leave --dataloader out."
        )
    config = content.get("config", content)
    processes = config.get("process") if isinstance(config, dict) else None
    if not processes or not is_list_of_objects(processes):
        raise ConfigError(f"'{file.name}' has no list `config.process`, where ai-toolkit expects what to do.")
    if len(processes) > 1:
        raise ConfigError(
            f"'{file.name}' has {len(processes)} processes; a job is one. Import a file with one of them."
        )
    process = {str(key): value for key, value in processes[0].items()}
    if process.get("type", "sd_trainer") not in ("sd_trainer", "ui_trainer", "diffusion_trainer"):
        raise ConfigError(
            f"'{file.name}' has a process of type {shown(process['type'])}; only sd_trainer, which trains, can be "
            "imported."
        )
    sections = {name: _section(file, name, process.pop(name, None)) for name in AI_TOOLKIT.sections if name}
    model = sections["model"]
    old_switch = next((key for key in model if key.startswith("is_") and not is_off(model[key])), "")
    arch = model.get("arch")
    found = old_switch.removeprefix("is_") if arch is None else str(arch).partition(":")[0]
    if found != "chroma":
        raise other_model(file, "architecture", found, "model.arch", 'a file with arch: "chroma"')
    if not sections["network"]:
        raise ConfigError(f"'{file.name}' has no `network`: it trains the whole model. Only LoRA jobs are imported.")
    run = Import(AI_TOOLKIT, "ai-toolkit", file)
    frame = ("job", "meta", "process")
    run.lines += [Line(key, shown(content[key]), "ignored", {}, "the file's frame") for key in content if key in frame]
    others = [key for key in content if key not in (*frame, "config", "name")]
    run.lines += [Line(key, shown(content[key]), "unknown", {}, "not an option") for key in others]
    name = config.get("name")
    if isinstance(name, str) and name.strip():
        run.job.record("config.name", shown(name), {"name": name[:NAME_LENGTH]})
    else:
        run.job.put("name", slug(file.stem), "the file's name")
    datasets = process.pop("datasets", None) or []
    if not is_list_of_objects(datasets):
        raise ConfigError(f"'{file.name}': datasets is {shown(datasets)}; it must be a list of datasets.")
    run.given = {f"{name}.{key}": value for name, part in sections.items() for key, value in stated(part).items()}
    sample = sections["sample"]
    prompts = sample.get("prompts") or sample.get("samples")
    run.given["prompts_count"] = len(prompts) if isinstance(prompts, list) else 1
    run.given["sizes"] = {size for item in datasets or [{}] for size in sizes(item.get("resolution") or 512)}
    run.walk({"": process, **sections})
    run.decay("optimizer_params.weight_decay", run.job.values.get("optimizer", ""))
    network = AI_TOOLKIT.assumed["network"] | stated(sections["network"])
    if word(network["type"]) == "lokr" and not holds("lokr_full_rank on", network):
        alpha = number(network.get("alpha", 1.0))
        run.job.record("network.linear_alpha", f"{alpha:g} (not stated)", {"lora.alpha": alpha}, over=False)
    trigger = stated({"trigger_word": process.get("trigger_word")})
    for i, item in enumerate(datasets):
        own = {str(key): value for key, value in item.items()}
        # ai-toolkit says the new word of no set of ordinary images.
        options = own if is_on(stated(own), "is_reg") else together(trigger, own)
        run.add_set(options, f"datasets.{i}.", label=f"datasets.{i}: ")
    return run.finish(file.stem, "the file's name")


def _section(file: Path, name: str, section: Any) -> Options:
    """A section's options; one that is not there or empty has none."""
    if not isinstance(section or {}, dict):
        raise ConfigError(f"'{file.name}': {name} is {shown(section)}; it must be a section with options.")
    return {str(key): value for key, value in (section or {}).items()}


def onetrainer(file: Path, content: Mapping[str, Any], beside: Path | None) -> Imported:
    """OneTrainer's configuration, with the concepts and samples in it or in the files that it names."""
    model, method = content.get("model_type"), content.get("training_method", "FINE_TUNE (not stated)")
    if model != "CHROMA_1":
        raise other_model(file, "model type", model, "model_type", "one with CHROMA_1")
    if method != "LORA":
        raise ConfigError(f"'{file.name}' has the training_method {method}. Only LORA is imported.")
    run = Import(ONETRAINER, "OneTrainer", file)
    options = {ONETRAINER.plain_name(key): value for key, value in content.items()}
    spelled = {ONETRAINER.plain_name(key): key for key in content}
    if "clip_grad_norm" in options and options["clip_grad_norm"] is None:
        options["clip_grad_norm"] = 0.0  # null is no clipping
    if options.get("transformer") is None and "prior" in options:
        options["transformer"] = options.pop("prior")  # its name in earlier versions
    if isinstance(options.get("optimizer"), str):
        options["optimizer"] = {"optimizer": options["optimizer"]}
    sections = {name: _section(file, name, options.pop(name, None)) for name in ONETRAINER.sections if name}
    for_all_sets = {name: options.pop(name) for name in ONETRAINER.for_all_sets if name in options}
    concepts = _listed(run, options, "concepts", "concept_file_name", beside)
    samples = _listed(run, options, "samples", "sample_definition_file_name", None)
    parts = {**sections, "cloud": _section(file, "cloud", options.get("cloud"))}
    run.given = {f"{name}.{key}": value for name, part in parts.items() for key, value in part.items()}
    run.walk({"": options, **sections}, spelled)
    optimizer = word(sections["optimizer"].get("optimizer") or "ADAMW")
    run.decay("optimizer.weight_decay", optimizer)
    if betas := ONETRAINER.data["betas"].get(optimizer):
        run.job.record("optimizer.beta1, beta2", "not stated", {"betas": betas}, over=False)
    _samples(run, samples)
    shared = stated(for_all_sets) | {
        "caption_dropout": number(sections["text_encoder"].get("dropout_probability") or 0)
    }
    for i, concept in enumerate(concepts):
        flat = _flat(concept)
        if is_off(flat.get("enabled", True)):
            run.lines.append(Line(f"concepts.{i}", "disabled", "ignored", {}, "a disabled concept is left out"))
            continue
        held_out = is_on(flat, "validation_concept") or flat.get("type") == "VALIDATION"
        _concept(run, shared | flat, f"concepts.{i}.", "eval" if held_out else "image")
    if not concepts:  # what every set would have
        _concept(run, shared, "", "image")
    return run.finish(file.stem.lstrip("#"), "the file's name")


def _listed(run: Import, options: Options, inside: str, named: str, given: Path | None) -> list[Options]:
    """A list that stands in the configuration or in a file of its own, a source; empty where it is not here."""
    content = options.get(inside)
    if given is not None or content is None:
        place = run.beside(options.get(named), given, inside, needed=inside == "concepts")
        content = [] if place is None else read_config(place)
    if not is_list_of_objects(content):
        raise ConfigError(f"'{run.file.name}': {inside} is {shown(content)}; it must be a list of objects.")
    return content


def _samples(run: Import, samples: Sequence[Options]) -> None:
    """OneTrainer's samples as previews."""
    found: list[Options] = []
    left: list[str] = []
    data = ONETRAINER.data
    for i, sample in enumerate(samples):
        if is_off(sample.get("enabled", True)):
            run.lines.append(Line(f"samples.{i}", "disabled", "ignored", {}, "a disabled sample is left out"))
            continue
        values = data["sample"] | stated(sample)
        if is_on(sample, "random_seed"):
            del values["seed"]
            left.append("random_seed")
        fields = {key: value for key, value in values.items() if key not in data["no_fields"].split()}
        entry, others = preview_of_object(fields, data["fields"])
        found.append({"prompt": "", **entry})
        left += others
    if found:
        run.job.record("samples", counted(len(found), "sample"), previews(found, left))


def _flat(concept: Options) -> Options:
    """A concept's options, with `image.` and `text.` before what stands in those sections."""
    flat: Options = {}
    for key, value in concept.items():
        if key in ("image", "text") and isinstance(value, dict):
            flat |= {f"{key}.{option}": each for option, each in value.items() if option != "__version"}
        else:
            flat["balancing" if key == "repeats" else key] = value
    return flat


def _concept(run: Import, options: Options, prefix: str, kind: str) -> None:
    place = options.get("path")
    folder = Path(resolve(ForeignPath(place), run.folders)) if isinstance(place, str) and place else Path("?")
    below = folder.is_dir() and any(p.suffix.lower() in image_extensions() for p in folder.glob("*/**/*"))
    run.add_set(options, prefix, kind=kind, context={"subfolders": below})


def flattened(content: Mapping[str, Any]) -> Options:
    """The options of a TOML of sd-scripts, to which its sections mean nothing."""
    found: Options = {}
    for key, value in content.items():
        inner = value if isinstance(value, dict) else {key: value}
        found |= {KOHYA.plain_name(name): each for name, each in inner.items()}
    return found


def kohya(file: Path, content: Mapping[str, Any], beside: Path | None) -> Imported:
    """A configuration of sd-scripts with its dataset file, or with the folders that it names."""
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
    run = Import(KOHYA, "kohya's sd-scripts", file)
    for_all_sets = {name: options.pop(name) for name in KOHYA.for_all_sets if name in options}
    batch = options.pop("batch_size", None)
    run.given["folders"] = run.folders
    run.walk({"": options})
    optimizer = run.job.values.get("optimizer", "")
    run.decay("optimizer_args: weight_decay", optimizer)
    asked = k_arguments(options.get("optimizer_args") or []) if optimizer == "adafactor" else {}
    if optimizer == "adafactor" and asked.get("relative_step", "true").lower() != "false":
        reason = "Adafactor makes its own rate there; here it is learning_rate"
        run.lines.append(Line("optimizer_args: relative_step", "True (not stated)", "differs", {}, reason))
    place = run.beside(options.get("dataset_config"), beside)
    found = _kohya_folders(options, for_all_sets) if place is None else _kohya_sets(run, place, for_all_sets)
    _hold_out(run, found)
    batches = []
    for prefix, each in found:
        batches.append(each.pop("batch_size", batch))
        part = run.add_set(
            each,
            prefix,
            kind="eval" if each.get("validation_split") == 1 and place else "image",
            unstated=None if "image_dir" in each or "train_data_dir" in each else {},
        )
        if part.values.get("masks") == "files":
            folder = each["conditioning_data_dir"]
            run.todo.append(f"Copy each mask from '{folder}' beside its image, as name-masklabel.png.")
    batch_sizes = [whole(1 if size is None else size) for size in batches]
    said = "batch_size" if any(size is not None for size in batches) else "batch_size (not stated)"
    values = {"batch_size": batch_sizes[0]}
    reason = f"a job has one batch size; the sets have {', '.join(map(str, batch_sizes))}"
    run.job.record(said, shown(batch_sizes[0]), near(values, reason) if len(set(batch_sizes)) > 1 else values)
    return run.finish(file.stem, "the file's name")


def _hold_out(run: Import, found: list[tuple[str, Options]]) -> None:
    """The share that the first set holds out, as the job's; those of other sets, and beside a set that is held out
    whole, stay for the table."""
    prefix, first = found[0]
    share = first.get("validation_split")
    if isinstance(share, float) and 0 < share < 1 and all(each.get("validation_split") != 1 for _, each in found):
        del first["validation_split"]
        most = option_of(TrainingConfig, "hold_out").bound("le") or 1.0
        reason = "which images, their content decides; at least 2, of 8 or more, and none of other sets"
        run.job.record(f"{prefix}validation_split", shown(share), near({"hold_out": min(share, most)}, reason))


def _kohya_folders(options: Options, for_all: Options) -> list[tuple[str, Options]]:
    """The folders that a configuration names itself, as sets; one set without a folder if it names none."""
    found = []
    for option, own in (("train_data_dir", {}), ("reg_data_dir", {"is_reg": True})):
        if options.get(option):
            found.append((f"{option}: ", {**for_all, "train_data_dir": options[option], **own}))
    return found or [("", dict(for_all))]


def _kohya_sets(run: Import, place: Path, for_all: Options) -> list[tuple[str, Options]]:
    """Every subset of a dataset file of sd-scripts, with what holds for it."""
    content = read_config(place)
    whole_file = content if isinstance(content, dict) else {}
    others = [str(key) for key in whole_file if key not in ("general", "datasets")]
    if others:
        raise ConfigError(f"'{place.name}' is no dataset file of sd-scripts: it has {', '.join(others)}.")
    if not whole_file.get("datasets") or not is_list_of_objects(whole_file["datasets"]):
        raise ConfigError(f"'{place.name}' is no dataset file of sd-scripts: it has no [[datasets]].")

    def plain(options: Mapping[str, Any]) -> Options:
        return {KOHYA.plain_name(key): value for key, value in options.items()}

    general = plain(whole_file.get("general") or {})
    found: list[tuple[str, Options]] = []
    for i, dataset in enumerate(whole_file["datasets"]):
        shared = plain(dataset)
        subsets = shared.pop("subsets", None)
        if not isinstance(subsets, list) or not subsets:
            raise ConfigError(f"'{place.name}': dataset {i} has no [[datasets.subsets]].")
        own = [plain(subset) for subset in subsets]
        run.overridden(f"datasets.{i}.", shared, own, {})
        found += [(f"datasets.{i}.subsets.{j}.", {**shared, **each}) for j, each in enumerate(own)]
    run.overridden("general.", general, [each for _, each in found], {})
    run.overridden("", for_all, [{**general, **each} for _, each in found], {})
    return [(prefix, {**for_all, **general, **each}) for prefix, each in found]
