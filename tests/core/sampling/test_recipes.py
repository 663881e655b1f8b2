"""Recipes as data: each field against its reference, and overrides."""

import re

import pytest
import torch
from diffusers import AutoencoderKL, ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

from chroma_core.errors import ConfigError
from chroma_core.model.latents import unpack
from chroma_core.parity.with_diffusers import text_encoder_of
from chroma_core.parity.with_diffusers import theirs as as_theirs
from chroma_core.sampling.recipe import RECIPES, Recipe, parse_overrides, recipe
from chroma_core.sampling.sampler import SamplingSettings, initial_noise, sample
from chroma_core.sampling.text import MAX_TOKENS, TextCondition, TextEncoder
from chroma_core.training.config import TrainingConfig
from miniature import t5, tokenizer, transformer, vae

PROMPT, SEED, SIDE = "a red circle", 5, 64


def encoder() -> TextEncoder:
    return TextEncoder(t5(), tokenizer())


def test_the_table():
    """DESIGN's table, field by field."""
    fields = ("text_attention", "visible_padding", "noise_dtype", "time_dtype", "latents_dtype", "size_multiple")
    rows = {name: [getattr(value, f) for f in fields] for name, value in RECIPES.items()}
    assert rows == {
        "canonical": ["masked", 1, "fp32", "fp32", "fp32", 32],
        "comfyui": ["unpadded", 0, "fp32", "fp32", "fp32", 16],
        "ai-toolkit": ["full", 1, "bf16", "bf16", "bf16", 32],
        "diffusers": ["masked", 1, "model", "model", "model", 16],
    }
    assert all(value.flow_shift == "dynamic" for value in RECIPES.values())
    assert [name for name, value in RECIPES.items() if value.multistep_time == "log_sigma"] == ["comfyui"]


@pytest.fixture(scope="module")
def pipeline() -> ChromaPipeline:
    """diffusers' whole pipeline around the same weights, with the scheduler that the repository states for it."""
    made = ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=as_theirs(AutoencoderKL, vae()),
        text_encoder=as_theirs(text_encoder_of, t5()),
        tokenizer=tokenizer(),  # type: ignore[arg-type]
        transformer=as_theirs(ChromaTransformer2DModel, transformer()),
    )
    made.set_progress_bar_config(disable=True)
    return made


