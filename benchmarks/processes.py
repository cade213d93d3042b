"""Epochs in processes of their own, run on demand, so that what is compared can take turns in one run.

On a shared machine seconds of the clock say little, and two measurements a minute apart are not comparable: benchmarks
count seconds of CPU, and alternate.
"""

import multiprocessing
import os
import resource
import socket
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


def start(prepare: Callable, count: int, *arguments) -> list:
    """`count` processes on one thread each, that stand idle until `epoch` or `stop` is called with them.

    prepare: (rank, count, *arguments) -> a function that runs an epoch; a function of a module, as it is pickled."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    os.environ["OMP_NUM_THREADS"] = "1"  # accelerate would set another number of threads
    context, workers = multiprocessing.get_context("spawn"), []
    for rank in range(count):
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(prepare, rank, count, port, theirs, arguments), daemon=True)
        process.start()
        theirs.close()  # so that a process that dies ends the waiting for it
        workers.append((process, ours))
    return workers


def epoch(*groups: list) -> tuple[float, float, float]:
    """An epoch in all processes at the same time: seconds of CPU in all, of the clock, and MiB of the largest."""
    pipes = [pipe for workers in groups for _, pipe in workers]
    for pipe in pipes:
        pipe.send(True)
    cpu, clock, peak = zip(*[pipe.recv() for pipe in pipes], strict=True)
    return sum(cpu), max(clock), max(peak)


def stop(workers: list) -> None:
    """End the processes."""
    for _, pipe in workers:
        pipe.send(False)
    for process, _ in workers:
        process.join()


def _work(prepare, rank, count, port, orders, arguments):
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    os.chdir(ROOT)
    torch.set_num_threads(1)
    run = prepare(rank, count, *arguments)
    while orders.recv():
        cpu, clock = time.process_time(), time.perf_counter()
        run()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        orders.send((time.process_time() - cpu, time.perf_counter() - clock, peak))
