"""What a job leaves behind: configuration, checkpoints, metrics, previews, the finished LoRA, the plot."""

import json
import math
import shutil

import pytest
import torch
from PIL import Image, ImageChops
from safetensors import safe_open

from chroma_core.errors import ConfigError
from chroma_core.loading.load import load_text_encoder, load_transformer, load_vae
from chroma_core.lora.adapters import attach
from chroma_core.lora.files import read_lora, write_lora
from chroma_core.lora.trainable import trained_lora
from chroma_core.model.images import decode, read_latents, read_record
from chroma_core.model.latents import LatentFormat
from chroma_core.sampling.recipe import Recipe
from chroma_core.sampling.sampler import SamplingSettings, sample
from chroma_core.training.config import TrainingConfig
from chroma_core.training.control import Control
from chroma_core.training.jobs.curve import plot_losses
from chroma_core.training.run.checkpoint import checkpoints, restore_latest, save_checkpoint
from chroma_core.training.run.loop import train_step
from chroma_core.training.run.metrics import JobPaths, MetricsLog, Progress
from chroma_core.training.run.preview import render_previews
from chroma_core.training.run.run import Run
from chroma_core.training.run.trained import adapter_summary, check_trained, file_metadata, finished_lora, write_final
from training_cases import Bench, config, model_folder, write_dataset


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return model_folder(folder / "model"), write_dataset(folder / "data", 4), folder / "cache"


def trained(places, steps=2, **changes) -> Bench:
    made = Bench(config(places[0], places[1], **changes), places[2])
    for step in range(steps):
        train_step(step, made.transformer, made.stepper, made.batches, made.config)
    return made


# --- configuration


def test_equal_settings_are_one_job_and_any_change_another(places):
    first = config(*places[:2])
    assert first.job_id() == config(*places[:2]).job_id()
    assert first.job_id().startswith("test-job-") and len(first.job_id()) == len("test-job-") + 8
    assert TrainingConfig.parse(json.loads(first.canonical_json())).job_id() == first.job_id()
    changed = [config(*places[:2], steps=9), config(*places[:2], lora={"rank": 5}), config(*places[:2], seed=1)]
    assert len({first.job_id(), *(other.job_id() for other in changed)}) == 4
    model = first.model.to_dict()
    elsewhere = config(*places[:2], model={**model, "offload": "block", "resident_blocks": 3})
    assert elsewhere != first and elsewhere.job_id() == first.job_id(), "the same job, with its weights elsewhere"
    assert config(*places[:2], model={**model, "precision": "bf16"}).job_id() != first.job_id()


def test_regularisation_alone_teaches_nothing(places, tmp_path):
    alone = config(*places[:2], dataset={"folder": str(places[1]), "regularisation": True})
    where = JobPaths.of(tmp_path, alone.job_id(), tmp_path / "loras")
    with pytest.raises(ConfigError, match="trained to change nothing"):
        check_trained(alone, where)
    mixed = alone.model_copy(update={"more_datasets": (alone.dataset.model_copy(update={"regularisation": False}),)})
    assert check_trained(mixed, where) == []


