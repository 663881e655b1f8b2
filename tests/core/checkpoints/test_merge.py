"""LoRAs merged into a checkpoint, against ComfyUI's own model with its own LoRA loader, and against diffusers."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import ChromaTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import native
from chroma_core import files
from chroma_core.checkpoints.merge import MERGED_KEY, merge_loras, norms_on
from chroma_core.cli.main import main
from chroma_core.errors import ConfigError, LoraError, ModelFileError
from chroma_core.files import sha256_file
from chroma_core.loading.load import load_transformer
from chroma_core.loading.model_files import base_warning
from chroma_core.loading.spec import LoraUse, ModelSpec
from chroma_core.lora.adapters import attach, detach, merge
from chroma_core.lora.files import read_lora, write_lora
from chroma_core.lora.modules import LoraFile
from chroma_core.model.latents import unpack
from chroma_core.names.transformer import to_original
from foreign_loras import foreign_kind, shapes_of
from lora_cases import distance, inputs, predict, random_kind, random_lora
from miniature import REAL_DEPTH, real_depth, transformer
from weight_files import write_gguf, write_scaled_fp8

STRENGTH = 0.7


def written(path: Path, model) -> Path:
    save_file({k: v.contiguous() for k, v in to_original(model.state_dict()).items()}, path)
    return path


def spec(path: Path) -> ModelSpec:
    return ModelSpec("tiny", transformer=str(path), precision="fp32")


def loaded(path: Path):
    return load_transformer(spec(path), "cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A Chroma of 19 + 38 blocks as a single file, and two LoRAs on all of its layers, alpha ≠ rank."""
    folder = tmp_path_factory.mktemp("merge")
    model = real_depth()
    written(folder / "base.safetensors", model)
    write_lora(folder / "a.safetensors", random_lora(model, "all+ffs", rank=4, alpha=6.0, size=0.3))
    write_lora(folder / "b.safetensors", random_lora(model, "attention", rank=3, alpha=1.0, seed=5, size=0.3), "kohya")
    return folder, model


@pytest.fixture(scope="module")
def merged(place):
    folder, _ = place
    uses = [LoraUse(str(folder / "a.safetensors"), STRENGTH), LoraUse(str(folder / "b.safetensors"), -0.4)]
    merge_loras(spec(folder / "base.safetensors"), uses, folder / "both.safetensors", dtype="fp32")
    merge_loras(spec(folder / "base.safetensors"), uses[:1], folder / "one.safetensors")
    merge_loras(spec(folder / "base.safetensors"), uses[:1], folder / "one", "diffusers")
    return folder, uses


def test_it_is_what_comfyui_makes_of_the_lora(place, merged, tmp_path):
    """ComfyUI's Chroma of the merged file, against its Chroma of the base with its own patch of the LoRA."""
    folder, model = place
    call = inputs(model)
    rest = unpack(call["latents_BLD"], 8, 8), call["text_BTC"], call["sigma_B"]

    def as_the_host_renames(path: Path) -> dict[str, torch.Tensor]:
        held = load_file(path)
        return {k.removesuffix(".scale") + ".weight" if k.endswith(".scale") else k: v for k, v in held.items()}

    base, patched = native.forward(
        tmp_path / "base", REAL_DEPTH, as_the_host_renames(folder / "base.safetensors"), *rest,
        (folder / "a.safetensors",), STRENGTH,
    )  # fmt: skip
    (ours,) = native.forward(tmp_path / "merged", REAL_DEPTH, as_the_host_renames(folder / "one.safetensors"), *rest)
    assert distance(patched, base) > 0.1
    print(f"merged against ComfyUI's patch: {distance(ours, patched):.1e}")
    assert distance(ours, patched) <= 1e-5


