"""The plan of a run: what it costs, and which key mends what does not fit."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from config import dgx
from tests import children
from tests.shallow_painters import write_shallow_painter
from tools.plan import GIB, TERA, check_memory, hours, mend

ROOT = Path(__file__).resolve().parents[1]


def test_hours_of_the_published_run():
    config = dgx.carve3d_train()
    flops = {"policy": 1354e12, "reference": 1352e12, "decode": 10e12, "reward": 7e12, "update": 2898e12}
    assert hours(flops, config, 48 * 312 * TERA * 0.4) == pytest.approx(10.9, abs=0.1)
    config.num_epochs = 1  # the first epoch has no update
    expected = 768 * 2723e12 / (48 * 312 * TERA * 0.4) / 3600
    assert hours(flops, config, 48 * 312 * TERA * 0.4) == pytest.approx(expected)


def test_what_does_not_fit_is_mended_by_the_cheapest_key():
    config = dgx.carve3d_train()
    assert mend("update", 0.5, config) == ("train.gradient_checkpointing", True)
    config.train.gradient_checkpointing = True
    assert mend("update", 0.5, config) == ("train.batch_size", 2)
    config.train.batch_size = 1
    assert mend("update", 0.5, config) == (None, None)
    assert mend("decode", 0.3, config) == ("sample.decode_batch_size", 2)
    config.mixed_precision = "no"
    assert mend("sampling", 0.5, config) == ("mixed_precision", "bf16")


def test_a_stage_that_does_not_fit_is_refused():
    peak, config = {"sampling": 10 * GIB, "update": 65 * GIB}, dgx.carve3d_train()
    check_memory(peak, 5 * GIB, config, memory=65)
    with pytest.raises(ValueError, match="update needs 65.0 GiB and --memory is 24: set config.train.gradient_checkp"):
        check_memory(peak, 5 * GIB, config, memory=24)
    with pytest.raises(ValueError, match="more GPUs, or larger ones"):
        check_memory(peak, 30 * GIB, config, memory=24)


@pytest.mark.skipif(torch.version.cuda is not None, reason="another sentence is said there")
def test_without_a_compiler_it_says_what_is_missing(tmp_path):
    run = [sys.executable, "-m", "tools.plan", "--config", "config/dgx.py:mvdream_lgm"]
    environment = os.environ | {"PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "plan: the pretend GPU is compiled once by g++, which is not installed: install it\n"


@pytest.mark.slow
@pytest.mark.pretend_gpu
@pytest.mark.parametrize(
    ("run", "changes", "gradients_gib", "update", "everything", "hours"),
    [
        # 100 backward passes of 15.4, and without gradients from painting 100 more passes of 13.5
        ("carve3d_train", ["--config.train.gradients_while_painting=False"], 55.2, 2898, 5621, "10.9"),
        ("carve3d_train", [], 55.3, 1543, 4267, "8.3"),
        ("fast", [], 27.7, 1543 / 5, 1815, "3.5"),
    ],
)
def test_the_published_run(run, changes, gradients_gib, update, everything, hours):
    command = [sys.executable, "-m", "tools.plan", "--config", f"config/dgx.py:{run}", "--gpus", "48", *changes]
    done = subprocess.run([*command, "--config.recon.name=grm"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    memory, flops = done.stdout.split("TFLOP per sample")
    gib = {name: float(value) for name, value in re.findall(r"^  ([\w ]+?) +(\d+\.\d\d)", memory, flags=re.M)}
    tflop = {name: float(value.replace(",", "")) for name, value in re.findall(r"^  (\w+) +(\S+)$", flops, flags=re.M)}
    # saved for the backward pass of 4 samples, or 2, without checkpointing, and the network at work
    assert gib["update"] - gib["weights"] == pytest.approx(gradients_gib, rel=0.02)
    assert tflop["policy"] == pytest.approx(1354, rel=0.02)  # 100 guided passes of 13.5
    assert tflop["update"] == pytest.approx(update, rel=0.02)
    assert tflop["all"] == pytest.approx(everything, rel=0.02) and f"{hours} hours" in flops


@pytest.mark.slow
@pytest.mark.pretend_gpu
@pytest.mark.parametrize(("name", "tflops"), [("instant3d_instantmesh", 9.2), ("mvdream_instantmesh", 4.4)])
def test_runs_with_instantmesh(name, tflops):
    """What the large InstantMesh costs: 378 M weights in half precision; 2.8 TFLOP to reconstruct, and the renders."""
    run = [sys.executable, "-m", "tools.plan", "--config", f"config/dgx.py:{name}", "--gpus", "8"]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "reward 0.7, painter" in done.stdout, done.stderr
    reward = re.search(r"TFLOP per sample.*^  reward +(\S+)$", done.stdout, flags=re.M | re.S)[1]
    assert float(reward) == pytest.approx(tflops, rel=0.02)


SHALLOW_SENTENCE = "decode needs 7.8 GiB and --memory is 6: set config.sample.decode_batch_size to 5"
FULL_SENTENCE = "update needs 1\\d.\\d GiB and --memory is 10: set config.train.\\w+ to \\w+"


@pytest.mark.pretend_gpu
@pytest.mark.parametrize(
    ("painter", "memory", "sentence", "weights", "gradients"),
    [
        ("shallow", 6, SHALLOW_SENTENCE, 1.5, 4.9),  # 0.24 B of UNet, 0.42 of LGM and 0.08 of a VAE
        pytest.param("full", 10, FULL_SENTENCE, 2.7, 8.4, marks=pytest.mark.slow),  # 0.87 B of UNet
    ],
)
def test_the_command(tmp_path, painter, memory, sentence, weights, gradients):
    """weights: GiB in half precision; gradients: GiB that are saved for the backward pass of 4 samples."""
    line = ["--config", "config/dgx.py:mvdream_lgm", "--gpus", "8", "--memory", memory, "--config.sample.num_steps=4"]
    if painter == "shallow":
        line.append(f"--config.pretrained.model={write_shallow_painter('mvdream_lgm', tmp_path / 'painter')}")
    done = children.command("tools.plan", line, tmp_path, pretend_gpu=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert re.fullmatch(f"plan: {sentence}\n", done.stderr)
    gib = {name: float(value) for name, value in re.findall(r"^  ([\w ]+?) +(\d+\.\d\d)", done.stdout, flags=re.M)}
    assert gib["weights"] == pytest.approx(weights, abs=0.2)
    assert gib["update"] - gib["weights"] == pytest.approx(gradients, abs=0.5)
