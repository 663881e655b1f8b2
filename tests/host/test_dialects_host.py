"""Every dialect that is written, and files by every trainer's names, in ComfyUI's own loader, PEFT and diffusers."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import native
from chroma_core.lora.adapters import attach, detach
from chroma_core.lora.files import read_lora, write_lora
from chroma_core.lora.key_formats import KEY_FORMATS
from chroma_core.lora.modules import LoraFile
from chroma_core.model.latents import unpack
from chroma_core.model.transformer import ChromaTransformer
from chroma_core.names.transformer import to_original
from foreign_loras import HEADS, foreign
from lora_cases import distance, inputs, predict, random_kind, random_lora
from miniature import REAL_DEPTH, real_depth

STRENGTH = 0.7
HOST_READS = [dialect for dialect in KEY_FORMATS if dialect != "peft"]
FOREIGN = [trainer for trainer in HEADS if trainer != "peft"]
DIFFUSERS_READS = ["universal", "diffusers", "simpletuner"]


@pytest.fixture(scope="module")
def model() -> ChromaTransformer:
    """19 + 38 blocks of width 32, with weights large enough that every block matters."""
    return real_depth()


@pytest.fixture(scope="module")
def files(model, tmp_path_factory) -> dict[str, Path]:
    """One LoRA on 419 layers, alpha ≠ rank, in every dialect; a LoKr in those that hold it; each trainer's own file."""
    folder = tmp_path_factory.mktemp("dialects")
    made = random_lora(model, "all+ffs", rank=4, alpha=6.0, size=0.3)
    found = {name: write_lora(folder / f"{name}.safetensors", made, name) for name in KEY_FORMATS}
    lokr = random_kind(model, "lokr", "attention", size=0.3)
    found |= {
        f"lokr-{name}": write_lora(folder / f"lokr-{name}.safetensors", lokr, name) for name in ("universal", "lycoris")
    }
    for trainer in FOREIGN:
        alpha = None if trainer in ("ai-toolkit", "simpletuner") else 6.0
        tensors, _ = foreign(trainer, 32, 19, 38, alpha, size=0.2)
        found[f"foreign-{trainer}"] = folder / f"foreign-{trainer}.safetensors"
        save_file(tensors, found[f"foreign-{trainer}"])
    return found


@pytest.fixture(scope="module")
def call(model) -> dict[str, Tensor]:
    return inputs(model)


@pytest.fixture(scope="module")
def ours(model, files, call) -> dict[str, Tensor]:
    """What each file changes in our velocity [B, C, H, W]."""
    base = predict(model, call)
    changes = {}
    for name, path in files.items():
        attach(model, read_lora(path), STRENGTH)
        changes[name] = unpack(predict(model, call) - base, 8, 8)
        detach(model, "lora")
    return changes


@pytest.fixture(scope="module")
def hosts(model, files, call, tmp_path_factory) -> dict[str, Tensor]:
    """What each file changes in the host's."""
    names = [name for name in files if name != "peft"]
    first, *others = native.forward(
        tmp_path_factory.mktemp("native"),
        REAL_DEPTH,
        to_original(model.state_dict(), norm_leaf="weight"),
        unpack(call["latents_BLD"], 8, 8),
        call["text_BTC"],
        call["sigma_B"],
        tuple(files[name] for name in names),
        STRENGTH,
    )
    return {name: other - first for name, other in zip(names, others, strict=True)}


@pytest.mark.parametrize(
    "name", [*HOST_READS, "lokr-universal", "lokr-lycoris", *(f"foreign-{trainer}" for trainer in FOREIGN)]
)
def test_the_host_changes_the_output_as_we_do(ours, hosts, name):
    print(f"{name}: relative difference of the change {distance(hosts[name], ours[name]):.2e}")
    assert ours[name].abs().max() > 0.01
    assert distance(hosts[name], ours[name]) <= 1e-4


def test_all_dialects_are_one_lora(ours):
    for name in KEY_FORMATS:
        assert distance(ours[name], ours["universal"]) <= 1e-5, name


@pytest.fixture(scope="module")
def reference(model):
    """The same weights in diffusers' own class; who does not need it does not wait for its import."""
    from diffusers import ChromaTransformer2DModel

    made = ChromaTransformer2DModel(**REAL_DEPTH)
    made.load_state_dict(model.state_dict())
    return made.requires_grad_(False).eval()


def velocity(transformer, call: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        out = transformer(
            hidden_states=call["latents_BLD"],
            encoder_hidden_states=call["text_BTC"],
            timestep=call["sigma_B"],
            img_ids=call["img_ids_L3"],
            txt_ids=torch.zeros(call["text_BTC"].shape[1], 3),
        ).sample
    return unpack(out, 8, 8)


def loaded_by_diffusers(reference, path: Path, call: dict[str, Tensor], strength: float) -> Tensor:
    """What a file changes when `ChromaPipeline.load_lora_weights` reads it."""
    from diffusers import ChromaPipeline, FlowMatchEulerDiscreteScheduler

    pipeline = ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=None,  # type: ignore[arg-type]
        text_encoder=None,  # type: ignore[arg-type]
        tokenizer=None,  # type: ignore[arg-type]
        transformer=reference,
    )
    before = velocity(reference, call)
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name="theirs")
    pipeline.set_adapters("theirs", strength)
    after = velocity(reference, call)
    pipeline.delete_adapters("theirs")
    return after - before


@pytest.mark.parametrize("name", DIFFUSERS_READS)
def test_diffusers_loads_what_is_its(reference, files, ours, call, name):
    assert distance(loaded_by_diffusers(reference, files[name], call, STRENGTH), ours[name]) <= 1e-4


def test_a_dora_reaches_diffusers_with_its_magnitudes(reference, model, call, tmp_path):
    """In the diffusers dialect; in the universal one it drops them with a warning."""
    lora = random_kind(model, "dora", "attention", size=0.3)
    path = write_lora(tmp_path / "dora.safetensors", lora, "diffusers")
    base = predict(model, call)
    attach(model, lora)
    mine = unpack(predict(model, call) - base, 8, 8)
    detach(model, "lora")
    assert distance(loaded_by_diffusers(reference, path, call, 1.0), mine) <= 1e-4


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_peft_loads_what_is_its(model, call, tmp_path, kind):
    """Ranks and alphas of their own for some layers, and the last layer beside the 38 of the same ending."""
    from diffusers import ChromaTransformer2DModel
    from peft import PeftModel

    lora = random_kind(model, kind, "all+ffs", size=0.3)
    narrow = random_lora(model, "single_transformer_blocks.*.proj_out", rank=2, alpha=5.0, size=0.3)
    if kind == "lora":
        lora = LoraFile({**lora.modules, **narrow.modules})
    path = write_lora(tmp_path / "mine", lora, "peft")
    base = predict(model, call)
    attach(model, lora)
    mine = unpack(predict(model, call) - base, 8, 8)
    detach(model, "lora")
    fresh = ChromaTransformer2DModel(**REAL_DEPTH)
    fresh.load_state_dict(model.state_dict())
    before = velocity(fresh.eval(), call)
    loaded = PeftModel.from_pretrained(fresh, path.parent).eval()
    adapted = {name for name, module in fresh.named_modules() if hasattr(module, "lora_A")}
    assert {name.removeprefix("base_model.model.") for name in adapted} == set(lora.modules)
    assert distance(velocity(loaded, call) - before, mine) <= 1e-4
