"""Runs that are told where to go: the frame of tiny/exact_gradient.py, tiny/critic.py and tiny/best_of_n.py.

All but the updates is that of a training run: prompts, noise and validations. So is the folder, in which
`python -m tiny.evaluate` compares before and after. Such a run is one process and not resumed.

A painter may become more consistent by being moved, whatever the direction. A control whose rewards say nothing does
not tell, if it takes no steps; one that learns from reversed rewards moves as far, and has to become worse.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from absl import flags
from ml_collections import ConfigDict

from config.errors import UserError
from config.validate import validate
from ddpo.area import log_area
from ddpo.run_folder import open_run
from ddpo.run_log import RunLog
from ddpo.sampling import (
    NOISE,
    VALIDATION,
    Samples,
    collect_samples,
    epoch_prompts,
    gather_scores,
    make_generator,
)
from ddpo.setup import make_optimizer, set_arithmetic, start_accelerator
from diffusers_patch.loading import check_cameras, load_painter, make_trainable
from mrc.rewards import load_reward
from prompts.dataset import PromptDataset


def define_flags() -> None:
    """The flag of the runs that learn from the rewards of their samples."""
    flags.DEFINE_boolean("reverse_rewards", False, "Learn from rewards of the other sign, as a control.")


def log_areas(samples: Samples) -> torch.Tensor:
    """The logarithm of the area of each object, see `ddpo.area.log_area`: (N,), on the CPU."""
    return torch.from_numpy(log_area(samples.foreground.cpu().numpy())).float()


class Ascent(ABC):
    """A run of config.num_epochs epochs. reverse_rewards: updates see rewards of the other sign."""

    def __init__(self, config: ConfigDict, reverse_rewards: bool = False):
        if config.resume_from:
            raise UserError("config.resume_from is set, but this study is not resumed: leave it empty")
        if config.mixed_precision == "fp16":  # its small gradients would have to be scaled
            raise UserError("config.mixed_precision is 'fp16', but this study learns in 'bf16' or 'no' only")
        set_arithmetic(config)
        self.config = validate(config, 1)
        check_cameras(config)
        self.accelerator = accelerator = start_accelerator(config)
        self.prompts = PromptDataset.from_config(config.prompts)
        opened = open_run(config, accelerator, self.prompts)
        self.reward_fn = load_reward(config, accelerator.device)
        self.policy = load_painter(config, accelerator.device)
        make_trainable(self.policy, config)
        self.parameters = self.policy.trainable_parameters()
        self.optimizer = accelerator.prepare(make_optimizer(self.policy, config))
        self.log = RunLog(opened.folder, accelerator, config)
        self.log.start(0, False, opened)
        self.reverse_rewards = reverse_rewards
        if reverse_rewards:
            self.log.say("rewards are reversed: what is learned is to be worse")

    @abstractmethod
    def update(self, epoch: int, samples: Samples, prompts: Sequence[str]) -> list[dict]:
        """Learn from an epoch's samples of N prompts. The statistics of each update, `ddpo.update.optimizer_step`'s
        among them."""

    def train(self) -> None:
        """Validate, ascend, validate."""
        self.validation(0)
        for epoch in range(self.config.num_epochs):
            self.epoch(epoch)
            if (epoch + 1) % self.config.val_freq == 0 or epoch + 1 == self.config.num_epochs:
                self.validation(epoch + 1)
        self.policy.save_lora(self.log.folder / "final")
        self.log.final()

    def paint(self, reward_fn: Callable, prompts: Sequence[str], *stream: int, keep_images: int = 0) -> Samples:
        """One sample for each prompt; stream: seed, purpose and indices of the generators."""
        generators = [make_generator(*stream, i) for i in range(len(prompts))]
        return collect_samples(
            self.policy, reward_fn, prompts, generators, self.config, score_reference=True, keep_images=keep_images
        )

    def draw_prompts(self, epoch: int) -> list[str]:
        """What an epoch paints: what a training run would."""
        return epoch_prompts(self.prompts, self.config, epoch, 1)

    def epoch(self, epoch: int) -> None:
        """Paint, and learn."""
        prompts = self.draw_prompts(epoch)
        samples = self.paint(self.reward_fn, prompts, self.config.seed, NOISE, epoch)
        start = time.perf_counter()
        seen = replace(samples, reward=-samples.reward) if self.reverse_rewards else samples
        updates = self.update(epoch, seen, prompts)
        seconds = {**samples.seconds, "update": time.perf_counter() - start}
        self.log.epoch(epoch, samples, prompts, gather_scores(samples, self.accelerator), updates, seconds)

    def validation(self, epochs_done: int) -> None:
        """Paint and judge the validation prompts as a training run does."""
        prompts = self.prompts.val_set
        reward_fn = getattr(self.reward_fn, "judged", self.reward_fn)
        samples = self.paint(reward_fn, prompts, 0, VALIDATION, keep_images=len(prompts))
        self.log.validation_images(epochs_done, range(len(prompts)), samples.images)
        self.log.validation(epochs_done, gather_scores(samples, self.accelerator), prompts)
        if epochs_done:  # more is not always better
            self.policy.save_lora(self.log.folder / "lora" / f"epoch_{epochs_done:04d}")
