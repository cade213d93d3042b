"""What will run on a GPU, as far as it can be tried without: the same stages on this machine's CPU and on the pretend
GPU, and how parts that fail or hang are told."""

import json
import math
import os
import subprocess
import time
from pathlib import Path

import pytest
import torch

from tests import children, gpu
from tests.gpu import (
    GSPLAT,
    PLAN,
    PRESETS,
    WORKLOADS,
    Failed,
    Part,
    compare_resumed,
    loss_scaling,
    resume,
    run_parts,
    small_run,
    table,
)
from tests.tiny_models import flags, make_world

ROOT = Path(__file__).resolve().parents[1]


# -- the stages, on two devices ---------------------------------------------------------------------------------------


@pytest.mark.pretend_gpu
def test_a_real_device_runs_the_stages_that_the_pretend_one_runs(tmp_path):
    make_world(tmp_path)
    found = []
    for where in ("real", "pretend"):
        line = [where, tmp_path]
        done = children.command("tests.measure_cases", line, tmp_path, pretend_gpu=where == "pretend")
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(json.loads(done.stdout.splitlines()[-1]))
    real, pretend = found
    (run, reward), (planned_run, planned_reward) = real, pretend
    for name in ("policy", "reference", "update"):
        # but for the attention of the VAE and the blob, which CPUs do not count
        assert run["flops"][name] == pytest.approx(planned_run["flops"][name], rel=0.02), name  # attention differs
    assert reward["flops"]["reconstruct"] == planned_reward["flops"]["reconstruct"]
    assert reward["flops"]["reward"] <= planned_reward["flops"]["reward"]  # the plan skips no empty space
    assert run["host"] == planned_run["host"] and run["gradient_bytes"] == planned_run["gradient_bytes"]
    for measured, planned in ((run, planned_run), (reward, planned_reward)):
        assert measured["flops"].keys() == planned["flops"].keys() == measured["seconds"].keys()
        assert measured["peak"].keys() == planned["peak"].keys() and planned["seconds"] == {}
        # one is a difference of two times, of which a busy machine makes anything
        assert all(map(math.isfinite, measured["seconds"].values()))
        assert all(peak > sum(planned["weights"].values()) > 0 for peak in planned["peak"].values())


@pytest.mark.slow
@pytest.mark.pretend_gpu
def test_the_recorded_plan_is_that_of_this_code(tmp_path):
    assert gpu.record(tmp_path) == json.loads(PLAN.read_text())


def test_the_recorded_plan_has_every_workload_of_every_preset():
    plan = json.loads(PLAN.read_text())
    assert plan.keys() == {str(gigabytes) for gigabytes in PRESETS}
    for gigabytes in PRESETS:
        assert plan[str(gigabytes)].keys() == WORKLOADS.keys()
        for name, planned in plan[str(gigabytes)].items():
            assert max(planned["peak"].values()) < gigabytes * 1e9 * 0.9, name  # with room for what is not planned
    assert plan["80"]["SDXL fp16"]["flops"]["policy"] == pytest.approx(100 * 13.54e12, rel=0.01)


# -- parts ------------------------------------------------------------------------------------------------------------


def command(code):
    return lambda part: part.run("-c", code)


def test_parts_that_fail_or_hang_do_not_stop_the_others(tmp_path, capfd):
    hang = "import subprocess, sys; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); p.wait()"
    parts = {
        "fails": (30, command("print('one'); raise ValueError('the reason')")),
        "says nothing": (30, command("import sys; sys.exit(3)")),
        "is not there": (30, lambda part: (part.folder / "nothing").read_text()),
        "hangs": (2, command(hang)),
        "passes": (30, command("print('first'); print('5 passed')")),
    }
    results = run_parts(parts, tmp_path, seconds=60)
    remarks = {name: remark for name, (_, remark) in results.items()}
    assert {name: passed for name, (passed, _) in results.items()} == {name: name == "passes" for name in parts}
    assert remarks["fails"].startswith("FAILED: ValueError: the reason (")
    assert remarks["says nothing"].startswith("FAILED: exit status 3 (")
    assert remarks["is not there"].startswith("FAILED: [Errno 2]")
    assert remarks["passes"].startswith("5 passed (")
    pid = int((tmp_path / "hangs.log").read_text())
    assert remarks["hangs"].startswith(f"FAILED: out of time after: {pid} (")
    for _ in range(100):  # the child of what hung has ended too, once it is reaped
        if not Path(f"/proc/{pid}").exists() or "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text():
            break
        time.sleep(0.05)
    else:
        pytest.fail(f"process {pid} goes on")
    assert "one" in (tmp_path / "fails.log").read_text() and "hangs: FAILED" in capfd.readouterr().out
    assert "no time was left" in run_parts({"late": (30, command(""))}, tmp_path, seconds=0)["late"][1]


