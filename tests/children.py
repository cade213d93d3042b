"""Whole trainings in processes of their own, which a test may kill. They fork from a server that has imported
everything once, because the imports take longer than the trainings."""

import atexit
import errno
import functools
import json
import multiprocessing
import os
import pkgutil
import runpy
import signal
import socket
import subprocess
import sys
from pathlib import Path

from config.validate import ROOT

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["carve3d_train", "pytest", "tests.tiny_models", "tests.children"])


def start(function, *args):
    """Start `function(*args)` in a process; it must be importable."""
    process = CONTEXT.Process(target=function, args=args)
    process.start()
    return process


def run(function, *args):
    """`function(*args)` in a process, waited for: its exit code, 0 if all went well, -9 if it was killed."""
    process = start(function, *args)
    process.join()
    return process.exitcode


def command(module, arguments, folder, processes=1, environment=None, pretend_gpu=False):
    """`python -m module arguments` as `subprocess.run` would tell of it, with all that its processes have printed.

    processes: how many work together, as torchrun starts them. folder: for files that are written in between.
    environment: further variables. pretend_gpu: where `tools.pretend_gpu` has been imported."""
    outputs = [str(Path(folder) / name) for name in ("stdout.txt", "stderr.txt")]
    for file in outputs:
        Path(file).write_text("")
    call = [module, [str(argument) for argument in arguments], *outputs, environment or {}]
    if pretend_gpu:
        status = _ask(pretend_gpu_server(), call)
    else:
        started = [start(answer, *call)] if processes == 1 else start_ranks(answer, processes, *call)
        for process in started:
            process.join()
        status = next((process.exitcode for process in started if process.exitcode), 0)
    return subprocess.CompletedProcess(arguments, status, *(Path(file).read_text(errors="replace") for file in outputs))


def answer(module, arguments, stdout, stderr, environment, rank=None):
    """In a process of its own: be `python -m module arguments` until the end.

    stdout, stderr: files that get what it says. environment, rank: variables."""
    os.chdir(ROOT)
    os.environ.update(environment | (rank or {}))
    redirect(stdout, "a", (1,))
    redirect(stderr, "a", (2,))
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # as Python does at the end of a command, but not of a process of multiprocessing


@functools.cache
def pretend_gpu_server():
    """tests/pretend_gpu_server.py, which ends with this process."""
    line = [sys.executable, "-m", "tests.pretend_gpu_server"]
    return subprocess.Popen(line, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _ask(server, call):
    server.stdin.write(json.dumps(call) + "\n")
    server.stdin.flush()
    return int(server.stdout.readline())


def train(values, environment=None):
    """The training script with config/base.py changed by `values` ({key: value}).

    environment: changes of environment variables, None removes one."""
    import carve3d_train
    from config import base

    for name, value in (environment or {}).items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    config = base.get_config()
    with config.unlocked():
        config.update_from_flattened_dict(values)
    carve3d_train.Run(config).train()


def recorded(file, function, *args):
    """`function(*args)`, with what the process prints in a file."""
    redirect(file, "w")
    function(*args)


def redirect(file, mode, descriptors=(1, 2)):
    """Write what this process prints to a file; descriptors: 1 for standard output, 2 for standard error."""
    with open(file, mode) as stream:
        for descriptor in descriptors:
            os.dup2(stream.fileno(), descriptor)


def train_until(values, target, call, happens, environment=None):
    """`train`, where `happens()` is called with the `call`-th call of the function `target`, "module.name"."""
    module, _, name = target.rpartition(".")
    module = pkgutil.resolve_name(module)
    function = getattr(module, name)
    calls = []

    def eventful(*args, **kwargs):
        calls.append(None)
        if len(calls) == call:
            happens()
        return function(*args, **kwargs)

    setattr(module, name, eventful)
    # as at a terminal: what a script starts in its background inherits that SIGINT is ignored, and a run keeps to that
    signal.signal(signal.SIGINT, signal.default_int_handler)
    train(values, environment)


def die():
    """Nothing can be tidied up."""
    os.kill(os.getpid(), signal.SIGKILL)


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def fill_disk():
    """What Python says when a disk is full."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def train_and_die(values, target, call):
    """`train`, killed when `target` is called for the `call`-th time, see `train_until`."""
    train_until(values, target, call, die)


def start_ranks(function, number, *args):
    """Start `function(*args, environment)` in `number` processes that work together: the processes."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = str(sock.getsockname()[1])
    group = {
        "WORLD_SIZE": str(number),
        "LOCAL_WORLD_SIZE": str(number),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    ranks = [{**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(number)]
    return [start(function, *args, rank) for rank in ranks]
