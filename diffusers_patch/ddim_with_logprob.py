"""One DDIM step as a Gaussian policy: draw x_{t-1}, or score a given one.

With noise level eta > 0 a DDIM step (Song et al. 2021, eq. 12 and 16) is a draw from N(mean, std^2 I), so a denoising
chain is a sequence of stochastic actions whose log-probabilities policy gradients can use (DDPO, Black et al. 2023).
Symbols: `a_t` is the scheduler's `alphas_cumprod[t]`, `eps_hat` the predicted noise, `x0_hat` the predicted clean
image,

    var  = (1 - a_prev) / (1 - a_t) * (1 - a_t / a_prev),     std = eta * sqrt(var)
    mean = sqrt(a_prev) * x0_hat + sqrt(1 - a_prev - std^2) * eps_hat

Three properties hold on purpose:

* The log-probability is a MEAN over the latent's D dimensions, not a sum (as in DDPO). A ratio of probabilities built
  from it is the D-th root of the true one, which is why PPO's clip range is as small as 1e-4.
* The previous timestep is clamped to 0, not to -1. Stock DDIM ends its chain without noise; here the last step keeps
  std > 0 and so a finite log-probability. `set_alpha_to_one` has therefore no effect.
* Arithmetic is in float32 (float64 for float64 latents) whatever the storage type. A drawn x_{t-1} is rounded to the
  storage type FIRST and then scored. DDPO scores the unrounded draw but stores the rounded one, which puts the
  on-policy ratio off 1 by up to 1e-4 (float16) or 4e-3 (bfloat16), the size of the clip range. Here sampling and
  training score the very same numbers.
"""

import math

import torch
from diffusers import DDIMScheduler
from diffusers.utils.torch_utils import randn_tensor

from config.errors import UserError


