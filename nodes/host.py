"""The only door to ComfyUI: its folders, devices, memory, progress, queue and messages.

What is called from the training thread says so; everything else belongs to the thread that runs prompts, because the
host's functions check and clear the interrupt flag of the running prompt.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

import comfy.ldm.modules.diffusionmodules.model as ldm
import comfy.model_base
import comfy.model_management as management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import comfy.utils
import folder_paths
import torch
from comfy.cli_args import args
from comfy.patcher_extension import WrappersMP
from comfy_execution.utils import get_executing_context
from PIL import Image
from server import PromptServer

from ..chroma_core.data.picture_files import PICTURE_EXTENSIONS
from ..chroma_core.errors import DataError, LoraError, ModelFileError
from ..chroma_core.loading.cache import ComponentCache
from ..chroma_core.loading.components import load_vae
from ..chroma_core.loading.spec import ModelSpec

PACK = Path(__file__).resolve().parent.parent
LORAS = "loras"
Interrupted = management.InterruptProcessingException

log = logging.getLogger("chromakit")

# --- devices and memory -----------------------------------------------------------------------------------------------


def device() -> torch.device:
    """Where models run."""
    return management.get_torch_device()


def free_host_models() -> None:
    """Ask the host to unload its own models before ours are loaded (prompt thread)."""
    if device().type != "cpu":
        management.unload_all_models()


def free_models_soon() -> None:
    """The same from the training thread: the host's own worker unloads when it gets to it; our cache at once."""
    if device().type != "cpu":
        components.clear()
        PromptServer.instance.prompt_queue.set_flag("unload_models", True)


components = ComponentCache(make_room=free_host_models)
"""What nodes keep loaded between prompts. Jobs load their own."""

# --- folders ----------------------------------------------------------------------------------------------------------


def jobs_folder() -> Path:
    """Where training jobs are kept."""
    return Path(folder_paths.get_output_directory()) / "chromakit" / "jobs"


def loras_folder() -> Path:
    """Where trained LoRAs go; the host searches it for LoRAs."""
    return Path(folder_paths.get_output_directory()) / LORAS


def lora_names() -> list[str]:
    """LoRA files in the host's LoRA folders, as its own loaders list them."""
    return folder_paths.get_filename_list(LORAS)


def lora_path(name: str) -> Path:
    """The file behind a name from `lora_names`; raises LoraError that says what to do."""
    found = folder_paths.get_full_path(LORAS, name) if name else None
    if found is None:
        known = lora_names()
        listed = (
            f"It knows {', '.join(known[:8])}{' and more' if len(known) > 8 else ''}."
            if known
            else "There is none yet."
        )
        raise LoraError(
            f"There is no LoRA file '{name}' in the host's LoRA folders. {listed} Choose one from the list (press R to "
            f"refresh it), or put the file into '{loras_folder()}'."
        )
    return Path(found)


def file_state(path: Path) -> str:
    """A text that changes when the file does."""
    try:
        found = path.stat()
    except OSError:
        return "missing"
    return f"{found.st_size}-{found.st_mtime_ns}"


def model_folders() -> list[str]:
    """Names of models in diffusers layout in the host's `models/diffusers` folders."""
    found = [
        entry.name
        for root in folder_paths.get_folder_paths("diffusers")
        if os.path.isdir(root)
        for entry in os.scandir(root)
        if os.path.isfile(os.path.join(entry.path, "model_index.json"))
    ]
    return sorted(set(found))


def model_folder(name: str) -> str:
    """The folder behind a name from `model_folders`; raises ModelFileError."""
    if name in model_folders():
        for root in folder_paths.get_folder_paths("diffusers"):
            if os.path.isfile(os.path.join(root, name, "model_index.json")):
                return os.path.join(root, name)
    raise ModelFileError(
        f"There is no model '{name}' in models/diffusers. A model folder holds model_index.json and the sub-folders "
        "transformer, text_encoder, tokenizer and vae."
    )


