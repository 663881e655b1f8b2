"""GGUF: the numbers of the gguf package's own unpacking, the header as its reader reads it, and damaged files."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import pytest
import torch

from chroma_core.errors import ModelFileError
from chroma_core.weights.gguf_files import COUNT_LIMIT, SCALARS
from chroma_core.weights.opening import open_weights
from weight_files import GGUF_TYPES, cut, write_gguf


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", GGUF_TYPES)
def test_every_type_is_unpacked_as_by_the_package(tmp_path: Path, kind: str):
    if kind not in gguf.GGMLQuantizationType.__members__:
        pytest.skip("the package is older than this type")
    held = {"blk.weight": numbers(37, 512), "norm.weight": numbers(7)}
    expected = write_gguf(tmp_path / "x.gguf", held, kind)
    weights = open_weights(tmp_path / "x.gguf")
    assert weights.shapes == {"blk.weight": (37, 512), "norm.weight": (7,)}
    assert weights.storage["blk.weight"] == {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}.get(kind, kind)
    assert weights.storage["norm.weight"] == "fp32"
    for name, tensor in expected.items():
        assert torch.equal(weights.read(name, torch.float32), tensor)
        assert torch.equal(weights.read(name, torch.bfloat16), tensor.bfloat16())
    assert torch.equal(weights.read("blk.weight", torch.float32, (11, 30)), expected["blk.weight"][11:30])


def test_a_tensor_of_many_chunks(tmp_path: Path):
    held = {"linear1.weight": numbers(1400, 512)}
    expected = write_gguf(tmp_path / "x.gguf", held, "Q5_1")["linear1.weight"]
    weights = open_weights(tmp_path / "x.gguf")
    assert torch.equal(weights.read("linear1.weight", torch.float32), expected)
    assert torch.equal(weights.read("linear1.weight", torch.float32, (600, 1399)), expected[600:1399])
    assert (expected - held["linear1.weight"]).norm() / held["linear1.weight"].norm() < 0.07


def test_shapes_that_the_converter_had_to_change(tmp_path: Path):
    """ComfyUI-GGUF notes the original shape. Its rows may begin in the middle of a block."""
    held = {"img_in.weight": numbers(48, 64)}
    expected = write_gguf(tmp_path / "x.gguf", held, "Q8_0", original_shapes={"img_in.weight": (192, 16)})
    weights = open_weights(tmp_path / "x.gguf")
    assert weights.shapes == {"img_in.weight": (192, 16)}
    assert torch.equal(weights.read("img_in.weight", torch.float32), expected["img_in.weight"])
    assert torch.equal(weights.read("img_in.weight", torch.float32, (3, 150)), expected["img_in.weight"][3:150])


def write_vocabulary(path: Path) -> None:
    """A file as llama.cpp writes text encoders: long arrays of texts and numbers in the header."""
    writer = gguf.GGUFWriter(path, "t5encoder")
    writer.add_uint32("t5encoder.block_count", 24)
    writer.add_float32("t5encoder.attention.layer_norm_rms_epsilon", 0.5)
    writer.add_bool("tokenizer.ggml.add_eos_token", True)
    writer.add_string("general.name", "Größe")
    writer.add_token_list([f"token{i}" for i in range(3000)])
    writer.add_token_scores([float(i) for i in range(3000)])
    writer.add_token_types([1] * 3000)
    writer.add_custom_alignment(64)
    writer.add_tensor("token_embd.weight", numbers(30, 32).numpy())
    writer.add_tensor("enc.output_norm.weight", numbers(5).numpy())
    writer.add_tensor("enc.blk.0.attn_q.weight", numbers(6, 32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_the_header_is_read_as_the_package_reads_it(tmp_path: Path):
    write_vocabulary(tmp_path / "x.gguf")
    weights = open_weights(tmp_path / "x.gguf")
    assert weights.metadata == {
        "general.architecture": "t5encoder",
        "t5encoder.block_count": "24",
        "t5encoder.attention.layer_norm_rms_epsilon": "0.5",
        "tokenizer.ggml.add_eos_token": "True",
        "general.name": "Größe",
        "general.alignment": "64",
    }
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    assert weights.shapes == {t.name: tuple(int(n) for n in reversed(t.shape)) for t in reader.tensors}
    for tensor in reader.tensors:
        assert torch.equal(weights.read(tensor.name, torch.float32), torch.tensor(tensor.data))


def test_value_types_are_the_package_s():
    kinds = gguf.GGUFValueType
    numeric = {int(kind) for kind in kinds} - {int(kinds.STRING), int(kinds.ARRAY)}
    assert numeric == set(SCALARS)
    for kind, width in ((kinds.UINT8, 1), (kinds.INT16, 2), (kinds.FLOAT32, 4), (kinds.BOOL, 1), (kinds.FLOAT64, 8)):
        assert struct.calcsize("<" + SCALARS[int(kind)]) == width


# Damaged and foreign files


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def info(name: str, shape: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def by_hand(*, version: int = 3, infos: tuple[bytes, ...] = (), values: tuple[bytes, ...] = (), data: int = 128,
            tensors: int | None = None, entries: int | None = None) -> bytes:  # fmt: skip
    counts = (len(infos) if tensors is None else tensors, len(values) if entries is None else entries)
    head = b"GGUF" + struct.pack("<I2Q", version, *counts) + b"".join(values) + b"".join(infos)
    return head + b"\0" * (-len(head) % 32) + b"\0" * data


HUGE = 1 << 62
REFUSED = {
    "version 1": (by_hand(version=1), "version 1"),
    "big-endian": (by_hand(version=3 << 24), "big-endian"),
    "nothing after the magic": (b"GGUF\3", "beyond the end of the file"),
    "absurd tensor count": (by_hand(tensors=HUGE), f"claims {HUGE:,} tensors"),
    "tensor count beyond the file": (by_hand(tensors=COUNT_LIMIT), "beyond the end of the file"),
    "absurd entry count": (by_hand(entries=HUGE), f"claims {HUGE:,} metadata entries"),
    "absurd text": (by_hand(values=(struct.pack("<Q", HUGE),)), "claims a text of"),
    "text beyond the file": (by_hand(values=(struct.pack("<Q", 1 << 20),)), "beyond the end of the file"),
    "text that is no text": (by_hand(values=(struct.pack("<Q", 1) + b"\xff",)), "not UTF-8"),
    "absurd array": (by_hand(values=(text("k") + struct.pack("<IIQ", 9, 0, HUGE),)), "entries in an array"),
    "array beyond the file": (
        by_hand(values=(text("k") + struct.pack("<IIQ", 9, 10, 1 << 20),)),
        "beyond the end of the file",
    ),
    "array of texts beyond the file": (
        by_hand(values=(text("k") + struct.pack("<IIQQ", 9, 8, 2, HUGE),)),
        "beyond the end of the file",
    ),
    "array of arrays": (by_hand(values=(text("k") + struct.pack("<IIQ", 9, 9, 1),)), "array of the unknown type 9"),
    "unknown value type": (by_hand(values=(text("k") + struct.pack("<I", 77),)), "unknown type 77"),
    "an entry twice": (by_hand(values=(text("k") + struct.pack("<IB", 0, 1),) * 2), "'k' is listed twice"),
    "a tensor twice": (by_hand(infos=(info("w"), info("w"))), "'w' is listed twice"),
    "unknown tensor type": (by_hand(infos=(info("w", kind=200),)), "'w' in GGML type 200"),
    "too many dimensions": (by_hand(infos=(text("w") + struct.pack("<I", HUGE >> 40),)), "dimensions"),
    "rows of broken blocks": (by_hand(infos=(info("w", (33,), 8),)), "not whole Q8_0 blocks of 32"),
    "a tensor beyond the end": (by_hand(infos=(info("w", (HUGE,)),)), "was not downloaded completely"),
    "an offset beyond the end": (by_hand(infos=(info("w", offset=HUGE),)), "was not downloaded completely"),
    "tensors upon each other": (by_hand(infos=(info("a"), info("b", offset=64))), "'b' overlaps"),
    "no alignment": (
        by_hand(values=(text("general.alignment") + struct.pack("<II", 4, 24),)),
        "aligns its tensors to 24",
    ),
    "part of a split model": (
        by_hand(values=(text("split.count") + struct.pack("<IH", 2, 3),)),
        "one of 3 parts of a split GGUF model",
    ),
    "a shape of another size": (
        by_hand(
            infos=(info("w"),),
            values=(text("comfy.gguf.orig_shape.w") + struct.pack("<IIQii", 9, 5, 2, 4, 4),),
        ),
        r"'w' of shape \[32\] cannot have been \[4, 4\]",
    ),
    "a shape that is none": (
        by_hand(infos=(info("w"),), values=(text("comfy.gguf.orig_shape.w") + struct.pack("<II", 4, 32),)),
        "original shape of the tensor 'w' is 32",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_damaged_headers_are_refused(tmp_path: Path, case: str):
    content, message = REFUSED[case]
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=message) as caught:
        open_weights(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_header_by_hand_is_sound(tmp_path: Path):
    """The hand-made headers above are refused for their one fault, not for being hand-made."""
    path = tmp_path / "x.gguf"
    path.write_bytes(by_hand(infos=(info("w"),), values=(text("k") + struct.pack("<IB", 0, 1),)))
    weights = open_weights(path)
    assert weights.metadata == {"k": "1"} and torch.equal(weights.read("w", torch.float32), torch.zeros(32))


@pytest.mark.parametrize("share", [0.002, 0.01, 0.1, 0.5, 0.99])
def test_a_file_that_was_cut(tmp_path: Path, share: float):
    write_gguf(tmp_path / "x.gguf", {f"w{i}": numbers(64, 64) for i in range(4)})
    with pytest.raises(ModelFileError, match="x.gguf' is damaged or was not downloaded completely"):
        open_weights(cut(tmp_path / "x.gguf", share))


def test_a_type_that_the_package_cannot_unpack(tmp_path: Path):
    path = tmp_path / "x.gguf"
    path.write_bytes(by_hand(infos=(info("w", (256,), int(gguf.GGMLQuantizationType.Q8_K)),), data=512))
    weights = open_weights(path)
    assert weights.storage == {"w": "Q8_K"}
    with pytest.raises(ModelFileError, match="stores weights as Q8_K"):
        weights.read("w", torch.float32)
