"""Files that a user already has, chosen in Chroma Load Model of a real host: what they paint, and what is refused."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor

import miniature
from _host import Host, PromptFailed, PromptRejected
from chroma_core.names.transformer import to_original
from prompts import node, text_to_image
from quantised_weights import quantise
from weight_files import CHECKPOINT_PREFIXES, json_tensor, remove_files, tiny_checkpoint

TINY = Path(__file__).resolve().parents[2] / "chroma_core" / "assets" / "tiny"


FOLDERS = ("diffusion_models", "text_encoders", "vae", "checkpoints")


def tiny(part: str) -> dict[str, Tensor]:
    (path,) = (TINY / part).glob("*.safetensors")
    return load_file(path)


@pytest.fixture(scope="module", autouse=True)
def models(server: Host) -> Iterator[Path]:
    """The models folder of the host, with tiny's parts as single files of several kinds."""
    models = server.base / "models"
    for name in FOLDERS:
        (models / name).mkdir(parents=True, exist_ok=True)
    transformers = models / "diffusion_models"
    original = to_original(tiny("transformer"))
    save_file(original, transformers / "tiny.safetensors")
    renamed = to_original(tiny("transformer"), norm_leaf="weight")
    (transformers / "more").mkdir(exist_ok=True)
    save_file({f"model.diffusion_model.{k}": v for k, v in renamed.items()}, transformers / "more" / "prefixed.sft")
    shutil.copytree(TINY / "transformer", transformers / "tiny_folder", dirs_exist_ok=True)
    save_file(tiny("text_encoder"), models / "text_encoders" / "tiny_t5.safetensors")
    save_file(tiny("vae"), models / "vae" / "tiny_vae.safetensors")
    yield models
    for name in (*FOLDERS, "chromakit"):
        remove_files(models / name)


def prompt(seed: int = 1, **load_inputs: object) -> dict:
    made = text_to_image(seed=seed)
    made["load"]["inputs"].update(load_inputs)
    return made


def paint(server: Host, **load_inputs: object) -> np.ndarray:
    (image,) = server.images(server.run(prompt(**load_inputs)))
    return np.asarray(image)


def refusal(server: Host, **load_inputs: object) -> str:
    """The message on Chroma Load Model itself: one paragraph, before any other node runs."""
    with pytest.raises(PromptFailed) as failed:
        server.run(prompt(**load_inputs))
    (error,) = (body for kind, body in failed.value.messages if kind == "execution_error")
    assert error["node_id"] == "load" and not {"positive", "sample"} & set(error["executed"])
    message = error["exception_message"].strip()
    assert "\n" not in message and "Traceback" not in message and len(message) > 60
    return message


def options(server: Host, name: str) -> list[str]:
    inputs = server.get("/object_info/ChromaLoadModel")["ChromaLoadModel"]["input"]
    kind, settings = {**inputs["required"], **inputs["optional"]}[name]
    return settings["options"] if kind == "COMBO" else kind


@pytest.fixture(scope="module")
def published(server: Host) -> np.ndarray:
    """The image that flavour tiny paints."""
    image = paint(server)
    assert image.std() > 20
    return image


@pytest.mark.parametrize(
    "files",
    [
        {"transformer": "tiny.safetensors"},
        {"transformer": "more/prefixed.sft"},
        {"transformer": "tiny_folder/"},
        {"text_encoder": "tiny_t5.safetensors"},
        {"vae": "tiny_vae.safetensors"},
        {"transformer": "tiny.safetensors", "text_encoder": "tiny_t5.safetensors", "vae": "tiny_vae.safetensors"},
    ],
    ids=lambda files: " ".join(files.values()),
)
def test_the_same_weights_in_other_files_paint_the_same_image(server: Host, published: np.ndarray, files: dict):
    assert np.array_equal(paint(server, **files), published)


