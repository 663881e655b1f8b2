"""A LoRA out of two checkpoints: the one that was merged in, to its rank, and the best there is at a smaller one."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from chroma_core.checkpoints.extract import EXTRACTED_KEY, extract_lora
from chroma_core.checkpoints.merge import merge_loras
from chroma_core.cli.main import main
from chroma_core.errors import LoraError, ModelFileError
from chroma_core.files import sha256_file
from chroma_core.loading.spec import LoraUse, ModelSpec
from chroma_core.lora import lowrank
from chroma_core.lora.files import read_lora, write_lora
from chroma_core.lora.lowrank import Truncation
from chroma_core.names.transformer import to_original
from lora_cases import random_kind, random_lora
from miniature import real_depth, transformer


def spec(path: Path) -> ModelSpec:
    return ModelSpec("tiny", transformer=str(path), precision="fp32")


def written(path: Path, model) -> Path:
    save_file({k: v.contiguous() for k, v in to_original(model.state_dict()).items()}, path)
    return path


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    """‖a − b‖ / ‖b‖."""
    return float((a - b).norm() / b.norm())


def test_what_was_merged_comes_back_at_its_rank(tmp_path):
    model = real_depth()
    base = written(tmp_path / "base.safetensors", model)
    lora = random_lora(model, "all+ffs", rank=4, alpha=6.0, size=0.3)
    write_lora(tmp_path / "a.safetensors", lora)
    merge_loras(spec(base), [LoraUse(str(tmp_path / "a.safetensors"), 0.7)], tmp_path / "m.safetensors")
    made = extract_lora(spec(base), spec(tmp_path / "m.safetensors"), tmp_path / "x.safetensors", Truncation(rank=4))
    back = read_lora(tmp_path / "x.safetensors")
    assert back.modules.keys() == lora.modules.keys() and len(back.modules) == 419
    assert back.ranks == [4] and back.alphas == [4.0] and back.key_format == "universal"
    worst = max(far(back.modules[name].delta(), 0.7 * module.delta()) for name, module in lora.modules.items())
    print(f"extract(base, merged) against the LoRA: {worst:.1e}")
    assert worst <= 1e-4
    assert made.unchanged == 14 and made.left_out == ()  # the embedders and the approximator


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A small model, and one whose every weight of one block was changed at random, biases and a norm too."""
    folder = tmp_path_factory.mktemp("tuned")
    model = transformer()
    written(folder / "base.safetensors", model)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    generator = torch.Generator().manual_seed(3)
    for name, tensor in state.items():
        if name.startswith("single_transformer_blocks.1."):
            tensor += 0.05 * torch.randn(tensor.shape, generator=generator)
    other = transformer()
    other.load_state_dict(state)
    written(folder / "tuned.safetensors", other)
    return folder, model, other


def extracted(folder: Path, name: str, how: Truncation, **more):
    made = extract_lora(
        spec(folder / "base.safetensors"), spec(folder / "tuned.safetensors"), folder / name, how, **more
    )
    return made, read_lora(folder / name)


def test_a_smaller_rank_is_the_truncated_svd_of_the_difference(tuned):
    folder, model, other = tuned
    made, back = extracted(folder, "r5.safetensors", Truncation(rank=5))
    assert set(back.modules) == {
        f"single_transformer_blocks.1.{leaf}"
        for leaf in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out")
    }
    for name, module in back.modules.items():
        delta = (other.state_dict()[f"{name}.weight"] - model.state_dict()[f"{name}.weight"]).double()
        u, s, v = torch.linalg.svd(delta, full_matrices=False)
        best = u[:, :5] * s[:5] @ v[:5]
        assert far(module.delta().double(), best) <= 1e-5, name
        assert made.layers[name].kept == pytest.approx(float(s[:5].square().sum() / s.square().sum()), rel=1e-6)
    assert "1 layer" not in made.report() and "5 layers" in made.report()


def test_what_a_lora_has_no_place_for_is_said(tuned):
    folder, *_ = tuned
    made, _ = extracted(folder, "said.safetensors", Truncation(rank=2))
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in made.left_out} >= {"to_q", "proj_mlp", "norm_q"}
    assert f"WARNING: {len(made.left_out)} tensors differ that a LoRA has no place for" in made.report()


def test_by_energy_the_fewest_directions_that_hold_it(tuned):
    folder, model, other = tuned
    made, back = extracted(folder, "e.safetensors", Truncation(energy=0.8))
    for name, module in back.modules.items():
        delta = (other.state_dict()[f"{name}.weight"] - model.state_dict()[f"{name}.weight"]).double()
        squares = torch.linalg.svdvals(delta).square()
        share = squares.cumsum(0) / squares.sum()
        assert module.rank == int((share < 0.8).sum()) + 1
        assert made.layers[name].kept == pytest.approx(float(share[module.rank - 1]), rel=1e-6) and share[-1] > 0.8
    assert len(back.ranks) > 1
    _, both = extracted(folder, "both.safetensors", Truncation(rank=3, energy=0.8))
    assert both.ranks == [3]


