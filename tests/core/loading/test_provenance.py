"""Whether a LoRA meets its own base, and the fingerprints that tell it without reading large files."""

import hashlib
import json

import pytest

from chroma_core.loading import model_files
from chroma_core.loading.model_files import base_hash, base_warning, known_base_hash
from chroma_core.loading.spec import ModelSpec
from miniature import write_model_folder


@pytest.fixture(autouse=True)
def own_memory(tmp_path, monkeypatch):
    """A memory of this test alone, in which every file is a large one."""
    monkeypatch.setattr(model_files.constants, "HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(model_files, "AT_ONCE", -1)
    monkeypatch.setattr(model_files, "_known", {})


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return [write_model_folder(root / name, seed) for seed, name in enumerate(("one", "two"))]


def header(spec: ModelSpec, **more: str) -> dict[str, str]:
    return {"chromakit.base_sha256": base_hash(spec), "chromakit.flavour": spec.flavour, **more}


def test_a_digest_is_computed_once_and_outlives_the_process(tmp_path, monkeypatch):
    file = tmp_path / "weights.safetensors"
    file.write_bytes(b"abc")
    assert model_files.known_sha256(file) is None  # large, and never read so far
    digest = hashlib.sha256(b"abc").hexdigest()
    assert model_files.sha256_of(file) == digest
    monkeypatch.setattr(model_files, "_known", {})  # another process
    assert model_files.known_sha256(file) == digest
    assert any(key.startswith(f"{file} ") for key in json.loads(model_files.remembered_in().read_text()))
    file.write_bytes(b"abcd")
    assert model_files.known_sha256(file) is None  # changed
    monkeypatch.setattr(model_files, "AT_ONCE", 10)  # a small file is simply read
    assert model_files.known_sha256(file) == hashlib.sha256(b"abcd").hexdigest()


def test_a_file_that_is_replaced_while_it_is_read_is_not_remembered(tmp_path, monkeypatch):
    file = tmp_path / "weights.safetensors"
    file.write_bytes(b"abc")

    def slow(path):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        path.write_bytes(b"another one")
        return digest

    monkeypatch.setattr(model_files, "sha256_file", slow)
    model_files.sha256_of(file)
    assert model_files.known_sha256(file) is None


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1}', '{"a": "not a digest"}'])
def test_a_damaged_memory_is_no_obstacle(tmp_path, content):
    model_files.remembered_in().parent.mkdir(parents=True)
    model_files.remembered_in().write_text(content)
    file = tmp_path / "a"
    file.write_bytes(b"abc")
    assert model_files.known_sha256(file) is None
    assert model_files.sha256_of(file) == hashlib.sha256(b"abc").hexdigest()
    kept = json.loads(model_files.remembered_in().read_text())
    assert kept.pop("format") == 1 and len(kept) == 1


def test_a_file_in_the_hubs_cache_is_named_by_its_digest(tmp_path):
    blob = tmp_path / "blobs" / ("ab" * 32)
    blob.parent.mkdir()
    blob.write_bytes(b"never read")
    pointer = tmp_path / "snapshots" / "model.safetensors"
    pointer.parent.mkdir()
    pointer.symlink_to(blob)
    assert model_files.known_sha256(pointer) == model_files.sha256_of(pointer) == "ab" * 32


def test_another_base_is_named_with_its_digest_and_the_own_one_passes(folders):
    one, two = (ModelSpec(folder=str(folder)) for folder in folders)
    trained = header(one, **{"chromakit.base_file": "one"})
    assert base_warning(trained, two) is None  # not known without reading it, and not to be told by a name
    assert known_base_hash(two) is None
    remark = base_warning(trained, two, read_everything=True)
    assert remark is not None and base_hash(one)[:12] in remark and base_hash(two)[:12] in remark
    assert "'one'" in remark and "'two'" in remark
    assert base_warning(trained, two) == remark  # known from now on
    assert base_warning(trained, one) is None


def test_flavours_tell_when_digests_do_not(monkeypatch):
    monkeypatch.setattr(model_files, "AT_ONCE", 256 << 20)
    tiny = ModelSpec("tiny", precision="fp32")
    assert base_warning({"chromakit.flavour": "hd"}, tiny).count("hd, while this model is tiny") == 1
    assert base_warning({"chromakit.flavour": "tiny"}, tiny) is None
    assert base_warning({}, tiny) is None  # a foreign file says nothing
    assert base_warning(header(tiny), tiny) is None
    assert base_warning(header(tiny) | {"chromakit.base_sha256": "0" * 64}, tiny).count("another revision") == 1