def theirs(pipeline: ChromaPipeline, guidance: float = 3.0) -> torch.Tensor:
    packed = pipeline(
        PROMPT,
        negative_prompt="",
        width=SIDE,
        height=SIDE,
        num_inference_steps=25,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(SEED),
        output_type="latent",
    ).images  # type: ignore[union-attr]
    return unpack(packed, SIDE // 8, SIDE // 8)


def test_diffusers_is_its_pipeline_with_the_mask_made_boolean(pipeline, monkeypatch):
    """Text, noise, sigmas and steps; its float mask, which attention adds to its scores, is another matter."""
    settings, texts, rules = SamplingSettings(25, 3.0, SEED), encoder(), RECIPES["diffusers"]
    prompts = [texts.encode(PROMPT, rules)], texts.encode("", rules)
    ours = sample(transformer(), *prompts, width=SIDE, height=SIDE, settings=settings, recipe=rules)
    as_it_is = theirs(pipeline)
    prepare = ChromaPipeline._prepare_attention_mask
    monkeypatch.setattr(ChromaPipeline, "_prepare_attention_mask", lambda *a, **k: prepare(*a, **k).bool())
    error, with_float_mask = ((x - ours).abs().max() / ours.abs().max() for x in (theirs(pipeline), as_it_is))
    print(f"boolean mask {error:.1e}, float mask {with_float_mask:.1e}")
    assert error <= 1e-4 < 1e-2 < with_float_mask


def test_diffusers_draws_noise_in_the_models_dtype():
    model = transformer().to(torch.bfloat16)
    model_noise = torch.randn((1, 16, 8, 8), generator=torch.Generator().manual_seed(SEED), dtype=torch.bfloat16)
    assert torch.equal(start_of(RECIPES["diffusers"], model), model_noise.float())
    assert torch.equal(start_of(RECIPES["canonical"], model), initial_noise([SEED], (16, 8, 8)))


def start_of(rules: Recipe, model=None) -> torch.Tensor:
    """The latents that the first step starts from: with v = 0 a step changes nothing."""
    model = model or transformer()
    torch.nn.init.zeros_(model.proj_out.weight)
    torch.nn.init.zeros_(model.proj_out.bias)
    text = TextCondition(torch.zeros(3, 32), "", 2)
    return sample(model, [text], None, width=SIDE, height=SIDE, settings=SamplingSettings(1, 1.0, SEED), recipe=rules)


class Listening(torch.nn.Module):
    """v = 1 everywhere; writes down at which times it is asked, and with which latents."""

    def __init__(self):
        super().__init__()
        self.x_embedder = torch.nn.Linear(1, 1)
        self.times, self.latents = [], []

    def at_step(self, place):
        pass

    def modulation(self, sigma):
        return sigma[:, None, None]

    def forward(self, latents, text, sigma, ids, mask, modulation):
        self.times.append(float(sigma[0]))
        self.latents.append(latents)
        return torch.ones_like(latents)


def test_ai_toolkit_field_by_field():
    rules = RECIPES["ai-toolkit"]
    text, model = TextCondition(torch.zeros(3, 32), "", 2), Listening()
    sample(model, [text], None, width=SIDE, height=SIDE, settings=SamplingSettings(7, 1.0, SEED), recipe=rules)  # type: ignore[arg-type]
    # Noise: one draw in bf16 on the CPU. On torch 2.11 that is another sequence than the fp32 draw rounded.
    noise = torch.randn((1, 16, 8, 8), generator=torch.Generator().manual_seed(SEED), dtype=torch.bfloat16).float()
    assert torch.equal(start_of(rules), noise)
    # Time and latents between steps: nothing but bf16 values.
    exact = SamplingSettings(7).sigmas(16, rules)[:-1]
    assert model.times == exact.to(torch.bfloat16).float().tolist() != exact.tolist()
    assert all(torch.equal(x, x.to(torch.bfloat16).float()) for x in model.latents)
    # Text: T5 sees 512 tokens and masks none; the transformer sees n + 1.
    texts = encoder()
    ids = texts.tokenizer(PROMPT).input_ids
    padded = torch.tensor([ids + [texts.tokenizer.pad_token_id] * (MAX_TOKENS - len(ids))])
    with torch.no_grad():
        states = texts.model(padded, torch.ones_like(padded))[0]
    found = texts.encode(PROMPT, rules).states
    assert torch.equal(found, states[: len(ids) + 1])
    assert (found - texts.encode(PROMPT, RECIPES["canonical"]).states).abs().max() > 1e-3


def test_overrides_change_what_they_name_and_nothing_else():
    base = RECIPES["canonical"]
    changed = base.override(parse_overrides("noise_dtype=bf16, flow_shift = 3.0,\n visible_padding=2"))
    assert (changed.noise_dtype, changed.flow_shift, changed.visible_padding) == ("bf16", 3.0, 2)
    kept = {"text_attention", "time_dtype", "latents_dtype", "size_multiple", "multistep_time"}
    assert all(getattr(changed, field) == getattr(base, field) for field in kept)
    assert changed.name == "canonical with noise_dtype=bf16, flow_shift=3.0, visible_padding=2"
    assert Recipe.from_dict(changed.to_dict()) == changed
    assert base.override({}) is base and base.override({"noise_dtype": "fp32"}) is base
    assert recipe("comfyui", {"size_multiple": "32"}).size_multiple == 32
    assert "latents_dtype=fp32" in changed.describe() and changed.describe().startswith(changed.name)
    assert torch.equal(start_of(changed), start_of(RECIPES["ai-toolkit"]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("noise=bf16", "no field 'noise' to override. The fields are: text_attention"),
        ("name=mine", "no field 'name'"),
        ("noise_dtype=fp8", "noise_dtype is 'fp8'; choose one of: fp32, bf16, model"),
        ("flow_shift=much", "flow shift is 'much'"),
        ("flow_shift=-1", "flow shift is '-1'"),
        ("visible_padding=1.5", "visible_padding is '1.5'; it must be a whole number"),
        ("visible_padding=512", "between 0 and 256"),
        ("size_multiple=0", "multiple of 16"),
        ("size_multiple=40", "multiple of 16"),
        ("flow_shift", "must read field=value"),
        ("flow_shift=", "must read field=value"),
        ("flow_shift=1, flow_shift=2", "overridden twice"),
        ("multistep_time=sigma", "half_log_snr, log_sigma"),
    ],
)
def test_bad_overrides_are_named(text, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        recipe("canonical", parse_overrides(text))


def test_a_job_overrides_fields_by_a_table(tmp_path):
    (tmp_path / "data").mkdir()
    job = {"name": "a", "dataset": {"folder": str(tmp_path / "data")}, "recipe": "comfyui"}
    changed = TrainingConfig.parse(job | {"recipe_overrides": {"visible_padding": 1, "flow_shift": 2.5}})
    assert changed.recipe_value() == RECIPES["comfyui"].override({"visible_padding": 1, "flow_shift": 2.5})
    assert changed.job_id() != TrainingConfig.parse(job).job_id()
    previews = {"prompts": ["a"], "method": "unipc", "spacing": "beta", "flow_shift": "none"}
    (preview,) = TrainingConfig.parse(job | {"previews": previews}).preview_list()
    assert (preview.settings.method, preview.settings.spacing, preview.settings.flow_shift) == ("unipc", "beta", "none")
    with pytest.raises(ConfigError, match="no field 'padding'"):
        TrainingConfig.parse(job | {"recipe_overrides": {"padding": 1}})