def test_a_gguf_file_is_listed_and_paints_the_same_image(server: Host, models: Path, published: np.ndarray):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(models / "diffusion_models" / "tiny.gguf", "chroma")
    for name, tensor in to_original(tiny("transformer")).items():
        writer.add_tensor(name, tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "tiny.gguf" in options(server, "transformer")
    assert np.array_equal(paint(server, transformer="tiny.gguf"), published)


def test_a_checkpoint_with_all_parts_is_listed_and_each_is_taken_out_of_it(
    server: Host, models: Path, published: np.ndarray
):
    save_file(tiny_checkpoint(), models / "checkpoints" / "all.safetensors")
    darker = {"decoder.conv_out.bias": tiny("vae")["decoder.conv_out.bias"] - 0.5}
    save_file(tiny_checkpoint(vae=darker), models / "checkpoints" / "darker.safetensors")
    save_file(
        {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(2)}, models / "checkpoints" / "sd.safetensors"
    )
    (models / "checkpoints" / "broken.safetensors").write_bytes(b"nothing")
    for part in CHECKPOINT_PREFIXES:
        listed = options(server, part)
        assert {"all.safetensors", "darker.safetensors"} <= set(listed)
        assert not {"sd.safetensors", "broken.safetensors"} & set(listed)
    assert np.array_equal(paint(server, transformer="all.safetensors"), published)
    dark = paint(server, transformer="darker.safetensors")
    assert dark.mean() < published.mean() - 20
    assert np.array_equal(paint(server, vae="darker.safetensors"), dark)
    assert np.array_equal(paint(server, transformer="darker.safetensors", vae="tiny_vae.safetensors"), published)
    remove_files(models / "checkpoints")
    assert "all.safetensors" not in options(server, "vae")


def test_a_quantised_file_of_comfyuis_paints_what_its_weights_say(server: Host, models: Path):
    """In int8 as it is, and dequantised: the same numbers, so nearly the same image."""
    held, plain = {}, {}
    for name, tensor in to_original(tiny("transformer")).items():
        if tensor.dim() != 2 or not name.startswith(("double_blocks", "single_blocks")):
            held[name] = plain[name] = tensor
            continue
        made = quantise(tensor.float(), "int8_tensorwise by row")
        module = name.removesuffix(".weight")
        held |= {f"{module}.{suffix}": part for suffix, part in made.tensors.items()}
        held[f"{module}.comfy_quant"] = json_tensor(made.entry)
        plain[name] = made.meant
    save_file(held, models / "diffusion_models" / "int8.safetensors")
    save_file(plain, models / "diffusion_models" / "dequantised.safetensors")
    assert np.array_equal(
        paint(server, transformer="int8.safetensors", precision="fp32"),
        paint(server, transformer="dequantised.safetensors", precision="fp32"),
    )
    kept = paint(server, transformer="int8.safetensors", precision="int8")
    assert np.abs(kept.astype(int) - paint(server, transformer="int8.safetensors").astype(int)).mean() < 3
    for name in ("int8", "dequantised"):
        (models / "diffusion_models" / f"{name}.safetensors").unlink()


def test_one_surplus_tensor_is_ignored(server: Host, models: Path, published: np.ndarray):
    weights = to_original(tiny("transformer")) | {"double_blocks.0.mark": torch.zeros(3)}
    save_file(weights, models / "diffusion_models" / "marked.safetensors")
    assert np.array_equal(paint(server, transformer="marked.safetensors"), published)
    assert "double_blocks.0.mark" in server.log_tail(200)
    (models / "diffusion_models" / "marked.safetensors").unlink()


@pytest.mark.parametrize(
    "modes",
    [
        {"offload": "model"},
        {"offload": "block"},
        {"offload": "block", "resident_blocks": 4},
        {"offload_during_startup": True},
    ],
    ids=str,
)
def test_where_weights_rest_does_not_change_the_image(server: Host, published: np.ndarray, modes: dict):
    assert np.array_equal(paint(server, **modes), published)


def test_kept_quantised_weights_paint_the_same_image(server: Host, models: Path):
    settings = {"precision": "int8", "text_precision": "int8"}
    plain = paint(server, **settings)
    first = paint(server, **settings, keep_quantised=True)
    kept = sorted((models / "chromakit" / "quantised").glob("*.safetensors"))
    assert [path.name.split("-")[1] for path in kept] == ["text_encoder", "transformer"]
    assert not any("quantised" in name for name in options(server, "transformer"))
    server.forget_cached_outputs()
    assert np.array_equal(paint(server, **settings, keep_quantised=True), first)
    assert np.array_equal(plain, first)
    shutil.copy(kept[1], models / "diffusion_models" / "tiny_int8.safetensors")
    assert np.array_equal(paint(server, **settings, transformer="tiny_int8.safetensors"), first)
    assert "int8" in refusal(server, precision="nf4", transformer="tiny_int8.safetensors")


def test_products_in_8_bits_paint_nearly_the_same_image(server: Host):
    """Each mode its own image, in turn, and again the first one's bits; a precision without 8-bit codes is refused."""
    exact = paint(server, precision="int8")
    rounded = paint(server, precision="int8", compute="w8a8")
    difference = np.abs(rounded.astype(float) - exact.astype(float)).mean()
    assert 0 < difference < 6
    server.forget_cached_outputs()
    assert np.array_equal(paint(server, precision="int8"), exact)
    assert "Choose the precision int8 or fp8" in refusal(server, precision="bf16", compute="w8a8")


def test_a_replaced_file_is_read_again(server: Host, models: Path, published: np.ndarray):
    path = models / "diffusion_models" / "changing.safetensors"
    weights = to_original(tiny("transformer"))
    save_file(weights, path)
    assert np.array_equal(paint(server, transformer="changing.safetensors"), published)
    save_file({**weights, "img_in.bias": weights["img_in.bias"] + 1}, path)
    assert not np.array_equal(paint(server, transformer="changing.safetensors"), published)


def test_the_lists_show_each_model_once(server: Host):
    listed = options(server, "transformer")
    assert listed[0] == "as published" and len(listed) == len(set(listed))
    assert {"tiny.safetensors", "more/prefixed.sft", "tiny_folder/"} <= set(listed)
    assert not [name for name in listed if name.startswith("tiny_folder/") and name != "tiny_folder/"]
    assert options(server, "text_encoder") == ["as published", "tiny_t5.safetensors"]


@pytest.mark.parametrize("name", ["gone.safetensors", "../vae/tiny_vae.safetensors", "/etc/passwd", ""])
def test_a_file_that_is_not_in_the_list_is_the_hosts_validation_error(server: Host, name: str):
    with pytest.raises(PromptRejected) as rejected:
        server.run(prompt(transformer=name))
    (error,) = rejected.value.node_errors["load"]["errors"]
    assert error["type"] == "value_not_in_list"


def test_the_memory_plan_is_a_table(server: Host):
    made = {key: value for key, value in prompt().items() if key == "load"}
    made["show"] = node("PreviewAny", source=["load", 3])
    text = server.run(made)["outputs"]["show"]["text"][0]
    assert len(text.splitlines()) > 5 and "nf4" in text and "block" in text


def test_parts_of_different_models_are_refused(server: Host, models: Path):
    save_file(to_original(miniature.transformer().state_dict()), models / "diffusion_models" / "narrow.safetensors")
    assert "different models" in refusal(server, transformer="narrow.safetensors")


# --- files that are something else ------------------------------------------------------------------------------------


def _flux() -> bytes:
    """A Flux transformer: like Chroma's, but with modulation in every block and a guidance embedding."""
    weights = {
        name: tensor
        for name, tensor in to_original(miniature.transformer().state_dict(), norm_leaf="scale").items()
        if not name.startswith("distilled_guidance_layer")
    }
    for stream in ("img", "txt"):
        weights[f"double_blocks.0.{stream}_mod.lin.weight"] = torch.zeros(192, 32)
        weights[f"double_blocks.0.{stream}_mod.lin.bias"] = torch.zeros(192)
    weights["guidance_in.in_layer.weight"] = torch.zeros(32, 256)
    weights["vector_in.in_layer.weight"] = torch.zeros(32, 768)
    weights["time_in.in_layer.weight"] = torch.zeros(32, 256)
    return save({name: tensor.contiguous() for name, tensor in weights.items()})


def _lora() -> bytes:
    module = "lora_unet_double_blocks_0_img_attn_proj"
    return save({f"{module}.lora_{side}.weight": torch.zeros(4, 4) for side in ("up", "down")})


def _whole() -> bytes:
    return save(to_original(tiny("transformer")))


def _lacking() -> bytes:
    weights = to_original(tiny("transformer"))
    del weights["single_blocks.3.linear2.weight"]
    return save(weights)


def _misshapen() -> bytes:
    weights = to_original(tiny("transformer"))
    weights["single_blocks.3.linear2.weight"] = torch.zeros(7, 5)
    return save(weights)


def _surplus() -> bytes:
    layers = {f"double_blocks.{i}.img_mlp.4.{leaf}": torch.zeros(3) for i in range(3) for leaf in ("weight", "bias")}
    return save(to_original(tiny("transformer")) | layers)


def _scale_is_not_a_number() -> bytes:
    weights = to_original(tiny("transformer"))
    name = "single_blocks.3.linear2"
    weights[f"{name}.weight"] = weights[f"{name}.weight"].to(torch.float8_e4m3fn)
    return save(weights | {f"{name}.scale_weight": torch.tensor(float("nan")), "scaled_fp8": torch.zeros(2)})


def _raw(entry: dict) -> bytes:
    """A safetensors file of one tensor, its header written by hand."""
    header = json.dumps({"img_in.weight": entry}).encode()
    return len(header).to_bytes(8, "little") + header + b"\0" * 64


def _zipped() -> bytes:
    buffer = io.BytesIO()
    torch.save({"img_in.weight": torch.zeros(2)}, buffer)
    return buffer.getvalue()


FOREIGN = {
    "vae": (lambda: save(tiny("vae")), "VAE"),
    "surplus": (_surplus, "img_mlp.4"),
    "nan_scale": (_scale_is_not_a_number, "scale"),
    "unknown_dtype": (lambda: _raw({"dtype": "F3", "shape": [4], "data_offsets": [0, 16]}), "F3"),
    "beyond_the_end": (lambda: _raw({"dtype": "F32", "shape": [400], "data_offsets": [0, 1600]}), ""),
    "sizes_disagree": (lambda: _raw({"dtype": "F32", "shape": [4], "data_offsets": [0, 64]}), ""),
    "zipped_pickle": (_zipped, "pickle"),
    "notes": (lambda: b"Chroma goes here. Remember to download it.", ""),
    "flux": (_flux, "Flux"),
    "lora": (_lora, "LoRA"),
    "text_encoder": (lambda: save(tiny("text_encoder")), "T5"),
    "lacking": (_lacking, "single_blocks.3.linear2"),
    "misshapen": (_misshapen, "linear2"),
    "zero": (lambda: b"", "empty"),
    "half": (lambda: _whole()[: 3 << 20], ""),
    "half_a_header": (lambda: _whole()[:2000], ""),
    "absurd_header": (lambda: b"\xff" * 4096, ""),
    "page": (lambda: b"<!DOCTYPE html><html><body>Please log in</body></html>", "web page"),
    "pointer": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 17800000000\n", "LFS"),
    "pickle": (lambda: b"\x80\x02}q\x00X\x01\x00\x00\x00a" + b"\0" * 200, "pickle"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_wrong_file_is_refused_at_once_and_the_host_goes_on(
    server: Host, models: Path, published: np.ndarray, kind: str
):
    content, expected = FOREIGN[kind]
    path = models / "diffusion_models" / f"wrong_{kind}.safetensors"
    path.write_bytes(content())
    message = refusal(server, transformer=path.name)
    assert path.name in message and expected.lower() in message.lower()
    assert server.alive() and np.array_equal(paint(server), published)


def test_a_wrong_gguf_file_is_refused(server: Host, models: Path):
    (models / "diffusion_models" / "wrong.gguf").write_bytes(b"GGUF" + b"\xff" * 64)
    assert "wrong.gguf" in refusal(server, transformer="wrong.gguf")


def test_a_transformer_in_the_place_of_another_part_is_refused(server: Host, models: Path):
    for folder, part in (("text_encoders", "text_encoder"), ("vae", "vae")):
        save_file(to_original(tiny("transformer")), models / folder / "misplaced.safetensors")
        message = refusal(server, **{part: "misplaced.safetensors"})
        (models / folder / "misplaced.safetensors").unlink()
        assert "misplaced.safetensors" in message and "Chroma" in message


def test_a_local_file_is_checked_before_anything_is_fetched(server: Host, models: Path):
    """Without a network: the wrong file is what the user hears of, not the network."""
    (models / "diffusion_models" / "first.safetensors").write_bytes(b"")
    assert "first.safetensors" in refusal(server, flavour="base", transformer="first.safetensors")
    assert "different models" in refusal(server, flavour="base", transformer="tiny.safetensors")
    message = refusal(server, flavour="base")
    assert "lodestones/Chroma1-Base" in message and "text_encoders" in message
    suggested = message.partition("On this machine these would do as transformer: ")[2]
    assert "tiny.safetensors" in suggested and "first.safetensors" not in suggested


def test_a_broken_index_is_refused(server: Host, models: Path):
    folder = models / "diffusion_models" / "sharded"
    folder.mkdir()
    first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    shutil.copy(TINY / "transformer" / "config.json", folder)
    shutil.copy(TINY / "transformer" / "diffusion_pytorch_model.safetensors", folder / first)
    names = dict.fromkeys(tiny("transformer"), second)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert second in refusal(server, transformer="sharded/")
