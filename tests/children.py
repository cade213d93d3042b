"""Whole trainings in processes of their own, which a test may kill. They fork from a server that has imported
everything once, because the imports take longer than the trainings."""

import importlib
import multiprocessing
import os
import runpy
import signal
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
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


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


def train_and_die(values, target, call):
    """`train`, killed by SIGKILL (nothing can be tidied up) when the function `target`, "module.name", is called for
    the `call`-th time."""
    module, _, name = target.rpartition(".")
    module = importlib.import_module(module)
    function = getattr(module, name)
    calls = []

    def deadly(*args, **kwargs):
        calls.append(None)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    setattr(module, name, deadly)
    train(values)
