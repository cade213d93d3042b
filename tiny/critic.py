"""What can be learned from a critic, which foretells the reward of a picture that is not finished?

    python -m tiny.critic --config config/tiny.py:mvdream --config.pretrained.lora= [--config.KEY=VALUE ...]

--samples  how often the base painter paints every training prompt for the critic (140)
--steps    of the critic's training, 48 states each (1400)
--critic   folder where samples and critic are kept, and taken from if they are there (logs/critic)

The policy gradient of a reward that is known for finished pictures alone is mostly noise, since it does not say which
of thousands of random numbers was to blame. A critic V(x_t, t, caption), trained to foretell a sample's reward from the
latents on the way to it, has a gradient in those latents, which does: each step is moved towards states worth more,

    d/dtheta V(mean_theta(x_t) + std_t noise),   the noise being that which was drawn

(the value gradient of Heess et al. 2015, arXiv:1510.09142; the noise-aware latent reward models of Zhang et al. 2025,
arXiv:2502.01051, are critics of this kind). The reward itself is never differentiated and may be anything.

What is trained afterwards, and what that leaves: tiny/ascent.py. config.shuffle_advantages trains the critic on rewards
that are shuffled among the samples of a prompt, as a control.
"""

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from absl import flags
from ml_collections import ConfigDict
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parameters_to_vector

from config import cli
from config.batches import trainable_steps
from config.errors import UserError
from config.validate import check_folder, validate
from ddpo.area import log_area
from ddpo.files import whole
from ddpo.progress import Progress
from ddpo.sampling import EVALUATION, SHUFFLE_ADVANTAGES, collect_samples, make_generator
from ddpo.setup import set_arithmetic
from diffusers_patch.ddim_with_logprob import ddim_mean_std
from diffusers_patch.loading import load_painter
from diffusers_patch.policy import MultiViewPolicy
from diffusers_patch.rollout import Trajectory
from tiny.ascent import Ascent

BATCH, LEARNING_RATE, WEIGHT_DECAY, WARM_UP = 48, 3e-4, 0.05, 50  # of the critic's training
CLEAN = 0.4  # share of finished pictures among the states that it is trained on
HELD_OUT = 8  # every so many prompts one is left out of its training, to see what it foretells of new ones
ASKED = 40  # samples of each of those
HIDDEN = 256


class Critic(nn.Module):
    """Foretells reward and log area of a sample, both relative to its prompt's mean and in standard deviations.

    The blocks of the base painter's UNet down to its middle, where it looks at everything at once, and a head."""

    def __init__(self, policy: MultiViewPolicy):
        super().__init__()
        self.painter = [policy]  # in a list, so that its weights are not this module's
        self.unet = copy.deepcopy(policy.unet).float().requires_grad_(True)
        self.unet.up_blocks, self.unet.conv_norm_out, self.unet.conv_out = nn.ModuleList(), None, nn.Identity()
        width = 2 * self.unet.config.block_out_channels[-1]
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, 2))
        nn.init.zeros_(self.head[-1].weight)

    def forward(self, x: torch.Tensor, t: torch.Tensor, conditioning: dict[str, torch.Tensor]) -> torch.Tensor:
        """Latents (B, ...) at timesteps (B,), 0 for finished ones -> (B, 2)."""
        (policy,) = self.painter
        with policy._autocast():
            features = policy._unet(self.unet, x, t, conditioning).float()
        features = features.movedim(-3, -1).flatten(1, -2)  # (B, everywhere in all views, width)
        return self.head(torch.cat([features.mean(1), features.std(1)], 1))


def paint(run: Ascent, samples: int) -> dict[str, torch.Tensor]:
    """Finished latents (C, n, ...) float16, reward and area (C, n) of n samples of each of the C training prompts, by a
    run's painter before its first update."""
    prompts, config = run.prompts.train_set, run.config
    found = []
    for n in Progress("painting for the critic", samples, "rounds").over(range(samples)):
        generators = [make_generator(config.seed, EVALUATION, c, n) for c in range(len(prompts))]
        painted = collect_samples(run.policy, run.reward_fn, prompts, generators, config, score_reference=False)
        area = torch.from_numpy(log_area(painted.foreground.cpu().numpy()))
        found.append((painted.trajectory.latents[:, -1].half(), painted.reward.cpu(), area))
    latents, reward, area = (torch.stack(values, 1) for values in zip(*found, strict=True))
    return {"latents": latents, "reward": reward, "area": area}


def relative(values: torch.Tensor) -> torch.Tensor:
    """values (C, n) minus the mean of their prompt, in standard deviations of all of them."""
    values = values - values.mean(1, keepdim=True)
    return values / values.std()


