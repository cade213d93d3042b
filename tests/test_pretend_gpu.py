"""Full-size training on a GPU that is not there: devices, types, memory, FLOPs, and what the host would wait for."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from recon import RECONSTRUCTORS

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the pretend GPU is compiled by g++")


def case(*arguments):
    """What a case of pretend_gpu_cases.py prints, in a process of its own: torch must come after the pretend GPU."""
    command = [sys.executable, "-m", "tests.pretend_gpu_cases", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("run", ["carve3d_train", "mvdream_lgm"])
def test_a_painter_paints_and_learns(run, precision):
    """SDXL with gradient checkpointing, MVDream without."""
    found = case("painter", run, precision, "1" if run == "carve3d_train" else "")
    assert found["problems"] == []
    assert found["sampling"] == found["update"] == []  # within a loop the host waits for nothing and copies nothing
    assert found["scaler"] == (precision == "fp16") and found["steps"] == 1
    assert found["on_host"] == found["text_encoder"] == "cpu"  # where what is not needed waits
    if run == "carve3d_train":
        assert found["flops"] == pytest.approx(13.5e12, rel=0.02)  # of a guided pass, for each sample
        assert found["peak"] < 12 * GIB  # without checkpointing 34


@pytest.mark.parametrize("name", list(RECONSTRUCTORS))
def test_every_reconstructor_judges(name):
    found = case("reconstructor", name, "bf16")
    assert found["problems"] == [] and found["devices"] == ["cuda:0"]
    assert found["shapes"] == [[2], [2, 4, 3, 128, 128]]


def test_the_trainer_validates_samples_and_updates(tmp_path):
    found = case("trainer", "mvdream_lgm", "fp16", tmp_path)
    assert found["problems"] == [] and found["kinds"] == ["validation", "epoch", "epoch", "update"]
    assert found["pictures"] == ["0000.png", "0001.png", "epoch_0000.png", "epoch_0001.png", "validation_0000.png"]


def test_faults_are_noticed():
    faults = case("faults")["faults"]
    assert faults["none"]["error"] == "" and faults["none"]["problems"] == []
    for fault in ("cameras on the CPU", "latents on the CPU"):
        assert "same device" in faults[fault]["error"], fault
    assert "indices should be on the CPU" in faults["a table on the CPU indexed from the GPU"]["error"]
    (problem,) = faults["float32 into a half-precision layer"]["problems"]
    assert problem.startswith("addmm of torch.float16 and torch.float32 at tests/pretend_gpu_cases.py")
    waits = {
        "an index on the CPU": "a copy to the GPU",
        "a new tensor in the loop": "a copy to the GPU",
        "a scalar read": "a scalar is read",
        "a boolean mask": "a boolean mask",
    }
    for fault, kind in waits.items():
        assert faults[fault]["waits"] == [kind], fault