def ddim_step_with_logprob(
    scheduler: DDIMScheduler,
    model_output: torch.Tensor,
    timestep: torch.Tensor | int,
    sample: torch.Tensor,
    eta: float = 0.0,
    use_clipped_model_output: bool = False,
    generator: torch.Generator | list[torch.Generator] | None = None,
    prev_sample: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw x_{t-1} (or take the given one) and return it with its log-probability.

    scheduler: a stock `DDIMScheduler` after `set_timesteps`.
    model_output, sample: (B, ...) the network's output (of the scheduler's `prediction_type`) and x_t.
    timestep: int, 0-d or (B,): one for all samples, or one for each.
    eta: noise level; the density exists for eta > 0 only (at 0 the log-probability is not finite).
    generator: of the noise, drawn with one `randn` in model_output's shape and type.
    prev_sample: (B, ...) the x_{t-1} to score; nothing is drawn then. No gradient flows into it.

    Returns (prev_sample (B, ...) in sample's type, log_prob (B,) in nats per dimension, float32 or float64).
    Raises ValueError if both `generator` and `prev_sample` are given, and as `ddim_mean_std`.
    """
    if prev_sample is not None and generator is not None:
        raise ValueError(
            "ddim_step_with_logprob got both generator and prev_sample: a given prev_sample is only "
            "scored, so pass the generator only when it is to be drawn"
        )
    mean, std = ddim_mean_std(scheduler, model_output, timestep, sample, eta, use_clipped_model_output)
    if prev_sample is None:
        prev_sample = draw(mean, std, generator, noise_dtype=model_output.dtype, dtype=sample.dtype)
    return prev_sample, gaussian_log_prob(prev_sample, mean, std)


def ddim_mean_std(
    scheduler: DDIMScheduler,
    model_output: torch.Tensor,
    timestep: torch.Tensor | int,
    sample: torch.Tensor,
    eta: float,
    use_clipped_model_output: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The Gaussian that a DDIM step draws from: (mean (B, ...), std (B, 1, ...)), in float32 (or float64).

    Arguments as in `ddim_step_with_logprob`. To get more than one number of a step (a draw, its log-probability, the
    KL to a reference), compute this once and pass it to `draw`, `gaussian_log_prob` and `analytic_kl`.
    Raises ValueError if the scheduler has no timesteps or an unknown `prediction_type`, or if the number of timesteps
    is neither 1 nor B.
    """
    dtype = torch.promote_types(sample.dtype, torch.float32)
    x_t, output = sample.to(dtype), model_output.to(dtype)

    if scheduler.alphas_cumprod.device != sample.device:  # once: a table on the CPU would stall the GPU in every step
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(sample.device)
    a_t, a_prev = _alphas(scheduler, timestep, sample.device)
    if a_t.numel() not in (1, len(sample)):
        raise ValueError(
            f"timestep has {a_t.numel()} elements but the batch has {len(sample)}: give one timestep, or one per sample"
        )
    per_sample = (-1,) + (1,) * (sample.ndim - 1)
    a_t, a_prev = a_t.to(dtype).view(per_sample), a_prev.to(dtype).view(per_sample)

    x0_hat, eps_hat = _predict_x0_and_noise(scheduler.config.prediction_type, output, x_t, a_t)
    if scheduler.config.thresholding:
        x0_hat = scheduler._threshold_sample(x0_hat)
    elif scheduler.config.clip_sample:
        x0_hat = x0_hat.clamp(-scheduler.config.clip_sample_range, scheduler.config.clip_sample_range)
    if use_clipped_model_output:
        eps_hat = (x_t - a_t.sqrt() * x0_hat) / (1 - a_t).sqrt()

    var = eta**2 * _posterior_variance(a_t, a_prev)
    # The clamp catches a rounding error only: with eta = 1 and a_t = 0 (zero terminal SNR) the difference is exactly 0.
    mean = a_prev.sqrt() * x0_hat + (1 - a_prev - var).clamp(min=0).sqrt() * eps_hat
    return mean, var.sqrt()


def draw(
    mean: torch.Tensor,
    std: torch.Tensor,
    generator: torch.Generator | list[torch.Generator] | None = None,
    noise_dtype: torch.dtype = torch.float32,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """x_{t-1} = mean + std * noise, rounded to the storage type `dtype` before it is scored. Shape as `mean`.

    `noise_dtype` is the type in which the random numbers are drawn (the network's, as in DDPO: generators give
    different streams for different types). `generator` may be a CPU generator for latents on a GPU, or a list of B.
    """
    noise = randn_tensor(mean.shape, generator=generator, device=mean.device, dtype=noise_dtype)
    return (mean + std * noise.to(mean.dtype)).to(dtype)


def gaussian_log_prob(prev_sample: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """log N(prev_sample; mean, std^2), averaged over all dimensions but the first: (B,), nats per dimension.

    prev_sample, mean: (B, ...); std broadcasts, (B, 1, ...). The gradient flows into `mean` alone, as a policy gradient
    must: prev_sample is an action already taken.
    """
    prev_sample = prev_sample.detach().to(mean.dtype)
    log_density = -((prev_sample - mean) ** 2) / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)
    return log_density.flatten(1).mean(dim=1)


def analytic_kl(mean: torch.Tensor, mean_reference: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """KL(theta || reference) of one step in closed form, ||mean - mean_reference||^2 / (2 std^2), mean over dimensions.

    mean, mean_reference: (B, ...); std broadcasts, (B, 1, ...). Returns (B,) >= 0, nats per dimension. Both Gaussians
    have the same std, so this is the expectation of `log_prob - log_prob_reference`, without the noise of that
    estimator.
    """
    return ((mean - mean_reference) ** 2 / (2 * std**2)).flatten(1).mean(dim=1)


def matching_output(
    scheduler: DDIMScheduler, clean: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor
) -> torch.Tensor:
    """What a network that knew everything would say of x_t = sqrt(a_t) clean + sqrt(1 - a_t) noise: (B, ...).

    clean, noise: (B, ...) float32; timestep: (B,). Raises ValueError for an unknown `prediction_type`."""
    a_t = _alphas(scheduler, timestep, clean.device)[0].view((-1,) + (1,) * (clean.ndim - 1))
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "sample":
        return clean
    if kind == "v_prediction":
        return a_t.sqrt() * noise - (1 - a_t).sqrt() * clean
    raise _unknown(kind)


def ddim_std(scheduler: DDIMScheduler, timestep: torch.Tensor | int, eta: float) -> torch.Tensor:
    """The std of the step at `timestep` (int or tensor of any shape): float32 of that shape, on timestep's device."""
    timestep = torch.as_tensor(timestep)
    a_t, a_prev = _alphas(scheduler, timestep, timestep.device)
    return eta * _posterior_variance(a_t, a_prev).sqrt().view(timestep.shape)


def check_scheduler(scheduler: DDIMScheduler) -> None:
    """Raise UserError if a step of the scheduler's current schedule has no density (its std would be 0).

    That happens at t = 0, whose previous timestep is 0 too: `steps_offset = 0` and `linspace` spacing end there.
    """
    _step_length(scheduler)
    last = int(scheduler.timesteps[-1])
    if last == 0:
        raise UserError(
            f"the scheduler's last timestep is 0 (timestep_spacing = {scheduler.config.timestep_spacing!r}, "
            f"steps_offset = {scheduler.config.steps_offset}), where the step has no noise and its log-probability is "
            f"NaN: set steps_offset = 1 and timestep_spacing = 'leading' in the scheduler's config"
        )


def _alphas(scheduler, timestep, device):
    """(a_t, a_prev), both (N,) float32 on `device`, for N = number of timesteps."""
    # Always 1-d: indexing with a 0-d tensor on a GPU reads it back to the host.
    t = torch.as_tensor(timestep, device=device).long().reshape(-1)
    t_prev = (t - _step_length(scheduler)).clamp(min=0)
    table = scheduler.alphas_cumprod.to(device)
    return table[t], table[t_prev]


def _step_length(scheduler):
    if not scheduler.num_inference_steps:
        raise ValueError("the scheduler has no timesteps yet: call scheduler.set_timesteps(num_steps) first")
    return scheduler.config.num_train_timesteps // scheduler.num_inference_steps


def _posterior_variance(a_t, a_prev):
    return (1 - a_prev) / (1 - a_t) * (1 - a_t / a_prev)


def _predict_x0_and_noise(prediction_type, output, x_t, a_t):
    """(x0_hat, eps_hat) with x_t = sqrt(a_t) x0_hat + sqrt(1 - a_t) eps_hat, from what the network predicts."""
    signal, noise = a_t.sqrt(), (1 - a_t).sqrt()
    if prediction_type == "epsilon":
        return (x_t - noise * output) / signal, output
    if prediction_type == "sample":
        return output, (x_t - signal * output) / noise
    if prediction_type == "v_prediction":
        return signal * x_t - noise * output, signal * output + noise * x_t
    raise _unknown(prediction_type)


def _unknown(prediction_type):
    return ValueError(
        f"the scheduler's prediction_type is {prediction_type!r}: it must be 'epsilon', 'sample' or 'v_prediction'"
    )
