"""What a job trains, an adapter beside the layers or layers of the model itself, and what a finished file says of it.

`Trained` is how the rest of a run sees it: parameters, a file in every checkpoint, and files at the end.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol, TypedDict

import torch
from torch import nn

from ...errors import ChromaKitError, ConfigError, JobError, ModelFileError
from ...files import file_stem, free_name, only_names, require_room, write_atomic
from ...fullrank.export import TrainedModel, write_folder, write_single_file
from ...fullrank.layers import count_trained, layer_names, put_masters
from ...loading.load import Device, transformer_identity, transformer_outline, transformer_source
from ...lora.adapters import adapters_disabled, without_adapters
from ...lora.convert import JOB_KEY
from ...lora.files import read_lora, write_lora
from ...lora.modules import LoraFile, quoted
from ...lora.settings import named_target, target_modules
from ...lora.trainable import CastFactors, add_trainable, load_trained, start_from, trained_lora
from ...model.precision import precision
from ...model.transformer import ChromaTransformer
from ...names.transformer import selects
from ...options import identity
from ...weights.opening import open_weights
from ...weights.safetensors_files import write_safetensors
from ..config import TrainingConfig
from ..control import Loan
from .metrics import JobPaths, Progress

BASE_KEY = "chromakit.base_sha256"

HIGH_RATE = 5e-5
"""Full-rank training above this rate is warned about: a LoRA's usual rate is ten times too high for the weights."""


class WrittenFiles(TypedDict, total=False):
    """Where the files are that a job ended with, and what is to be said of them: fields of its status."""

    message: str
    lora_path: str
    model_path: str
    model_folder: str


class Trained(Protocol):
    """An adapter, or layers of the model itself (see `trained`).

    noun: what it is called to the user. weights_file: its name in a checkpoint. parameters: fp32, in an order that is
    the same in every run. factors: on the learning rate of each of them.
    """

    noun: str
    weights_file: str
    parameters: list[nn.Parameter]
    factors: list[float]

    def save(self, path: Path) -> None:
        """Write the parameters, in fp32."""
        ...

    def load(self, path: Path) -> None:
        """Take them from such a file, bit for bit. Raises LoraError or ModelFileError for a damaged one."""
        ...

    def remember(self) -> Callable[[], None]:
        """A way back to the parameters of now, or to those before the first step, for when `load` fails midway."""
        ...

    def base(self, step: int) -> AbstractContextManager[None] | None:
        """The model without what was trained until `step`, inside a `with` block; None where it is not to be had."""
        ...

    def casting(self, dtype: torch.dtype) -> AbstractContextManager[None]:
        """Inside this block come a forward pass and its backward pass: what is trained may lie ready in `dtype`."""
        return nullcontext()

    def record(self) -> dict[str, Any]:
        """What previews note about it, as JSON values."""
        ...

    def keep(self, header: Callable[..., dict[str, str]], path: Path) -> bool:
        """Write to `path` what the job would end with now; False where that is too large to be kept at every preview.

        header: as in `write`.
        """
        return False

    def write(self, header: Callable[..., dict[str, str]], suffix: str = "") -> WrittenFiles:
        """Write what the user gets, its name ending in `suffix`; the status fields that say where.

        Args:
            header: `header(architecture, trained)` gives the files' metadata (see `file_metadata`).
        """
        ...


def check_trained(config: TrainingConfig, paths: JobPaths) -> list[str]:
    """Look at what will be trained before anything is read or cached; returns warnings.

    Raises ConfigError when there is nothing to learn or for a target that is not in the model, ModelFileError for a
    base that is quantised in its file, JobError when the disk has no room for what the job writes.
    """
    if all(dataset.regularisation for dataset in (config.dataset, *config.more_datasets)):
        raise ConfigError(
            "Every dataset of this job is a regularisation set: it would be trained to change nothing. Add a set of "
            "what is to be learnt, or set regularisation = false."
        )
    if config.lr_pattern:
        _check_rates(config)
    if config.full is None:
        return []
    outline = transformer_outline(config.model)
    model = _export_of(config)
    count = count_trained(outline, config.full.target, config.full.norms)
    _require_room_for_all(config, paths, count, model.bytes() * len(config.full.layouts))
    warnings = []
    if config.learning_rate > HIGH_RATE and config.optimizer != "prodigy":
        warnings.append(
            f"The learning rate is {config.learning_rate:g}, a usual one for a LoRA. The weights themselves take 1e-6 "
            "to 1e-5; a higher rate soon unlearns what the model knew."
        )
    return warnings


