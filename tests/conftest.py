"""Lets tests import the rooms of the repository from anywhere, keeps arithmetic reproducible (one thread), and skips
what this machine cannot run."""

import shutil
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
torch.set_num_threads(1)


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


def pytest_collection_modifyitems(items):
    reasons = missing()
    for item in items:
        for marker in item.iter_markers():
            if marker.name in reasons:
                item.add_marker(pytest.mark.skip(reason=reasons[marker.name]))
