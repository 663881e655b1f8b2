"""Full-rank training: which layers, a whole job of it, and that nothing else of the model changes."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import miniature
from chroma_core import files
from chroma_core.cli.main import main
from chroma_core.errors import ConfigError, JobError, ModelFileError
from chroma_core.fullrank import export
from chroma_core.fullrank.layers import MasterLinear, MasterNorm, count_trained, layer_names, put_masters
from chroma_core.loading.load import load_transformer, transformer_source, write_quantised
from chroma_core.loading.spec import ModelSpec
from chroma_core.model.quantised import QuantisedLinear
from chroma_core.model.transformer import ChromaTransformer
from chroma_core.training.jobs.manager import Job, JobManager
from chroma_core.training.run import trained
from chroma_core.training.run.checkpoint import restore_latest, save_checkpoint
from chroma_core.training.run.metrics import JobPaths, Progress
from lora_cases import inputs, predict
from training_cases import bench, config, model_folder, steps, write_dataset
from waiting import PATIENCE

MODEL_FILE = "diffusion_pytorch_model.safetensors"
FULL = {"target": "double_blocks.1,single_blocks.0"}
CHANGED = ("transformer_blocks.1.", "single_transformer_blocks.0.")


@pytest.fixture(scope="module")
def real() -> ChromaTransformer:
    with torch.device("meta"):
        return ChromaTransformer()


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("full")
    return model_folder(folder / "model"), write_dataset(folder / "data", 4), folder / "cache"


def settings(places, full=FULL, /, precision="fp32", **changes):
    model = {**config(*places[:2]).model.to_dict(), "precision": precision}
    values = {"model": model, "full": full, "lora": {}, "learning_rate": 1e-3}
    return config(*places[:2], **{**values, **changes})


# --- which layers


@pytest.mark.parametrize(
    ("target", "linears", "norms"),
    [
        ("double_blocks.0-3", 48, 16),
        ("transformer_blocks.[0-3]", 48, 16),
        ("transformer_blocks.0", 12, 4),
        ("transformer_blocks.1", 12, 4),  # not 10 to 18
        ("single_blocks.30-37", 40, 16),
        ("single_transformer_blocks.*", 190, 76),
        ("double_blocks.*.img_attn.qkv", 57, 0),
        ("transformer_blocks.*.attn.to_[qkv]", 57, 0),
        ("double_blocks.2-4.img_mlp", 6, 0),
        ("single_blocks.*.linear1", 152, 0),
        ("all", 418, 152),
        ("double_blocks.0-1, double_blocks.1-2", 36, 12),
        (("transformer_blocks.0", "single_blocks.37"), 17, 6),
    ],
    ids=str,
)
def test_what_a_target_selects_of_chroma_1(real, target, linears, norms):
    assert len(layer_names(real, target)) == linears
    assert len(layer_names(real, target, norms=True)) == linears + norms


def test_how_much_is_trained_of_chroma_1(real):
    width, mlp, head = 3072, 4 * 3072, 128
    single = 3 * width * (width + 1) + mlp * (width + 1) + width * (width + mlp + 1)
    assert count_trained(real, "single_blocks.37") == single
    assert count_trained(real, "single_blocks.30-37", norms=True) == 8 * (single + 2 * head)
    # A double block: two streams of q, k, v, output and an MLP.
    double = 2 * (4 * width * (width + 1) + mlp * (width + 1) + width * (mlp + 1))
    assert count_trained(real, "double_blocks.0-3,single_blocks.0") == 4 * double + single
    assert count_trained(real, "all") == 19 * double + 38 * single


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("", "No blocks are chosen"),
        ("double_blocks.17-20", "there is no double_blocks.19"),
        ("double_blocks.3-1", "double_blocks.1-3"),
        ("distilled_guidance_layer.layers.0", "never trained"),
        ("x_embedder", "outside the blocks"),
        ("proj_out", "outside the blocks"),
        ("*.norm_q", "norms = true"),
        ("duble_blocks.0", "matches no layer"),
    ],
)
def test_a_target_that_cannot_be_trained_is_refused(real, target, says):
    with pytest.raises(ConfigError, match=says):
        layer_names(real, target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layers_in_training_compute_what_the_frozen_ones_did(dtype):
    plain = miniature.transformer().to(dtype)
    call = inputs(plain)
    before = predict(plain, call, dtype)
    exact = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    names = layer_names(plain, "all", norms=True)
    trained = put_masters(plain, names, lambda name: exact[name].float())
    assert torch.equal(predict(plain, call, dtype), before)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert {name for name, p in plain.named_parameters() if p.requires_grad} == set(trained)
    kinds = {type(plain.get_submodule(name)) for name in names}
    assert kinds == {MasterLinear, MasterNorm}


def test_norms_and_biases_do_not_decay(places):
    made = bench(places, full={**FULL, "norms": True}, lora={}, learning_rate=1e-3)
    decay = {id(p): group["weight_decay"] for group in made.stepper.optimizer.param_groups for p in group["params"]}
    for name, parameter in made.transformer.named_parameters():
        if parameter.requires_grad:
            assert (decay[id(parameter)] > 0) == (name.endswith(".weight") and "norm" not in name), name


# --- a whole job


def train(where, job_config, cuts=()):
    """The job, shut down after each step in `cuts` and taken up again."""
    for cut in (*cuts, None):
        held: list[Job] = []

        def busy(cut=cut, held=held) -> bool:
            return cut is not None and bool(held) and held[0].status()["step"] >= cut

        manager = JobManager(where / "jobs", where / "loras", "cpu", busy=busy)
        held.append(job := manager.ensure(job_config))
        if cut is None:
            assert job.wait(PATIENCE) and job.state == "completed", job.status()["message"]
        while cut is not None and job.status()["step"] < cut:
            assert not job.wait(0.01), job.status()["message"]
        manager.shutdown()
        assert cut is None or (job.state, job.status()["step"]) == ("interrupted", cut)
    return job


def written(where) -> dict[str, dict[str, torch.Tensor]]:
    return {p.relative_to(where).as_posix(): load_file(p) for d in ("diffusion_models", "diffusers")
            for p in sorted((where / d).rglob("*.safetensors"))}  # fmt: skip


VARIANTS = {
    "plain": {"full": {**FULL, "norms": True, "save_dtype": "fp32"}, "previews": {"prompts": "sks", "steps": 2}},
    "average": {"full": {**FULL, "ema_decay": 0.9}, "optimizer": "schedule-free"},
    "int8": {"full": FULL, "precision": "int8", "optimizer": "adafactor"},
    "fp16": {"full": {**FULL, "layouts": ["original"]}, "precision": "fp16", "gradient_checkpointing": True},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_job_that_was_cut_in_two_gives_the_same_model(places, tmp_path, name):
    variant = {**VARIANTS[name], "validation_dataset": {"folder": str(places[1])}}
    job_config = settings(places, variant.pop("full"), **variant)
    whole = train(tmp_path / "whole", job_config)
    parts = train(tmp_path / "parts", job_config, cuts=(3,))
    one, two = written(tmp_path / "whole"), written(tmp_path / "parts")
    copies = (2 if job_config.ema_decay else 1) * len(job_config.full.layouts)
    assert one.keys() == two.keys() and len(one) == copies
    for file in one:
        assert one[file].keys() == two[file].keys()
        assert all(torch.equal(one[file][key], two[file][key]) for key in one[file]), file
    status = whole.status()
    assert status["heldout_loss"] < status["heldout_loss_base"] == parts.status()["heldout_loss_base"]
    assert status["heldout_loss"] == parts.status()["heldout_loss"]
    assert status["lora_path"] is None and status["model_name"] == "Test-Job.safetensors"

    spec = {**job_config.model.to_dict(), "transformer": status["model_path"], "precision": "fp32"}
    base = load_transformer(config(*places[:2]).model, "cpu").state_dict()
    model = load_transformer(type(job_config.model).from_dict(spec), "cpu")
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, base[n])}
    assert changed and all(n.startswith(CHANGED) for n in changed)
    layers = set(layer_names(model, job_config.full.target, job_config.full.norms))
    assert {n.rpartition(".")[0] for n in changed} == layers, "every chosen layer learnt something"


def test_the_loss_of_the_job_is_that_of_its_file(places, tmp_path):
    """What was measured at the end of training is measured again on the model that was written, as a base."""
    held_out = {"folder": str(places[1])}
    first = train(tmp_path / "a", settings(places, {**FULL, "save_dtype": "fp32"}, validation_dataset=held_out))
    again = {**config(*places[:2]).model.to_dict(), "transformer": first.status()["model_path"]}
    second = train(tmp_path / "b", config(*places[:2], model=again, validation_dataset=held_out, steps=1))
    assert second.status()["heldout_loss_base"] == first.status()["heldout_loss"]


def test_chosen_layers_are_not_quantised_and_the_others_are(places):
    made = bench(places, model=settings(places, precision="int8").model.to_dict(), full=FULL, lora={})
    for name, module in made.transformer.named_modules():
        if isinstance(module, (QuantisedLinear, MasterLinear)):
            assert isinstance(module, MasterLinear) == name.startswith(CHANGED), name
    exact = load_transformer(config(*places[:2]).model, "cpu").get_submodule("transformer_blocks.1.ff.net.2").weight
    assert torch.equal(made.transformer.get_submodule("transformer_blocks.1.ff.net.2").weight, exact)
    before = [p.detach().clone() for p in made.parameters]
    assert all(result.loss > 0 for result in steps(made, 2))
    assert not any(torch.equal(a, b) for a, b in zip(before, made.parameters, strict=True))


def test_a_checkpoint_holds_the_trained_layers_alone(places, tmp_path):
    job = train(tmp_path, settings(places, steps=2))
    saved = load_file(job.folder / "checkpoints" / "step-000002" / "weights.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.float32}
    assert sum(t.numel() for t in saved.values()) == count_trained(miniature.transformer(), FULL["target"])


def test_the_header_tells_what_it_is(places, tmp_path):
    job = train(tmp_path, settings(places, steps=1))
    for path in (job.status()["model_path"], *(tmp_path / "diffusers").rglob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            header = file.metadata()
        assert header["chromakit.job_id"] == job.id and header["chromakit.flavour"] == "tiny"
        assert header["chromakit.base_sha256"] == job.status()["base_sha256"]
        assert "lora" not in header["modelspec.description"] and "Chroma 1 (tiny)" in header["modelspec.description"]
        trained = json.loads(header["chromakit.training"])
        assert (trained["kind"], trained["target"], trained["layers"]) == ("full", FULL["target"], 17)
    other = train(tmp_path, settings(places, steps=1, seed=7))
    assert other.status()["model_name"] == "Test-Job-2.safetensors", "another job's model is left alone"


# --- what does not go together


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"lora": {"rank": 4}}, "either a LoRA or"),
        ({"lora": {"kind": "dora", "ema_decay": 0.9}}, "kind, ema_decay"),
        ({"offload": "block"}, "block streaming"),
        ({"regularisation": True}, "no such model any more"),
        ({"full": {"target": "all", "save_dtype": "fp8"}}, "save_dtype"),
        ({"full": {"target": "all", "layouts": []}}, "layouts"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_that_exclude_full_rank_training(places, changes, says):
    changes = dict(changes)
    if "offload" in changes:
        changes["model"] = {**config(*places[:2]).model.to_dict(), "offload": changes.pop("offload")}
    if changes.pop("regularisation", False):
        changes["more_datasets"] = [{"folder": str(places[1]), "regularisation": True}]
    with pytest.raises(ConfigError, match=says):
        settings(places, changes.pop("full", FULL), **changes)


def test_the_rate_is_its_own_unless_given(places):
    values = settings(places).model_dump(mode="json")
    del values["learning_rate"]
    assert type(settings(places)).parse(values).learning_rate == 1e-5
    assert type(settings(places)).parse({**values, "full": None}).learning_rate == 2e-4


def test_a_base_that_is_quantised_in_its_file_is_refused_before_anything_is_read(places, tmp_path):
    spec = settings(places, precision="int8").model
    write_quantised(tmp_path / "int8.safetensors", spec, "transformer", "cpu")
    model = {**spec.to_dict(), "transformer": str(tmp_path / "int8.safetensors")}
    manager = JobManager(tmp_path / "jobs", tmp_path / "loras", "cpu")
    job = manager.ensure(settings(places, model=model))
    assert job.wait(PATIENCE) and job.state == "failed" and "quantised already" in job.status()["message"]
    assert not (tmp_path / "jobs" / "cache").exists()
    manager.shutdown()


def test_a_full_disk_is_an_error_at_the_start(places, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "DISK_MARGIN", 1 << 60)
    manager = JobManager(tmp_path / "jobs", tmp_path / "loras", "cpu")
    job = manager.ensure(settings(places))
    assert job.wait(PATIENCE) and job.state == "failed" and "no room" in job.status()["message"]
    manager.shutdown()


def test_checkpoints_that_are_there_already_are_not_asked_room_for_again(places, tmp_path, monkeypatch):
    job = JobPaths(tmp_path / "job", tmp_path / "loras", tmp_path / "cache", tmp_path / "diffusion_models")
    (job.checkpoints / "step-000004").mkdir(parents=True)
    model = 2 * transformer_source(settings(places).model)[0].path.joinpath(MODEL_FILE).stat().st_size
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: SimpleNamespace(free=files.DISK_MARGIN + model))
    with pytest.raises(JobError, match="no room for the checkpoints and the trained model"):
        trained.check_trained(settings(places), job)
    (job.checkpoints / "step-000004" / "optimizer.pt").write_bytes(bytes(4_000_000))
    assert trained.check_trained(settings(places, learning_rate=1e-5), job) == []


def test_damaged_checkpoints_are_passed_over_back_to_the_base(places, tmp_path):
    made = bench(places, full=FULL, lora={}, learning_rate=1e-3)
    before = [p.detach().clone() for p in made.parameters]
    kept = {}
    for step in (1, 2):
        steps(made, 1, step - 1)
        save_checkpoint(tmp_path, Progress(step=step), made.trained, made.stepper, None, keep=3)
        kept[step] = [p.detach().clone() for p in made.parameters]
    for step in (2, 1):
        file = tmp_path / f"step-{step:06d}" / made.trained.weights_file
        file.write_bytes(file.read_bytes()[:-1])
        progress, damaged = restore_latest(tmp_path, made.trained, made.stepper)
        assert len(damaged) == 1 and "is not as it was written" in damaged[0]
        assert (progress and progress.step) == (1 if step == 2 else None)
        expected = kept[1] if step == 2 else before
        assert all(torch.equal(a, b) for a, b in zip(made.parameters, expected, strict=True))


def test_the_command_line_trains_blocks_and_names_the_model(places, tmp_path, capsys):
    (tmp_path / "job.toml").write_text(
        f"""name = "cli"