def _check_rates(config: TrainingConfig) -> None:
    """Raise ConfigError for a pattern of `lr_pattern` that selects nothing of what is trained."""
    outline, full = transformer_outline(config.model), config.full
    names = layer_names(outline, full.target, full.norms) if full else target_modules(outline, config.lora.target)
    lost = [pattern for pattern in config.lr_pattern if not any(selects(pattern, name) for name in names)]
    if lost:
        raise ConfigError(
            f"The lr_pattern {quoted(lost)} selects none of the {len(names)} layers that are trained, such as "
            f"'{names[0]}'. Name blocks or layers of the target, e.g. single_blocks.* or *.attn.to_q."
        )


def _rate_factors(config: TrainingConfig, transformer: nn.Module, parameters: Sequence[nn.Parameter]) -> list[float]:
    """The factor on the learning rate of each parameter, by the layer that it belongs to."""
    if not config.lr_pattern:
        return [1.0] * len(parameters)
    names = {id(p): name.partition(".branches.")[0] for name, p in transformer.named_parameters()}
    layers = [names[id(p)].removesuffix(".weight").removesuffix(".bias") for p in parameters]
    patterns = config.lr_pattern.items()
    return [next((factor for pattern, factor in patterns if selects(pattern, layer)), 1.0) for layer in layers]


def make_trained(
    config: TrainingConfig, transformer: ChromaTransformer, paths: JobPaths, base_sha256: str
) -> AdapterTraining | FullRankTraining:
    """Put on the transformer, which is frozen otherwise, what the job trains."""
    if config.full is None:
        return AdapterTraining(config, transformer, paths)
    return FullRankTraining(config, transformer, paths, base_sha256)


def loan_of(config: TrainingConfig, transformer: ChromaTransformer, device: Device) -> Loan | None:
    """The base for prompts that want just that: its weights must stay as they are, and lie on the device."""
    if config.full is not None:
        return None

    @contextmanager
    def plain() -> Iterator[ChromaTransformer]:
        with without_adapters(transformer):
            yield transformer

    key = transformer_identity(config.model)
    return None if key is None else Loan((key, torch.device(device)), plain)


class AdapterTraining(Trained):
    """A LoRA (or its kin): the model's own weights stay as they are."""

    noun, weights_file = "LoRA", "lora.safetensors"

    def __init__(self, config: TrainingConfig, transformer: ChromaTransformer, paths: JobPaths):
        self._config, self._transformer, self._paths = config, transformer, paths
        self.parameters = add_trainable(transformer, config.lora, config.seed)
        self.factors = _rate_factors(config, transformer, self.parameters)
        if config.lora.start_from:
            start_from(transformer, read_lora(config.lora.start_from))
        self.casting = CastFactors(transformer).to

    def save(self, path: Path) -> None:
        write_lora(path, trained_lora(self._transformer))

    def load(self, path: Path) -> None:
        load_trained(self._transformer, read_lora(path))

    def remember(self) -> Callable[[], None]:
        return partial(load_trained, self._transformer, trained_lora(self._transformer))

    def base(self, step: int) -> AbstractContextManager[None]:
        return adapters_disabled(self._transformer)

    def record(self) -> dict[str, Any]:
        return {"lora": self._config.lora.model_dump(mode="json")}

    def keep(self, header: Callable[..., dict[str, str]], path: Path) -> bool:
        write_lora(path, self._finished(header))
        return True

    def write(self, header: Callable[..., dict[str, str]], suffix: str = "") -> WrittenFiles:
        path = write_final(self._config, self._finished(header), self._paths.job, self._paths.loras, suffix)
        return {"lora_path": str(path)}

    def _finished(self, header: Callable[..., dict[str, str]]) -> LoraFile:
        return finished_lora(self._config, self._transformer, header("chroma/lora", adapter_summary(self._config)))


