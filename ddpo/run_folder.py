"""The folder of a run: whose it is, what a run resumes from, and what is kept of what it will replace."""

import atexit
import contextlib
import datetime
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from ml_collections import ConfigDict

from config import base
from config.errors import UserError
from config.validate import AUTO, flatten
from ddpo.checkpoint import checkpoints, epochs_of, find_checkpoint
from ddpo.evaluation import relevant_keys
from ddpo.files import PARTIAL
from prompts.dataset import PromptDataset

LOCK = "run.lock"
# What a run's weights and optimizer are made for; with other values they could not be loaded.
FIXED = ("painter.name", "use_lora", "lora.rank", "lora.targets", "train.use_8bit_adam")
# Of the keys that rewards depend on (`relevant_keys`), those that may differ: where files are, for the run may have
# moved to another machine, its arithmetic, and what becomes of the rewards.
MAY_DIFFER = (
    "pretrained.",
    "recon.checkpoint",
    "recon.dtype",
    "mrc.lpips_checkpoint",
    "mrc.empty_in_statistics",
    "mixed_precision",
    "allow_tf32",
)
OF_RESUMING = ("resume_from", "resume_previous_if_damaged")
NUMBERED = {  # what bears the number of epochs after which, or of the epoch in which, it was made
    "after": ("checkpoint_*", "lora/epoch_*"),
    "in": ("samples/*_*.png", "validation/epoch_*", "bad_samples/epoch_*"),
}
COPIED = ("metrics.jsonl", "config.json", "curves.png")


@dataclass
class OpenRun:
    """A run's folder, in use by this run and no other."""

    folder: Path
    checkpoint: Path | None = None  # what it resumes from
    changes: tuple[str, ...] = ()  # what differs from when that was saved, in words
    lock: TextIO | None = None  # of the main process; the folder is in use until it is closed


def open_run(config: ConfigDict, accelerator: Accelerator, prompts: PromptDataset) -> OpenRun:
    """The folder that a run of `config` writes to, and the checkpoint it resumes from. Nothing but a lock is written.

    The main process looks; all processes get its answer, or raise its error: UserError if the folder is in use, already
    holds a run, or holds one that this configuration cannot resume, and the errors of `find_checkpoint`.
    """
    lock = None

    def look():
        nonlocal lock
        opened, lock = _open(config, prompts)
        return opened

    return replace(on_main_process(accelerator, look), lock=lock)


def on_main_process(accelerator: Accelerator, function: Callable[[], object]) -> object:
    """In every process what `function` returns or raises (UserError or OSError) in the main process."""
    outcome = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = function()
        except (UserError, OSError) as error:
            outcome[1] = error
    result, error = broadcast_object_list(outcome)
    if error is not None:
        raise error
    return result


def _open(config, prompts):
    """(OpenRun without its lock, the lock)."""
    named = Path(config.resume_from)
    if config.resume_from in ("", AUTO):
        name = config.run_name or datetime.datetime.now().strftime("%Y.%m.%d_%H.%M.%S")
        folder = Path(config.logdir) / name
    else:
        folder = named.parent if epochs_of(named) is not None else named
    resumes = bool(checkpoints(folder)) and config.resume_from != ""
    if not resumes and config.resume_from not in ("", AUTO):
        find_checkpoint(named)  # says what is wrong
    claimed = Path(config.logdir) / config.run_name
    if resumes and config.run_name and claimed.resolve() != folder.resolve():
        raise UserError(
            f"config.resume_from is {str(named)!r}, and a run goes on in its own folder, but config.logdir and "
            f"config.run_name name {claimed}: leave them out, or copy the folder there and resume that"
        )
    if not resumes and (checkpoints(folder) or (folder / "metrics.jsonl").exists()):
        raise UserError(
            f"{folder} already holds a run: choose another config.run_name, or set config.resume_from to "
            f"{str(folder)!r} to resume it"
        )
    lock = take_lock(folder)
    try:
        if not resumes:
            return OpenRun(folder), lock
        if config.resume_from == AUTO:
            checkpoint = find_checkpoint(folder, previous_if_damaged=True)
        else:
            checkpoint = find_checkpoint(named, config.resume_previous_if_damaged)
        return OpenRun(folder, checkpoint, tuple(_changes(checkpoint, config, prompts))), lock
    except BaseException:
        lock.close()
        raise


