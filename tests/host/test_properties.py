"""Whatever is sent to the routes or queued with one of our nodes is used, or refused in words; no file is touched that
is none of its business.

Bodies, paths, queries and values of widgets are generated from the routes, the schemas and the nodes as they are. The
same cases each time; many more, and with a third number others, with CHROMAKIT_CASES, as docs/security.md has them:

    CHROMAKIT_CASES="1000 200 1" python -m pytest tests/host/test_properties.py -s
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote, urlencode
from urllib.request import Request, urlopen

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as some
from PIL import Image

from _host import Host, PromptRejected, pack_node_ids
from chroma_core import errors
from chroma_core.requests.request import InferenceRequest
from prompts import ACTIVE, at_defaults, job_of, node, train, until_not
from watching import NOT_OURS, strays

ROUTE_CASES, PROMPT_CASES, *SEED = map(int, os.environ.get("CHROMAKIT_CASES", "150 20").split())
pytestmark = pytest.mark.timeout(0) if "CHROMAKIT_CASES" in os.environ else []
ROUTES = sorted(
    {
        (method, path)
        for file in (Path(__file__).resolve().parents[2] / "nodes" / "routes").glob("*.py")
        for method, path in re.findall(r'Route\(\s*"(\w+)",\s*"([^"]+)"', file.read_text(encoding="utf-8"))
    }
)
OURS = {name for name, found in vars(errors).items() if isinstance(found, type) and issubclass(found, Exception)}
OURS |= {"DiskFull", "NotRun", "TooLarge", "Malformed", "Unknown"}
SECONDS = 120
"""Longer than any answer or prompt of these takes."""

ODD_TEXTS = some.sampled_from(
    [
        *("", " ", "none", "x" * 5000, "\ud800", "\0", "\n", "[trigger]", "ünï 名前", "%s{}%n", "tiny", "-1", "1e999"),
        *("../../etc/passwd", "/etc/passwd", f"../{NOT_OURS}", f"../{NOT_OURS}/secret.safetensors", "..", "C:\\x", "~"),
        *("layers.*:2", "0:0.2, 1:1", "all", "true", "\u202e", "a/b", "con", "a" * 300 + ".safetensors"),
    ]
)
# Sizes and counts that are valid and take long are left out: they test patience.
NUMBERS = some.sampled_from([-(10**400), -(2**63), -1, 0, 1, 2, 7, 64, 100_000_000, 2**63, 10**400])
FLOATS = some.sampled_from([float("nan"), float("inf"), -float("inf"), -0.0, -1.0, 0.5, 1e-308, 1e308, 2.5])
ODD = some.recursive(
    some.none() | some.booleans() | NUMBERS | FLOATS | ODD_TEXTS | some.text(max_size=20),
    lambda inner: (
        some.lists(inner, max_size=3)
        | some.dictionaries(ODD_TEXTS | some.sampled_from(["path", "prompt"]), inner, max_size=3)
    ),
    max_leaves=5,
)


def cases(count: int) -> Callable[[Any], Any]:
    chosen = settings(
        max_examples=count,
        derandomize=not SEED,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    return lambda test: chosen(seed(SEED[0])(test) if SEED else test)


@pytest.fixture(scope="module")
def job(server: Host) -> str:
    """A completed job, whose LoRA the nodes can be given; and, where nobody may look, a dataset and a LoRA."""
    found = job_of(server.run(train("odd", 2, preview_prompt="a [trigger] star", preview_every=2)))
    assert until_not(server, found, ACTIVE) == "completed"
    own = server.base / "input" / "odd_set"
    own.mkdir(parents=True)
    for name in ("a", "b", "c"):
        Image.new("RGB", (96, 64), name.encode()[0]).save(own / f"{name}.png")
        (own / f"{name}.txt").write_text(f"a zxq {name}")
    foreign = server.base / NOT_OURS
    Image.new("RGB", (64, 64)).save(foreign / "secret.png")
    (foreign / "secret.txt").write_text("a secret")
    lora = server.base / "output" / "loras" / server.get(f"/chromakit/jobs/{found}")["lora_name"]
    (foreign / "secret.safetensors").write_bytes(lora.read_bytes())
    return found


@pytest.fixture(autouse=True)
def nothing_else_is_touched(server: Host) -> Iterator[None]:
    before = strays(server.base)
    yield
    after = [each for each in strays(server.base) if each not in before]
    assert not after, after
    assert server.alive()


def finish(found: Counter[str], outcomes: Counter[str]) -> None:
    """Fail, with what was found, each kind once."""
    print(f"\n{sum(outcomes.values())} cases: {dict(outcomes.most_common())}")
    assert not found, "\n".join(f"{count} × {what}" for what, count in found.most_common())


# --- routes -----------------------------------------------------------------------------------------------------------


def fields_of(server: Host) -> dict[str, Any]:
    """Every name that a body may have, with a value that is right."""
    names: dict[str, Any] = {"changes": {}, "force": False, "steps": 1, "size": 64, "prompts_while_training": "yield"}
    for name in ("ChromaDataset", "ChromaLoadModel", "ChromaTailSigmas", "ChromaTrainingSettings"):
        names |= at_defaults(server, name)["inputs"]
    names |= {name: field.default for name, field in InferenceRequest.model_fields.items() if not field.is_required()}
    small = {"prompt": "a star", "width": 64, "height": 64, "sample_steps": 1}
    return {**names, "folder": "sks_emblem", "model": "tiny", "flavour": "tiny", "prompts": [small], "seed": 1}


def right_bodies(server: Host) -> dict[str, dict[str, Any]]:
    """A body that each route takes, for those that take one; odd values are put into it."""
    known = fields_of(server)
    settings_ = at_defaults(server, "ChromaTrainingSettings")["inputs"]
    loading = at_defaults(server, "ChromaLoadModel")["inputs"]
    plan = ("flavour", "precision", "text_precision", "offload", "resident_blocks", "offload_during_startup")
    return {
        "/chromakit/datasets/look": {**at_defaults(server, "ChromaDataset")["inputs"], "folder": "sks_emblem"},
        "/chromakit/datasets/images": {"folder": "odd_set", "trigger": "zxq", "size": 64},
        "/chromakit/datasets/captions": {
            "folder": "odd_set",
            "captions": {"a.png": "zxq"},
            "seen": {"a.png": "a zxq a"},
        },
        "/chromakit/datasets/crops": {"folder": "odd_set", "crops": {"a.png": 0.25}},
        "/chromakit/datasets/remove": {"folder": "odd_set", "names": ["b.png"]},
        "/chromakit/datasets/restore": {"folder": "odd_set", "batch": "1", "label": "back"},
        "/chromakit/datasets/convert": {"folder": "odd_set", "names": ["a.png"]},
        "/chromakit/datasets/mask": {"folder": "odd_set", "name": "a.png", "mask": ""},
        **{f"/chromakit/datasets/{end}": {"folder": "odd_set"} for end in ("undo", "redo", "caption/stop")},
        "/chromakit/datasets/caption": {"folder": "odd_set", "node": "TestTagger"},
        "/chromakit/sigmas": at_defaults(server, "ChromaTailSigmas")["inputs"],
        "/chromakit/density": {
            **{name: value for name, value in settings_.items() if name.startswith(("sigma_", "lr_", "warmup"))},
            "steps": 100,
        },
        "/chromakit/plan/rows": {name: loading[name] for name in plan} | {"size": 64},
        "/chromakit/requests": {name: known[name] for name in ("model", "prompts", "seed")} | {"loras": []},
        "/chromakit/settings": {"prompts_while_training": "yield"},
        "/chromakit/jobs/{id}/change": {"changes": {"previews.every": 3}, "force": True},
        "/chromakit/jobs/{id}/extend": {"steps": 1, "force": True},
        "/chromakit/jobs/{id}/grid": {"steps": [2], "strengths": [1.0], "prompts": ["a star"]},
        "/chromakit/jobs/{id}/rate": {"key": "0" * 16, "rating": 3},
        **{f"/chromakit/jobs/{{id}}/{end}": {"key": "0" * 16} for end in ("keep", "publish")},
        "/chromakit/jobs": {
            "name": "posted",
            "steps": 1,
            "seed": 1,
            "learning_rate": 1e-3,
            "recipe": "canonical",
            "model": {"flavour": "tiny", "precision": "fp32", "text_precision": "fp32"},
            "dataset": {"folder": "sks_emblem", "trigger": "sks"},
            "lora": {"rank": 1, "target": "tiny"},
            "previews": {"prompts": []},
            "more_datasets": [],
            "hold_out": 0.0,
            "optimizer": "adamw",
        },
    }


def test_routes(server: Host, job: str):
    known, right = fields_of(server), right_bodies(server)
    right["/chromakit/density"].pop("lr_pattern", None)
    ids = some.sampled_from([job, "none", "..", "%00", "..%2f..%2fx"]) | ODD_TEXTS.map(_part)
    ends = {
        "action": some.sampled_from(["pause", "resume", "stop", "sample", "save", "explode"]) | ODD_TEXTS.map(_part),
        "number": some.sampled_from(["0", "1", "-1", "%D9%A3", "9" * 5000]) | ODD_TEXTS.map(_part),
        "kind": some.sampled_from(["again", "use", "x"]) | ODD_TEXTS.map(_part),
        "name": some.sampled_from(["guide.md", "walk_1.jpg", "..%2f..%2fREADME.md", "images%2f.."])
        | ODD_TEXTS.map(_part),
        "key": some.sampled_from(["0" * 16, "*", "..%2f..%2fjob"]) | ODD_TEXTS.map(_part),
        "id": ids,
    }
    queries = some.dictionaries(
        some.sampled_from(["points", "after", "token", "lines", "side", "v", "brief", "name", *known]) | ODD_TEXTS,
        ODD_TEXTS | NUMBERS.map(str),
        max_size=3,
    )
    changes = some.dictionaries(some.sampled_from([*known, "previews.every", "dataset.folder"]), ODD, max_size=3)
    types = some.sampled_from([*["application/json"] * 8, "application/json; charset=x", "text/plain"])
    found: Counter[str] = Counter()
    outcomes: Counter[str] = Counter()

    @cases(ROUTE_CASES)
    @given(some.data())
    def each(data: some.DataObject) -> None:
        method, template = data.draw(some.sampled_from(ROUTES))
        path = re.sub(r"\{(\w+)\}", lambda name: data.draw(ends[name[1]]), template)
        if template.endswith("/delete"):
            path = path.replace(job, "none")  # the others need it
        headers, body = {}, None
        if method == "get":
            path += f"?{urlencode(data.draw(queries), errors='replace')}"
        else:
            values = dict(right.get(template, {}))
            for name in data.draw(some.lists(some.sampled_from(sorted(values) or sorted(known)), max_size=3)):
                values[name] = data.draw(changes if name == "changes" else ODD)
            if template.endswith(("/extend", "/jobs")) and isinstance(values.get("steps"), int) and values["steps"] > 2:
                values["steps"] = 2
            body = json.dumps(data.draw(some.sampled_from([values] * 9 + [None])) or data.draw(ODD)).encode()
            body = data.draw(some.sampled_from([body] * 19 + [b"[" * 50_000, b"\xff", b"", b"1" * 5000]))
            headers = {"Content-Type": data.draw(types)}
        code, text = asked(server, method.upper(), path, body, headers)
        outcomes[str(code)] += 1
        if code >= 500:
            found[f"{code} of {method} {template}: {text[:200]!r} for {(body or path.encode())[:200]!r}"] += 1
        elif code not in (200, 202) and not (re.match(rb'\{"error": ".|40[45]: ', text) or _not_ours(path, code, text)):
            found[f"{code} without words of {method} {path}: {text[:200]!r}"] += 1

    each()
    server.post("/chromakit/settings", {"prompts_while_training": "yield"})
    for left in server.get("/chromakit/jobs"):
        if left["state"] in ACTIVE:
            server.post(f"/chromakit/jobs/{left['id']}/stop")
            until_not(server, left["id"], ACTIVE)
    finish(found, outcomes)


def _not_ours(path: str, code: int, text: bytes) -> bool:
    """What ComfyUI answers itself: an address that is too long, or of no route (braces never are)."""
    return (code == 400 and len(path) > 8000) or (code == 404 and text == b"")


def _part(text: str) -> str:
    return quote(text[:200], safe="", errors="replace") or "%20"


def asked(server: Host, method: str, path: str, body: bytes | None, headers: dict[str, str]) -> tuple[int, bytes]:
    request = Request(server.url + path, data=body, method=method, headers=headers)
    try:
        with urlopen(request, timeout=SECONDS) as answer:
            return answer.status, answer.read()
    except HTTPError as error:
        return error.code, error.read()


# --- nodes ------------------------------------------------------------------------------------------------------------

SMALL = {
    "ChromaLoadModel": {"flavour": "tiny", "precision": "fp32", "text_precision": "fp32"},
    "ChromaTextEncode": {"text": "a star"},
    "ChromaEmptyLatent": {"width": 64, "height": 64},
    "ChromaSampler": {"steps": 1, "guidance": 1.0},
    "ChromaDataset": {"folder": "sks_emblem", "trigger": "sks"},
    "ChromaDatasetFromImages": {"captions": "a star"},
    "ChromaTrainLora": {"steps": 1, "rank": 1, "target": "tiny", "name": "odd"},
    "ChromaParity": {"width": 64, "height": 64, "steps": 1, "guidance": 1.0, "factors": "none", "prompt": "a star"},
    "ChromaTailSigmas": {"steps": 4, "width": 64, "height": 64},
    "ChromaExtractLora": {"rank": 1},
}
"""Values that make a node quick."""


def graph(server: Host, name: str, job: str, lora: str) -> dict[str, Any]:
    """A prompt that runs the node `name`, as "odd", with every input that it takes."""
    at = at_defaults
    prompt: dict[str, Any] = {
        "load": node("ChromaLoadModel", **SMALL["ChromaLoadModel"]),
        "text": node("ChromaTextEncode", text_encoder=["load", 1], text="a star", trigger=""),
        "latent": node("ChromaEmptyLatent", width=64, height=64, batch_size=1),
        "dataset": at(server, "ChromaDataset", **SMALL["ChromaDataset"]),
        "settings": at(server, "ChromaTrainingSettings"),
        "image": node("EmptyImage", width=64, height=64, batch_size=1, color=255),
        "mask": node("SolidMask", value=1.0, width=64, height=64),
        "lora": node("ChromaApplyLora", model=["load", 0], lora=lora, strength=1.0),
        "trained": node("ChromaWaitForTraining", job=job),
    }
    links = {
        "CHROMA_MODEL": ["lora" if name == "ChromaMergeLora" else "load", 0],
        "CHROMA_TEXT_ENCODER": ["load", 1],
        "CHROMA_DATASET": ["dataset", 0],
        "CHROMA_TRAINING": ["settings", 0],
        "CHROMA_JOB": job,
        "CONDITIONING": ["text", 0],
        "LATENT": ["latent", 0],
        "IMAGE": ["image", 0],
        "MASK": ["mask", 0],
        "LORA_MODEL": ["trained", 0],
    }
    info = server.get(f"/object_info/{name}")[name]["input"]
    types = {key: value[0] for group in ("required", "optional") for key, value in info.get(group, {}).items()}
    own = {key: links[kind] for key, kind in types.items() if isinstance(kind, str) and kind in links}
    if "lora" in types:
        own["lora"] = lora
    if name == "ChromaInspectLora":
        own = {key: value for key, value in own.items() if key in ("lora", "model")}
    prompt["odd"] = at(server, name, **{**own, **SMALL.get(name, {})})
    prompt["show"] = node("PreviewAny", source=["odd", 0])
    return _needed(prompt, "show")


def is_link(value: Any) -> bool:
    match value:
        case [str(), int() | float()]:
            return True
    return False


def _needed(prompt: dict[str, Any], end: str) -> dict[str, Any]:
    found, left = {}, [end]
    while left:
        key = left.pop()
        found[key] = prompt[key]
        left += [value[0] for value in prompt[key]["inputs"].values() if isinstance(value, list) and value[0] in prompt]
    return found


def test_nodes(server: Host, job: str):
    lora = server.get(f"/chromakit/jobs/{job}")["lora_name"]
    graphs = {name: json.dumps(graph(server, name, job, lora)) for name in pack_node_ids()}
    links = some.sampled_from(
        [("PrimitiveInt", -1), ("PrimitiveInt", 2**62), ("PrimitiveFloat", 1e300), ("PrimitiveString", "\ud800"),
         ("PrimitiveString", "no such"), ("PrimitiveBoolean", True)]
    )  # fmt: skip
    found: Counter[str] = Counter()
    outcomes: Counter[str] = Counter()

    @cases(PROMPT_CASES)
    @given(some.data())
    def each(data: some.DataObject) -> None:
        name = data.draw(some.sampled_from(sorted(graphs)))
        prompt = json.loads(graphs[name])
        inputs = prompt["odd"]["inputs"]
        for place in data.draw(some.lists(some.sampled_from(sorted(inputs)), min_size=1, max_size=2, unique=True)):
            if data.draw(some.integers(0, 9)) == 0:
                kind, value = data.draw(links)
                prompt[f"link_{place}"] = node(kind, value=value)
                inputs[place] = [f"link_{place}", 0]
            else:
                # ComfyUI takes a wrapped list for a link once it is unwrapped, and its queue dies of a missing node.
                value = data.draw(ODD.filter(lambda drawn: not is_link(drawn)))
                inputs[place] = {"__value__": value} if isinstance(value, list) else value
        right = json.loads(graphs[name])["odd"]["inputs"]
        changed = {key: value for key, value in inputs.items() if value != right[key]}
        said = f"{name} {json.dumps(changed)[:300]}"
        try:
            entry = server.wait(server.post_prompt(prompt), SECONDS, check=False)
        except PromptRejected as rejected:
            outcomes["refused"] += 1
            text = str(rejected)
            if "exception_during" in text or "Internal Server Error" in text:
                found[f"{said}: {text[:600]}"] += 1
            return
        outcomes[entry["status"]["status_str"]] += 1
        failure = dict(entry["status"]["messages"]).get("execution_error")
        if failure and failure["exception_type"].rpartition(".")[2] not in OURS:
            raised = f"{failure['exception_type']}: {failure['exception_message'][:300]}"
            found[f"{said}: {raised} {failure['traceback'][-1]}"] += 1
        models = server.base / "output" / "diffusion_models"
        for written in models.iterdir() if models.is_dir() else ():  # each some megabytes
            if written.is_file():
                written.unlink()

    each()
    finish(found, outcomes)
