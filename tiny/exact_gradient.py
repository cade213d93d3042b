"""What could any training learn from the reward? The exact gradient of MRC, an upper bound of sampling.

    python -m tiny.exact_gradient --config config/tiny.py:mvdream --config.pretrained.lora= [--config.KEY=VALUE ...]

--steps_back  through how many of the last denoising steps the gradient flows (all)

A diagnostic, not a way to train a large painter. What policy gradients estimate from many samples is differentiated
here through LPIPS, rendering, reconstruction, decoder and the whole sampling chain, with the noise of every step given
(DRaFT, Clark et al. 2023; AlignProp, Prabhudesai et al. 2023). Where exact gradients do not raise what the reward is
there for, which the judges of mrc/judges.py tell, estimates of them do not either. The converse does not hold: exact
gradients also find changes of pixels that please the reconstructor and that no sampling would meet.

Prompts, noise, step size (train.kl_per_update, train.adam_*), held area and validations are those of a run, with one
update in each of the config.num_epochs epochs. So is the folder, for `python -m tiny.evaluate`; in it
exact_gradient.json compares all quantities and judges before and after, as does the table that is printed.
"""

import inspect
import json
import time
from collections.abc import Callable

import torch
from absl import flags
from ml_collections import ConfigDict
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from config import cli
from config.errors import UserError
from config.validate import validate
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
from ddpo.setup import make_optimizer, set_arithmetic, start_accelerator
from ddpo.update import optimizer_step, set_gradient
from diffusers_patch.ddim_with_logprob import ddim_mean_std
from diffusers_patch.loading import check_cameras, load_painter, make_trainable
from diffusers_patch.policy import MultiViewPolicy
from diffusers_patch.rollout import Trajectory
from mrc.bounding_box import BACKGROUND
from mrc.judges import diversity
from mrc.mrc import MRC, resize_views, view_distances
from mrc.rewards import load_reward
from prompts.dataset import PromptDataset
from recon.volume_rendering import render_scenes
from tiny.evaluate import compare, evaluate_views, table

SOFTNESS = 0.01  # of a silhouette's edge, in the range of pixels: wide enough to have a gradient, and no wider

DIVERSE, AGAIN = 16, 3  # validation captions that are painted several times, and how often


def reward_and_area(judge: MRC, views: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """-MRC and the share of the views that is foreground, both (B,) and differentiable in views (B, V, 3, S, S).

    judge: of a TinyLRM. Box, occupied cells and depths are constants, and empty views get no penalty. The edge of the
    foreground, a step for `mrc.bounding_box`, is a sigmoid here."""
    model, size = judge.reconstructor, judge.render_size or views.shape[-1]
    planes = model.planes(resize_views(views, model.input_size), model.cameras).float()
    renders, _ = render_scenes(model.ray_renderer, planes, model.cameras, size, model.chunk_size)
    distances = view_distances(resize_views(views, size), renders, judge.lpips, judge.bbox_lpips)
    return -distances.mean(1), torch.sigmoid((BACKGROUND - views.amin(2)) / SOFTNESS).mean((1, 2, 3))


def exact_gradients(
    policy: MultiViewPolicy, judge: MRC, trajectory: Trajectory, config: ConfigDict, steps_back: int
) -> torch.Tensor:
    """Gradients (2, P) of the sums over samples of reward and area, in the policy's trainable weights.

    trajectory: B chains that this policy painted, on its device. The chain rule is followed from the last step to the
    first, each computed again from its latents, so that the memory is that of one step."""
    parameters = policy.trainable_parameters()
    x = trajectory.latents[:, -1].clone().requires_grad_()
    decode = inspect.unwrap(type(policy).decode)  # what `torch.no_grad` wraps
    values = reward_and_area(judge, decode(policy, x))
    back = [torch.autograd.grad(value.sum(), x, retain_graph=True)[0] for value in values]
    totals = torch.zeros(2, sum(p.numel() for p in parameters), device=x.device)
    for k in reversed(range(max(0, trajectory.num_steps - steps_back), trajectory.num_steps)):
        x, t = trajectory.latents[:, k].clone().requires_grad_(), trajectory.timesteps[:, k]
        output = policy.predict(x, t, trajectory.conditioning, config.sample.guidance_scale)
        mean, _ = ddim_mean_std(policy.scheduler, output, t, x, config.sample.eta)
        for n in range(2):  # the noise that was added to the mean is a constant
            back[n], *found = torch.autograd.grad(mean, [x, *parameters], back[n], retain_graph=True)
            totals[n] += parameters_to_vector(found)
    return totals


class Ascent:
    """A run whose updates follow the exact gradient."""

    def __init__(self, config: ConfigDict, steps_back: int):
        self.config, self.steps_back = config, steps_back
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
        write_whole(self.log.folder / "exact_gradient.json", json.dumps(result, indent=1))
        print(table(result))

    def paint(self, reward_fn: Callable, prompts: list[str], *stream: int, keep_images: int = 0) -> Samples:
        """One sample for each prompt; stream: seed, purpose and indices of the generators."""
        generators = [make_generator(*stream, i) for i in range(len(prompts))]
        return collect_samples(
            self.policy, reward_fn, prompts, generators, self.config, score_reference=True, keep_images=keep_images
        )

    def epoch(self, epoch: int) -> None:
        """Paint a batch, and take one step along the exact gradient of its mean reward."""
        config, start = self.config, time.perf_counter()
        prompts, _ = self.prompts.sample(config.sample.total_batch_size, make_generator(config.seed, PROMPTS, epoch))
        samples = self.paint(self.reward_fn, prompts, config.seed, NOISE, epoch)
        self.calibration.start(samples.trajectory)
        gradient = 0
        for index in torch.arange(len(prompts)).split(config.train.batch_size):
            chains = samples.trajectory.take(index).to(self.policy.device)
            gradient += exact_gradients(self.policy, self.reward_fn.judge, chains, config, self.steps_back)
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


def define_flags() -> None:
    flags.DEFINE_integer("steps_back", 1000, "Through how many steps the gradient flows.", lower_bound=1)


def main(args) -> None:
    """args: the parsed flags."""
    config = args.config
    set_arithmetic(config)
    validate(config, 1)
    check_cameras(config)
    if config.reward_fn != "mrc" or config.recon.name != "tiny_lrm":
        raise UserError(
            f"config.reward_fn = {config.reward_fn!r} and config.recon.name = {config.recon.name!r}, but only MRC of "
            f"'tiny_lrm' is differentiated here: leave them as config/tiny.py has them"
        )
    Ascent(config, args.steps_back).run()


if __name__ == "__main__":
    cli.run("exact_gradient", main, "config/tiny.py", define_flags)
