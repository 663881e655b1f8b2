"""LoRAs at a smaller rank: as good as the truncated SVD of ΔW, which is never built; files and the command."""

import json

import pytest
import torch

from chroma_core.cli.main import main
from chroma_core.errors import LoraError
from chroma_core.lora.convert import convert_lora
from chroma_core.lora.files import read_lora, write_lora
from chroma_core.lora.lowrank import Truncation, truncate_module
from chroma_core.lora.modules import LokrModule, LoraFile, LoraModule
from chroma_core.lora.resize import resize
from lora_cases import equal, random_kind, random_lora
from miniature import transformer

NAME = "transformer_blocks.0.attn.to_q"


def random_module(rank: int = 12, rows: int = 96, columns: int = 64, alpha: float = 5.0) -> LoraModule:
    generator = torch.Generator().manual_seed(rank)
    scales = torch.arange(1, rank + 1) ** -0.5
    down = torch.randn(rank, columns, generator=generator) * scales[:, None]
    return LoraModule(down, torch.randn(rows, rank, generator=generator), alpha)


def best(delta: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, v = torch.linalg.svd(delta.double(), full_matrices=False)
    return u[:, :rank] * s[:rank] @ v[:rank]


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("rank", [1, 4, 11])
@pytest.mark.parametrize("alpha", [5.0, -3.0])
def test_it_is_the_truncated_svd_of_the_update(rank, alpha):
    module = random_module(alpha=alpha)
    small = truncate_module(module, Truncation(rank=rank))
    assert (small.module.rank, small.module.alpha, small.module.scale) == (rank, rank, 1.0)
    assert far(small.module.delta(), best(module.delta(), rank)) <= 1e-5
    squares = torch.linalg.svdvals(module.delta().double()).square()
    assert small.kept == pytest.approx(float(squares[:rank].sum() / squares.sum()), rel=1e-6)


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.999])
def test_by_energy_the_fewest_directions_that_hold_it(energy):
    module = random_module()
    squares = torch.linalg.svdvals(module.delta().double()).square()
    share = squares.cumsum(0) / squares.sum()
    small = truncate_module(module, Truncation(energy=energy))
    assert small.module.rank == int((share < energy).sum()) + 1 and small.kept >= energy


def test_all_of_the_energy_is_all_of_the_update():
    module = random_module()
    doubled = LoraModule(torch.cat([module.down, module.down]), torch.cat([module.up, module.up], 1), 10.0)
    small = truncate_module(doubled, Truncation(energy=1.0))  # rank 24 by its shape, 12 in truth
    assert small.module.rank == 12 and far(small.module.delta(), doubled.delta()) <= 1e-5


def test_wider_than_the_layer():
    """A rank above a layer's own sides, as fused layers that were split have it."""
    module = random_module(rank=80, rows=24, columns=40)
    small = truncate_module(module, Truncation(rank=6))
    assert far(small.module.delta(), best(module.delta(), 6)) <= 1e-5


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("alpha", [3.0, -3.0])
def test_a_kronecker_product_becomes_the_best_plain_lora(whole, alpha):
    generator = torch.Generator().manual_seed(4)
    w1, b = torch.randn(8, 4, generator=generator), torch.randn(2, 16, generator=generator)
    a = torch.randn(12, 2, generator=generator)
    module = LokrModule(alpha, w1=w1, w2=a @ b) if whole else LokrModule(alpha, w1=w1, w2_a=a, w2_b=b)
    small = truncate_module(module, Truncation(rank=5))
    assert far(small.module.delta(), best(module.delta(), 5)) <= 1e-5
    part = LokrModule(alpha, w1=w1, w2=a @ b, rows=(5, 70))
    assert far(truncate_module(part, Truncation(rank=5)).module.delta(), best(part.delta(), 5)) <= 1e-5


def test_a_layer_that_is_small_enough_stays_bit_for_bit():
    lora = LoraFile({NAME: random_module(4), "proj_out": random_module(12)}, {"a": "b"})
    made = resize(lora, Truncation(rank=6))
    assert made.lora.modules[NAME] is lora.modules[NAME] and made.lora.modules["proj_out"].rank == 6
    assert made.lora.metadata == {"a": "b"}
    assert made.layers[NAME].kept == 1.0 and (made.layers["proj_out"].before, made.layers["proj_out"].after) == (12, 6)
    assert "Rank 4 to 6 in 2 layers" in made.summary() and "least in proj_out" in made.summary()
    assert len(made.table().splitlines()) == 3


def test_an_untrained_layer_stays_nothing():
    still = LoraModule(torch.randn(8, 16), torch.zeros(24, 8), 8.0)
    made = resize(LoraFile({NAME: still}), Truncation(energy=0.9)).lora.modules[NAME]
    assert made.rank == 1 and not made.delta().any()


def test_the_magnitudes_of_a_dora_stay():
    lora = random_kind(transformer(), "dora", "attention")
    made = resize(lora, Truncation(rank=2)).lora
    assert made.kinds == ["dora"] and made.ranks == [2]
    assert all(torch.equal(made.modules[n].magnitude, m.magnitude) for n, m in lora.modules.items())


def test_memory_grows_with_the_rank_and_not_with_the_matrix():
    """At the width of the real model: ΔW would take 151 MB in fp32, the factors take 4."""
    torch.manual_seed(0)
    module = LoraModule(torch.randn(32, 3072), torch.randn(12288, 32), 32.0)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for each in out if isinstance(out, tuple | list) else (out,):
                if isinstance(each, torch.Tensor):
                    largest = max(largest, each.numel())
            return out

    with Watch():
        truncate_module(module, Truncation(rank=8))
    assert largest <= 12288 * 32


def test_the_file_keeps_its_header_and_says_what_was_done(tmp_path):
    lora = random_lora(transformer(), rank=8)
    path = write_lora(tmp_path / "mine.safetensors", LoraFile(lora.modules, {"chromakit.trigger": "sks"}))
    made = convert_lora(path, "universal", shrink=Truncation(rank=3, energy=0.9))
    assert made.path.name == "mine-r3-e90.safetensors" and "is kept on average" in made.report()
    header = read_lora(made.path).metadata
    assert header["chromakit.trigger"] == "sks"
    assert json.loads(header["chromakit.converted_from"]) | {"rank": 3, "energy": 0.9} == json.loads(
        header["chromakit.converted_from"]
    )
    again = convert_lora(path, "universal", shrink=Truncation(rank=3, energy=0.9))
    assert again.path == made.path and equal(again.lora, made.lora)
    assert convert_lora(path, "kohya", shrink=Truncation(rank=3)).path.name == "mine-r3.safetensors"
    with pytest.raises(LoraError, match="between 1 and 1024"):
        convert_lora(path, "universal", shrink=Truncation(rank=-1))


def test_the_command(tmp_path, capsys):
    path = write_lora(tmp_path / "mine.safetensors", random_lora(transformer(), rank=8))
    assert main(["resize-lora", str(path), "--rank", "2", "--layers", "--dtype", "bf16"]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[0] == str(tmp_path / "mine-r2.safetensors") and len(said.out.splitlines()) == 37
    assert "Rank 2 in 35 layers" in said.err
    assert read_lora(tmp_path / "mine-r2.safetensors").ranks == [2]
    assert main(["resize-lora", str(path), "--energy", "0.5", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["layers"]) == 35 and all(layer["kept"] >= 0.5 for layer in report["layers"].values())
    assert main(["resize-lora", str(path)]) == 1 and "a rank, or a share" in capsys.readouterr().err