def _dataset_roots() -> list[Path]:
    """Where data sets may lie, in order of search: the host's input, the pack's examples, the owner's list."""
    roots = [Path(folder_paths.get_input_directory()), PACK / "example_datasets"]
    config = Path(folder_paths.get_user_directory()) / "chromakit" / "config.toml"
    if config.is_file():
        try:
            roots += map(Path, tomllib.loads(config.read_text(encoding="utf-8")).get("dataset_roots", []))
        except (OSError, TypeError, ValueError) as error:
            raise DataError(
                f"'{config}' cannot be read: {error}. Expected: dataset_roots = [\"/my/pictures\"]."
            ) from error
    return [root.resolve() for root in roots]


def dataset_names() -> list[str]:
    """Folders that directly hold pictures, one or two levels below a data-set root, named relative to it.

    The host asks for them whenever it lists nodes, so what cannot be read is left out here and explained when used.
    """
    names: dict[str, None] = {}
    try:
        for root in _dataset_roots():
            for path in sorted([*root.glob("*/"), *root.glob("*/*/")]):
                name = path.relative_to(root).as_posix()
                if not name.startswith(".") and _holds_pictures(path):
                    names[name] = None
    except (DataError, OSError) as error:
        log.warning("ChromaKit: not every data set can be listed: %s", error)
    return list(names)


def _holds_pictures(folder: Path) -> bool:
    if not os.access(folder, os.R_OK | os.X_OK):
        return False
    with os.scandir(folder) as entries:
        return any(os.path.splitext(entry.name)[1].lower() in PICTURE_EXTENSIONS for entry in entries)


def dataset_folder(name: str) -> Path:
    """The folder behind a data-set name; never one outside the roots. Raises DataError."""
    roots = _dataset_roots()
    for root in roots:
        folder = (root / name.strip()).resolve()
        if name.strip() and folder != root and folder.is_relative_to(root) and folder.is_dir():
            return folder
    raise DataError(
        f"There is no data set folder '{name}'. It must lie in one of: {', '.join(map(str, roots))}. Put a folder with "
        "pictures and .txt captions into the host's input folder, or list further places as dataset_roots in "
        "user/chromakit/config.toml."
    )


def folder_state(folder: Path) -> str:
    """A text that changes when a file in the folder is added, removed or edited."""
    entries = sorted(
        (path.relative_to(folder).as_posix(), file_state(path)) for path in folder.rglob("*") if path.is_file()
    )
    return hashlib.sha256(repr(entries).encode()).hexdigest()


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, as the host's own LoRA nodes pass them on."""
    return comfy.utils.load_torch_file(str(path), safe_load=True)


# --- progress and messages --------------------------------------------------------------------------------------------


class Progress:
    """The running node's progress bar. `step` also honours Cancel: it raises `Interrupted` (prompt thread)."""

    def __init__(self, total: int):
        self._bar = comfy.utils.ProgressBar(total)

    def step(self, done: int, total: int, preview: Image.Image | None = None) -> None:
        """Show `done` of `total`, with a preview picture if there is one."""
        management.throw_exception_if_processing_interrupted()
        picture = ("JPEG", preview, args.preview_size) if preview is not None else None
        self._bar.update_absolute(done, total, picture)


def wants_previews() -> bool:
    """Whether the running prompt's owner has not switched live previews off.

    The host's default is "none" for its own samplers because a preview costs it an extra decoder; ours is a matrix
    product, so only an explicit "none" switches it off.
    """
    running, _ = PromptServer.instance.prompt_queue.get_current_queue_volatile()
    return all(item[3].get("preview_method") != "none" for item in running)


def say(message: str) -> None:
    """Show a line of text on the running node, and in the log."""
    context = get_executing_context()
    log.info("ChromaKit: %s", message)
    if message and context is not None:
        PromptServer.instance.send_progress_text(message, context.node_id)


def broadcast(event: str, data: dict[str, Any]) -> None:
    """Send a message to every open page; safe from any thread."""
    PromptServer.instance.send_sync(event, data)


def server_routes() -> Any:
    """The host's route table."""
    return PromptServer.instance.routes


# --- the queue --------------------------------------------------------------------------------------------------------

_lock = threading.Lock()
_waiting: set[str] = set()
_working = 0


