"""The parity tool: what a preview showed, painted again; differences by closed formula; factors; reports."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from chroma_core.cli.main import main
from chroma_core.cli.parity import exit_status
from chroma_core.errors import ConfigError, JobError
from chroma_core.loading.component_cache import ComponentCache
from chroma_core.loading.spec import LoraUse, ModelSpec
from chroma_core.model.images import latents_bytes, read_latents, read_record, to_images
from chroma_core.model.latents import FLUX_LATENTS
from chroma_core.parity import (
    Case,
    NotRun,
    Report,
    Sampled,
    compare,
    in_process,
    read_preview,
    through_command_line,
    train_briefly,
    vary,
)
from chroma_core.parity.case import psnr
from chroma_core.parity.preview import last_preview
from chroma_core.parity.with_diffusers import through_diffusers
from chroma_core.sampling.recipe import CANONICAL, recipe
from chroma_core.sampling.sampler import SamplingSettings

SPEC = ModelSpec("tiny", precision="fp32", text_precision="fp32")
SETTINGS = SamplingSettings(steps=6, guidance=3.0, seed=7)


@pytest.fixture(scope="module")
def preview(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parity")
    return train_briefly(SPEC, "a photo of a sks emblem", "", (64, 64), SETTINGS, CANONICAL, folder, "cpu", steps=3)


@pytest.fixture(scope="module")
def components() -> ComponentCache:
    return ComponentCache()


@pytest.fixture(scope="module")
def replayed(preview, components) -> tuple[Case, Sampled, Sampled]:
    case, shown = read_preview(preview)
    return case, shown, in_process(case, components, "cpu")


def test_a_preview_is_painted_again_bit_for_bit(replayed, preview, components):
    case, shown, again = replayed
    assert compare("preview-core", shown, again).identical
    without = in_process(replace(case, loras=()), components, "cpu")
    assert compare("no lora", shown, without).mean_abs_diff > 1e-3, "the LoRA is in the preview"
    assert read_record(preview)["step"] == 3 and case.settings == SETTINGS


def test_diffusers_paints_it_once_its_mask_is_boolean(replayed):
    case, shown, _ = replayed
    assert compare("boolean", shown, through_diffusers(case, "cpu")).max_abs_diff < 1e-4 / FLUX_LATENTS.scale
    assert compare("float", shown, through_diffusers(case, "cpu", "float")).mean_abs_diff > 0.5, "its known defect"


@pytest.mark.parametrize(("own", "text"), [("fp32", "bf16"), ("bf16", "fp32"), ("fp16", "bf16")])
def test_transformer_and_text_encoder_may_have_two_precisions(replayed, components, own, text):
    case = replace(replayed[0], spec=replace(SPEC, precision=own, text_precision=text))
    found = compare(f"{own} {text}", in_process(case, components, "cpu"), through_diffusers(case, "cpu"))
    assert found.mean_abs_diff < 0.1, "rounding alone; where nothing fits it is above 0.5"


def test_merged_is_live(replayed, components):
    case, shown, _ = replayed
    merged = in_process(case.with_loras(mode="merged"), components, "cpu")
    assert 0 < compare("live-merged", shown, merged).max_abs_diff < 1e-4


def test_what_cannot_be_painted_says_why(replayed, tmp_path):
    case, _, _ = replayed
    with pytest.raises(NotRun, match="diffusers has no counterpart of the precision int8"):
        through_diffusers(replace(case, spec=replace(SPEC, precision="int8")), "cpu")
    with pytest.raises(NotRun, match="whole schedule"):
        through_command_line(replace(case, settings=replace(SETTINGS, denoise=0.5)), tmp_path, "cpu")


def test_a_recipe_in_words():
    case = Case(SPEC, "a red circle", 64, 64)
    assert case.recipe_words == ("canonical", {})
    changed = recipe("ai-toolkit").override({"flow_shift": 3.0, "time_dtype": "fp32"})
    assert replace(case, recipe=changed).recipe_words == ("ai-toolkit", {"time_dtype": "fp32", "flow_shift": "3.0"})
    unknown = replace(changed, name="of another version")
    assert replace(case, recipe=unknown).recipe_words[0] == "canonical", "every field that differs is named"


def test_previews_that_cannot_be_replayed(preview, tmp_path):
    with pytest.raises(ConfigError, match="no training preview"):
        read_preview(tmp_path / "nothing.png")
    job = tmp_path / "job"
    (job / "samples").mkdir(parents=True)
    (job / "job.json").write_bytes((preview.parent.parent / "job.json").read_bytes())
    with pytest.raises(JobError, match="there are 0 previews"):
        last_preview(job)
    for name in (preview.name, preview.with_suffix(".latent").name):
        (job / "samples" / name).write_bytes((preview.parent / name).read_bytes())
    with pytest.raises(JobError, match="there are 1 previews"):
        last_preview(job)
    with pytest.raises(NotRun, match="LoRA of step 3 was not kept"):
        read_preview(job / "samples" / preview.name)
    (job / "samples" / preview.with_suffix(".latent").name).unlink()
    with pytest.raises(ConfigError, match="no readable latents file"):
        Sampled.read(job / "samples" / preview.name, job / "samples" / preview.with_suffix(".latent").name)


def sampled(value: float, shade: int = 0) -> Sampled:
    return Sampled(torch.full((1, 16, 4, 4), value), Image.new("RGB", (32, 32), (shade, 0, 0)))


def test_differences_by_their_formulas():
    found = compare("a-b", sampled(1.0), sampled(1.5, 30))
    assert (found.max_abs_diff, found.mean_abs_diff) == (0.5, 0.5)
    assert found.psnr == pytest.approx(10 * math.log10(255**2 / (30**2 / 3)))
    assert compare("same", sampled(1.0), sampled(1.0)).to_dict() == {
        "pair": "same", "max_abs_diff": 0.0, "mean_abs_diff": 0.0, "psnr": None, "identical": True,
    }  # fmt: skip
    assert not compare("pixels only", sampled(1.0), sampled(1.0, 1)).identical
    with pytest.raises(ConfigError, match="not finite"):
        compare("nan", sampled(1.0), sampled(math.nan))
    with pytest.raises(ConfigError, match="cannot be compared"):
        compare("size", sampled(1.0), Sampled(torch.zeros(1, 16, 8, 4), Image.new("RGB", (32, 64))))


def test_psnr_of_one_level_in_one_value():
    """The 89 dB of the documentation."""
    array = np.zeros((64, 64, 3), np.uint8)
    other = array.copy()
    other[3, 5, 1] = 1
    assert psnr(Image.fromarray(array), Image.fromarray(other)) == pytest.approx(89.03, abs=0.01)


def test_images_are_rounded_as_the_host_saves_them():
    """VAE Decode: clamp((x + 1) / 2); Save Image: numpy.clip(255·x, 0, 255).astype(uint8)."""
    x = torch.linspace(-1.2, 1.2, 3 * 64 * 64).view(1, 3, 64, 64)
    image = torch.clamp((x + 1.0) / 2.0, min=0.0, max=1.0)[0].permute(1, 2, 0)
    expected = np.clip(255.0 * image.numpy(), 0, 255).astype(np.uint8)
    assert np.array_equal(np.asarray(to_images(x)[0]), expected)
    assert expected.min() == 0 and expected.max() == 255


def test_latents_survive_their_file():
    x = torch.randn(1, 16, 4, 4)
    assert torch.equal(read_latents(latents_bytes(x, FLUX_LATENTS)), FLUX_LATENTS.to_vae(x))


def test_factors_change_one_thing_each():
    case = Case(SPEC, "a red circle", 64, 64, "blue", SETTINGS, CANONICAL, (LoraUse("a"), LoraUse("b", 0.5)))
    factors = list(vary(case))
    assert len({factor.name for factor in factors}) == len(factors) > 30
    for factor in factors:
        changed = [
            name
            for name in ("spec", "prompt", "width", "height", "negative", "settings", "recipe", "loras")
            if getattr(factor.case, name) != getattr(case, name)
        ]
        assert len(changed) == 1, factor.name
    assert {factor.kind for factor in vary(case, ("recipe",))} == {"recipe"}
    names = [factor.name for factor in factors]
    assert "recipe canonical" not in names and "method euler" not in names, "what stays the same is no factor"
    assert not [factor for factor in vary(replace(case, loras=())) if factor.kind == "lora"]


def test_the_report_sorts_and_leaves_nothing_out():
    case = Case(SPEC, "a red circle", 70, 64, settings=SETTINGS)
    report = Report(case)
    report.add_pairs({"cli": sampled(1.0), "core": sampled(1.0), "node": NotRun("no ComfyUI"), "live": sampled(0.0)})
    small, large, odd = (factor for factor in list(vary(case, ("recipe",)))[:3])
    report.add_factor(small, sampled(0.0), sampled(0.1))
    report.add_factor(large, sampled(0.0), sampled(0.2))
    report.add_factor(odd, sampled(0.0), Sampled(torch.zeros(1, 16, 8, 4), Image.new("RGB", (32, 64))))
    values = json.loads(json.dumps(report.to_dict()))
    assert [row["pair"] for row in values["comparisons"]] == ["cli-core"]
    assert [row["factor"] for row in values["factors"]] == [large.name, small.name]
    assert {row["pair"] for row in values["not_run"]} == {"cli-node", odd.name}
    text = report.table()
    assert "64×64" in text and "no ComfyUI" in text and text.index(large.name) < text.index(small.name)


def test_the_verdict_is_about_what_must_agree(capsys):
    case = Case(SPEC, "a red circle", 64, 64, settings=SETTINGS)

    def verdict(**painted_by: Sampled | NotRun) -> tuple[int, str]:
        report = Report(case)
        report.add_pairs(dict(painted_by))
        assert report.to_dict()["same_picture"] is report.same_image
        return exit_status(report), capsys.readouterr().err.strip()

    status, said = verdict(preview=sampled(1.0), cli=sampled(1.005), diffusers=sampled(3.0))
    assert status == 0 and said == "The same image: preview-cli."
    status, said = verdict(preview=sampled(1.0), cli=sampled(1.0), node=sampled(1.02))
    assert status == 1 and said.startswith("error: Not the same image: preview-node, cli-node differ")
    status, said = verdict(preview=sampled(1.0), cli=NotRun("no"), live=sampled(0.0), merged=sampled(0.0))
    assert status == 1 and said.startswith("error: Nothing was compared")


def test_the_command(capsys, tmp_path, preview):
    """A replay with everything that needs no ComfyUI."""
    arguments = ["parity", "--preview", str(preview), "--no-comfyui", "--json", "--device", "cpu"]
    assert main([*arguments, "--factors", "guidance", "--output", str(tmp_path)]) == 0
    values = json.loads(capsys.readouterr().out)
    pairs = {row["pair"]: row for row in values["comparisons"]}
    assert set(pairs) == {"preview-cli", "cli-core", "cli-diffusers", "cli-diffusers_float_mask", "live-merged"}
    assert pairs["preview-cli"]["identical"] and pairs["cli-core"]["identical"] and values["same_picture"]
    assert {row["pair"] for row in values["not_run"]} == {"preview-node", "cli-node"}
    assert {row["kind"] for row in values["factors"]} == {"guidance"}
    assert json.loads((tmp_path / "parity.json").read_text()) == values
    with Image.open(tmp_path / "parity.png") as sheet:
        assert sheet.width > 1000
    assert main(["parity", "--factors", "colour"]) == 1
    assert "A factor is 'colour'; choose one of: recipe, " in capsys.readouterr().err


def test_a_recipe_is_replayed_as_recorded(components, tmp_path):
    case = Case(SPEC, "a red circle", 64, 64, settings=SETTINGS, recipe=recipe("comfyui"))
    record = {**case.to_dict(), "width": 64, "height": 64}
    assert Case.from_record(record) == case
    with pytest.raises(ConfigError, match="unknown here: colour"):
        Case.from_record({**record, "settings": {**record["settings"], "colour": 1}})
    with pytest.raises(ConfigError, match="no 'prompt'"):
        Case.from_record({key: value for key, value in record.items() if key != "prompt"})
