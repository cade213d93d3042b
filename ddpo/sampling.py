"""An epoch's samples: who paints which prompt with which random numbers, and what the judge says."""

import time
from dataclasses import dataclass, fields

import numpy as np
import torch
from tqdm import tqdm

from diffusers_patch.rollout import Trajectory, rollout

# What random numbers are for. Every use has a stream of its own, made from the run's seed, so that a resumed run needs
# no saved state and a sample does not depend on how many processes paint.
PROMPTS, NOISE, SHUFFLE_SAMPLES, SHUFFLE_ADVANTAGES, VALIDATION = range(5)


def generator(seed, purpose, *indices):
    """A torch.Generator (CPU) of its own for every (seed, purpose, indices)."""
    state = np.random.SeedSequence([seed, purpose, *indices]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) & (2**63 - 1))


@dataclass
class Samples:
    """What one process painted: a trajectory of its N samples and the judge's verdict on them."""

    trajectory: Trajectory
    reward: torch.Tensor  # (N,)
    foreground: torch.Tensor  # (N,) mean share of the views that is foreground
    empty: torch.Tensor  # (N,) bool, some view is empty
    renders: torch.Tensor | None  # (N, V, 3, S, S)
    kl: torch.Tensor | None  # (N,) to the base model, over the steps that are trained on
    seconds: dict  # of "sampling" and "reward"

    def rows(self):
        """One dict of numpy values per sample: reward, foreground, empty, views and renders as bytes, kl if known."""

        def to_bytes(images):
            return (images * 255).round().byte()

        columns = {
            "reward": self.reward,
            "foreground": self.foreground,
            "empty": self.empty,
            "views": to_bytes(self.trajectory.views),
            **({} if self.renders is None else {"renders": to_bytes(self.renders)}),
            **({} if self.kl is None else {"kl": self.kl}),
        }
        columns = {name: values.cpu().numpy() for name, values in columns.items()}
        return [{name: values[i] for name, values in columns.items()} for i in range(len(self.reward))]


def paint(policy, reward, prompts, generators, config, reference, progress=False):
    """Paint and judge N `prompts`, `config.sample.batch_size` at a time, with N generators. Returns Samples."""
    batches, verdicts, seconds = [], [], {"sampling": 0.0, "reward": 0.0}
    size, suffix = config.sample.batch_size, config.sample.prompt_suffix
    bar = tqdm(total=len(prompts), leave=False, disable=not progress)
    for first in range(0, len(prompts), size):
        part = slice(first, first + size)
        bar.set_description("sampling")
        start = time.perf_counter()
        batches.append(
            rollout(
                policy,
                [prompt + suffix for prompt in prompts[part]],
                config.sample.num_steps,
                config.sample.guidance_scale,
                config.sample.eta,
                generators[part],
                reference=reference,
                progress=progress,
            )
        )
        bar.set_description("reward")
        middle = time.perf_counter()
        verdicts.append(reward(batches[-1].views, prompts[part]))
        seconds["sampling"] += middle - start
        seconds["reward"] += time.perf_counter() - middle
        bar.update(len(prompts[part]))
    bar.close()

    def joined(name):
        return torch.cat([getattr(verdict, name) for verdict in verdicts])

    trajectory = concatenate(batches)
    return Samples(
        trajectory=trajectory,
        reward=joined("reward").float(),
        foreground=joined("foreground").mean(1),
        empty=joined("empty").any(1),
        renders=None if verdicts[0].renders is None else joined("renders"),
        kl=trajectory.kl(config.kl_estimator, config.train.skip_last_steps),
        seconds=seconds,
    )


def concatenate(trajectories):
    """One Trajectory of many."""

    def join(values):
        if values[0] is None:
            return None
        if isinstance(values[0], dict):
            return {name: torch.cat([value[name] for value in values]) for name in values[0]}
        return torch.cat(values)

    return Trajectory(**{f.name: join([getattr(t, f.name) for t in trajectories]) for f in fields(Trajectory)})


def epoch_prompts(dataset, config, epoch, num_processes):
    """The prompts of an epoch for all processes together: the first epoch shows every training prompt `min_count` times
    to fill the trackers, later ones draw at random."""
    if epoch == 0 and config.per_prompt_stat_tracking is not None:
        batch = config.sample.batch_size * num_processes
        return dataset.fill_epoch(config.per_prompt_stat_tracking.min_count, batch, config.sample.total_batch_size)[0]
    return dataset.sample(config.sample.total_batch_size, generator(config.seed, PROMPTS, epoch))[0]