def take_lock(folder: Path) -> TextIO:
    """Mark `folder` as in use by this process, until the file that is returned is closed or the process ends, however.

    Raises UserError if another process has it."""
    folder.mkdir(parents=True, exist_ok=True)
    atexit.register(_leave_no_empty_folder, folder)
    file = open(folder / LOCK, "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip() or "another process"
        file.close()
        raise UserError(
            f"{folder} is in use by {owner}: wait until that has ended or stop it, or choose another config.run_name"
        ) from None
    except OSError as error:
        file.close()
        raise UserError(
            f"{folder / LOCK} cannot be locked ({error.strerror}), so two runs could write there at once: set "
            f"config.logdir to a folder on a file system with locks"
        ) from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def _leave_no_empty_folder(folder):
    """Remove the folder of a run that ended before it wrote anything."""
    with contextlib.suppress(OSError):
        if [path.name for path in folder.iterdir()] == [LOCK]:
            (folder / LOCK).unlink()
            folder.rmdir()


def _changes(checkpoint, config, prompts):
    """What differs from when `checkpoint` was saved, in words. Raises UserError if it cannot be resumed so."""
    saved = json.loads((checkpoint / "run.json").read_text())
    run = checkpoint.parent
    if saved["validation_prompts"] != prompts.val_set:  # validations of one run are compared prompt by prompt
        raise UserError(
            f"config.prompts.val_file has other prompts ({len(prompts.val_set)}) than those that {run} was validated "
            f"on ({len(saved['validation_prompts'])}): resume with the run's own val_file, and use python -m "
            f"tools.evaluate for other prompts"
        )
    changed = differences(saved["config"], config)
    new_run = "start a new run (config.resume_from = '')"
    for key in FIXED:
        if key in changed:
            found, wanted = changed[key]
            raise UserError(
                f"config.{key} is {wanted!r}, but {checkpoint} was trained with {found!r}: set it to that, or {new_run}"
            )
    relevant = relevant_keys(config, "reward_fn")
    for key, (found, wanted) in changed.items():
        if f"config.{key}" in relevant and not key.startswith(MAY_DIFFER):
            if config.use_lora and not saved["config"]["pretrained"]["lora"]:  # there is room for one
                new_run += f" from its LoRA (config.pretrained.lora = '{run}/final' or '{run}/lora/epoch_XXXX')"
            raise UserError(
                f"config.{key} is {wanted!r}, but the rewards in {run} were measured with {found!r}, so that before "
                f"and after could not be compared: set it to that, or {new_run}"
            )
    words = [f"config.{key} was {found!r} and is {wanted!r}" for key, (found, wanted) in changed.items()]
    if saved["training_prompts"] != prompts.train_set:
        words.append(
            f"{len(set(prompts.train_set) - set(saved['training_prompts']))} of the {len(prompts.train_set)} training "
            f"prompts are new, {len(set(saved['training_prompts']) - set(prompts.train_set))} are gone"
        )
    return words


def differences(saved: dict, config: ConfigDict) -> dict[str, tuple[object, object]]:
    """{key: (saved value, value in config)} of all keys that differ, but for those that say how to resume.

    saved: a configuration as nested dicts; keys that were unknown when it was saved count as their defaults."""
    default = flatten(base.get_config())
    # through JSON, as the saved one went
    old, new = flatten(ConfigDict(saved)), flatten(ConfigDict(json.loads(json.dumps(config.to_dict()))))
    keys = sorted((old.keys() | new.keys()) - set(OF_RESUMING))
    pairs = {key: (old.get(key, default.get(key)), new.get(key)) for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def replaced_later(folder: Path, epochs_done: int, finished: bool) -> list[Path]:
    """What a run that resumes after `epochs_done` epochs would remove or replace by something else, checkpoints last.

    Empty if it only repeats what a run that was killed had not saved yet. finished: it has no epochs left to do.
    """
    later = [path for path in checkpoints(folder) if epochs_of(path) > epochs_done]
    final = folder / "final"
    if not later and (finished or not final.exists()):
        return []
    found = [final] if final.exists() else []
    for when, patterns in NUMBERED.items():
        paths = [path for pattern in patterns for path in folder.glob(pattern) if PARTIAL not in path.name]
        first = epochs_done + 1 if when == "after" else epochs_done
        found += [path for path in sorted(paths) if _number(path) >= first and path not in later]
    return found + later


def set_aside(folder: Path, paths: list[Path]) -> Path:
    """Move `paths` out of the run's folder into a new folder branch_N of it, where they stand as they stood.

    With them go copies of the run's metrics, configuration and curves."""
    number = 1 + max((_number(path) for path in folder.glob("branch_*")), default=0)
    branch = folder / f"branch_{number}"
    branch.mkdir()
    for name in COPIED:
        if (folder / name).exists():
            shutil.copy2(folder / name, branch / name)
    for path in paths:
        target = branch / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
    return branch


def _number(path):
    """N of a name that ends in _N, with or without a suffix; -1 for another name."""
    digits = path.stem.rpartition("_")[2]
    return int(digits) if digits.isdigit() else -1
