"""ComfyUI's own Chroma for tests. The host is imported in a process of its own: it reads the command line, patches
libraries and owns top-level names (`nodes`, `utils`) that a test session must not inherit.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import forked

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def check(lora: Path, folder: Path | None = None, config: dict[str, Any] | None = None) -> dict[str, Any]:
    """What `scripts/native_lora_check.py` says of a LoRA file: {"matched", "total", "unmatched"}.

    Against a native Chroma of the given diffusers configuration (written to `folder`, a scratch folder), of the model
    in `folder`, or without both, of Chroma 1's.
    """
    if folder is not None and config is not None:
        (folder / "transformer").mkdir(parents=True, exist_ok=True)
        (folder / "transformer" / "config.json").write_text(json.dumps(config))
    where = [] if folder is None else ["--model-folder", str(folder)]
    done = forked.run(forked.NATIVE, SCRIPTS / "native_lora_check.py", lora, *where)
    assert done.stdout.startswith("{"), done.stderr
    result = json.loads(done.stdout)
    assert done.returncode == (1 if result["unmatched"] else 0)
    return result


def match(lora: Path, folder: Path | None = None, config: dict[str, Any] | None = None) -> tuple[int, int]:
    """(layers that the host patches, layers in the file)."""
    result = check(lora, folder, config)
    return result["matched"], result["total"]


def _run(folder: Path, job: dict[str, Any], **files: dict[str, Tensor]) -> None:
    """`_main` of this file in the host's process, on a job and tensors that are written to the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.json").write_text(json.dumps(job))
    for name, tensors in files.items():
        save_file({k: v.contiguous().clone() for k, v in tensors.items()}, folder / f"{name}.safetensors")
    done = forked.run(forked.NATIVE, __file__, folder)
    assert done.returncode == 0, done.stderr


def forward(
    folder: Path,
    config: dict[str, Any],
    weights: dict[str, Tensor],
    latents_BCHW: Tensor,
    text_BTC: Tensor,
    sigma_B: Tensor,
    loras: tuple[Path, ...] = (),
    strength: float = 1.0,
) -> tuple[Tensor, ...]:
    """The native model's velocity [B, C, H, W]: first as it is, then with each of the LoRAs alone.

    `weights`: state dict in the original layout, norms named `.weight`.
    """
    job = {"config": config, "loras": [str(lora) for lora in loras], "strength": strength}
    call = {"latents": latents_BCHW, "text": text_BTC, "sigma": sigma_B}
    _run(folder, job, weights=weights, call=call)
    outputs = load_file(folder / "outputs.safetensors")
    return tuple(outputs[str(i)] for i in range(len(loras) + 1))


def patched(
    folder: Path, config: dict[str, Any], weights: dict[str, Tensor], loras: tuple[Path, ...], strength: float = 1.0
) -> tuple[dict[str, Tensor], ...]:
    """For each LoRA alone the native model's parameters, in the original layout, as its loader changes them."""
    job = {"config": config, "loras": [str(lora) for lora in loras], "strength": strength, "patched": True}
    _run(folder, job, weights=weights)
    return tuple(load_file(folder / f"patched-{i}.safetensors") for i in range(len(loras)))


def own_files(folder: Path, config: dict[str, Any]) -> dict[str, Path]:
    """LoRA files that ComfyUI's own nodes make: *Train LoRA* of each algorithm (random numbers in the place of trained
    ones), and *Extract and Save LoRA* of both types, from two random models."""
    _run(folder, {"config": config, "own": True})
    return {path.stem: path for path in sorted(folder.glob("*-*.safetensors"))}


def _write_own_files(folder: Path, config: dict[str, Any]) -> None:
    from comfy_extras import nodes_lora_extract, nodes_train

    import native_lora_check

    for algorithm in ("LoRA", "LoHa", "LoKr", "OFT"):
        torch.manual_seed(0)
        patcher = native_lora_check.build_native(config)
        made, _ = nodes_train._setup_lora_adapters(patcher, {}, algorithm, torch.float32, 4)
        tensors = {}
        for key, parameter in made.items():
            numbers = parameter.detach()
            tensors[key] = numbers if key.endswith(".alpha") else torch.randn_like(numbers) * 0.1
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / f"train-{algorithm}.safetensors")
    torch.manual_seed(0)
    one, other = native_lora_check.build_native(config), native_lora_check.build_native(config)
    for model in (one.model, other.model):
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    difference = one.clone()
    # All at once: each call lists the model's weights.
    difference.add_patches(other.get_key_patches("diffusion_model."), -1.0, 1.0)
    for lora_type in nodes_lora_extract.LORAType:
        prefix = "diffusion_model."
        made = nodes_lora_extract.calc_lora_model(difference, 8, prefix, prefix, {}, lora_type, bias_diff=True)
        save_file(made, folder / f"extract-{lora_type.name.lower()}.safetensors")


def _main(folder: Path) -> None:
    import native_lora_check

    native_lora_check.import_host()
    job = json.loads((folder / "job.json").read_text())
    if job.get("own"):
        _write_own_files(folder, job["config"])
        return
    patcher = native_lora_check.build_native(job["config"])
    native = patcher.model.diffusion_model
    native.load_state_dict(load_file(folder / "weights.safetensors"))  # strict: every name and shape must be the host's
    if job.get("patched"):
        for i, lora in enumerate(job["loras"]):
            with_lora, _ = native_lora_check.load_lora(patcher, Path(lora), job["strength"])
            with_lora.patch_model()
            found = {name: tensor.contiguous() for name, tensor in native.state_dict().items()}
            save_file(found, folder / f"patched-{i}.safetensors")
            with_lora.unpatch_model()
        return
    call = load_file(folder / "call.safetensors")

    def velocity() -> Tensor:
        with torch.no_grad():
            guidance = torch.zeros_like(call["sigma"])
            return native(call["latents"], call["sigma"], call["text"], guidance)

    outputs = {"0": velocity()}
    for i, lora in enumerate(job["loras"], start=1):
        patched, _ = native_lora_check.load_lora(patcher, Path(lora), job["strength"])
        patched.patch_model()
        outputs[str(i)] = velocity()
        patched.unpatch_model()
    save_file({k: v.contiguous() for k, v in outputs.items()}, folder / "outputs.safetensors")


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
