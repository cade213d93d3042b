"""Lets tests import the rooms of the repository from anywhere, keeps arithmetic reproducible (one thread), skips what
this machine cannot run, and trains once for all."""

import os
import shutil
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # also of what tests start; before torch, which reads it once

# isort: split
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
torch.set_num_threads(1)  # where torch had been imported already


def missing():
    """{marker: why tests that have it cannot run here}"""
    reasons = {}
    if not torch.cuda.is_available():
        reasons["cuda"] = "needs a CUDA device"
    if torch.version.cuda is not None:
        reasons["pretend_gpu"] = "the pretend GPU needs a CPU build of torch"
    elif shutil.which("g++") is None:
        reasons["pretend_gpu"] = "the pretend GPU is compiled by g++"
    return reasons


def place(item):
    """Where a test comes. First the long ones that share what takes seconds, so that one of pytest-xdist's workers
    makes it: those that fork from the process with the pretend GPU, and those that look at the whole run."""
    return (item.get_closest_marker("pretend_gpu") is None, "whole_run" not in item.fixturenames)


def pytest_collection_modifyitems(items):
    items.sort(key=place)
    reasons = missing()
    for item in items:
        for marker in item.iter_markers():
            if marker.name in reasons:
                item.add_marker(pytest.mark.skip(reason=reasons[marker.name]))


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
    assert children.run(children.train, settings(world, logdir, report=True)) == 0
    return logdir / "run"
