"""The clipped policy-gradient loss (PPO, Schulman et al. 2017) of one denoising step, and the weights of the steps."""

import torch


def ppo_loss(
    log_prob: torch.Tensor,
    log_prob_old: torch.Tensor,
    advantages: torch.Tensor,
    clip_range: float,
    adv_clip_max: float,
    log_prob_reference: torch.Tensor | None = None,
    kl_beta: float = 0.0,
    weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """mean_b weight * (max(-A r, -A clamp(r, 1 - clip_range, 1 + clip_range)) + kl_beta * log_ratio_reference)

    with r = exp(log_prob - log_prob_old), A = clamp(advantages, +-adv_clip_max) and
    log_ratio_reference = log_prob - log_prob_reference.

    log_prob: (B,) under the policy being trained; the gradient flows into it alone.
    log_prob_old, log_prob_reference: (B,) of the same transitions under the sampling policy and the base model. All
        three are MEANS over D latent dimensions, so r is the D-th root of the true ratio; hence clip ranges like 1e-4.
        NaN in the reference = the base model was not asked; kl_beta must then be 0.
    advantages: (B,). clip_range, adv_clip_max: > 0.
    kl_beta: weight of the KL in the loss. While r = 1 (purely on-policy) this term has no expected gradient, since
        E[grad log_prob] = 0: it restrains only over several updates per epoch. Otherwise put the KL into the reward,
        or its closed form into the loss (`ddpo.update.micro_batch_losses`).
    weight: (B,) weights of the samples' losses, or None for 1 (see `timestep_weights`).

    Returns (loss, info): a scalar, and detached scalars approx_kl (0.5 mean((log_prob - log_prob_old)^2)), clipfrac
    (share of |r - 1| > clip_range), ratio_min, ratio_max, and, if a reference is given, kl_asked (share of samples for
    which the base model was asked) and kl (mean log_prob - log_prob_reference of these, NaN if there are none). info is
    never weighted. Raises ValueError if kl_beta is set without a reference.
    """
    if kl_beta and log_prob_reference is None:
        raise ValueError(
            f"kl_beta is {kl_beta} but no log_prob_reference is given: sample with the reference model "
            f"(kl_penalty = True) or set kl_beta = 0"
        )
    log_ratio = log_prob - log_prob_old
    ratio = log_ratio.exp()
    advantages = advantages.clamp(-adv_clip_max, adv_clip_max)
    # On-policy both arguments are equal at r = 1 exactly. `maximum` then gives each half of the gradient, and as the
    # clamp is the identity there, the halves add up to the full one.
    losses = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range))

    with torch.no_grad():
        info = {
            "approx_kl": 0.5 * (log_ratio**2).mean(),
            "clipfrac": ((ratio - 1).abs() > clip_range).float().mean(),
            "ratio_min": ratio.min(),
            "ratio_max": ratio.max(),
        }
    if log_prob_reference is not None:
        kl = log_prob - log_prob_reference
        info["kl"], info["kl_asked"] = kl.detach().nanmean(), (~kl.isnan()).float().mean()
        if kl_beta:  # 0 times an unknown KL would be NaN
            losses = losses + kl_beta * kl
    if weight is not None:
        losses = losses * weight
    return losses.mean(), info


def timestep_weights(std: torch.Tensor, kind: str) -> torch.Tensor:
    """Loss weights of the trained steps: (..., T), mean 1 over the last dimension.

    std: (..., T) the sigma_t of the T trained steps (`diffusers_patch.ddim_with_logprob.ddim_std`).
    kind: "uniform", all 1, as published; "noise", proportional to sigma_t^2. The gradient of log_prob grows like
        1 / sigma_t, so with uniform weights the last, nearly noise-free steps dominate the gradient's norm although
        they decide little about the picture.
    Raises ValueError for another kind.
    """
    if kind == "uniform":
        return torch.ones_like(std)
    if kind == "noise":
        variance = std**2
        return variance / variance.mean(dim=-1, keepdim=True)
    raise ValueError(f"train.timestep_weighting is {kind!r}: it must be 'uniform' or 'noise'")
