"""torchrun for carve3d_train.sh: it says nothing of its own and ends with the exit status of what it started.

    python -m tools.launch --nproc_per_node 2 --standalone carve3d_train.py --config config/tiny.py

The flags are those of torchrun. A signal is passed on to the processes, which have an hour to finish their epoch and
save; then, as shells count it, the exit status is 128 + its number. If this launcher is killed, so are they.
"""

import os
import sys

os.environ.setdefault("LOGLEVEL", "CRITICAL")  # torchrun's own, read when it is imported
os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "3600")  # seconds from the signal to the kill; torchrun: 30

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main() -> None:
    """Run until the processes end, and exit with their status."""
    os.environ["CARVE3D_LAUNCHER"] = str(os.getpid())  # see ddpo.stopping.end_with_launcher
    try:
        run.run(run.parse_args(sys.argv[1:]))
    except SignalException as received:
        sys.exit(128 + received.sigval)
    except ChildFailedError as failed:
        status = failed.get_first_failure()[1].exitcode
        sys.exit(status if status >= 0 else 128 - status)  # negative: killed by a signal


if __name__ == "__main__":
    main()