def test_the_header_says_from_what(tuned):
    folder, *_ = tuned
    extracted(folder, "h.safetensors", Truncation(rank=2), dtype="bf16")
    with safe_open(folder / "h.safetensors", framework="pt") as file:
        header = file.metadata()
    base, other = folder / "base.safetensors", folder / "tuned.safetensors"
    assert json.loads(header[EXTRACTED_KEY]) == {
        "tuned": other.name, "tuned_sha256": sha256_file(other), "base": base.name, "base_sha256": sha256_file(base),
        "dtype": "bf16", "rank": 2,
    }  # fmt: skip
    assert header["chromakit.base_sha256"] == sha256_file(base) and header["chromakit.base_file"] == base.name
    assert {t.dtype for n, t in load_file(folder / "h.safetensors").items() if "lora" in n} == {torch.bfloat16}


def test_a_large_layer_is_decomposed_from_random_columns_nearly_as_well(monkeypatch):
    """Of a matrix without any structure, the worst case, and of one whose values fall as those of fine-tunes do."""
    monkeypatch.setattr(lowrank, "SMALL", 64)
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(300, 500, generator=generator)
    u, s, v = torch.linalg.svd(flat, full_matrices=False)
    falling = u * torch.arange(1, 301) ** -0.7 @ v
    torch.manual_seed(11)
    state = torch.get_rng_state()
    for delta, near in ((flat, 0.98), (falling, 0.999)):
        for how in (Truncation(rank=8), Truncation(rank=24)):
            found = lowrank.truncate_matrix(delta, how)
            best = lowrank.truncate_matrix(delta, how, exact=True)
            assert near <= found.kept / best.kept <= 1 + 1e-6
            rest = (delta - found.module.delta()).norm() / (delta - best.module.delta()).norm()
            assert rest <= 1.002
    assert torch.equal(torch.get_rng_state(), state), "the process's random numbers are not touched"
    low = torch.randn(300, 8, generator=generator) @ torch.randn(8, 500, generator=generator)
    assert far(lowrank.truncate_matrix(low, Truncation(rank=8)).module.delta(), low) <= 1e-5


def test_the_same_again_is_the_file_that_is_there(tuned):
    folder, *_ = tuned
    first, _ = extracted(folder, "again.safetensors", Truncation(rank=2))
    before = first.path.stat().st_mtime_ns
    second, _ = extracted(folder, "again.safetensors", Truncation(rank=2))
    assert second.path.stat().st_mtime_ns == before and "there already" in second.report()
    with pytest.raises(LoraError, match="another file"):
        extracted(folder, "again.safetensors", Truncation(rank=3))


def test_what_cannot_be_is_refused(tuned, tmp_path):
    folder, model, _ = tuned
    base, other = spec(folder / "base.safetensors"), spec(folder / "tuned.safetensors")
    out, how = tmp_path / "x.safetensors", Truncation(rank=2)
    written(tmp_path / "deeper.safetensors", transformer(layers=3))
    (tmp_path / "taken.safetensors").write_bytes(b"mine")
    norms = {n: t + (1 if "norm_q" in n else 0) for n, t in model.state_dict().items()}
    changed = transformer()
    changed.load_state_dict(norms)
    written(tmp_path / "norms.safetensors", changed)
    cases = [
        (lambda: extract_lora(base, base, out, how), LoraError, "nothing to extract"),
        (lambda: extract_lora(base, spec(tmp_path / "norms.safetensors"), out, how), LoraError, "Only .*norm_q"),
        (lambda: extract_lora(base, spec(tmp_path / "deeper.safetensors"), out, how), ModelFileError,
         "'transformer_blocks.2.* is no such tensor in the base and .* in the tuned model"),
        (lambda: extract_lora(base, other, tmp_path / "taken.safetensors", how), LoraError, "exists already"),
        (lambda: extract_lora(base, other, tmp_path / "x.pt", how), LoraError, "must end in"),
        (lambda: Truncation(), LoraError, "a rank, or a share"),
        (lambda: Truncation(rank=0), LoraError, "between 1 and 1024"),
        (lambda: Truncation(energy=95), LoraError, "0.95 is 95 %"),
    ]  # fmt: skip
    for run, kind, says in cases:
        with pytest.raises(kind, match=says):
            run()
    assert not out.exists()


def test_other_kinds_come_back_as_plain_loras(tmp_path):
    model = transformer()
    base = written(tmp_path / "base.safetensors", model)
    lora = random_kind(model, "dora", "attention", size=0.3)
    write_lora(tmp_path / "d.safetensors", lora)
    merge_loras(spec(base), [LoraUse(str(tmp_path / "d.safetensors"))], tmp_path / "m.safetensors")
    extract_lora(spec(base), spec(tmp_path / "m.safetensors"), tmp_path / "x.safetensors", Truncation(rank=32))
    back = read_lora(tmp_path / "x.safetensors")
    for name, module in lora.modules.items():
        assert far(back.modules[name].delta(), module.delta(model.state_dict()[f"{name}.weight"])) <= 1e-4


def test_the_command(tuned, tmp_path, capsys):
    folder, *_ = tuned
    words = [str(folder / "base.safetensors"), str(folder / "tuned.safetensors"), "--device", "cpu"]
    out = tmp_path / "x.safetensors"
    assert main(["extract-lora", *words, "--rank", "4", "--exact", "--output", str(out)]) == 0
    said = capsys.readouterr()
    assert said.out.strip() == str(out) and "Rank 4 in 5 layers" in said.err
    assert read_lora(out).dtypes == ["bfloat16"]
    assert main(["extract-lora", *words, "--output", str(tmp_path / "y.safetensors")]) == 1
    assert "a rank, or a share" in capsys.readouterr().err
