"""What is learned from the best of n samples, and what from any?

    python -m tiny.best_of_n --config config/tiny.py:best [--config.KEY=VALUE ...]

--reverse_rewards  learn from the worst of n, as a control
--exact_views      learn from exact views of each prompt, whose consistency nobody painted, as another

Each epoch paints every training prompt n = config.per_prompt_stat_tracking.min_count times, keeps the sample of each
with the highest reward, and finetunes the painter on what was kept, in config.train.num_inner_epochs passes: expert
iteration, and the reward-weighted regression that DDPO was compared with (Black et al. 2023, arXiv:2305.13301, section
4), its weights being 1 for the best of a prompt and 0 for the others. The finetuning is advantage-weighted matching,
ddpo/matching.py, whose loss is that of a pretraining with such weights.

It was to tell whether the weights can express what some samples show. What it tells is what pictures teach, whichever
they are: pretraining fitted the painter's predictions and not what guidance makes of them, which is fitted here. With
config.shuffle_advantages the choice is made by lot, and with --exact_views nothing depends on samples at all, of which
one of each prompt is painted then. Where area is held, a sample is chosen for what its reward is beside what area
explains of it. How the run goes on otherwise, and what it leaves: tiny/ascent.py.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from absl import flags
from ml_collections import ConfigDict

from config import cli
from config.errors import UserError
from ddpo.area import without
from ddpo.sampling import SHUFFLE_ADVANTAGES, SHUFFLE_SAMPLES, Samples, epoch_prompts, make_generator
from ddpo.update import update
from diffusers_patch.rollout import Trajectory
from prompts.dataset import PromptDataset
from tiny import ascent, train_mvdream, train_painter
from tiny.objects import build, fixed_views, parse_caption

OBJECTS = 101  # what its random numbers are used for; see `ddpo.sampling`
ENCODE = {"mv_sdxl": train_painter.encode, "mvdream": train_mvdream.encode}  # of config.painter.name


def best_of_each(values: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """The indices (n,) of the samples whose value (N,) is the highest of their prompt's; those of NaN are left out, and
    prompts that have no others."""
    best = {}
    for i, prompt in enumerate(prompts):
        if values[i] > (values[best[prompt]] if prompt in best else -torch.inf):
            best[prompt] = i
    return torch.tensor(list(best.values()), dtype=torch.long)


def beside_others(values: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """Values (N,) less the mean of their prompt's; NaNs are not counted."""
    means = {prompt: values[[name == prompt for name in prompts]].nanmean() for prompt in dict.fromkeys(prompts)}
    return values - torch.stack([means[prompt] for prompt in prompts])


class BestOfN(ascent.Ascent):
    """A run whose painter becomes the best of its own samples. Arguments: see the command."""

    def __init__(self, config: ConfigDict, reverse_rewards: bool = False, exact_views: bool = False):
        super().__init__(config, reverse_rewards)
        self.exact_views = exact_views

    def draw_prompts(self, epoch: int) -> list[str]:
        """All prompts n times in every epoch, as a training run does in its first; once for exact views."""
        if self.exact_views:
            return self.prompts.fill_epoch(1, self.config.sample.batch_size)[0]
        return epoch_prompts(self.prompts, self.config, 0, 1)

    def worth(self, epoch: int, samples: Samples, prompts: Sequence[str]) -> torch.Tensor:
        """What the samples are chosen by (N,): reward beside that of their prompt's others, without what area explains
        of it, or chance alone. NaN where the reward is."""
        worth = beside_others(samples.reward.cpu().float(), prompts)
        if self.config.train.hold_foreground:
            area = beside_others(ascent.log_areas(samples), prompts)
            good = worth.isfinite()
            worth[good] = without(worth[good], area[good])
        if self.config.shuffle_advantages:
            generator = make_generator(self.config.seed, SHUFFLE_ADVANTAGES, epoch)
            worth = torch.rand(len(worth), generator=generator).where(worth.isfinite(), torch.nan)
        return worth

    def update(self, epoch: int, samples: Samples, prompts: Sequence[str]) -> list[dict]:
        """Finetune on the best; arguments and result as of `Ascent.update`."""
        chosen = best_of_each(self.worth(epoch, samples, prompts), prompts)
        pictures = samples.trajectory.take(chosen)
        if self.exact_views:
            pictures = self.with_exact_views(epoch, pictures, [prompts[i] for i in chosen])
        else:
            rewards, areas = samples.reward.cpu(), ascent.log_areas(samples)
            self.log.say(
                f"best of each: {len(chosen)} of {len(prompts)} samples, reward {rewards[chosen].mean():+.4f} instead "
                f"of {rewards.nanmean():+.4f}, objects {100 * float(areas[chosen].mean() - areas.mean()):+.1f} % larger"
            )
        generator = make_generator(self.config.seed, SHUFFLE_SAMPLES, epoch)
        given = pictures, torch.ones(len(chosen)), self.config, generator
        return update(self.policy, self.optimizer, self.accelerator, *given, show_progress=True)

    def with_exact_views(self, epoch: int, trajectory: Trajectory, prompts: Sequence[str]) -> Trajectory:
        """A trajectory whose finished latents are those of exact views of new objects, one for each prompt."""
        vae = self.policy.pipeline.vae
        views = fixed_views(build(prompts, make_generator(self.config.seed, OBJECTS, epoch)))
        latents = trajectory.latents.clone()
        latents[:, -1] = ENCODE[self.config.painter.name](vae, views.to(vae.device)).to(latents)
        return replace(trajectory, latents=latents)


def define_flags() -> None:
    ascent.define_flags()
    flags.DEFINE_boolean("exact_views", False, "Learn from exact views of each prompt, as a control.")


def main(args) -> None:
    """args: the parsed flags."""
    config = args.config
    tracking = config.per_prompt_stat_tracking
    if not args.exact_views and (tracking is None or tracking.min_count < 2):
        raise UserError("config.per_prompt_stat_tracking.min_count must be 2 or more: the best of one sample is itself")
    if config.train.objective != "awm":
        raise UserError(
            f"config.train.objective is {config.train.objective!r}, but what is learned from here is the picture and "
            f"not its path: set it to 'awm'"
        )
    if args.exact_views:  # which there are of the small world's captions alone
        for prompt in PromptDataset.from_config(config.prompts).train_set:
            parse_caption(prompt)
    BestOfN(config, args.reverse_rewards, args.exact_views).train()


if __name__ == "__main__":
    cli.run("best_of_n", main, "config/tiny.py", define_flags)