steps = 1
[model]
flavour = "tiny"
folder = "{places[0].as_posix()}"
precision = "fp32"
[dataset]
folder = "{places[1].as_posix()}"
[full]
target = "single_blocks.0-1"
layouts = ["diffusers"]
"""
    )
    assert main(["train", str(tmp_path / "job.toml"), "--output", str(tmp_path / "out"), "--device", "cpu"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["model_path"] is None and "lora_path" not in printed
    assert printed["model_folder"] == str(tmp_path / "out" / "diffusers" / "cli" / "transformer")
    assert load_transformer(ModelSpec("tiny", transformer=printed["model_folder"]), "cpu")


def test_jobs_that_train_a_lora_keep_their_names(places):
    assert '"full"' not in config(*places[:2]).canonical_json() and '"full"' in settings(places).canonical_json()


def test_another_base_under_a_job_is_refused(places, tmp_path):
    made = bench(places, full=FULL, lora={})
    path = tmp_path / "weights.safetensors"
    made.trained.save(path)
    made.trained._base_sha256 = "another"
    with pytest.raises(ConfigError, match="not the one that this job was started with"):
        made.trained.load(path)


def test_a_file_that_does_not_read_back_is_an_error(places, tmp_path, monkeypatch):
    made = bench(places, full=FULL, lora={})
    model = export.TrainedModel(made.trained._model.weights, made.trained._model.component,
                                {n: p for n, p in made.transformer.named_parameters() if p.requires_grad},
                                torch.bfloat16)  # fmt: skip
    whole = export.write_safetensors

    def faulty(path, layout, tensors, metadata):
        whole(path, layout, ((n, t * 2 if "linear2" in n else t) for n, t in tensors), metadata)

    monkeypatch.setattr(export, "write_safetensors", faulty)
    with pytest.raises(ModelFileError, match="does not read back"):
        export.write_single_file(tmp_path / "x.safetensors", model, {})


def test_training_again_after_a_crash_in_the_middle_of_writing(places, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(trained, "write_folder", lambda *_: (_ for _ in ()).throw(JobError("no more")))
        manager = JobManager(tmp_path / "jobs", tmp_path / "loras", "cpu")
        job = manager.ensure(settings(places, steps=1))
        assert job.wait(PATIENCE) and job.state == "failed"
        manager.shutdown()
    (tmp_path / "diffusion_models" / ".Test-Job.safetensors.1-2.tmp").write_bytes(b"left over")
    job = train(tmp_path, settings(places, steps=1))
    assert job.status()["model_name"] == "Test-Job.safetensors"
    assert [p.name for p in (tmp_path / "diffusion_models").iterdir()] == ["Test-Job.safetensors"]
