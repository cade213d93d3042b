"""Numbers of the update held to what the networks really do: the step size, and the clip range."""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from ml_collections import ConfigDict

from config.batches import trainable_steps, trained_steps
from config.errors import UserError
from ddpo.sampling import CLIP_RANGE, make_generator
from diffusers_patch.ddim_with_logprob import draw, gaussian_log_prob
from diffusers_patch.policy import DTYPES, MultiViewPolicy
from diffusers_patch.rollout import Trajectory

SAMPLES = 8  # on which the KL is measured, over all processes, but at least one on each: its first digit is enough
LARGEST_CHANGE = 10.0
CLIP_STEPS = 4  # timesteps at which the rounding of ratios is measured
LARGEST_CLIP_FRACTION = 0.05  # on-policy, of transitions that are clipped by rounding alone


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
        self.done = 0  # updates that were measured, for this kl_per_update
        self.trajectory = self.means = None

    @property
    def remaining(self) -> int:
        """How many updates will still be measured."""
        train = self.config.train
        return max(0, train.kl_calibration_updates - self.done) if train.kl_per_update > 0 else 0

    def state_dict(self) -> dict:
        """What a checkpoint needs to know, beside the learning rate."""
        return {"kl_per_update": self.config.train.kl_per_update, "done": self.done}

    def load_state_dict(self, state: dict, learning_rate: float) -> None:
        """Continue from `state_dict()` and the learning rate that it had led to.

        If it was off then, or is off now, config.train.learning_rate counts and nothing is taken over. If another KL is
        wanted now, it is calibrated anew, from the rate that there was."""
        wanted = self.config.train.kl_per_update
        if wanted > 0 and state["done"] > 0:
            self.done = state["done"] if wanted == state["kl_per_update"] else 0
            self._set(learning_rate)

    def start(self, trajectory: Trajectory) -> None:
        """Call before the updates of an epoch on the samples `trajectory` of this process."""
        self.trajectory = self.means = None
        if self.remaining:
            self.trajectory = trajectory
            self.means = self._means()

    def after_update(self, length: float = 1.0) -> dict[str, float]:
        """Measure, set the next learning rate, and return both for the log; {} once the calibration is over.

        length: of the update, in units of the step that the learning rate is for, see `ddpo.update.optimizer_step`."""
        if not self.remaining:
            return {}
        before, self.means = self.means, self._means()
        kl = kl_between(before, self.means)
        sums = torch.stack([kl.sum(), kl.new_tensor(len(kl))])
        total, count = self.accelerator.reduce(sums, reduction="sum").tolist()
        self.done += 1
        return {"kl_of_update": total / count, "next_learning_rate": self.adjust(total / count / length**2)}

    def adjust(self, kl: float) -> float:
        """Set and return the learning rate that follows a whole step which moved the policy by `kl`."""
        factor = (self.config.train.kl_per_update / max(kl, 1e-12)) ** 0.5
        factor = min(max(factor, 1 / LARGEST_CHANGE), LARGEST_CHANGE)
        return self._set(self.optimizer.param_groups[0]["lr"] * factor)

    def _set(self, learning_rate):
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        return learning_rate

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
            given = old.latents, old.timesteps, old.conditioning
            mean, std = policy.mean_std(*given, config.sample.guidance_scale, config.sample.eta)
            means.append(mean)
            stds.append(std)
    return torch.stack(means, 1), torch.stack(stds, 1)


def kl_between(before: tuple[torch.Tensor, torch.Tensor], after: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """KL in nats per trajectory between two results of `trajectory_means`: (b,), the sum over steps and dimensions.

    Equal variances: ||mean - mean'||^2 / (2 std^2) for every step.
    """
    (mean, std), (other, _) = before, after
    return ((mean - other) ** 2 / (2 * std**2)).flatten(1).sum(1)


def check_clip_range(policy: MultiViewPolicy, prompts: Sequence[str], config: ConfigDict) -> None:
    """Raise ValueError if rounding alone would clip ratios: half-precision networks in a clip range of float32.

    On-policy every ratio is 1, and a clipped one gives no gradient. The sentence says how many would be clipped, and
    which range would do. Nothing is measured if the range is not below the precision of the type.
    """
    allowed = config.train.clip_range
    if config.mixed_precision == "no" or allowed >= torch.finfo(DTYPES[config.mixed_precision]).eps:
        return
    deviation = ratio_deviation(policy, prompts, config)
    fraction = float((deviation > allowed).float().mean())
    if fraction > LARGEST_CLIP_FRACTION:
        raise UserError(
            f"config.train.clip_range is {allowed:g}, but with config.mixed_precision = {config.mixed_precision!r} "
            f"rounding alone moves {100 * fraction:.0f} % of the ratios further than that from 1, and nothing would be "
            f"learned from those: set it to {2 * float(deviation.quantile(0.99)):.1g}, or choose a more precise type"
        )


@torch.no_grad()
def ratio_deviation(policy: MultiViewPolicy, prompts: Sequence[str], config: ConfigDict) -> torch.Tensor:
    """|ratio - 1| on-policy, (CLIP_STEPS * b,): sampling and update compute the same in batches of other sizes.

    Simulated at timesteps spread over the trained ones, for the b samples of one micro-batch, whose latents are noise.
    """
    sample, train = config.sample, config.train
    scheduler = policy.scheduler
    scheduler.set_timesteps(sample.num_steps, device=policy.device)
    captions = [prompts[i % len(prompts)] + sample.prompt_suffix for i in range(sample.batch_size)]
    conditioning = policy.encode(captions)
    generator = make_generator(config.seed, CLIP_RANGE)
    together = min(train.timesteps_per_forward, trained_steps(config))

    def mean_std(x, t, rows):
        """Of the first b samples, computed in a batch of the samples `rows`."""
        t, given = t.expand(len(rows)), {name: value[rows] for name, value in conditioning.items()}
        mean, std = policy.mean_std(x[rows], t, given, sample.guidance_scale, sample.eta)
        return mean[: train.batch_size], std[: train.batch_size]

    sampled, trained = torch.arange(sample.batch_size), torch.arange(train.batch_size).repeat(together)
    deviations = []
    for k in torch.linspace(0, trainable_steps(config) - 1, CLIP_STEPS).long().tolist():
        x, t = policy.initial_latents(len(captions), generator), scheduler.timesteps[k]
        mean, std = mean_std(x, t, sampled)
        x_prev = draw(mean, std, generator)
        log_ratio = gaussian_log_prob(x_prev, *mean_std(x, t, trained)) - gaussian_log_prob(x_prev, mean, std)
        deviations.append(log_ratio.exp().sub(1).abs())
    return torch.cat(deviations)
