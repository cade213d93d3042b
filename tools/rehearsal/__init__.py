"""Small random checkpoints in the formats of the published files, for `python -m tools.rehearse` and for tests."""
