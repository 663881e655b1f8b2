"""A small server on loopback that speaks the Hub's file protocol, and fails in the ways in which the Hub fails.

What the client sees of the real one: `/api/models/…` lists a commit's files with sizes and checksums; `/…/resolve/…`
gives small files itself (ETag: the git object id) and sends large ones on to another host with X-Linked-Size and
X-Linked-Etag (their SHA-256), which serves byte ranges. `127.0.0.1` is the Hub here and `localhost` that other host.
Errors carry X-Error-Code. Every request is kept in `log`.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

REPOSITORY = "lodestones/Chroma1-Base"


@cache
def sha256(content: bytes) -> str:
    """Checksum of a large file."""
    return hashlib.sha256(content).hexdigest()


def checksum(path: str, content: bytes) -> str:
    """The SHA-256 of a file that the Hub keeps in large file storage, the git object id of another."""
    if is_large(path):
        return sha256(content)
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_large(path: str) -> bool:
    """Whether the Hub would send the client on to its storage for this file."""
    return path.endswith((".safetensors", ".model", ".bin"))


@dataclass(frozen=True)
class Request:
    """One request as it arrived. `host` is 127.0.0.1 (the Hub) or localhost (its storage)."""

    method: str
    host: str
    path: str
    range: str | None
    token: str | None


@dataclass
class Fault:
    """What happens to the next `times` requests whose path contains `path` (and that ask for a range, if `ranged`).

    status: answered instead, with X-Error-Code `code`. cut: bytes after which the connection closes. wait: seconds
    before the answer. body: sent instead of the true content. whole: the range that was asked for is ignored.
    """

    path: str
    times: int = 1
    method: str = "GET"
    ranged: bool | None = None
    status: int = 0
    code: str = ""
    cut: int | None = None
    wait: float = 0.0
    body: bytes | None = None
    whole: bool = False


@dataclass
class HubServer:
    """Serve `commits` (commit → path → content) of REPOSITORY; `branches` maps a name to a commit.

    token: needed for every file, as for a gated repository. claimed: sizes to list instead of the true ones. xet:
    path → hash and the address of a content store, for files that are offered over xet as well. pace: bytes per
    second of each answer.
    """

    commits: dict[str, dict[str, bytes]]
    branches: dict[str, str] = field(default_factory=dict)
    token: str | None = None
    claimed: dict[str, int] = field(default_factory=dict)
    xet: dict[str, tuple[str, str]] = field(default_factory=dict)
    pace: float = 0.0
    faults: list[Fault] = field(default_factory=list)
    log: list[Request] = field(default_factory=list)

    def __enter__(self) -> HubServer:
        server = self

        class Handler(_Handler):
            hub = server

        self._http = _Quiet(("127.0.0.1", 0), Handler)
        self.port = self._http.server_address[1]
        self._lock, self.closed = threading.Lock(), threading.Event()
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closed.set()
        self._http.shutdown()
        self._http.server_close()

    @property
    def endpoint(self) -> str:
        """For HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.port}"

    def asked(self, part: str = "", method: str = "GET") -> list[Request]:
        """The requests so far whose path contains `part`."""
        return [r for r in self.log if part in r.path and r.method == method]

    def content(self, digest: str) -> bytes | None:
        """A large file by its SHA-256."""
        found = (c for files in self.commits.values() for p, c in files.items() if checksum(p, c) == digest)
        return next(found, None)

    def take_fault(self, request: Request) -> Fault | None:
        """The fault that this request meets; there is one time less of it then."""
        with self._lock:
            for fault in self.faults:
                fits = fault.ranged is None or fault.ranged == (request.range is not None)
                if fault.times > 0 and fault.method == request.method and fault.path in request.path and fits:
                    fault.times -= 1
                    return fault
        return None


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that was killed; what matters is in `HubServer.log`


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass  # `HubServer.log` has it

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        host = self.headers["Host"].partition(":")[0]
        path = unquote(address.path)
        request = Request(self.command, host, path, self.headers["Range"], self.headers["Authorization"])
        self.hub.log.append(request)
        fault = self.hub.take_fault(request)
        if fault is not None and fault.wait:
            self.hub.closed.wait(fault.wait)
        if fault is not None and fault.status:
            return self.refuse(fault.status, fault.code)
        steps = request.path.strip("/").split("/")
        if host == "localhost" and steps[0] == "storage":
            return self.send_large(steps[1], fault)
        if steps[:2] == ["api", "models"]:
            return self.list_files(steps[2:], fault)
        if steps[2:3] == ["resolve"]:
            return self.resolve(steps, fault)
        self.refuse(404, "")

    do_HEAD = do_GET

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", f"{code} says the server")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def files_of(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Commit and files; answers the request itself and returns None when there is no such thing."""
        if name != REPOSITORY:
            self.refuse(404, "RepoNotFound")
            return None
        commit = self.hub.branches.get(revision, revision)
        if commit not in self.hub.commits:
            self.refuse(404, "RevisionNotFound")
            return None
        return commit, self.hub.commits[commit]

    def list_files(self, steps: list[str], fault: Fault | None) -> None:
        kind = steps[2] if len(steps) > 2 else "revision"
        revision = "/".join(steps[3:]) or "main"
        found = self.files_of("/".join(steps[:2]), revision)
        if found is None:
            return
        commit, files = found
        if kind == "xet-read-token":
            return self.send_xet_token()
        entries = []
        for path, content in files.items():
            size = self.hub.claimed.get(path, len(content))
            digest, git = checksum(path, content), hashlib.sha1(content).hexdigest()
            if kind == "tree":
                entry = {"type": "file", "path": path, "size": size, "oid": git if is_large(path) else digest}
                lfs = {"oid": digest, "size": size, "pointerSize": 135}
            else:
                entry = {"rfilename": path, "size": size, "blobId": git if is_large(path) else digest}
                lfs = {"sha256": digest, "size": size, "pointerSize": 135}
            entries.append(entry | ({"lfs": lfs} if is_large(path) else {}))
        answer = entries if kind == "tree" else {"id": REPOSITORY, "sha": commit, "siblings": entries}
        self.send_bytes(json.dumps(answer).encode(), {"Content-Type": "application/json"}, fault)

    def resolve(self, steps: list[str], fault: Fault | None) -> None:
        found = self.files_of("/".join(steps[:2]), steps[3])
        if found is None:
            return
        commit, files = found
        path = "/".join(steps[4:])
        if path not in files:
            return self.refuse(404, "EntryNotFound")
        if self.hub.token and self.headers["Authorization"] != f"Bearer {self.hub.token}":
            return self.refuse(401, "GatedRepo")
        digest = checksum(path, files[path])
        if not is_large(path):
            return self.send_bytes(files[path], {"ETag": f'"{digest}"', "X-Repo-Commit": commit}, fault)
        self.send_response(302)
        self.send_header("Location", f"http://localhost:{self.hub.port}/storage/{digest}?Signature={len(self.hub.log)}")
        self.send_header("X-Repo-Commit", commit)
        self.send_header("X-Linked-Size", str(len(files[path])))
        self.send_header("X-Linked-Etag", f'"{digest}"')
        if path in self.hub.xet:
            self.send_header("X-Xet-Hash", self.hub.xet[path][0])
            route = f"{self.hub.endpoint}/api/models/{REPOSITORY}/xet-read-token/{commit}"
            self.send_header("Link", f'<{route}>; rel="xet-auth"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send_xet_token(self) -> None:
        store, expires = next(iter(self.hub.xet.values()))[1], int(time.time()) + 3600
        headers = {"X-Xet-Cas-Url": store, "X-Xet-Access-Token": "t", "X-Xet-Token-Expiration": str(expires)}
        self.send_bytes(json.dumps({"accessToken": "t", "exp": expires, "casUrl": store}).encode(), headers, None)

    def send_large(self, digest: str, fault: Fault | None) -> None:
        content = self.hub.content(digest)
        if content is None:
            return self.refuse(404, "")
        self.send_bytes(content, {"ETag": f'"{digest}"', "Accept-Ranges": "bytes"}, fault)

    def send_bytes(self, content: bytes, headers: dict[str, str], fault: Fault | None) -> None:
        """The content, or the range of it that was asked for; cut off where a fault says so."""
        if fault is not None and fault.body is not None:
            content = fault.body
        start = 0
        if self.headers["Range"] and not (fault is not None and fault.whole):
            start = int(self.headers["Range"].removeprefix("bytes=").partition("-")[0])
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if self.command == "HEAD":
            return
        stop = len(content) if fault is None or fault.cut is None else start + fault.cut
        try:
            for at in range(start, stop, 1 << 20):
                piece = content[at : min(at + (1 << 20), stop)]
                self.wfile.write(piece)
                if self.hub.pace:
                    self.hub.closed.wait(len(piece) / self.hub.pace)
        except (BrokenPipeError, ConnectionResetError):
            stop = 0  # the client gave up
        if stop < len(content):
            self.close_connection = True
