"""The plan of a run: what it costs, and which key mends what does not fit."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from config import dgx
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


@pytest.mark.skipif(shutil.which("g++") is None, reason="the pretend GPU is compiled by g++")
def test_the_command():
    run = [sys.executable, "-m", "tools.plan", "--config", "config/dgx.py:mvdream_lgm", "--gpus", "8", "--memory", "10"]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.fullmatch(
        r"plan: update needs 1\d\.\d GiB and --memory is 10: set config\.train\.\w+ to \w+\n", done.stderr
    )
    gib = {name: float(value) for name, value in re.findall(r"^  ([\w ]+?) +(\d+\.\d\d)", done.stdout, flags=re.M)}
    assert gib["weights"] == pytest.approx(2.7, abs=0.2)  # 0.87 B of UNet, LGM and a VAE in half precision
    assert gib["update"] - gib["weights"] == pytest.approx(8.4, abs=0.5)  # saved for the backward pass of 4 samples
