"""How much better than expected a sample was: the normalised reward, minus the KL to the base model."""

from collections.abc import Sequence

import numpy as np
import torch
from ml_collections import ConfigDict

from ddpo.sampling import SHUFFLE_ADVANTAGES, make_generator
from ddpo.stat_tracking import PerPromptStatTracker, one_value_per_prompt

STD_EPSILON = 1e-8


def epoch_advantages(
    scores: dict[str, np.ndarray],
    prompts: Sequence[str],
    good: np.ndarray,
    trackers: dict[str, PerPromptStatTracker | None],
    config: ConfigDict,
    epoch: int,
) -> torch.Tensor:
    """`compute_advantages` of an epoch as `config` wants them: (N,) float32 on the CPU.

    scores: of the samples of all processes, see `ddpo.sampling.gather_scores`; prompts: theirs. good: (N,) bool, the
    others get 0 and enter no statistics. trackers: {"reward", "kl"}, updated.
    """
    kept = {name: value[good] for name, value in scores.items()}
    # only a reward that compares views with their renders, and so has "lpips", punishes empty ones; others measure them
    punished = "lpips" in kept and not config.mrc.empty_in_statistics
    found = compute_advantages(
        kept["reward"],
        [prompt for prompt, is_good in zip(prompts, good, strict=True) if is_good],
        kept["kl"] if config.kl_penalty and config.kl_in_reward else None,
        trackers["reward"],
        trackers["kl"],
        config.kl_normalized_coeff,
        empty=kept["empty"].any(1) if punished else None,
        worst=-config.train.adv_clip_max,
    )
    found = torch.as_tensor(found, dtype=torch.float32)
    if config.shuffle_advantages:
        found = found[torch.randperm(len(found), generator=make_generator(config.seed, SHUFFLE_ADVANTAGES, epoch))]
    advantages = torch.zeros(len(prompts))
    advantages[torch.from_numpy(good)] = found
    return advantages


def compute_advantages(
    rewards: np.ndarray,
    prompts: Sequence[str],
    kl: np.ndarray | None = None,
    reward_tracker: PerPromptStatTracker | None = None,
    kl_tracker: PerPromptStatTracker | None = None,
    kl_normalized_coeff: float = 0.2,
    empty: np.ndarray | None = None,
    worst: float = -5.0,
) -> np.ndarray:
    """advantage = norm(reward) - kl_normalized_coeff * norm(kl), over the samples of ALL processes.

    rewards: (N,) higher is better. prompts: N strings.
    kl: (N,) nats per dimension and step, or None for no KL in the reward; in the loss it is a term of `ppo_loss`.
    reward_tracker: `PerPromptStatTracker` of the rewards; None normalises by mean and std (+1e-8) of the batch.
    kl_tracker: `PerPromptStatTracker` of the KL; None subtracts the raw KL.
    kl_normalized_coeff: weight of the KL, >= 0 (Carve3D: 0.2).
    empty: (N,) bool, samples that show nothing, whose reward is a penalty rather than a measurement; None = none. They
        enter no statistics of rewards, where a single one would shrink the advantages of its prompt for epochs, and
        get the reward advantage `worst`, which should be -adv_clip_max. Without `empty` they are counted as published.

    The given trackers are updated; apart from that the function is pure. The KL is subtracted before the clamp to
    `adv_clip_max` that `ppo_loss` applies. Returns (N,) in the type of the rewards. Raises ValueError for lengths that
    differ and UserError for values that are not finite.
    """
    # Both are checked before any tracker changes: a bad KL must not leave the rewards counted.
    rewards = one_value_per_prompt("rewards", rewards, prompts)
    kl = None if kl is None else one_value_per_prompt("kl", kl, prompts)

    counted = np.ones(len(rewards), bool) if empty is None else ~np.asarray(empty, bool)
    advantages = np.full_like(rewards, worst)
    if counted.any():
        advantages[counted] = _normalized(rewards[counted], np.array(prompts)[counted], reward_tracker)
    if kl is None:
        return advantages
    return advantages - kl_normalized_coeff * (kl if kl_tracker is None else kl_tracker.update(prompts, kl))


def _normalized(rewards, prompts, tracker):
    if tracker is None:
        return (rewards - rewards.mean()) / (rewards.std() + STD_EPSILON)
    return tracker.update(prompts.tolist(), rewards)
