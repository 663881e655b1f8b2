"""Writing LoRAs in other programs' names: round trips, fused layers, alpha, and what a dialect cannot hold."""

from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from chroma_core.errors import LoraError
from chroma_core.lora.files import read_lora, write_lora
from chroma_core.lora.key_formats import KEY_FORMATS, STYLES, fuse, holders
from chroma_core.lora.modules import LoraFile, LoraModule
from chroma_core.model.transformer import ChromaTransformer
from chroma_core.names.transformer import to_diffusers_modules
from lora_cases import distance, equal, random_kind, random_lora
from miniature import transformer

FOLDED = [name for name, style in STYLES.items() if style.alpha == "folded"]
FUSED = [name for name, style in STYLES.items() if style.fused]
KEYS = {
    "universal": "transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
    "peft": "base_model.model.transformer_blocks.0.attn.to_q.lora_A.weight",
    "diffusers": "transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
    "kohya": "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight",
    "ai-toolkit": "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight",
    "onetrainer": "lora_transformer_transformer_blocks_0_attn_to_q.lora_down.weight",
    "simpletuner": "transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
    "lycoris": "lycoris_transformer_blocks_0_attn_to_q.lora_down.weight",
}


def uneven(alpha: float | None = None) -> LoraFile:
    """Ranks and alphas that differ from layer to layer; alpha: one factor for all, as alpha / rank."""
    made, wide = random_lora(transformer(), rank=4, alpha=8), random_lora(transformer(), rank=6, alpha=3, seed=4)
    modules = {name: (wide if i % 3 else made).modules[name] for i, name in enumerate(made.modules)}
    if alpha is not None:
        modules = {name: replace(m, alpha=alpha * m.rank) for name, m in modules.items()}
    return LoraFile(modules, {"chromakit.trigger": "sks"})