class FullRankTraining(Trained):
    """Layers of blocks, in fp32 in the places of the model's own; the job ends with a whole model."""

    noun, weights_file = "model", "weights.safetensors"

    def __init__(self, config: TrainingConfig, transformer: ChromaTransformer, paths: JobPaths, base_sha256: str):
        assert config.full is not None
        self._config, self._full, self._paths, self._base_sha256 = config, config.full, paths, base_sha256
        self._model = _export_of(config)
        self._names = layer_names(transformer, self._full.target, self._full.norms)
        read = partial(self._model.read_base, dtype=torch.float32)
        self._named = put_masters(transformer, self._names, read)
        self.parameters: list[nn.Parameter] = list(self._named.values())
        self.factors = _rate_factors(config, transformer, self.parameters)

    def save(self, path: Path) -> None:
        write_safetensors(path, self._named.items(), self._named.items(), {BASE_KEY: self._base_sha256})

    def load(self, path: Path) -> None:
        weights = open_weights(path)
        if weights.metadata.get(BASE_KEY) != self._base_sha256:
            raise ConfigError(
                "The base model's file is not the one that this job was started with, and what is not trained comes "
                "from it. Put that file back, or start the job anew (restart)."
            )
        shapes = {name: tuple(parameter.shape) for name, parameter in self._named.items()}
        if dict(weights.shapes) != shapes:
            raise ModelFileError(f"'{path}' does not hold the {len(shapes)} tensors that this job trains.")
        with torch.no_grad():
            for name, parameter in self._named.items():
                parameter.copy_(weights.read(name, torch.float32))

    def remember(self) -> Callable[[], None]:
        return self._start_anew  # from the base's file: a copy would cost as much memory again as is trained

    def _start_anew(self) -> None:
        with torch.no_grad():
            for name, parameter in self._named.items():
                parameter.copy_(self._model.read_base(name, torch.float32))

    def base(self, step: int) -> AbstractContextManager[None] | None:
        return nullcontext() if step == 0 else None

    def record(self) -> dict[str, Any]:
        return {"full": self._full.model_dump(mode="json")}

    def write(self, header: Callable[..., dict[str, str]], suffix: str = "") -> WrittenFiles:
        full, config = self._full, self._config
        # The files' own names: the parameters are looked up now, since an average may stand in their place.
        model = TrainedModel(self._model.weights, self._model.component, self._named, precision(full.save_dtype).dtype)
        trained = {"kind": "full", "target": full.target, "layers": len(self._names), "norms": full.norms}
        metadata = header("chroma", trained)
        file, folder = _free_paths(self._paths, config, suffix)
        _require_room(self._paths.models, model.bytes() * len(full.layouts), "the trained model")
        written: WrittenFiles = {}
        if "original" in full.layouts:
            write_single_file(file, model, {**metadata, "modelspec.implementation": "comfyui"})
            written["model_path"] = str(file)
        if "diffusers" in full.layouts:
            write_folder(folder, model, metadata)
            written["model_folder"] = str(folder)
        return written


def _export_of(config: TrainingConfig) -> TrainedModel:
    """The base's files, with nothing trained yet."""
    weights, component = transformer_source(config.model)
    return TrainedModel(weights, component, {}, torch.float32)


def _require_room_for_all(config: TrainingConfig, paths: JobPaths, count: int, model_bytes: int) -> None:
    """Room for what the job will write: `count` trained weights in every checkpoint, and the model at the end."""
    averaged = config.ema_decay > 0
    # Those that are kept and the one being written; a short job makes fewer.
    kept = config.keep_checkpoints + config.keep_best + 1
    made = 2 + (config.steps // config.checkpoint_every if config.checkpoint_every else 0)
    # fp32 weights, two moments and the average, less what an earlier run of the job left there already.
    checkpoints = min(kept, made) * count * (16 if averaged else 12)
    checkpoints -= sum(p.stat().st_size for p in paths.checkpoints.rglob("*") if p.is_file())
    models = model_bytes * (2 if averaged else 1)
    paths.models.mkdir(parents=True, exist_ok=True)
    if paths.models.stat().st_dev == paths.job.stat().st_dev:
        _require_room(paths.job, max(0, checkpoints) + models, "the checkpoints and the trained model")
    else:
        _require_room(paths.job, max(0, checkpoints), "the checkpoints")
        _require_room(paths.models, models, "the trained model")


def _require_room(folder: Path, needed: int, what: str) -> None:
    remedy = "Make room and resume the job (checkpoints are kept), or write one layout only (layouts)."
    require_room(folder, needed, what, JobError, remedy)


def _free_paths(paths: JobPaths, config: TrainingConfig, suffix: str) -> tuple[Path, Path]:
    """File and folder under one name: the job's, with -2, -3 … when another job's model has it already."""

    def of(name: str) -> tuple[Path, Path]:
        return paths.models / f"{name}.safetensors", paths.diffusers / name / "transformer"

    job = paths.job.name
    return of(free_name(file_stem(config.name) + suffix, lambda name: all(may_write(path, job) for path in of(name))))


def adapter_summary(config: TrainingConfig) -> dict[str, Any]:
    """What a header says of the adapter."""
    lora = config.lora
    return {"kind": lora.kind, "rank": lora.rank, "alpha": lora.alpha or lora.rank, "target": lora.target}


def file_metadata(
    config: TrainingConfig,
    progress: Progress,
    base_sha256: str,
    images: int,
    architecture: str,
    trained: dict[str, Any],
    job_id: str | None = None,
    changes: Sequence[Mapping[str, Any]] = (),
) -> dict[str, str]:
    """The header of a finished file: the public modelspec fields and our own, all strings.

    Args:
        architecture: modelspec's word for what it is.
        trained: what was trained, as JSON values.
        job_id: the name of the job's folder; None: that of a job with these options from its start.
        changes: options that were changed on the way, see `changes.entry`.
    """
    summary = {
        "steps": progress.step,
        "batch": config.effective_batch,
        "pictures": images,
        "learning_rate": config.learning_rate,
        **trained,
        "seed": config.seed,
        "objective": identity(config.objective, config.objective.model_dump(mode="json")),
        "heldout_loss_base": progress.heldout_loss_base,
        "heldout_loss": progress.heldout_loss,
        "loss_smooth": progress.loss_smooth,
    }
    if config.preserve.weights:
        summary["preserve"] = config.preserve.model_dump(mode="json")
    metadata = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture,
        "modelspec.implementation": "diffusers",
        "modelspec.title": config.name,
        "modelspec.description": f"{_what(config)}, trained with ChromaKit: "
        f"{progress.step} steps of {config.effective_batch} on {images} images.",
        "modelspec.resolution": "x".join(map(str, config.preview_size())),
        "modelspec.prediction_type": "v",
        "modelspec.trigger_phrase": config.dataset.trigger,
        JOB_KEY: job_id or config.job_id(),
        "chromakit.base_sha256": base_sha256,
        "chromakit.flavour": config.model.flavour,
        "chromakit.base_file": config.model.own_file,
        "chromakit.recipe": json.dumps(config.recipe_value().to_dict()),
        "chromakit.trigger": config.dataset.trigger,
        "chromakit.preview": _first_preview(config),
        "chromakit.training": json.dumps(summary),
        "chromakit.changes": json.dumps(only_names(changes)) if changes else "",
        "chromakit.versions": json.dumps(library_versions()),
    }
    return {key: value for key, value in metadata.items() if value}