GIB, TERA = 2**30, 1e12


def test_the_table_has_the_ratios():
    measured = {
        "peak": {"sampling": 11 * GIB, "reward": GIB, "update": 66 * GIB},
        "flops": {"policy": 50 * TERA, "reference": 50 * TERA, "update": 250 * TERA},
        "seconds": {"policy": 0.3, "reference": 0.2, "reward": 0.1, "update": 1.0},
        "in_use": 72 * GIB,
    }
    plan = {"peak": {"sampling": 10 * GIB, "reward": GIB, "update": 60 * GIB}, "flops": measured["flops"]}
    results = {"SDXL": (True, "passed (9 s)"), "broken": (False, "FAILED: a | b"), "lgm": (False, "FAILED: c")}
    lines = table(results, {"SDXL": measured, "lgm": measured}, {"SDXL": plan, "lgm": plan}).splitlines()
    assert len({line.count("|") for line in lines}) == 1 and len(lines) == 8
    assert lines[3] == "|  | sampling | 0.500 | 200 | 11.0 | 0.62 | 1.10 |"
    assert lines[4] == "|  | update | 1.000 | 250 | 66.0 | 0.50 | 1.10 |"
    assert lines[5] == "|  | in use on the GPU |  |  | 72.0 |  | 1.20 |"
    assert lines[6].startswith("| broken | FAILED: a / b |") and lines[7].startswith("| lgm | FAILED: c |")


def test_all_of_it_fails_if_a_part_does(monkeypatch, tmp_path, capsys):
    workload = next(iter(WORKLOADS))
    numbers = json.loads(PLAN.read_text())["80"][workload]

    def measure(part):
        seconds = {name: 1.0 for name in numbers["flops"]}
        gpu.result_file(part.folder, workload).write_text(json.dumps(numbers | {"seconds": seconds}))
        return ""

    def fail(part):
        raise Failed("no luck")

    parts = {"breaks": (9, fail), workload: (9, measure)}
    monkeypatch.setattr(gpu, "find_gpu", lambda: ("some card", 80))
    monkeypatch.setattr(gpu, "all_parts", lambda gigabytes: parts)
    monkeypatch.setattr(gpu.tempfile, "mkdtemp", lambda prefix: str(tmp_path))
    assert gpu.main([]) == 1
    text = capsys.readouterr().out
    assert "| breaks | FAILED: no luck (0 s) |" in text and text.endswith(f"logs: {tmp_path}\n")
    assert text.count(" | 1.00 |\n") == 3  # sampling, decode, update: the memory is the planned one
    del parts["breaks"]
    assert gpu.main([]) == 0


def test_without_a_gpu_it_says_so_at_once(tmp_path):
    environment = os.environ | {"CARVE3D_VENV": str(tmp_path / "venv")}
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    environment["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(["bash", str(ROOT / "tests/gpu.sh")], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and not (tmp_path / "venv").exists()
    assert done.stderr.startswith("error: nvidia-smi finds no GPU on this machine") and done.stderr.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_torch_without_cuda_is_named():
    with pytest.raises(SystemExit, match=r"tests/gpu.sh: torch \S+ of \S+ finds no CUDA GPU: install"):
        gpu.find_gpu()


# -- what is asked of the small runs ----------------------------------------------------------------------------------


def write_run(folder, start, end, rewards=(-0.1, -0.1), skipped=(False, False), weights=b"w"):
    """A run's folder: rewards of its validations and of its epochs, of whose updates some were skipped."""
    lines = [
        {"kind": "validation", "epoch": epoch, "rewards": [value, value]} for epoch, value in ((0, start), (2, end))
    ]
    lines += [{"kind": "epoch", "epoch": epoch, "reward_mean": value} for epoch, value in enumerate(rewards)]
    lines += [{"kind": "update", "epoch": 1, "step_skipped": skip, "loss": 0.1, "grad_norm": 1.0} for skip in skipped]
    (folder / "final").mkdir(parents=True, exist_ok=True)
    (folder / "final/pytorch_lora_weights.safetensors").write_bytes(weights)
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))