def busy() -> bool:
    """Whether a prompt wants the machine (any thread). One that only waits for a job does not."""
    running, pending = PromptServer.instance.prompt_queue.get_current_queue_volatile()
    with _lock:
        if running:
            return _working > 0 or any(item[1] not in _waiting for item in running)
        return bool(pending)


@contextmanager
def waiting() -> Iterator[None]:
    """While a node waits for a job, its prompt does not hold the job up."""
    context = get_executing_context()
    prompt_id = context.prompt_id if context else ""
    with _lock:
        _waiting.add(prompt_id)
    try:
        yield
    finally:
        with _lock:
            _waiting.discard(prompt_id)


@contextmanager
def working() -> Iterator[None]:
    """While a node computes, jobs yield, even if another node of its prompt waits for one."""
    global _working
    with _lock:
        _working += 1
    try:
        yield
    finally:
        with _lock:
            _working -= 1


# --- models of the host's own classes ---------------------------------------------------------------------------------


def host_vae(spec: ModelSpec) -> comfy.sd.VAE:
    """The model's VAE as the host's own class, so that its VAE Encode, Decode and tiled nodes work on it.

    The host's detection knows the published widths only; any other configuration is spelled out for it.
    """
    source = load_vae(spec, "cpu")
    config, state = source.config, dict(source.state_dict())
    widths, groups = config.block_out_channels, config.norm_num_groups
    if len(widths) != 4 or any(width % widths[0] for width in widths) or not config.mid_block_add_attention:
        raise ModelFileError(
            f"The VAE has the block widths {list(widths)}; the host's VAE class takes four, each a multiple of the "
            "first, and attention in the middle block."
        )
    if (widths[0], config.layers_per_block, groups) == (128, 2, 32):
        return comfy.sd.VAE(sd=state)
    channels = config.latent_channels
    for name, size in (("quant_conv", 2 * channels), ("post_quant_conv", channels)):
        state.setdefault(f"{name}.weight", torch.eye(size)[:, :, None, None])
        state.setdefault(f"{name}.bias", torch.zeros(size))
    ddconfig = {
        "double_z": True, "z_channels": channels, "resolution": 256, "in_channels": 3, "out_ch": 3, "dropout": 0.0,
        "ch": widths[0], "ch_mult": [width // widths[0] for width in widths],
        "num_res_blocks": config.layers_per_block, "attn_resolutions": [],
    }  # fmt: skip
    with _group_norms(groups):
        vae = comfy.sd.VAE(sd=state, config={"params": {"ddconfig": ddconfig, "embed_dim": channels}})
    vae.latent_channels = channels
    return vae


@contextmanager
def _group_norms(groups: int) -> Iterator[None]:
    """Build the host's VAE modules with `groups` groups a norm, which their constructors take no argument for."""
    stock = ldm.ops

    class Operations(stock):
        class GroupNorm(stock.GroupNorm):
            def __init__(self, num_groups: int, num_channels: int, **options: Any):
                super().__init__(groups, num_channels, **options)

    ldm.ops = Operations
    try:
        yield
    finally:
        ldm.ops = stock


class _ChromaPatcher(comfy.model_patcher.ModelPatcher):
    """A patcher over a network that holds no weights: what the host would silently not patch is an error."""

    def add_patches(self, *_: Any, **__: Any) -> Any:
        raise LoraError(
            "The host's LoRA loader cannot reach the weights of a model that came through Chroma Host Model. Put "
            "Chroma Apply LoRA before Chroma Host Model instead."
        )


def as_host_model(module: torch.nn.Module, opened: Callable[[], AbstractContextManager]) -> Any:
    """A MODEL whose forward pass is `module`, kept open by `opened()` for the whole of a sampling run.

    Latents, schedules and conditioning are the host's own Chroma's; building its network is switched off, because that
    one has published sizes only.
    """
    config = comfy.supported_models.Chroma(
        {"image_model": "chroma", "disable_unet_model_creation": True, "in_channels": 16, "out_channels": 16}
    )
    model = comfy.model_base.Chroma(config, device=torch.device("cpu"))
    model.diffusion_model = module

    def sample_opened(executor: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        with opened():
            return executor(*arguments, **named)

    patcher = _ChromaPatcher(model, device(), management.unet_offload_device())
    patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "chromakit", sample_opened)
    return patcher