def _what(config: TrainingConfig) -> str:
    chroma = f"Chroma 1 ({config.model.flavour})"
    return f"A {config.lora.kind} for {chroma}" if config.full is None else f"{chroma} with some of its layers"


def _first_preview(config: TrainingConfig) -> str:
    """The first preview as JSON, for whoever wants to repeat it (see `comfy.stock`); empty without any."""
    for preview in config.preview_list():
        values = {"prompt": preview.prompt, "negative": preview.negative}
        values |= {"width": preview.width, "height": preview.height, "precision": config.model.precision}
        return json.dumps({**values, "settings": preview.settings.to_dict()})
    return ""


def library_versions() -> dict[str, str]:
    """Versions of the libraries that computed the weights."""
    found = {}
    for name in ("torch", "diffusers", "peft", "transformers", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    project = Path(__file__).resolve().parents[3] / "pyproject.toml"
    with suppress(OSError):
        stated = re.search(r'^version = "([^"]+)"', project.read_text(encoding="utf-8"), re.MULTILINE)
        if stated:
            found["chromakit"] = stated[1]
    return found


def contents(lora: LoraFile) -> dict[str, str]:
    """What the header says of the weights themselves: ranks, alphas, and the layers as a target name or a list."""
    return {
        "chromakit.ranks": json.dumps(lora.ranks),
        "chromakit.alphas": json.dumps(lora.alphas),
        "chromakit.targets": json.dumps(named_target(list(lora.modules)) or list(lora.modules)),
    }


def final_path(loras_folder: Path, config: TrainingConfig, suffix: str = "", job_id: str | None = None) -> Path:
    """Where the LoRA goes: the job's name and `suffix`, with -2, -3 … when another job's file has it already."""
    job = job_id or config.job_id()
    name = free_name(
        file_stem(config.name) + suffix, lambda found: may_write(loras_folder / f"{found}.safetensors", job)
    )
    return loras_folder / f"{name}.safetensors"


def may_write(path: Path, job_id: str) -> bool:
    """Whether nothing is at `path`, or a LoRA or model (file or folder) that this very job wrote."""
    if not path.exists():
        return True
    try:
        return open_weights(path).metadata.get(JOB_KEY) == job_id
    except ChromaKitError:
        return False


def finished_lora(config: TrainingConfig, transformer: ChromaTransformer, metadata: dict[str, Any]) -> LoraFile:
    """The adapter on the transformer in the precision in which the job writes it, with its whole header."""
    trained = trained_lora(transformer)
    dtype = precision(config.lora.save_dtype).dtype
    modules = {name: module.to(dtype) for name, module in trained.modules.items()}
    return LoraFile(modules, {**metadata, **contents(trained)}, trained.key_format)


def write_final(config: TrainingConfig, lora: LoraFile, job_folder: Path, loras_folder: Path, suffix: str = "") -> Path:
    """Write the LoRA into the job's folder and `loras_folder`, its name ending in `suffix`; returns the latter path."""
    path = final_path(loras_folder, config, suffix, lora.metadata.get(JOB_KEY))
    copy = job_folder / f"{file_stem(config.name)}{suffix}.safetensors"
    write_lora(copy, lora)
    write_atomic(path, copy.read_bytes())
    return path