def fit(
    config: ConfigDict, data: dict[str, torch.Tensor], prompts: Sequence[str], steps: int, device: torch.device
) -> Critic:
    """A critic of what `paint` returned. Prints how well it foretells prompts that it was not trained on."""
    policy = load_painter(config, device)
    torch.manual_seed(config.seed)
    critic = Critic(policy).to(device)
    policy.scheduler.set_timesteps(config.sample.num_steps, device=device)
    conditioning = policy.encode([prompt + config.sample.prompt_suffix for prompt in prompts])
    generator = make_generator(config.seed, SHUFFLE_ADVANTAGES)
    reward = data["reward"]
    if config.shuffle_advantages:
        reward = torch.stack([row[torch.randperm(len(row), generator=generator)] for row in reward])
    wanted = torch.stack([relative(reward), relative(data["area"])], -1)

    def draw(pool, count, step=None):
        """States of samples of the prompts `pool`, (count, ...) each, and what they lead to; step: None = at random."""
        c = pool[torch.randint(len(pool), (count,), generator=generator)]
        n = torch.randint(wanted.shape[1], (count,), generator=generator)
        x = data["latents"][c, n].float()
        t = torch.randint(1, config.sample.num_steps, (count,), generator=generator)
        t = policy.scheduler.timesteps.cpu()[t if step is None else torch.full_like(t, step)]
        clean = torch.rand(count, generator=generator) < CLEAN if step is None else torch.zeros(count, dtype=torch.bool)
        noisy = policy.scheduler.add_noise(x, torch.randn(x.shape, generator=generator), t)
        x = torch.where(clean.view(-1, *[1] * (x.dim() - 1)), x, noisy)
        given = {name: value[c.to(device)] for name, value in conditioning.items()}
        return critic(x.to(device), t.where(~clean, 0).to(device), given), wanted[c, n].to(device)

    every = torch.arange(len(prompts))
    held_out, fitted = every[::HELD_OUT], every[every % HELD_OUT > 0]
    optimizer = torch.optim.AdamW(critic.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: min(1, (k + 1) / WARM_UP) * (1 - 0.95 * k / steps))
    for _ in Progress("fitting the critic", steps, "steps").over(range(steps)):
        found, truth = draw(fitted, BATCH)
        optimizer.zero_grad()
        (found - truth).square().mean().backward()
        nn.utils.clip_grad_norm_(critic.parameters(), 1.0)
        optimizer.step()
        rate.step()
    critic.eval().requires_grad_(False)
    for step in range(1, config.sample.num_steps):
        parts = [draw(held_out[k : k + 1], ASKED, step) for k in range(len(held_out))]
        found, truth = (
            torch.stack([relative(values[None, :, 0])[0] for values in two]) for two in zip(*parts, strict=True)
        )
        print(f"after {step} steps: correlation with the reward {float((found * truth).mean()):.2f}", flush=True)
    return critic


def critic_gradients(
    critic: Critic, policy: MultiViewPolicy, trajectory: Trajectory, config: ConfigDict
) -> torch.Tensor:
    """Gradients (2, P) of the sums over samples and trained steps of what the critic says of the state after the step,
    reward and area, in the policy's trainable weights.

    trajectory: B chains that this policy painted, on its device."""
    parameters = policy.trainable_parameters()
    totals = torch.zeros(2, sum(p.numel() for p in parameters), device=policy.device)
    for k in range(trainable_steps(config)):
        x, t = trajectory.latents[:, k], trajectory.timesteps[:, k]
        output = policy.predict(x, t, trajectory.conditioning, config.sample.guidance_scale)
        mean, _ = ddim_mean_std(policy.scheduler, output, t, x, config.sample.eta)
        reached = mean + (trajectory.latents[:, k + 1] - mean).detach()  # the noise that was added is a constant
        last = k + 1 == trajectory.num_steps
        after = torch.zeros_like(t) if last else trajectory.timesteps[:, k + 1]
        worth = critic(reached, after, trajectory.conditioning).sum(0)
        for n in range(2):
            totals[n] += parameters_to_vector(torch.autograd.grad(worth[n], parameters, retain_graph=True))
    return totals


def define_flags() -> None:
    flags.DEFINE_integer("samples", 140, "How often every training prompt is painted.", lower_bound=2)
    flags.DEFINE_integer("steps", 1400, "Of the critic's training.", lower_bound=1)
    flags.DEFINE_string("critic", "logs/critic", "Folder where samples and critic are kept.")


def main(args) -> None:
    """args: the parsed flags."""
    config, folder = args.config, Path(args.critic)
    check_folder("--critic", folder)
    set_arithmetic(config)
    validate(config, 1)
    ascent = Ascent(config, lambda run, chains: critic_gradients(critic, run.policy, chains, config))
    prompts, device = ascent.prompts.train_set, ascent.accelerator.device
    if len(prompts) < 2:
        raise UserError(
            "config.prompts.num_train is 1, but a critic needs prompts to be tested on: set it to 2 or more"
        )
    if not (folder / "samples.safetensors").exists():
        painted = paint(ascent, args.samples)
        with whole(folder / "samples.safetensors") as partial:
            save_file(painted, partial)
    data = load_file(folder / "samples.safetensors")
    if len(data["reward"]) != len(prompts):
        raise UserError(
            f"{folder / 'samples.safetensors'} has samples of {len(data['reward'])} prompts, but this run has "
            f"{len(prompts)}: give another --critic, or the prompts that it was made with"
        )
    if (folder / "critic.safetensors").exists():
        critic = Critic(load_painter(config, device)).to(device).eval().requires_grad_(False)
        critic.load_state_dict(load_file(folder / "critic.safetensors"))
    else:
        critic = fit(config, data, prompts, args.steps, device)
        with whole(folder / "critic.safetensors") as partial:
            save_file(critic.state_dict(), partial)
    ascent.run()


if __name__ == "__main__":
    cli.run("critic", main, "config/tiny.py", define_flags)
