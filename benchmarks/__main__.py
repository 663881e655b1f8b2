"""`python -m benchmarks NAME …` is `python -m benchmarks.name …`; without a name, what there is."""

from __future__ import annotations

import ast
import runpy
import sys
from pathlib import Path

FOLDER = Path(__file__).parent


def scripts() -> dict[str, str]:
    """The name of each benchmark that can be run, and the first line of what it says of itself."""
    found = {}
    for path in sorted(FOLDER.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        if path.name != "__main__.py" and '__name__ == "__main__"' in text:
            found[path.stem.replace("_", "-")] = (ast.get_docstring(ast.parse(text)) or "").split("\n")[0]
    return found


def main() -> int:
    known, chosen = scripts(), sys.argv[1:2]
    if chosen and chosen[0] in known:
        name = chosen[0].replace("-", "_")
        sys.argv = [f"{sys.argv[0]} {chosen[0]}", *sys.argv[2:]]
        runpy.run_module(f"benchmarks.{name}", run_name="__main__", alter_sys=False)
        return 0
    print("python -m benchmarks NAME [--help]\n")
    print("\n".join(f"    {name:<16} {said}" for name, said in known.items()))
    return 0 if not chosen or chosen[0] in ("-h", "--help") else 2


if __name__ == "__main__":
    sys.exit(main())
