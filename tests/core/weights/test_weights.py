"""Reading weights from safetensors files, shards and folders: the right numbers, in memory of their own."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import forked
import miniature
from chroma_core.errors import ModelFileError
from chroma_core.weights.opening import Weights, open_weights
from weight_files import cut, shard_name, write_gguf, write_safetensors, write_scaled_fp8, write_shards

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def every_type() -> dict[str, Tensor]:
    values = numbers(6, 5)
    return {
        "fp32": values,
        "fp64": values.double(),
        "bf16": values.bfloat16(),
        "fp16": values.half(),
        "e4m3.weight": values.to(torch.float8_e4m3fn),
        "e5m2.weight": values.to(torch.float8_e5m2),
        "one": values[0, 0],
        "none": values[:0],
        "five": numbers(2, 3, 1, 2, 2),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_float_type_is_cast_once(tmp_path: Path, dtype: torch.dtype):
    held = every_type()
    weights = open_weights(write_safetensors(tmp_path / "x.safetensors", held, {"format": "pt", "note": "ä"}))
    assert weights.metadata == {"format": "pt", "note": "ä"}
    assert weights.shapes == {name: tuple(tensor.shape) for name, tensor in held.items()}
    assert weights.files == (tmp_path / "x.safetensors",)
    for name, tensor in held.items():
        assert torch.equal(weights.read(name, dtype), tensor.to(dtype)), name
    assert weights.storage["e4m3.weight"] == weights.storage["e5m2.weight"] == "fp8"
    assert [weights.storage[name] for name in ("fp32", "fp64", "bf16", "fp16")] == ["fp32", "fp64", "bf16", "fp16"]


def test_the_header_is_read_as_the_library_reads_it(root: Path):
    path = root / "chroma_core/assets/tiny/transformer/diffusion_pytorch_model.safetensors"
    weights = open_weights(path)
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        assert weights.shapes == {name: tuple(file.get_slice(name).get_shape()) for name in names}
        for name in names[::17]:
            tensor = file.get_tensor(name)
            assert torch.equal(weights.read(name, tensor.dtype), tensor)


def test_rows_of_a_fused_tensor(tmp_path: Path):
    fused = numbers(9000, 40).bfloat16()  # more numbers than are converted at a time
    weights = open_weights(write_safetensors(tmp_path / "x.safetensors", {"first": numbers(3), "qkv.weight": fused}))
    for rows in ((0, 3000), (3000, 6000), (8999, 9000), (0, 9000), (4, 4)):
        for dtype in (torch.bfloat16, torch.float32):
            part = weights.read("qkv.weight", dtype, rows)
            assert torch.equal(part, fused[rows[0] : rows[1]].to(dtype)) and part.is_contiguous()
    for rows in ((0, 9001), (-1, 2), (5, 4)):
        with pytest.raises(ValueError, match="rows"):
            weights.read("qkv.weight", torch.float32, rows)


@linux
def test_rows_are_read_without_the_rest(tmp_path: Path):
    tensor = numbers(4096, 1024)
    weights = open_weights(write_safetensors(tmp_path / "x.safetensors", {"linear1.weight": tensor}))

    def bytes_read() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    before = bytes_read()
    weights.read("linear1.weight", torch.bfloat16, (1024, 1040))
    assert bytes_read() - before < 16 * 1024 * 4 + 10_000


def test_tensors_own_their_memory_and_no_file_stays_open(tmp_path: Path):
    held = {"w": numbers(8, 8)}
    path = write_safetensors(tmp_path / "x.safetensors", held)
    weights = open_weights(path)
    tensor = weights.read("w", torch.float32)
    part = weights.read("w", torch.float32, (2, 4))
    if Path("/proc/self/fd").is_dir():
        assert not [fd for fd in Path("/proc/self/fd").iterdir() if os.path.realpath(fd) == str(path)]
        assert str(path) not in Path("/proc/self/maps").read_text()
    path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(tensor, held["w"]) and torch.equal(part, held["w"][2:4])
    assert part.untyped_storage().nbytes() == 2 * 8 * 4
    assert not tensor.is_inference() and not tensor.requires_grad


def test_a_file_that_changes_after_opening_is_an_error(tmp_path: Path):
    path = write_safetensors(tmp_path / "x.safetensors", {"w": numbers(64, 64)})
    weights = open_weights(path)
    cut(path)
    with pytest.raises(ModelFileError, match="replaced or changed after loading had begun"):
        weights.read("w", torch.float32)
    path.unlink()
    with pytest.raises(ModelFileError, match="cannot be read"):
        weights.read("w", torch.float32)


def test_surroundings_do_not_leak_in(tmp_path: Path):
    """A default dtype or device that somebody else has set at this moment changes nothing, and is not changed."""
    held = {"a.weight": numbers(16, 32)}
    expected = write_scaled_fp8(tmp_path / "x.safetensors", held)
    packed = write_gguf(tmp_path / "x.gguf", held)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            scaled = open_weights(tmp_path / "x.safetensors").read("a.weight", torch.float32)
            blocks = open_weights(tmp_path / "x.gguf").read("a.weight", torch.float32)
        assert torch.get_default_dtype() is torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(scaled, expected["a.weight"]) and torch.equal(blocks, packed["a.weight"])


def test_a_file_opened_by_a_node_gives_ordinary_tensors(tmp_path: Path):
    """The host's nodes run in inference mode; scales read on opening must not pass that on to weights."""
    expected = write_scaled_fp8(tmp_path / "x.safetensors", {"a.weight": numbers(8, 8)}, per_row=True)
    with torch.inference_mode():
        weights = open_weights(tmp_path / "x.safetensors")
        with torch.inference_mode(False):
            tensor = weights.read("a.weight", torch.float32)
    assert not tensor.is_inference() and torch.equal(tensor, expected["a.weight"])


