"""A real ComfyUI server as a process of its own, driven through its HTTP API, with this pack as its only custom node.

A `Host` is a running server:

    with start_comfyui(comfyui, base) as host:
        history = host.run(json.loads(Path("example_workflows/api/text_to_image.json").read_text()))
        images = host.images(history)

Standard library only (Pillow when images are read); nothing of ComfyUI is imported.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

PACK = Path(__file__).resolve().parents[2]
"""The pack's folder."""

PACK_NAME = "chromakit"
NOT_PART_OF_THE_PACK = shutil.ignore_patterns(".*", "demo-output", "node_modules", "test-output", "__pycache__")
START_TIMEOUT = 300.0  # seconds; 11–16 on a quiet machine, minutes when the libraries come from a cold disk


class HostError(RuntimeError):
    """The server did not start, went away, or answered with an error; the message carries the end of its log."""


class PromptRejected(HostError):
    """`POST /prompt` was refused; `node_errors` maps node ids to what was wrong with them."""

    def __init__(self, answer: dict[str, Any]):
        self.error = answer.get("error", {})
        self.node_errors: dict[str, Any] = answer.get("node_errors", {})
        super().__init__(json.dumps({"error": self.error, "node_errors": self.node_errors}, indent=1))


class PromptFailed(HostError):
    """A prompt was accepted and then failed or was interrupted; `messages` are the host's status messages."""

    def __init__(self, prompt_id: str, messages: list):
        self.messages = messages
        details = [body for kind, body in messages if kind in ("execution_error", "execution_interrupted")]
        self.exception_message = (details[-1] if details else {}).get("exception_message", "")
        super().__init__(f"prompt {prompt_id} did not succeed: {self.exception_message or messages}")


class Host:
    """One running ComfyUI server; `base` is its base directory (input, output, models, user, custom_nodes)."""

    def __init__(self, process: subprocess.Popen, url: str, base: Path, log_path: Path):
        self.process, self.url, self.base, self.log_path = process, url, base, log_path
        self.client_id = uuid.uuid4().hex

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def request(self, method: str, path: str, body: Any = None, timeout: float = 60.0) -> tuple[int, bytes]:
        """(status, body) of one request; HTTP errors are statuses here, not exceptions."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data=data, method=method)
        if data is not None:
            request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()
        except (OSError, http.client.HTTPException) as error:
            raise HostError(f"{method} {path}: ComfyUI does not answer ({error}).\n{self.log_tail()}") from error

    def get(self, path: str) -> Any:
        """The JSON that `GET path` answers; HostError for anything but 200."""
        status, body = self.request("GET", path)
        if status != 200:
            raise HostError(f"GET {path} answered {status}: {body[:500].decode(errors='replace')}")
        return json.loads(body)

    def post(self, path: str, body: Any = None) -> tuple[int, Any]:
        """(status, JSON or None) of `POST path`."""
        status, answer = self.request("POST", path, {} if body is None else body)
        try:
            return status, json.loads(answer) if answer else None
        except ValueError:
            return status, answer.decode(errors="replace")

    def post_prompt(self, prompt: dict[str, Any]) -> str:
        """Queue an API-format prompt and return its id; PromptRejected if the host refuses it, or a part of it: then it
        is taken back, since the rest would run and nobody hear of it."""
        status, answer = self.post("/prompt", {"prompt": prompt, "client_id": self.client_id})
        if status != 200:
            raise PromptRejected(answer if isinstance(answer, dict) else {"error": answer})
        if answer.get("node_errors"):
            self.post("/queue", {"delete": [answer["prompt_id"]]})
            self.post("/interrupt", {"prompt_id": answer["prompt_id"]})
            raise PromptRejected(answer)
        return answer["prompt_id"]

    def finished(self, prompt_id: str) -> dict[str, Any] | None:
        """The prompt's history entry once it has ended, in whatever way."""
        return self.get(f"/history/{prompt_id}").get(prompt_id)

    def wait(self, prompt_id: str, timeout: float = 300.0, check: bool = True) -> dict[str, Any]:
        """A prompt's history entry once it has ended; PromptFailed unless it succeeded (`check=False`: either way)."""
        deadline = time.monotonic() + timeout
        while (entry := self.finished(prompt_id)) is None:
            if time.monotonic() > deadline:
                raise HostError(f"prompt {prompt_id} has not ended after {timeout:.0f} s.\n{self.log_tail()}")
            time.sleep(0.1)
        if check and entry["status"]["status_str"] != "success":
            raise PromptFailed(prompt_id, entry["status"]["messages"])
        return entry

    def run(self, prompt: dict[str, Any], timeout: float = 300.0) -> dict[str, Any]:
        """Queue a prompt, wait for it, return its history entry."""
        return self.wait(self.post_prompt(prompt), timeout)

    def image_files(self, history: dict[str, Any], kind: str = "output") -> list[tuple[str, bytes]]:
        """(file name, bytes) of a history entry's images, by output node's id; `kind` "temp" for mere previews."""
        outputs = history["outputs"]
        images = [
            i for node in sorted(outputs, key=lambda key: (len(key), key)) for i in outputs[node].get("images", [])
        ]
        return [(image["filename"], self.view(image)) for image in images if image["type"] == kind]

    def view(self, file: dict[str, Any]) -> bytes:
        """The bytes of a file that a node saved, as its output names it."""
        query = urllib.parse.urlencode({key: file[key] for key in ("filename", "subfolder", "type")})
        status, body = self.request("GET", f"/view?{query}")
        if status != 200:
            raise HostError(f"GET /view?{query} answered {status}")
        return body

    def images(self, history: dict[str, Any], kind: str = "output") -> list:
        """The same images as RGB `PIL.Image`s."""
        from PIL import Image

        return [Image.open(BytesIO(body)).convert("RGB") for _, body in self.image_files(history, kind)]

    def nodes_replayed(self, history: dict[str, Any]) -> set[str]:
        """Ids of the nodes whose cached output the host replayed instead of running them."""
        cached = [body["nodes"] for kind, body in history["status"]["messages"] if kind == "execution_cached"]
        return set().union(*cached)

    def forget_cached_outputs(self) -> None:
        """Drop loaded models and every cached node output, so that the next prompt really runs all its nodes."""
        status, answer = self.post("/free", {"unload_models": True, "free_memory": True})
        if status != 200:
            raise HostError(f"POST /free answered {status}: {answer}")
        time.sleep(0.5)  # the prompt worker acts on the flags when it wakes up

    def alive(self) -> bool:
        return self.process.poll() is None

    def log_tail(self, lines: int = 40) -> str:
        try:
            text = self.log_path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""
        return f"--- end of {self.log_path} ---\n" + "\n".join(text.splitlines()[-lines:])

    def stop(self) -> None:
        """Ask the server to end (as Ctrl+C does), and insist after 15 seconds."""
        if self.alive():
            self.process.send_signal(signal.SIGINT if os.name != "nt" else signal.SIGTERM)
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def place_pack(base: Path) -> Path:
    """Put this pack into `base`/custom_nodes: a link, or a copy where links are not allowed."""
    target = base / "custom_nodes" / PACK_NAME
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_symlink():
        target.unlink()
    elif target.exists():
        shutil.rmtree(target)
    try:
        target.symlink_to(PACK, target_is_directory=True)
    except OSError:
        shutil.copytree(PACK, target, ignore=NOT_PART_OF_THE_PACK)
    return target


