"""TensorBoard event files, read back with TensorBoard's own reader."""

import errno
import sys

import pytest

from chroma_core.training.control import Control
from chroma_core.training.jobs.blocking import run_job
from chroma_core.training.run.metrics import JobPaths, MetricsLog
from chroma_core.training.run.run import run_training
from training_cases import config, model_folder, write_dataset

accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
pytest.importorskip("tensorboardX")


def test_curves_images_and_config_have_every_step_once_also_after_a_resume(tmp_path, monkeypatch):
    model, data = model_folder(tmp_path / "model"), write_dataset(tmp_path / "data", 4)
    settings = config(
        model,
        data,
        steps=6,
        tensorboard=True,
        validation_dataset={"folder": str(data)},
        previews={"prompts": ["sks", "a"], "steps": 1, "every": 3},
    )
    where = (tmp_path / "jobs", tmp_path / "loras", "cpu")

    class Killed(BaseException):
        """Ends a run at once, without saving."""

    places = JobPaths.of(where[0], settings.job_id(), where[1])
    places.job.mkdir(parents=True)

    def report(**fields):
        if fields.get("step") == 6:
            raise Killed

    with pytest.raises(Killed):  # steps 5 and 6 are written, the newest checkpoint is that of step 4
        run_training(settings, places, "cpu", Control(), report)
    done = run_job(settings, *where)
    assert done["state"] == "completed"
    folder = places.job / "tensorboard"
    assert len(list(folder.iterdir())) == 2
    read = accumulators.EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    read.Reload()
    lines = MetricsLog(places.job / "metrics.jsonl").read()
    for field, curve in (
        ("loss", "training/loss"),
        ("loss_smooth", "training/loss_smooth"),
        ("lr", "training/learning_rate"),
        ("grad_norm", "training/grad_norm"),
        ("heldout_loss", "heldout/loss"),
    ):
        wanted = [(line["step"], pytest.approx(line[field], rel=1e-6)) for line in lines if field in line]
        assert [(event.step, event.value) for event in read.Scalars(curve)] == wanted and wanted
    assert [event.step for event in read.Scalars("training/step_seconds")] == [1, 2, 3, 4, 5, 6]
    bands = [tag for tag in read.Tags()["scalars"] if tag.startswith("heldout_by_sigma/")]
    assert len(bands) == len(next(line for line in lines if "heldout_by_sigma" in line)["heldout_by_sigma"])
    for tag in ("previews/0", "previews/1"):
        assert [event.step for event in read.Images(tag)] == [0, 3, 6]
    text = read.Tensors("config/text_summary")[0].tensor_proto.string_val[0]
    assert b'"learning_rate": 0.01' in text

    # Missing, it is named before anything is loaded.
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    failed = run_job(config(model, data, name="without", tensorboard=True), *where)
    assert failed["state"] == "failed" and "package tensorboardX" in failed["message"]
    assert not list((where[0] / failed["id"]).glob("checkpoints/*"))


@pytest.mark.parametrize("where", ["at the start", "in their thread", "in a call"])
def test_files_that_cannot_be_written_do_not_end_the_job(tmp_path, monkeypatch, where):
    """Their thread ends at an error: adding to a full queue would then wait for ever."""
    from tensorboardX import SummaryWriter
    from tensorboardX.event_file_writer import EventsWriter

    full = OSError(errno.ENOSPC, "No space left on device")

    def broken(*args, **kwargs):
        raise full

    if where == "at the start":
        monkeypatch.setattr(SummaryWriter, "add_text", broken)
    elif where == "in a call":
        monkeypatch.setattr(SummaryWriter, "add_scalar", broken)
    else:
        monkeypatch.setattr(EventsWriter, "flush", broken)
        monkeypatch.setattr("threading.excepthook", lambda arguments: None)
    model, data = model_folder(tmp_path / "model"), write_dataset(tmp_path / "data", 4)
    settings = config(model, data, steps=30, tensorboard=True)
    done = run_job(settings, tmp_path / "jobs", tmp_path / "loras", "cpu")
    assert (done["state"], done["step"]) == ("completed", 30)
    (warning,) = done["warnings"]
    assert "event files end here" in warning and "Training goes on" in warning
