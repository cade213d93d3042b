"""Saving a run so that it can be killed at any moment and resumes bit for bit.

A checkpoint is a folder `checkpoint_XXXX` (XXXX = epochs done) with
    weights.safetensors   what is trained
    optimizer.pt          the optimizer's state
    run.json              epochs done, learning rate calibration, trackers, areas, loss scaler, configuration, prompts
    manifest.json         size and SHA-256 of the other files
It is written under a temporary name and renamed when complete, and renamed again before it is removed, so that a folder
of that name is complete. Random states need no place in it: every random stream is made anew from the run's seed and
the epoch (ddpo/sampling.py).

In place of accelerate's `save_state`, which is neither atomic nor verifiable, pickles random states, and would save the
frozen base model with every checkpoint.
"""

import hashlib
import json
import os
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from config.errors import MissingFileError, UserError
from ddpo.files import PARTIAL, remove, whole
from ddpo.setup import adam_settings

PREFIX = "checkpoint_"
FILES = {"weights.safetensors", "optimizer.pt", "run.json"}


class DamagedCheckpoint(UserError):
    """A checkpoint folder that is incomplete or not what was written."""


def save_run(run) -> None:
    """Write the checkpoint of a run (`carve3d_train.Run`): everything that training changes. Main process only."""
    scaler = run.accelerator.scaler
    state = {
        "kl": run.kl,
        "calibration": run.calibration.state_dict(),
        "trackers": {name: tracker and tracker.state_dict() for name, tracker in run.trackers.items()},
        "area": run.area_control and run.area_control.state_dict(),
        "loss_scaler": scaler and scaler.state_dict(),
        "training_prompts": run.prompts.train_set,
        "validation_prompts": run.prompts.val_set,
        "config": run.config.to_dict(),
    }
    weights, optimizer_state = run.policy.trainable_state(), run.optimizer.state_dict()
    save_checkpoint(run.folder, run.epochs_done, weights, optimizer_state, state, run.config.num_checkpoint_limit)


def load_run(run, checkpoint: Path) -> None:
    """Put a run back to where `checkpoint` was saved; settings of its own configuration win over the checkpoint's."""
    weights, optimizer_state, state = load_checkpoint(checkpoint)
    run.policy.load_trainable_state(weights)
    run.optimizer.load_state_dict(optimizer_state)
    rate = run.optimizer.param_groups[0]["lr"]
    for group in run.optimizer.param_groups:
        group.update(adam_settings(run.config))
    run.calibration.load_state_dict(state["calibration"], rate)
    for name, tracker in run.trackers.items():
        if tracker and state["trackers"][name]:
            tracker.load_state_dict(state["trackers"][name])
    if run.area_control and state.get("area"):  # checkpoints of former versions have none
        run.area_control.load_state_dict(state["area"])
    if run.accelerator.scaler and state["loss_scaler"]:
        run.accelerator.scaler.load_state_dict(state["loss_scaler"])
    run.epochs_done, run.kl = state["epochs_done"], state["kl"]


def save_checkpoint(
    run_folder: str | Path,
    epochs_done: int,
    weights: dict[str, torch.Tensor],
    optimizer_state: dict,
    run_state: dict,
    limit: int,
) -> Path:
    """Write `checkpoint_XXXX` into `run_folder` and remove the oldest beyond `limit`. run_state: JSON values."""
    run_folder = Path(run_folder)
    folder = run_folder / f"{PREFIX}{epochs_done:04d}"
    weights = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    with whole(folder) as partial:
        partial.mkdir()
        save_file(weights, partial / "weights.safetensors")
        torch.save(optimizer_state, partial / "optimizer.pt")
        (partial / "run.json").write_text(json.dumps({"epochs_done": epochs_done, **run_state}))
        manifest = {name: _fingerprint(partial / name) for name in sorted(FILES)}
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=1))
        for file in partial.iterdir():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
    for old in checkpoints(run_folder)[:-limit]:
        _remove(old)
    return folder


def checkpoints(run_folder: str | Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first."""
    found = [path for path in Path(run_folder).glob(f"{PREFIX}*") if epochs_of(path) is not None]
    return sorted(found, key=epochs_of)


def epochs_of(folder: Path) -> int | None:
    """XXXX of a folder `checkpoint_XXXX`, None for anything else."""
    match = re.fullmatch(PREFIX + r"(\d+)", folder.name)
    return int(match[1]) if match and folder.is_dir() else None


def find_checkpoint(path: str | Path, previous_if_damaged: bool = False) -> Path:
    """The checkpoint to resume from: `path` itself, or the newest one in the run folder `path`.

    previous_if_damaged: step back to the newest intact one. Raises FileNotFoundError or DamagedCheckpoint.
    """
    path = Path(path)
    if not path.is_dir():
        raise MissingFileError(
            f"config.resume_from = {str(path)!r} does not exist: give a run's folder or one of its checkpoint folders"
        )
    single = epochs_of(path) is not None
    found = checkpoints(path.parent if single else path)
    if single:
        found = found[: found.index(path) + 1]
    if not found:
        raise MissingFileError(
            f"config.resume_from = {str(path)!r} holds no checkpoint: give a run's folder or one of its checkpoint "
            f"folders"
        )
    for folder in reversed(found):
        problem = damage(folder)
        if problem is None:
            return folder
        if not previous_if_damaged:
            raise DamagedCheckpoint(
                f"{folder} is damaged ({problem}): set config.resume_previous_if_damaged to True to resume from the "
                f"one before it, or name another one in config.resume_from"
            )
    raise DamagedCheckpoint(f"every checkpoint in {found[0].parent} up to {found[-1].name} is damaged: start a new run")


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, in a few words, or None."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError):
        return "manifest.json is missing or unreadable"
    if not isinstance(manifest, dict) or manifest.keys() != FILES:
        return "manifest.json is not what was written"
    for name, expected in manifest.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if _fingerprint(file) != expected:
            return f"{name} is not what was written"
    return None


def load_checkpoint(folder: str | Path) -> tuple[dict[str, torch.Tensor], dict, dict]:
    """(weights, optimizer_state, run_state) of an intact checkpoint folder."""
    folder = Path(folder)
    weights = load_file(folder / "weights.safetensors")
    optimizer_state = torch.load(folder / "optimizer.pt", weights_only=True, map_location="cpu")
    return weights, optimizer_state, json.loads((folder / "run.json").read_text())


def _remove(folder):
    partial = folder.with_name(PARTIAL + folder.name)
    remove(partial)
    os.replace(folder, partial)
    remove(partial)


def _fingerprint(file):
    with open(file, "rb") as handle:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(handle, "sha256").hexdigest()}
