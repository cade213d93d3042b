"""Runs that are told where to go: the frame of tiny/exact_gradient.py and tiny/critic.py.

All but the direction of the updates is that of a training run: prompts, noise, step size, held area and validations. So
is the folder, in which `python -m tiny.evaluate` compares before and after. Such a run is one process and not resumed.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from ml_collections import ConfigDict

from config.errors import UserError
from config.validate import validate
from ddpo.area import AreaControl, without
from ddpo.calibration import StepCalibration
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
from ddpo.update import optimizer_step, set_gradient
from diffusers_patch.loading import check_cameras, load_painter, make_trainable
from diffusers_patch.rollout import Trajectory
from mrc.rewards import load_reward
from prompts.dataset import PromptDataset

MOMENTUM = 0.9  # weight of the updates before in the mean of the gradients


class Ascent(ABC):
    """A run with one update in each of the config.num_epochs epochs but the first, along `direction`."""

    def __init__(self, config: ConfigDict):
        if config.resume_from:
            raise UserError("config.resume_from is set, but this study is not resumed: leave it empty")
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
        self.calibration = StepCalibration(self.policy, self.optimizer, accelerator, config)
        self.area_control = AreaControl() if config.train.hold_foreground else None
        self.means = None  # of the gradients, over updates
        self.log = RunLog(opened.folder, accelerator, config)
        self.log.start(0, False, opened)

    @abstractmethod
    def gradients(self, chains: Trajectory) -> torch.Tensor:
        """Gradients (2, P), in the trainable weights, of the sums over samples of what is to grow, and of the area.

        chains: some of the epoch's samples, on the painter's device."""

    def direction(self, trajectory: Trajectory) -> torch.Tensor:
        """The gradient (P,) of what is to grow, mean over samples and over the last updates; where area is held,
        without what of it changes the area, and against what this has grown.

        Updates are averaged here and not by Adam, whose momentum would delay what stops the growth: objects would grow
        and shrink in turns."""
        parts = torch.arange(len(trajectory)).split(self.config.train.batch_size)
        totals = sum(self.gradients(trajectory.take(index).to(self.policy.device)) for index in parts)
        totals = totals / len(trajectory)
        self.means = totals if self.means is None else torch.lerp(totals, self.means, MOMENTUM)
        wanted, area = self.means
        if self.area_control is None:
            return wanted
        scale = wanted.norm() / area.norm().clamp(min=torch.finfo(area.dtype).tiny)
        return without(wanted, area) - self.area_control.penalty() * scale * area

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

    def epoch(self, epoch: int) -> None:
        """Paint as a training run does, and take a step; the first epoch only tells how large objects are."""
        config = self.config
        prompts = epoch_prompts(self.prompts, config, epoch, 1)
        samples = self.paint(self.reward_fn, prompts, config.seed, NOISE, epoch)
        if self.area_control:
            good = samples.reward.isfinite().cpu().numpy()
            self.area_control.observe(samples.foreground.cpu().numpy(), prompts, good)
        start = time.perf_counter()
        updates = self.update(epoch, samples, prompts)
        seconds = {**samples.seconds, "update": time.perf_counter() - start}
        self.log.epoch(epoch, samples, prompts, gather_scores(samples, self.accelerator), updates, seconds)

    def update(self, epoch: int, samples: Samples, prompts: Sequence[str]) -> list[dict]:
        """One step along `direction`, in the first epoch none: statistics as of `ddpo.update.optimizer_step`."""
        if epoch == 0:
            return []
        self.calibration.start(samples.trajectory)
        set_gradient(self.parameters, -self.direction(samples.trajectory))
        after = self.calibration.after_update
        loss = -float(samples.reward.nanmean())
        return [{"loss": loss, **optimizer_step(self.parameters, self.optimizer, self.accelerator, self.config, after)}]

    def validation(self, epochs_done: int) -> None:
        """Paint and judge the validation prompts as a training run does."""
        prompts = self.prompts.val_set
        reward_fn = getattr(self.reward_fn, "judged", self.reward_fn)
        samples = self.paint(reward_fn, prompts, 0, VALIDATION, keep_images=len(prompts))
        self.log.validation_images(epochs_done, range(len(prompts)), samples.images)
        self.log.validation(epochs_done, gather_scores(samples, self.accelerator), prompts)
        if epochs_done:  # more is not always better
            self.policy.save_lora(self.log.folder / "lora" / f"epoch_{epochs_done:04d}")
