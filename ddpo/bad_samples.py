"""Samples with NaN or infinite numbers: kept out of the update and of all statistics, and saved to be looked at."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from config.errors import UserError
from ddpo.files import write_whole
from ddpo.pictures import save_views, to_bytes
from diffusers_patch.rollout import Trajectory


def is_finite(trajectory: Trajectory, reward: torch.Tensor) -> torch.Tensor:
    """(B,) bool, on the reward's device: the last latents, views, log-probabilities, KL and reward (B,) are finite.

    Latents that are not finite stay so to the end of the chain."""
    good = torch.isfinite(reward)
    for part in (trajectory.latents[:, -1], trajectory.views, trajectory.log_probs):
        good = good & part.isfinite().flatten(1).all(1).to(good.device)
    for part in (trajectory.log_probs_reference, trajectory.kl_analytic):
        if part is None:
            continue
        known = part.isfinite() | part.isnan().all(0)  # NaN in all samples: the base model was not asked at this step
        good = good & known.all(1).to(good.device)
    return good


def leave_out_bad(run, epoch: int, samples, prompts: Sequence[str], good: np.ndarray, local: slice):
    """`Samples` of this process in which copies of good ones stand for the bad ones, which are saved and announced.

    Call in all processes of the run (`carve3d_train.Run`). prompts and good, (N,) bool: of the epoch's samples; local:
    which of them are this process's. Their number stays, which the batches of all processes follow from; those that are
    not good must get the advantage 0. Raises UserError if too many are bad.
    """
    folder = run.folder / "bad_samples"
    with run.stopping.safely():
        save_bad(samples, prompts[local], local.start, epoch, run.config.seed, folder)
    number, limit = int((~good).sum()), run.config.max_bad_samples
    text = f"{number} of the {len(good)} samples of epoch {epoch} have NaN or infinite numbers, see {folder}"
    if number >= limit or not good.reshape(run.accelerator.num_processes, -1).any(1).all():
        raise UserError(
            f"{text}; config.max_bad_samples is {limit}: check the painter's and reconstructor's weights, or resume "
            f"from an earlier checkpoint with a lower train.learning_rate or a more precise mixed_precision"
        )
    run.log.say(f"{text}; they are left out")
    index = np.where(good[local], np.arange(local.stop - local.start), good[local].argmax())
    index = torch.from_numpy(index)
    gradients = None if samples.gradients is None else samples.gradients[index]
    return replace(samples, trajectory=samples.trajectory.take(index), gradients=gradients)


def save_bad(samples, prompts: Sequence[str], first: int, epoch: int, seed: int, folder: Path) -> None:
    """Write the bad samples of this process, their views and what they follow from, into `folder`/epoch_XXXX.

    samples: `Samples`; prompts: of them; first: the place of their first one in the epoch."""
    for i, views in samples.bad_views.items():
        file = folder / f"epoch_{epoch:04d}" / f"sample_{first + i:05d}.png"
        about = {"prompt": prompts[i], "seed": seed, "epoch": epoch, "sample": first + i}
        write_whole(file.with_suffix(".json"), json.dumps(about, indent=1))
        save_views({"views": to_bytes(views.float().nan_to_num(0.0, 1.0, 0.0).clamp(0, 1))}, file)
