"""Processes with the pretend GPU, forked from this one, which has imported everything: see `tests.children.command`.

Every line of standard input is a list in JSON, the arguments of `children.answer`; its exit status is the answer.
"""

import json
import multiprocessing
import sys

import tools.pretend_gpu  # noqa: F401, must come before torch

# isort: split
import carve3d_train  # noqa: F401
import tools.pretend_gpu.measure  # noqa: F401
from tests import children

if __name__ == "__main__":
    fork = multiprocessing.get_context("fork")
    for line in sys.stdin:
        process = fork.Process(target=children.answer, args=json.loads(line))
        process.start()
        process.join()
        print(process.exitcode, flush=True)
