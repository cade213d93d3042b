"""What can be learned with a critic, which foretells how good a picture will be before it is finished?

    python -m tiny.critic --config config/tiny.py:clean [--config.KEY=VALUE ...]

--first_steps      of the critic's training, 48 states each, on the samples of the first epoch (300)
--steps            of it in every other epoch (40)
--updates          of the painter in every epoch but the first, of config.train.batch_size captions each (20)
--kl_weight        price of a nat of KL to the base model, in standard deviations of a prompt's rewards (0.008)
--reverse_rewards  learn what is worse, as a control that moves as far

The policy gradient of a reward that is known for finished pictures alone is mostly noise, since it does not say which
of thousands of random numbers was to blame. A critic V(x_t, t, caption), trained to foretell a sample's reward from the
latents on the way to it, has a gradient in those latents, which does: each step is moved towards states worth more,

    d/dtheta V(mean_theta(x_t) + std_t noise)

(the value gradient of Heess et al. 2015, arXiv:1510.09142; the noise-aware latent reward models of Zhang et al. 2025,
arXiv:2502.01051, are critics of this kind; with a price on the KL, the painter is matched to the base model guided by
the critic, as in Liu et al. 2025, arXiv:2512.05116). The reward itself is never differentiated and may be anything.
Three things keep the painter from following a critic that knows nothing, and from paying for the reward with something
else: V is multiplied by what it has proved to be worth (`Trust`), the KL to the base model is subtracted, and where
area is held no state is moved towards larger or smaller objects but for the area that is usual for its caption.

The critic learns from the samples of the run, so that it knows what the painter has become. In the first epoch, of
config.per_prompt_stat_tracking.min_count samples of each training prompt, only the critic learns. The painter's updates
need neither rewards nor finished pictures: each paints the trained steps anew, asks the critic on the way, and moves
little, and the learning rate falls to nothing. How the run goes on otherwise, and what it leaves: tiny/ascent.py. With
config.shuffle_advantages the critic learns from rewards that are shuffled among the samples, as a control.
"""

import copy
from collections.abc import Sequence
from functools import partial
from math import prod

import torch
from absl import flags
from ml_collections import ConfigDict
from torch import nn

from config import cli
from config.batches import trainable_steps
from config.errors import UserError
from ddpo.area import without
from ddpo.sampling import SHUFFLE_ADVANTAGES, Samples, make_generator
from ddpo.update import optimizer_step
from diffusers_patch.loading import load_painter
from diffusers_patch.policy import MultiViewPolicy
from diffusers_patch.rollout import Trajectory
from tiny import ascent

# of the critic's training: the rate falls in the first epoch, to AFTERWARDS of itself
BATCH, LEARNING_RATE, AFTERWARDS, WARM_UP, WEIGHT_DECAY = 48, 3e-4, 0.15, 50, 0.05
CLEAN = 0.4  # share of finished pictures among the states that it is trained on
PAINTER_WARM_UP = 10  # updates in which the painter's rate rises, while Adam knows little of its gradients
AREA_WEIGHT = 0.05  # of squared areas, in standard deviations, beside rewards in those of rewards
STATES = 100  # what its random numbers are used for; see `ddpo.sampling`
HEADS, HEAD_WIDTH, HIDDEN = 4, 32, 128


