"""Asks ComfyUI's own LoRA loader how much of a LoRA file it applies to its own Chroma.

    python scripts/native_lora_check.py LORA.safetensors [--model-folder DIR]

prints {"matched": layers that are patched, "total": layers in the file, "unmatched": [names]} as one line of JSON and
exits with 1 if anything is unmatched. DIR is a model in diffusers layout, of which only `transformer/config.json` is
read; without it the layers are those of Chroma 1. Runs on the environment's Python; COMFYUI_PATH names the host, else
the downloaded one is used. Nothing of ChromaKit's core is involved: the answer is the host's alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from _environment import EnvironmentFailure, host_folder, is_host

CHROMA_1 = {
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "axes_dims_rope": [16, 56, 56],
    "approximator_num_channels": 64,
    "approximator_hidden_dim": 5120,
    "approximator_layers": 5,
}

MARKERS = (
    *(".lora_B.weight", ".lora_up.weight", ".lora.up.weight", ".lora_linear_layer.up.weight"),
    *(".lokr_w1", ".lokr_w1_a", ".hada_w1_a", ".oft_blocks"),
    *(".diff", ".diff_b", ".w_norm", ".b_norm"),
)
"""One key of every layer: a LoRA's second matrix, the first of another kind, a difference of a weight or of a bias."""


def import_host(*options: str) -> None:
    """Make `import comfy…` work in this process, on the CPU, with more of the options of its command line."""
    folder = host_folder()
    if not is_host(folder):
        raise EnvironmentFailure(f"there is no ComfyUI in {folder}; set COMFYUI_PATH, or run scripts/test.py once.")
    arguments = sys.argv
    sys.path.insert(0, str(folder))
    sys.argv = ["x", "--cpu", *options]
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.sd  # noqa: F401
    finally:
        sys.argv = arguments


def build_native(config: dict[str, Any], device: str = "cpu", operations: Any = None, dtype: str = "float32"):
    """The host's Chroma inside its ModelPatcher, for a diffusers transformer configuration; random weights.

    Built directly, because the host's model detection hard-codes Chroma 1's widths. On `meta` it has shapes only.
    operations: the host's layer classes; None: plain ones.
    """
    import comfy.model_base
    import comfy.model_patcher
    import comfy.ops
    import comfy.supported_models
    import torch

    hidden = config["num_attention_heads"] * config["attention_head_dim"]
    native: Any = comfy.supported_models.Chroma(
        {
            "image_model": "chroma",
            "in_channels": config["in_channels"],
            "out_channels": config.get("out_channels") or config["in_channels"],
            "context_in_dim": config["joint_attention_dim"],
            "hidden_size": hidden,
            "mlp_ratio": 4.0,
            "num_heads": config["num_attention_heads"],
            "depth": config["num_layers"],
            "depth_single_blocks": config["num_single_layers"],
            "axes_dim": list(config["axes_dims_rope"]),
            "theta": 10000,
            "patch_size": 2,
            "qkv_bias": True,
            "in_dim": config["approximator_num_channels"],
            "out_dim": hidden,
            "hidden_dim": config["approximator_hidden_dim"],
            "n_layers": config["approximator_layers"],
            "txt_ids_dims": [],
            "vec_in_dim": None,
        }
    )
    native.set_inference_dtype(getattr(torch, dtype), None)
    native.custom_operations = operations or comfy.ops.disable_weight_init
    where = torch.device(device)
    model = comfy.model_base.Chroma(native, device=where)
    return comfy.model_patcher.ModelPatcher(model, load_device=where, offload_device=where)


def load_lora(patcher, path: Path, strength: float = 1.0):
    """A copy of `patcher` with the file's patches registered, by the same calls as the host's Load LoRA node."""
    import comfy.sd
    import comfy.utils

    tensors: Any = comfy.utils.load_torch_file(str(path), safe_load=True)
    patched: Any
    patched, _ = comfy.sd.load_lora_for_models(patcher, None, tensors, strength, 0.0)
    return patched, tensors


def check(path: Path, patcher) -> dict[str, Any]:
    """Which layers of the LoRA file the host would change; a patch of the wrong shape does not count."""
    patched, tensors = load_lora(patcher, path)
    weights = patched.model.state_dict()
    applied = set()
    for key, patches in patched.patches.items():
        for _, adapter, _, offset, _ in patches:
            target = weights[key] if offset is None else weights[key].narrow(*offset)
            marker, shape = _marker(adapter)
            if shape == tuple(target.shape[: len(shape)]):
                applied.add(id(marker))
    layers = {key: tensor for key, tensor in tensors.items() if key.endswith(MARKERS)}
    unmatched = [_without_marker(key) for key, tensor in layers.items() if id(tensor) not in applied]
    return {"matched": len(layers) - len(unmatched), "total": len(layers), "unmatched": unmatched}


def _without_marker(key: str) -> str:
    return key[: -max(len(marker) for marker in MARKERS if key.endswith(marker))]


def _marker(adapter) -> tuple[Any, tuple[int, ...]]:
    """The tensor of one of MARKERS that the host's adapter holds, and the shape (out, in) of its update, or (out,)."""
    if isinstance(adapter, tuple):  # ("diff", (tensor,))
        difference = adapter[1][0]
        return difference, tuple(difference.shape)
    if adapter.name == "oft":
        blocks = adapter.weights[0]
        return blocks, (blocks.shape[0] * blocks.shape[1],)
    if adapter.name != "lokr":
        up, down = adapter.weights[:2]
        return up, (up.shape[0], down.shape[1])
    w1, w2, _, w1_a, w1_b, w2_a, w2_b = adapter.weights[:7]
    left = w1.shape if w1 is not None else (w1_a.shape[0], w1_b.shape[1])
    right = w2.shape if w2 is not None else (w2_a.shape[0], w2_b.shape[1])
    return w1 if w1 is not None else w1_a, (left[0] * right[0], left[1] * right[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lora", type=Path, help="a LoRA in safetensors format")
    parser.add_argument("--model-folder", type=Path, help="a model in diffusers layout (default: Chroma 1)")
    options = parser.parse_args()
    config = dict(CHROMA_1)
    if options.model_folder is not None:
        config |= json.loads((options.model_folder / "transformer" / "config.json").read_text(encoding="utf-8"))
    import_host()
    result = check(options.lora, build_native(config, "meta"))
    print(json.dumps(result))
    return 0 if result["total"] and not result["unmatched"] else 1


if __name__ == "__main__":
    sys.exit(main())
