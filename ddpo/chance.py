"""How much of an update is more than chance, and so how long its step may be.

A step foretells a gain for the samples that it was made of even if their rewards were drawn by lot, because each
gradient agrees with itself. So the gain is compared with those that shuffled advantages foretell (a permutation test),
and the step loses the share that these explain, as an estimate of James and Stein (1961) does what its noise explains.
Rewards that say nothing of their samples then move nothing, where a step of a given length would go somewhere at
random. With momentum the step has a part that these samples had no share in, and which noise does not agree with: a
direction that was found before and is confirmed tells most.
"""

import math

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch.nn.utils import parameters_to_vector

SHUFFLES = 1000
WHOLE = 0.15  # share beyond chance of a step that has the length which the learning rate or kl_per_update gives
DEVIATIONS = 2.5  # of the gains of shuffled advantages that are left to chance, beside their mean
FLOOR = 1e-3  # of the mean square of a gradient, below which Adam's denominator is not let
TOGETHER = 2**18  # parameters whose gradients are gathered at a time


def beyond_chance(
    gradients: torch.Tensor, advantages: torch.Tensor, momentum: torch.Tensor, accelerator: Accelerator
) -> tuple[float, float]:
    """The share, from 0 to 1, of a step's gain that chance does not explain, and by how many standard deviations the
    gain is above what chance gives on average; both the same in all processes, see `share_beyond_chance`.

    gradients (n, P) and advantages (n,) of this process's samples; all processes have as many. momentum: (P,) what the
    step has beside the sum over all samples of advantage times gradient, see `momentum_of`."""
    products = gain_products(gradients, momentum, accelerator)
    everyones = accelerator.gather(advantages.to(accelerator.device)).cpu().double()
    found = torch.tensor(share_beyond_chance(products, everyones), device=accelerator.device)
    return tuple(broadcast(found).tolist())


def momentum_of(optimizer: torch.optim.Optimizer, count: int, scale: float = 1.0) -> torch.Tensor:
    """What Adam's next step has beside the sum over `count` samples of advantage times gradient: (P,).

    Adam averages means over samples of minus that. scale: of the gradients, by a loss scaler."""
    (group,) = optimizer.param_groups
    beta, _ = group["betas"]
    means = [optimizer.state[p].get("exp_avg", torch.zeros_like(p)) for p in group["params"]]
    return -scale * count * beta / (1 - beta) * parameters_to_vector(means)


def gain_products(gradients: torch.Tensor, momentum: torch.Tensor, accelerator: Accelerator) -> torch.Tensor:
    """<g_i, D g_j> of the gradients (n, P) of all processes' N samples, and last <g_i, D m>: (N, N + 1) float64 on the
    CPU.

    D is what Adam makes of a gradient, see `as_adam_scales`. m: (P,), the same in all processes."""
    mean = accelerator.reduce(gradients.float().square().mean().to(accelerator.device), reduction="mean")
    total = 0.0
    for part, past in zip(gradients.split(TOGETHER, 1), momentum.split(TOGETHER), strict=True):
        everyones = accelerator.gather(part.float().to(accelerator.device))
        scaled = as_adam_scales(everyones, everyones.square().mean(0), mean)
        total = total + (scaled @ torch.cat([everyones, past[None].to(everyones)]).T).double()
    return total.cpu()


def as_adam_scales(vectors: torch.Tensor, squares: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """Gradients or steps (..., P), divided by the root of each weight's mean square over samples, squares (P,).

    mean: of all weights' mean squares, (), of which FLOOR is added."""
    return vectors / (squares + FLOOR * mean).sqrt()


def share_beyond_chance(products: torch.Tensor, advantages: torch.Tensor) -> tuple[float, float]:
    """The share of the gain A' (G A + m) that its mean and DEVIATIONS standard deviations over shuffles of A do not
    explain, and its distance from this mean in these standard deviations.

    products: G and m, (N, N + 1), see `gain_products`; advantages: A (N,), of the same type. The share is 0 if nothing
    is left, and both are if the gain is not a number or does not depend on the order."""
    generator = torch.Generator().manual_seed(0)  # the same shuffles every time
    orders = torch.stack([torch.randperm(len(advantages), generator=generator) for _ in range(SHUFFLES)])

    def gains(a):  # of each row
        return (a * (a @ products[:, :-1].T + products[:, -1])).sum(1)

    by_chance, gain = gains(advantages[orders]), float(gains(advantages[None]))
    mean, deviation = float(by_chance.mean()), float(by_chance.std())
    if not deviation > 0 or not math.isfinite(gain):
        return 0.0, 0.0
    share = 1 - (mean + DEVIATIONS * deviation) / gain if gain > 0 else 0.0
    return max(0.0, share), (gain - mean) / deviation