@pytest.mark.parametrize("kind", ["train-lora", "full", "dora-columns", "oft", "native-loha"])
def test_every_kind_is_merged_biases_and_norms_too(tmp_path, kind):
    """What `adapters.merge` makes of the model, which is ComfyUI's own (tests/host/test_foreign_kinds_host.py)."""
    model = transformer()
    base = written(tmp_path / "base.safetensors", model)
    save_file(foreign_kind(kind, shapes_of(model), 2, 2), tmp_path / "lora.safetensors")
    use, lora = LoraUse(str(tmp_path / "lora.safetensors"), 0.5), read_lora(tmp_path / "lora.safetensors")
    merge_loras(spec(base), [use], tmp_path / "merged.safetensors")
    merge(model, lora, 0.5)
    found, wanted = load_file(tmp_path / "merged.safetensors"), to_original(model.state_dict())
    before = load_file(base)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    changed = {name.rpartition(".")[2] for name in wanted if not torch.equal(wanted[name], before[name])}
    assert changed == ({"weight", "bias", "scale"} if kind in ("train-lora", "full") else {"weight"})
    norms = norms_on(lora, spec(base))
    assert norms.weight is not None and norms.change.keys() == lora.modules.keys()
    layer = "transformer_blocks.0.attn.to_q"
    delta = lora.modules[layer].delta(transformer().get_submodule(layer).weight)
    assert norms.change[layer] == pytest.approx(float(delta.norm()), rel=1e-5)


def test_it_is_the_loras_live(place, merged):
    folder, model = place
    call = inputs(model)
    for name, count in (("one.safetensors", 1), ("one", 1), ("both.safetensors", 2)):
        for i, use in enumerate(merged[1][:count]):
            attach(model, read_lora(use.path), use.strength, name=str(i))
        live = predict(model, call)
        for i in range(count):
            detach(model, str(i))
        assert distance(predict(loaded(folder / name), call), live) <= 1e-5, name


def test_diffusers_reads_the_folder(place, merged):
    folder, _ = place
    theirs = ChromaTransformer2DModel.from_pretrained(folder / "one")
    ours = loaded(folder / "one.safetensors").state_dict()
    assert all(torch.equal(weight, ours[name]) for name, weight in theirs.named_parameters())


def test_the_approximator_and_all_that_no_lora_changes_are_the_same_bits(place, merged):
    folder, _ = place
    before, after = load_file(folder / "base.safetensors"), load_file(folder / "both.safetensors")
    same = {name for name, weight in before.items() if torch.equal(weight, after[name])}
    assert before.keys() == after.keys()
    assert {name for name in before if name.startswith("distilled_guidance_layer")} <= same
    assert {n for n in before if n.endswith((".bias", ".scale"))} <= same
    assert not [name for name in same if name.startswith(("double", "single")) and name.endswith(".weight")]


def test_the_header_says_what_was_merged(place, merged):
    folder, uses = place[0], merged[1]
    with safe_open(folder / "both.safetensors", framework="pt") as file:
        header = file.metadata()
    loras = [{"file": Path(use.path).name, "sha256": sha256_file(use.path), "strength": use.strength} for use in uses]
    assert json.loads(header[MERGED_KEY]) == {"loras": loras, "dtype": "fp32"}
    assert header["chromakit.base_sha256"] == sha256_file(folder / "base.safetensors")
    assert header["chromakit.base_file"] == "base.safetensors" and header["modelspec.architecture"] == "chroma"
    assert (
        base_warning({"chromakit.base_sha256": header["chromakit.base_sha256"]}, spec(folder / "base.safetensors"))
        is None
    )


# --- small models


@pytest.fixture
def small(tmp_path):
    model = transformer()
    written(tmp_path / "base.safetensors", model)
    write_lora(tmp_path / "a.safetensors", random_lora(model, "all+ffs", size=0.3))
    return tmp_path, model


def use(folder: Path, name: str = "a", strength: float = STRENGTH, **more) -> LoraUse:
    return LoraUse(str(folder / f"{name}.safetensors"), strength, **more)


