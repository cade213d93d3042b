"""Full-size training on a GPU that is not there: devices, types, memory, FLOPs, and what the host would wait for."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from recon import RECONSTRUCTORS
from tests import children

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30

pytestmark = pytest.mark.pretend_gpu


@pytest.fixture
def case(tmp_path):
    """case(name, *arguments): what a case of pretend_gpu_cases.py found."""

    def case(*arguments):
        return printed(children.command("tests.pretend_gpu_cases", arguments, tmp_path, pretend_gpu=True))

    return case


def printed(done):
    """What a finished case has printed."""
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("run", "precision", "checkpointing", "gib"),
    [
        # each path is in one of these
        ("carve3d_train", "bf16", "", None),
        ("mvdream_lgm", "fp16", "1", None),
        # with all layers, and for all pairs of them
        pytest.param("carve3d_train", "bf16", "", 36, marks=pytest.mark.slow),
        pytest.param("carve3d_train", "fp16", "1", 12, marks=pytest.mark.slow),
        pytest.param("mvdream_lgm", "fp16", "1", 7.5, marks=pytest.mark.slow),
        pytest.param("mvdream_lgm", "fp16", "", 7.5, marks=pytest.mark.slow),
        pytest.param("mvdream_lgm", "bf16", "1", 7.5, marks=pytest.mark.slow),
    ],
)
def test_a_painter_paints_and_learns(case, run, precision, checkpointing, gib, tmp_path):
    """gib: the most that an update of two samples by the painter of full size may occupy; None: of full width only."""
    found = case("painter", run, precision, tmp_path, checkpointing, *(["deep"] if gib else []))
    assert found["problems"] == []
    assert found["sampling"] == found["update"] == []  # within a loop the host waits for nothing and copies nothing
    assert found["scaler"] == (precision == "fp16") and found["steps"] == 1
    assert found["on_host"] == found["text_encoder"] == "cpu"  # where what is not needed waits
    if gib:
        assert found["peak"] < gib * GIB
        if run == "carve3d_train":
            assert found["flops"] == pytest.approx(13.5e12, rel=0.02)  # of a guided pass, for each sample


def test_every_reconstructor_judges(case):
    found = case("reconstructors", "bf16")
    assert found.keys() == {*RECONSTRUCTORS, "mvdream_instantmesh"}
    for name, judged in found.items():
        assert judged["problems"] == [] and judged["devices"] == ["cuda:0"], name
        assert judged["shapes"] == [[2], [2, 4, 3, 128, 128]], name
        # TinyLRM has to ask which cells and rays matter; nothing is copied for every block of points
        rendering = [wait for wait in judged["waits"] if "recon/volume_rendering.py" in wait]
        assert all(name == "tiny_lrm" and wait.startswith("nonzero") for wait in rendering), (name, rendering)
        assert len(judged["waits"]) < 80, name


def test_the_trainer_validates_samples_and_updates(case, tmp_path):
    found = case("trainer", "mvdream_lgm", "fp16", tmp_path)
    assert found["problems"] == [] and found["kinds"] == ["validation", "epoch", "epoch", "update"]
    assert found["pictures"] == ["0000.png", "0001.png", "epoch_0000.png", "epoch_0001.png", "validation_0000.png"]


WHERE = """
import json
import tools.pretend_gpu
import torch
from tools.pretend_gpu.watch import place
with torch._subclasses.FakeTensorMode():
    print(json.dumps([str(torch.ones(2, device="cuda").device), place()]))
"""


def test_it_is_found_from_any_checkout_and_folder(tmp_path):
    """In a copy, in a folder whose name has a space."""
    checkout = tmp_path / "a checkout"
    for room in ("config", "tools"):
        shutil.copytree(ROOT / room, checkout / room, ignore=shutil.ignore_patterns("__pycache__"))
    (checkout / "where.py").write_text(WHERE)
    command = [sys.executable, "-m", "where"]
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert printed(done) == ["cuda:0", "where.py:7"]


def test_faults_are_noticed(case, tmp_path):
    faults = case("faults", tmp_path / "made")["faults"]
    for sound in ("none", "none, with autocast"):
        assert faults[sound]["error"] == "" and faults[sound]["problems"] == [], sound
    for fault in ("cameras on the CPU", "latents on the CPU"):
        assert "same device" in faults[fault]["error"], fault
    assert "indices should be on the CPU" in faults["a table on the CPU indexed from the GPU"]["error"]
    for fault in ("float32 into a half-precision layer", "no autocast around float32 weights"):
        (problem,) = faults[fault]["problems"]
        assert problem.startswith("addmm of torch.float16 and torch.float32 at tests/pretend_gpu_cases.py"), fault
    waits = {
        "an index on the CPU": "a copy to the GPU",
        "a new tensor in the loop": "a copy to the GPU",
        "a scalar read": "a scalar is read",
        "a boolean mask": "a boolean mask",
    }
    for fault, kind in waits.items():
        assert faults[fault]["waits"] == [kind], fault
