"""Lets tests import the rooms of the repository from anywhere, keeps arithmetic reproducible (one thread), and trains
once for all."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """The small models and prompts of `tests.tiny_models`."""
    from tests.tiny_models import make_world

    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def whole_run(world, tmp_path_factory):
    """The folder of a run in that world that nobody disturbed. Not to be changed."""
    from tests import children
    from tests.tiny_models import settings

    logdir = tmp_path_factory.mktemp("whole")
    assert children.run(children.train, settings(world, logdir)) == 0
    return logdir / "run"
