"""The policy update: recompute the log-probabilities of stored transitions and follow the clipped policy gradient."""

from collections.abc import Callable, Iterator

import torch
from accelerate import Accelerator
from ml_collections import ConfigDict

from config.batches import kl_in_loss, steps_beyond_chance, trainable_steps, trained_steps
from ddpo.chance import WHOLE, beyond_chance, momentum_of
from ddpo.matching import matching_transitions
from ddpo.ppo import ppo_loss, timestep_weights
from ddpo.progress import Progress
from diffusers_patch.ddim_with_logprob import analytic_kl, ddim_std, gaussian_log_prob
from diffusers_patch.policy import MultiViewPolicy
from diffusers_patch.rollout import Trajectory


def update(
    policy: MultiViewPolicy,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    trajectory: Trajectory,
    advantages: torch.Tensor,
    config: ConfigDict,
    generator: torch.Generator,
    after_step: Callable[[float], dict] | None = None,
    show_progress: bool = False,
) -> list[dict]:
    """All updates of an epoch on this process's N samples; returns one dict of statistics per optimizer step.

    Gradients are summed over micro-batches and timesteps (each loss divided by their number), averaged over processes
    once per optimizer step, clipped, and applied, unless they are not finite: "step_skipped" in the statistics.

    trajectory: what was sampled, in host memory, from where micro-batches are moved to the GPU. advantages: (N,) on the
    CPU. generator: of the shuffling and of the noise of matching. after_step: called with the length of each optimizer
    step that was made, see `optimizer_step`; returns more statistics.
    """
    policy.scheduler.set_timesteps(trajectory.num_steps, device=policy.device)
    parameters = policy.trainable_parameters()
    logs = []
    total = config.train.num_inner_epochs * len(advantages)
    progress = Progress("update", total, show=show_progress)
    for micro_batches in shuffled_micro_batches(len(advantages), config, generator):
        infos = []
        for index, steps in micro_batches:
            batch, steps = trajectory.take(index).pin().to(policy.device), steps.to(policy.device)
            judged = advantages[index].to(policy.device)
            for loss, info in micro_batch_losses(policy, batch, judged, steps, config, generator):
                accelerator.backward(loss)
                infos.append(info)
            progress.update(len(index))
        # only now, for in half precision the gradients of small losses would underflow
        average_gradients(parameters, accelerator, steps.shape[1] * config.train.gradient_accumulation_steps)
        statistics = summarize(infos, accelerator)
        logs.append({**statistics, **optimizer_step(parameters, optimizer, accelerator, config, after_step)})
    progress.close()
    return logs


def update_from_gradients(
    policy: MultiViewPolicy,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    gradients: torch.Tensor,
    advantages: torch.Tensor,
    config: ConfigDict,
    after_step: Callable[[float], dict] | None = None,
) -> list[dict]:
    """The one update of a purely on-policy epoch, from gradients that were taken while painting.

    With a ratio of 1, inside any clip range, the gradient of the loss of `update` is the mean over samples of
    -A d(log-probability). gradients: (N, P), see `rollout`; the other arguments and the result are those of `update`.
    With config.train.beyond_chance the step is as long as chance leaves it, see `ddpo.chance`.
    """
    parameters = policy.trainable_parameters()
    advantages = advantages.clamp(-config.train.adv_clip_max, config.train.adv_clip_max)
    length, found = 1.0, {}
    if steps_beyond_chance(config):
        scale = accelerator.scaler.get_scale() if accelerator.scaler else 1.0
        momentum = momentum_of(optimizer, len(advantages) * accelerator.num_processes, scale)
        share, deviations = beyond_chance(gradients, advantages, momentum, accelerator)
        length, found = share / WHOLE, {"beyond_chance": share, "deviations_above_chance": deviations}
    set_gradient(parameters, -(advantages @ gradients).to(policy.device))
    average_gradients(parameters, accelerator, len(advantages))
    loss = -accelerator.reduce(advantages.mean().to(accelerator.device), reduction="mean")
    done = optimizer_step(parameters, optimizer, accelerator, config, after_step, length)
    return [{"loss": float(loss), **found, **done}]


