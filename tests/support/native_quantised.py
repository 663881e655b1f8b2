"""Quantised checkpoints as ComfyUI reads and saves them: its own Chroma with its own quantised layers."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import forked


def through_comfyui(
    files: Mapping[str, Path],
    folder: Path,
    config: Mapping[str, Any],
    text_encoder: Mapping[str, Tensor],
    vae: Mapping[str, Tensor],
) -> dict[str, tuple[Path, dict[str, Tensor]]]:
    """Load each transformer's file with ComfyUI and save it, with two other parts, as its CheckpointSave does.

    Returns the saved files, and every weight of the transformers as ComfyUI dequantises them in fp32. The parts' names
    are those of T5's and the VAE's own modules there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    listed = {name: str(file) for name, file in files.items()}
    (folder / "job.json").write_text(json.dumps({"config": dict(config), "files": listed}))
    for name, part in (("text_encoder", text_encoder), ("vae", vae)):
        save_file({key: tensor.contiguous().clone() for key, tensor in part.items()}, folder / f"{name}.safetensors")
    done = forked.run(forked.NATIVE, __file__, folder)
    assert done.returncode == 0, done.stderr
    assert not done.stdout, done.stdout
    return {name: (_saved(folder, name), load_file(_dequantised(folder, name))) for name in files}


def _saved(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"


def _dequantised(folder: Path, name: str) -> Path:
    return folder / f"{name} dequantised.safetensors"


def _main(folder: Path) -> None:
    import native_lora_check

    native_lora_check.import_host()
    import comfy.ops
    import comfy.sd
    import comfy.utils

    job = json.loads((folder / "job.json").read_text())
    t5, vae = (load_file(folder / f"{name}.safetensors") for name in ("text_encoder", "vae"))
    operations = comfy.ops.mixed_precision_ops({}, compute_dtype=torch.float32, full_precision_mm=True)
    for name, file in job["files"].items():
        patcher = native_lora_check.build_native(job["config"], operations=operations)
        held, metadata = comfy.utils.load_torch_file(file, return_metadata=True)
        held, _ = comfy.utils.convert_old_quants(held, "", metadata)
        held = patcher.model.model_config.process_unet_state_dict(held)
        network = patcher.model.diffusion_model
        missing, unexpected = network.load_state_dict(held, strict=False)
        if missing or unexpected:
            print(name, "missing", missing, "unexpected", unexpected)
        weights: dict[str, Tensor] = {}
        for key, tensor in network.named_parameters():
            plain = tensor.dequantize() if isinstance(tensor, comfy.ops.QuantizedTensor) else tensor
            weights[key] = plain.detach().float().contiguous()
        save_file(weights, _dequantised(folder, name))
        clip = SimpleNamespace(
            load_model=lambda patcher=patcher: patcher,
            state_dict_for_saving=lambda: {f"t5xxl.transformer.{key}": tensor for key, tensor in t5.items()},
        )
        comfy.sd.save_checkpoint(str(_saved(folder, name)), patcher, clip, SimpleNamespace(get_sd=lambda: dict(vae)))


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
