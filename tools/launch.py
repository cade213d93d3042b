"""torchrun, but it ends as its processes end: with their exit status, and with nothing after what they have said.

    python -m tools.launch --nproc_per_node 8 carve3d_train.py --config ...    (flags of torchrun, then the command)

A signal is passed on to the processes, which have an hour to finish their epoch and save; the exit status is then 128 +
its number, as shells count it. If this launcher is killed, so are they. After an error whose traceback is above,
torchrun's summary says which process it was.
"""

import logging
import os
import signal
import sys
import tempfile

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from config.cli import USER_ERROR

GRACE = 3600  # seconds from a signal to the kill
SAID = (USER_ERROR, *(128 + number for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)))  # with a sentence


def main(arguments: list[str] | None = None) -> None:
    """arguments: None for those of the command line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    logging.disable(logging.ERROR)  # of this process alone, where torchrun says more than once what its summary says
    os.environ["CARVE3D_LAUNCHER"] = str(os.getpid())  # see ddpo.stopping.end_with_launcher
    try:
        # a folder of its own, which torchrun itself would leave behind
        with tempfile.TemporaryDirectory(prefix="carve3d_launch_") as folder:
            run.main(["--log_dir", folder, "--shutdown_timeout", str(GRACE), *arguments])
    except SignalException as received:
        sys.exit(128 + received.sigval)
    except ChildFailedError as error:
        found = {failure.exitcode for failure in error.failures.values()}
        sys.exit(next((status for status in SAID if status in found), str(error)))


if __name__ == "__main__":
    main()
