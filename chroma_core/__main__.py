"""`python -m chroma_core`: see `cli/main.py`."""

import sys

from .cli.main import main

sys.exit(main())
