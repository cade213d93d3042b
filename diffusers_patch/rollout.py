"""Painting as acting: follow the denoising chain of a policy and keep everything the update needs."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from diffusers_patch.ddim_with_logprob import analytic_kl, check_scheduler, gaussian_log_prob
from diffusers_patch.policy import MultiViewPolicy


class Transitions(NamedTuple):
    """N single steps x_t -> x_{t-1} of a trajectory; the fields are those of `Trajectory`, one row per step."""

    latents: torch.Tensor  # (N, ...) x_t
    next_latents: torch.Tensor  # (N, ...) x_{t-1}
    timesteps: torch.Tensor  # (N,)
    log_probs: torch.Tensor  # (N,)
    log_probs_reference: torch.Tensor | None  # (N,)
    conditioning: dict  # of (N, ...)


@dataclass
class Trajectory:
    """B denoising chains of T steps."""

    latents: torch.Tensor  # (B, T+1, ...) the initial ones first; latents[:, i+1] follows step i
    timesteps: torch.Tensor  # (B, T)
    log_probs: torch.Tensor  # (B, T) under the policy that painted, nats per dimension
    # of the SAME transitions under the base model, and the KL of each step in closed form, nats per dimension;
    # NaN at steps at which it was not asked
    log_probs_reference: torch.Tensor | None  # (B, T)
    kl_analytic: torch.Tensor | None  # (B, T)
    conditioning: dict  # of (B, ...)
    views: torch.Tensor  # (B, V, 3, S, S) in [0, 1]
    # (B, P) of each sample's weighted log-probabilities, over the policy's trainable parameters; None = not taken
    gradients: torch.Tensor | None = None

    def __len__(self):
        return len(self.timesteps)

    @property
    def num_steps(self) -> int:
        """T, what the scheduler's `set_timesteps` was called with."""
        return self.timesteps.shape[1]

    def to(self, device: torch.device | str) -> "Trajectory":
        """The same on another device. To a GPU the copies do not wait for it (from memory that `pin` has pinned)."""
        return self._map(lambda value: value.to(device, non_blocking=torch.device(device).type == "cuda"))

    def pin(self) -> "Trajectory":
        """The same in pinned memory, if there is a GPU to copy it to."""
        return self._map(torch.Tensor.pin_memory) if torch.cuda.is_available() else self

    def take(self, index: torch.Tensor) -> "Trajectory":
        """The samples `index` (b,), on the trajectory's device."""
        return self._map(lambda value: value[index])

    def _map(self, function):
        def apply(value):
            if isinstance(value, dict):
                return {name: apply(one) for name, one in value.items()}
            return None if value is None else function(value)

        return Trajectory(**{f.name: apply(getattr(self, f.name)) for f in fields(self)})

    def kl(self, estimator: str = "log_ratio", skip_last: int = 0) -> torch.Tensor | None:
        """KL to the base model (B,), nats per dimension, mean over the steps at which the base model was asked; None
        if it was at none.

        estimator: "log_ratio" is unbiased and noisy (published); "analytic" has the same expectation and little noise.
        skip_last: how many of the last steps are left out. At the end of the chain, nearly without noise, the KL of
            half-precision networks is the rounding of their outputs.
        """
        if self.log_probs_reference is None:
            return None
        per_step = self.kl_analytic if estimator == "analytic" else self.log_probs - self.log_probs_reference
        return per_step[:, : self.num_steps - skip_last].nanmean(1)

    def transitions(self, steps: torch.Tensor) -> Transitions:
        """The steps `steps` (B, k) of each sample: B*k rows, all of one sample together."""
        row = torch.arange(len(self), device=steps.device)[:, None].expand_as(steps).flatten()
        column = steps.flatten()
        reference = self.log_probs_reference
        return Transitions(
            latents=self.latents[row, column],
            next_latents=self.latents[row, column + 1],
            timesteps=self.timesteps[row, column],
            log_probs=self.log_probs[row, column],
            log_probs_reference=None if reference is None else reference[row, column],
            conditioning={name: value[row] for name, value in self.conditioning.items()},
        )

    def room_for(self, count: int) -> "Trajectory":
        """Room in host memory for `count` samples like these, which `put` fills. (Joined from a list of parts, an epoch
        would for a moment be there twice.)"""
        return self._map(lambda value: torch.empty(count, *value.shape[1:], dtype=value.dtype))

    def put(self, first: int, part: "Trajectory") -> None:
        """Let the samples of `part`, from any device, be those from `first` on."""
        for mine, theirs in zip(self._tensors(), part._tensors(), strict=True):
            mine[first : first + len(part)] = theirs

    def _tensors(self):
        values = [getattr(self, f.name) for f in fields(self)]
        return [value for value in tree_leaves(values) if value is not None]


