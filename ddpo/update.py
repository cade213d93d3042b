"""The policy update: recompute the log-probabilities of stored transitions and follow the clipped policy gradient."""

import torch
from tqdm import tqdm

from ddpo.ppo import ppo_loss, timestep_weights
from diffusers_patch.ddim_with_logprob import ddim_mean_std, ddim_std, ddim_step_with_logprob
from diffusers_patch.policy import take


def trainable_steps(config):
    """How many steps of a trajectory can be trained on, from its first one."""
    return config.sample.num_steps - config.train.skip_last_steps


def shuffled(samples, num_steps, fraction, generator):
    """An order of `samples` samples (S,), and for each the steps to train on (S, int(num_steps * fraction)) in an order
    of its own (DDPO: both shuffled, the timesteps independently per sample)."""
    order = torch.randperm(samples, generator=generator)
    steps = torch.stack([torch.randperm(num_steps, generator=generator) for _ in range(samples)])
    return order, steps[:, : int(num_steps * fraction)]


def transition(trajectory, index, steps):
    """The transitions `steps` (b, k) of the samples `index` (b,), flattened to b*k rows, all of one sample together."""
    row = index[:, None].expand_as(steps).flatten()
    column = steps.flatten()
    reference = trajectory.log_probs_reference
    return {
        "latents": trajectory.latents[row, column],
        "next_latents": trajectory.latents[row, column + 1],
        "timesteps": trajectory.timesteps[row, column],
        "log_probs": trajectory.log_probs[row, column],
        "log_probs_reference": None if reference is None else reference[row, column],
        "conditioning": take(trajectory.conditioning, row),
    }


def micro_batch_losses(policy, trajectory, advantages, index, steps, config):
    """Yield (loss, info) of one micro-batch, `config.train.timesteps_per_forward` of its steps at a time.

    trajectory: what was sampled; advantages: (N,); index: (b,) samples; steps: (b, K) their steps, in training order.
    Each loss is a mean over samples and the steps at hand, scaled by their share of the K steps, so that the losses of
    a micro-batch add up to the mean over all. info: as of `ppo_loss`, with the unscaled "loss" and that "share"."""
    train, K = config.train, steps.shape[1]
    # mean 1 over all steps that can be drawn, not over those that were: a step weighs the same in every sample
    std = ddim_std(policy.scheduler, trajectory.timesteps[index, : trainable_steps(config)], config.sample.eta)
    weights = timestep_weights(std, train.timestep_weighting).gather(1, steps)
    in_loss = config.kl_penalty and not config.kl_in_reward
    for first in range(0, K, train.timesteps_per_forward):
        part = slice(first, first + train.timesteps_per_forward)
        old = transition(trajectory, index, steps[:, part])
        count = steps[:, part].shape[1]
        output = policy.predict(old["latents"], old["timesteps"], old["conditioning"], config.sample.guidance_scale)
        _, log_prob = ddim_step_with_logprob(
            policy.scheduler,
            output,
            old["timesteps"],
            old["latents"],
            config.sample.eta,
            prev_sample=old["next_latents"],
        )
        loss, info = ppo_loss(
            log_prob,
            old["log_probs"],
            advantages[index].repeat_interleave(count),
            train.clip_range,
            train.adv_clip_max,
            log_prob_reference=old["log_probs_reference"],
            kl_beta=config.kl_beta if in_loss else 0.0,
            weight=weights[:, part].flatten(),
        )
        share = loss.new_tensor(count / K)
        yield loss * share, {**info, "loss": loss.detach(), "share": share}


