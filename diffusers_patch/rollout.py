"""Painting as acting: follow the denoising chain of a policy and keep everything the update needs."""

from dataclasses import dataclass

import torch
from tqdm import tqdm

from diffusers_patch.ddim_with_logprob import analytic_kl, check_scheduler, ddim_mean_std, draw, gaussian_log_prob


@dataclass
class Trajectory:
    """B chains of T steps.

    latents (B, T+1, ...): the initial ones first; latents[:, i+1] follows step i. timesteps (B, T).
    log_probs (B, T) of the policy; log_probs_reference (B, T) of the SAME transitions under the base model, or None.
    kl_analytic (B, T): KL of each step in closed form (nats per dimension), or None. conditioning: dict of (B, ...).
    views (B, V, 3, S, S) in [0, 1]."""

    latents: torch.Tensor
    timesteps: torch.Tensor
    log_probs: torch.Tensor
    log_probs_reference: torch.Tensor | None
    kl_analytic: torch.Tensor | None
    conditioning: dict
    views: torch.Tensor

    def kl(self, estimator="log_ratio", skip_last=0):
        """KL to the base model (B,), nats per dimension, mean over steps; None if the reference was not asked.

        "log_ratio" is unbiased and noisy (published); "analytic" has the same expectation and little noise.
        skip_last: leave out so many of the last steps, for at the end of the chain, nearly without noise, the KL of
        half-precision networks is the rounding of their outputs."""
        if self.log_probs_reference is None:
            return None
        per_step = self.kl_analytic if estimator == "analytic" else self.log_probs - self.log_probs_reference
        return per_step[:, : per_step.shape[1] - skip_last].mean(1)


@torch.no_grad()
def rollout(
    policy, prompts, num_steps, guidance_scale, eta=1.0, generator=None, reference=False, latents=None, progress=False
):
    """Paint one object for each of B prompts.

    generator: None, a torch.Generator, or a list of B (one per sample, so that a sample does not depend on its batch).
    First the initial latents are drawn (unless `latents` (B, ...) are given), then one noise per step.
    reference: also score every transition under the base model. Returns a Trajectory."""
    scheduler = policy.scheduler
    scheduler.set_timesteps(num_steps, device=policy.device)
    check_scheduler(scheduler)
    conditioning = policy.encode(prompts)
    x = policy.initial_latents(len(prompts), generator) if latents is None else latents
    chain, log_probs, log_probs_reference, kl = [x], [], [], []
    for t in tqdm(scheduler.timesteps, desc="steps", leave=False, disable=not progress):
        t = t.expand(len(prompts))
        mean, std = ddim_mean_std(scheduler, policy.predict(x, t, conditioning, guidance_scale), t, x, eta)
        x_prev = draw(mean, std, generator, dtype=x.dtype)
        log_probs.append(gaussian_log_prob(x_prev, mean, std))
        if reference:
            output = policy.predict(x, t, conditioning, guidance_scale, reference=True)
            mean_reference, _ = ddim_mean_std(scheduler, output, t, x, eta)
            log_probs_reference.append(gaussian_log_prob(x_prev, mean_reference, std))
            kl.append(analytic_kl(mean, mean_reference, std))
        x = x_prev
        chain.append(x)
    return Trajectory(
        latents=torch.stack(chain, 1),
        timesteps=scheduler.timesteps.expand(len(prompts), -1),
        log_probs=torch.stack(log_probs, 1),
        log_probs_reference=torch.stack(log_probs_reference, 1) if reference else None,
        kl_analytic=torch.stack(kl, 1) if reference else None,
        conditioning=conditioning,
        views=policy.decode(x),
    )
