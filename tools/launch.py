"""torchrun, but a mistake of the user ends it with the sentence that a process has said, and with nothing after it.

    python -m tools.launch --nproc_per_node 8 carve3d_train.py --config ...    (flags of torchrun, then the command)

The exit status is then 2, as after the command in a single process. After any other error of a process, whose traceback
is above, torchrun's summary says which process it was, and the exit status is 1.
"""

import logging
import sys
import tempfile

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from config.cli import USER_ERROR


def main(arguments: list[str] | None = None) -> None:
    """arguments: None for those of the command line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    logging.disable(logging.ERROR)  # of this process alone, where torchrun says more than once what its summary says
    try:
        with tempfile.TemporaryDirectory(
            prefix="carve3d_launch_"
        ) as folder:  # which torchrun itself would leave behind
            run.main(["--log_dir", folder, *arguments])
    except ChildFailedError as error:
        if any(failure.exitcode == USER_ERROR for failure in error.failures.values()):
            sys.exit(USER_ERROR)
        sys.exit(str(error))


if __name__ == "__main__":
    main()