def update(policy, optimizer, accelerator, trajectory, advantages, config, generator, after_step=None, progress=False):
    """All updates of an epoch on this process's samples; returns a list with one dict of statistics per optimizer step.

    Gradients are summed over micro-batches and timesteps (each loss divided by their number), averaged over processes
    once per optimizer step, clipped, and applied. after_step: called after each of them, returns more statistics."""
    train = config.train
    parameters = policy.trainable_parameters()
    logs = []
    bar = tqdm(total=train.num_inner_epochs * len(advantages), desc="update", leave=False, disable=not progress)
    for _ in range(train.num_inner_epochs):
        order, steps = shuffled(len(advantages), trainable_steps(config), train.timestep_fraction, generator)
        order, steps = order.to(advantages.device), steps.to(advantages.device)
        batches = list(zip(order.split(train.batch_size), steps.split(train.batch_size), strict=True))
        for first in range(0, len(batches), train.gradient_accumulation_steps):
            infos = []
            for index, batch_steps in batches[first : first + train.gradient_accumulation_steps]:
                for loss, info in micro_batch_losses(policy, trajectory, advantages, index, batch_steps, config):
                    accelerator.backward(loss / train.gradient_accumulation_steps)
                    infos.append(info)
                bar.update(len(index))
            average_gradients(parameters, accelerator)
            grad_norm = accelerator.clip_grad_norm_(parameters, train.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            logs.append({**summarise(infos, accelerator), "grad_norm": float(grad_norm)})
            if after_step is not None:
                logs[-1].update(after_step())
    bar.close()
    return logs


def average_gradients(parameters, accelerator):
    """Mean of the gradients over all processes, in one message. Every process ends with the same numbers."""
    if accelerator.num_processes == 1:
        return
    grads = [p.grad for p in parameters if p.grad is not None]
    mean = accelerator.reduce(torch.cat([grad.flatten() for grad in grads]), reduction="mean")
    for grad, values in zip(grads, mean.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(values.view_as(grad))


def summarise(infos, accelerator):
    """Statistics of an optimizer step over its micro-batches and all processes: floats, means but for the extrema."""
    names = sorted(infos[0])
    values = torch.stack([torch.stack([info[name].float() for name in names]) for info in infos])  # (infos, names)
    values = dict(zip(names, accelerator.gather(values).unbind(1), strict=True))
    share = values.pop("share")
    extrema = {"ratio_min": float(values.pop("ratio_min").min()), "ratio_max": float(values.pop("ratio_max").max())}
    return {name: float((value * share).sum() / share.sum()) for name, value in values.items()} | extrema


@torch.no_grad()
def trajectory_means(policy, trajectory, index, config):
    """Means (b, K, ...) and stds (b, K, 1, ...), in float32, of the trainable steps of the samples `index` (b,)."""
    means, stds = [], []
    with policy.full_precision():
        for k in range(trainable_steps(config)):
            old = transition(trajectory, index, torch.full_like(index, k)[:, None])
            output = policy.predict(old["latents"], old["timesteps"], old["conditioning"], config.sample.guidance_scale)
            mean, std = ddim_mean_std(policy.scheduler, output, old["timesteps"], old["latents"], config.sample.eta)
            means.append(mean)
            stds.append(std)
    return torch.stack(means, 1), torch.stack(stds, 1)


def kl_between(before, after):
    """KL in nats per trajectory between two results of `trajectory_means`: (b,), the sum over steps and dimensions.

    Equal variances: ||mean - mean'||^2 / (2 std^2) for every step."""
    (mean, std), (other, _) = before, after
    return ((mean - other) ** 2 / (2 * std**2)).flatten(1).sum(1)


class StepCalibration:
    """Chooses the learning rate by what an update does: `config.train.kl_per_update` nats per trajectory.

    In each of the first `kl_calibration_updates` updates the KL that the update moved the policy by is measured and
    the learning rate multiplied by sqrt(wanted / measured), for the KL grows with the step's square; then it stays."""

    SAMPLES = 8  # of all processes together, but one of each at least: enough for a KL of which one digit is needed
    LARGEST_CHANGE = 10.0

    def __init__(self, policy, optimizer, accelerator, config):
        self.policy, self.optimizer, self.accelerator, self.config = policy, optimizer, accelerator, config
        self.remaining = config.train.kl_calibration_updates if config.train.kl_per_update > 0 else 0
        self.trajectory = self.means = None

    def start(self, trajectory):
        """Before the updates of an epoch on the samples `trajectory` of this process."""
        self.trajectory = self.means = None
        if self.remaining:
            self.trajectory = trajectory
            self.means = self._means()

    def after_update(self):
        """Measure, set the next learning rate, and return both for the log; {} once the calibration is over."""
        if not self.remaining:
            return {}
        before, self.means = self.means, self._means()
        kl = kl_between(before, self.means)
        sums = torch.stack([kl.sum(), kl.new_tensor(len(kl))])
        total, count = self.accelerator.reduce(sums, reduction="sum").tolist()
        self.remaining -= 1
        return {"kl_of_update": total / count, "next_learning_rate": self.adjust(total / count)}

    def adjust(self, kl):
        """Set and return the learning rate that follows an update which moved the policy by `kl`."""
        factor = (self.config.train.kl_per_update / max(kl, 1e-12)) ** 0.5
        factor = min(max(factor, 1 / self.LARGEST_CHANGE), self.LARGEST_CHANGE)
        for group in self.optimizer.param_groups:
            group["lr"] *= factor
        return self.optimizer.param_groups[0]["lr"]

    def _means(self):
        """`trajectory_means` of samples spread over the epoch, the same ones however many processes share it."""
        share, processes = len(self.trajectory.timesteps), self.accelerator.num_processes
        first = share * self.accelerator.process_index
        spacing = max(1, share * processes // max(self.SAMPLES, processes))
        index = torch.arange(first, first + share, device=self.policy.device)
        return trajectory_means(self.policy, self.trajectory, index[index % spacing == 0] - first, self.config)
