"""Ending a run before its end: in all processes at the same moment, and where nothing is lost.

Signals (a scheduler's SIGTERM, Ctrl-C, a terminal that closes) and files that cannot be written only leave a note. At a
safe point, where `epochs_done` says what the weights are, all processes compare their notes and stop together.
"""

import contextlib
import ctypes
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import torch
from accelerate import Accelerator

from config.errors import UserError
from ddpo.checkpoint import checkpoints, damage, epochs_of

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
PR_SET_PDEATHSIG = 1  # of Linux's prctl


class Stopped(Exception):
    """All processes agreed to stop because of a signal. status: the exit status that shells give it, 128 + signal."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


class CannotWrite(UserError):
    """A file of the run could not be written."""


class Stopping:
    """The notes of one process of the run in `folder`."""

    def __init__(self, folder: Path, accelerator: Accelerator):
        self.folder, self.accelerator = folder, accelerator
        self.signal, self.failure, self.over = 0, None, False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, signals do not end the process. Those that are ignored, as SIGHUP is under nohup, stay so."""
        before = {number: signal.getsignal(number) for number in SIGNALS}
        for number, handler in before.items():
            if handler != signal.SIG_IGN:
                signal.signal(number, self._note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number, frame):
        if not self.signal and self.accelerator.is_main_process:  # a print may be what was interrupted
            text = f"{signal.Signals(number).name}: stopping where nothing is lost, after this epoch at the latest\n"
            os.write(sys.__stderr__.fileno(), text.encode())
        self.signal = self.signal or number

    @contextlib.contextmanager
    def safely(self) -> Iterator[None]:
        """Inside, a process writes files of the run and waits for no other; on leaving, all agree to go on.

        Call in all processes. Raises as `check` does."""
        try:
            yield
        except OSError as error:
            self.failure = self.failure or error
        self.check()

    def check(self) -> None:
        """A safe point: go on, or raise in all processes.

        Call in all processes, where epochs_done says what the weights are. Raises Stopped after a signal, CannotWrite
        in the first place for a file that could not be written, and SystemExit in processes that have nothing to add.
        """
        if self.over:  # what is done after a signal
            if self.failure is not None:
                raise self._cannot_write()
            return
        number, failed = self.signal, self.failure is not None
        if self.accelerator.num_processes > 1:
            notes = torch.tensor([[number, failed]], device=self.accelerator.device)
            number, failed = self.accelerator.gather(notes).amax(0).tolist()
        if failed:
            raise SystemExit(1) if self.failure is None else self._cannot_write()
        if number:
            self.over = True
            raise Stopped(number)

    def _cannot_write(self):
        error = self.failure
        reason = error.strerror or str(error)
        free = shutil.disk_usage(self.folder).free / 1e9
        good = [folder for folder in checkpoints(self.folder) if damage(folder) is None]
        last = f"the last good checkpoint is {good[-1]}; go on with" if good else "there is no checkpoint yet; start"
        return CannotWrite(
            f"{error.filename or self.folder} could not be written ({reason}; {free:.2f} GB are free there): make "
            f"room, {last} {resume_command(self.folder) if good else 'again'}"
        )


def end_early(run, stopped: Stopped) -> NoReturn:
    """Save what is not saved yet of a run (`carve3d_train.Run`), say how to go on, and exit. Call in all processes."""
    if run.epochs_done not in map(epochs_of, checkpoints(run.folder)):
        run.save()
    run.log.say(
        f"stopped by {stopped}, {run.epochs_done} epochs are done and saved; go on with: {resume_command(run.folder)}"
    )
    run.accelerator.end_training()
    sys.exit(stopped.status)


def resume_command(folder: Path) -> str:
    """The command that started this run, as one would type it, made to resume the run in `folder`.

    carve3d_train.sh and its SLURM file leave theirs in CARVE3D_COMMAND."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    launcher = ["python"] if processes == 1 else ["torchrun", "--nproc_per_node", str(processes)]
    words = shlex.split(os.environ.get("CARVE3D_COMMAND", "")) or [*launcher, *sys.argv]
    words = [word for word in words if not word.startswith("--config.resume_from=")]
    return shlex.join([*words, f"--config.resume_from={folder}"])


def end_with_launcher() -> None:
    """Let this process be killed if the launcher that started it is: nobody would stop it or see it fail.

    As with any kill, the last checkpoint stays. Only Linux can do so."""
    launched = "TORCHELASTIC_RUN_ID" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ
    if not launched or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    launcher = int(os.environ.get("CARVE3D_LAUNCHER", os.getpid()))
    try:
        os.kill(launcher, 0)  # nothing is sent: it may have died before the line above
    except ProcessLookupError:
        sys.exit(f"the launcher, process {launcher}, has ended")
