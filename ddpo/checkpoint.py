"""Saving a run so that it can be killed at any moment and goes on bit for bit.

A checkpoint is a folder `checkpoint_XXXX` (XXXX = epochs done) with
    weights.safetensors   what is trained
    optimizer.pt          the optimizer's state
    run.json              epochs done, learning rate calibration, trackers, loss scaler, configuration
    manifest.json         size and SHA-256 of the other files
It is written under a temporary name and renamed when complete. Random numbers need no place in it: every stream is made
anew from the run's seed and the epoch (ddpo/sampling.py).
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

PREFIX = "checkpoint_"


class DamagedCheckpoint(ValueError):
    """A checkpoint folder that is incomplete or not what was written."""


def save_checkpoint(run_folder, epochs_done, weights, optimizer_state, run_state, limit):
    """Write `checkpoint_XXXX` into `run_folder` and remove the oldest beyond `limit`.

    weights: {name: tensor}; optimizer_state: of torch; run_state: what JSON can hold."""
    run_folder = Path(run_folder)
    folder = run_folder / f"{PREFIX}{epochs_done:04d}"
    partial = run_folder / f"partial_{folder.name}"
    for leftover in run_folder.glob(f"partial_{PREFIX}*"):
        shutil.rmtree(leftover)
    partial.mkdir(parents=True)
    save_file({name: value.detach().cpu().contiguous() for name, value in weights.items()}, partial / "weights.safetensors")
    torch.save(optimizer_state, partial / "optimizer.pt")
    (partial / "run.json").write_text(json.dumps({"epochs_done": epochs_done, **run_state}))
    manifest = {file.name: _fingerprint(file) for file in sorted(partial.iterdir())}
    (partial / "manifest.json").write_text(json.dumps(manifest, indent=1))
    for file in partial.iterdir():
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
    if folder.exists():  # a resumed run comes by here again; the older twin may be a damaged one
        shutil.rmtree(folder)
    os.replace(partial, folder)
    for old in checkpoints(run_folder)[:-limit]:
        shutil.rmtree(old)
    return folder


def checkpoints(run_folder):
    """The checkpoint folders of a run, oldest first."""
    return sorted(path for path in Path(run_folder).glob(f"{PREFIX}[0-9]*") if path.is_dir())


def find_checkpoint(path, previous_if_damaged=False):
    """The checkpoint to go on from: `path` itself, or the newest one in the run folder `path`.

    previous_if_damaged: step back to the newest sound one. Raises FileNotFoundError or DamagedCheckpoint."""
    path = Path(path)
    single = path.name.startswith(PREFIX)
    if not path.is_dir():
        raise FileNotFoundError(f"config.resume_from = {str(path)!r} does not exist: give a run's folder or one of its checkpoint folders.")
    found = checkpoints(path.parent if single else path)
    if single:
        found = [folder for folder in found if folder.name <= path.name]
    if not found:
        raise FileNotFoundError(f"config.resume_from = {str(path)!r} holds no checkpoint: give a run's folder or one of its checkpoint folders.")
    for folder in reversed(found):
        problem = damage(folder)
        if problem is None:
            return folder
        if not previous_if_damaged:
            raise DamagedCheckpoint(f"{folder} is damaged ({problem}): set config.resume_previous_if_damaged to True to go "
                                    f"on from the one before it, or name another one in config.resume_from.")
    raise DamagedCheckpoint(f"every checkpoint in {found[0].parent} is damaged: start a new run.")


def damage(folder):
    """What is wrong with a checkpoint folder, in a few words, or None."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError):
        return "manifest.json is missing or unreadable"
    for name, expected in manifest.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if _fingerprint(file) != expected:
            return f"{name} is not what was written"
    return None


def load_checkpoint(folder):
    """(weights, optimizer_state, run_state) of a sound checkpoint folder."""
    folder = Path(folder)
    weights = load_file(folder / "weights.safetensors")
    optimizer_state = torch.load(folder / "optimizer.pt", weights_only=True, map_location="cpu")
    return weights, optimizer_state, json.loads((folder / "run.json").read_text())


def _fingerprint(file):
    return {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
