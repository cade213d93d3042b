"""An epoch's samples: which process paints which prompt with which random numbers, and what reward each sample gets."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from ml_collections import ConfigDict

from ddpo.bad_samples import is_finite
from ddpo.pictures import to_bytes
from ddpo.progress import Progress
from ddpo.steps import draw_reference_steps, draw_trained_steps
from diffusers_patch.policy import MultiViewPolicy
from diffusers_patch.rollout import Trajectory, rollout
from mrc.mrc import resize_views
from prompts.dataset import PromptDataset

# What random numbers are used for. Every use has a stream of its own, made from the run's seed, so that a resumed run
# needs no saved state and a sample does not depend on how many processes paint.
PROMPTS, NOISE, SHUFFLE_SAMPLES, SHUFFLE_ADVANTAGES, VALIDATION, EVALUATION, CLIP_RANGE, STEPS = range(8)


def make_generator(seed: int, purpose: int, *indices: int) -> torch.Generator:
    """A random generator (CPU) of its own for every (seed, purpose, indices)."""
    state = np.random.SeedSequence([seed, purpose, *indices]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) & (2**63 - 1))


@dataclass
class Samples:
    """N samples that one process painted, and their scores."""

    trajectory: Trajectory  # in host memory, without its views
    images: dict[
        str, torch.Tensor
    ]  # of the first n samples: "views" and "renders" (n, V, 3, S, S) uint8 in host memory
    reward: torch.Tensor  # (N,), NaN where anything of a sample is not finite
    foreground: torch.Tensor  # (N, V) share of each view that is foreground
    empty: torch.Tensor  # (N, V) bool
    lpips: torch.Tensor | None  # (N, V) distance of each view from its render; NaN where it was compared with nothing
    kl: torch.Tensor | None  # (N,) to the base model, over the trainable steps at which it was asked
    seconds: dict  # of "sampling" and "reward"
    gradients: torch.Tensor | None = None  # (N, P) of each sample, see `rollout`, in host memory
    judges: dict[str, torch.Tensor] = field(default_factory=dict)  # (N,) of each judge, see `mrc.judges`
    bad_views: dict[int, torch.Tensor] = field(default_factory=dict)  # views (V, 3, S, S) of those with a NaN reward

    def scores(self) -> dict[str, torch.Tensor]:
        """reward (N,), foreground (N, V), empty (N, V); where they are known lpips (N, V), kl (N,), each judge (N,)."""
        scores = {"reward": self.reward, "foreground": self.foreground, "empty": self.empty}
        further = {"lpips": self.lpips, "kl": self.kl}
        return scores | {name: value for name, value in further.items() if value is not None} | self.judges


def collect_samples(
    policy: MultiViewPolicy,
    reward_fn: Callable,
    prompts: Sequence[str],
    generators: list[torch.Generator],
    config: ConfigDict,
    score_reference: bool,
    keep_images: int = 0,
    show_progress: bool = False,
    step_generator: torch.Generator | None = None,
    backward: Callable | None = None,
    before_batch: Callable[[], None] | None = None,
) -> Samples:
    """Paint and score N prompts with N generators, `config.sample.batch_size` at a time.

    keep_images: of how many samples, the first ones, the views and renders are kept. before_batch: called before each
    batch. The trajectories wait for the update in host memory: an epoch of them can be larger than a GPU.
    step_generator: draws, for every batch, the steps at which the base model is asked and those that are trained on;
    None = all. backward: take gradients while painting, `config.train.batch_size` at a time, see `rollout`.
    """
    whole, results, images = None, [], []
    bad_views, seconds = {}, {"sampling": 0.0, "reward": 0.0}
    size = config.train.batch_size if backward else config.sample.batch_size
    suffix, learning = config.sample.prompt_suffix, {}
    policy.scheduler.set_timesteps(config.sample.num_steps, device=policy.device)
    progress = Progress("sampling", len(prompts), show=show_progress)
    for first in range(0, len(prompts), size):
        batch = slice(first, first + size)
        if before_batch is not None:
            before_batch()
        progress.now("sampling")
        start = time.perf_counter()
        if backward:
            weights = draw_trained_steps(policy.scheduler, config, step_generator)
            learning = {"gradient_weights": weights, "backward": backward}
        trajectory = rollout(
            policy,
            [prompt + suffix for prompt in prompts[batch]],
            config.sample.num_steps,
            config.sample.guidance_scale,
            config.sample.eta,
            generators[batch],
            score_reference=score_reference,
            show_progress=progress.on_terminal,
            reference_steps=draw_reference_steps(config, step_generator),
            **learning,
        )
        progress.now("reward")
        middle = time.perf_counter()
        result = reward_fn(trajectory.views.nan_to_num(1.0, 1.0, 0.0), prompts[batch])
        good = is_finite(trajectory, result.reward)
        bad_views |= {first + i: trajectory.views[i].cpu() for i in (~good).nonzero().flatten().tolist()}
        if first < keep_images:
            kept = {"views": trajectory.views}
            if result.renders is not None:  # of config.recon.render_size
                kept["renders"] = resize_views(result.renders, trajectory.views.shape[-1])
            kept = {name: value[: keep_images - first] for name, value in kept.items()}
            images.append({name: to_bytes(value) for name, value in kept.items()})
        trajectory = replace(trajectory, views=None)
        if whole is None:
            whole = trajectory.room_for(len(prompts))
        whole.put(first, trajectory)
        results.append(replace(result, reward=result.reward.masked_fill(~good, torch.nan), renders=None))
        seconds["sampling"] += middle - start
        seconds["reward"] += time.perf_counter() - middle
        progress.update(len(trajectory))
    progress.close()

    def cat(name):
        return torch.cat([getattr(result, name) for result in results])

    return Samples(
        trajectory=replace(whole, gradients=None),
        images={name: torch.cat([part[name] for part in images]) for name in (images[0] if images else ())},
        reward=cat("reward").float(),
        foreground=cat("foreground"),
        empty=cat("empty"),
        lpips=None if results[0].lpips is None else cat("lpips"),
        kl=whole.kl(config.kl_estimator, config.train.skip_last_steps),
        seconds=seconds,
        gradients=whole.gradients,
        judges={name: torch.cat([result.judges[name] for result in results]) for name in results[0].judges},
        bad_views=bad_views,
    )


def local_slice(num_samples: int, accelerator: Accelerator) -> slice:
    """Which of the `num_samples` of an epoch, a multiple of the number of processes, this process paints."""
    per_process = num_samples // accelerator.num_processes
    return slice(per_process * accelerator.process_index, per_process * (accelerator.process_index + 1))


def gather_scores(samples: Samples, accelerator: Accelerator) -> dict[str, np.ndarray]:
    """`Samples.scores` over all processes, each with equally many samples, in the order of the epoch's prompts."""
    scores = {name: value.float().to(accelerator.device) for name, value in samples.scores().items()}
    return {name: accelerator.gather(value).cpu().numpy() for name, value in scores.items()}


def gather_uneven_scores(samples: Samples | None, indices: Sequence[int]) -> dict[str, np.ndarray]:
    """`Samples.scores` over all processes, in the order of `indices`.

    indices: where this process's samples stand in the whole. Processes may have different numbers of samples; one that
    has none gives None.
    """
    rows = []
    if samples is not None:
        columns = {name: value.cpu().numpy() for name, value in samples.scores().items()}
        rows = [(index, {name: value[i] for name, value in columns.items()}) for i, index in enumerate(indices)]
    rows = [row for _, row in sorted(gather_object(rows), key=lambda item: item[0])]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def epoch_prompts(dataset: PromptDataset, config: ConfigDict, epoch: int, num_processes: int) -> list[str]:
    """The prompts of an epoch, for all processes together.

    The first epoch has every training prompt `min_count` times, to fill the trackers; later ones draw at random.
    """
    if epoch == 0 and config.per_prompt_stat_tracking is not None:
        batch = config.sample.batch_size * num_processes
        return dataset.fill_epoch(config.per_prompt_stat_tracking.min_count, batch, config.sample.total_batch_size)[0]
    return dataset.sample(config.sample.total_batch_size, make_generator(config.seed, PROMPTS, epoch))[0]
