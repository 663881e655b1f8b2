"""The only door to ComfyUI: its folders, devices, memory, progress, queue and messages.

What is called from the training thread says so; everything else belongs to the thread that runs prompts, because the
host's functions check and clear the interrupt flag of the running prompt.
"""

from __future__ import annotations

from .folders import (
    LORAS,
    PACK,
    dataset_folder,
    dataset_name,
    dataset_names,
    file_state,
    folder_state,
    jobs_folder,
    load_tensors,
    lora_names,
    lora_path,
    loras_folder,
    models_folder,
    path_state,
    pictures_folder,
    settings_file,
)
from .memory import (
    before_prompt,
    components,
    device,
    here,
    make_room,
    memory_report,
    room_for_job,
    share_device_with,
    stay_known,
)
from .messages import Downloads, Interrupted, Progress, broadcast, log, say, server_routes, wants_previews, warn
from .model_files import (
    model_file,
    model_file_name,
    model_file_names,
    model_folder,
    model_folders,
    quantised_folder,
    t5_tokenizer,
)
from .models import as_host_model, host_vae
from .prompts import PromptState, cancel_prompt, prompt_state, queue_prompt, refuse_prompts
from .queue import busy, computing, held_prompts, waiting, wake_prompts, watch_prompts, working

__all__ = [
    "LORAS",
    "PACK",
    "Downloads",
    "Interrupted",
    "Progress",
    "PromptState",
    "as_host_model",
    "before_prompt",
    "broadcast",
    "busy",
    "cancel_prompt",
    "components",
    "computing",
    "dataset_folder",
    "dataset_name",
    "dataset_names",
    "device",
    "here",
    "file_state",
    "folder_state",
    "held_prompts",
    "host_vae",
    "jobs_folder",
    "load_tensors",
    "log",
    "lora_names",
    "lora_path",
    "loras_folder",
    "make_room",
    "memory_report",
    "model_file",
    "model_file_name",
    "model_file_names",
    "model_folder",
    "model_folders",
    "models_folder",
    "path_state",
    "pictures_folder",
    "prompt_state",
    "quantised_folder",
    "queue_prompt",
    "refuse_prompts",
    "room_for_job",
    "say",
    "server_routes",
    "settings_file",
    "share_device_with",
    "stay_known",
    "t5_tokenizer",
    "waiting",
    "wake_prompts",
    "wants_previews",
    "warn",
    "watch_prompts",
    "working",
]