@pytest.mark.parametrize("dialect", KEY_FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_exact(tmp_path, dialect, dtype):
    """Every bit, ranks and alphas included; where alpha is folded, at a factor of 1."""
    lora = uneven(1.0 if dialect in FOLDED else None)
    lora = LoraFile({name: m.to(dtype) for name, m in lora.modules.items()}, lora.metadata)
    if dialect in FUSED:  # one alpha a layer: the parts of one need the same factor for every bit to be kept
        lora = LoraFile({name: replace(m, alpha=1.5 * m.rank) for name, m in lora.modules.items()}, lora.metadata)
        lora = uneven(1.0) if dialect in FOLDED else lora
    path = write_lora(tmp_path / "a.safetensors", lora, dialect)
    with safe_open(path, "pt") as file:
        assert KEYS[dialect] in file.keys()  # noqa: SIM118
        assert (any(key.endswith(".alpha") for key in file.keys())) == (STYLES[dialect].alpha == "tensor")  # noqa: SIM118
    read = read_lora(path)
    assert equal(read, lora) and read.unmatched == () and read.metadata["chromakit.trigger"] == "sks"
    again = write_lora(tmp_path / "b.safetensors", read, dialect)
    assert load_file(path).keys() == load_file(again).keys()
    assert all(torch.equal(tensor, load_file(again)[key]) for key, tensor in load_file(path).items())


@pytest.mark.parametrize("dialect", KEY_FORMATS)
def test_the_update_is_kept_whatever_alpha_is(tmp_path, dialect):
    lora = uneven()
    read = read_lora(write_lora(tmp_path / "a.safetensors", lora, dialect))
    assert read.modules.keys() == lora.modules.keys()
    for name, module in lora.modules.items():
        assert distance(read.modules[name].delta(), module.delta()) <= 1e-6
    states = {"tensor": "tensors", "config": "configuration", "folded": "absent"}
    assert read.alpha_source == ("configuration" if dialect == "diffusers" else states[STYLES[dialect].alpha])
    if dialect in FOLDED:  # a reader that knows nothing of alpha applies 1: that must be right
        assert all(module.scale == 1 for module in read.modules.values())


@pytest.mark.parametrize("dialect", FUSED)
def test_parts_with_one_down_matrix_keep_their_rank_and_others_add_up(tmp_path, dialect):
    apart = random_lora(transformer(), rank=4, alpha=4)
    down = apart.modules["single_transformer_blocks.0.attn.to_q"].down
    shared = {
        name: replace(m, down=down) if name.startswith("single_transformer_blocks.0.") and "proj_out" not in name else m
        for name, m in apart.modules.items()
    }
    path = write_lora(tmp_path / "a.safetensors", LoraFile(shared), dialect)
    ranks = {key: len(t) for key, t in load_file(path).items() if "lora_A" in key or "lora_down" in key}

    def rank(name: str) -> int:
        return next(found for key, found in ranks.items() if name in key.replace(".", "_"))

    assert rank("single_blocks_0_linear1") == 4 and rank("single_blocks_1_linear1") == 16
    assert rank("double_blocks_1_txt_attn_qkv") == 12 and rank("double_blocks_1_img_mlp_0") == 4
    assert equal(read_lora(path), LoraFile(shared))


@pytest.mark.parametrize("dialect", FUSED)
def test_a_part_without_a_lora_stays_unchanged(tmp_path, dialect):
    lora = random_lora(transformer(), "*.to_q, *.add_v_proj", rank=4, alpha=4)
    path = write_lora(tmp_path / "a.safetensors", lora, dialect)
    ups = [t for key, t in load_file(path).items() if "lora_B" in key or "lora_up" in key]
    assert sorted({len(up) for up in ups}) == [96, 224]  # whole qkv (3 · 32) and linear1 (3 · 32 + 128)
    assert equal(read_lora(path), lora)


def test_the_fused_update_is_the_parts_one_above_the_other():
    lora = uneven()
    for original in ("double_blocks.1.txt_attn.qkv", "single_blocks.1.linear1"):
        rows = to_diffusers_modules(original) or ()
        made = fuse(original, [(row, lora.modules[row.name]) for row in rows])
        assert distance(made.delta(), torch.cat([lora.modules[row.name].delta() for row in rows])) <= 1e-6


def test_published_sizes():
    """q, k, v of 3072 rows each, and linear1 of 3 · 3072 + 12288; in and out widths as published."""
    with torch.device("meta"):
        model = ChromaTransformer(num_layers=1, num_single_layers=1)
    lora = random_lora(model, "all+ffs", rank=2, alpha=2)
    for original, height in {"double_blocks.0.img_attn.qkv": 9216, "single_blocks.0.linear1": 21504}.items():
        rows = to_diffusers_modules(original) or ()
        # Whole numbers: their products and sums are exact, in whatever order a processor adds them.
        modules = [lora.modules[row.name].map(lambda factor: (64 * factor).round()) for row in rows]
        made = fuse(original, list(zip(rows, modules, strict=True)))
        assert made.shape == (height, 3072) and made.rank == 2 * len(rows)
        column = torch.zeros(3072)
        column[7] = 1.0  # one column of the update instead of 66 million numbers
        whole = made.up @ (made.down @ column)
        apart = [module.up @ (module.down @ column) for module in modules]
        assert any(bool(part.any()) for part in apart)
        assert torch.equal(whole, torch.cat(apart))
        assert [row.span(height) for row in rows][-1] == ((9216, 21504) if height == 21504 else (6144, 9216))


@pytest.mark.parametrize("kind", ["dora", "lokr"])
@pytest.mark.parametrize("dialect", KEY_FORMATS)
def test_a_kind_is_kept_or_refused_with_a_way_out(tmp_path, dialect, kind):
    model = transformer()
    lora = random_kind(model, kind)
    if dialect in holders(kind):
        if dialect == "diffusers":
            lora = LoraFile({name: replace(m, alpha=float(m.rank)) for name, m in lora.modules.items()})
        path = write_lora(tmp_path / "a.safetensors", lora, dialect)
        assert equal(read_lora(path), lora)
    else:
        with pytest.raises(LoraError, match=f"{dialect} key format.*universal"):
            write_lora(tmp_path / "a.safetensors", lora, dialect)
        assert not list(tmp_path.iterdir())


def test_a_part_whose_alpha_is_zero_leaves_the_others_their_strength(tmp_path):
    random = torch.Generator().manual_seed(0)
    parts = {
        f"transformer_blocks.0.attn.to_{part}": LoraModule(
            torch.randn(2, 8, generator=random), torch.randn(8, 2, generator=random), alpha
        )
        for part, alpha in (("q", 0.0), ("k", 3.0))
    }
    found = read_lora(write_lora(tmp_path / "a.safetensors", LoraFile(parts), "kohya"))
    (name,) = found.modules  # what changes nothing takes no columns
    assert equal(LoraFile({name: found.modules[name]}), LoraFile({name: parts["transformer_blocks.0.attn.to_k"]}))


def test_dora_on_a_part_of_a_fused_layer_is_refused(tmp_path):
    lora = random_kind(transformer(), "dora", "*.to_q")
    with pytest.raises(LoraError, match="1 of its 3 parts are DoRA"):
        write_lora(tmp_path / "a.safetensors", lora, "kohya")
    mixed = LoraFile(random_lora(transformer(), "context").modules | lora.modules)
    with pytest.raises(LoraError, match="one kind for all"):
        write_lora(tmp_path / "a.safetensors", mixed, "peft")


def test_what_is_no_dialect_or_no_layer(tmp_path):
    lora = random_lora(transformer(), "context")
    with pytest.raises(LoraError, match="no key format.*universal, peft"):
        write_lora(tmp_path / "a.safetensors", lora, "webui")
    other = LoraFile({"elsewhere": next(iter(lora.modules.values()))})
    with pytest.raises(LoraError, match="no layer of Chroma"):
        write_lora(tmp_path / "a.safetensors", other, "kohya")
