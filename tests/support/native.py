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
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.json").write_text(
        json.dumps({"config": config, "loras": [str(lora) for lora in loras], "strength": strength})
    )
    save_file({k: v.contiguous().clone() for k, v in weights.items()}, folder / "weights.safetensors")
    save_file({"latents": latents_BCHW, "text": text_BTC, "sigma": sigma_B}, folder / "call.safetensors")
    done = forked.run(forked.NATIVE, __file__, folder)
    assert done.returncode == 0, done.stderr
    outputs = load_file(folder / "outputs.safetensors")
    return tuple(outputs[str(i)] for i in range(len(loras) + 1))


def _main(folder: Path) -> None:
    import native_lora_check

    native_lora_check.import_host()
    job = json.loads((folder / "job.json").read_text())
    patcher = native_lora_check.build_native(job["config"])
    native = patcher.model.diffusion_model
    native.load_state_dict(load_file(folder / "weights.safetensors"))  # strict: every name and shape must be the host's
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
