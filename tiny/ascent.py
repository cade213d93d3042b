"""Training runs that are told where to go: the frame of tiny/exact_gradient.py and tiny/critic.py.

All but the direction of the updates is that of a training run: prompts, noise, step size, held area, validations, and
what is left in its folder, which `python -m tiny.evaluate` compares before and after.
"""

from abc import abstractmethod

import torch
from ml_collections import ConfigDict

from carve3d_train import Run
from config.errors import UserError
from ddpo.area import without
from ddpo.sampling import Samples
from ddpo.update import optimizer_step, set_gradient
from diffusers_patch.rollout import Trajectory


class Ascent(Run):
    """A run of one process with one update in each epoch but the first, along `direction`."""

    def __init__(self, config: ConfigDict):
        config.train.gradients_while_painting = False  # of log-probabilities, which nobody asks for
        super().__init__(config)
        if self.accelerator.num_processes > 1:
            raise UserError(
                f"{self.accelerator.num_processes} processes were started, but this study is one: start it by python"
            )
        self.parameters = self.policy.trainable_parameters()

    @abstractmethod
    def gradients(self, chains: Trajectory) -> torch.Tensor:
        """Gradients (2, P), in the trainable weights, of the sums over samples of what is to grow, and of the area.

        chains: some of the epoch's samples, on the painter's device."""

    def direction(self, trajectory: Trajectory) -> torch.Tensor:
        """The gradient (P,) of what is to grow, mean over samples; where area is held, without what of it changes the
        area, and against what this has grown."""
        parts = torch.arange(len(trajectory)).split(self.config.train.batch_size)
        totals = sum(self.gradients(trajectory.take(index).to(self.policy.device)) for index in parts)
        wanted, area = totals / len(trajectory)
        if self.area_control is None:
            return wanted
        scale = wanted.norm() / area.norm().clamp(min=torch.finfo(area.dtype).tiny)
        return without(wanted, area) - self.area_control.penalty() * scale * area

    def update(self, epoch: int, samples: Samples, advantages: torch.Tensor) -> list[dict]:
        """One step along `direction`; arguments and result as of `Run.update`."""
        if epoch == 0:
            return []
        self.calibration.start(samples.trajectory)
        set_gradient(self.parameters, -self.direction(samples.trajectory))
        after = self.calibration.after_update
        loss = -float(samples.reward.nanmean())
        return [{"loss": loss, **optimizer_step(self.parameters, self.optimizer, self.accelerator, self.config, after)}]