def test_many_threads_read_at_once(tmp_path: Path):
    held = {f"w{i}": numbers(64, 64, seed=i) for i in range(16)}
    weights = open_weights(write_safetensors(tmp_path / "x.safetensors", held))
    with ThreadPoolExecutor(4) as pool:
        read = dict(zip(held, pool.map(lambda name: weights.read(name, torch.float32), held), strict=True))
    assert all(torch.equal(read[name], held[name]) for name in held)


def test_integers_are_listed_and_read_as_themselves_only(tmp_path: Path):
    held = {"ids": torch.arange(5), "bytes": torch.arange(4, dtype=torch.uint8), "mask": torch.tensor([True, False])}
    weights = open_weights(write_safetensors(tmp_path / "x.safetensors", held))
    assert [weights.storage[name] for name in held] == ["int64", "uint8", "bool"]
    assert all(torch.equal(weights.read(name, held[name].dtype), held[name]) for name in held)
    with pytest.raises(ModelFileError, match="stores weights as int64, which is not read"):
        weights.read("ids", torch.float32)


def test_an_unknown_name_is_an_error(tmp_path: Path):
    weights = open_weights(write_safetensors(tmp_path / "x.safetensors", {"w": numbers(2)}))
    with pytest.raises(ModelFileError, match="holds no tensor 'v'"):
        weights.read("v", torch.float32)


# Shards and folders


def same(weights: Weights, held: dict[str, Tensor]) -> bool:
    return weights.shapes.keys() == held.keys() and all(
        torch.equal(weights.read(name, tensor.dtype), tensor) for name, tensor in held.items()
    )


def test_shards_of_a_variant_as_diffusers_saves_them(tmp_path: Path):
    """`save_pretrained(variant="fp16", max_shard_size=…)` puts the variant into the index's name, too."""
    from diffusers import ChromaTransformer2DModel

    made: Any = ChromaTransformer2DModel(num_layers=1, num_single_layers=1, **miniature.WIDTHS).half()
    made.save_pretrained(tmp_path, variant="fp16", max_shard_size="40KB")
    shards = sorted(tmp_path.glob("*.fp16-*.safetensors"))
    assert len(shards) > 1 and (tmp_path / "diffusion_pytorch_model.safetensors.index.fp16.json").is_file()
    for path in (tmp_path, shards[0], shards[-1], *tmp_path.glob("*.index.fp16.json")):
        found = open_weights(path)
        assert found.shapes.keys() == made.state_dict().keys() and len(found.files) == len(shards)
    name = "proj_out.weight"
    assert torch.equal(found.read(name, torch.float16), made.state_dict()[name])


