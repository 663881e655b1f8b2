"""What the tests of downloads share: a published model's files, a fresh cache, and the server that offers them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

import forked
from chroma_core.model.flavours import BASE_COMMIT
from hub_server import HubServer, checksum, sha256

ROOT = Path(__file__).parents[2]
SHARD = "transformer/diffusion_pytorch_model-00001-of-00002.safetensors"
# The client writes 10 MiB at a time, so that a file must be longer to break off with something on the disk.
SHARD_BYTES = 25 << 20
TRANSFORMER = (
    "transformer/config.json",
    SHARD,
    "transformer/diffusion_pytorch_model-00002-of-00002.safetensors",
    "transformer/diffusion_pytorch_model.safetensors.index.json",
)


@cache
def chroma_files() -> dict[str, bytes]:
    """The files of a published Chroma, named as they are there, with small contents; one shard of 25 MiB."""
    generator = torch.Generator().manual_seed(0)

    def weights(length: int) -> bytes:
        return save({"weight": torch.randint(0, 256, (length,), dtype=torch.uint8, generator=generator)})

    def index(stem: str) -> bytes:
        return json.dumps({"weight_map": {"a": f"{stem}-00001-of-00002.safetensors", "b": _second(stem)}}).encode()

    model, t5 = "diffusion_pytorch_model", "model"
    return {
        "README.md": b"# Chroma",
        "model_index.json": b'{"_class_name": "ChromaPipeline"}',
        "scheduler/scheduler_config.json": b"{}",
        SHARD: weights(SHARD_BYTES),
        f"transformer/{_second(model)}": weights(1000),
        f"transformer/{model}.safetensors.index.json": index(model),
        f"transformer/{model}.fp16.safetensors": weights(500),
        f"transformer/{model}.safetensors": weights(2000),
        f"transformer/{model}.bin": b"a pickle",
        "transformer/config.json": b'{"num_layers": 19}',
        f"text_encoder/{t5}-00001-of-00002.safetensors": weights(3000),
        f"text_encoder/{_second(t5)}": weights(3001),
        f"text_encoder/{t5}.safetensors.index.json": index(t5),
        "text_encoder/config.json": b'{"d_model": 4096}',
        "tokenizer/tokenizer_config.json": b'{"model_max_length": 512}',
        "tokenizer/special_tokens_map.json": b"{}",
        "tokenizer/spiece.model": bytes(range(256)) * 40,
        "tokenizer/added_tokens.json": b"{}",
        "vae/config.json": b'{"latent_channels": 16}',
        f"vae/{model}.safetensors": weights(4000),
        "Chroma1-Base.safetensors": b"",
    }


def _second(stem: str) -> str:
    return f"{stem}-00002-of-00002.safetensors"


@pytest.fixture(name="cache")
def cache_fixture(tmp_path, monkeypatch):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # the other tests run offline
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    return tmp_path / "hub"


@pytest.fixture(name="hub")
def hub_fixture(cache, monkeypatch):
    claimed = {"Chroma1-Base.safetensors": 17_800_000_000}
    with HubServer({BASE_COMMIT: chroma_files()}, {"main": BASE_COMMIT}, claimed=claimed) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        yield server


def partial(cache: Path) -> Path:
    """What is kept of the broken 25 MiB shard."""
    name = f"{sha256(chroma_files()[SHARD])}.chromakit.incomplete"
    return cache / "models--lodestones--Chroma1-Base" / "blobs" / name


def assert_same(folder: Path, names=TRANSFORMER) -> None:
    """The files are those that the server offers, by checksum."""
    for name in names:
        assert checksum(name, (folder / name).read_bytes()) == checksum(name, chroma_files()[name]), name


def present(folder: Path) -> set[str]:
    """Names of the files in a folder."""
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def run(script: str, *arguments: object, **environment: str) -> str:
    """In a process of its own: the xet library keeps one session per process, with the cache folder of its start."""
    done = forked.run(forked.LIGHT, "-c", script, *arguments, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
