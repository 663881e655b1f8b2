"""The makers of what the repository ships and shows, run from its root: `python -m tools.tiny.build`.

What they share with the demo and the tests lies in scripts/, whose files are imported by bare name because they also
run before anything is installed.
"""

import sys
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"

if str(SCRIPTS) not in sys.path:
    sys.path.append(str(SCRIPTS))
