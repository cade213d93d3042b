"""The step size by what it does: a learning rate that moves the policy by a given KL per update."""

import torch
from accelerate import Accelerator
from ml_collections import ConfigDict

from config.batches import trainable_steps
from diffusers_patch.ddim_with_logprob import ddim_mean_std
from diffusers_patch.policy import MultiViewPolicy
from diffusers_patch.rollout import Trajectory

SAMPLES = 8  # on which the KL is measured, over all processes, but at least one on each: its first digit is enough
LARGEST_CHANGE = 10.0


class StepCalibration:
    """Chooses the learning rate by what an update does: `config.train.kl_per_update` nats per trajectory.

    In each of the first `kl_calibration_updates` updates the KL by which it moved the policy is measured, and the
    learning rate is multiplied by sqrt(wanted / measured), because the KL grows with the square of the step.
    """

    def __init__(
        self,
        policy: MultiViewPolicy,
        optimizer: torch.optim.Optimizer,
        accelerator: Accelerator,
        config: ConfigDict,
    ):
        self.policy, self.optimizer, self.accelerator, self.config = policy, optimizer, accelerator, config
        self.remaining = config.train.kl_calibration_updates if config.train.kl_per_update > 0 else 0
        self.trajectory = self.means = None

    def start(self, trajectory: Trajectory) -> None:
        """Call before the updates of an epoch on the samples `trajectory` of this process."""
        self.trajectory = self.means = None
        if self.remaining:
            self.trajectory = trajectory
            self.means = self._means()

    def after_update(self) -> dict[str, float]:
        """Measure, set the next learning rate, and return both for the log; {} once the calibration is over."""
        if not self.remaining:
            return {}
        before, self.means = self.means, self._means()
        kl = kl_between(before, self.means)
        sums = torch.stack([kl.sum(), kl.new_tensor(len(kl))])
        total, count = self.accelerator.reduce(sums, reduction="sum").tolist()
        self.remaining -= 1
        return {"kl_of_update": total / count, "next_learning_rate": self.adjust(total / count)}

    def adjust(self, kl: float) -> float:
        """Set and return the learning rate that follows an update which moved the policy by `kl`."""
        factor = (self.config.train.kl_per_update / max(kl, 1e-12)) ** 0.5
        factor = min(max(factor, 1 / LARGEST_CHANGE), LARGEST_CHANGE)
        for group in self.optimizer.param_groups:
            group["lr"] *= factor
        return self.optimizer.param_groups[0]["lr"]

    def _means(self):
        """`trajectory_means` of samples spread over the epoch, the same ones for any number of processes."""
        per_process, num_processes = len(self.trajectory), self.accelerator.num_processes
        first = per_process * self.accelerator.process_index
        spacing = max(1, per_process * num_processes // max(SAMPLES, num_processes))
        index = torch.arange(first, first + per_process)
        return trajectory_means(self.policy, self.trajectory, index[index % spacing == 0] - first, self.config)


@torch.no_grad()
def trajectory_means(
    policy: MultiViewPolicy, trajectory: Trajectory, index: torch.Tensor, config: ConfigDict
) -> tuple[torch.Tensor, torch.Tensor]:
    """Means (b, K, ...) and stds (b, K, 1, ...), in float32, of the trainable steps of the samples `index` (b,)."""
    means, stds = [], []
    batch = trajectory.take(index).to(policy.device)
    policy.scheduler.set_timesteps(trajectory.num_steps, device=policy.device)
    with policy.full_precision():
        for k in range(trainable_steps(config)):
            old = batch.transitions(torch.full((len(batch), 1), k, device=policy.device))
            output = policy.predict(old.latents, old.timesteps, old.conditioning, config.sample.guidance_scale)
            mean, std = ddim_mean_std(policy.scheduler, output, old.timesteps, old.latents, config.sample.eta)
            means.append(mean)
            stds.append(std)
    return torch.stack(means, 1), torch.stack(stds, 1)


def kl_between(before: tuple[torch.Tensor, torch.Tensor], after: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """KL in nats per trajectory between two results of `trajectory_means`: (b,), the sum over steps and dimensions.

    Equal variances: ||mean - mean'||^2 / (2 std^2) for every step.
    """
    (mean, std), (other, _) = before, after
    return ((mean - other) ** 2 / (2 * std**2)).flatten(1).sum(1)