class Critic(nn.Module):
    """Foretells reward and log area of a sample from its latents at any step, see `CriticRun.truth`.

    The blocks of the base painter's UNet down to its middle, and a head that sees which places, in all views, resemble
    which. Whether views agree is in none of them alone, just as the parity of bits is in no single bit: from averages
    over places it was learned late, and sometimes never; from products of places it is learned at once."""

    def __init__(self, policy: MultiViewPolicy):
        super().__init__()
        self.painter = [policy]  # in a list, so that its weights are not this module's
        self.unet = copy.deepcopy(policy.unet).float().requires_grad_(True)
        self.unet.up_blocks, self.unet.conv_norm_out, self.unet.conv_out = nn.ModuleList(), None, nn.Identity()
        channels = self.unet.config.block_out_channels
        shrunk = 2 ** (len(channels) - 1)
        *views, _, height, width = policy.latent_shape
        places = prod(views) * (height // shrunk) * (width // shrunk)
        self.pairs = nn.Sequential(nn.LayerNorm(channels[-1]), nn.Linear(channels[-1], 2 * HEADS * HEAD_WIDTH))
        size = HEADS * places**2
        self.head = nn.Sequential(nn.LayerNorm(size), nn.Linear(size, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, 2))
        nn.init.zeros_(self.head[-1].weight)

    def forward(self, x: torch.Tensor, t: torch.Tensor, conditioning: dict[str, torch.Tensor]) -> torch.Tensor:
        """Latents (B, ...) at timesteps (B,), 0 for finished ones -> (B, 2)."""
        (policy,) = self.painter
        with policy._autocast():
            features = policy._unet(self.unet, x, t, conditioning).float()
        features = features.movedim(-3, -1).flatten(1, -2)  # (B, places, channels)
        query, key = self.pairs(features).unflatten(-1, (2, HEADS, HEAD_WIDTH)).unbind(2)
        alike = torch.einsum("bihc,bjhc->bhij", query, key) / HEAD_WIDTH**0.5
        return self.head(alike.flatten(1))


def paint_towards_worth(
    critic: Critic,
    trust: torch.Tensor,
    kl_weight: float,
    policy: MultiViewPolicy,
    conditioning: dict[str, torch.Tensor],
    config: ConfigDict,
    generator: torch.Generator,
) -> dict[str, float]:
    """Paint the K trained steps of B samples, and add to the gradients of the policy's weights those of the loss

        sum over steps of   kl_weight * KL - trust * reward + AREA_WEIGHT / 2 * area**2,   mean over samples,

    with the reward and the area that the critic foretells where a step has led to, and the KL of the step to the base
    model in nats. What the reward pays for the area of a sample is left out. Where area is not held, it is paid, and
    the last term is left out.

    trust: (K,); conditioning: of (B, ...); generator: of the noise, on the CPU. Returns the loss and the KL."""
    policy.scheduler.set_timesteps(config.sample.num_steps, device=policy.device)
    batch, times = len(next(iter(conditioning.values()))), policy.scheduler.timesteps
    x, loss, kl = policy.initial_latents(batch, generator), 0.0, 0.0
    for k in range(trainable_steps(config)):
        step = x, times[k].expand(batch), conditioning, config.sample.guidance_scale, config.sample.eta
        mean, std = policy.mean_std(*step)
        with torch.no_grad():
            moved = (mean - policy.mean_std(*step, reference=True)[0]) / std
        noise = torch.randn(x.shape, generator=generator).to(x.device)
        x = (mean.detach() + std * noise).requires_grad_()
        reward, area = critic(x, time_after(times, k).expand(batch), conditioning).unbind(1)
        better, larger = (torch.autograd.grad(value.sum(), x, retain_graph=True)[0] for value in (reward, area))
        reward, area, nats = reward.detach(), area.detach(), moved.square().sum() / (2 * batch)
        upwards, loss, kl = trust[k] * better, loss + kl_weight * nats - trust[k] * reward.mean(), kl + nats
        if config.train.hold_foreground:  # of every sample, or some would shrink and others grow
            upwards = torch.vmap(without)(upwards.flatten(1), larger.flatten(1)).view_as(x)
            upwards = upwards - torch.einsum("b,b...->b...", AREA_WEIGHT * area, larger)
            loss = loss + AREA_WEIGHT / 2 * area.square().mean()
        mean.backward((kl_weight * moved / std - upwards) / batch)
        x = x.detach()
    return {"loss": float(loss), "kl": float(kl)}  # read once, or a GPU would be waited for in every step


def time_after(timesteps: torch.Tensor, k: int) -> torch.Tensor:
    """The timestep (...) of the states after step k of (..., T), 0 after the last."""
    return torch.zeros_like(timesteps[..., 0]) if k + 1 == timesteps.shape[-1] else timesteps[..., k + 1]


def turned(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Latents (B, ...) of the same objects, each turned by some quarters if their views (B, V, ...) are painted apart.

    It is as consistent from any side, so that a critic can learn as much from one sample as from V."""
    if x.dim() < 5:
        return x
    turns = torch.randint(x.shape[1], (len(x),), generator=generator).tolist()
    return torch.stack([views.roll(turn, 0) for views, turn in zip(x, turns, strict=True)])


class Memory:
    """Finished samples of all epochs, and what a critic is to say of them."""

    def __init__(self):
        self.epochs = []

    def add(self, trajectory: Trajectory, truth: torch.Tensor) -> None:
        """An epoch's samples; truth: (B, 2)."""
        self.epochs.append((trajectory.latents[:, -1].float(), trajectory.conditioning, truth))

    def samples(self) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
        """Latents (N, ...), conditioning of (N, ...) and truth (N, 2)."""
        latents, conditioning, truth = zip(*self.epochs, strict=True)
        given = {name: torch.cat([one[name] for one in conditioning]) for name in conditioning[0]}
        return torch.cat(latents), given, torch.cat(truth)

    def draw(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Indices (count,) of samples. Half are from after the first epoch, once there are any: all others show what
        the painter was before it learned, and a critic that knows nothing else is soon wrong about what it paints."""
        first, *later = (len(truth) for _, _, truth in self.epochs)
        drawn = torch.randint(first + sum(later), (count,), generator=generator)
        if later:
            drawn[: count // 2] = torch.randint(first, first + sum(later), (count // 2,), generator=generator)
        return drawn


class Trust:
    """What a critic's word is worth, by what it said of samples that it had not learned from yet.

    It is the slope of their rewards in what was foretold, over all epochs, for each of K steps, less twice its standard
    error: slopes of few samples, or of words that hardly differ, are large by chance, as of shuffled rewards."""

    def __init__(self, steps: int):
        self.together, self.alone = torch.zeros(steps), torch.zeros(steps)
        self.rewards, self.freedom = 0.0, -1

    def observe(self, said: torch.Tensor, reward: torch.Tensor) -> dict[str, float]:
        """Count an epoch's samples, (B, K) and (B,). Returns their correlations, and what the critic is worth now."""
        said, reward = said - said.mean(0), reward - reward.mean()
        together, alone = reward @ said, said.square().sum(0)
        self.together, self.alone = self.together + together, self.alone + alone
        self.rewards, self.freedom = self.rewards + reward.square().sum(), self.freedom + len(reward) - 1
        found = together / (alone * reward.square().sum()).sqrt().clamp(min=torch.finfo(said.dtype).tiny)
        numbers = {"foretold": found, "trust": self()}
        return {f"{name}_{k + 1}": float(v) for name, values in numbers.items() for k, v in enumerate(values)}

    def __call__(self) -> torch.Tensor:
        """(K,), from 0 to 1."""
        alone = self.alone.clamp(min=torch.finfo(self.alone.dtype).tiny)
        slope = self.together / alone
        left = (self.rewards - slope * self.together).clamp(min=0) / max(self.freedom, 1)
        return (slope - 2 * (left / alone).sqrt()).clamp(0, 1)


def critic_rate(step: int, first_steps: int) -> float:
    """The critic's learning rate at a step, in units of LEARNING_RATE."""
    return min(1.0, (step + 1) / WARM_UP) * max(AFTERWARDS, 1 - (1 - AFTERWARDS) * step / first_steps)


def painter_rate(update: int, updates: int) -> float:
    """The painter's learning rate at one of all its updates, in units of config.train.learning_rate."""
    return min(1.0, (update + 1) / PAINTER_WARM_UP) * (1 - update / updates)


class CriticRun(ascent.Ascent):
    """A run whose painter climbs what a critic foretells. Arguments: see the command."""

    def __init__(
        self,
        config: ConfigDict,
        first_steps: int,
        steps: int,
        updates: int,
        kl_weight: float,
        reverse_rewards: bool = False,
    ):
        super().__init__(config, reverse_rewards)
        self.first_steps, self.steps, self.updates, self.kl_weight = first_steps, steps, updates, kl_weight
        self.memory, self.trust = Memory(), Trust(trainable_steps(config))
        torch.manual_seed(config.seed)
        self.critic = Critic(load_painter(config, self.accelerator.device)).to(self.accelerator.device)
        self.critic_optimizer = torch.optim.AdamW(self.critic.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        rate = partial(critic_rate, first_steps=first_steps)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.critic_optimizer, rate)

    def update(self, epoch: int, samples: Samples, prompts: Sequence[str]) -> list[dict]:
        """The critic learns, then the painter; arguments and result as of `Ascent.update`."""
        good = samples.reward.cpu().isfinite()
        if epoch:  # a prompt that was never painted well in the first has no measure
            good &= torch.tensor([prompt in self.usual for prompt in prompts])
        good = good.nonzero().flatten()
        chains, truth = samples.trajectory.take(good), self.truth(epoch, samples, prompts, good)
        known = self.trust.observe(self.foretold(chains), truth[:, 0]) if epoch else {}
        self.memory.add(chains, truth)
        known["critic_loss"] = self.learn(epoch, self.steps if epoch else self.first_steps)
        self.log.say("critic: " + "  ".join(f"{name} {value:.2f}" for name, value in known.items()))
        return [{**self.climb(epoch, i), **known} for i in range(self.updates if epoch else 0)]

    def climb(self, epoch: int, i: int) -> dict:
        """The painter's update `i` of an epoch: its statistics."""
        config, generator = self.config, make_generator(self.config.seed, STATES, epoch, 1, i)
        rate = painter_rate((epoch - 1) * self.updates + i, (config.num_epochs - 1) * self.updates)
        self.optimizer.param_groups[0]["lr"] = rate * config.train.learning_rate
        prompts, _ = self.prompts.sample(config.train.batch_size, generator)
        conditioning = self.policy.encode([prompt + config.sample.prompt_suffix for prompt in prompts])
        numbers = paint_towards_worth(
            self.critic, self.trust(), self.kl_weight, self.policy, conditioning, config, generator
        )
        return {**numbers, **optimizer_step(self.parameters, self.optimizer, self.accelerator, config, None)}

    def truth(self, epoch: int, samples: Samples, prompts: Sequence[str], good: torch.Tensor) -> torch.Tensor:
        """Reward and log area of the samples `good` (n,): (n, 2), less what they were for the same prompt in the first
        epoch, in standard deviations of what they differed by then. So the same picture is worth the same later on."""
        prompts = [prompts[i] for i in good.tolist()]
        values = torch.stack([samples.reward.cpu(), ascent.log_areas(samples)], 1)[good]
        if epoch == 0:
            rows = {prompt: [i for i, name in enumerate(prompts) if name == prompt] for prompt in prompts}
            self.usual = {prompt: values[same].mean(0) for prompt, same in rows.items()}
        values = values - torch.stack([self.usual[prompt] for prompt in prompts])
        if epoch == 0:
            self.scale = values.std(0).clamp(min=torch.finfo(values.dtype).tiny)
        if self.config.shuffle_advantages:
            order = torch.randperm(len(values), generator=make_generator(self.config.seed, SHUFFLE_ADVANTAGES, epoch))
            # without the epoch's mean, from which a critic would learn what the painter has come from
            values = torch.stack([values[order, 0] - values[:, 0].mean(), values[:, 1]], 1)
        return values / self.scale

    @torch.no_grad()
    def foretold(self, trajectory: Trajectory) -> torch.Tensor:
        """The rewards (B, K) that the critic foretells after each of the K trained steps."""
        said = []
        for index in torch.arange(len(trajectory)).split(self.config.sample.batch_size):
            chains = trajectory.take(index).to(self.policy.device)
            states = enumerate(chains.latents[:, 1 : 1 + trainable_steps(self.config)].unbind(1))
            told = [self.critic(x, time_after(chains.timesteps, k), chains.conditioning)[:, 0] for k, x in states]
            said.append(torch.stack(told, 1).cpu())
        return torch.cat(said)

    def learn(self, epoch: int, steps: int) -> float:
        """Train the critic on what is remembered; returns the mean loss."""
        scheduler, device = self.policy.scheduler, self.accelerator.device
        scheduler.set_timesteps(self.config.sample.num_steps, device=device)
        generator = make_generator(self.config.seed, STATES, epoch, 0)
        later = scheduler.timesteps[1:].cpu()  # than the first, at which there is nothing to see yet
        latents, conditioning, truth = self.memory.samples()
        self.critic.train().requires_grad_(True)
        total = 0.0
        for _ in range(steps):
            n = self.memory.draw(BATCH, generator)
            x, noise = latents[n], torch.randn(BATCH, *latents.shape[1:], generator=generator)
            x = turned(x, generator)
            t = later[torch.randint(len(later), (BATCH,), generator=generator)]
            clean = torch.rand(BATCH, generator=generator) < CLEAN
            noisy = scheduler.add_noise(x, noise, t)
            x = torch.where(clean.view(-1, *[1] * (x.dim() - 1)), x, noisy).to(device)
            given = {name: value[n].to(device) for name, value in conditioning.items()}
            said = self.critic(x, t.where(~clean, 0).to(device), given)
            loss = (said - truth[n].to(device)).square().mean()
            self.critic_optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.critic.parameters(), 1.0)
            self.critic_optimizer.step()
            self.schedule.step()
            total += float(loss.detach())
        self.critic.eval().requires_grad_(False)
        return total / steps


def define_flags() -> None:
    ascent.define_flags()
    flags.DEFINE_integer("first_steps", 300, "Of the critic's training, in the first epoch.", lower_bound=1)
    flags.DEFINE_float("kl_weight", 0.008, "Price of a nat of KL to the base model.", lower_bound=0.0)
    flags.DEFINE_integer("updates", 20, "Of the painter, in every epoch but the first.", lower_bound=1)
    flags.DEFINE_integer("steps", 40, "Of the critic's training, in every other epoch.", lower_bound=1)


def main(args) -> None:
    """args: the parsed flags."""
    config = args.config
    tracking = config.per_prompt_stat_tracking
    if tracking is None or tracking.min_count < 2:
        raise UserError(
            "config.per_prompt_stat_tracking.min_count must be 2 or more: a critic learns by what samples of a prompt "
            "differ in the first epoch"
        )
    if config.sample.num_steps < 2:
        raise UserError(f"config.sample.num_steps is {config.sample.num_steps}, but a critic needs 2 or more")
    CriticRun(config, args.first_steps, args.steps, args.updates, args.kl_weight, args.reverse_rewards).train()


if __name__ == "__main__":
    cli.run("critic", main, "config/tiny.py", define_flags)
