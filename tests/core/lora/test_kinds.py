"""The kinds of adapter against independent ones: PEFT's modules with the same factors, and closed forms."""

import math

import pytest
import torch
import torch.nn.functional as F
from peft import LoKrConfig, LoraConfig, get_peft_model
from torch import Tensor, nn

from chroma_core.errors import ConfigError, LoraError
from chroma_core.lora.adapters import AdaptedLinear, branch_of
from chroma_core.lora.modules import AdapterModule, LokrModule, LoraModule
from chroma_core.lora.trainable import factorization
from chroma_core.model.precision import dequantised_weight, precision, quantise_linear
from lora_cases import distance

IN, OUT, RANK = 48, 72, 4


def linear(dtype: torch.dtype = torch.float32) -> nn.Linear:
    generator = torch.Generator().manual_seed(1)
    layer = nn.Linear(IN, OUT)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(OUT, IN, generator=generator) / IN**0.5)
        layer.bias.copy_(torch.randn(OUT, generator=generator))
    return layer.to(dtype).requires_grad_(False)


def module_of(kind: str, alpha: float = 6.0, seed: int = 2) -> AdapterModule:
    """A random adapter of that kind, large enough to matter."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.3

    if kind == "lokr":
        return LokrModule(alpha, w1=normal(8, 6), w2_a=normal(9, 2), w2_b=normal(2, 8))
    if kind == "lokr-whole":
        return LokrModule(alpha, w1=normal(8, 6), w2=normal(9, 8))
    if kind == "lokr-products":
        return LokrModule(alpha, w1_a=normal(8, 2), w1_b=normal(2, 6), w2_a=normal(9, 3), w2_b=normal(3, 8))
    down, up = normal(RANK, IN), normal(OUT, RANK)
    return LoraModule(down, up, alpha, normal(OUT).abs() + 0.5 if kind == "dora" else None)


KINDS = ("lora", "dora", "lokr", "lokr-whole", "lokr-products")


def adapted(base: nn.Module, module: AdapterModule, strength: float = 1.0, trainable: bool = False) -> AdaptedLinear:
    layer = AdaptedLinear(base)
    layer.add(branch_of("a", module.map(torch.clone), strength, trainable=trainable))
    return layer


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 5, IN, generator=torch.Generator().manual_seed(3)).to(dtype)


# --- closed forms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [1.0, -0.4])
@pytest.mark.parametrize("kind", KINDS)
def test_the_branch_computes_its_formula(kind, strength):
    """In fp64 from the definitions, written out with loops where the code has none."""
    base, module, x = linear(), module_of(kind), inputs()
    weight = base.weight.double()
    if isinstance(module, LoraModule):
        update = module.up.double() @ module.down.double() * 6 / RANK
        changed = weight + update
        if module.magnitude is not None:
            for row in range(OUT):
                changed[row] *= module.magnitude[row].double() / changed[row].square().sum().sqrt()
    else:
        w1 = module.w1 if module.w1 is not None else module.w1_a @ module.w1_b
        w2 = module.w2 if module.w2 is not None else module.w2_a @ module.w2_b
        changed = weight.clone()
        for i in range(OUT):
            for j in range(IN):
                entry = w1[i // 9, j // 8] * w2[i % 9, j % 8]
                changed[i, j] += entry * {"lokr": 6 / 2, "lokr-whole": 1.0, "lokr-products": 6 / 3}[kind]
    wanted = F.linear(x.double(), weight + strength * (changed - weight), base.bias.double())
    assert distance(adapted(base, module, strength)(x), wanted) <= 1e-5
    assert distance(adapted(base, module, strength)(x), base(x)) > 0.03
    assert distance(module.delta(base.weight), changed - weight) <= 1e-5
    assert module.shape == (OUT, IN)


@pytest.mark.parametrize("kind", KINDS)
def test_strength_zero_is_the_base_bit_for_bit(kind):
    base, x = linear(), inputs()
    assert torch.equal(adapted(base, module_of(kind), 0.0)(x), base(x))


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_stays_half_precision_and_near(kind):
    base, module, x = linear(torch.bfloat16), module_of(kind), inputs(torch.bfloat16)
    y = adapted(base, module)(x)
    assert y.dtype == torch.bfloat16
    assert distance(y, adapted(linear(), module)(inputs())) < 0.03


def test_a_dora_near_one_is_not_rounded_away_in_bf16():
    """A magnitude 0.1 % above the norm is less than half a step of bf16 at 1."""
    base, x = linear(torch.bfloat16), inputs(torch.bfloat16)
    norms = dequantised_weight(base).norm(dim=1)
    module = LoraModule(torch.zeros(RANK, IN), torch.zeros(OUT, RANK), 4.0, norms * 1.001)
    layer = adapted(base, module)
    plain = base(x)
    share = layer.loras()[0](x, torch.zeros_like(plain), base, plain)
    assert distance(share, 0.001 * (base(x) - base.bias)) < 0.01


@pytest.mark.parametrize("name", ["int8", "nf4"])
def test_dora_on_a_quantised_base_takes_the_norm_of_the_weight_that_computes(name):
    layer = linear()
    base = quantise_linear(layer, precision(name))
    module, x = module_of("dora"), inputs()
    weight = dequantised_weight(base)
    assert distance(weight, layer.weight) > 1e-3
    changed = weight + 1.5 * module.up @ module.down
    changed *= (module.magnitude / changed.norm(dim=1))[:, None]
    assert distance(adapted(base, module)(x), F.linear(x, changed, layer.bias)) <= 1e-5


def test_doras_norm_is_constant_to_the_gradient():
    base, module, x = linear(), module_of("dora"), inputs()
    layer = adapted(base, module, trainable=True)
    down, up, magnitude = layer.loras()[0].factors().values()
    gradients = torch.autograd.grad(layer(x).square().sum(), [down, up, magnitude])
    update = 1.5 * up @ down
    norm = (base.weight + update.detach()).norm(dim=1)
    y = F.linear(x, (magnitude / norm)[:, None] * (base.weight + update), base.bias)
    for found, wanted in zip(gradients, torch.autograd.grad(y.square().sum(), [down, up, magnitude]), strict=True):
        assert distance(found, wanted) <= 1e-5
    changed = base.weight + 1.5 * up @ down
    free = (magnitude / changed.norm(dim=1))[:, None] * changed
    through = torch.autograd.grad(F.linear(x, free, base.bias).square().sum(), [up])[0]
    assert distance(gradients[1], through) > 0.01


def test_a_row_of_zeros_stays_finite_in_dora():
    base = linear()
    base.weight[3] = 0
    norms = base.weight.norm(dim=1)
    layer = adapted(base, LoraModule(torch.ones(RANK, IN), torch.zeros(OUT, RANK), 4.0, norms), trainable=True)
    y = layer(inputs())
    assert torch.equal(y[..., 3], base(inputs())[..., 3])
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), list(layer.loras()[0].parameters())))


def test_lokr_factors_are_lycoris_table():
    """The table in LyCORIS' docstring, without 360, where the code beside it gives others; and Chroma's width."""
    table = {
        127: {-1: (1, 127), 2: (1, 127), 16: (1, 127)},
        128: {-1: (8, 16), 2: (2, 64), 4: (4, 32), 8: (8, 16), 16: (8, 16)},
        250: {-1: (10, 25), 2: (2, 125), 4: (2, 125), 8: (5, 50), 16: (10, 25)},
        512: {-1: (16, 32), 2: (2, 256), 4: (4, 128), 8: (8, 64), 16: (16, 32)},
        1024: {-1: (32, 32), 2: (2, 512), 4: (4, 256), 8: (8, 128), 16: (16, 64)},
        3072: {-1: (48, 64), 8: (8, 384)},
    }
    for size, row in table.items():
        for factor, wanted in row.items():
            assert factorization(size, factor) == wanted


def test_without_the_weight_a_dora_has_no_delta():
    with pytest.raises(LoraError, match="layer's weight"):
        module_of("dora").delta()


def test_dropout_works_in_every_kind_and_needs_a_seed():
    x = inputs()
    for kind in KINDS:
        layer = AdaptedLinear(linear())
        branch = branch_of("a", module_of(kind), dropout=0.5, trainable=True)
        layer.add(branch)
        layer.train()
        with pytest.raises(ConfigError, match="seed_dropout"):
            layer(x)
        outputs = []
        for seed in (1, 2, 1):
            branch.dropout_seed = seed
            outputs.append(layer(x))
        assert torch.equal(outputs[0], outputs[2]) and not torch.equal(outputs[0], outputs[1])


# --- PEFT -------------------------------------------------------------------------------------------------------------


def pefts(config: LoraConfig | LoKrConfig) -> tuple[nn.Module, nn.Module]:
    """PEFT's model around our linear, and its adapted layer."""
    with torch.random.fork_rng(devices=[]):
        model = get_peft_model(nn.Sequential(linear()), config)  # type: ignore[arg-type]
    return model, model.base_model.model[0]