def test_a_job_file_is_read_with_folders_relative_to_it(tmp_path):
    (tmp_path / "job.toml").write_text(
        'name = "My LoRA"\nsteps = 10\n[model]\nflavour = "tiny"\nvae = "my/ae.safetensors"\n'
        '[dataset]\nfolder = "pictures"\nresolution = 512\n'
        '[objective]\ndraw = "chroma"\nflow_shift = 3\n[previews]\nprompts = ["[trigger]"]\nevery = 5\n'
    )
    read = TrainingConfig.from_toml(tmp_path / "job.toml")
    assert read.model.vae == str(tmp_path / "my" / "ae.safetensors")
    assert read.dataset.folder == str(tmp_path / "pictures") and read.dataset.resolutions == (512,)
    assert (read.objective.draw, read.objective.flow_shift, read.preview_size()) == ("chroma", 3.0, (64, 64))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, r"steps: .*found 0"),
        ({"learning_rte": 1}, "learning_rte is not a known option"),
        ({"model": {"flavour": "huge"}}, "no Chroma flavour 'huge'"),
        ({"model": {"flavor": "tiny"}}, "unknown fields: flavor"),
        ({"recipe": "secret"}, "no recipe 'secret'"),
        ({"objective": {"minimum": 0.8, "maximum": 0.2}}, "minimum < maximum"),
        ({"objective": {"flow_shift": "much"}}, "flow shift"),
        ({"previews": {"width": 8}}, "width is 8 pixels"),
        ({"lora": {"rank": 0}}, r"lora\.rank"),
    ],
)
def test_bad_settings_are_one_paragraph(places, changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        config(*places[:2], **changes)
    assert "\n" not in str(caught.value)


def test_a_broken_job_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot be read"):
        TrainingConfig.from_toml(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("name = ")
    with pytest.raises(ConfigError, match=r"'bad.toml' is not valid TOML"):
        TrainingConfig.from_toml(tmp_path / "bad.toml")


# --- checkpoints


def test_a_checkpoint_brings_everything_back(places, tmp_path):
    made = trained(places, 3)
    save_checkpoint(tmp_path, Progress(step=3, loss_smooth=0.5), made.trained, made.stepper, None, keep=3)
    fresh = trained(places, 0)
    progress, damaged = restore_latest(tmp_path, fresh.trained, fresh.stepper)
    assert progress == Progress(step=3, saved_at=3, loss_smooth=0.5) and damaged == []
    for step in (3, 4):
        results = [train_step(step, b.transformer, b.stepper, b.batches, b.config) for b in (made, fresh)]
        assert results[0] == results[1]
    assert all(torch.equal(a, b) for a, b in zip(made.parameters, fresh.parameters, strict=True))


def test_a_checkpoint_of_a_version_that_rounded_otherwise_goes_on_and_says_so(places, tmp_path):
    paths = JobPaths.of(tmp_path / "jobs", "job", tmp_path / "loras", places[2])
    paths.job.mkdir(parents=True)

    def resumed() -> list[str]:
        run = Run(config(*places[:2]), paths, "cpu", Control(), lambda **_: None)
        for stage in (run.prepare, run.load, run.resume, run.save):
            stage()
        run.close()
        return [warning for warning in run.warnings if "earlier version" in warning]

    assert resumed() == [] and resumed() == []
    state = paths.checkpoints / "step-000000" / "state.json"
    values = json.loads(state.read_text())
    assert values.pop("rounding") > 1
    assert values.pop("files").keys() == {"lora.safetensors", "optimizer.pt"} and values.pop(
        "sha256"
    )  # nor had it these
    state.write_text(json.dumps(values))
    (said,) = resumed()
    assert "step 0" in said


def test_a_job_says_why_it_does_not_compile_and_knows_how_it_was_trained(places, tmp_path):
    paths = JobPaths.of(tmp_path / "jobs", "job", tmp_path / "loras", places[2])
    paths.job.mkdir(parents=True)
    run = Run(config(*places[:2], compile_auto=True), paths, "cpu", Control(), lambda **_: None)
    for stage in (run.prepare, run.load, run.resume, run.save):
        stage()
    assert all(block._compiled_call_impl is None for block in run.transformer.transformer_blocks)
    run.close()
    assert [warning for warning in run.warnings if "the job runs on 'cpu'" in warning]
    assert json.loads((paths.checkpoints / "step-000000" / "state.json").read_text())["compiled"] is False


def test_only_the_last_are_kept_and_damage_falls_back(places, tmp_path):
    made = trained(places, 0)
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, Progress(step=step), made.trained, made.stepper, None, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000002", "step-000003"]
    torn = tmp_path / "step-000003" / "optimizer.pt"
    torn.write_bytes(torn.read_bytes()[:100])
    (tmp_path / ".step-000004.123-1.tmp").mkdir()
    progress, damaged = restore_latest(tmp_path, made.trained, made.stepper)
    assert progress is not None and progress.step == 2
    assert len(damaged) == 1 and damaged[0].startswith("step-000003")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged-step-000003", "step-000002"]


def flipped(path, place: float) -> None:
    """One bit of a file turned, at that share of its length."""
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    path.write_bytes(content)


def edited(path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


LORA, OPTIMIZER, STATE = "lora.safetensors", "optimizer.pt", "state.json"
DAMAGE = {
    **{f"a bit of the LoRA at {p}": lambda folder, p=p: flipped(folder / LORA, p) for p in (0, 0.01, 0.5, 0.9, 1)},
    **{f"a bit of the optimizer at {p}": lambda folder, p=p: flipped(folder / OPTIMIZER, p) for p in (0, 0.3, 0.6, 1)},
    **{f"a bit of the state at {p}": lambda folder, p=p: flipped(folder / STATE, p) for p in (0.1, 0.4, 0.8)},
    "a shorter LoRA": lambda folder: (folder / LORA).write_bytes((folder / LORA).read_bytes()[:-1]),
    "no optimizer": lambda folder: (folder / OPTIMIZER).unlink(),
    "another step's optimizer": lambda folder: shutil.copy(folder.parent / "step-000002" / OPTIMIZER, folder),
    "another step's state": lambda folder: shutil.copy(folder.parent / "step-000002" / STATE, folder),
    "a forged step": lambda folder: edited(folder / STATE, step=100),
    "a wrong type": lambda folder: edited(folder / STATE, loss_smooth="low"),
    "no digests": lambda folder: edited(folder / STATE, files={}),
    "a list": lambda folder: (folder / STATE).write_text("[]"),
    "an empty state": lambda folder: (folder / STATE).write_text(""),
    "a state of zeros": lambda folder: (folder / STATE).write_bytes(bytes(500)),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_to_a_checkpoint_is_noticed_and_the_one_before_taken(places, tmp_path, kind):
    made = trained(places, 2)
    save_checkpoint(tmp_path, Progress(step=2), made.trained, made.stepper, None, keep=2)
    before = [parameter.detach().clone() for parameter in made.parameters]
    train_step(2, made.transformer, made.stepper, made.batches, made.config)
    DAMAGE[kind](save_checkpoint(tmp_path, Progress(step=3), made.trained, made.stepper, None, keep=2))
    fresh = trained(places, 0)
    progress, damaged = restore_latest(tmp_path, fresh.trained, fresh.stepper)
    assert progress is not None and progress.step == 2 and [name[:11] for name in damaged] == ["step-000003"]
    assert (tmp_path / "damaged-step-000003").is_dir()
    assert all(torch.equal(a, b) for a, b in zip(before, fresh.parameters, strict=True))


@pytest.mark.parametrize("values", [{"step": "3"}, {"loss_smooth": "low"}, {"step": 100}, {"data": 7}])
def test_a_checkpoint_of_before_there_were_digests_is_read_by_type_and_step(places, tmp_path, values):
    made = trained(places, 0)
    path = save_checkpoint(tmp_path, Progress(step=3), made.trained, made.stepper, None, keep=2)
    state = json.loads((path / STATE).read_text())
    del state["files"], state["sha256"]
    (path / STATE).write_text(json.dumps(state))
    progress, damaged = restore_latest(tmp_path, made.trained, made.stepper)
    assert progress is not None and progress.step == 3 and damaged == []
    edited(path / STATE, **values)
    progress, damaged = restore_latest(tmp_path, made.trained, made.stepper)
    assert progress is None and len(damaged) == 1


def test_with_every_checkpoint_damaged_training_starts_afresh(places, tmp_path):
    made = trained(places, 2)
    path = save_checkpoint(tmp_path, Progress(step=2), made.trained, made.stepper, None, keep=2)
    (path / "optimizer.pt").write_bytes(b"")
    fresh = trained(places, 0)
    before = [parameter.detach().clone() for parameter in fresh.parameters]
    progress, damaged = restore_latest(tmp_path, fresh.trained, fresh.stepper)
    assert progress is None and len(damaged) == 1
    assert all(torch.equal(a, b) for a, b in zip(before, fresh.parameters, strict=True))


def test_metrics_are_cut_back_and_torn_lines_ignored(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    assert log.read() == []
    log.append(step=1, loss=0.5)
    length = log.sync()
    log.append(step=2, loss=0.4)
    with log.path.open("a") as file:
        file.write('{"step": 3, "lo')
    assert [line["step"] for line in log.read()] == [1, 2]
    log.truncate(length)
    log.append(step=2, loss=0.3)
    assert log.read() == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.3}]


# --- previews and the finished file


def test_what_the_preview_shows_is_what_the_lora_gives(places, tmp_path):
    """The image is made again, bit for bit, from nothing but its own record and the LoRA file."""
    previews = {"prompts": ["[trigger] on a red background", "a blue circle"], "steps": 3, "guidance": 3.0, "seed": 7}
    dataset = {"folder": str(places[1]), "trigger": "sks", "caption_dropout": 0.0}
    made = trained(places, 3, previews=previews, dataset=dataset)
    names = render_previews(
        made.config, 3, tmp_path / "samples", made.transformer, made.data.cache, {"job": made.config.job_id()}
    )
    assert names == ["step-000003-0.png", "step-000003-1.png"]
    write_lora(tmp_path / "lora.safetensors", trained_lora(made.transformer))

    for index, name in enumerate(names):
        record = read_record(tmp_path / "samples" / name)
        assert record is not None and record["job"] == made.config.job_id() and record["step"] == 3
        assert record["prompt"] == ("sks on a red background", "a blue circle")[index]
        assert record["settings"]["seed"] == 7 + index
        transformer = load_transformer(made.config.model, "cpu")
        attach(transformer, read_lora(tmp_path / "lora.safetensors"))
        encoder, vae = load_text_encoder(made.config.model, "cpu"), load_vae(made.config.model, "cpu")
        recipe = Recipe.from_dict(record["recipe"])
        latents = sample(
            transformer,
            [encoder.encode(record["prompt"], recipe)],
            encoder.encode(record["negative"], recipe),
            width=record["width"],
            height=record["height"],
            settings=SamplingSettings(**record["settings"]),
            recipe=recipe,
            latent_format=LatentFormat.of(vae),
        )
        recorded = read_latents((tmp_path / "samples" / name).with_suffix(".latent"))
        assert torch.equal(LatentFormat.of(vae).to_vae(latents), recorded)
        with Image.open(tmp_path / "samples" / name) as shown:
            assert decode(vae, latents)[0].tobytes() == shown.convert("RGB").tobytes()


def test_the_finished_lora_says_what_it_is(places, tmp_path):
    dataset = {"folder": str(places[1]), "trigger": "sks"}
    previews = {"prompts": ["a [trigger] star", "a circle"], "every": 0, "steps": 1, "seed": 5}
    lora_settings = {"rank": 4, "alpha": 2.0, "save_dtype": "bf16"}
    made = trained(places, 2, dataset=dataset, lora=lora_settings, previews=previews)
    progress = Progress(step=2, heldout_loss_base=0.5, heldout_loss=0.25)
    metadata = file_metadata(
        made.config, progress, made.data.base_sha256, 4, "chroma/lora", adapter_summary(made.config)
    )
    lora = finished_lora(made.config, made.transformer, metadata)
    path = write_final(made.config, lora, tmp_path / "job", tmp_path / "loras")
    assert path == tmp_path / "loras" / "Test-Job.safetensors"
    assert (tmp_path / "job" / "Test-Job.safetensors").read_bytes() == path.read_bytes()
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    assert header["chromakit.trigger"] == header["modelspec.trigger_phrase"] == "sks"
    assert header["chromakit.base_sha256"] == made.data.base_sha256 and len(made.data.base_sha256) == 64
    assert Recipe.from_dict(json.loads(header["chromakit.recipe"])).name == "canonical"
    preview = json.loads(header["chromakit.preview"])
    assert (preview["prompt"], preview["width"], preview["settings"]["seed"]) == ("a sks star", 64, 5)
    summary = json.loads(header["chromakit.training"])
    assert (summary["steps"], summary["rank"], summary["alpha"], summary["heldout_loss"]) == (2, 4, 2.0, 0.25)
    assert {"torch", "chromakit"} <= json.loads(header["chromakit.versions"]).keys()
    assert [json.loads(header[f"chromakit.{key}"]) for key in ("ranks", "alphas", "targets")] == [[4], [2.0], "all"]
    assert header["chromakit.base_file"] == (made.config.model.folder or "").rpartition("/")[2]
    assert f"2 steps of {made.config.effective_batch} on 4 images" in header["modelspec.description"]
    lora = read_lora(path)
    assert len(lora.modules) == len(trained_lora(made.transformer).modules)
    assert {module.alpha for module in lora.modules.values()} == {2.0}
    assert {module.down.dtype for module in lora.modules.values()} == {torch.bfloat16}


def test_another_jobs_file_is_never_overwritten(places, tmp_path):
    first, second = trained(places, 0), trained(places, 0, seed=5)
    (tmp_path / "Test-Job.safetensors").write_bytes(b"a file of someone else's")

    def write(made):
        metadata = file_metadata(
            made.config, Progress(), made.data.base_sha256, 4, "chroma/lora", adapter_summary(made.config)
        )
        lora = finished_lora(made.config, made.transformer, metadata)
        return write_final(made.config, lora, tmp_path / "job", tmp_path).name

    assert write(first) == "Test-Job-2.safetensors"
    assert write(second) == "Test-Job-3.safetensors"
    assert write(first) == "Test-Job-2.safetensors"
    assert (tmp_path / "Test-Job.safetensors").read_bytes() == b"a file of someone else's"


# --- the plot


def test_the_plot_shows_curve_and_heldout_points():
    lines = [{"step": i, "loss": 1 / i + 0.1 * math.sin(i), "loss_smooth": 1 / i} for i in range(1, 200)]
    lines += [{"step": i, "heldout_loss": 0.5 - i / 1000} for i in (0, 100, 199)] + [{"step": 3, "skipped": True}]
    image = plot_losses(lines)
    assert image.size == (768, 432)
    colours = {colour for _, colour in image.getcolors(1_000_000) or []}
    assert {(96, 165, 250), (250, 204, 21), (62, 84, 120)} <= colours, "smoothed, held out and raw are all drawn"
    higher = plot_losses(
        [{**line, "loss_smooth": line["loss_smooth"] / 2} if "loss" in line else line for line in lines]
    )
    assert higher.tobytes() != image.tobytes()


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [{"step": 1, "loss": 0.5}],
        [{"step": 1, "loss": 0.0}, {"step": 2, "loss": math.nan}],
        [{"step": 0, "heldout_loss": 1e9}],
    ],
)
def test_the_plot_copes_with_little(lines):
    assert plot_losses(lines, 300, 200).size == (300, 200)


def test_what_there_is_to_say_stands_where_there_is_nothing_to_plot():
    said = [plot_losses([], instead=text) for text in ("job: queued", "job: queued\n\nQueue again.", "word " * 200)]
    assert len({image.tobytes() for image in said}) == 3
    for image in said:
        left, top, right, bottom = ImageChops.difference(image, Image.new("RGB", image.size, (24, 24, 27))).getbbox()
        assert left > 30 and top > 20 and right <= 768 - 20 and bottom < 432
