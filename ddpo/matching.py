"""Advantage-weighted matching (AWM; Xue et al. 2025, arXiv:2509.25050): learn from the picture and forget its path.

The log-probability of a path holds the noise of its every step, most of which did not decide what was painted. Here the
picture that the path led to is noised anew, to the level of each trained step, and the step from there of a model that
knew the picture takes the place of the step that was painted. Its log-probability is the ELBO's term,

    log p_t = -||mean(x_t, picture) - mean_theta(x_t)||^2 / (2 std^2) + const, mean over the latent's dimensions:

how well the model foretells the picture, as in its pretraining. With guidance it is the guided prediction that
foretells, which pretraining never fitted: advantages that do not add up to nothing teach that first, whatever the
pictures are worth (tiny/README.md).
"""

import torch
from diffusers import DDIMScheduler
from diffusers.utils.torch_utils import randn_tensor

from diffusers_patch.ddim_with_logprob import ddim_mean_std, matching_output
from diffusers_patch.rollout import Trajectory, Transitions


def matching_transitions(
    scheduler: DDIMScheduler,
    trajectory: Trajectory,
    steps: torch.Tensor,
    eta: float,
    generator: torch.Generator | list[torch.Generator],
) -> Transitions:
    """`trajectory.transitions(steps)` of the same pictures, but on paths that are drawn anew and that nobody scored.

    steps: (B, k); generator: of the noise, one or one for each of the B*k rows."""
    old = trajectory.transitions(steps)
    picture, t = trajectory.latents[:, -1].float().repeat_interleave(steps.shape[1], 0), old.timesteps
    noise = randn_tensor(picture.shape, generator, picture.device, torch.float32)
    noised = scheduler.add_noise(picture, noise, t)
    knowing = matching_output(scheduler, picture, noise, t)
    known, _ = ddim_mean_std(scheduler, knowing, t, noised, eta)
    return old._replace(latents=noised, next_latents=known, log_probs=None, log_probs_reference=None)