@pytest.fixture
def part(tmp_path):
    log = tmp_path / "part.log"
    log.write_text("validation reward before -0.132, after -0.09\nthe weights are in ...\n")
    return Part(tmp_path, log, time.monotonic() + 600)


def trained(monkeypatch, part, name, *args, **kwargs):
    monkeypatch.setattr(gpu, "train", lambda *_: write_run(part.folder / name, *args, **kwargs))


def test_the_small_run_must_begin_as_on_cpus_and_learn(monkeypatch, part):
    trained(monkeypatch, part, "small", -0.135, -0.09)
    assert small_run(part) == "validation reward before -0.132, after -0.09"
    trained(monkeypatch, part, "small", -0.15, -0.09)
    with pytest.raises(Failed, match="reward before training is -0.1500, and on CPUs"):
        small_run(part)
    for end in (-0.135, float("nan")):
        trained(monkeypatch, part, "small", -0.135, end)
        with pytest.raises(Failed, match="did not learn: validation reward"):
            small_run(part)


def test_some_updates_in_half_precision_must_be_made(monkeypatch, part):
    trained(monkeypatch, part, "fp16", -0.135, -0.13, skipped=(True, False, False))
    assert loss_scaling(part).startswith("2 of 3 updates made, validation reward")
    trained(monkeypatch, part, "fp16", -0.135, -0.13, skipped=(True, True))
    with pytest.raises(Failed, match="0 of 2 updates"):
        loss_scaling(part)


def test_a_resumed_run_is_compared(tmp_path, part):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    write_run(whole, -0.13, -0.09)
    write_run(resumed, -0.13, -0.09)
    assert compare_resumed(whole, resumed, 1) == "ended bitwise as the whole run"
    write_run(resumed, -0.13, -0.0911, weights=b"v")
    assert compare_resumed(whole, resumed, 1).startswith("ended with a reward of -0.0911, the whole run with -0.0900")
    write_run(resumed, -0.13, -0.09, rewards=(-0.1, -0.102))
    with pytest.raises(Failed, match="went on with a reward of -0.10200 instead of -0.10000"):
        compare_resumed(whole, resumed, 1)
    write_run(resumed, -0.13, -0.09, rewards=(-0.1,))
    with pytest.raises(Failed, match="has the epochs"):
        compare_resumed(whole, resumed, 1)
    with pytest.raises(Failed, match="no finished small run"):
        resume(part)


@pytest.mark.slow
def test_small_runs_are_trained_and_resumed(monkeypatch, part, tmp_path_factory):
    world = make_world(tmp_path_factory.mktemp("world"))
    monkeypatch.setattr(gpu, "check_start", lambda run: gpu.metrics(run, "validation"))

    def train(part, name, *switches):
        part.run("carve3d_train.py", "--config=config/base.py", *flags(world, part.folder, run_name=name), *switches)

    monkeypatch.setattr(gpu, "train", train)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    try:
        assert small_run(part).startswith("validation reward before")
    except Failed as failed:  # random painters need not learn
        assert str(failed).startswith("it did not learn: validation reward before")
    assert resume(part) == "ended bitwise as the whole run"


def test_what_needs_gsplat_says_so(monkeypatch, part):
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    assert gpu.gsplat_tests(part) == f"not run: {GSPLAT}"
    numbers = {"peak": {"reconstruct": 1}}
    monkeypatch.setattr(
        Part, "run", lambda self, *a: Path(a[-1].removeprefix("--out=")).write_text(json.dumps(numbers))
    )
    assert gpu.measurement("lgm bf16", 80)(part) == f"not rendered: {GSPLAT}"
    assert gpu.measurement("openlrm bf16", 80)(part) == ""
