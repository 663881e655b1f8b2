"""What nodes show before anything runs: the routes give the core's own numbers, and refuse what nodes would refuse."""

from __future__ import annotations

import io
import json
import os
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from _host import Host
from chroma_core.data.contact_sheet import bucket_counts, summary
from chroma_core.data.dataset import DatasetConfig
from chroma_core.data.scan import scan
from chroma_core.memory import Machine, Settings, memory_plan
from chroma_core.sampling.schedule import SigmaSettings, sampling_sigmas, sigma_density
from chroma_core.training.step.optimizers import Schedule
from waiting import until

LOOK, SIGMAS, DENSITY, PLAN = (f"/chromakit/{name}" for name in ("datasets/look", "sigmas", "density", "plan/rows"))
MANY = 1000


def ask(server: Host, route: str, values: Any) -> dict[str, Any]:
    code, answer = server.post(route, values)
    assert code == 200, answer
    return answer


def fill(folder: Path, count: int, side: int = 128) -> None:
    """A data set with an image of each of four shapes in turn, no two alike, and captions that differ."""
    folder.mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8)
    shapes = [(side, side), (side, side * 3 // 4), (side * 3 // 4, side), (side, side * 7 // 8)]
    bodies = []
    for shape in shapes:
        body = io.BytesIO()
        Image.fromarray(noise).resize(shape).save(body, "JPEG")
        bodies.append(body.getvalue())
    for i in range(count):
        (folder / f"{i:04}.jpg").write_bytes(bodies[i % len(bodies)] + i.to_bytes(4, "big"))
        (folder / f"{i:04}.txt").write_text(f"thing {i} at place {i % 97} in light {i % 13}", encoding="utf-8")


def test_a_data_set_is_looked_at_with_the_nodes_own_words(server: Host, root: Path):
    folder = root / "example_datasets" / "sks_emblem"
    found = scan(DatasetConfig(folder=str(folder), trigger="sks"), 64)
    answer = ask(server, LOOK, {"folder": "sks_emblem", "trigger": "sks", "flavour": "tiny"})
    assert answer["buckets"] == [{"width": w, "height": h, "count": n} for (w, h), n in bucket_counts(found, 64)]
    assert "\n".join([*answer["summary"], *(f"warning: {w}" for w in answer["warnings"])]) == summary(found, 64)
    assert (answer["pictures"], answer["captions"], answer["size"], answer["size_from"]) == (16, 16, 64, "model")
    assert len(answer["thumbnails"]) == 12 and not any(each["notes"] for each in answer["thumbnails"])
    assert answer["thumbnails"][0]["image"].startswith("data:image/jpeg;base64,")
    code, body = server.request("GET", f"/chromakit/{answer['sheet']}")
    assert code == 200 and Image.open(io.BytesIO(body)).width == 4 * 256


def test_which_size_counts(server: Host):
    own = ask(server, LOOK, {"folder": "sks_emblem", "resolution": 512, "flavour": "tiny"})
    assert (own["size"], own["size_from"]) == (512, "widget")
    assert any("smaller than the training resolution" in warning for warning in own["warnings"])
    assumed = ask(server, LOOK, {"folder": "sks_emblem"})
    assert (assumed["size"], assumed["size_from"]) == (1024, "assumed")
    assert not assumed["warnings"] and not any(each["notes"] for each in assumed["thumbnails"])


def test_a_folder_is_looked_at_anew_when_it_changed(server: Host):
    folder = server.base / "input" / "look_again"
    fill(folder, 5)
    first = ask(server, LOOK, {"folder": "look_again", "resolution": 128})
    assert ask(server, LOOK, {"folder": "look_again", "resolution": 128})["sheet"] == first["sheet"]
    (folder / "0001.txt").unlink()
    (folder / "broken.png").write_bytes(b"not a picture")
    again = ask(server, LOOK, {"folder": "look_again", "resolution": 128})
    assert again["sheet"] != first["sheet"]
    assert (again["pictures"], again["skipped"]) == (4, 2) and "2 images were skipped" in again["warnings"][0]


@pytest.mark.parametrize(
    "folder", ["../x", "..", ".", "/", "/etc", "sks_emblem/../..", "..\\x", "no such", "", "a\0b", "a" * 5000]
)
def test_no_name_leads_out_of_the_data_sets(server: Host, folder: str):
    code, answer = server.post(LOOK, {"folder": folder})
    assert code == 400 and f"There is no dataset folder '{folder}'" in answer["error"]


def test_sheets_are_found_by_nothing_but_their_ids(server: Host):
    for name in ("x", "..", "..%2F..%2Finput", "0"):
        assert server.request("GET", f"/chromakit/datasets/sheets/{name}")[0] == 404


def test_sigmas_are_the_nodes(server: Host):
    values = {"steps": 12, "tail_bias": 0.3, "flow_shift": "constant", "flow_shift_value": 3, "width": 527}
    answer = ask(server, SIGMAS, values)
    assert answer["sigmas"] == sampling_sigmas(12, 512 * 1024 // 256, tail_bias=0.3, flow_shift=3.0).tolist()
    assert (answer["width"], answer["height"]) == (512, 1024)
    part = ask(server, SIGMAS, {"steps": 10, "start_step": 2, "end_step": 5, "spacing": "beta"})["sigmas"]
    assert part == sampling_sigmas(10, 4096, tail_bias=0.5, spacing="beta", start_step=2, end_step=5).tolist()


def test_densities_and_rates_are_the_trainers(server: Host):
    values = {"sigma_draw": "chroma", "sigma_remap": "none", "sigma_shift": "dynamic", "sigma_maximum": 0.9}
    answer = ask(server, DENSITY, {**values, "lr_schedule": "cosine", "warmup_steps": 10, "steps": 50})
    settings = SigmaSettings("chroma", "none", flow_shift="dynamic", maximum=0.9)
    assert answer["density"] == sigma_density(settings, 4096)
    assert answer["plain"] == sigma_density(SigmaSettings(remap="none"), 4096)
    assert sum(answer["density"]) / len(answer["density"]) == pytest.approx(1, abs=1e-4)
    assert answer["density"][-4:] == [0.0] * 4 and answer["centres"][-1] == pytest.approx(0.9875)
    rate = Schedule("cosine", 1.0, 50, 10)
    assert answer["rates"] == [[step, rate.at(step)] for step in range(50)]
    long = ask(server, DENSITY, {"steps": 1_000_000})["rates"]
    assert len(long) <= 202 and long[-1][0] == 999_999


def test_rows_are_the_memory_plans(server: Host):
    values = {"precision": "nf4", "text_precision": "int8", "offload": "block", "resident_blocks": 9}
    answer = ask(server, PLAN, {"flavour": "base", **values, "size": 512})
    code, system = server.request("GET", "/system_stats")
    assert code == 200 and json.loads(system)["devices"][0]["type"] == "cpu"
    here = Machine(answer["device_name"], answer["device_bytes"], answer["host_bytes"], "cpu")
    plan = memory_plan(Settings("base", size=512, **values), here)
    assert answer["rows"] == json.loads(json.dumps([row.to_dict() for row in plan.rows]))
    assert answer["sentences"] == [plan.sampling.sentence, plan.training.sentence]
    assert answer["recommended"] == [plan.sampling.to_dict(), plan.training.to_dict()]
    (chosen,) = [row for row in answer["rows"] if "chosen" in row["marks"]]
    assert (chosen["precision"], chosen["offload"], chosen["resident_blocks"]) == ("nf4", "block", 9)
    assert (answer["size"], answer["device_budget_bytes"]) == (512, here.device_budget)


@pytest.mark.parametrize(
    ("route", "values", "words"),
    [
        (SIGMAS, {"steps": 500}, "steps is 500; it must be between 1 and 150"),
        (SIGMAS, {"steps": True}, "whole number"),
        (SIGMAS, {"steps": 2.5}, "whole number"),
        (SIGMAS, {"denoise": "1"}, "must be a number"),
        (SIGMAS, {"denoise": float("nan")}, "must be a number"),
        (SIGMAS, {"spacing": ["linear"]}, "choose one of: linear"),
        (SIGMAS, {"steps": 4, "start_step": 9}, "none to run"),
        (SIGMAS, {"path": "/etc"}, "no field 'path'"),
        (SIGMAS, [1], "must be a JSON object"),
        (DENSITY, {"sigma_minimum": 0.9, "sigma_maximum": 0.2}, "need 0 ≤ minimum < maximum"),
        (DENSITY, {"rank": 4}, "no field 'rank'"),
        (DENSITY, {"steps": 0}, "between 1 and"),
        (PLAN, {"precision": "nf5"}, "choose one of: bf16"),
        (PLAN, {"folder": "/"}, "no field 'folder'"),
        (PLAN, {"resident_blocks": 1}, "between 2 and 64"),
        (PLAN, {"offload_during_startup": 1}, "true or false"),
        (LOOK, {"folder": 5}, "must be a text"),
        (LOOK, {"folder": "sks_emblem", "flavour": "other"}, "choose one of"),
        (LOOK, {"folder": "sks_emblem", "more_resolutions": "wide"}, "whole numbers of pixels"),
        (LOOK, {"folder": "sks_emblem", "repeats": 0}, "between 1 and 1000"),
        (LOOK, {"folder": "sks_emblem", "caption_source": "metadata"}, "metadata"),
    ],
)
def test_what_a_node_would_refuse_is_refused_in_words(server: Host, route: str, values: Any, words: str):
    code, answer = server.post(route, values)
    assert code == 400 and words in answer["error"], answer


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="only Linux tells which files a process has open")
def test_a_slow_folder_holds_up_nobody_else(server: Host):
    """Its one image is followed by gigabytes of nothing, which are read for its checksum."""
    folder = server.base / "input" / "slow"
    fill(folder, 1)
    slow = folder / "0000.jpg"
    size = slow.stat().st_size
    os.truncate(slow, 1 << 37)  # a hole: nothing of it is stored

    def is_read() -> bool:
        opened = Path(f"/proc/{server.process.pid}/fd").iterdir()
        return any(os.path.lexists(each) and os.path.realpath(each) == str(slow) for each in opened)

    with ThreadPoolExecutor(2) as people:
        first, second = (people.submit(ask, server, LOOK, {"folder": "slow", "repeats": n}) for n in (1, 2))
        until(is_read, "the slow folder's first read")
        assert ask(server, LOOK, {"folder": "sks_emblem"})["pictures"] == 16
        assert server.request("GET", "/chromakit/datasets/sheets/%C3%A9")[0] == 404
        assert is_read() and not first.done() and not second.done()
        os.truncate(slow, size)
        assert {each.result()["pictures"] for each in (first, second)} == {1}


def test_looking_is_a_post_with_json(server: Host):
    for route in (LOOK, SIGMAS, DENSITY, PLAN):
        assert server.request("GET", route)[0] in (404, 405)
        request = urllib.request.Request(server.url + route, data=b"{", headers={"Content-Type": "application/json"})
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=120)
        assert refused.value.code == 400 and "not JSON" in json.load(refused.value)["error"]


def test_a_large_folder_is_looked_at_without_holding_up_the_host(server: Host, capsys: pytest.CaptureFixture):
    """Times are printed, not judged: machines differ. The host must answer others meanwhile."""
    fill(server.base / "input" / "large", MANY, 512)
    questions = {"first": {}, "other words": {"trigger": "sks"}, "the same again": {"trigger": "sks"}}
    times, waits = {}, []
    with ThreadPoolExecutor() as threads:
        for what, values in questions.items():
            start = time.monotonic()
            look = threads.submit(ask, server, LOOK, {"folder": "large", "resolution": 512, **values})
            while what == "first" and not look.done():
                asked = time.monotonic()
                server.get("/prompt")
                waits.append(time.monotonic() - asked)
            assert look.result()["pictures"] == MANY
            times[what] = time.monotonic() - start
    assert len(waits) > 2, "the host answered nothing else while it looked"
    with capsys.disabled():
        print(f"\n{MANY} images: " + ", ".join(f"{what} {seconds:.2f} s" for what, seconds in times.items()))
        print(f"other answers meanwhile: {len(waits)}, the slowest after {max(waits):.2f} s")
