"""Runs that are told where to go: the frame of tiny/exact_gradient.py and tiny/critic.py.

Prompts, noise, step size (train.kl_per_update, train.adam_*), held area and validations are those of a training run. So
is the folder, for `python -m tiny.evaluate`; in it ascent.json compares all quantities and judges before and after.
"""

import json
import time
from collections.abc import Callable

import torch
from ml_collections import ConfigDict
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from ddpo.area import without
from ddpo.calibration import StepCalibration
from ddpo.files import write_whole
from ddpo.run_folder import open_run
from ddpo.run_log import RunLog
from ddpo.sampling import (
    EVALUATION,
    NOISE,
    PROMPTS,
    VALIDATION,
    Samples,
    collect_samples,
    gather_scores,
    make_generator,
)
from ddpo.setup import make_optimizer, start_accelerator
from ddpo.update import optimizer_step, set_gradient
from diffusers_patch.loading import check_cameras, load_painter, make_trainable
from diffusers_patch.rollout import Trajectory
from mrc.judges import diversity
from mrc.rewards import load_reward
from prompts.dataset import PromptDataset
from tiny.evaluate import compare, evaluate_views, table

DIVERSE, AGAIN = 16, 3  # validation captions that are painted several times, and how often


class Ascent:
    """A run with one update in each of the config.num_epochs epochs, along a gradient that is given.

    gradients: called with the Ascent and some of its chains, on its device, returns the gradients (2, P) of the sums
    over these samples of reward and area, in the policy's trainable weights."""

    def __init__(self, config: ConfigDict, gradients: Callable[["Ascent", Trajectory], torch.Tensor]):
        self.config, self.gradients = config, gradients
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
        self.log = RunLog(opened.folder, accelerator, config)
        self.log.start(0, False, opened)

    def run(self) -> None:
        """Validate, ascend, validate, and compare."""
        before = self.validation(0)
        for epoch in range(self.config.num_epochs):
            self.epoch(epoch)
            if (epoch + 1) % self.config.val_freq == 0 or epoch + 1 == self.config.num_epochs:
                after = self.validation(epoch + 1)
        self.policy.save_lora(self.log.folder / "final")
        self.log.final()
        result = compare(before, after)
        write_whole(self.log.folder / "ascent.json", json.dumps(result, indent=1))
        print(table(result))

    def paint(self, reward_fn: Callable, prompts: list[str], *stream: int, keep_images: int = 0) -> Samples:
        """One sample for each prompt; stream: seed, purpose and indices of the generators."""
        generators = [make_generator(*stream, i) for i in range(len(prompts))]
        return collect_samples(
            self.policy, reward_fn, prompts, generators, self.config, score_reference=True, keep_images=keep_images
        )

    def epoch(self, epoch: int) -> None:
        """Paint a batch, and take one step along the gradient of its mean reward."""
        config, start = self.config, time.perf_counter()
        prompts, _ = self.prompts.sample(config.sample.total_batch_size, make_generator(config.seed, PROMPTS, epoch))
        samples = self.paint(self.reward_fn, prompts, config.seed, NOISE, epoch)
        self.calibration.start(samples.trajectory)
        gradient = 0
        for index in torch.arange(len(prompts)).split(config.train.batch_size):
            chains = samples.trajectory.take(index).to(self.policy.device)
            gradient += self.gradients(self, chains)
        reward, area = gradient / len(prompts)
        statistics = {"loss": -float(samples.reward.mean()), **self.step(reward, area)}
        seconds = {"epoch": time.perf_counter() - start}
        self.log.epoch(epoch, samples, prompts, gather_scores(samples, self.accelerator), [statistics], seconds)

    def step(self, reward: torch.Tensor, area: torch.Tensor) -> dict[str, float]:
        """An optimizer step along the gradient `reward` (P,), without what of it changes the area whose gradient is
        `area` (P,), if that is held: statistics as of `ddpo.update.optimizer_step`."""
        set_gradient(self.parameters, -reward)
        before = parameters_to_vector(self.parameters).detach()
        statistics = optimizer_step(self.parameters, self.optimizer, self.accelerator, self.config, None)
        if self.config.train.hold_foreground:  # of the step itself: Adam turns what was orthogonal to area before it
            step = parameters_to_vector(self.parameters).detach() - before
            vector_to_parameters(before + without(step, area), self.parameters)
        return {**statistics, **self.calibration.after_update()}

    def validation(self, epochs_done: int) -> dict[str, torch.Tensor]:
        """Paint the validation prompts as a run does: {quantity or judge: (N,), diversity: (DIVERSE,)}."""
        prompts = self.prompts.val_set
        samples = self.paint(self.reward_fn.judged, prompts, 0, VALIDATION, keep_images=len(prompts))
        self.log.validation_images(epochs_done, range(len(prompts)), samples.images)
        self.log.validation(epochs_done, gather_scores(samples, self.accelerator), prompts)
        measured = evaluate_views(samples.images["views"] / 255, prompts)
        again = prompts[:DIVERSE] * AGAIN
        views = self.paint(self.reward_fn, again, 0, EVALUATION, keep_images=len(again)).images["views"] / 255
        spread = diversity(views.to(self.policy.device), again, self.reward_fn.judge.lpips)
        spread = spread.view(AGAIN, -1).mean(0)  # of a caption, whose samples are not independent
        return {"reward": samples.reward, **samples.judges, **measured, "diversity": spread.cpu()}
