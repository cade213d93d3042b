"""Advantage-weighted matching (AWM; Xue et al. 2025, arXiv:2509.25050): learn from the picture and forget its path.

The log-probability of a path holds the noise of its every step, most of which did not decide what was painted. Here the
picture that the path led to is noised anew, to the level of each trained step, and the ELBO's term of that step,

    log p_t = -||mean(x_t, picture) - mean_theta(x_t)||^2 / (2 std^2), mean over the latent's dimensions,

takes the place of the step's log-probability: how well the model foretells the picture, as in its pretraining.
"""

from collections.abc import Callable

import torch
from diffusers.utils.torch_utils import randn_tensor
from ml_collections import ConfigDict

from diffusers_patch.ddim_with_logprob import analytic_kl, ddim_mean_std, matching_output
from diffusers_patch.policy import MultiViewPolicy
from diffusers_patch.rollout import Trajectory


def matching_log_prob(
    policy: MultiViewPolicy,
    picture: torch.Tensor,
    timestep: torch.Tensor,
    noise: torch.Tensor,
    conditioning: dict[str, torch.Tensor],
    eta: float,
    guidance_scale: float,
) -> torch.Tensor:
    """log p_t of pictures (B, ...), noised to `timestep` (B,) by `noise` (B, ...): (B,) <= 0, nats per dimension."""
    scheduler = policy.scheduler
    x_t = scheduler.add_noise(picture, noise, timestep)
    output = policy.predict(x_t, timestep, conditioning, guidance_scale)
    mean, std = ddim_mean_std(scheduler, output, timestep, x_t, eta)
    known, _ = ddim_mean_std(scheduler, matching_output(scheduler, picture, noise, timestep), timestep, x_t, eta)
    return -analytic_kl(mean, known, std)


def matching_gradients(
    policy: MultiViewPolicy,
    trajectory: Trajectory,
    weights: torch.Tensor,
    generators: list[torch.Generator],
    config: ConfigDict,
    backward: Callable,
) -> torch.Tensor:
    """The gradient of every sample's sum over steps of weight times log p_t: (B, P), over the trainable parameters.

    weights: (num_steps,) on the CPU, see `draw_trained_steps`; generators: B, of the noise; backward: as of `rollout`.
    With config.train.cfg the prediction is the guided one that painted, without it the model's own for the caption,
    which is what pretraining matched.
    """
    picture, scale = trajectory.latents[:, -1].float(), config.sample.guidance_scale if config.train.cfg else 1.0
    with policy.sample_gradients(len(picture), scale) as gradients:
        for t, weight in zip(policy.scheduler.timesteps, weights.tolist(), strict=True):
            if weight == 0:
                continue
            noise = randn_tensor(picture.shape, generators, picture.device, torch.float32)
            t = t.expand(len(picture))
            log_prob = matching_log_prob(policy, picture, t, noise, trajectory.conditioning, config.sample.eta, scale)
            backward(weight * log_prob.sum())
        return gradients.flatten()
