"""The small graphs in which the nodes stand for the pictures of their help pages, and when each picture is taken."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from typing import Any

LORA = "sks.safetensors"
"""What the graph `train` makes and the graph `lora` names."""


@dataclass(frozen=True)
class Shot:
    """One picture: the first node of that type in the graph, and when it is taken."""

    node: str
    graph: str
    moment: str = "placed"  # placed: before anything ran | running: half way | done
    width: int = 330
    room: int = 0
    """CSS pixels: the least width, and height beyond the least, for what the node shows."""
    needs_lora: bool = False


SHOTS = (
    Shot("ChromaTailSigmas", "sigmas"),
    Shot("ChromaHostModel", "sigmas"),
    Shot("ChromaTrainingSettings", "train"),
    Shot("ChromaWaitForTraining", "train", "running", room=120),
    Shot("ChromaTrainLora", "train", "running"),
    Shot("ChromaDataset", "train", "done", width=480, room=350),
    Shot("ChromaTrainingStatus", "train", "done", width=420, room=40),
    Shot("ChromaApplyLora", "lora", "done", needs_lora=True),
    Shot("ChromaInspectLora", "lora", "done", width=360, room=60, needs_lora=True),
    Shot("ChromaConvertLora", "lora", "done", needs_lora=True),
    Shot("ChromaDatasetFromImages", "sets", "done", width=480, room=250),
    Shot("ChromaCombineDatasets", "sets", "done"),
    Shot("ChromaLoadModel", "paint"),
    Shot("ChromaTextEncode", "paint"),
    Shot("ChromaEmptyLatent", "paint"),
    Shot("ChromaSampler", "paint", "running", room=120),
    Shot("ChromaParity", "parity", "done", width=530, room=60),
)


def _node(kind: str, title: str = "", **inputs: Any) -> tuple[str, str, dict[str, Any]]:
    return kind, title, inputs


_ids = count(1)
"""No two nodes of all graphs share an id: the page would show what one gave on the other."""


def _graph(**nodes: tuple[str, str, dict[str, Any]]) -> dict[str, Any]:
    """An API prompt in which links name their node: ("load", 1) is its second output."""
    number = {name: str(next(_ids)) for name in nodes}
    return {
        number[name]: {
            "class_type": kind,
            "inputs": {k: [number[v[0]], v[1]] if isinstance(v, tuple) else v for k, v in inputs.items()},
            **({"_meta": {"title": title}} if title else {}),
        }
        for name, (kind, title, inputs) in nodes.items()
    }


# bf16 is slow on many CPUs, where tiny is mostly run.
_LOAD = _node("ChromaLoadModel", precision="fp32", text_precision="fp32")
_NEGATIVE = _node("ChromaTextEncode", "Negative prompt", text_encoder=("load", 1))
_SET = {"folder": "sks_emblem", "trigger": "sks"}
_CONCEPT = "a sks emblem on a red background"


def _prompt(text: str) -> tuple[str, str, dict[str, Any]]:
    return _node("ChromaTextEncode", text_encoder=("load", 1), text=text)


def _latent(batch: int = 1) -> tuple[str, str, dict[str, Any]]:
    return _node("ChromaEmptyLatent", width=64, height=64, batch_size=batch)


_SAMPLER = _node(
    "ChromaSampler",
    model=("load", 0),
    positive=("prompt", 0),
    negative=("negative", 0),
    latent=("latent", 0),
    control_after_generate="fixed",
)
_DECODE = _node("VAEDecode", samples=("sample", 0), vae=("load", 2))

GRAPHS = {
    "paint": _graph(
        load=_LOAD,
        prompt=_prompt("a red star on a blue background"),
        negative=_NEGATIVE,
        latent=_latent(),
        sample=_SAMPLER,
        decode=_DECODE,
        show=_node("PreviewImage", images=("decode", 0)),
    ),
    "sigmas": _graph(
        load=_LOAD,
        bridge=_node("ChromaHostModel", model=("load", 0)),
        sigmas=_node("ChromaTailSigmas"),
    ),
    "train": _graph(
        load=_LOAD,
        dataset=_node("ChromaDataset", **_SET),
        heldout=_node("ChromaDataset", "Held-out images", **_SET | {"folder": "sks_emblem_heldout"}),
        settings=_node("ChromaTrainingSettings", lr_schedule="cosine", validate_every=100),
        train=_node(
            "ChromaTrainLora",
            model=("load", 0),
            text_encoder=("load", 1),
            dataset=("dataset", 0),
            validation_dataset=("heldout", 0),
            settings=("settings", 0),
            name=LORA.removesuffix(".safetensors"),
            steps=500,
            learning_rate=2e-3,
            target="all+ffs",
            batch_size=4,
            preview_prompt=_CONCEPT,
            preview_every=100,
        ),
        status=_node("ChromaTrainingStatus", job=("train", 0)),
        wait=_node("ChromaWaitForTraining", job=("train", 0)),
        name=_node("PreviewAny", source=("wait", 1)),
    ),
    "lora": _graph(
        load=_LOAD,
        apply=_node("ChromaApplyLora", model=("load", 0), lora=LORA),
        report=_node("PreviewAny", source=("apply", 1)),
        inspect=_node("ChromaInspectLora", lora=LORA, model=("load", 0)),
        convert=_node("ChromaConvertLora", lora=LORA, dialect="kohya"),
    ),
    "sets": _graph(
        load=_LOAD,
        prompt=_prompt("a red star on a blue background"),
        negative=_NEGATIVE,
        latent=_latent(4),
        sample=_SAMPLER,
        decode=_DECODE,
        main=_node("ChromaDataset", **_SET),
        ordinary=_node(
            "ChromaDatasetFromImages",
            images=("decode", 0),
            captions="a red star on a blue background",
            regularisation=True,
        ),
        combine=_node(
            "ChromaCombineDatasets", dataset_1=("main", 0), dataset_2=("ordinary", 0), weight_1=1.0, weight_2=0.5
        ),
        summary=_node("PreviewAny", source=("combine", 1)),
    ),
    "parity": _graph(
        load=_LOAD,
        parity=_node(
            "ChromaParity",
            model=("load", 0),
            text_encoder=("load", 1),
            prompt="a red star on a blue background",
            width=64,
            height=64,
            factors="recipe",
            control_after_generate="fixed",
        ),
    ),
}
