"""The commands beside training, one file each: `python -m tools.NAME --help` explains NAME."""

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # or its import names every optional package that is missing