def test_a_second_merge_remembers_the_first(small):
    folder, _ = small
    merge_loras(spec(folder / "base.safetensors"), [use(folder)], folder / "m.safetensors")
    merge_loras(spec(folder / "m.safetensors"), [use(folder, strength=-STRENGTH)], folder / "back.safetensors")
    with safe_open(folder / "back.safetensors", framework="pt") as file:
        strengths = [entry["strength"] for entry in json.loads(file.metadata()[MERGED_KEY])["loras"]]
    assert strengths == [STRENGTH, -STRENGTH]
    before, after = load_file(folder / "base.safetensors"), load_file(folder / "back.safetensors")
    assert max(distance(after[name], weight) for name, weight in before.items()) <= 1e-6  # and the base is back


@pytest.mark.parametrize("kind", ["dora", "lokr"])
def test_other_kinds(small, kind):
    folder, model = small
    write_lora(folder / "k.safetensors", random_kind(model, kind, size=0.3))
    merge_loras(spec(folder / "base.safetensors"), [use(folder, "k", 1.0)], folder / "m.safetensors")
    call = inputs(model)
    attach(model, read_lora(folder / "k.safetensors"))
    assert distance(predict(loaded(folder / "m.safetensors"), call), predict(model, call)) <= 1e-5


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [("keep", torch.bfloat16), ("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)],
)
def test_number_formats_are_one_rounding(tmp_path, dtype, kept):
    model = transformer().to(torch.bfloat16)
    written(tmp_path / "base.safetensors", model)
    lora = random_lora(model, "all+ffs", size=0.3)
    write_lora(tmp_path / "a.safetensors", lora)
    merge_loras(spec(tmp_path / "base.safetensors"), [use(tmp_path)], tmp_path / "m.safetensors", dtype=dtype)
    after = load_file(tmp_path / "m.safetensors")
    assert {tensor.dtype for tensor in after.values()} == {kept}
    name = "transformer_blocks.1.ff.net.2"
    wanted = (model.state_dict()[f"{name}.weight"].float() + STRENGTH * lora.modules[name].delta()).to(kept)
    assert torch.equal(after["double_blocks.1.img_mlp.2.weight"], wanted)


@pytest.mark.parametrize("form", ["scaled fp8", "gguf"])
def test_quantised_files_are_unpacked_and_merged_in_fp32(tmp_path, form):
    model = transformer()
    original = to_original(model.state_dict())
    if form == "gguf":
        path = tmp_path / "base.gguf"
        held = write_gguf(path, original, "Q8_0", architecture="flux")
    else:
        path = tmp_path / "base.safetensors"
        held = write_scaled_fp8(path, original)
    lora = random_lora(model, "all+ffs", size=0.3)
    write_lora(tmp_path / "a.safetensors", lora)
    merge_loras(spec(path), [use(tmp_path)], tmp_path / "m.safetensors")
    after = load_file(tmp_path / "m.safetensors")["single_blocks.1.linear2.weight"]
    delta = lora.modules["single_transformer_blocks.1.proj_out"].delta()
    assert torch.equal(after, (held["single_blocks.1.linear2.weight"].float() + STRENGTH * delta).to(torch.bfloat16))


def test_strength_by_block(small):
    folder, model = small
    blocks = "double_blocks.*:0.5, single_blocks.1:0"
    merge_loras(spec(folder / "base.safetensors"), [use(folder, blocks=blocks)], folder / "m.safetensors")
    lora, before, after = (
        read_lora(folder / "a.safetensors"),
        model.state_dict(),
        loaded(folder / "m.safetensors").state_dict(),
    )
    for layer, factor in (("transformer_blocks.0.attn.to_q", 0.5), ("single_transformer_blocks.1.proj_mlp", 0.0),
                          ("single_transformer_blocks.0.proj_mlp", 1.0)):  # fmt: skip
        added = after[f"{layer}.weight"] - before[f"{layer}.weight"]
        assert (added - STRENGTH * factor * lora.modules[layer].delta()).abs().max() <= 1e-6, layer
    with safe_open(folder / "m.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()[MERGED_KEY])["loras"][0]["blocks"] == blocks


def test_a_cancelled_merge_leaves_nothing(small):
    folder, _ = small
    before = sorted(folder.iterdir())

    class Cancelled(Exception):
        pass

    for output, layout in ((folder / "m.safetensors", "original"), (folder / "m", "diffusers")):
        seen = []

        def stop(done: int, total: int, what: str, seen=seen) -> None:
            seen.append((done, total))
            if done == 5:
                raise Cancelled

        with pytest.raises(Cancelled):
            merge_loras(spec(folder / "base.safetensors"), [use(folder)], output, layout, on_part=stop)
        assert [done for done, _ in seen] == list(range(6)) and seen[0][1] > 20
        assert sorted(folder.iterdir()) == before


def test_what_cannot_be_is_refused_before_anything_is_written(small, monkeypatch):
    folder, model = small
    base, out = spec(folder / "base.safetensors"), folder / "m.safetensors"
    (folder / "taken.safetensors").write_bytes(b"mine")
    write_lora(folder / "wide.safetensors", random_lora(transformer(layers=3), "*transformer_blocks.2.attn.to_q"))
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    cases = [
        (lambda: merge_loras(base, [], out), LoraError, "nothing to merge"),
        (lambda: merge_loras(base, [use(folder)], folder / "taken.safetensors"), ModelFileError, "exists already"),
        (lambda: merge_loras(base, [use(folder)], folder / "m"), ModelFileError, "must end in .safetensors"),
        (lambda: merge_loras(base, [use(folder)], out, "diffusers"), ModelFileError, "a folder"),
        (lambda: merge_loras(base, [use(folder)], out, dtype="int8"), ConfigError, "int8"),
        (lambda: merge_loras(base, [use(folder, schedule="0:0,1:1")], out), LoraError, "strength over the steps"),
        (lambda: merge_loras(base, [use(folder, strength=float("nan"))], out), LoraError, "finite"),
        (lambda: merge_loras(base, [use(folder, "wide")], out), LoraError, "changes nothing here"),
        (lambda: merge_loras(base, [use(folder, blocks="double_blocks.7:1")], out), LoraError, "double_blocks.7"),
        (
            lambda: merge_loras(base, [use(folder, strength=1e30)], out, dtype="fp16"),
            LoraError,
            "too large for float16",
        ),
    ]
    for run, kind, says in cases:
        with pytest.raises(kind, match=says):
            run()
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: SimpleNamespace(free=10 << 20))
    with pytest.raises(ModelFileError, match=r"no room for the merged model: about .* GiB are needed in .* are free"):
        merge_loras(base, [use(folder)], out)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_the_command(small, capsys):
    folder, _ = small
    words = ["merge-lora", str(folder / "base.safetensors"), "--lora", f"{folder / 'a.safetensors'}@{STRENGTH}"]
    words += ["--lora-blocks", "single_blocks.*:0.25", "--output", str(folder / "m.safetensors"), "--dtype", "fp32"]
    assert main(words) == 0
    said = capsys.readouterr()
    assert said.out.strip() == str(folder / "m.safetensors")
    assert "1 LoRA merged into m.safetensors" in said.err and "35 layers matched" in said.err
    before = (folder / "m.safetensors").stat().st_mtime_ns
    assert main(words) == 0 and (folder / "m.safetensors").stat().st_mtime_ns == before, "the same again is there"
    capsys.readouterr()
    assert main([*words, "--lora", str(folder / "a.safetensors")]) == 1
    assert "exists already and is another model" in capsys.readouterr().err
    merge_loras(
        spec(folder / "base.safetensors"), [use(folder, blocks="single_blocks.*:0.25")], folder / "n.safetensors"
    )
    first, second = load_file(folder / "m.safetensors"), load_file(folder / "n.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in second)


def test_the_lora_file_of_another_size_is_named(small):
    folder, _ = small
    modules = random_lora(transformer(), "*transformer_blocks.0.attn.to_q").modules
    (name, module), *_ = modules.items()
    half = module.map(lambda tensor: tensor[: tensor.shape[0] // 2] if tensor.shape[0] > 4 else tensor)
    write_lora(folder / "half.safetensors", LoraFile({name: half}))
    with pytest.raises(LoraError, match="does not fit"):
        merge_loras(spec(folder / "base.safetensors"), [use(folder, "half")], folder / "m.safetensors")