@torch.no_grad()
def rollout(
    policy: MultiViewPolicy,
    prompts: Sequence[str],
    num_steps: int,
    guidance_scale: float,
    eta: float = 1.0,
    generator: torch.Generator | list[torch.Generator] | None = None,
    score_reference: bool = False,
    latents: torch.Tensor | None = None,
    show_progress: bool = False,
    reference_steps: torch.Tensor | None = None,
    gradient_weights: torch.Tensor | None = None,
    backward: Callable[[torch.Tensor], None] = torch.Tensor.backward,
) -> Trajectory:
    """Paint one object for each of B prompts.

    generator: one, or a list of B (one per sample, so that a sample does not depend on its batch). First the initial
        latents are drawn (unless `latents` (B, ...) are given), then one noise per step.
    score_reference: also score the transitions under the base model, all of them or those of the `reference_steps`
        (num_steps,) bool. Where the policy still is the base model it is not asked twice.
    gradient_weights: (num_steps,) on the CPU: take the gradient of every sample's sum over steps of weight times
        log-probability. At the policy that paints, the probability ratio of PPO is 1 and not clipped, so this times
        minus the advantage is the gradient of its loss, without a second forward pass. backward: called with a scalar
        of every step; a loss scaler's scales the gradients.

    The denoising loop itself neither reads anything back from a GPU nor copies anything to it.
    """
    scheduler = policy.scheduler
    scheduler.set_timesteps(num_steps, device=policy.device)
    check_scheduler(scheduler)
    conditioning = policy.encode(prompts)
    x = policy.initial_latents(len(prompts), generator) if latents is None else latents
    noises = draw_noise(num_steps, x, generator)
    asked = [score_reference] * num_steps if reference_steps is None else (reference_steps & score_reference).tolist()
    weights = [0.0] * num_steps if gradient_weights is None else gradient_weights.tolist()
    equal = score_reference and policy.equals_reference()
    chain, log_probs, log_probs_reference, kl = [x], [], [], []
    steps = zip(scheduler.timesteps, noises, weights, asked, strict=True)
    with contextlib.ExitStack() as stack:
        gradients = None
        if gradient_weights is not None:
            gradients = stack.enter_context(policy.sample_gradients(len(prompts), guidance_scale))
        for t, noise, weight, ask in tqdm(steps, desc="steps", total=num_steps, leave=False, disable=not show_progress):
            given = x, t.expand(len(prompts)), conditioning, guidance_scale, eta
            with torch.set_grad_enabled(weight != 0):
                mean, std = policy.mean_std(*given)
                x_prev = (mean.detach() + std * noise).to(x.dtype)  # rounded before it is scored
                log_prob = gaussian_log_prob(x_prev, mean, std)
                if weight != 0:
                    backward(weight * log_prob.sum())
            mean, log_prob = mean.detach(), log_prob.detach()
            log_probs.append(log_prob)
            if equal:
                log_probs_reference.append(log_prob)
                kl.append(torch.zeros_like(log_prob))
            elif ask:
                mean_reference, _ = policy.mean_std(*given, reference=True)
                log_probs_reference.append(gaussian_log_prob(x_prev, mean_reference, std))
                kl.append(analytic_kl(mean, mean_reference, std))
            else:
                log_probs_reference.append(torch.full_like(log_prob, torch.nan))
                kl.append(log_probs_reference[-1])
            x = x_prev
            chain.append(x)
    return Trajectory(
        latents=torch.stack(chain, 1),
        timesteps=scheduler.timesteps.expand(len(prompts), -1),
        log_probs=torch.stack(log_probs, 1),
        log_probs_reference=torch.stack(log_probs_reference, 1) if score_reference else None,
        kl_analytic=torch.stack(kl, 1) if score_reference else None,
        conditioning=conditioning,
        views=policy.decode(x),
        gradients=None if gradients is None else gradients.flatten(),
    )


def draw_noise(
    num_steps: int, latents: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None
) -> torch.Tensor:
    """The noises of a chain that starts at `latents` (B, ...): (num_steps, B, ...) float32 on the latents' device.

    Drawn one after another, as a loop over the steps would draw them, but copied to a GPU at once.
    """
    generators = generator if isinstance(generator, list) else [generator]
    source = latents.device if generators[0] is None else generators[0].device
    noises = [randn_tensor(latents.shape, generator, source, torch.float32) for _ in range(num_steps)]
    return torch.stack(noises).to(latents.device)
