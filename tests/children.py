"""Whole trainings in processes of their own, which a test may kill. They fork from a server that has imported
everything once, because the imports take longer than the trainings."""

import atexit
import errno
import multiprocessing
import os
import pkgutil
import runpy
import signal
import socket
import sys
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["carve3d_train", "tests.children"])


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


def command(module, arguments, folder):
    """(exit status, stderr) of `python -m module arguments`; folder: for a file that is written in between."""
    file = Path(folder) / "stderr.txt"
    code = run(_command, module, arguments, file)
    return code, file.read_text(errors="replace")


def _command(module, arguments, file):
    redirect(os.devnull, "w", (1,))
    redirect(file, "w", (2,))
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # as Python does at the end of a command, but not of a process of multiprocessing


def train(values, environment=None):
    """The training script with config/base.py changed by `values` ({key: value}).

    environment: changes of environment variables, None removes one."""
    import torch

    import carve3d_train
    from config import base

    for name, value in (environment or {}).items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    torch.set_num_threads(1)
    config = base.get_config()
    with config.unlocked():
        config.update_from_flattened_dict(values)
    carve3d_train.Run(config).train()


def module(name, arguments, log, environment):
    """`python -m name *arguments` with further environment variables; what it says goes to the file `log`."""
    import torch

    os.environ.update(environment)
    torch.set_num_threads(1)
    redirect(log, "a")
    sys.argv = [name, *arguments]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


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
