"""The policy update: recompute the log-probabilities of stored transitions and follow the clipped policy gradient."""

import torch
from tqdm import tqdm

from ddpo.ppo import ppo_loss, timestep_weights
from diffusers_patch.ddim_with_logprob import ddim_mean_std, ddim_std, ddim_step_with_logprob
from diffusers_patch.policy import take


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
    return {
        "latents": trajectory.latents[row, column],
        "next_latents": trajectory.latents[row, column + 1],
        "timesteps": trajectory.timesteps[row, column],
        "log_probs": trajectory.log_probs[row, column],
        "log_probs_reference": None if trajectory.log_probs_reference is None else trajectory.log_probs_reference[row, column],
        "conditioning": take(trajectory.conditioning, row),
    }


def micro_batch_losses(policy, trajectory, advantages, index, steps, config):
    """Yield (loss, info) of one micro-batch, `config.train.timesteps_per_forward` of its steps at a time.

    trajectory: what was sampled; advantages: (N,); index: (b,) samples; steps: (b, K) their steps, in training order. The
    losses are means over the micro-batch, each scaled by its share of the K steps, so that their sum is the loss of the
    micro-batch."""
    train, K = config.train, steps.shape[1]
    std = ddim_std(policy.scheduler, trajectory.timesteps[index[:, None], steps], config.sample.eta)
    weights = timestep_weights(std, train.timestep_weighting)
    in_loss = config.kl_penalty and not config.kl_in_reward
    for first in range(0, K, train.timesteps_per_forward):
        part = slice(first, first + train.timesteps_per_forward)
        old = transition(trajectory, index, steps[:, part])
        count = len(old["timesteps"]) // len(index)
        output = policy.predict(old["latents"], old["timesteps"], old["conditioning"], config.sample.guidance_scale)
        _, log_prob = ddim_step_with_logprob(
            policy.scheduler, output, old["timesteps"], old["latents"], config.sample.eta, prev_sample=old["next_latents"])
        loss, info = ppo_loss(
            log_prob, old["log_probs"], advantages[index].repeat_interleave(count), train.clip_range, train.adv_clip_max,
            log_prob_reference=old["log_probs_reference"], kl_beta=config.kl_beta if in_loss else 0.0,
            weight=weights[:, part].flatten())
        yield loss * (count / K), {**info, "loss": loss.detach()}


def update(policy, optimizer, accelerator, trajectory, advantages, config, generator, on_step=None, progress=False):
    """All updates of an epoch on this process's samples; returns a list with one dict of statistics per optimizer step.

    Gradients are summed over micro-batches and timesteps (each loss divided by their number), averaged over processes
    once per optimizer step, clipped, and applied. on_step: called after each optimizer step."""
    train = config.train
    parameters = policy.trainable_parameters()
    num_steps = config.sample.num_steps - train.skip_last_steps
    logs = []
    bar = tqdm(total=train.num_inner_epochs * len(advantages), desc="update", leave=False, disable=not progress)
    for _ in range(train.num_inner_epochs):
        order, steps = (x.to(advantages.device) for x in shuffled(len(advantages), num_steps, train.timestep_fraction, generator))
        batches = list(zip(order.split(train.batch_size), steps.split(train.batch_size)))
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
            if on_step is not None:
                on_step()
    bar.close()
    return logs


def average_gradients(parameters, accelerator):
    """Mean of the gradients over all processes, in one message. Every process ends with the same numbers."""
    if accelerator.num_processes == 1:
        return
    flat = torch.cat([p.grad.flatten() for p in parameters])
    flat = accelerator.reduce(flat, reduction="mean")
    for p, grad in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad.copy_(grad.view_as(p))


def summarise(infos, accelerator):
    """Statistics of an optimizer step over its micro-batches and all processes: floats."""
    reduce = {"ratio_min": torch.amin, "ratio_max": torch.amax}
    names = sorted(infos[0])
    values = torch.stack([torch.stack([info[name].float() for info in infos]) for name in names], 1)  # (infos, names)
    values = accelerator.gather(values)
    return {name: float(reduce.get(name, torch.mean)(values[:, i], dim=0)) for i, name in enumerate(names)}


@torch.no_grad()
def trajectory_means(policy, trajectory, config, samples):
    """Means (b, K, ...) and stds (b, K, 1, ...) of the trained steps of the first `samples` samples, in float32."""
    K = config.sample.num_steps - config.train.skip_last_steps
    index = torch.arange(min(samples, len(trajectory.timesteps)), device=policy.device)
    means, stds = [], []
    with policy.full_precision():
        for k in range(K):
            old = transition(trajectory, index, torch.full((len(index), 1), k, device=policy.device))
            output = policy.predict(old["latents"], old["timesteps"], old["conditioning"], config.sample.guidance_scale)
            mean, std = ddim_mean_std(policy.scheduler, output, old["timesteps"], old["latents"], config.sample.eta)
            means.append(mean)
            stds.append(std)
    return torch.stack(means, 1), torch.stack(stds, 1)


def kl_between(before, after):
    """KL in nats per trajectory between two results of `trajectory_means`: sum over steps and dimensions, mean over samples.

    Equal variances: ||mean - mean'||^2 / (2 std^2) for every step."""
    (mean, std), (other, _) = before, after
    return ((mean - other) ** 2 / (2 * std**2)).flatten(1).sum(1).mean()


class StepCalibration:
    """Chooses the learning rate by what an update does: `kl_per_update` nats per trajectory.

    In each of the first `kl_calibration_updates` updates the KL that the update moved the policy by is measured and the
    learning rate multiplied by sqrt(wanted / measured), since the KL grows with the square of the step; then it stays."""

    SAMPLES = 8  # per process, enough for a KL that needs no more than one digit
    LARGEST_CHANGE = 10.0

    def __init__(self, config):
        self.target, self.remaining = config.train.kl_per_update, 0
        if self.target > 0:
            self.remaining = config.train.kl_calibration_updates

    def adjust(self, optimizer, kl):
        """Set the next learning rate after an update that moved the policy by `kl`; returns it."""
        self.remaining -= 1
        factor = (self.target / max(kl, 1e-12)) ** 0.5
        factor = min(max(factor, 1 / self.LARGEST_CHANGE), self.LARGEST_CHANGE)
        for group in optimizer.param_groups:
            group["lr"] *= factor
        return optimizer.param_groups[0]["lr"]