def find_comfyui() -> Path | None:
    """The ComfyUI that COMFYUI_PATH names, else the one around this pack, else the scripts' own; None without."""
    named = os.environ.get("COMFYUI_PATH")
    if named:
        return Path(named).expanduser().resolve()
    places = (PACK.parents[2] if PACK.parent.name == "custom_nodes" else None, PACK / ".host" / "ComfyUI")
    return next((place for place in places if place is not None and (place / "main.py").is_file()), None)


def start_comfyui(
    comfyui: Path,
    base: Path,
    *,
    cpu: bool = True,
    port: int | None = None,
    extra: tuple[str, ...] = (),
    on_wait: Callable[[float], None] | None = None,
    launch: Callable[[list[str], Path, Path], Any] | None = None,
) -> Host:
    """Start the server of the folder `comfyui` on the base directory `base`, and return when it answers.

    launch: gives the process of (command, folder, log file), with the methods of `subprocess.Popen`; None: such a one.
    Raises HostError, with the end of the log, if it does not come up.
    """
    base = base.resolve()
    for name in ("input", "output", "models", "user", "temp"):
        (base / name).mkdir(parents=True, exist_ok=True)
    place_pack(base)
    port = port or free_port()
    log_path = base / "host.log"
    command = [sys.executable, "-u", "main.py", "--port", str(port), "--base-directory", str(base)]
    command += ["--database-url", "sqlite:///:memory:", "--disable-auto-launch", "--disable-api-nodes"]
    command += ["--disable-all-custom-nodes", "--whitelist-custom-nodes", PACK_NAME]
    command += ["--cpu"] if cpu else []
    process = (launch or _popen)([*command, *extra], comfyui, log_path)
    host = Host(process, f"http://127.0.0.1:{port}", base, log_path)
    try:
        _wait_until_ready(host, on_wait)
    except BaseException:
        host.stop()
        raise
    return host


def _popen(command: list[str], folder: Path, log_path: Path) -> subprocess.Popen:
    own = None if os.name == "nt" else _own_signals
    with log_path.open("wb") as log:
        return subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT, preexec_fn=own)


def _own_signals() -> None:
    """In the child: a session of its own, so that Ctrl+C reaches it only through us, and SIGINT is never ignored."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _wait_until_ready(host: Host, on_wait: Callable[[float], None] | None) -> None:
    start = time.monotonic()
    while True:
        waited = time.monotonic() - start
        if not host.alive():
            raise HostError(f"ComfyUI ended with {host.process.returncode} while starting.\n{host.log_tail(80)}")
        try:
            if host.request("GET", "/system_stats", timeout=5)[0] == 200:
                return
        except HostError:
            pass  # not listening yet
        if waited > START_TIMEOUT:
            raise HostError(f"ComfyUI has not come up within {START_TIMEOUT:.0f} s.\n{host.log_tail(80)}")
        if on_wait:
            on_wait(waited)
        time.sleep(0.25)
