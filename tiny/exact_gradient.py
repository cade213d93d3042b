"""What could any training learn from the reward? The exact gradient of MRC, an upper bound of sampling.

    python -m tiny.exact_gradient --config config/tiny.py:exact [--config.KEY=VALUE ...]

--steps_back  through how many of the last denoising steps the gradient flows (all)

A diagnostic, not a way to train a large painter. What policy gradients estimate from many samples is differentiated
here through LPIPS, rendering, reconstruction, decoder and the whole sampling chain, with the noise of every step given
(DRaFT, Clark et al. 2023; AlignProp, Prabhudesai et al. 2023). Where exact gradients do not raise what the reward is
there for, which the judges of mrc/judges.py tell, estimates of them do not either. The converse does not hold: exact
gradients also find changes of pixels that please the reconstructor and that no sampling would meet.

How a run goes on and what it leaves: tiny/ascent.py.
"""

import inspect
from collections.abc import Sequence

import torch
from absl import flags
from ml_collections import ConfigDict
from torch.nn.utils import parameters_to_vector

from config import cli
from config.errors import UserError
from ddpo.area import AreaControl, without
from ddpo.calibration import StepCalibration
from ddpo.sampling import Samples
from ddpo.update import optimizer_step, set_gradient
from diffusers_patch.policy import MultiViewPolicy
from diffusers_patch.rollout import Trajectory
from mrc.bounding_box import BACKGROUND
from mrc.mrc import MRC, resize_views, view_distances
from recon.volume_rendering import render_scenes
from tiny.ascent import Ascent

MOMENTUM = 0.9  # weight of the updates before in the mean of the gradients
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
        mean, _ = policy.mean_std(x, t, trajectory.conditioning, config.sample.guidance_scale, config.sample.eta)
        for n in range(2):  # the noise that was added to the mean is a constant
            back[n], *found = torch.autograd.grad(mean, [x, *parameters], back[n], retain_graph=True)
            totals[n] += parameters_to_vector(found)
    return totals


class ExactGradient(Ascent):
    """A run along the exact gradient of its reward, one step in an epoch. Arguments: see the command."""

    def __init__(self, config: ConfigDict, steps_back: int):
        super().__init__(config)
        self.steps_back = steps_back
        self.calibration = StepCalibration(self.policy, self.optimizer, self.accelerator, config)
        self.area_control = AreaControl() if self.config.train.hold_foreground else None
        self.means = None  # of the gradients, over updates

    def gradients(self, chains: Trajectory) -> torch.Tensor:
        """See `exact_gradients`."""
        return exact_gradients(self.policy, self.reward_fn.judge, chains, self.config, self.steps_back)

    def direction(self, trajectory: Trajectory) -> torch.Tensor:
        """The gradient (P,) of the reward, mean over samples and over the last updates; where area is held, without
        what of it changes the area, and against what this has grown.

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

    def update(self, epoch: int, samples: Samples, prompts: Sequence[str]) -> list[dict]:
        """One step along `direction`, in the first epoch none; arguments and result as of `Ascent.update`."""
        if self.area_control:
            good = samples.reward.isfinite().cpu().numpy()
            self.area_control.observe(samples.foreground.cpu().numpy(), prompts, good)
        if epoch == 0:
            return []
        self.calibration.start(samples.trajectory)
        set_gradient(self.parameters, -self.direction(samples.trajectory))
        after = self.calibration.after_update
        loss = -float(samples.reward.nanmean())
        return [{"loss": loss, **optimizer_step(self.parameters, self.optimizer, self.accelerator, self.config, after)}]


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
    ExactGradient(config, args.steps_back).train()


if __name__ == "__main__":
    cli.run("exact_gradient", main, "config/tiny.py", define_flags)
