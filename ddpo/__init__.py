"""Denoising diffusion policy optimisation: statistics, advantages and the PPO loss."""

from ddpo.advantages import compute_advantages
from ddpo.ppo import ppo_loss, timestep_weights
from ddpo.stat_tracking import PerPromptStatTracker

__all__ = ["PerPromptStatTracker", "compute_advantages", "ppo_loss", "timestep_weights"]
