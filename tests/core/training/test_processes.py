"""One job in two processes, started by torchrun and connected by gloo on the CPU, against the same job in one."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

import psutil
import pytest
import torch
from safetensors.torch import load_file

import forked
from chroma_core.comfy.server import free_port
from chroma_core.errors import ConfigError
from chroma_core.training.config import TrainingConfig
from chroma_core.training.distributed import world
from chroma_core.training.distributed.world import Processes, crowded, launched, part_size
from chroma_core.training.jobs.blocking import run_job
from chroma_core.training.jobs.manager import JobManager
from training_cases import config, model_folder, write_dataset
from waiting import PATIENCE, until

ROOT = Path(__file__).parents[3]
COMMAND = ("-c", "import sys; from chroma_core.cli.main import main; sys.exit(main(sys.argv[1:]))")
TORCHRUN = (
    "-c",
    "import os, sys, torch.distributed.run as run; hasattr(os, 'setsid') and os.setsid(); run.main(sys.argv[1:])",
)
AGENT = """
import os, sys
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from chroma_core.cli.main import main
def work():
    sys.exit(main(sys.argv[2:]))
os.setsid()
place = {"rdzv_backend": "static", "rdzv_configs": {"rank": 0}, "rdzv_endpoint": "127.0.0.1:" + sys.argv[1]}
elastic_launch(LaunchConfig(1, 1, 2, start_method="fork", max_restarts=0, monitor_interval=0.1, **place), work)()
"""
"""What torchrun does with two processes, whose workers are forks of it and so import nothing anew."""


def two() -> tuple[str, ...]:
    """How torchrun is told of two processes; its own port is the same for every run on a machine."""
    return "--nproc_per_node", "2", "--master_port", str(free_port())


class Begun:
    """A command in a fork of a process that has the libraries, while it runs; `pid` is there at once."""

    def __init__(self, *arguments: object):
        pids: Queue[int] = Queue()
        thread = ThreadPoolExecutor(1)
        self._done = thread.submit(forked.run, forked.FULL, *arguments, env=environment(), begun=pids.put)
        thread.shutdown(wait=False)
        self.pid = pids.get(timeout=PATIENCE)

    def ended(self) -> bool:
        return self._done.done()

    def result(self) -> subprocess.CompletedProcess[str]:
        """What it said, and how it ended."""
        return self._done.result(PATIENCE)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    data = write_dataset(folder / "data", 7)  # 7 in batches of 2 or 4: the last of an epoch leaves a process without
    return model_folder(folder / "model"), data, write_dataset(folder / "more", 3, seed=1)


def job(places, precision="fp32", compute="weights", **changes):
    model, data, more = places
    values = {
        "batch_size": 1,
        "gradient_accumulation": 2,
        "learning_rate": 1e-3,
        "steps": 4,
        "checkpoint_every": 2,
        "validate_every": 2,
        "validation_dataset": {"folder": str(data)},
        "validation_pictures": 2,
        "previews": {"prompts": "sks", "steps": 1, "every": 4},
        "model": {**config(model, data).model.to_dict(), "precision": precision, "compute": compute},
    }
    return config(model, data, **{**values, **changes})


def environment():
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests/support")))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def files(root: Path) -> set[str]:
    """What a job leaves: without cache and lock, and of the checkpoints the newest, which every ended job has."""
    every = [path.relative_to(root) for path in root.rglob("*") if path.is_file()]
    newest = max((path.parent.name for path in every if "checkpoints" in path.parts), default="")
    kept = (path for path in every if "checkpoints" not in path.parts or path.parent.name == newest)
    return {str(path) for path in kept if "cache" not in path.parts and path.name != ".lock"}


def lora(root: Path) -> dict:
    return load_file(root / "loras" / "Test-Job.safetensors")


def numbers(root: Path, key: str) -> list:
    (metrics,) = root.glob("jobs/*/metrics.jsonl")
    return [line[key] for line in map(json.loads, metrics.read_text().splitlines()) if key in line]


def same(one: Path, other: Path, places: float = 1e-5):
    assert files(one) == files(other)
    for key in ("loss", "preserved", "heldout_loss", "grad_norm"):
        assert numbers(one, key) == pytest.approx(numbers(other, key), rel=places, abs=places)
    a, b = lora(one), lora(other)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=places, atol=places)


PRESERVE = {"prompts": ["a house"], "blank_weight": 0.5, "share": 0.7}
JOBS = {
    "1 × 2": ("ddp", {"preserve": PRESERVE}),
    "2 × 2": ("ddp", {"batch_size": 2, "objective": {"pair_noise": True}, "lora": {"rank": 4, "ema_decay": 0.9}}),
    "2 × 1": ("ddp", {"batch_size": 2, "gradient_accumulation": 1, "optimizer": "schedule-free"}),
    "divided": ("fsdp", {"gradient_checkpointing": True, "batch_size": 2, "preserve": PRESERVE}),
}


@pytest.fixture(scope="module")
def trained(places, tmp_path_factory):
    """Every job in one process and in two; the first is begun by one process and ended by two."""
    folder = tmp_path_factory.mktemp("trained")
    text = toml(places, folder / "odd.toml", steps=4, gradient_accumulation=3)
    commands = [["train", str(text), "--output", str(folder / "odd")]]
    return folder, *both_ways(places, folder, JOBS, commands)


def both_ways(places, folder: Path, jobs: dict, commands: Sequence = ()) -> tuple[list[dict], str]:
    """What the two processes found, by rank, and what they said. torch 2.11 crashes when a second thread of a process
    uses FSDP2 after a first one ended, so there can be only one such job among `jobs`."""
    wanted = []
    for name, (sharding, changes) in jobs.items():
        if name == "divided":
            changes = {**changes, "more_datasets": [{"folder": str(places[2]), "regularisation": True}]}
        settings = job(places, **changes)
        run_job(settings, folder / name / "one" / "jobs", folder / name / "one" / "loras", "cpu")
        root = folder / name / "two"
        if name == "1 × 2":
            begin(settings, root)
        wanted.append({"config": settings.model_dump(mode="json"), "root": str(root), "sharding": sharding})
    path = folder / "list.json"
    path.write_text(json.dumps({"jobs": wanted, "commands": commands}))
    begun = () if hasattr(os, "fork") else (*TORCHRUN, *two())
    script = ROOT / "tests/support/several_processes.py"
    done = forked.run(forked.FULL, *begun, script, path, env=environment(), timeout=500)
    assert done.returncode == 0, done.stderr[-9000:]
    return [json.loads((folder / f"list.json.{rank}").read_text()) for rank in (0, 1)], done.stderr


def begin(settings, root: Path):
    """The first steps in one process, which is then asked to end."""
    manager = JobManager(root / "jobs", root / "loras", "cpu")
    started = manager.ensure(settings)
    while started.status()["step"] < 1 and not started.wait(0.01):
        pass
    manager.shutdown()
    assert started.state == "interrupted"


def toml(places, path: Path, steps: int, **changes) -> Path:
    values = {"batch_size": 1, "gradient_accumulation": 2, "checkpoint_every": 3, "learning_rate": 1e-3, **changes}
    lines = ['name = "Test Job"', f"steps = {steps}", "gradient_checkpointing = false"]
    lines += [f"{key} = {value}" for key, value in values.items()]
    model = f'flavour = "tiny"\nfolder = "{places[0]}"\nprecision = "fp32"\ntext_precision = "fp32"'
    lines += ["[model]", model, "[dataset]", f'folder = "{places[1]}"', "[lora]", "rank = 4"]
    path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize("name", JOBS)
def test_two_processes_train_what_one_trains(trained, name):
    folder, found, _ = trained
    index = list(JOBS).index(name)
    assert [ranks["jobs"][index]["state"] for ranks in found] == ["completed", "completed"]
    same(folder / name / "one", folder / name / "two")
    held_in_halves(found, index, JOBS[name][0])


def held_in_halves(found, index: int, sharding: str):
    for ranks in found:
        for here, whole in ranks["jobs"][index]["divided"]:
            assert here < 0.75 * whole  # the adapter stays whole, and is large beside the miniature
        assert len(ranks["jobs"][index]["divided"]) == (sharding == "fsdp")


@pytest.mark.slow
def test_codes_of_a_quantised_base_are_divided_too(places, tmp_path):
    """They are multiplied as they are, and a DoRA's norms are those of the dequantised weights."""
    jobs = {"int8": ("fsdp", {"precision": "int8", "compute": "w8a8", "lora": {"rank": 4, "kind": "dora"}})}
    found, _ = both_ways(places, tmp_path, jobs)
    assert [ranks["jobs"][0]["state"] for ranks in found] == ["completed", "completed"], found
    same(tmp_path / "int8/one", tmp_path / "int8/two")
    held_in_halves(found, 0, "fsdp")


