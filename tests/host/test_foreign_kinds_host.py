"""LoRA files of every kind that ComfyUI's own loader computes as their trainers do: our merged weights are its own."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from torch import Tensor

import native
from chroma_core.errors import LoraError
from chroma_core.lora.adapters import merge
from chroma_core.lora.files import read_lora, write_lora
from chroma_core.lora.key_formats import STYLES
from chroma_core.model.transformer import ChromaTransformer
from chroma_core.names.transformer import to_original
from foreign_loras import KIND_FILES, foreign_kind, shapes_of
from miniature import REAL_DEPTH, real_depth
from recorded import FOLDER, WRITE, recorded

FORMATS = ("universal", "ai-toolkit", "kohya", "lycoris", "onetrainer")
"""The key formats that ComfyUI reads in full."""


def relative(ours: dict[str, Tensor], theirs: dict[str, Tensor], base: dict[str, Tensor]) -> tuple[float, int]:
    """The largest difference of a parameter relative to its largest change, and how many are changed."""
    worst, changed = 0.0, 0
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        change = (tensor - base[name]).abs().max()
        changed += int(change > 0)
        gap = (ours[name] - tensor).abs().max()
        assert change > 0 or gap == 0, name
        worst = max(worst, float(gap / change)) if change > 0 else worst
    return worst, changed


def recorded_now() -> dict[str, Any]:
    path = FOLDER / "lora_kinds.json"
    return json.loads(path.read_text()) if path.exists() else {}


@pytest.fixture(scope="module")
def base() -> dict[str, Tensor]:
    return to_original(real_depth().state_dict(), norm_leaf="weight")


OWN = ("train-LoRA", "train-LoHa", "train-LoKr", "train-OFT", "extract-standard", "extract-full_diff")
"""What ComfyUI's own nodes write."""
KINDS = (*KIND_FILES, *OWN)
FULL = ("train-lora", "full", "extract-full_diff", "extract-standard", "train-LoRA")


AS_WRITTEN = "as written"
WHOLE, SHORT = (19, 38), (2, 11)
"""Blocks of the model for the programs' own files, and for those that are written again, with numbers of two digits."""


def depth(key_format: str) -> tuple[int, int]:
    return WHOLE if key_format == AS_WRITTEN else SHORT


def config(blocks: tuple[int, int]) -> dict[str, Any]:
    return {**REAL_DEPTH, "num_layers": blocks[0], "num_single_layers": blocks[1]}


def weights_of(model: ChromaTransformer) -> dict[str, Tensor]:
    return to_original(model.state_dict(), norm_leaf="weight")


@pytest.fixture(scope="module")
def bases() -> dict[tuple[int, int], dict[str, Tensor]]:
    return {blocks: weights_of(real_depth(*blocks)) for blocks in (WHOLE, SHORT)}


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[tuple[int, int], dict[str, Path]]:
    """Each kind of file as its program writes it, for both models."""
    found = {}
    for blocks in (WHOLE, SHORT):
        folder = tmp_path_factory.mktemp("kinds")
        shapes = shapes_of(real_depth(*blocks))
        found[blocks] = {kind: folder / f"{kind}.safetensors" for kind in KIND_FILES}
        for kind, path in found[blocks].items():
            save_file(foreign_kind(kind, shapes, *blocks), path)
        found[blocks] |= native.own_files(folder / "own", config(blocks))
        assert tuple(found[blocks]) == KIND_FILES + tuple(sorted(OWN))
    return found


@pytest.fixture(scope="module")
def files(sources, tmp_path_factory) -> dict[tuple[str, str], Path]:
    """Each kind of file as its program writes it, and again in every key format that holds it."""
    folder = tmp_path_factory.mktemp("again")
    found = {}
    for kind in KINDS:
        found[kind, AS_WRITTEN] = sources[WHOLE][kind]
        lora = read_lora(sources[SHORT][kind])
        biases = any(module.bias is not None for module in lora.modules.values())
        if any(getattr(module, "rows", None) for module in lora.modules.values()):
            with pytest.raises(LoraError, match="no Kronecker product by itself"):
                write_lora(folder / "refused.safetensors", lora)
            continue
        for key_format in FORMATS:
            style = STYLES[key_format]
            fused_apart = style.fused and kind not in FULL
            if all(map(style.holds, lora.kinds)) and (style.biases or not biases) and not fused_apart:
                found[kind, key_format] = write_lora(folder / f"{kind}-{key_format}.safetensors", lora, key_format)
    return found


@pytest.fixture(scope="module")
def hosts(files, bases, tmp_path_factory) -> dict[tuple[str, str], dict[str, Tensor]]:
    found = {}
    for blocks, base in bases.items():
        names = [name for name in files if depth(name[1]) == blocks]
        paths = tuple(files[name] for name in names)
        weights = native.patched(tmp_path_factory.mktemp("native"), config(blocks), base, paths)
        found |= dict(zip(names, weights, strict=True))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_merged_is_what_the_host_makes_of_the_file(kind, sources, hosts, bases):
    ours = {}
    for blocks, paths in sources.items():
        lora = read_lora(paths[kind])
        assert lora.unmatched == ()
        model = real_depth(*blocks)
        merge(model, lora)
        ours[blocks] = weights_of(model)
    theirs = {key_format: weights for (name, key_format), weights in hosts.items() if name == kind}
    found = {f: relative(ours[depth(f)], weights, bases[depth(f)]) for f, weights in theirs.items()}
    print(kind, found)
    least = {WHOLE: 150, SHORT: 30}
    assert all(changed >= least[depth(f)] and worst <= 1e-5 for f, (worst, changed) in found.items())
    # What docs/lora.md tells: `python -m tools.docs.lora_table`.
    measured = {
        "kinds": lora.kinds,
        "changed": found[AS_WRITTEN][1],
        "apart": float(f"{max(worst for worst, _ in found.values()):.0e}"),
        "formats": [f for f in found if f != AS_WRITTEN],
    }
    kept = recorded("lora_kinds", {**(recorded_now() if WRITE else {}), kind: measured})[kind]
    assert {**kept, "apart": 0} == {**measured, "apart": 0}


def test_every_kind_is_written_for_the_host(files):
    written = {kind: [f for k, f in files if k == kind and f != AS_WRITTEN] for kind in KINDS}
    assert all("universal" in formats for kind, formats in written.items() if kind != "train-LoKr")
    assert written["train-lora"] == written["full"] == ["universal", "ai-toolkit", "kohya"]
    assert "onetrainer" in written["dora-columns"] and "lycoris" in written["oft"]
    for path in files.values():
        assert read_lora(path).unmatched == ()


@pytest.mark.parametrize("kind", KINDS)
def test_the_check_of_a_file_counts_every_kind(kind, files, tmp_path):
    matched, total = native.match(files[kind, AS_WRITTEN], tmp_path, REAL_DEPTH)
    assert matched == total > 100
