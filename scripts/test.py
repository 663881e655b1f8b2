"""Runs the tests: `python scripts/test.py [--core] [--host] [--browser] [--lint] [pytest options]`.

Without a choice, core, host and browser run. Each part is a pytest process of its own, because the host's `comfy`
package changes torch's global settings when it is imported. The exit status is 0 only if everything passed.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time

from _environment import ROOT, ensure_environment, say

PARTS = ("core", "host", "browser")
COUNTED = ("passed", "failed", "error", "errors", "skipped", "xfailed", "xpassed", "deselected")
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
NOTHING_COLLECTED = 5
PROCESSES = {"core": min(4, os.cpu_count() or 1), "host": min(2, os.cpu_count() or 1)}
"""Core tests share nothing but the file system, host tests a server for each process: their files are dealt out."""


def arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        allow_abbrev=False,
        epilog="Everything else goes to pytest, e.g. -k resume, -x, -q, --durations=10.",
    )
    parser.add_argument("--core", action="store_true", help="chroma_core alone, without the host")
    parser.add_argument("--host", action="store_true", help="in a real ComfyUI server")
    parser.add_argument("--browser", action="store_true", help="in a real Chromium (as root: installed through apt)")
    parser.add_argument("--lint", action="store_true", help="ruff on everything, pyright on chroma_core")
    return parser.parse_known_args()


def run(command: list[str]) -> tuple[int, str]:
    """Run a command, show its output as it comes, and return its status and last line."""
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    last = ""
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        last = line.strip() or last
    return process.wait(), last


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


def main() -> int:
    chosen, extra = arguments()
    ensure_environment()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    parts = [part for part in PARTS if getattr(chosen, part)] or ([] if chosen.lint else list(PARTS))
    start, counts, failed = time.monotonic(), dict.fromkeys(COUNTED, 0), []

    lints = [["ruff", "check", "."], ["pyright"]] if chosen.lint else []
    for lint in lints:
        print(f"\n=== {' '.join(lint)} ===", flush=True)
        status, _ = run([sys.executable, "-m", *lint])
        counts["passed" if status == 0 else "failed"] += 1
        failed += [lint[0]] if status else []

    if "browser" in parts:
        os.environ["CHROMIUM_PATH"] = find_chromium() or ""
        if not os.environ["CHROMIUM_PATH"]:
            print(
                "No chromium or google-chrome was found, and only root can install it through apt. Install one, "
                "or name it in CHROMIUM_PATH, or choose the other parts: python scripts/test.py --core --host"
            )
    empty = 0
    for part in parts:
        print(f"\n=== tests/{part} ===", flush=True)
        processes = PROCESSES.get(part, 1)
        dealt = ["-n", str(processes), "--dist", "loadfile"] if processes > 1 else []
        status, last = run([sys.executable, "-m", "pytest", f"tests/{part}", *dealt, *extra])
        for number, word in re.findall(r"(\d+) (\w+)", last):
            if word in counts:
                counts[word] += int(number)
        if status == NOTHING_COLLECTED and extra:
            empty += 1  # a -k that fits another part
        elif status != 0:
            failed.append(f"tests/{part}")
    if parts and empty == len(parts):
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
