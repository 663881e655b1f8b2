"""ComfyUI's own sampling on its own Chroma, for tests: CFGGuider and SamplerCustomAdvanced, in a process of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import forked


def sample(
    folder: Path,
    config: dict[str, Any],
    weights: dict[str, Tensor],
    runs: dict[str, dict[str, Any]],
    schedules: dict[str, tuple[float, int]] | None = None,
    t5: tuple[dict[str, Any], dict[str, Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """What the host samples, by name of the run, in VAE space like every LATENT.

    A run has `sampler` (the host's name), `cfg`, and the tensors `sigmas`, `noise`, `latent`, `positive`, `negative`
    and perhaps `mask`. `schedules`: the sigmas of the host's `beta` scheduler, under the name, for (μ of the shift,
    steps). `t5`: configuration, weights and token ids [1, n] of an encoder, whose states come back as `t5`.
    """
    folder.mkdir(parents=True)
    job = {
        "config": config,
        "runs": {k: {"sampler": run["sampler"], "cfg": run["cfg"]} for k, run in runs.items()},
        "schedules": schedules or {},
        "t5": t5 and t5[0],
    }
    (folder / "job.json").write_text(json.dumps(job))
    save_file({k: v.contiguous().clone() for k, v in weights.items()}, folder / "weights.safetensors")
    tensors = {f"{k}/{n}": v.contiguous().clone() for k, r in runs.items() for n, v in r.items() if torch.is_tensor(v)}
    save_file(tensors, folder / "tensors.safetensors")
    if t5 is not None:
        save_file({k: v.contiguous().clone() for k, v in t5[1].items()} | {"ids": t5[2]}, folder / "t5.safetensors")
    done = forked.run(forked.NATIVE, __file__, folder)
    assert done.returncode == 0, done.stderr[-4000:]
    return load_file(folder / "outputs.safetensors")


class _Noise:
    """What the host's RandomNoise node gives, with the numbers of the test."""

    seed = 0

    def __init__(self, noise: Tensor):
        self.noise = noise

    def generate_noise(self, latent: dict[str, Any]) -> Tensor:
        return self.noise


def _main(folder: Path) -> None:
    import native_lora_check

    native_lora_check.import_host()
    import comfy.model_sampling
    import comfy.ops
    import comfy.samplers
    from comfy.text_encoders.t5 import T5
    from comfy_extras.nodes_custom_sampler import SamplerCustomAdvanced

    job = json.loads((folder / "job.json").read_text())
    patcher = native_lora_check.build_native(job["config"])
    patcher.model.diffusion_model.load_state_dict(load_file(folder / "weights.safetensors"))
    given = load_file(folder / "tensors.safetensors")
    outputs = {}
    with torch.inference_mode():
        for name, run in job["runs"].items():
            mine = {k.rpartition("/")[2]: v for k, v in given.items() if k.rpartition("/")[0] == name}
            guider = comfy.samplers.CFGGuider(patcher)
            guider.set_conds([[mine["positive"], {}]], [[mine["negative"], {}]])
            guider.set_cfg(run["cfg"])
            latent = {"samples": mine["latent"]} | ({"noise_mask": mine["mask"]} if "mask" in mine else {})
            solver = comfy.samplers.sampler_object(run["sampler"])
            result = SamplerCustomAdvanced.execute(_Noise(mine["noise"]), guider, solver, mine["sigmas"], latent)
            outputs[name] = result[0]["samples"].float()
        for name, (mu, steps) in job["schedules"].items():
            sampling = comfy.model_sampling.ModelSamplingFlux()
            sampling.set_parameters(shift=mu)
            outputs[name] = comfy.samplers.calculate_sigmas(sampling, "beta", steps)
        if job["t5"] is not None:
            weights = load_file(folder / "t5.safetensors")
            ids = weights.pop("ids")
            encoder = T5(job["t5"], torch.float32, "cpu", comfy.ops.disable_weight_init)
            # HF ties the embedding and stores it once more under the encoder's name
            encoder.load_state_dict({k: v for k, v in weights.items() if k != "encoder.embed_tokens.weight"})
            outputs["t5"] = encoder(ids, None)[0]
    save_file({k: v.contiguous() for k, v in outputs.items()}, folder / "outputs.safetensors")


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