def same_as_peft(module: AdapterModule, theirs: nn.Module, parameters: dict[str, Tensor]) -> None:
    """Outputs and gradients agree to 1e-5, relative to the largest."""
    x = inputs()
    ours = adapted(linear(), module, trainable=True)
    theirs.eval()
    expected = theirs(x)
    assert distance(ours(x).detach(), expected.detach()) <= 1e-5
    wanted = torch.autograd.grad(expected.square().mean(), list(parameters.values()))
    factors = ours.loras()[0].factors()
    found = torch.autograd.grad(ours(x).square().mean(), [factors[name] for name in parameters])
    for gradient, reference in zip(found, wanted, strict=True):
        assert distance(gradient, reference) <= 1e-5


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_low_rank_kinds_are_pefts(kind):
    config = LoraConfig(
        r=RANK, lora_alpha=6, target_modules=["0"], use_rslora=kind == "rslora", use_dora=kind == "dora"
    )
    _, layer = pefts(config)
    module = module_of("dora" if kind == "dora" else "lora", 6 * math.sqrt(RANK) if kind == "rslora" else 6.0)
    assert isinstance(module, LoraModule)
    parameters = {"down": layer.lora_A["default"].weight, "up": layer.lora_B["default"].weight}
    if kind == "dora":
        parameters["magnitude"] = layer.lora_magnitude_vector["default"].weight
        # Both start with the norms of the weight.
        assert distance(parameters["magnitude"], linear().weight.norm(dim=1)) <= 1e-6
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(module.factors()[name])
    same_as_peft(module, layer, parameters)


@pytest.mark.parametrize("kind", ["lokr", "lokr-whole"])
def test_lokr_is_pefts(kind):
    rank = 2 if kind == "lokr" else 32
    # PEFT also scales whole factors by alpha / rank; LyCORIS and ComfyUI do not. Equal at alpha = rank.
    config = LoKrConfig(r=rank, alpha=6 if kind == "lokr" else rank, target_modules=["0"], decompose_factor=-1)
    _, layer = pefts(config)
    module = module_of(kind)
    names = [name for name in ("w1", "w2", "w2_a", "w2_b") if name in module.factors()]
    parameters = {name: getattr(layer, f"lokr_{name}")["default"] for name in names}
    assert {n: p.shape for n, p in parameters.items()} == {n: t.shape for n, t in module.factors().items()}
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(module.factors()[name])
    same_as_peft(module, layer, parameters)
