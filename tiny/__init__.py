"""The small world."""

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # or its import names every optional package that is missing