def set_gradient(parameters: list[torch.nn.Parameter], gradient: torch.Tensor) -> None:
    """Make `gradient` (P,) the gradients of the parameters, one after another."""
    for parameter, values in zip(parameters, gradient.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = values.view_as(parameter)


def optimizer_step(parameters, optimizer, accelerator, config, after_step, length: float = 1.0) -> dict:
    """Clip the gradients, apply them unless they are not finite, and say what happened.

    length: of the step, in units of the one that the learning rate is for; where it is 0 nothing but the optimizer's
    memory changes."""
    grad_norm = accelerator.clip_grad_norm_(parameters, config.train.max_grad_norm)
    finite, (group,) = bool(torch.isfinite(grad_norm)), optimizer.param_groups
    rate, group["lr"] = group["lr"], group["lr"] * length
    numbers = {"grad_norm": float(grad_norm), "learning_rate": group["lr"]}
    if finite or getattr(optimizer, "scaler", None):  # a loss scaler looks for itself, and learns from it
        optimizer.step()
    optimizer.zero_grad()
    group["lr"] = rate
    skipped = not finite or getattr(optimizer, "step_was_skipped", False)
    further = {} if skipped or length == 0 or after_step is None else after_step(length)
    return {**numbers, "step_skipped": skipped, **further}


def shuffled_micro_batches(
    num_samples: int, config: ConfigDict, generator: torch.Generator
) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """For each optimizer step of an epoch its micro-batches: [(samples (b,), their timesteps (b, K))].

    In each of `num_inner_epochs` passes the samples are shuffled, and the timesteps independently for every sample
    (as in DDPO), of which the first K, `trained_steps`, are trained on.
    """
    train, num_steps = config.train, trainable_steps(config)
    for _ in range(train.num_inner_epochs):
        order = torch.randperm(num_samples, generator=generator)
        steps = torch.stack([torch.randperm(num_steps, generator=generator) for _ in range(num_samples)])
        steps = steps[:, : trained_steps(config)]
        batches = list(zip(order.split(train.batch_size), steps.split(train.batch_size), strict=True))
        for first in range(0, len(batches), train.gradient_accumulation_steps):
            yield batches[first : first + train.gradient_accumulation_steps]


def micro_batch_losses(
    policy: MultiViewPolicy,
    trajectory: Trajectory,
    advantages: torch.Tensor,
    steps: torch.Tensor,
    config: ConfigDict,
    generator: torch.Generator | None = None,
) -> Iterator[tuple[torch.Tensor, dict]]:
    """Yield (loss, info) of one micro-batch, `config.train.timesteps_per_forward` of its steps at a time.

    trajectory: of the b samples of the micro-batch; advantages: (b,); steps: (b, K) their steps, in the order in which
    they are trained on; all on the policy's device. generator: of the noise of matching.
    Each loss is the mean over samples of the sum over the steps at hand, so that those of a micro-batch add up to K
    times the mean over all. info: as of `ppo_loss`, with the mean "loss", and "steps", how many it is of.
    """
    train, scheduler, eta, K = config.train, policy.scheduler, config.sample.eta, steps.shape[1]
    # mean 1 over all steps that can be drawn, not over those that were: a step weighs the same in every sample
    std = ddim_std(scheduler, trajectory.timesteps[:, : trainable_steps(config)], eta)
    weights = timestep_weights(std, train.timestep_weighting).gather(1, steps)
    matching, scale = train.objective == "awm", config.sample.guidance_scale if train.cfg else 1.0
    kl_beta = config.kl_beta if kl_in_loss(config) else 0.0
    closed_form = kl_beta > 0 and config.kl_estimator == "analytic"
    for first in range(0, K, train.timesteps_per_forward):
        part = slice(first, first + train.timesteps_per_forward)
        chosen, weight = steps[:, part], weights[:, part].flatten()
        if matching:
            old = matching_transitions(scheduler, trajectory, chosen, eta, generator)
        else:
            old = trajectory.transitions(chosen)
        given = old.latents, old.timesteps, old.conditioning, scale, eta
        mean, std = policy.mean_std(*given)
        log_prob = gaussian_log_prob(old.next_latents, mean, std)
        loss, info = ppo_loss(
            log_prob,
            log_prob.detach() if matching else old.log_probs,
            advantages.repeat_interleave(chosen.shape[1]),
            train.clip_range,
            train.adv_clip_max,
            log_prob_reference=old.log_probs_reference,
            kl_beta=0.0 if closed_form else kl_beta,
            weight=weight,
        )
        if closed_form:
            with torch.no_grad():
                mean_reference, _ = policy.mean_std(*given, reference=True)
            kl = analytic_kl(mean, mean_reference, std)
            loss = loss + kl_beta * (weight * kl).mean()
            info |= {"kl": kl.detach().mean(), "kl_asked": torch.ones_like(loss.detach())}
        yield loss * chosen.shape[1], {**info, "loss": loss.detach(), "steps": chosen.shape[1]}


def average_gradients(parameters: list[torch.nn.Parameter], accelerator: Accelerator, count: int) -> None:
    """Replace gradients that are sums of `count` losses by the mean over these and over all processes.

    In place of DistributedDataParallel: a LoRA is small, so one message per optimizer step is cheaper than hooks that
    look for unused weights in each of the many backward passes, and the policy stays unwrapped.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    torch._foreach_div_(grads, count)
    if accelerator.num_processes == 1:
        return
    mean = accelerator.reduce(torch.cat([grad.flatten() for grad in grads]), reduction="mean")
    for grad, values in zip(grads, mean.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(values.view_as(grad))


def summarize(infos: list[dict], accelerator: Accelerator) -> dict[str, float]:
    """Statistics of an optimizer step over its micro-batches and all processes: means, but for ratio_min and _max.

    kl is the mean over the steps at which the base model was asked, NaN if that was nowhere."""
    weights = [info.pop("steps") for info in infos]
    names = sorted(infos[0])
    values = torch.stack([torch.stack([info[name].float() for name in names]) for info in infos])  # (infos, names)
    values = torch.cat([values, values.new_tensor(weights)[:, None]], 1)
    *values, weights = accelerator.gather(values).cpu().unbind(1)
    values = dict(zip(names, values, strict=True))
    extrema = {"ratio_min": float(values.pop("ratio_min").min()), "ratio_max": float(values.pop("ratio_max").max())}
    asked = weights * values.pop("kl_asked", 1.0)
    means = {}
    for name, value in values.items():
        count = asked if name == "kl" else weights
        means[name] = float((value * count)[count > 0].sum() / count.sum())
    return means | extrema
