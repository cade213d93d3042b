"""What could any training learn from the reward? The exact gradient of MRC, an upper bound of sampling.

    python -m tiny.exact_gradient --config config/tiny.py:mvdream --config.pretrained.lora= [--config.KEY=VALUE ...]

--steps_back  through how many of the last denoising steps the gradient flows (all)

A diagnostic, not a way to train a large painter. What policy gradients estimate from many samples is differentiated
here through LPIPS, rendering, reconstruction, decoder and the whole sampling chain, with the noise of every step given
(DRaFT, Clark et al. 2023; AlignProp, Prabhudesai et al. 2023). Where exact gradients do not raise what the reward is
there for, which the judges of mrc/judges.py tell, estimates of them do not either. The converse does not hold: exact
gradients also find changes of pixels that please the reconstructor and that no sampling would meet.

All else is that of a run (carve3d_train.py): prompts, noise, step size (train.kl_per_update, train.adam_*), held area,
validations with the judges, checkpoints, and the folder, for `python -m tiny.evaluate`. But every epoch has an update,
the first too, which in a run only fills the trackers.
"""

import inspect
import time

import torch
from absl import flags
from ml_collections import ConfigDict
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from carve3d_train import Run
from config import cli
from config.errors import UserError
from ddpo.sampling import NOISE, epoch_prompts, gather_scores, local_slice, make_generator
from ddpo.update import optimizer_step, set_gradient, without_growth
from diffusers_patch.ddim_with_logprob import ddim_mean_std
from diffusers_patch.policy import MultiViewPolicy
from diffusers_patch.rollout import Trajectory
from mrc.bounding_box import BACKGROUND
from mrc.mrc import MRC, resize_views, view_distances
from recon.volume_rendering import render_scenes

SOFTNESS = 0.01  # of a silhouette's edge, in the range of pixels: wide enough to have a gradient, and no wider


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


class Ascent(Run):
    """A run whose updates follow the exact gradient, one in every epoch."""

    def __init__(self, config: ConfigDict, steps_back: int):
        self.steps_back = steps_back
        super().__init__(config)

    def epoch(self, epoch: int) -> None:
        """Paint a batch, and take one step along the exact gradient of its mean reward."""
        config, accelerator, start = self.config, self.accelerator, time.perf_counter()
        prompts = epoch_prompts(self.prompts, config, epoch, accelerator.num_processes)
        local = local_slice(len(prompts), accelerator)
        generators = [make_generator(config.seed, NOISE, epoch, i) for i in range(local.start, local.stop)]
        samples = self.collect_samples(self.reward_fn, prompts[local], generators, before_batch=self.stopping.check)
        scores = gather_scores(samples, accelerator)
        self.kl = float(scores["kl"].mean()) if self.score_reference else 0.0
        self.calibration.start(samples.trajectory)
        sums = 0
        for index in torch.arange(len(generators)).split(config.train.batch_size):
            chains = samples.trajectory.take(index).to(self.policy.device)
            sums += exact_gradients(self.policy, self.reward_fn.judge, chains, config, self.steps_back)
        reward, area = accelerator.reduce(sums / len(generators), reduction="mean")
        statistics = {"loss": -float(scores["reward"].mean()), **self.step(reward, area)}
        self.epochs_done += 1
        seconds = {**samples.seconds, "epoch": time.perf_counter() - start}
        with self.stopping.safely():
            self.log.epoch(epoch, samples, prompts[local], scores, [statistics], seconds)

    def step(self, reward: torch.Tensor, area: torch.Tensor) -> dict[str, float]:
        """An optimizer step along the gradient `reward` (P,), without what of it changes the area whose gradient is
        `area` (P,), if that is held: statistics as of `ddpo.update.optimizer_step`."""
        parameters = self.policy.trainable_parameters()
        set_gradient(parameters, -reward)
        before = parameters_to_vector(parameters).detach()
        statistics = optimizer_step(parameters, self.optimizer, self.accelerator, self.config, None)
        if self.config.train.hold_foreground:  # of the step itself: Adam turns what was orthogonal to area before it
            step = parameters_to_vector(parameters).detach() - before
            vector_to_parameters(before + without_growth(step, area), parameters)
        return {**statistics, **self.calibration.after_update()}


def define_flags() -> None:
    flags.DEFINE_integer("steps_back", 1000, "Through how many steps the gradient flows.", lower_bound=1)


def main(args) -> None:
    """args: the parsed flags."""
    config = args.config
    if config.reward_fn != "mrc" or config.recon.name != "tiny_lrm":
        raise UserError(
            f"config.reward_fn = {config.reward_fn!r} and config.recon.name = {config.recon.name!r}, but only MRC of "
            f"'tiny_lrm' is differentiated here: leave them as config/tiny.py has them"
        )
    Ascent(config, args.steps_back).train()


if __name__ == "__main__":
    cli.run("exact_gradient", main, "config/tiny.py", define_flags)
