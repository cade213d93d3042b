"""Which denoising steps of a trajectory are trained on, and at which the base model is asked."""

import torch
from diffusers import DDIMScheduler
from ml_collections import ConfigDict

from config.batches import reference_steps, trainable_steps, trained_steps
from ddpo.ppo import timestep_weights
from diffusers_patch.ddim_with_logprob import ddim_std


def draw_steps(weights: torch.Tensor, count: int, generator: torch.Generator | None) -> torch.Tensor:
    """Draw `count` of T steps, and return their weights, such that every weighted sum over steps keeps its expectation.

    weights: (T,) >= 0. A step is drawn with a probability p proportional to its weight (at most 1), and then has the
    weight `weights / p`; the others have 0. Systematic sampling: the steps drawn are spread evenly over the trajectory,
    which makes the sums less noisy than independent draws. generator: on the CPU; not needed where all are drawn.
    """
    if count >= len(weights):
        return weights
    p = _inclusion(weights.double(), count)
    edges = torch.cat([p.new_zeros(1), p.cumsum(0)]) + torch.rand((), generator=generator, dtype=torch.float64)
    drawn = edges[1:].floor() > edges[:-1].floor()
    return torch.where(drawn, weights / p, 0.0).to(weights.dtype)


def _inclusion(weights, count):
    """Probabilities (T,) that add up to `count`, proportional to the weights where that leaves them below 1."""
    p = count * weights / weights.sum()
    while (p > 1).any():
        certain = p >= 1
        p = torch.where(certain, 1.0, (count - certain.sum()) * weights / weights[~certain].sum())
    return p


def draw_trained_steps(
    scheduler: DDIMScheduler, config: ConfigDict, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Weights (num_steps,) of the steps' log-probabilities in a sample's objective, on the CPU; 0 = not trained on.

    `config.train.timestep_fraction` of the trainable steps are drawn, in proportion to `timestep_weighting`. The sum
    of weights is 1 if all are."""
    T, trainable = config.sample.num_steps, trainable_steps(config)
    std = ddim_std(scheduler, scheduler.timesteps[:trainable], config.sample.eta).cpu()
    weights = torch.zeros(T)
    drawn = draw_steps(timestep_weights(std, config.train.timestep_weighting), trained_steps(config), generator)
    weights[:trainable] = drawn / trainable
    return weights


def draw_reference_steps(config: ConfigDict, generator: torch.Generator | None = None) -> torch.Tensor:
    """At which steps the base model is asked, (num_steps,) bool: `config.kl_timestep_fraction` of the trainable ones.

    generator: None = at all trainable steps."""
    asked = torch.zeros(config.sample.num_steps, dtype=torch.bool)
    trainable = trainable_steps(config)
    count = reference_steps(config) if generator else trainable
    asked[:trainable] = draw_steps(torch.ones(trainable), count, generator) > 0
    return asked
