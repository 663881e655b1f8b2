"""Whatever is sent to the routes is answered with a status below 500, in words."""

from __future__ import annotations

import json
import urllib.error
import urllib.request

import pytest

from _host import Host

JOB = "/chromakit/jobs/none-such"
POSTS = (
    "/chromakit/jobs",
    "/chromakit/requests",
    "/chromakit/requests/none/cancel",
    *(f"{JOB}/{action}" for action in ("change", "extend", "delete", "pause", "resume", "stop", "nonsense")),
    *(f"/chromakit/datasets/{name}" for name in ("look", "images", "captions", "crops", "remove", "restore")),
    *(f"/chromakit/datasets/{name}" for name in ("convert", "mask", "undo", "redo", "caption", "caption/stop")),
    "/chromakit/sigmas",
    "/chromakit/density",
    "/chromakit/plan/rows",
    "/chromakit/settings",
)
BODIES = (
    *(b"", b"null", b"[]", b"{}", b"7", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"a":' * 50_000, b"1" * 5000, b"NaN"),
    *(b'{"prompts": [7]}', b'{"folder": 7}', b'{"folder": "\\ud800"}', b'{"folder": "\\u0000"}', b'{"steps": 1e999}'),
    *(b'{"flow_shift": {}}', b'{"values": {"width": 1e400}}', b'{"widgets": []}', b'{"": null}'),
    json.dumps({"width": 10**400, "steps": -(10**400), "flavour": [], "prompts": {"a": {}}}).encode(),
    json.dumps({"prompts": ["a"], "width": 10**300, "loras": [{"path": ["x"]}]}).encode(),
)
QUERIES = (
    "",
    "?points=x",
    "?points=" + "9" * 5000,
    "?after=-1",
    "?size=%D9%A3",
    "?lines=1e9",
    "?width=0",
    "?flavour[]=a",
)
GETS = (
    *(
        "/chromakit",
        "/chromakit/openapi.json",
        "/chromakit/jobs",
        JOB,
        f"{JOB}/metrics",
        f"{JOB}/curve",
        f"{JOB}/log",
        f"{JOB}/graph/api",
        f"{JOB}/samples/0",
    ),
    *("/chromakit/requests/none", "/chromakit/datasets/sheets/..%2f..%2fx", "/chromakit/plan", "/chromakit/memory"),
    *("/chromakit/jobs/%00/curve", "/chromakit/datasets", "/chromakit/datasets/thumbnail"),
)


def status(server: Host, path: str, body: bytes | None = None, kind: str = "application/json") -> tuple[int, bytes]:
    request = urllib.request.Request(
        f"{server.url}{path}", data=body, headers={"Content-Type": kind} if body is not None else {}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


@pytest.mark.parametrize("path", POSTS)
def test_odd_bodies(server: Host, path: str):
    for body in BODIES:
        for kind in ("application/json", "application/json; charset=no-such", "text/plain"):
            code, text = status(server, path, body, kind)
            assert code < 500, (path, body[:60], kind, code, text[:300])
            assert code == 200 or path.endswith("/cancel") or json.loads(text)["error"].strip(), (path, body[:60], text)


def test_odd_queries(server: Host):
    for path in GETS:
        for query in QUERIES:
            code, text = status(server, path + query)
            assert code < 500, (path, query, code, text[:300])
    assert server.get("/chromakit/jobs") is not None
