"""The commands beside training, one file each: `python -m tools.NAME --help` explains NAME."""