def test_a_batch_that_cannot_be_dealt_evenly_ends_both_processes(trained):
    _, found, said = trained
    assert [ranks["codes"] for ranks in found] == [[1], [1]]
    assert said.count("these numbers of processes: 1, 3.") == 1  # rank 0 says it


WRONG = """
import json, os, sys
from chroma_core.cli.main import main
from chroma_core.comfy.server import free_port
os.environ.update(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
commands = [(command, free_port()) for command in json.loads(sys.argv[1])]
other = os.fork()
os.environ["RANK"] = os.environ["LOCAL_RANK"] = "0" if other else "1"
codes = []
for command, port in commands:  # each its own: where a slower process met the last time is still open
    os.environ["MASTER_PORT"] = str(port)
    codes.append(main(command))
if other:
    assert os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]) == 3
assert codes == [1] * len(codes)
sys.exit(3)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_wrong_launch_is_one_sentence_and_leaves_nothing(places, tmp_path):
    path = toml(places, tmp_path / "job.toml", steps=4)
    devices = ["meta:0", "nonsense", *(["cuda"] if not torch.cuda.is_available() else [])]
    commands = [["train", str(path), "--output", str(tmp_path / "o"), "--device", device] for device in devices]
    done = forked.run(forked.FULL, "-c", WRONG, json.dumps(commands))
    assert done.returncode == 3, done.stderr
    expected = ["must be without a number", "'nonsense' is not a device", "'cuda' is not here"][: len(devices)]
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert [words in line for words, line in zip(expected, said, strict=True)] == [True] * len(said), done.stderr
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    "found, words",
    [
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}, "started one, as it does where it finds no"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, "mpirun started several"),
        ({"PMI_SIZE": "2", "PMI_RANK": "0"}, "each of which would train the whole job"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is '2', RANK ''"),
        ({"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0"}, "no process of a distributed run"),
        ({"WORLD_SIZE": "two", "RANK": "0", "LOCAL_RANK": "0"}, "unset all three"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"WORLD_SIZE": "1", "RANK": "0"}, False),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, False),
        ({}, False),
    ],
)
def test_what_a_launcher_meant(found, words, monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in found.items():
        monkeypatch.setenv(name, value)
    if isinstance(words, bool):
        assert launched() is words
    else:
        with pytest.raises(ConfigError, match=words):
            launched()


def test_each_process_has_a_gpu_of_its_own():
    assert crowded(2, 2) == crowded(2, None) == ""
    assert "3 processes were started on a machine with 2 GPUs" in crowded(3, 2)
    assert crowded(2, 1).endswith("Start 1 (--nproc_per_node 1), or use --device cpu.")


def test_a_process_that_never_comes_is_said(monkeypatch):
    monkeypatch.setattr(world, "MEETING_SECONDS", 0.5)
    place = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for name, value in {**place, "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="The 2 processes of this run did not find each other"):
        Processes("cpu")


def test_parts_divide_the_share_of_a_process():
    assert [part_size(4, 4, size) for size in (1, 2, 4)] == [4, 2, 1]
    assert part_size(4, 12, 2) == 3  # four parts of 3 rather than 4 + 2 on each
    assert part_size(2, 8, 4) == 2 and part_size(3, 9, 1) == 3
    with pytest.raises(ConfigError, match="1, 2, 3, 6"):
        part_size(2, 6, 4)


def start(path: Path, root: Path, *launcher: object) -> tuple[Begun, Path]:
    """Two processes on a job file, in a session of their own; returns once they have taken three more steps."""
    running = Begun(*launcher, "train", path, "--output", root)
    before = sum(len(numbers(each.parents[2], "loss")) for each in root.glob("jobs/*/metrics.jsonl"))

    def goes_on() -> bool:
        assert not running.ended(), running.result()
        return any(root.glob("jobs/*/metrics.jsonl")) and len(numbers(root, "loss")) >= before + 3

    until(goes_on)
    (status,) = root.glob("jobs/*/job.json")
    return running, status


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals to a group of processes")
def test_a_job_that_lost_its_processes_goes_on_in_one(places, tmp_path):
    path = toml(places, tmp_path / "job.toml", steps=60)
    settings = TrainingConfig.from_toml(path)
    running, status = start(path, tmp_path / "two", *TORCHRUN, *two(), "-m", "chroma_core")
    os.killpg(running.pid, signal.SIGINT)
    assert running.result().returncode != 0
    first = json.loads(status.read_text())
    assert first["state"] == "interrupted" and first["checkpoint"] == first["step"] > 0

    again = (*TORCHRUN, *two(), "-m", "chroma_core") if sys.platform == "darwin" else ("-c", AGENT, free_port())
    running, status = start(path, tmp_path / "two", *again)
    max(psutil.Process(running.pid).children(), key=lambda worker: worker.create_time()).kill()  # rank 1
    assert running.result().returncode != 0
    second = json.loads(status.read_text())
    assert second["state"] in ("failed", "interrupted") and second["checkpoint"] == second["step"] > first["step"]
    if second["state"] == "failed":
        assert "2 processes was ended" in second["message"]

    run_job(settings, tmp_path / "two/jobs", tmp_path / "two/loras", "cpu")
    run_job(settings, tmp_path / "one/jobs", tmp_path / "one/loras", "cpu")
    same_lora = (lora(tmp_path / "one"), lora(tmp_path / "two"))
    for name in same_lora[0]:
        torch.testing.assert_close(same_lora[0][name], same_lora[1][name], rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows ends a process without asking")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_process_that_is_asked_to_end_saves_and_says_how_to_go_on(places, tmp_path, number):
    path, output = toml(places, tmp_path / "job.toml", steps=100_000), tmp_path / "the output"
    running = Begun(*COMMAND, "train", path, "--output", output, "--device", "cpu")

    def trains() -> bool:
        assert not running.ended(), running.result()
        return any(output.glob("jobs/*/metrics.jsonl")) and len(numbers(output, "loss")) >= 2

    until(trains)
    load, asked = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1)), time.time()
    os.kill(running.pid, number)
    done = running.result()
    said = done.stderr
    assert done.returncode == 130 and "Traceback" not in said
    status = json.loads(next(output.glob("jobs/*/job.json")).read_text())
    assert status["state"] == "interrupted" and status["checkpoint"] == status["step"] >= 2
    assert status["updated"] - asked < 10 * load, "what sends SIGTERM kills after ten seconds"
    assert json.loads(done.stdout)["step"] == status["step"]
    assert said.splitlines()[-1] == (
        f"interrupted: job {status['id']}, saved at step {status['step']}. Go on with: python -m chroma_core resume "
        f"{status['id']} --output '{output}'"
    )
