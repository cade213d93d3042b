"""The shell commands: what they would start, and what they say when something is missing. Nothing is installed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["carve3d_train.sh", "setup_env.sh", "tests/run.sh", "tests/gpu.sh", ".ci/run"]
LAUNCHER_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "RANK", "OMP_NUM_THREADS", "CARVE3D_PROCESSES", "CARVE3D_VENV")


def executable(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def run(tmp_path):
    """Runs carve3d_train.sh dry on a pretended machine: run(*arguments, gpus=0, cores=4, **environment)."""

    def run(*arguments, gpus=0, cores=4, **environment):
        executable(tmp_path / "nvidia-smi", "\n".join(["true"] + [f'echo "GPU {i}: some card"' for i in range(gpus)]))
        # as GNU's, which answers for OpenMP
        executable(tmp_path / "nproc", f"echo ${{OMP_THREAD_LIMIT:-${{OMP_NUM_THREADS:-{cores}}}}}")
        inherited = {key: value for key, value in os.environ.items() if key not in LAUNCHER_VARIABLES}
        result = subprocess.run(
            ["bash", str(ROOT / "carve3d_train.sh"), *arguments],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**inherited, "PATH": f"{tmp_path}:{os.environ['PATH']}", "CARVE3D_DRY_RUN": "1", **environment},
        )
        return result.returncode, result.stdout.strip(), result.stderr.strip()

    return run


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_valid_bash(script):
    assert subprocess.run(["bash", "-n", str(ROOT / script)]).returncode == 0


def test_no_argument_runs_the_small_world_on_the_cpu(run):
    code, command, _ = run(cores=8)
    assert code == 0 and command.startswith("OMP_NUM_THREADS=4 ")
    assert command.endswith("tools.launch --nproc_per_node 2 --standalone carve3d_train.py --config config/tiny.py")
    assert "--nproc_per_node 1 " in run(cores=1)[1]


def test_number_of_processes_and_threads_can_be_set(run):
    command = run("--config.seed=1", CARVE3D_PROCESSES="4", OMP_NUM_THREADS="3")[1]
    assert "OMP_NUM_THREADS=3" in command and "--nproc_per_node 4" in command
    assert command.endswith("--config config/tiny.py --config.seed=1")
    for name in ("OMP_NUM_THREADS", "OMP_THREAD_LIMIT"):  # of a process, and no number of cores
        assert "--nproc_per_node 2 " in run(cores=8, **{name: "1"})[1]
    assert run(cores=8, OMP_THREAD_LIMIT="1")[1].startswith("OMP_NUM_THREADS=4 ")
    code, _, error = run(CARVE3D_PROCESSES="many")
    assert code != 0 and "CARVE3D_PROCESSES is 'many'" in error


def test_gpus_are_counted(run):
    assert "--nproc_per_node 1 " in run(gpus=1)[1]
    assert "--nproc_per_node 4 " in run(gpus=6)[1]  # 64 samples need an even share
    command = run("1", gpus=6)[1]
    assert "--nproc_per_node 6 " in command and command.endswith("--config config/dgx.py:carve3d_train")


@pytest.mark.parametrize("flags", [["--config", "config/dgx.py:mvdream_lgm"], ["--config=config/dgx.py:mvdream_lgm"]])
def test_only_the_small_world_leaves_gpus_idle(run, flags):
    command = run("--config.seed=1", *flags, gpus=6)[1]
    assert "--nproc_per_node 6 " in command and "tiny" not in command
    assert "--nproc_per_node 4 " in run("--config.seed=1", "--config", "config/tiny.py:mvdream", gpus=6)[1]


def test_cluster_form(run):
    cluster = {"MASTER_ADDR": "node0", "MASTER_PORT": "29500", "RANK": "3"}
    code, command, _ = run("6", "--config.seed=1", gpus=8, **cluster)
    assert code == 0
    for part in (
        "--nproc_per_node 8",
        "--nnodes 6",
        "--node_rank 3",
        "--master_addr node0",
        "--master_port 29500",
        "--config config/dgx.py:carve3d_train --config.seed=1",
    ):
        assert part in command
    command = run("6", "--config=config/dgx.py:data_size(10)", gpus=8, **cluster)[1]
    assert "carve3d_train.py --config=config/dgx.py:data_size(10)" in command and ":carve3d_train" not in command


@pytest.mark.parametrize("missing", ["MASTER_ADDR", "MASTER_PORT", "RANK"])
def test_missing_cluster_variables_are_named(run, missing):
    cluster = {"MASTER_ADDR": "node0", "MASTER_PORT": "29500", "RANK": "0"}
    del cluster[missing]
    code, _, error = run("2", gpus=8, **cluster)
    assert code != 0 and error.startswith(f"error: {missing} is not set") and len(error.splitlines()) == 1


def test_a_rehearsal_is_a_command_of_its_own(run):
    code, command, _ = run("--rehearse", "config/dgx.py:mvdream_lgm", "--config.seed=1", gpus=8)
    assert code == 0 and command.endswith("-m tools.rehearse --config config/dgx.py:mvdream_lgm --config.seed=1")
    for wrong in ([], ["--config.seed=1"]):
        code, _, error = run("--rehearse", *wrong)
        assert code != 0 and "--rehearse needs a configuration: write 'bash" in error


def test_other_mistakes_are_named(run):
    cluster = {"MASTER_ADDR": "node0", "MASTER_PORT": "29500", "RANK": "2"}
    assert "RANK is '2'" in run("2", gpus=8, **cluster)[2]
    assert "no GPU" in run("3", **cluster)[2]
    assert "neither a number of machines nor a flag" in run("tiny")[2]
    code, text, _ = run("--help")
    assert code == 0 and "NUM_NODES" in text and "set -" not in text


###### Set-up, with a pretended Python ######

FAKE_PYTHON = """case "$*" in
  *version_info*) exit {too_old} ;;
  --version*) echo Python 3.11.0 ;;
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  *"pip install"*) echo installed >> installs; [ ! -e fail ] ;;
esac"""


def set_up(folder, too_old=0, **environment):
    bin_folder = folder / "bin"
    bin_folder.mkdir(exist_ok=True)
    for name in ("python3.11", "python3", "python3.12", "python3.13"):
        executable(bin_folder / name, FAKE_PYTHON.format(too_old=too_old))
    return subprocess.run(
        ["bash", "-c", f"set -euo pipefail; source {ROOT}/setup_env.sh; setup_env; echo ready"],
        cwd=folder,
        capture_output=True,
        text=True,
        env={"PATH": f"{bin_folder}:{os.environ['PATH']}", **environment},
    )


def test_set_up_installs_once_and_again_when_requirements_change(tmp_path):
    (tmp_path / "requirements.txt").write_text("one==1\n")
    assert set_up(tmp_path).stdout.endswith("ready\n")
    assert set_up(tmp_path).stdout == "ready\n"
    (tmp_path / "requirements.txt").write_text("one==2\n")
    assert set_up(tmp_path).stdout.endswith("ready\n")
    assert (tmp_path / "installs").read_text().split() == ["installed"] * 2


def test_interrupted_set_up_starts_anew(tmp_path):
    (tmp_path / "requirements.txt").write_text("one==1\n")
    set_up(tmp_path)
    (tmp_path / ".venv" / ".carve3d_installing").touch()  # as a killed installation leaves it
    (tmp_path / ".venv" / "rubbish").touch()
    assert "interrupted" in set_up(tmp_path).stdout
    assert not (tmp_path / ".venv" / "rubbish").exists()
    assert set_up(tmp_path).stdout == "ready\n"


def test_failed_installation_is_told_and_tried_again(tmp_path):
    (tmp_path / "requirements.txt").write_text("one==1\n")
    (tmp_path / "fail").touch()
    result = set_up(tmp_path)
    assert result.returncode != 0 and "could not be installed" in result.stderr
    (tmp_path / "fail").unlink()
    assert set_up(tmp_path).stdout.endswith("ready\n")


def test_a_users_own_environment_is_never_removed(tmp_path):
    (tmp_path / "requirements.txt").write_text("one==1\n")
    own = tmp_path / "own"
    (own / "bin").mkdir(parents=True)
    executable(own / "bin" / "python", FAKE_PYTHON.format(too_old=0))
    (tmp_path / "fail").touch()
    set_up(tmp_path, CARVE3D_VENV=str(own))
    assert not (own / ".carve3d_installing").exists() and (own / "bin" / "python").exists()


def test_old_python_is_refused(tmp_path):
    (tmp_path / "requirements.txt").write_text("one==1\n")
    result = set_up(tmp_path, too_old=1)
    assert result.returncode != 0 and "Python 3.11 or newer is needed" in result.stderr
    assert not (tmp_path / ".venv").exists()


def test_the_python_on_path_is_taken_as_it_is(tmp_path):
    """CARVE3D_VENV=system, with a real interpreter."""

    def check(requirements):
        (tmp_path / "requirements.txt").write_text(requirements)
        command = f"set -euo pipefail; source {ROOT}/setup_env.sh; setup_env; echo $VENV_PYTHON"
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return subprocess.run(
            ["bash", "-c", command],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={"PATH": path, "CARVE3D_VENV": "system"},
        )

    done = check("# ours\ntorch==0.1\n\nnot-installed-tests==1\n")
    assert done.stdout == "python3\n" and re.search(r"note: \S+ has torch \S+ instead of 0.1\n", done.stderr)
    done = check("torch==0.1\nnot-installed==1\nnor-this==2\n")
    assert done.returncode == 1 and done.stdout == ""
    assert re.fullmatch(r"error: CARVE3D_VENV=system: \S+ lacks not-installed, nor-this: install .*\n", done.stderr)
    assert [file.name for file in tmp_path.iterdir()] == ["requirements.txt"]


###### What is installed ######


def test_requirements_are_pinned_and_torch_comes_first():
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    assert lines[0].startswith("torch==") and all(line.count("==") == 1 for line in lines)


def test_setup_py_names_the_rooms():
    result = subprocess.run([sys.executable, "setup.py", "--name"], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "carve3d-open", result.stderr