def test_shards_open_by_index_by_folder_and_by_any_shard(tmp_path: Path):
    held = every_type()
    index = write_shards(tmp_path, held, 3)
    for path in (index, tmp_path, tmp_path / shard_name(2, 3)):
        weights = open_weights(path)
        assert same(weights, held)
        assert weights.path == path and weights.metadata == {"format": "pt"}
        assert [file.name for file in weights.files] == [shard_name(i, 3) for i in (1, 2, 3)]


def test_a_scale_may_lie_in_another_shard(tmp_path: Path):
    expected = write_scaled_fp8(tmp_path / "whole.safetensors", {"a.weight": numbers(8, 8), "b.weight": numbers(4, 8)})
    with safe_open(tmp_path / "whole.safetensors", framework="pt") as file:
        held = {name: file.get_tensor(name) for name in sorted(file.keys())}
    index = write_shards(tmp_path / "shards", held, 3)
    assert same(open_weights(index), expected)


def test_a_folder_with_one_model(tmp_path: Path):
    held = {"w": numbers(3, 3)}
    usual = write_safetensors(tmp_path / "usual" / "model.safetensors", held)
    write_safetensors(tmp_path / "usual" / "model.fp16.safetensors", {"w": numbers(3, 3).half()})
    only = write_safetensors(tmp_path / "only" / "anything.sft", held)
    assert open_weights(usual.parent).files == (usual,) and same(open_weights(usual.parent), held)
    assert same(open_weights(str(only.parent)), held)
    (tmp_path / "gguf").mkdir()
    expected = write_gguf(tmp_path / "gguf" / "x.gguf", held, "F16")
    assert same(open_weights(tmp_path / "gguf"), expected)


def test_content_decides_not_the_name(tmp_path: Path):
    held = {"w": numbers(4, 32)}
    expected = write_gguf(tmp_path / "model.safetensors", held)
    assert same(open_weights(tmp_path / "model.safetensors"), expected)
    assert same(open_weights(write_safetensors(tmp_path / "model.ckpt", held)), held)


# Memory

PEAK = """
import ctypes
import sys
import torch
from chroma_core.weights.opening import open_weights

def status(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

# M_MMAP_THRESHOLD: large blocks go back to the system at once. Otherwise glibc learns to keep them, now more, now less.
ctypes.CDLL(None).mallopt(-3, 1 << 20)
weights = open_weights(sys.argv[1])
name = next(iter(weights.shapes))
weights.read(name, torch.bfloat16, (0, 1))  # whatever the first conversion sets up, e.g. tables of the gguf package
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = status("VmRSS")
held = [weights.read(name, torch.bfloat16) for name in weights.shapes]
print(status("VmHWM") - before - sum(tensor.nbytes for tensor in held))
"""


@linux
@pytest.mark.parametrize("form", ["fp32", "scaled fp8", "Q4_K"])
def test_reading_needs_little_beside_its_results(tmp_path: Path, form: str):
    """A whole fp32 copy of one of these matrices would be 16 MiB, a map of the file 16 to 32 MiB."""
    held = {f"block.{i}.weight": numbers(2048, 2048, seed=i) for i in range(4)}
    path = tmp_path / ("x.gguf" if form == "Q4_K" else "x.safetensors")
    if form == "fp32":
        write_safetensors(path, held)
    elif form == "scaled fp8":
        write_scaled_fp8(path, held, per_row=True)
    else:
        write_gguf(path, held, form)
    done = forked.run(forked.LIGHT, "-c", PEAK, path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 12 * 2**20, f"{int(done.stdout) / 2**20:.1f} MiB"
